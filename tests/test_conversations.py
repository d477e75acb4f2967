"""Conversations, tool calls and thinking templates: what is taught, and what never is."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("arguments", ['{"of": "bell"}', {"of": "bell"}])
def test_arguments_in_json_text_are_an_object_for_the_template_and_text_for_a_server(job: Path, arguments: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "weigh", "arguments": arguments}}]}
    (job / "before.json").write_text(json.dumps([say("user", "weigh it"), call, say("tool", "3 tons")]))
    p = thinking(job, context__messages="before.json", context__column="own")
    row = Row("r", {"messages": [say("user", "again"), call, say("tool", "4 tons")], "own": [call]}, "r")
    pair = p.pair(row, p.recipe.queries)
    right = 'CALL {"name": "weigh", "arguments": {"of": "bell"}}</s>'
    assert [p.tokenizer.decode(side).count(right) for side in (pair.teacher, pair.student)] == [3, 1]
    sent = p.request(row, p.recipe.queries)
    assert sent[1]["tool_calls"] == [{"id": "c1", "function": {"name": "weigh", "arguments": '{"of": "bell"}'}}]  # type: ignore[index]
    assert row.fields["own"] == [call]  # the data stay as they are


@pytest.mark.parametrize("arguments", ["", "north", "[1]", "{", None, 3])
def test_arguments_that_are_no_object_in_json_stay(job: Path, arguments: Any) -> None:
    p = thinking(job)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "go", "arguments": arguments}}]}
    row = Row("r", {"messages": [say("user", "go"), call, say("tool", "gone")]}, "r")
    text = p.tokenizer.decode(p.pair(row, p.recipe.queries).student)
    assert f'CALL {{"name": "go", "arguments": {json.dumps(arguments)}}}</s>' in text


def asks(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def calling(arguments: Any, name: str = "weigh", **more: Any) -> dict[str, Any]:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}, **more}]}
    return asks(say("user", "and the other?"), call, say("tool", "20 tons"))


DIFFERENT = [
    calling({"of": "bell"}), calling({"of": "anchor"}), calling({"of": "bell"}, "lift"),
    asks(say("user", "and the other?"), say("assistant", "20 tons"), say("user", "why?")),
    asks(say("user", "and the other?"), say("user", "20 tons"), say("user", "why?")),
    asks(say("user", "and the other?\n20 tons"), say("assistant", "why?"), say("user", "so")),
    asks(say("user", "and the other?"), say("assistant", "20 tons\nwhy?"), say("user", "so")),
]  # fmt: skip


@pytest.mark.parametrize("duplicates", ["error", "drop"])
def test_conversations_that_differ_in_roles_or_calls_are_different(job: Path, duplicates: str) -> None:
    p = thinking(job, queries__turns="query", queries__taught="last", queries__duplicates=duplicates)
    tiny.write_jsonl(job / "talks.jsonl", DIFFERENT)
    splits, counts = read_rows(p.recipe, p)
    assert sum(len(rows) for rows, _ in splits.values()) == len(DIFFERENT) and counts["dropped_duplicates"] == 0


def test_conversations_that_are_the_same_but_for_how_they_are_written(job: Path) -> None:
    same = [calling({"of": "bell"}), calling('{"of":"bell"}', id="c7"), calling({"of": "Bell"})]
    same[2]["messages"][0]["content"] = "And  the\nother?"
    p = thinking(job, queries__turns="query", queries__taught="last", queries__duplicates="drop")
    tiny.write_jsonl(job / "talks.jsonl", [*DIFFERENT, *same[1:], asks(say("user", "hi")), asks(say("user", "Hi"))])
    assert read_rows(p.recipe, p)[1]["dropped_duplicates"] == 3
    p = thinking(job, queries__turns="query", queries__taught="last", eval__share=0.0)
    tiny.write_jsonl(job / "talks.jsonl", same)
    with pytest.raises(DataError, match=r"talks.jsonl:2 = talks.jsonl:1 \('and the other\?"):
        read_rows(p.recipe, p)


def test_one_turn_of_a_user_s_is_the_text_that_it_holds(job: Path) -> None:
    p = thinking(job, queries__turns="query", queries__taught="last", context__demos="demos.jsonl")
    tiny.write_jsonl(job / "talks.jsonl", [asks(say("user", "say red")), *DIFFERENT])
    with pytest.raises(DataError, match=r"context.demos and .* overlap in 1 row"):
        read_rows(p.recipe, p)


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
