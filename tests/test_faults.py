"""Nothing is lost: the command line, in processes of its own, is killed, stopped, starved and given damaged files.

`benchmarks/faults.py` is the long form of the kills. What needs a mounted file system is skipped where mounting is not allowed.
"""

from __future__ import annotations

import importlib
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from ctxdistill import cli
from ctxdistill.rundir import RunDir
from forks import Forks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BROKEN = ("Traceback", "bug in ctxdistill")


@pytest.fixture(scope="module")
def faults() -> Iterator[ModuleType]:
    """The benchmark, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("faults")
    sys.path.remove(str(BENCHMARKS))
    del sys.modules["faults"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, faults: ModuleType) -> Iterator[SimpleNamespace]:
    """A job, a server of processes, and a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    recipe = faults.job(folder)["off-policy"]
    with Forks(folder / "log") as forks:
        expected, length = faults.straight(forks, folder, "straight", recipe)
        yield SimpleNamespace(folder=folder, recipe=recipe, forks=forks, bits=expected, length=length)


def distill(place: SimpleNamespace, out: Path, *more: str | Path, **options: Any) -> tuple[int, str]:
    code, said = place.forks.run(["distill", place.recipe, "--out", out, *more], place.folder, **options)
    assert not any(word in said for word in BROKEN), said
    return code, said


@pytest.fixture
def killed(place: SimpleNamespace, faults: ModuleType, tmp_path: Path) -> Path:
    """A run that was killed in its training, with two checkpoints."""
    child = place.forks.start(["distill", place.recipe, "--out", tmp_path / "run"], place.folder)
    found = faults.kill(child, tmp_path / "run", place.length - 10, 0.0)
    assert found and found["stage"] == "training" and found["checkpoint"] >= 8
    return tmp_path / "run"


# -- stopped ----------------------------------------------------------------------------------------------------------


def test_killed_at_a_random_moment(place: SimpleNamespace, faults: ModuleType) -> None:
    found = list(faults.moments(place.forks, place.folder, {"off-policy": place.recipe}, 1, seed=3))
    assert [one["same"] for one in found] == [True], found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_says_how_to_go_on(number: int, place: SimpleNamespace, faults: ModuleType, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = place.forks.start(["distill", place.recipe, "--out", run], place.folder)
    while faults.progress(run) < place.length - 20:
        assert not (run / "adapter").exists()
    child.send(number)
    code, said = child.wait()
    assert code == 130 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("stopped; go on with: ")]
    assert not list(run.glob("**/.*.tmp"))
    unfinished = RunDir(run).finish.split("`")[1]
    again = shlex.split(line.removeprefix("stopped; go on with: "))
    assert again[0] == "ctxdistill" and again[-1] == "--resume" and again == shlex.split(unfinished)
    assert place.forks.run(again[1:], place.folder)[0] == 0
    assert faults.bits(run) == place.bits


def test_one_command_at_a_time(place: SimpleNamespace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = place.forks.start(["distill", place.recipe, "--out", run], place.folder)
    while not (run / "targets").exists():
        pass
    for command in (["distill", place.recipe, "--out", run, "--resume"], ["distill", place.recipe, "--out", run]):
        code, said = place.forks.run(command, place.folder)
        assert code == 2 and f"{run} is in use by process {first.pid} on " in said and "Traceback" not in said
    assert first.wait()[0] == 0


# -- starved ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system; called again, changes its options."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        how = f"remount,{options}" if mounted else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(where)], capture_output=True, text=True, check=False
        )
        if done.returncode and not mounted:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        mounted = True
        return where

    if not shutil.which("mount"):
        pytest.skip("there is no program to mount file systems with")
    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_loses_nothing(
    place: SimpleNamespace, faults: ModuleType, small_disk: Callable[[str], Path]
) -> None:
    full, size = set[str](), 64
    while True:
        run = small_disk(f"size={size}k") / "run"
        code, said = distill(place, run, "--resume")
        if code == 0:
            break
        assert code == 2 and "the disk is full: cannot write" in said and "--resume" in said, said
        full.add(said.split("cannot write ")[1].split("\n")[0].replace(str(run), "").split("/")[1])
        size *= 2
    assert faults.bits(run) == place.bits
    assert {"targets", "checkpoints"} <= full


def test_a_disk_that_cannot_be_written(
    place: SimpleNamespace, faults: ModuleType, small_disk: Callable[[str], Path]
) -> None:
    run = small_disk("size=4m") / "run"
    assert faults.kill(place.forks.start(["distill", place.recipe, "--out", run], place.folder), run, 5, 0.0)
    small_disk("ro")
    code, said = distill(place, run, "--resume")
    assert code == 2 and f"cannot write {run}" in said and "Read-only file system" in said and "--out" in said
    small_disk("rw")
    assert distill(place, run, "--resume")[0] == 0
    assert faults.bits(run) == place.bits


