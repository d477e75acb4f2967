"""What a run will take, before it runs: time, memory and disk, from every stage tried on a few rows.

In: a checked recipe, the model, its rows. Out: `Speeds`, measured, and the prediction made of them. Invariants: each stage
is tried by the code that the run will use, on rows of the run, so that nothing has to be known about the machine or the
model; the model is afterwards as it was before; nothing is kept.
"""

from __future__ import annotations

import heapq
import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctxdistill.accounts import Peak
from ctxdistill.behaviour import TOKENS
from ctxdistill.dataset import Data
from ctxdistill.evaluate import score_arm, teacher_targets
from ctxdistill.generic import TRAINED
from ctxdistill.lm import LM, linear_layers
from ctxdistill.objective import Example, Stats, batch_loss
from ctxdistill.policy import overall
from ctxdistill.products import linear
from ctxdistill.prompts import Pair, Prompter
from ctxdistill.recipe import Recipe, TargetsSection
from ctxdistill.replay import Replay
from ctxdistill.rundir import Progress, no_progress
from ctxdistill.store import Target, TargetStore
from ctxdistill.targets import label
from ctxdistill.train import Part, Step, attempt, recordings, retained_rows, saved, saving

ARMS_TIMED = 3
COMPARED = torch.float32, torch.bfloat16
"""Types of weights of which a CPU may be much faster in one than in the other."""


@dataclass(frozen=True)
class Speeds:
    """What was measured; seconds, but for the last three."""

    context: float
    """To read what all teacher prompts start with."""
    answer: float
    """A row's completion and targets, the context read."""
    student: float
    """A row of an evaluated arm without the context."""
    request: float
    """One request of its own without the context."""
    train: float
    """A student token in a training step."""
    forward: float
    """A student token without the backward pass."""
    answer_tokens: float
    """Tokens of a completion."""
    memory_mb: float
    """The most that was in use, the model included."""
    savings: int = 0
    """How often the device's memory did not hold a training step (`train.saving`)."""


def measure(recipe: Recipe, lm: LM, prompter: Prompter, rows: Data, progress: Progress = no_progress) -> Speeds:
    """Try each stage on a batch of rows; each try is a stage of `progress`."""

    def tried(what: str, work: Any) -> tuple[Any, float]:
        progress(f"plan: {what}", 0, 1)
        found = clocked(work)
        progress(f"plan: {what}", 1, 1)
        return found

    first, more = rows.pairs["train"][0], recipe.completions.max_new_tokens
    shared = max(0, len(first.teacher) - len(first.student))  # about
    size = lm.rows_at_once(recipe.targets.batch_size, len(first.teacher) + more, shared)
    pairs, evaluated = rows.pairs["train"][:size], rows.pairs["eval"][:size]
    with tempfile.TemporaryDirectory() as folder, Peak(lm.device) as peak:
        with torch.no_grad(), lm.adapter(False):
            lm.head(torch.cat(lm.hidden([((*p.student, 0), 1) for p in pairs])))  # warm up
            _, context = tried("read the context", lambda: lm.prefix([p.teacher for p in pairs]))
        made, answers = tried("label", lambda: label(lm, prompter, pairs, recipe, TargetStore(Path(folder) / "a")))
        given = teacher_targets(lm, prompter, evaluated, recipe, TargetStore(Path(folder) / "b"))
        _, scored = tried("evaluate", lambda: score_arm("zero_shot", lm, prompter, evaluated, given, recipe))
        limit = recipe.eval.max_new_tokens
        lm.generate([evaluated[0].student], max_new_tokens=2, ends=lambda _: False, record=False)  # warm up
        _, request = tried(
            "one request",
            lambda: lm.generate([evaluated[0].student], max_new_tokens=limit, ends=prompter.ends, record=False),
        )
        targets = [target for found in made for target in found]
        batch = longest(recipe, rows.pairs["train"], targets)
        (train, forward, savings), _ = tried("train", lambda: step(recipe, lm, batch))
    count = len(targets)
    return Speeds(
        context=context,
        answer=max(answers - context, 0.0) / count,
        student=scored / len(evaluated),
        request=request,
        train=train,
        forward=forward,
        answer_tokens=sum(len(t.ids) for t in targets) / count,
        memory_mb=peak.mb,
        savings=savings,
    )


def longest(recipe: Recipe, pairs: Sequence[Pair], targets: Sequence[Target]) -> list[Example]:
    """A batch as long as the run can have it: the longest prompts with the completions at hand."""
    size = min(recipe.train.micro_batch or recipe.train.batch_size, len(pairs) * recipe.completions.samples)
    prompts = heapq.nlargest(size, (p.student for p in pairs for _ in range(recipe.completions.samples)), key=len)
    return [Example(str(i), prompt, targets[i % len(targets)]) for i, prompt in enumerate(prompts)]


