"""Perplexity against the obvious way; every kind of instruction with an answer that follows it and one that does not."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ctxdistill import retention
from ctxdistill.errors import DataError, FitError
from ctxdistill.lm import LM
from ctxdistill.recipe import LoraSection, ModelSection
from ctxdistill.retention import KINDS, Format, format_following, formats, perplexity, problems, texts

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXTS = ["The quick brown fox", "jumps over", "a lazy dog. " * 9, "x", *"abcdefgh"]


@pytest.fixture
def lm(llama: Path) -> LM:
    return LM.load(ModelSection(name=str(llama), device="cpu"))


# -- perplexity -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_perplexity(lm: LM, texts: list[str], tokens: int) -> float:
    """One token at a time, the model's own forward."""
    scores = []
    for text in texts:
        ids = lm.tokenizer(text)["input_ids"][:tokens]
        for i in range(1, len(ids)):
            logits = lm.model(input_ids=torch.tensor([ids[:i]]), use_cache=False).logits[0, -1]
            scores.append(float(logits.double().log_softmax(-1)[ids[i]]))
    return math.exp(-sum(scores) / len(scores))


@pytest.mark.parametrize("tokens", [7, 256])
def test_perplexity_equals_the_obvious_way(lm: LM, tokens: int) -> None:
    assert perplexity(lm, TEXTS, tokens=tokens) == pytest.approx(slow_perplexity(lm, TEXTS, tokens), rel=1e-4)


def test_perplexity_stays_inside_the_window(tmp_path: Path) -> None:
    lm = LM.load(ModelSection(name=str(tiny.save(tmp_path, "opt-350m", chat=False)), device="cpu"))
    lm.info["window"] = 8
    assert perplexity(lm, TEXTS) == pytest.approx(slow_perplexity(lm, TEXTS, 8), rel=1e-4)


def test_perplexity_is_of_the_adapter_as_it_is(lm: LM) -> None:
    base = perplexity(lm, TEXTS)
    lm.add_adapter(LoraSection(rank=2), seed=0)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_(0.3)
    with lm.adapter(True):
        assert abs(math.log(perplexity(lm, TEXTS) / base)) > 0.01
    with lm.adapter(False):
        assert perplexity(lm, TEXTS) == base


def test_a_classification_head_is_stepped_around(lm: LM) -> None:
    base, said = perplexity(lm, TEXTS), []
    listen = Format("a", "hello", (lambda answer: not said.append(answer),))  # type: ignore[func-returns-value]
    format_following(lm, [listen], max_new_tokens=5)
    with lm.all_weights(classes=3):
        assert perplexity(lm, TEXTS) == base
        format_following(lm, [listen], max_new_tokens=5)
        assert lm.classes is not None
    assert len(said) == 2 and said[0] == said[1]


def test_perplexity_needs_something_to_predict(lm: LM) -> None:
    with pytest.raises(DataError, match="perplexity"):
        perplexity(lm, ["", "x"])


