"""Invariant 6 across processes: real processes take the same steps as one, and say what one says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from ctxdistill import pipeline, processes
from ctxdistill.errors import ModelError, RunError
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import RunDir
from ctxdistill.weights import pick_device

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
CASES: dict[str, dict[str, Any]] = {
    "whole": {"batch_size": 4},
    "micro": {"batch_size": 4, "micro_batch": 1},
    "few": {"batch_size": 3, "micro_batch": 2, "ce_weight": 0.3, "retain_weight": 0.5},
    "shard": {"batch_size": 3, "micro_batch": 1, "retain_weight": 0.5, "gradient_checkpointing": True, "shard": True},
    "dora": {"batch_size": 4, "shard": True},
    "cartridge": {"batch_size": 4, "shard": True},
}
SCRIPT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from ctxdistill import processes, train as loop
from ctxdistill.lm import LM
from ctxdistill.recipe import LoraSection, ModelSection, TrainSection
from ctxdistill.rundir import RunDir
from ctxdistill.store import Target
from ctxdistill.objective import Example
from ctxdistill.train import train

folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
rank, world = processes.rank(), processes.count()
processes.begin(torch.device("cpu"))
torch.manual_seed(5)
examples = [
    Example(str(i), tuple(range(10, 20 + i)), Target(str(i), tuple(range(30, 31 + i)), {"hidden": torch.randn(1 + i, 32)}))
    for i in range(7)  # of different lengths, and the last step has fewer rows: the processes' shares are not equal
]
plain, seen = loop.batch_loss, []
def watched(lm, rows, section, stats=None):
    if stats is not None:
        seen.extend(e.id for e in rows)
    return plain(lm, rows, section, stats)
loop.batch_loss = watched
for name, values in cases.items():
    lm = LM.load(ModelSection(name=str(folder / "model"), device="cpu"))
    method = name if name in ("dora", "cartridge") else "lora"
    lm.add_adapter(LoraSection(rank=2, method=method, tokens=4), 0, range(40, 60))
    if values.get("shard"):
        lm.shard()
    frozen = [p.to_local() if hasattr(p, "to_local") else p for p in lm.model.parameters() if not p.requires_grad]
    section = TrainSection(epochs=2, lr=1e-3, clip=1e9, **values)
    run = folder / f"{name}-{world}"
    train(lm, examples[:5], examples[5:], section, RunDir(run), retained=examples[4:])
    here = folder / f"{name}-{world}-{rank}"
    here.with_suffix(".json").write_text(json.dumps([seen, sum(p.numel() for p in frozen)]))
    save_file({n: p.detach().contiguous() for n, p in lm.trainable().items()}, here.with_suffix(".safetensors"))
    seen.clear()
processes.end()
"""


