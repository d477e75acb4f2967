"""Rows of other tools: what is recognised, the recipe that is written, and what both sides then see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from ctxdistill import cli, pipeline
from ctxdistill.errors import DataError, RecipeError
from ctxdistill.formats import recipe_for, recognise
from ctxdistill.recipe import Recipe

USER = {"role": "user", "content": "say emu"}
SAID = {"role": "assistant", "content": "EMU"}
SYSTEM = {"role": "system", "content": 'Shout every "word" that you are given.\nAlways.'}


def many(make: Any, count: int = 8) -> list[dict[str, Any]]:
    """Rows like one, with another word each."""
    words = ["emu", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
    text = json.dumps(make)
    return [json.loads(text.replace("emu", w).replace("EMU", w.upper())) for w in words[:count]]


TRL = {"prompt": "say emu", "privileged_context": "Shout every word that you are given."}
TRL_CHAT = {"prompt": [USER], "privileged_context": "Shout every word that you are given."}
SWIFT = {"messages": [USER, SAID], "teacher_prompt": "Shout every word that you are given. say emu"}
TURNS = [SYSTEM, {"role": "user", "content": "say red"}, {"role": "assistant", "content": "RED"}]
PREFIX = {"messages": [USER, SAID], "prefix_messages": TURNS}
BAKERY = {"prompt": "say emu", "response": "EMU"}
OPENAI = {"messages": [SYSTEM, USER, SAID]}


def write(folder: Path, rows: list[dict[str, Any]], *, as_list: bool = False) -> Path:
    if as_list:
        (folder / "rows.json").write_text(json.dumps(rows))
        return folder / "rows.json"
    return tiny.write_jsonl(folder / "rows.jsonl", rows)


def text(side: list[dict[str, str]]) -> str:
    return "".join(part["text"] for part in side)


@pytest.mark.parametrize(
    ("row", "name", "as_list", "answer"),
    [
        (TRL, "TRL", False, None), (TRL_CHAT, "TRL", False, None), (SWIFT, "ms-swift", False, "EMU"),
        (PREFIX, "bakery with a prefix", False, "EMU"), (BAKERY, "bakery: prompt", True, "EMU"),
        (OPENAI, "OpenAI", False, "EMU"),
    ],
)  # fmt: skip
def test_the_recipe_runs_and_both_sides_see_what_they_should(
    job: Path, row: dict[str, Any], name: str, as_list: bool, answer: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(job, many(row), as_list=as_list)
    (job / "system.txt").write_text("Shout every word that you are given.")
    extra = ["--context", str(job / "system.txt")] if row is BAKERY else []
    (job / "sub").mkdir()
    path = job / "sub" / "moved.toml"
    assert cli.main(["init", str(path), "--from", str(file), "--model", "../model", *extra]) == 0
    assert f"recognised: {name}" in capfd.readouterr().out
    recipe = Recipe.load(path)
    assert recipe.queries.data == f"../{file.name}"
    shown = pipeline.show(recipe)
    asked = next(
        w for w in ("emu", "bee", "cat", "dog", "eel", "fox", "gnu", "hen") if f"say {w}" in text(shown["student"])
    )
    assert "Shout" in text(shown["teacher"]) and f"say {asked}" in text(shown["teacher"])
    assert "Shout" not in text(shown["student"])
    assert asked.upper() not in text(shown["teacher"]) + text(shown["student"])  # the answer is in no prompt
    given = pipeline.show(Recipe.load(path, ['completions.source="data"'])) if answer else None
    if given:
        assert "".join(piece for piece, _ in given["completion"]) == f"{asked.upper()}</s>"
    # and it is distilled
    small = ["completions.max_new_tokens=4", "eval.max_new_tokens=4", "train.epochs=1", "train.validation=0.2", "eval.share=0.3",
             "gate.on_fail='warn'", "eval.latency_rows=0", "eval.bootstrap=100"]  # fmt: skip
    assert pipeline.distill(Recipe.load(path, small), job / "run").evaluation["rows"] == 2


def test_conversations_with_systems_of_their_own(job: Path) -> None:
    rows = many(OPENAI)
    rows[0]["messages"][0]["content"] = "Whisper every word that you are given."
    made, said = recipe_for(write(job, rows), job / "r.toml", model="model")
    (job / "r.toml").write_text(made)
    assert 'column = "system"' in made and "2 different system turns" in said[-1]
    seen = [text(pipeline.show(Recipe.load(job / "r.toml"), row)["teacher"]) for row in range(6)]
    assert sum("Shout" in one or "Whisper" in one for one in seen) == 6


def test_another_system_turn_is_not_dropped_in_silence(job: Path) -> None:
    made, _ = recipe_for(write(job, many(OPENAI)), job / "r.toml", model="model")
    (job / "r.toml").write_text(made)
    rows = many(OPENAI)
    rows[3]["messages"][0]["content"] = "Whisper."
    write(job, rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:4: the system turn is neither"):
        pipeline.show(Recipe.load(job / "r.toml"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "no format is recognised"),
        ([TRL, {"prompt": "x"}], "row 2: no privileged_context"),
        (many(BAKERY), "the rows hold no context"),
        (many({"messages": [USER, SAID]}), "the rows hold no context"),
        ([*many(OPENAI, 3), {"messages": [USER, SAID]}], "1 of 4 rows have no system turn"),
        (many({**SWIFT, "messages": [SYSTEM, USER, SAID]}), "turns system, user, assistant"),
        (
            [*many(OPENAI, 3), {"messages": [SYSTEM, {"role": "user", "content": None}]}],
            "expected a text, found nothing",
        ),
        ([{**OPENAI, "answer": "mine"}], "the turns give the column 'answer'"),
    ],
)
def test_what_does_not_fit_is_an_error(job: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recipe_for(write(job, rows), job / "r.toml", model="model")


@pytest.mark.parametrize("name", ["nope.jsonl", "rows.txt"])
def test_a_file_that_is_not_there_is_one_of_from(job: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    (job / "rows.txt").write_text("x")
    assert cli.main(["init", str(job / "x.toml"), "--from", str(job / name)]) == 2
    said = capfd.readouterr().err
    assert "--from" in said and name in said
    assert "in the recipe" not in said and "recipe's folder" not in said and "hub:" not in said


def test_a_context_that_is_not_there_is_said_at_once(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write(job, [{"prompt": "a", "response": "b"}])
    assert cli.main(["init", str(job / "x.toml"), "--from", str(file), "--context", str(job / "nope.txt")]) == 2
    said = capfd.readouterr().err
    assert "--context: there is no file" in said and "mend --context" in said and not (job / "x.toml").exists()


def test_two_contexts_are_refused_and_unused_columns_are_named(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write(job, many({**OPENAI, "id": "7"}))
    (job / "system.txt").write_text("x")
    with pytest.raises(DataError, match="the rows have a context of their own"):
        recipe_for(file, job / "r.toml", context=job / "system.txt")
    _, said = recipe_for(file, job / "r.toml")
    assert said[-1] == "columns that are not used: id"
    assert recognise(file)[0].name.startswith("OpenAI")
    assert cli.main(["init", str(job / "x.toml"), "--context", str(job / "system.txt")]) == 2
    assert "belong to --from" in capfd.readouterr().err
    assert not (job / "x.toml").exists()


def test_turns_need_messages(job: Path) -> None:
    with pytest.raises(RecipeError, match=r"queries\.turns has no effect"):
        Recipe.from_dict(tiny.recipe_dict(job, queries={"data": "queries.jsonl", "turns": "answered"}), base_dir=job)
