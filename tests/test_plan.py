"""The plan: predicted from speeds by hand, and measured without a trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ctxdistill import pipeline
from ctxdistill import plan as planning
from ctxdistill.dataset import prepare
from ctxdistill.lm import LM
from ctxdistill.objective import Example, batch_loss
from ctxdistill.plan import Speeds, predict
from ctxdistill.recipe import Recipe

SPEEDS = Speeds(
    context=2.0, answer=0.5, student=0.25, request=0.125, train=0.003, forward=0.001, answer_tokens=5.0, memory_mb=77.0
)


@pytest.fixture
def job(tmp_path: Path, llama: Path) -> Path:
    (tmp_path / "model").symlink_to(llama, target_is_directory=True)
    return tmp_path


def recipe(job: Path, **changes: Any) -> Recipe:
    return Recipe.from_dict(tiny.recipe_dict(job, **changes), base_dir=job)


def test_the_prediction_is_made_of_the_speeds(job: Path) -> None:
    r = recipe(job, completions={"max_new_tokens": 6, "samples": 2, "temperature": 1.0}, cost={"machine_hour": 36.0})
    lm, _, rows = prepare(r)
    train, validation = (len(rows.pairs[split]) for split in ("train", "validation"))
    assert (train, validation, len(rows.pairs["eval"])) == (13, 3, 8)
    prompts = sum(len(p.student) for p in rows.pairs["train"])
    found = predict(r, lm, rows, SPEEDS)
    length = prompts / 13 + 4
    assert found["stages"] == pytest.approx(
        {
            "gate": 2 * 2.0 + 8 * (2 * 0.5 + 0.25),
            "label": 2.0 + 16 * 2 * 0.5,
            "train": 2 * 13 * 2 * length * 0.003 + 3 * 3 * 2 * length * 0.001,
            "evaluate": 8 * 0.25 + 3 * (2.0 + 3 * 0.125) + 2 * 16 * 0.25,
        }
    )
    more = {
        "on_policy": 0.5,
        "on_policy_ramp": 0.4,
        "retain_weight": 1.0,
        "epochs": 2,
        "batch_size": 4,
        "validation": 0.2,
    }
    other = recipe(job, completions={"max_new_tokens": 6, "samples": 2, "temperature": 1.0}, train=more,
                   behaviour={"rows": 4, "strengths": [0.5, 1.0]})  # fmt: skip
    stages = predict(other, lm, rows, SPEEDS)["stages"]
    own = 0.5 * 13 * 2 * (0.25 + 0.5 / 2)  # the first of two rounds begins with none, the second with all of its share
    kept = 1 * 2 * 7 * length * 0.003  # of 7 steps an epoch
    assert stages["train"] == pytest.approx(found["stages"]["train"] + own + kept)
    assert stages["evaluate"] == pytest.approx(found["stages"]["evaluate"] + 3 * 4 * 0.25 + 4 * 2 * length * 0.001)
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()))
    assert found["cost"] == pytest.approx(found["seconds"] / 100)
    assert found["memory_mb"] == 77.0
    assert not hasattr(lm.model, "peft_config")


@pytest.mark.parametrize(
    ("epochs", "ramp", "round_steps", "written"),
    [(2, 1.0, 0, 0.25), (3, 0.5, 0, 5 / 9), (2, 0.5, 1, 19 / 26), (2, 0.0, 3, 1.0)],
)
def test_what_the_student_writes_is_that_of_its_rounds(
    job: Path, epochs: int, ramp: float, round_steps: int, written: float
) -> None:
    """As `Rounds` would draw it: 13 rows, one a step."""
    plan = {"epochs": epochs, "batch_size": 1, "validation": 0.2}
    own = {"on_policy": 1.0, "on_policy_ramp": ramp, "round_steps": round_steps}
    lm, _, rows = prepare(recipe(job))
    off, on = (predict(recipe(job, train=plan | more), lm, rows, SPEEDS)["stages"]["train"] for more in ({}, own))
    assert on - off == pytest.approx(written * epochs * 13 * (0.25 + 0.5 / 2))


@pytest.mark.parametrize(("batch_size", "kept"), [(1, 13), (2, 7), (3, 5), (4, 4), (8, 4), (13, 3)])
def test_a_step_holds_at_least_one_everyday_prompt(job: Path, batch_size: int, kept: int) -> None:
    plan = {"epochs": 1, "batch_size": batch_size, "validation": 0.2}
    lm, _, rows = prepare(recipe(job))
    off, on = (
        predict(recipe(job, train=plan | more), lm, rows, SPEEDS)["stages"]["train"]
        for more in ({}, {"retain_weight": 1.0})
    )
    length = sum(len(p.student) for p in rows.pairs["train"]) / 13 + 4
    assert on - off == pytest.approx(kept * length * 0.003)


@pytest.mark.parametrize("kind", ["hidden", "topk", "full"])
def test_disk_is_what_a_run_then_holds(job: Path, kind: str) -> None:
    r = recipe(job, targets={"kind": kind, "k": 8, "batch_size": 4}, gate={"on_fail": "warn"})
    lm, _, rows = prepare(r)
    run = pipeline.distill(r, job / "run")
    files = list(run.path.rglob("*.safetensors"))
    held = sum(f.stat().st_size for f in files)
    targets = [line for f in files if f.parent.name == "targets" for line in [f.stat().st_size]]
    assert targets
    tokens = run.evaluation["training"]["supervised_tokens"] / 2 / 13  # of a completion, mean; two epochs, 13 rows
    speeds = Speeds(*([1.0] * 6), tokens, 1.0)
    said = predict(r, lm, rows, speeds)["disk_mb"] * 2**20
    assert said == pytest.approx(held, rel=0.25)


def test_measuring_leaves_the_model_as_it_was(job: Path) -> None:
    r = recipe(job, train={"epochs": 1, "gradient_checkpointing": True, "batch_size": 4})
    lm, prompter, rows = prepare(r)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    speeds = planning.measure(r, lm, prompter, rows)
    assert all(value > 0 for name, value in vars(speeds).items() if name != "savings")
    assert speeds.train > speeds.forward
    after = dict(lm.model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[n], p) for n, p in after.items())
    assert not lm.model.is_activation_checkpointing and lm.peft is None
    assert not any(p.requires_grad for p in after.values())


def test_a_step_that_the_memory_does_not_hold_is_planned_in_parts(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(lm: LM, batch: Sequence[Example], *given: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch_loss(lm, batch, *given)

    monkeypatch.setattr("ctxdistill.train.batch_loss", full)
    found = pipeline.plan(recipe(job, train={"epochs": 1, "batch_size": 4}))
    (note,) = found["notes"]
    assert "does not hold a training step of 4 rows" in note and "2 rows at a time" in note and "again" not in note
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in found["stages"].values())
    monkeypatch.undo()
    assert pipeline.plan(recipe(job, train={"epochs": 1, "batch_size": 4}))["notes"] == []


def test_the_batch_that_is_tried_is_the_longest(job: Path) -> None:
    r = recipe(job)
    lm, prompter, rows = prepare(r)
    found = pipeline.make_examples(
        r, lm, prompter, rows.pairs["train"][:2], pipeline.TargetStore(job / "t"), lambda *_: None
    )
    batch = planning.longest(r, rows.pairs["train"], [e.target for e in found])
    lengths = sorted(len(p.student) for p in rows.pairs["train"])
    assert [len(e.prompt) for e in batch] == lengths[-4:]


@pytest.mark.parametrize(
    ("dtype", "asked"), [("auto", True), ("float32", True), ("bfloat16", True), ("float16", False)]
)
def test_both_types_are_compared_for_a_model_in_one_of_them(
    job: Path, dtype: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, kinds = iter([9.0, 6.0, 7.0, 8.0, 9.0, 4.0, 3.0, 5.0]), []

    def clocked(work: Any) -> tuple[Any, float]:
        kinds.append(work().dtype)
        return work(), next(seconds)

    monkeypatch.setattr(planning, "clocked", clocked)
    lm, _, _ = prepare(recipe(job, model={**tiny.recipe_dict(job)["model"], "dtype": dtype}))
    assert planning.gain_of_bfloat16(lm) == (2.0 if asked else None)  # the fastest of each
    assert kinds == ([torch.float32] * 4 + [torch.bfloat16] * 4 if asked else [])


def test_plan_and_gate_say_the_same_things(job: Path) -> None:
    found = pipeline.plan(recipe(job))
    assert found["rows"] == {"train": 13, "validation": 3, "eval": 8} and found["device"] == "cpu"
    assert found["bfloat16"] > 0 and found["dtype"] == "float32"
    verdict = pipeline.gate(recipe(job, gate={"min_kl": 0.0, "min_gain": -1.0}))
    assert set(verdict["estimate"]) < set(found)
    assert verdict["estimate"]["disk_mb"] == pytest.approx(found["disk_mb"], rel=0.2)


def test_what_is_tried_is_said_before_and_after(job: Path) -> None:
    told: list[tuple[str, int, int]] = []
    pipeline.plan(recipe(job), progress=lambda *call: told.append(call))
    assert told.pop(0) == ("loading", 1, 1)
    tries = list(dict.fromkeys(stage for stage, _, _ in told))
    assert told == [(stage, done, 1) for stage in tries for done in (0, 1)]
    assert len(tries) == 5 and all(stage.startswith("plan: ") for stage in tries)


def test_the_gate_gives_its_verdict_before_the_estimate(job: Path) -> None:
    told: list[str | dict[str, Any]] = []
    found = pipeline.gate(recipe(job), judged=told.append, progress=lambda stage, *_: told.append(stage))
    (place,) = (n for n, what in enumerate(told) if isinstance(what, dict))
    assert told[place] == {key: value for key, value in found.items() if key != "estimate"}
    assert told[place - 1] == "evaluate in-context" and str(told[place + 1]).startswith("plan: ")