def test_a_file_that_may_not_grow(place: SimpleNamespace, faults: ModuleType, tmp_path: Path) -> None:
    code, said = distill(place, tmp_path / "run", largest_file=20_000)
    assert code == 2 and "cannot write" in said and "File too large" in said
    assert distill(place, tmp_path / "run", "--resume")[0] == 0
    assert faults.bits(tmp_path / "run") == place.bits


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_in_the_way(name: str, place: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, said = distill(place, tmp_path / name)
    assert code == 2 and f"cannot write {tmp_path / name}" in said
    assert (tmp_path / "file").read_text() == "mine"


# -- damaged ----------------------------------------------------------------------------------------------------------


def flip(where: float) -> Callable[[bytes], bytes]:
    """Change one bit, at this part of the file."""

    def damage(raw: bytes) -> bytes:
        place = int(where * (len(raw) - 1))
        return raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :]

    return damage


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def test_damaged_targets_are_made_again(place: SimpleNamespace, faults: ModuleType, killed: Path) -> None:
    good = {shard: shard.read_bytes() for shard in (killed / "targets").glob("*.safetensors")}
    for damage in (flip(0.9), cut):
        for shard, raw in good.items():  # which of them training needs is for it to say
            shard.write_bytes(damage(raw))
        code, said = distill(place, killed, "--resume")
        assert code == 2 and f"the target shard {killed / 'targets'}" in said and "is damaged" in said, said
        assert "sha256" in said and not (killed / "adapter").exists()
    assert cli.main(["targets", "prune", str(killed / "targets")]) == 0  # as it says
    assert distill(place, killed, "--resume")[0] == 0
    assert faults.bits(killed) == place.bits


def test_damaged_checkpoints_are_refused(place: SimpleNamespace, faults: ModuleType, killed: Path) -> None:
    newest = sorted((killed / "checkpoints").glob("step-*"))[-1]
    good = newest.read_bytes()
    state = good.index(b"best_loss") / (len(good) - 1)
    for damage in (flip(0.9), flip(state + 14 / len(good)), cut):  # tests/test_sealed.py tries every byte
        newest.write_bytes(damage(good))
        code, said = distill(place, killed, "--resume")
        assert code == 2 and f"the checkpoint {newest} is damaged" in said and f"delete {newest}" in said, said
    newest.unlink()  # as it says
    assert distill(place, killed, "--resume")[0] == 0
    assert faults.bits(killed) == place.bits


def test_a_damaged_best_adapter_is_refused(place: SimpleNamespace, faults: ModuleType, killed: Path) -> None:
    best = killed / "checkpoints" / "best.safetensors"
    best.write_bytes(flip(0.9)(best.read_bytes()))
    for name in sorted((killed / "checkpoints").glob("step-*"))[:-1]:
        name.unlink()
    code, said = distill(place, killed, "--resume", "train.patience=1")  # another recipe
    assert code == 2 and "belongs to another recipe" in said
    code, said = distill(place, killed, "--resume")
    if code == 0:  # a later validation was better, and has replaced it
        assert faults.bits(killed) == place.bits
    else:
        assert f"the checkpoint {best} is damaged" in said and f"delete {best.parent}" in said
        shutil.rmtree(best.parent)
        assert distill(place, killed, "--resume")[0] == 0
        assert faults.bits(killed) == place.bits


# -- numbers that say nothing -----------------------------------------------------------------------------------------


def with_weights(place: SimpleNamespace, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> list[str]:
    """Overrides that name a copy of the model with other weights."""
    shutil.copytree(place.folder / "model", folder / "model")
    tensors = load_file(folder / "model" / "model.safetensors")
    with torch.no_grad():
        change(tensors)
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return [f"model.name={folder / 'model'}"]


def poison(name: str, row: int, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][row] = value

    return change


@pytest.mark.parametrize(
    ("temperature", "change", "where"),
    [
        (0.0, poison("lm_head.weight", 5, float("nan")), "the output head of LlamaForCausalLM cannot be used"),
        (
            0.0,
            poison("model.layers.1.mlp.up_proj.weight", 0, float("inf")),
            "the output head of LlamaForCausalLM cannot be used",
        ),
        (
            0.8,
            poison("model.embed_tokens.weight", 5 + ord("y") - ord("!"), float("nan")),
            "of the model are not finite",
        ),
    ],
)
def test_weights_that_are_not_finite(
    temperature: float,
    change: Callable[[dict[str, torch.Tensor]], None],
    where: str,
    place: SimpleNamespace,
    tmp_path: Path,
) -> None:
    overrides = with_weights(place, tmp_path, change)
    code, said = distill(place, tmp_path / "run", *overrides, f"completions.temperature={temperature}")
    assert code == 2 and where in said and "NaN or infin" in said, said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_teacher_that_became_uniform(place: SimpleNamespace, tmp_path: Path) -> None:
    overrides = with_weights(place, tmp_path, lambda tensors: tensors["lm_head.weight"].zero_())
    code, said = distill(place, tmp_path / "run", *overrides)
    assert code == 2 and "the teacher finds all next tokens equally likely" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_adapter_without_effect(place: SimpleNamespace, tmp_path: Path) -> None:
    code, said = distill(place, tmp_path / "run", "train.lr=1e-30", "train.weight_decay=0.0")
    assert code == 2 and "the adapter has no effect" in said and "train.lr" in said
    assert not (tmp_path / "run" / "adapter").exists()
    steps = [line["step"] for line in tiny.read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert max(steps) == (place.length - 24) // 2  # half-way, and not at the end
