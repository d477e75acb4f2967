"""Is anything lost when a run is killed? Run: python benchmarks/faults.py

A tiny random model is distilled by the command line, once from end to end, and then again and again in fresh folders, where it
is killed (SIGKILL) at a random moment between its first target and its finished adapter, and resumed. Even rows of the table are
on-policy: there the student writes, too. Every run must end with the bytes of the uninterrupted one, adapter and scores of the
held-out rows alike. Each command is a process of its own, started as a shell does it.

Prints a line per moment; exits with 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny

ROWS, EPOCHS = 40, 3
PAUSE = 0.03
"""Most seconds between a step and the kill: about what a step takes, so that a kill comes anywhere in it."""
PATIENCE = 120.0
"""Seconds after which a command that does not get so far is killed all the same."""
COMPARED = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "scores.jsonl")
KINDS: dict[str, dict[str, Any]] = {"off-policy": {}, "on-policy": {"on_policy": 0.5, "round_steps": 4}}


def job(folder: Path) -> dict[str, Path]:
    """Model, data, and a recipe for each kind; sampling and dropout are on, so that everything drawn matters."""
    tiny.save(folder / "model")
    quick = {"eval__latency_rows": 0, "behaviour__unrelated": 0}
    raw = tiny.recipe_dict(folder, targets__batch_size=2, lora__dropout=0.1, completions__temperature=0.8, **quick)
    tiny.write_jsonl(folder / "queries.jsonl", [{"prompt": f"say {n}", "answer": str(n)} for n in range(ROWS)])
    recipes = {}
    for kind, keys in KINDS.items():
        raw["train"] = {"epochs": EPOCHS, "batch_size": 4, "lr": 0.01, "checkpoint_every": 2, "validation": 0.2, **keys}
        recipes[kind] = tiny.write_recipe(folder / f"{kind}.toml", raw)
    return recipes


def progress(run: Path) -> int:
    """How many shards of targets and steps of training there are."""
    return len(list((run / "targets").glob("*.safetensors"))) + len(steps(run))


def steps(run: Path) -> list[int]:
    """The steps that are in the log; its last line may be cut."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    found = [json.loads(line) for line in text.split("\n")[:-1]]
    return [line["step"] for line in found if line["event"] == "step"]


class Child:
    """A process; `tests/forks.py` has a quicker kind."""

    def __init__(self, arguments: Sequence[Any], cwd: Path) -> None:
        command = [sys.executable, "-m", "ctxdistill.cli", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # so that others can use the machine, too
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """(exit code, or minus the signal that ended it, what it said)."""
        said, _ = self.process.communicate()
        return self.process.returncode, said


class Shell:
    """Starts `ctxdistill ARGUMENTS` as a process of its own."""

    def start(self, arguments: Sequence[Any], cwd: Path) -> Child:
        return Child(arguments, cwd)

    def run(self, arguments: Sequence[Any], cwd: Path) -> tuple[int, str]:
        return self.start(arguments, cwd).wait()


def kill(child: Any, run: Path, after: int, seconds: float) -> dict[str, Any] | None:
    """Kill a command so many seconds after it got so far, and say what it was at; None where it had its adapter."""
    latest = time.monotonic() + PATIENCE
    while progress(run) < after and not (run / "adapter").exists() and time.monotonic() < latest:
        time.sleep(0.001)
    time.sleep(seconds)
    child.send(signal.SIGKILL)
    code, _ = child.wait()
    if code != -signal.SIGKILL or (run / "adapter").exists():
        return None
    return {
        "stage": "training" if steps(run) else "labelling",
        "shards": len(list((run / "targets").glob("*.safetensors"))),
        "step": max(steps(run), default=0),
        "checkpoint": max((int(p.stem[5:]) for p in (run / "checkpoints").glob("step-*")), default=0),
        "half": len([p for p in run.glob("**/.*") if p.name.endswith(".tmp")]),
    }


def bits(run: Path) -> str:
    """A hash of what must not differ."""
    return hashlib.sha256(b"".join((run / name).read_bytes() for name in COMPARED)).hexdigest()[:12]


def straight(shell: Any, folder: Path, kind: str, recipe: Path) -> tuple[str, int]:
    """(bits, number of shards and steps) of a run that nobody disturbs, in the folder `kind`."""
    code, said = shell.run(["distill", recipe, "--out", folder / kind], folder)
    if code:
        raise RuntimeError(said)
    return bits(folder / kind), progress(folder / kind)


def moments(shell: Any, folder: Path, recipes: dict[str, Path], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """What became of `count` runs that were killed and resumed; the kinds take turns."""
    draw, late = random.Random(seed), 0
    expected = {kind: straight(shell, folder, kind, recipe) for kind, recipe in recipes.items()}
    for number in range(count):
        kind = list(recipes)[number % len(recipes)]
        command = ["distill", recipes[kind], "--out", folder / "run"]
        found = None
        while not found:
            shutil.rmtree(folder / "run", ignore_errors=True)
            moment = draw.randrange(1, expected[kind][1]), draw.random() * PAUSE
            found = kill(shell.start(command, folder), folder / "run", *moment)
            late += not found
        code, said = shell.run([*command, "--resume"], folder)
        same = code == 0 and bits(folder / "run") == expected[kind][0]
        yield {"kind": kind, **found, "same": same, "late": late, "said": said}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=25, help="how many (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="which moments (default: 0)")
    asked = parser.parse_args()
    different, found = 0, {"late": 0}
    with tempfile.TemporaryDirectory() as place:
        print(f"{'moment':>6} {'kind':<10} {'killed in':<9} shards  step  checkpoint  half-written  bits")
        for number, found in enumerate(moments(Shell(), Path(place), job(Path(place)), asked.moments, asked.seed), 1):
            print(
                f"{number:6} {found['kind']:<10} {found['stage']:<9} {found['shards']:6} {found['step']:5} "
                f"{found['checkpoint']:11} {found['half']:13}  {'same' if found['same'] else 'DIFFERENT'}",
                flush=True,
            )
            if not found["same"]:
                different += 1
                print(found["said"])
    print(f"{asked.moments} moments, {different} different; {found['late']} more came after the adapter was written")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
