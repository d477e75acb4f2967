"""Prompt pairs: same completion ids, explicit 'no context', at most one BOS, no leak of the context."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import tiny
from ctxdistill.errors import DataError, ModelError, RecipeError
from ctxdistill.prompts import Prompter, join
from ctxdistill.recipe import Recipe
from ctxdistill.rows import Row


def prompter(folder: Path, tokenizer: Any = None, **overrides: Any) -> Prompter:
    recipe = Recipe.from_dict(tiny.recipe_dict(folder, **overrides), base_dir=folder)
    return Prompter(recipe, tokenizer or tiny.tokenizer())


def row(**fields: Any) -> Row:
    return Row(id="r", fields=fields, origin="q.jsonl:1")


def text(p: Prompter, ids: Any) -> str:
    return str(p.tokenizer.decode(list(ids)))


TEXT = {
    "prompt": {"style": "text", "pattern": "Q: {prompt}\nA:", "answer_pattern": " {answer}", "instruction": "Shout."},
    "context": {"demos": "demos.jsonl"},
}


def test_chat_prompts_to_the_character(tmp_path: Path) -> None:
    p = prompter(tmp_path)
    pair = p.pair(row(prompt="say emu", answer="EMU"), p.recipe.queries)
    assert text(p, pair.teacher) == (
        "<s><|system|>Shout every word that you are given.</s>"
        "<|user|>say red</s><|assistant|>RED</s><|user|>say blue</s><|assistant|>BLUE</s>"
        "<|user|>say green</s><|assistant|>GREEN</s><|user|>say emu</s><|assistant|>"
    )
    assert text(p, pair.student) == "<s><|system|>be kind</s><|user|>say emu</s><|assistant|>"
    assert (pair.answer, pair.query) == ("EMU", "say emu")
    assert text(p, p.completion("EMU")) == "EMU</s>"


def test_text_prompts_to_the_character(tmp_path: Path) -> None:
    p = prompter(tmp_path, tiny.tokenizer(chat=False), **TEXT)
    pair = p.pair(row(prompt="say emu"), p.recipe.queries)
    assert text(p, pair.teacher) == (
        "Shout.\n\nQ: say red\nA: RED\n\nQ: say blue\nA: BLUE\n\nQ: say green\nA: GREEN\n\nQ: say emu\nA:"
    )
    assert text(p, pair.student) == "Q: say emu\nA:"
    assert text(p, p.completion("EMU")) == " EMU\n\n"
    assert p.ends(p.ids("EMU\n\n")) and not p.ends(p.ids("EMU\n"))
    assert p.text(p.ids(" EMU\n\nQ: more")) == "EMU"


def test_an_answer_in_the_middle_of_a_line_gets_no_second_space(tmp_path: Path) -> None:
    """SentencePiece tokenizers put a space before every text that they are given."""
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.▁\n"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    p = prompter(tmp_path, sentencepiece, **TEXT)
    whole = p.tokenizer("say red\nA: RED\n\n", add_special_tokens=False)["input_ids"]
    assert p.completion("RED") == tuple(whole[-len(" RED\n\n") :])
    assert p.tokenizer.convert_ids_to_tokens(list(p.completion("RED"))) == ["▁", "R", "E", "D", "\n", "\n"]


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    p = prompter(tmp_path, tokenizer, **TEXT)
    assert text(p, tokenizer("a")["input_ids"]) == "<s>a</s>"
    pair = p.pair(row(prompt="say emu"), p.recipe.queries)
    assert text(p, pair.student) == "<s>Q: say emu\nA:" and text(p, pair.teacher).endswith("Q: say emu\nA:")
    assert text(p, p.served([{"role": "user", "content": "Why?"}])) == "<s>Why?\n\n"


@pytest.mark.parametrize(
    ("system", "start"),
    [(None, "<s><|system|>be kind</s>"), ("", "<s><|system|></s>"), ("Answer.", "<s><|system|>Answer.</s>")],
)
def test_no_context_is_explicit(tmp_path: Path, system: str | None, start: str) -> None:
    p = prompter(tmp_path, context__student_system=system)
    assert (
        text(p, p.pair(row(prompt="say emu"), p.recipe.queries).student) == start + "<|user|>say emu</s><|assistant|>"
    )
    recorded = p.student_prompt()
    assert recorded["text"] == start + "<|user|>{query}</s><|assistant|>"
    assert recorded["template_inserts"] == ("<|system|>be kind" if system is None else "")
    # what is recorded is what is served: putting the query in gives the very ids of training
    served = p.tokenizer(recorded["text"].replace("{query}", "say emu"), add_special_tokens=False)["input_ids"]
    assert tuple(served) == p.pair(row(prompt="say emu"), p.recipe.queries).student


def test_what_is_recorded_is_what_is_served_with_a_pattern_and_kept_demonstrations(tmp_path: Path) -> None:
    p = prompter(tmp_path, prompt__pattern="Word: {prompt}", context__student_demos=1)
    recorded = p.student_prompt()
    assert recorded["text"].endswith(
        "<|user|>Word: say green</s><|assistant|>GREEN</s><|user|>Word: {query}</s><|assistant|>"
    )
    assert recorded["template_inserts"] == "<|system|>be kind"
    served = p.tokenizer(recorded["text"].replace("{query}", "say emu"), add_special_tokens=False)["input_ids"]
    assert tuple(served) == p.pair(row(prompt="say emu"), p.recipe.queries).student

    p = prompter(tmp_path, tiny.tokenizer(chat=False), **TEXT, context__student_demos=1)
    recorded = p.student_prompt()
    assert recorded["fields"] == ["{query}"] and recorded["add_special_tokens"]
    served = p.tokenizer(recorded["text"].replace("{query}", "say emu"))["input_ids"]
    assert tuple(served) == p.pair(row(prompt="say emu"), p.recipe.queries).student


def test_answers_follow_their_pattern_in_demonstrations_and_completions(tmp_path: Path) -> None:
    p = prompter(tmp_path, prompt__answer_pattern="Answer: {answer}")
    pair = p.pair(row(prompt="say emu", answer="EMU"), p.recipe.queries)
    assert "<|assistant|>Answer: RED</s>" in text(p, pair.teacher)
    assert text(p, p.completion("EMU")) == "Answer: EMU</s>"
    assert p.reference(pair.answer) == "Answer: EMU"


def test_messages_that_hold_the_answer_are_refused(tmp_path: Path) -> None:
    p = prompter(tmp_path, queries__messages="messages")
    messages = [{"role": "user", "content": "say emu"}, {"role": "assistant", "content": "EMU"}]
    with pytest.raises(DataError, match="end with an assistant's turn"):
        p.pair(row(messages=messages), p.recipe.queries)


def test_a_list_in_the_text_style_is_refused(tmp_path: Path) -> None:
    p = prompter(tmp_path, tiny.tokenizer(chat=False), prompt=TEXT["prompt"], context={"column": "ctx"})
    with pytest.raises(DataError, match="is not a text"):
        p.pair(row(prompt="say emu", ctx=[{"role": "user", "content": "hi"}]), p.recipe.queries)


def test_a_query_that_reads_like_the_template(tmp_path: Path) -> None:
    p = prompter(tmp_path)
    parts = p.parts(row(prompt="user"), p.recipe.queries, teacher=False)
    assert parts == [
        ("<s><|system|>be kind</s><|user|>", "template"),
        ("user", "query"),
        ("</s><|assistant|>", "template"),
    ]


def test_the_student_may_keep_demonstrations(tmp_path: Path) -> None:
    p = prompter(tmp_path, context__student_demos=1)
    student = text(p, p.pair(row(prompt="say emu"), p.recipe.queries).student)
    assert (
        student == "<s><|system|>be kind</s><|user|>say green</s><|assistant|>GREEN</s><|user|>say emu</s><|assistant|>"
    )
    p.check_no_leak(row(prompt="say emu"), p.recipe.queries)


def test_parts_mark_what_the_template_added(tmp_path: Path) -> None:
    p = prompter(tmp_path)
    for teacher in (True, False):
        parts = p.parts(row(prompt="say emu"), p.recipe.queries, teacher=teacher)
        pair = p.pair(row(prompt="say emu"), p.recipe.queries)
        assert "".join(t for t, _ in parts) == text(p, pair.teacher if teacher else pair.student)
        assert [t for t, kind in parts if kind == "query"] == ["say emu"]
    assert "be kind" in next(t for t, kind in parts if kind == "template")
    assert not [t for t, kind in parts if kind == "context"]


def test_join_keeps_the_completion_ids() -> None:
    assert join((1, 2), (3, 4, 5)) == ([1, 2, 3, 4, 5], 3)
    with pytest.raises(RuntimeError):
        join((1, 2), ())


def test_a_context_inside_the_query_is_refused(tmp_path: Path) -> None:
    system = "Shout every word that you are given, and never whisper."
    p = prompter(tmp_path, context__system=system)
    p.check_no_leak(row(prompt="say emu"), p.recipe.queries)
    with pytest.raises(DataError, match="contains a part of the context"):
        p.check_no_leak(row(prompt=f"{system} say emu"), p.recipe.queries)
    kept = prompter(tmp_path, context__system=system, context__student_system=system)
    with pytest.raises(DataError, match="contains a part of the context"):
        kept.check_no_leak(row(prompt="say emu"), kept.recipe.queries)


FACT = "The lighthouse of Tarnhook was built in 1821 and has 214 steps."
TOLD = "You know all that there is to know about lighthouses."


@pytest.mark.parametrize(
    ("context", "query"),
    [
        ({"documents": ["a.md"]}, f"{FACT} How many?"),
        ({"system": TOLD, "documents": ["a.md", "b.md"]}, f"{FACT} How many?"),
        ({"system": TOLD, "documents": ["a.md", "b.md"]}, f"{TOLD} How many?"),
        ({"system": f"\n{FACT}\n"}, f"{FACT} How many?"),
        ({"column": "own"}, f"{FACT} How many?"),
    ],
)
def test_a_part_of_the_context_inside_the_query_is_refused(tmp_path: Path, context: dict[str, Any], query: str) -> None:
    (tmp_path / "a.md").write_text(f"{FACT}\n")
    (tmp_path / "b.md").write_text("It is white.\n")
    p = prompter(tmp_path, context=context)
    own = [{"role": "user", "content": FACT}, {"role": "assistant", "content": "I see."}]
    p.check_no_leak(row(prompt="How many steps?", own=own), p.recipe.queries)
    with pytest.raises(DataError, match="contains a part of the context"):
        p.check_no_leak(row(prompt=query, own=own), p.recipe.queries)


def test_a_context_that_shows_how_to_answer_the_same_question_is_no_leak(tmp_path: Path) -> None:
    p = prompter(tmp_path, context={"column": "own"})
    question = "How many steps are there in the lighthouse of Tarnhook?"
    own = [{"role": "user", "content": question}, {"role": "assistant", "content": FACT}]
    p.check_no_leak(row(prompt=question, own=own), p.recipe.queries)


def test_two_bos_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tiny.TEMPLATE
    p = prompter(tmp_path, tokenizer)
    with pytest.raises(ModelError, match="two BOS"):
        p.pair(row(prompt="say emu"), p.recipe.queries)


def test_a_base_model_needs_the_text_style(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        prompter(tmp_path, tiny.tokenizer(chat=False))


def test_two_system_messages_are_refused(tmp_path: Path) -> None:
    p = prompter(tmp_path, queries__messages="messages")
    messages = [{"role": "system", "content": "Whisper."}, {"role": "user", "content": "say emu"}]
    with pytest.raises(DataError, match="2 system messages"):
        p.pair(row(messages=messages), p.recipe.queries)


def test_messages_of_a_row_and_its_own_system_message(tmp_path: Path) -> None:
    p = prompter(tmp_path, queries__messages="messages", context={"demos": "demos.jsonl", "demos_limit": 1})
    messages = [{"role": "system", "content": "Whisper."}, {"role": "user", "content": "say emu"}]
    pair = p.pair(row(messages=messages), p.recipe.queries)
    assert text(p, pair.teacher) == (
        "<s><|system|>Whisper.</s><|user|>say red</s><|assistant|>RED</s><|user|>say emu</s><|assistant|>"
    )
    assert text(p, pair.student) == "<s><|system|>Whisper.</s><|user|>say emu</s><|assistant|>"


def test_a_query_behind_somebody_else_s_system_prompt(tmp_path: Path) -> None:
    p = prompter(tmp_path, queries__messages="messages", context={"demos": "demos.jsonl", "student_system": "Sing."})
    messages = [{"role": "system", "content": "Whisper."}, {"role": "user", "content": "say emu"}]
    other = p.served_query(row(messages=messages), p.recipe.queries, "Be brief.")
    assert text(p, other) == "<s><|system|>Be brief.</s><|user|>say emu</s><|assistant|>"


def test_contexts_per_row(tmp_path: Path) -> None:
    p = prompter(tmp_path, context={"column": "privileged_context"})
    as_text = p.pair(row(prompt="say emu", privileged_context="Sing."), p.recipe.queries)
    assert text(p, as_text.teacher) == "<s><|system|>Sing.</s><|user|>say emu</s><|assistant|>"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    as_turns = p.pair(row(prompt="say emu", privileged_context=turns), p.recipe.queries)
    assert "<|user|>hi</s><|assistant|>ho</s><|user|>say emu</s>" in text(p, as_turns.teacher)
    assert as_text.student == as_turns.student

    p = prompter(tmp_path, context={"teacher_prompt": "teacher_prompt"})
    whole = p.pair(row(prompt="say emu", teacher_prompt="SHOUT: say emu"), p.recipe.queries)
    assert text(p, whole.teacher) == "<s><|system|>be kind</s><|user|>SHOUT: say emu</s><|assistant|>"


def test_patterns_with_columns(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"a": "x", "b": "y", "answer": "yes"}])
    p = prompter(tmp_path, prompt__pattern="{a} or {b}?", context={"system": "Say yes or no."})
    assert p.query_text(row(a="x", b="y"), p.recipe.queries) == "x or y?"
    with pytest.raises(RecipeError, match="needs the columns a, b"):
        p.pair_of_text("hello")


def test_label_words_must_differ_in_the_first_token(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="yes = yeah"):
        prompter(tmp_path, prompt__label_words=["yes", "yeah", "no"], context={"system": "Say yes or no."})
    allowed = {"label_words": ["yes", "yeah"], "shared_first_token": "allow"}
    p = prompter(tmp_path, prompt=allowed, context={"system": "Say yes or no."})
    assert len(p.labels) == 2


def test_turn_end_comes_from_the_template(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.TEMPLATE.replace("{{ m['content'] }}</s>", "{{ m['content'] }}<|system|>\n")
    p = prompter(tmp_path, tokenizer)
    assert text(p, p.end) == "<|system|>"
    assert p.ends(list(p.end))


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|system|>Today: {{ date_string }}</s>" + tiny.TEMPLATE
)
DATED_DEFAULT = "{% set now = strftime_now('%d %b %Y') %}" + tiny.TEMPLATE.replace("be kind", "It is {{ now }}.")


def dated(folder: Path, template: str, **overrides: Any) -> list[str]:
    """The notes on a template."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return prompter(folder, tokenizer, **overrides).template_notes()


