"""Programs in answers: found, run only when allowed, counted as pass@1 from evaluation to report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import tiny
from ctxdistill import pipeline, programs, sandbox
from ctxdistill.errors import DataError, RecipeError
from ctxdistill.evaluate import main_metric, metrics_of
from ctxdistill.programs import code_of, pass_at_1
from ctxdistill.prompts import Prompter
from ctxdistill.recipe import CodeSection, Recipe

if os.name != "posix":
    pytest.skip("processes can be limited on POSIX systems only", allow_module_level=True)

RIGHT = "def double(x):\n    return 2 * x\n"
ROW = {"tests": ["assert double(3) == 6", "assert double('a') == 'aa'"]}
ALLOWED = CodeSection(run=True)
MBPP = Path(__file__).parents[2] / "shared" / "data" / "mbpp" / "sanitized-mbpp.json"


def test_code_is_taken_out_of_its_fence() -> None:
    assert code_of(RIGHT) == RIGHT
    assert code_of(f"Here it is:\n```python\n{RIGHT}```\nand another:\n```python\nx\n```") == RIGHT
    assert code_of(f"```\n{RIGHT}```") == RIGHT and code_of(f"``` Py\n{RIGHT}") == RIGHT  # not closed
    assert code_of(f"```sh\npip install x\n```\n```python\n{RIGHT}```") == RIGHT
    assert code_of("a `double` of `x`") == "a `double` of `x`"


def test_statements_of_a_row() -> None:
    assert programs.tests_of({"tests": "assert f(1)"}, ALLOWED) == (["assert f(1)"], [])
    section = CodeSection(run=True, tests="test_list", setup="imports")
    assert programs.tests_of({"test_list": ["assert f(1)"], "imports": ["import math"]}, section) == (
        ["assert f(1)"],
        ["import math"],
    )
    assert programs.tests_of({"imports": ["import math"]}, section) == ([], [])
    for wrong, message in ((7, "does not hold tests"), ([1], "does not hold tests"), (["assert ("], "not Python")):
        with pytest.raises(DataError, match=message):
            programs.tests_of({"tests": wrong}, ALLOWED)


def test_pass_at_1() -> None:
    assert pass_at_1(RIGHT, ROW, ALLOWED) == 1.0
    assert pass_at_1(f"Sure!\n```python\n{RIGHT}```", ROW, ALLOWED) == 1.0
    assert pass_at_1("def double(x):\n    return x + 3", ROW, ALLOWED) == 0.0
    assert pass_at_1(f"Sure! {RIGHT}", ROW, ALLOWED) == 0.0
    assert pass_at_1(RIGHT, {}, ALLOWED) is None


def code_recipe(job: Path, **values: Any) -> Recipe:
    """The tiny model's recipe, with tests in its held-out rows."""
    recipe = Recipe.from_dict(tiny.recipe_dict(job, **values), base_dir=job)
    rows = tiny.read_jsonl(job / "eval.jsonl")
    tiny.write_jsonl(job / "eval.jsonl", [{**row, "tests": ["assert double(2) == 4"]} for row in rows])
    return recipe


def test_nothing_runs_unless_allowed(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was run")

    monkeypatch.setattr(sandbox, "run", never)
    with pytest.raises(RecipeError, match="nobody has allowed") as refused:
        pipeline.gate(code_recipe(job, eval__metrics=["pass_at_1"]))
    assert "code.run=true" in str(refused.value)
    pipeline.gate(code_recipe(job))  # no metric named: it is left out


def test_a_column_that_is_not_there(job: Path) -> None:
    recipe = Recipe.from_dict(tiny.recipe_dict(job, eval__metrics=["pass_at_1"], code__run=True), base_dir=job)
    with pytest.raises(RecipeError, match="cannot be measured") as error:
        pipeline.gate(recipe)
    assert "code.tests" in str(error.value)


def test_pass_at_1_from_evaluation_to_report(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = code_recipe(job, eval__metrics=["pass_at_1", "exact_match"], code__run=True, train__epochs=1)
    # a random model writes no programs: the teacher's answers become right ones, the others' stay as they are
    from ctxdistill import evaluate

    plain = Prompter.answer
    teacher = {"on": False}
    monkeypatch.setattr(Prompter, "answer", lambda self, ids: RIGHT if teacher["on"] else plain(self, ids))
    score = evaluate.score_arm

    def scored(arm: str, *args: Any, **options: Any) -> Any:
        teacher["on"] = arm == "in_context"
        try:
            return score(arm, *args, **options)
        finally:
            teacher["on"] = False

    monkeypatch.setattr(evaluate, "score_arm", scored)
    run = pipeline.distill(recipe, job / "run")
    table = run.evaluation["table"]
    assert {arm: cells["pass_at_1"]["mean"] for arm, cells in table.items()} == {
        "zero_shot": 0.0, "in_context": 1.0, "distilled": 0.0,
    }  # fmt: skip
    assert run.evaluation["main_metric"] == "pass_at_1" and run.evaluation["gate"]["metric"] == "pass_at_1"
    assert any("audit hook" in note for note in run.evaluation["notes"])
    text = (run.path / "report.md").read_text()
    assert "pass@1 %" in text and "audit hook" in text
    assert main_metric(tiny.read_jsonl(run.path / "scores.jsonl")) == "pass_at_1"


def test_measured_without_being_named_where_it_can_be(job: Path) -> None:
    recipe = code_recipe(job, code__run=True)

    class Row:
        answer, fields = "x", ROW

    assert list(metrics_of(recipe, [Row()])) == ["pass_at_1", "exact_match", "format", "field_accuracy"]  # type: ignore[list-item]


@pytest.mark.skipif(not MBPP.is_file(), reason="the shared data is not there")
def test_mbpp_s_own_programs_pass_and_others_do_not() -> None:
    problems = json.loads(MBPP.read_text())[::30]
    section = CodeSection(run=True, tests="test_list", setup="test_imports", seconds=20)
    assert len(problems) == 15
    for problem, other in zip(problems, [*problems[1:], problems[0]], strict=True):
        assert pass_at_1(problem["code"], problem, section) == 1.0, problem["task_id"]
        assert pass_at_1(other["code"], problem, section) == 0.0, problem["task_id"]


@pytest.mark.skipif(not MBPP.is_file(), reason="the shared data is not there")
def test_the_recipe_of_mbpp_reads_its_file() -> None:
    from ctxdistill import dataset

    example = Path(__file__).parents[1] / "examples" / "code" / "mbpp.toml"
    keys = [f"queries.data={MBPP}", "queries.skip=307", f"eval.data={MBPP}", "eval.skip=7", "eval.limit=257"]
    recipe = Recipe.load(example, keys)
    splits, counts = dataset.read_rows(recipe, Prompter(recipe, tiny.tokenizer()))
    assert (counts["train"] + counts["validation"], counts["eval"], counts["demos"]) == (120, 257, 3)
    assert {row.fields["task_id"] for row in splits["eval"][0]} <= set(range(11, 511))
    assert min(row.fields["task_id"] for row in splits["train"][0]) > 600
    demos = [json.loads(line) for line in (example.parent / "demos.jsonl").read_text().splitlines()]
    section = CodeSection(run=True, tests="test_list")
    assert [pass_at_1(demo["code"], demo, section) for demo in demos] == [1.0] * 3
