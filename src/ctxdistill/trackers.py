"""What training measures, also in TensorBoard, Weights & Biases, MLflow or Trackio, through accelerate.

In: the names of `train.report_to`, lines of metrics.jsonl. Out: an accelerator that reports. Invariants: nothing leaves the
machine unless the person has set the tracker's own variable to say so; metrics.jsonl is written all the same, and holds
everything that is reported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import ProjectConfiguration

from ctxdistill.errors import TrainError
from ctxdistill.recipe import TrainSection
from ctxdistill.rundir import RunDir

FOLDER = "tracking"
"""In the run folder."""
LOCAL = {
    "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": "{folder}", "WANDB_SILENT": "true"},
    "mlflow": {"MLFLOW_TRACKING_URI": "file://{folder}/mlflow", "MLFLOW_ALLOW_FILE_STORE": "true"},
    "trackio": {"TRACKIO_DIR": "{folder}/trackio"},
    "tensorboard": {},
}
"""Variables that keep a tracker on this machine; those that the person has set stay."""
OWN: dict[str, str] = {}
"""Those that were set here, for the latest run of this process."""
POSITION = ("event", "step", "epoch")


def check(names: Sequence[str]) -> None:
    """Raise `TrainError` for a tracker that is not installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise TrainError(
            f"train.report_to names {' and '.join(missing)}, which cannot be imported",
            fix=f"pip install {' '.join(missing)}, or take it out of train.report_to",
        )


def reporting(section: TrainSection, run: RunDir, *, cpu: bool) -> Accelerator:
    """An accelerator that reports to `section.report_to`: nothing yet but the values of `section`.

    Raises: `TrainError` when a tracker is missing or cannot be started.
    """
    # an earlier run of this process may have been on another device, which accelerate refuses to change; none is used here
    cpu = cpu and not is_initialized()
    if not section.report_to:
        return Accelerator(cpu=cpu)
    check(section.report_to)
    folder = run.path.resolve() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in section.report_to:
        for variable, value in LOCAL[name].items():
            if os.environ.get(variable) in (None, OWN.get(variable)):
                os.environ[variable] = OWN[variable] = value.format(folder=folder)
    config = ProjectConfiguration(project_dir=str(run.path), logging_dir=str(folder))
    accelerator = Accelerator(cpu=cpu, log_with=list(section.report_to), project_config=config)
    values = {key: value for key, value in section.model_dump().items() if key != "report_to"}
    try:
        # wandb reads its variables once in a process
        options = {"wandb": {"dir": os.environ["WANDB_DIR"]}} if "wandb" in section.report_to else {}
        accelerator.init_trackers(run.path.resolve().name, config=values, init_kwargs=options)
    except Exception as error:  # each tracker raises what it likes
        raise TrainError(
            f"train.report_to: {' or '.join(section.report_to)} cannot be started",
            found=f"{type(error).__name__}: {str(error).strip()[:200]}",
            fix="look at its settings (variables of the environment), or take it out of train.report_to",
        ) from error
    return accelerator


def report(accelerator: Accelerator, line: Mapping[str, Any]) -> None:
    """Report a line of metrics.jsonl: `train/loss`, `validation/kl` and so on, at its step."""
    group = "train" if line["event"] == "step" else line["event"]
    values = {f"{group}/{key}": value for key, value in line.items() if key not in POSITION}
    accelerator.log({key: float(value) for key, value in values.items()}, step=line["step"])


def finish(accelerator: Accelerator) -> None:
    """Close the trackers, and nothing else: the processes may have more to do."""
    for tracker in accelerator.trackers:
        tracker.finish()
