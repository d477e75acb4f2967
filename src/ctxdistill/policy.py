"""On-policy training: rounds of completions that the student writes and the teacher judges.

In: the training examples with the teacher's completions, the model whose adapter is being trained. Out: the examples of each
step (a `train.Source`), a line per round in `metrics.jsonl`. The loop, the losses and the labelling are those of off-policy
training; only where a completion comes from differs.

What is learnt from a completion of the student's is the divergence over the whole vocabulary at each of its positions, as for
one of the teacher's; the completion itself is taken as given. So the gradient is that of the divergences on sampled prefixes,
without the policy-gradient term for how the sampling depends on the adapter (Agarwal et al., "On-Policy Distillation of
Language Models", arXiv 2306.13649, who call it GKD; MiniLLM, arXiv 2306.08543, keeps that term).

Invariants: which completions the student writes depends only on seed and round, and what it writes only on the adapter at the
start of the round and on seed, round and row; a round that is whole or in part in the run folder is not written again; both
sides see the same completion ids.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ctxdistill import processes
from ctxdistill.caches import Prefix
from ctxdistill.errors import RecipeError, RunError, TrainError
from ctxdistill.lm import LM
from ctxdistill.objective import Example, Stats, batch_loss
from ctxdistill.prompts import Pair, Prompter
from ctxdistill.recipe import CompletionsSection, Recipe, TrainSection
from ctxdistill.rundir import Progress, RunDir, fingerprint, no_progress
from ctxdistill.spool import Lazy
from ctxdistill.store import TargetStore
from ctxdistill.targets import label
from ctxdistill.train import forward_tokens, rows_of

JUDGED = 64
"""Completions of a round, the first ones, on which KL and entropy are measured for its line."""
GRAM = 4
"""Tokens of a piece that counts as repeated when it occurs again in the same completion."""


class Item(NamedTuple):
    """A place in a batch of the round."""

    step: int
    row: int
    """Number of the example."""


@dataclass(frozen=True)
class Habits:
    """How a writer's completions look."""

    tokens: float
    """Mean length, the end included."""
    ended: float
    """Share that ended before `max_new_tokens`."""
    repeated: float
    """Mean share of pieces of `GRAM` tokens that had occurred before in the same completion."""