def launched(world: int, *arguments: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LAUNCH, str(world), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """What one process makes of all cases."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "model").symlink_to(llama)
    (folder / "go.py").write_text(SCRIPT)
    subprocess.run([sys.executable, str(folder / "go.py"), str(folder), json.dumps(CASES)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_processes_train_as_one(alone: Path, world: int) -> None:
    process = launched(world, str(alone / "go.py"), str(alone), json.dumps(CASES))
    assert process.wait(300) == 0, process.communicate()[1][-3000:]
    for name in CASES:
        one, many = (tiny.read_jsonl(alone / f"{name}-{n}" / "metrics.jsonl") for n in (1, world))
        assert len(one) == len(many) > 4
        for a, b in zip(one, many, strict=True):
            a.pop("seconds", None), b.pop("seconds", None)
            assert a.pop("event") == b.pop("event")
            assert a == pytest.approx(b, rel=1e-4)
        told = [json.loads((alone / f"{name}-{world}-{rank}.json").read_text()) for rank in range(world)]
        rows = [seen for seen, _ in told]
        assert Counter(i for some in rows for i in some) == dict.fromkeys("01234", 2)  # once in each epoch
        assert min(map(len, rows)) > 0 or world > 2
        whole = json.loads((alone / f"{name}-1-0.json").read_text())[1]
        held = [weights / whole for _, weights in told]
        assert max(held) < 0.75 if CASES[name].get("shard") else held == [1.0] * world  # embeddings and head stay whole
        reference = load_file(alone / f"{name}-1-0.safetensors")
        mine = [load_file(alone / f"{name}-{world}-{rank}.safetensors") for rank in range(world)]
        for key, value in reference.items():
            assert all(torch.equal(mine[0][key], other[key]) for other in mine)
            assert (value - mine[0][key]).abs().max() < 1e-4


# -- the whole path ---------------------------------------------------------------------------------------------------


def recipe_file(folder: Path, **overrides: Any) -> Path:
    raw = tiny.recipe_dict(folder, **overrides)
    lines = [f"name = {json.dumps(raw.pop('name'))}"]
    for section, values in raw.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path = folder / "my.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def curve(run: Path) -> list[Any]:
    return [(x["event"], x["step"], x.get("loss")) for x in tiny.read_jsonl(run / "metrics.jsonl")]


def same_curve(one: list[Any], two: list[Any]) -> None:
    assert [x[:2] for x in one] == [x[:2] for x in two]
    assert [x[2] for x in one if x[2] is not None] == pytest.approx([x[2] for x in two if x[2] is not None], rel=2e-3)


class Stop(Exception):
    pass


def stop_in_training(stage: str, done: int, total: int) -> None:
    if stage.startswith("train") and done >= 5:
        raise Stop


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A folder with a recipe (rounds of the student's own completions, rows that retain) and its run in one process."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "model").symlink_to(llama)
    options = {"epochs": 4, "on_policy": 0.5, "on_policy_temperature": 0.0, "round_steps": 4, "retain_weight": 0.5}
    path = recipe_file(folder, **{f"train__{key}": value for key, value in options.items()})
    pipeline.distill(Recipe.load(path), folder / "one")
    return path


def test_a_run_of_one_process_goes_on_in_two(plain: Path) -> None:
    folder = plain.parent
    with pytest.raises(Stop):
        pipeline.distill(Recipe.load(plain), folder / "two", progress=stop_in_training)
    command = ["-m", "ctxdistill", "distill", str(plain), "--out", str(folder / "two"), "--resume", "--json"]
    out, err = (process := launched(2, *command)).communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert json.loads(out)["run"] == str(folder / "two")  # one object: the first process alone prints
    assert err.count("loss: forward_kl") == 1 and "Traceback" not in err
    same_curve(curve(folder / "one"), curve(folder / "two"))
    one, two = (load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 2e-3
    assert (folder / "two" / "report.html").is_file()


def test_ctrl_c_ends_four_processes_and_one_goes_on(plain: Path) -> None:
    folder = plain.parent
    process = launched(4, "-m", "ctxdistill", "distill", str(plain), "--out", str(folder / "four"))
    log = folder / "four" / "metrics.jsonl"
    until = time.monotonic() + 300
    while not (log.is_file() and log.read_text().count('"step", ') >= 5):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1][-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("stopped; go on with: ctxdistill distill") == 1 and "this is a bug" not in err
    assert out == ""
    done = len(curve(folder / "four"))
    pipeline.distill(Recipe.load(plain), folder / "four", resume=True)
    assert 5 <= done < len(curve(folder / "one"))
    same_curve(curve(folder / "one"), curve(folder / "four"))


def test_an_error_of_one_process_ends_all(job: Path) -> None:
    lines = [
        "import os",
        "def fine(*_):",
        "    if os.environ.get('RANK') == '1':",
        "        raise ValueError('no luck')",
    ]
    (job / "mine.py").write_text("\n".join([*lines, "    return True", ""]))
    path = recipe_file(job, completions__checker="mine:fine")
    process = launched(2, "-m", "ctxdistill", "--allow-code", "distill", str(path), "--out", str(job / "run"))
    out, err = process.communicate(timeout=120)  # no hang
    assert process.returncode != 0
    assert (
        [line[:6] for line in err.splitlines()].count("Error:") == 1
        and "mine:fine failed: ValueError: no luck" in err
        and "this is a bug" not in err
    )
    assert out == ""


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", list(processes.REFUSED))
def test_other_ways_to_share_the_work_are_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(RunError, match="is not supported") as caught:
        processes.begin(torch.device("cpu"))
    name, why = processes.REFUSED[variable]
    assert name in str(caught.value) and why in str(caught.value) and "torchrun" in caught.value.fix


def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over from something else
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunError, match="the 2 processes of the run do not meet") as caught:
        processes.begin(torch.device("cpu"))
    assert "unset WORLD_SIZE" in caught.value.fix


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (processes.local("cuda"), processes.local("cpu")) == ("cuda:1", "cpu")
    with pytest.raises(ModelError, match="by 2 processes"):
        pick_device("cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.local("cuda") == "cuda"


def test_a_process_without_the_same_run_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="do not have the same"):
        RunDir(tmp_path).join("abc")
    RunDir(tmp_path).write_json("recipe.json", {"fingerprint": "abc"})
    RunDir(tmp_path).join("abc")


def test_other_commands_are_not_for_several_processes(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ctxdistill import cli

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert cli.main(["gate", str(recipe_file(job))]) == 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert "only `distill` and `demo` run in several processes" in capsys.readouterr().err