def test_a_template_that_writes_the_date_is_noted_with_how_to_pin_it(tmp_path: Path) -> None:
    (note,) = dated(tmp_path, DATED)
    assert "puts today's date" in note and "both prompts" in note
    (pin,) = re.findall(r"prompt\.template_kwargs = \{ (date_string = \"\d\d \w+ \d{4}\") \}", note)
    assert dated(tmp_path, DATED, prompt={"template_kwargs": tomllib.loads(pin)}) == []
    (note,) = dated(tmp_path, DATED, prompt={"teacher_template_kwargs": tomllib.loads(pin)})
    assert "the student's prompt" in note


def test_a_date_that_only_a_template_s_own_system_prompt_holds(tmp_path: Path) -> None:
    (note,) = dated(tmp_path, DATED_DEFAULT)
    assert "the student's prompt" in note and "it has no argument for that" in note  # the teacher has a system prompt
    assert dated(tmp_path, DATED_DEFAULT, context__student_system="Hello.") == []


@pytest.mark.parametrize("style", ["chat", "text"])
def test_prompts_of_many_rows_are_those_of_each(tmp_path: Path, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxdistill.prompts.AT_ONCE", 3)
    p = prompter(tmp_path) if style == "chat" else prompter(tmp_path, tiny.tokenizer(chat=False), **TEXT)
    rows = [row(prompt=f"say {'emu ' * i}", answer=f"EMU {i}") for i in range(1, 9)]
    pairs = p.pairs(rows, p.recipe.queries)
    assert list(pairs) == [p.pair(r, p.recipe.queries) for r in rows] and pairs[-1].answer == "EMU 8"


def test_of_many_rows_the_refused_one_is_explained(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    p = prompter(tmp_path, tokenizer)
    tokenizer.chat_template = (
        tiny.TEMPLATE + "{% if 'emu' in messages[-1]['content'] %}{{ raise_exception('no') }}{% endif %}"
    )
    fine = [row(prompt="say owl")] * 3
    assert len(p.pairs(fine, p.recipe.queries)) == 3
    with pytest.raises(DataError, match=r"(?s)refuses these messages: no.*system user"):
        p.pairs([*fine, row(prompt="say emu")], p.recipe.queries)


def test_a_template_that_refuses_the_messages_is_explained(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    p = prompter(tmp_path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        p.pair(row(prompt="say emu"), p.recipe.queries)
