"""What trackers are told: everything that metrics.jsonl holds, on this machine, and nothing when none is asked for."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState, tracking
from accelerate.utils import LoggerType

import tiny
from ctxdistill import pipeline, trackers
from ctxdistill.errors import RecipeError, TrainError
from ctxdistill.recipe import Recipe, TrainSection
from ctxdistill.rundir import RunDir


def distill(job: Path, **train: Any) -> pipeline.Run:
    raw = tiny.recipe_dict(job)
    raw["train"] |= train
    return pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run", resume=True)


class Fake(tracking.GeneralTracker):  # type: ignore[misc]
    """A tracker that remembers."""

    name = "tensorboard"
    requires_logging_directory = True
    main_process_only = True
    made: list[Fake] = []  # noqa: RUF012

    def __init__(self, run_name: str, logging_dir: str, **_: Any) -> None:
        super().__init__()
        self.run_name, self.folder, self.lines, self.finished = run_name, logging_dir, [], False  # type: ignore[var-annotated]
        Fake.made.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.values = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr(trackers, "check", lambda names: None)
    Fake.made.clear()
    return Fake


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_reported_at_its_step(job: Path, fake: type[Fake]) -> None:
    run = distill(job, report_to=["tensorboard"])
    (tracker,) = fake.made
    assert tracker.run_name == "run" and tracker.folder == str(run.path.resolve() / "tracking") and tracker.finished
    assert tracker.values["lr"] == 0.01 and "report_to" not in tracker.values
    lines = metrics(run.path)
    assert [step for step, _ in tracker.lines] == [line["step"] for line in lines]
    for (_, told), line in zip(tracker.lines, lines, strict=True):
        group = "train" if line["event"] == "step" else "validation"
        assert told == {f"{group}/{k}": float(v) for k, v in line.items() if k not in ("event", "step", "epoch")}
    assert "train/loss" in tracker.lines[1][1] and "validation/kl" in tracker.lines[0][1]


def test_reporting_changes_neither_the_result_nor_the_run_s_identity(job: Path, fake: type[Fake]) -> None:
    told = distill(job, report_to=["tensorboard"])
    told.path.rename(job / "told")
    plain = distill(job)
    assert len(fake.made) == 1
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (job / "told", plain.path)]
    assert weights[0] == weights[1]
    prints = [RunDir(folder).read_json("recipe.json")["fingerprint"] for folder in (job / "told", plain.path)]
    assert prints[0] == prints[1]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_a_real_event_file_of_tensorboard(job: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = distill(job, report_to=["tensorboard"])
    events = EventAccumulator(str(run.path / "tracking" / "run"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({x["step"]: x["loss"] for x in metrics(run.path) if x["event"] == "step"}, rel=1e-5)
    assert len(losses) > 4
    assert "validation/kl" in events.Tags()["scalars"]


def test_trackers_stay_on_this_machine_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[Fake]
) -> None:
    for variables in trackers.LOCAL.values():
        for name in variables:
            monkeypatch.setenv(name, "")  # restored afterwards
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "online")
    started: list[dict[str, Any]] = []
    started_by = type("A", (), {"init_trackers": lambda *_, **given: started.append(given)})
    monkeypatch.setattr(trackers, "Accelerator", lambda **_: started_by())
    section = TrainSection(report_to=["wandb", "mlflow", "trackio"])
    trackers.reporting(section, RunDir(tmp_path / "run"), cpu=True)
    folder = (tmp_path / "run" / "tracking").resolve()
    assert os.environ["WANDB_MODE"] == "online"  # what the person says counts
    assert os.environ["WANDB_DIR"] == str(folder)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"file://{folder}/mlflow"
    assert trackers.LOCAL["wandb"]["WANDB_MODE"] == "offline"
    monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
    trackers.reporting(section, RunDir(tmp_path / "second"), cpu=True)  # in the same process
    folder = (tmp_path / "second" / "tracking").resolve()
    assert os.environ["WANDB_DIR"] == str(folder)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"file://{folder}/mlflow"
    assert started[-1]["init_kwargs"] == {"wandb": {"dir": str(folder)}}  # it does not look at the variable again
    assert (os.environ["WANDB_MODE"], os.environ["TRACKIO_DIR"]) == ("online", "elsewhere")


def test_a_missing_package_and_an_unknown_name_are_said_at_once(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainError, match="pip install wandb mlflow"):
        distill(job, report_to=["wandb", "mlflow"])
    assert not (job / "run").exists()
    with pytest.raises(RecipeError, match=r"train\.report_to"):
        distill(job, report_to=["neptune"])


def test_a_tracker_that_cannot_start_is_an_error(job: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Fake) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(fake, "start", broken)
    with pytest.raises(TrainError, match="cannot be started"):
        distill(job, report_to=["tensorboard"])


def test_a_run_on_a_cpu_may_follow_one_on_an_accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trackers.reporting(TrainSection(), RunDir(tmp_path / "first"), cpu=False)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="already been initialized"):  # what accelerate says of another device
        Accelerator(cpu=True)
    trackers.finish(trackers.reporting(TrainSection(), RunDir(tmp_path / "second"), cpu=True))