# -- kinds of instructions --------------------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    # (kind, arguments, answers that follow it, answers that do not)
    ("keywords:existence", {"keywords": ["sea", "Ship"]}, ["A ship at SEA.", "Seas, ships"], ["A ship.", "a sea"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["rock", "C++"]},
        ["Rockets in C", "a shamrock"],
        ["They ROCK!", "I like C++."],
    ),
    (
        "keywords:frequency",
        {"keyword": "war", "relation": "at least", "frequency": 2},
        ["War and war", "warm wars"],
        ["one war"],
    ),
    ("keywords:frequency", {"keyword": "war", "relation": "less than", "frequency": 2}, ["one War"], ["war, WAR"]),
    (
        "keywords:letter_frequency",
        {"letter": "T", "let_relation": "at least", "let_frequency": 3},
        ["To tie it"],
        ["to tie"],
    ),
    ("keywords:letter_frequency", {"letter": "#", "let_relation": "less than", "let_frequency": 2}, ["# a"], ["# #"]),
    (
        "length_constraints:number_words",
        {"relation": "at least", "num_words": 3},
        ["one, two - three!"],
        ["one two ..."],
    ),
    (
        "length_constraints:number_words",
        {"relation": "less than", "num_words": 3},
        ["one two"],
        ["one two three", "a b c d"],
    ),
    (
        "length_constraints:number_sentences",
        {"relation": "at least", "num_sentences": 3},
        ["One. Two! Three?", 'He said "no." Then (so it is!) he left... Then nothing', "One.\nTwo.\nThree."],
        ["One. Two.", "One... Two!!", "It is 3.5 or 2.5. So."],
    ),
    (
        "length_constraints:number_sentences",
        {"relation": "less than", "num_sentences": 2},
        ["Only one."],
        ["One. Two."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none\n\nstill one *** two ***"],
        ["one\n\ntwo", "one *** two *** three"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "summary"},
        ["One.\n\n**Summary**: two.", 'One.\n \n\n"summary" it is'],
        ["Summary one.\n\nTwo.", "One.\n\nTwo.\n\nSummary", "One.\nSummary", "One.\n\nSummaryless"],
    ),
    ("punctuation:no_comma", {}, ["No; none."], ["Yes, one."]),
    ("change_case:english_capital", {}, ["LOUD 2!"], ["Loud", "LOUDx", "1 2"]),
    ("change_case:english_lowercase", {}, ["quiet 2!"], ["Quiet", "quieT", "1 2"]),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        ["The USA and NASA.", "I AM", "AT&T"],
        ["The USA and Nasa.", "1 2 3"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "less than", "capital_frequency": 2},
        ["NASA is it"],
        ["NASA IS it"],
    ),
    ("startend:quotation", {}, ['"All of it."', ' "a"\n'], ['"All" of it', 'All of "it"', '"', "'a'"]),
    (
        "startend:end_checker",
        {"end_phrase": "Peace!"},
        ["Love and peace!", '"Love. Peace!"\n'],
        ["Peace! And love", "Peace"],
    ),
    ("detectable_format:title", {}, ["<<A title>>\ntext", "x <<t>>"], ["<A title>", "<< >>", "<<A\ntitle>>"]),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": [1]}\n```', "[1]", '```\n{"a": 1}\n```'],
        ["{a: 1}", 'Here: {"a": 1}', "3", "```json\n```"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["Two:\n* one\n  - two", "- **one**\n- two\n---"],
        ["* one", "* 1\n* 2\n* 3", "a * b\n*bold* c\n-1"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and **two**", "* *one*\n* *two* more"],
        ["*one* and two", "* one\n* two\n* three", "** ** * *", "2 * 3 * 4 * 5"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "**Section 1** **Section2** Section 3"],
        ["Section 1", "Section A\nSection B", "SubSection 1 SubSection 2"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is maybe.", "Well. My answer is no."],
        ["Maybe.", "My answer is"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Bye.\nP.P.S. One more", "p. p. s that"],
        ["Bye.\nP.S. One", "pps"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye. P.S. One"], ["Bye.\nP.P.S. One", "lamp.s"]),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name], [the address]"],
        ["[name]", "[] []", "[a [b"],
    ),
    (
        "combination:two_responses",
        {},
        ["one\n******\ntwo"],
        ["one", "one\n******\none", "one *** two", "one ****** ", "1 ****** 2 ****** 3"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say hi."},
        ["say hi.\nHi!", " Say hi. Hi"],
        ["Sure. Say hi.", "Say hi"],
    ),
]


@pytest.mark.parametrize(("kind", "arguments", "good", "bad"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_kind(kind: str, arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [KINDS[kind](answer, **arguments) for answer in good] == [True] * len(good)
    assert [KINDS[kind](answer, **arguments) for answer in bad] == [False] * len(bad)


def test_every_kind_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(KINDS)


def test_all_instructions_must_be_followed_and_something_said() -> None:
    prompt = Format("1", "p", (KINDS["punctuation:no_comma"], KINDS["change_case:english_lowercase"]))
    assert prompt.obeyed("so it is")
    assert not prompt.obeyed("So it is") and not prompt.obeyed("so, it is")
    assert not Format("1", "p", (KINDS["punctuation:no_comma"],)).obeyed(" \n")


# -- data -------------------------------------------------------------------------------------------------------------


def prompt_row(key: int, *asked: tuple[str, Any]) -> dict[str, Any]:
    return {
        "key": key,
        "prompt": f"prompt {key}",
        "instruction_id_list": [kind for kind, _ in asked],
        "kwargs": [arguments for _, arguments in asked],
    }


NO_COMMA = ("punctuation:no_comma", {})
WORDS = "length_constraints:number_words"


def write(root: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (root / name).parent.mkdir(exist_ok=True)
    tiny.write_jsonl(root / name, rows)
    return root


def test_prompts_that_cannot_be_checked_are_left_out_and_counted(tmp_path: Path) -> None:
    bullets = ("detectable_format:number_bullet_lists", {"num_bullets": 1, "relation": None})  # as on the hub
    rows = [
        prompt_row(1, NO_COMMA, ("language:response_language", {"language": "de"})),
        prompt_row(2, NO_COMMA, bullets),
        prompt_row(3, (WORDS, {"relation": "at least", "num_words": 97})),
        prompt_row(4, (WORDS, {"relation": "less than", "num_words": 300})),
        prompt_row(5, NO_COMMA),
        prompt_row(6, ("language:response_language", {"language": "de"})),
    ]
    write(tmp_path, "ifeval/input_data.jsonl", rows)
    found, left_out = formats(tmp_path, 2)
    assert ([f.id for f in found], [f.prompt for f in found], left_out) == (["2", "4"], ["prompt 2", "prompt 4"], 2)
    assert found[0].obeyed("* one") and not found[0].obeyed("* one, two")
    assert [f.id for f in formats(tmp_path, 2, max_new_tokens=97)[0]] == ["2", "3"]
    assert [len(formats(tmp_path, 9)[0]), formats(tmp_path, 9)[1]] == [3, 3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (prompt_row(1, (WORDS, {"relation": "at most", "num_words": 3})), "KeyError: 'at most'"),
        (prompt_row(1, (WORDS, {"relation": "at least"})), "num_words"),
        (prompt_row(1, (WORDS, {"relation": "less than", "num_words": "3"})), "TypeError"),
        (prompt_row(1, ("punctuation:no_comma", {"what": 3})), "what"),
        (prompt_row(1, ("punctuation:no_comma", None)), "NoneType"),
        ({**prompt_row(1, NO_COMMA, NO_COMMA), "kwargs": [{}]}, "shorter"),
        ({**prompt_row(1, NO_COMMA), "prompt": None}, "no prompt"),
    ],
)
def test_broken_prompts_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write(tmp_path, "ifeval/input_data.jsonl", [prompt_row(0, NO_COMMA), row])
    with pytest.raises(DataError, match=rf"input_data.jsonl:2: .*{message}"):
        formats(tmp_path, 9)


PROBLEMS = [
    {"task_id": number, "prompt": f"Write f{number}.", "test_list": [f"assert f{number}(1) == 2"], "test_imports": []}
    for number in (2, 11, 12, 510, 511)
]


def test_problems_are_those_of_the_test_set_and_checked_by_their_tests(tmp_path: Path) -> None:
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "mbpp/sanitized-mbpp.json").write_text(json.dumps(PROBLEMS))
    found = problems(tmp_path, 0)
    assert [p.id for p in found] == ["11", "12", "510"] and len(problems(tmp_path, 2)) == 2
    assert found[0].prompt == "Write f11. Your code should pass these tests:\nassert f11(1) == 2"
    assert found[0].obeyed("```python\ndef f11(x):\n    return x + 1\n```")
    assert not found[0].obeyed("def f11(x):\n    return x") and not found[1].obeyed("def f11(x):\n    return x + 1")


def test_texts_are_questions_with_answers(tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}?", "answer": f"A{i}."} for i in range(3)]
    write(tmp_path, "gsm8k/test.jsonl", rows)
    assert texts(tmp_path, 2) == ["Q0?\nA0.", "Q1?\nA1."]
    with pytest.raises(DataError, match=r"no file .*input_data.jsonl"):
        formats(tmp_path, 2)
    write(tmp_path, "gsm8k/test.jsonl", [rows[0], {"question": "Q"}])
    with pytest.raises(DataError, match=r"test.jsonl:2: no answer"):
        texts(tmp_path, 2)
    write(tmp_path, "gsm8k/test.jsonl", [])
    with pytest.raises(DataError, match="empty"):
        texts(tmp_path, 2)


def test_a_missing_file_is_one_below_the_studys_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)below tasks\.root.*leave tasks\.root out"):
        texts(tmp_path, 1)


def test_without_a_folder_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_hub(name: str, config: str | None, split: str, most: int, **_: Any) -> Any:
        asked.append((name, config, split, most))
        row = {"question": "Q?", "answer": "A."} if "gsm8k" in name else prompt_row(7, NO_COMMA)
        return name, [("hub:1", row)], 1

    monkeypatch.setattr(retention, "read_hub", read_hub)
    assert texts(None, 5) == ["Q?\nA."] and [f.id for f in formats(None, 5)[0]] == ["7"]
    assert asked == [("openai/gsm8k", "main", "test", 5), ("google/IFEval", None, "train", 0)]


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder with public data sets is not there")
def test_the_published_files() -> None:
    assert len(texts(DATA, 0)) == 1319 and "ducks lay 16 eggs" in texts(DATA, 1)[0]
    found, left_out = formats(DATA, 0, max_new_tokens=10_000)
    assert (len(found), left_out) == (510, 31)  # 31 ask for a language
    assert {check.func for prompt in found for check in prompt.checks} == set(KINDS.values())  # type: ignore[attr-defined]
    assert len(formats(DATA, 16)[0]) == 16


# -- following --------------------------------------------------------------------------------------------------------


def answers(monkeypatch: pytest.MonkeyPatch, lm: LM, replies: dict[str, str], end: bool = True) -> list[list[int]]:
    """Let the model say these replies; returns the prompts that it is given, as they come."""
    given: list[list[int]] = []

    def generate(prompts: list[list[int]], *, max_new_tokens: int) -> list[list[int]]:
        given.extend(prompts)
        heard = [lm.tokenizer.decode(ids) for ids in prompts]
        said = [next(reply for key, reply in replies.items() if f">{key}<" in text) for text in heard]
        return [lm.tokenizer(reply)["input_ids"] + [1] * end for reply in said]

    monkeypatch.setattr(lm, "generate", generate)
    return given


def test_share_of_prompts_that_are_followed(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    no_comma, lower = KINDS["punctuation:no_comma"], KINDS["change_case:english_lowercase"]
    end = functools.partial(KINDS["startend:end_checker"], end_phrase="it is")  # and no end token after it
    prompts = [Format("a", "one", (lower, end)), Format("b", "two", (no_comma,)), Format("c", "three", (lower,))]
    prompts += [Format(str(i), f"four{i}", (lower,)) for i in range(7)]  # more than one batch
    replies = {"one": "so it is", "two": "no, not", "three": "Never", **{f"four{i}": "yes" for i in range(7)}}
    given = answers(monkeypatch, lm, replies)
    assert format_following(lm, prompts) == 8 / 10
    assert lm.tokenizer.decode(given[0]) == "<s><|system|>be kind</s><|user|>one</s><|assistant|>"
    assert lm.notes == []
    answers(monkeypatch, lm, replies, end=False)
    assert format_following(lm, prompts[:2]) == 1 / 2
    format_following(lm, prompts[:2])
    assert lm.notes == ["format-following judges answers by their first 96 tokens; some were longer"]


def test_the_model_really_answers(lm: LM) -> None:
    long = KINDS[WORDS]
    anything = Format("a", "hello", (lambda answer: True,))
    nothing = Format("b", "hello", (lambda answer: long(answer, relation="at least", num_words=1000),))
    said: list[str] = []
    listen = Format("c", "hello", (lambda answer: not said.append(answer),))  # type: ignore[func-returns-value]
    assert format_following(lm, [listen, nothing, listen], max_new_tokens=5) in (0, 2 / 3)
    expected = lm.generate(
        [lm.tokenizer("<s><|system|>be kind</s><|user|>hello</s><|assistant|>")["input_ids"]], max_new_tokens=5
    )
    assert said == [lm.tokenizer.decode(expected[0], skip_special_tokens=True)] * 2
    assert format_following(lm, [anything], max_new_tokens=5) == 1.0
    assert format_following(lm, []) is None


def test_prompts_that_do_not_fit_are_refused(lm: LM) -> None:
    with pytest.raises(FitError, match=r"fix: .*retention\.formats"):
        format_following(lm, [Format("a", "x" * 420, ())], max_new_tokens=96)


def test_a_model_without_a_chat_template_is_not_asked(tmp_path: Path) -> None:
    lm = LM.load(ModelSection(name=str(tiny.save(tmp_path, "opt-125m", chat=False)), device="cpu"))
    for _ in range(2):
        assert format_following(lm, [Format("a", "one", ())]) is None
    assert lm.notes == ["format-following was not measured: the model has no chat template"]
