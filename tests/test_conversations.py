"""Conversations, tool calls and thinking templates: what is taught, and what never is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from ctxdistill import pipeline
from ctxdistill.conversations import turns
from ctxdistill.dataset import prepare, read_rows
from ctxdistill.errors import DataError, RecipeError
from ctxdistill.prompts import Prompter
from ctxdistill.recipe import DataSection, Recipe
from ctxdistill.rows import Row
from ctxdistill.rundir import RunDir

CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weigh", "arguments": {"of": "bell"}}}],
}
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% if m.tool_calls %}"
    "CALL {{ m.tool_calls[0].function | tojson }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(n: int) -> list[dict[str, Any]]:
    """Two questions, a tool call in between: three assistant's turns, two of them with text."""
    return [say("user", f"hello {n}"), say("assistant", f"hi {n}"), say("user", f"weigh it {n}"), CALL,
            say("tool", f"{n} tons"), say("assistant", f"it weighs {n} tons")]  # fmt: skip


def recipe(job: Path, **overrides: Any) -> Recipe:
    tiny.write_jsonl(job / "talks.jsonl", [{"messages": talk(n)} for n in range(10)])
    raw = tiny.recipe_dict(
        job,
        queries={"data": "talks.jsonl", "messages": "messages", "turns": "answered", "taught": "every"},
        eval__format=None,
    )
    raw["context"] = {"system": "Shout."}
    raw["eval"] |= {"data": None, "share": 0.3}
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    return Recipe.from_dict(raw, base_dir=job)


def test_each_turn_is_asked_for_with_all_before_it() -> None:
    row = Row("r", {"messages": talk(3), "note": "kept"}, "talks.jsonl:1")
    made, silent = turns([row], DataSection(messages="messages", turns="answered", taught="every"))
    assert [(r.fields["messages"], r.fields["answer"]) for r in made] == [
        (talk(3)[:1], "hi 3"),
        (talk(3)[:5], "it weighs 3 tons"),
    ]
    assert silent == 1 and len({r.id for r in made}) == 2 and {r.fields["conversation"] for r in made} == {"r"}
    assert made[1].origin == "talks.jsonl:1, message 6" and made[1].fields["note"] == "kept"
    assert turns([row], DataSection(messages="messages"))[0] == [row]
    with pytest.raises(DataError, match=r"talks.jsonl:1: no assistant's turn"):
        turns(
            [Row("r", {"messages": talk(3)[:1]}, "talks.jsonl:1")],
            DataSection(messages="messages", turns="answered", taught="every"),
        )


def test_conversations_stay_on_one_side_and_their_turns_are_the_completions(job: Path) -> None:
    r = recipe(job, completions__source="data", train__validation=0.3)
    _, p, data = prepare(r)
    sides = [{row.fields["conversation"] for row in rows} for rows, _ in data.splits.values()]
    assert all(sides) and len(set.union(*sides)) == sum(map(len, sides)) == 10
    assert sum(len(rows) for rows, _ in data.splits.values()) == 20 and data.counts["turns_without_text"] == 10
    for pair in data.pairs["train"]:
        assert p.text(p.completion(pair.answer or "")) == pair.answer
        assert "Shout." in p.tokenizer.decode(pair.teacher) and "Shout." not in p.tokenizer.decode(pair.student)
        assert (pair.answer or "").encode() not in p.tokenizer.decode(pair.student).encode()


def test_a_run_on_every_turn(job: Path) -> None:
    run = pipeline.distill(recipe(job, completions__source="data"), job / "run")
    assert any("10 assistant's turns hold a tool call" in note for note in run.evaluation["notes"])
    shown = RunDir(run.path).read_jsonl("prompts.jsonl")
    said = {"".join(piece for piece, _ in row["completion"]) for row in shown if row["completion"]}
    assert said <= {t for n in range(10) for t in (f"hi {n}</s>", f"it weighs {n} tons</s>")} and len(said) > 10


def thinking(job: Path, **overrides: Any) -> Prompter:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = THINKS
    return Prompter(recipe(job, **overrides), tokenizer)


def test_a_tool_call_reaches_the_template_as_it_is(job: Path) -> None:
    p = thinking(job)
    rows = [r for found, _ in read_rows(p.recipe, p)[0].values() for r in found if len(r.fields["messages"]) == 5]
    assert len(rows) == 10
    for row in rows:
        text = p.tokenizer.decode(p.pair(row, p.recipe.queries).student)
        assert '<|assistant|>CALL {"name": "weigh", "arguments": {"of": "bell"}}</s><|tool|>' in text
        assert "".join(part for part, _ in p.parts(row, p.recipe.queries, teacher=False)) == text


def test_a_think_block_of_the_template_is_in_the_prompt_and_not_supervised(job: Path) -> None:
    off = {"enable_thinking": False}
    p = thinking(job)
    row = Row("r", {"messages": [say("user", "hi")]}, "r")
    assert p.pair(row, p.recipe.queries).student[-1] == p.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert any("its thoughts are taught" in note for note in p.template_notes())
    raw = recipe(job).to_dict()
    for side, other in (("teacher", "student"), ("student", "teacher")):
        raw["prompt"] = {f"{side}_template_kwargs": off}
        p = Prompter(Recipe.from_dict(raw, base_dir=job), p.tokenizer)
        pair = p.pair(row, p.recipe.queries)
        assert p.tokenizer.decode(getattr(pair, side)).endswith("<|assistant|><think>\n\n</think>\n\n")
        assert p.tokenizer.decode(getattr(pair, other)).endswith("<|assistant|>")
        assert "think" not in p.tokenizer.decode(p.completion("hello"))
        notes = p.template_notes()
        assert any(f"begins the {side}'s answer with '<|assistant|><think> </think>'" in note for note in notes)
        assert any("begin their answers differently" in note for note in notes)
        assert any("its thoughts are taught" in note for note in notes) == (side == "student")
    raw["prompt"] = {"template_kwargs": off}
    both = Prompter(Recipe.from_dict(raw, base_dir=job), p.tokenizer).template_notes()
    assert len(both) == 2 and not any("differently" in note for note in both)
    plain = Prompter(recipe(job), tiny.tokenizer())
    assert plain.template_notes() == []


def test_turns_need_messages(job: Path) -> None:
    with pytest.raises(RecipeError, match=r"queries\.turns has no effect"):
        recipe(job, queries__messages=None)
