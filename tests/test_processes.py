"""Invariant 6 across processes: two real processes take the same step as one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tiny

SCRIPT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from ctxdistill.lm import LM
from ctxdistill.recipe import LoraSection, ModelSection, TrainSection
from ctxdistill.rundir import RunDir
from ctxdistill.store import Target
from ctxdistill.train import Example, train

folder, world = Path(sys.argv[1]), os.environ.get("WORLD_SIZE", "1")
rank = os.environ.get("RANK", "0")
lm = LM.load(ModelSection(name=str(folder / "model"), device="cpu"))
lm.add_adapter(LoraSection(rank=2), 0)
torch.manual_seed(5)
examples = [
    Example(str(i), tuple(range(10, 20 + i)), Target(str(i), tuple(range(30, 31 + i)), {"hidden": torch.randn(1 + i, 32)}))
    for i in range(5)  # of different lengths, and the last step has one row: the processes' shares are not equal
]
section = TrainSection(epochs=2, batch_size=4, lr=1e-3, validation=0.0, clip=1e9)
train(lm, examples, [], section, RunDir(folder / f"run-{world}-{rank}"))
save_file({n: p.detach().contiguous() for n, p in lm.trainable().items()}, folder / f"adapter-{world}-{rank}.safetensors")
"""


def test_two_processes_train_as_one(job: Path) -> None:
    (job / "go.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable], launch):
        done = subprocess.run([*command, str(job / "go.py"), str(job)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    logs = {}
    for world, rank in ((1, 0), (2, 0)):
        lines = tiny.read_jsonl(job / f"run-{world}-{rank}" / "metrics.jsonl")
        logs[world] = [(x["step"], x["loss"], x["grad_norm"], x["kl"], x["tokens"]) for x in lines]
    assert not (job / "run-2-1" / "metrics.jsonl").exists()  # rank 0 alone writes
    assert len(logs[1]) == 4
    for one, two in zip(logs[1], logs[2], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    one, two, other = (load_file(job / f"adapter-{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    for name, value in two.items():
        assert bool((value == other[name]).all())
        assert (value - one[name]).abs().max() < 1e-4