class Rounds:
    """The examples of each step, round by round. Call it with a step, from 0, in rising order.

    Raises (at construction): `RecipeError` where all steps are in one round and a ramp begins at nothing.
    """

    def __init__(
        self,
        lm: LM,
        prompter: Prompter,
        pairs: Sequence[Pair],
        examples: Sequence[Example],
        recipe: Recipe,
        run: RunDir,
        *,
        progress: Progress = no_progress,
    ) -> None:
        self.lm, self.prompter, self.recipe, self.run, self.progress = lm, prompter, recipe, run, progress
        self.examples = examples
        self.pairs = pairs
        self.numbers = {pair.id: number for number, pair in enumerate(pairs)}
        self.section = recipe.train
        self.per_epoch = math.ceil(len(examples) / self.section.batch_size)
        self.steps = self.per_epoch * self.section.epochs
        self.length = self.section.round_steps or self.per_epoch
        if self.section.on_policy and self.section.on_policy_ramp and self.steps <= self.length:
            raise RecipeError(
                "the student would write nothing: train.on_policy_ramp begins at 0, and each round is as its first step",
                expected="more than one round in the training",
                found=f"one round of {self.length} steps (train.round_steps; 0 is an epoch), and {self.steps} in all",
                fix="more epochs, a smaller train.round_steps, or train.on_policy_ramp = 0",
            )
        self.teacher = habits(Lazy.over(examples, lambda e: e.target.ids), prompter)
        self.number = -1
        self.batches: dict[int, list[Example]] = {}
        self._prefix: Prefix | None = None

    def __call__(self, step: int) -> list[Example]:
        """The batch of a step. The first step of a round makes the round. Raises: `TrainError` when the student has
        collapsed."""
        number = step // self.length
        if number != self.number:
            self.batches = processes.first(lambda: self._round(number, begins=step % self.length == 0))
            self.number = number
        return self.batches[step]

    def round(self, step: int) -> range:
        """The steps of the round that a step belongs to."""
        first = step // self.length * self.length
        return range(first, min(first + self.length, self.steps))

    def _round(self, number: int, *, begins: bool) -> dict[int, list[Example]]:
        started = time.perf_counter()
        steps = self.round(number * self.length)
        items = [Item(step, i) for step in steps for i in rows_of(step, len(self.examples), self.section)]
        own = chosen(len(items), number, share(steps.start, self.steps, self.section), self.section.seed)
        made = dict(zip(own, self._own(number, [items[i] for i in own]), strict=True))
        batches: dict[int, list[Example]] = {step: [] for step in steps}
        for place, item in enumerate(items):
            batches[item.step].append(made.get(place) or self.examples[item.row])
        if begins and processes.leads():  # a round that is resumed in its middle has its line already
            line = {"event": "round", "step": steps.start + 1, "round": number + 1, "rows": len(items)}
            line |= self._judged(list(made.values()))
            self.run.append("metrics.jsonl", line | {"seconds": time.perf_counter() - started})
            check(rounds(self.run), self.teacher)
        return batches

    def _own(self, number: int, items: Sequence[Item]) -> list[Example]:
        """What the student learns from its own completions: they are written or found, then judged by the teacher."""
        if not items:
            return []
        examples = [self.examples[item.row] for item in items]
        pairs = [self.pairs[self.numbers[e.id]] for e in examples]
        ids = self._written(number, items)
        for old in range(number - 1):  # nothing goes on from there any more
            shutil.rmtree(self.run / f"rounds/{old + 1:05d}", ignore_errors=True)
        with torch.no_grad(), self.lm.adapter(False):
            if self._prefix is None:
                self._prefix = self.lm.prefix(Lazy.over(self.pairs, lambda pair: pair.teacher))
        targets = label(
            self.lm,
            self.prompter,
            pairs,
            self.recipe,
            TargetStore(self.run / f"rounds/{number + 1:05d}"),
            completions=CompletionsSection(source="data"),
            written=ids,
            prefix=self._prefix,
            progress=self.progress,
            stage=f"teacher (round {number + 1})",
        )
        return [Example(e.id, e.prompt, row[0]) for e, row in zip(examples, targets, strict=True)]

    def _written(self, number: int, items: Sequence[Item]) -> list[tuple[int, ...]]:
        """The student's completions, from the round's file as far as they are there; batches are formed of all of them."""
        file = f"rounds/{number + 1:05d}.jsonl"
        prompts = [self.examples[item.row].prompt for item in items]
        order = sorted(range(len(items)), key=lambda i: (len(prompts[i]), i))
        limit = self.recipe.completions.max_new_tokens
        size = self.lm.rows_at_once(self.recipe.targets.batch_size, max(map(len, prompts), default=0) + limit)
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        found = self.run.read_jsonl(file)
        if [line["items"] for line in found] != [[list(items[i]) for i in chunk] for chunk in chunks[: len(found)]]:
            path = self.run / file
            raise RunError(f"{path} is not a part of this run", fix=f"delete {path} and go on with --resume")
        if len(found) < len(chunks):
            self.lm.training(False)
            with torch.no_grad(), self.lm.adapter(True):
                prefix = self.lm.prefix(prompts)
                for chunk in chunks[len(found) :]:
                    written = self.lm.generate(
                        [prompts[i] for i in chunk],
                        max_new_tokens=limit,
                        ends=self.prompter.ends,
                        temperature=self.section.on_policy_temperature,
                        seeds=[self._seed(number, items[i]) for i in chunk],
                        prefix=prefix,
                    )
                    line = {"items": [list(items[i]) for i in chunk], "ids": written}
                    self.run.append(file, line)
                    found.append(line)
                    done = sum(len(one["items"]) for one in found)
                    self.progress(f"student (round {number + 1})", done, len(items))
            self.lm.training(True)
        ids = dict(zip(order, (tuple(row) for line in found for row in line["ids"]), strict=True))
        return [ids[i] for i in range(len(items))]

    def _seed(self, number: int, item: Item) -> int:
        """Of a row's generator; a row that a long round meets again is told apart by its epoch."""
        row = [self.section.seed, number, item.row, item.step // self.per_epoch]
        return int(fingerprint(["student", row])[:15], 16)

    def _judged(self, own: Sequence[Example]) -> dict[str, Any]:
        """What the line of a round says of the student's completions. Nats per token; KL is KL(student || teacher)."""
        found: dict[str, Any] = {"student_rows": len(own)}
        if not own:
            return found
        how = habits([e.target.ids for e in own], self.prompter)
        some, stats = own[:JUDGED], Stats()
        size = self.section.batch_size
        self.lm.training(False)
        with torch.no_grad():
            for i in range(0, len(some), size):
                batch_loss(self.lm, some[i : i + size], TrainSection(loss="reverse_kl"), stats)
        self.lm.training(True)
        tokens = sum(len(e.target.ids) for e in some)
        # read by the student to write, by the teacher with its context to judge, by the student again to measure
        asked = [self.pairs[self.numbers[e.id]].teacher for e in own]
        begun = len(self._prefix.ids) if self._prefix else 0
        first = not any(line["student_rows"] for line in rounds(self.run))  # the start is read once for all rounds
        read = sum(
            len(e.prompt) + len(prompt) + 2 * len(e.target.ids) - 2 for e, prompt in zip(own, asked, strict=True)
        )
        read -= (len(own) - 1) * self.lm.shared([e.prompt for e in own]) + (len(own) - first) * begun
        read += forward_tokens(self.lm, some, TrainSection(), size)
        found |= {name: float(value) / tokens for name, value in stats.items()}
        return found | {
            "tokens": how.tokens, "ended": how.ended, "repeated": how.repeated, "forward_tokens": read,
        }  # fmt: skip


def share(step: int, steps: int, section: TrainSection) -> float:
    """The student's share of the completions in a round that begins at `step` of `steps`."""
    if section.on_policy_ramp == 0:
        return section.on_policy
    return section.on_policy * min(1.0, step / (section.on_policy_ramp * steps))


def overall(steps: int, per_epoch: int, section: TrainSection) -> float:
    """The student's share of the completions of all rounds."""
    length = section.round_steps or per_epoch
    firsts = range(0, steps, length)
    return sum(share(first, steps, section) * min(length, steps - first) for first in firsts) / steps


def chosen(n: int, number: int, share: float, seed: int) -> list[int]:
    """Which of the `n` places of a round get a completion of the student's, in their order: a share of them, drawn; where it
    is no whole number of places, one more or less, so that it is right over many rounds."""
    generator = torch.Generator().manual_seed(int(fingerprint(["places", seed, number])[:15], 16))
    places = torch.randperm(n, generator=generator)
    return sorted(places[: int(share * n + torch.rand((), generator=generator).item())].tolist())


def habits(completions: Sequence[tuple[int, ...]], prompter: Prompter) -> Habits:
    """Length, ends and repetition of completions."""
    return Habits(
        statistics.fmean(len(ids) for ids in completions),
        statistics.fmean(prompter.ends(list(ids)) for ids in completions),
        statistics.fmean(repeated(ids) for ids in completions),
    )


def repeated(ids: Sequence[int]) -> float:
    """Share of the pieces of `GRAM` tokens that occurred before."""
    pieces = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def rounds(run: RunDir) -> list[dict[str, Any]]:
    """The lines of the rounds so far."""
    return [line for line in run.lines("metrics.jsonl") if line["event"] == "round"]


def check(lines: Sequence[Mapping[str, Any]], teacher: Habits) -> None:
    """Raise `TrainError` when the last of the rounds shows that the student has collapsed.

    Each sign is judged against the teacher or against the first round, so that neither a task with one short, certain
    answer nor a base model that never ends looks like a collapse.
    """
    seen = [line for line in lines if line["student_rows"]]
    if len(seen) < 2 or seen[-1] is not lines[-1]:
        return
    first, last = seen[0], seen[-1]
    earlier = max(line["ended"] for line in seen[:-1])
    signs = {
        f"completions of {last['tokens']:.1f} tokens where the teacher's have {teacher.tokens:.1f}": (
            last["tokens"] < max(0.1 * teacher.tokens, min(1.5, 0.5 * teacher.tokens))
        ),
        f"no completion ends, where {earlier:.0%} did in an earlier round": last["ended"] == 0 and earlier >= 0.2,
        f"{last['repeated']:.0%} of the text repeats itself, of the teacher's {teacher.repeated:.0%}": (
            last["repeated"] > 0.5 + 0.5 * teacher.repeated
        ),
        f"KL(student || teacher) {last['reverse_kl']:.2f} nats per token, {first['reverse_kl']:.2f} in the first round": (
            last["reverse_kl"] > max(0.15, 3 * first["reverse_kl"]) or not math.isfinite(last["reverse_kl"])
        ),
    }
    if "teacher_entropy" in last:
        sign = f"entropy {last['student_entropy']:.4f} nats per token, the teacher's {last['teacher_entropy']:.4f}"
        signs[sign] = last["teacher_entropy"] > 0.05 and last["student_entropy"] < 0.02 * last["teacher_entropy"]
    if found := [sign for sign, there in signs.items() if there]:
        raise TrainError(
            f"the student has collapsed in round {last['round']} (from step {last['step']})",
            expected="completions that become more like the teacher's",
            found="; ".join(found),
            fix="lower train.lr; keep some completions of the teacher's (train.on_policy = 0.5, or train.on_policy_ramp = "
            '0.5); make rounds shorter (train.round_steps); train.loss = "jsd" or "forward_kl". What it wrote is in '
            f"rounds/{last['round']:05d}.jsonl of the run folder",
        )
