"""Is anything lost when a run is killed? Run: make bench, or python benchmarks/faults.py

A tiny random model is distilled by the command line, once from end to end, and then again and again in fresh folders, where it
is killed (SIGKILL) at a random moment between its first target and its finished adapter, and resumed. Even rows of the table are
on-policy: there the student writes, too. Every run must end with the bytes of the uninterrupted one, adapter and scores of the
held-out rows alike. The processes are forked from one that has imported PyTorch (`tests/forks.py`), so the time in which modules
are imported, and no file is touched, is not among the moments.

Prints a line per moment; exits with 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny
from forks import Child, Forks

ROWS, EPOCHS = 40, 3
PAUSE = 0.03
"""Most seconds between a step and the kill: about what a step takes, so that a kill comes anywhere in it."""
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


def kill(child: Child, run: Path, after: int, seconds: float) -> dict[str, Any] | None:
    """Kill a command so many seconds after it got so far, and say what it was at; None where it had its adapter."""
    while progress(run) < after and not (run / "adapter").exists():
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


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=25, help="how many (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="which moments (default: 0)")
    asked = parser.parse_args()
    draw, different, late = random.Random(asked.seed), 0, 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipes = job(folder)
        with Forks(folder / "log") as forks:
            expected, length = {}, {}
            for kind, recipe in recipes.items():
                code, said = forks.run(["distill", recipe, "--out", folder / kind], folder)
                if code:
                    print(said)
                    return 1
                expected[kind], length[kind] = bits(folder / kind), progress(folder / kind)
                print(f"{kind}: {length[kind]} shards and steps; bits {expected[kind]}")
            print(f"{'moment':>6} {'kind':<10} {'killed in':<9} shards  step  checkpoint  half-written  bits")
            number = 0
            while number < asked.moments:
                kind = list(recipes)[number % 2]
                command = ["distill", recipes[kind], "--out", folder / "run"]
                shutil.rmtree(folder / "run", ignore_errors=True)
                moment = draw.randrange(1, length[kind]), draw.random() * PAUSE
                if not (found := kill(forks.start(command, folder), folder / "run", *moment)):
                    late += 1
                    continue
                code, said = forks.run([*command, "--resume"], folder)
                same = code == 0 and bits(folder / "run") == expected[kind]
                different += not same
                number += 1
                print(
                    f"{number:6} {kind:<10} {found['stage']:<9} {found['shards']:6} {found['step']:5} "
                    f"{found['checkpoint']:11} {found['half']:13}  {'same' if same else 'DIFFERENT'}",
                    flush=True,
                )
                if code:
                    print(said)
    print(f"{asked.moments} moments, {different} different; {late} more came after the adapter was written")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