def step(recipe: Recipe, lm: LM, batch: Sequence[Example]) -> tuple[float, float, int]:
    """Seconds per student token of a training step, and of a forward pass alone, with an adapter of its own; and how often
    the device's memory did not hold the step (`train.saving`)."""
    tokens = sum(len(e.prompt) + len(e.target.ids) - 1 for e in batch)
    lm.add_adapter(recipe.lora, recipe.train.seed)
    try:
        lm.training(True)
        parameters = list(lm.trainable().values())
        optimizer = torch.optim.AdamW(parameters, fused=True)
        plain, model, said = recipe.train.model_copy(update={"retain_weight": 0.0}), Step(lm), ""
        for savings in itertools.count():
            how = saving(plain, savings, said)
            lm.recompute(how.gradient_checkpointing)
            parts, replays = [Part(batch, 1.0, how, "loss")], recordings(lm, [batch], [], how)

            def whole(parts: list[Part] = parts, replays: dict[str, Replay] = replays) -> Stats | str:
                found = attempt(model, parts, replays)
                torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip)
                optimizer.step()
                optimizer.zero_grad()
                return found

            found = whole()
            if not isinstance(found, str):
                break
            said = found
        _, train = clocked(whole)
        lm.training(False)
        with torch.no_grad():
            _, forward = clocked(lambda: batch_loss(lm, batch, recipe.train))
    finally:
        lm.recompute(False)
        lm.remove_adapter()
    return train / tokens, forward / tokens, savings


@torch.no_grad()
def gain_of_bfloat16(lm: LM) -> float | None:
    """How many times as fast a processor multiplies by the model's largest block matrix in bfloat16 as in float32; None for a
    model that is in neither, or not on a CPU."""
    blocks = (lm.model.get_submodule(name) for name in linear_layers(lm.model)[0])
    weights = [m.weight for m in blocks if type(m) is torch.nn.Linear and m.weight.dtype in COMPARED]
    if lm.device.type != "cpu" or not weights:
        return None
    weight = max(weights, key=torch.Tensor.numel).float()  # [out, in]
    x = torch.randn(256, weight.shape[1])
    x_16, weight_16 = x.bfloat16(), weight.bfloat16()
    products = (lambda: linear(x, weight)), (lambda: linear(x_16, weight_16))
    in_32, in_16 = (min(clocked(product)[1] for _ in range(4)) for product in products)  # the first one warms up
    return in_32 / in_16


def clocked(work: Any) -> tuple[Any, float]:
    """What `work` returns, and the seconds that it took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def predict(recipe: Recipe, lm: LM, rows: Data, s: Speeds) -> dict[str, Any]:
    """Seconds by stage, memory, disk and money of the whole run.

    `seconds` is their sum; `disk_mb` what the run folder will hold at most, checkpoints included; `notes` what a reader must
    know.
    """
    samples, per_request = recipe.completions.samples, recipe.eval.latency_rows + 1 if recipe.eval.latency_rows else 0
    train, validation, evaluated = (len(rows.pairs[split]) for split in ("train", "validation", "eval"))
    prompt = sum(len(p.student) for p in rows.pairs["train"]) / train
    length = prompt + s.answer_tokens - 1
    c = recipe.train
    b, per_epoch = recipe.behaviour, math.ceil(train * samples / c.batch_size)
    kept = per_epoch * retained_rows(len(TRAINED), c)  # rows of an epoch, beside the others
    elsewhere = (2 * b.unrelated + 3 * min(b.rows, evaluated)) * s.student  # written by base model and student
    elsewhere += min(b.rows, evaluated) * len(b.strengths) * length * s.forward
    stages = {
        "gate": 2 * s.context + evaluated * (2 * s.answer + s.student),
        "label": s.context + (train + validation) * samples * s.answer,
        "train": c.epochs * (train * samples + kept) * length * s.train
        + (c.epochs + 1) * validation * samples * length * s.forward
        # the student writes, as an evaluated arm does, and the teacher judges
        + overall(c.epochs * per_epoch, per_epoch, c) * c.epochs * train * samples * (s.student + s.answer / 2),
        "evaluate": evaluated * s.student * (s.train / (3 * s.forward) if s.forward else 1.0)
        + per_request * (s.context + ARMS_TIMED * s.request)
        + elsewhere,
    }
    seconds = sum(stages.values())
    adapter = adapter_bytes(recipe, lm)
    supervised = (train + validation) * samples * s.answer_tokens + evaluated * s.answer_tokens
    supervised += (len(TRAINED) if c.retain_weight else 0) * TOKENS
    per_round = min(c.round_steps * c.batch_size or train * samples, c.epochs * train * samples)
    supervised += 2 * c.on_policy * per_round * s.answer_tokens  # two rounds are kept
    checkpoints = min(2, c.epochs * train * samples // (c.batch_size * c.checkpoint_every)) if c.checkpoint_every else 0
    disk = supervised * target_bytes(recipe.targets, lm) + b.unrelated * TOKENS * target_bytes(TargetsSection(), lm)
    disk += adapter * (2 + 3 * checkpoints)
    hourly = recipe.cost.machine_hour
    return {
        "seconds": seconds,
        "stages": stages,
        "memory_mb": s.memory_mb,
        "disk_mb": disk / 2**20,
        "answer_tokens": s.answer_tokens,
        "cost": seconds / 3600 * hourly if hourly else None,
        "notes": saved(recipe.train, s.savings),
    }


def adapter_bytes(recipe: Recipe, lm: LM) -> int:
    """Size of the adapter's tensors."""
    lm.add_adapter(recipe.lora, recipe.train.seed)
    try:
        return sum(p.numel() * p.element_size() for p in lm.trainable().values())
    finally:
        lm.remove_adapter()


def target_bytes(section: TargetsSection, lm: LM) -> int:
    """Bytes of a supervised token's target on disk, its id included."""
    head: torch.Tensor = lm.model.get_output_embeddings().weight  # [V, d]
    if section.kind == "topk":
        return 8 * min(section.k, head.shape[0] - 1) + 4
    return (4 * head.shape[0] if section.kind == "full" else head.element_size() * head.shape[1]) + 4
