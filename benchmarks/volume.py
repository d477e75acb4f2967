"""How much memory and time a run takes as its rows grow: the whole job of a tiny model, each size in a process of its own.

    python benchmarks/volume.py --rows 10000 50000 200000

Out: for each size the peak of resident memory (the most at any moment, libraries and mapped files included), how it compares
with the first size, CPU seconds per 1,000 rows of each stage, and bytes on the disk. The model is so small that what is measured
is everything but the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

CONTEXT = "Answer with the town and the order, and nothing else."
STAGES = {"teacher": "label", "train": "train"}
"""How the progress of a stage begins -> its column; all else is `rest`: rows read and checked, both prompts made, the gate,
the evaluation, reading what was written. What comes between two stages counts to the second: making the adapter and the first
held-out loss to `train`."""
COLUMNS = (*STAGES.values(), "rest")


def write_rows(path: Path, count: int, word: str) -> None:
    """Queries with answers, all different."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            query = f"{word}: where is order {i}?"
            file.write(json.dumps({"prompt": query, "answer": f"Town {i % 97}, {i}"}) + "\n")


def job(folder: Path, count: int) -> dict[str, Any]:
    """The whole run, in this process."""
    import torch

    import tiny
    from ctxdistill import pipeline
    from ctxdistill.recipe import Recipe

    torch.set_num_threads(1)
    tiny.save(folder / "model")
    write_rows(folder / "queries.jsonl", count, "query")
    write_rows(folder / "eval.jsonl", 100, "held out")
    recipe = Recipe.from_dict(
        {
            "name": "volume",
            "model": {"name": str(folder / "model"), "device": "cpu"},
            "context": {"system": CONTEXT},
            "queries": {"data": "queries.jsonl"},
            "completions": {"source": "data"},
            "targets": {"batch_size": 64},
            "lora": {"rank": 4},
            "train": {"epochs": 1, "batch_size": 64, "validation": 0.002, "checkpoint_every": 200},
            "eval": {"data": "eval.jsonl", "max_new_tokens": 4, "latency_rows": 0, "bootstrap": 200},
            "behaviour": {"unrelated": 0, "rows": 0},
            "gate": {"on_fail": "warn"},
        },
        base_dir=folder,
    )
    seconds = dict.fromkeys(COLUMNS, 0.0)
    last = time.process_time()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.process_time()
        seconds[next((column for start, column in STAGES.items() if stage.startswith(start)), "rest")] += now - last
        last = now

    run = pipeline.distill(recipe, folder / "run", progress=progress)
    progress("end", 1, 1)
    return {
        "rows": count,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "cpu_seconds": {column: 1000 * value / count for column, value in seconds.items()},
        "targets_mb": sum(f.stat().st_size for f in (run.path / "targets").iterdir()) / 2**20,
        "steps": run.evaluation["training"]["steps"],
    }


def measured(count: int) -> dict[str, Any]:
    """`job` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", str(count), "--folder", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(job(args.folder, args.one)))
        return 0
    table = []
    print(f"{'rows':>9} {'peak MB':>8} {'ratio':>6}   CPU seconds per 1,000 rows: {'  '.join(COLUMNS)}   targets MB")
    for count in args.rows:
        found = measured(count)
        table.append(found | {"ratio": found["peak_mb"] / (table or [found])[0]["peak_mb"]})
        seconds = "  ".join(f"{found['cpu_seconds'][column]:5.2f}" for column in COLUMNS)
        print(
            f"{count:>9,} {found['peak_mb']:>8,.0f} {table[-1]['ratio']:>6.2f}   {'':27}{seconds} {found['targets_mb']:>12,.1f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
