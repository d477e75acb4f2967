"""What a step of training minimises: the divergence of the student from the teacher at the supervised positions of some rows.

In: rows with the teacher's targets, the model with its adapter on. Out: the sum of the loss over their positions, with a gradient,
and sums for the log. Invariants: only supervised positions are projected to the vocabulary, some at a time; sums stay on
the device, so that nothing waits for an accelerator.

Dimensions: P supervised positions, p of them at a time, V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ctxdistill import losses
from ctxdistill.lm import LM
from ctxdistill.prompts import join
from ctxdistill.recipe import TrainSection
from ctxdistill.store import Target


@dataclass(frozen=True)
class Example:
    """A row to learn from: the student's prompt and the teacher's target for one completion."""

    id: str
    prompt: tuple[int, ...]
    target: Target


LOGITS = 2**23
"""Logits of a chunk of the loss on a CPU, 32 MB in fp32: fewer rows would multiply with the head at a lower rate, more would take
memory. An accelerator gets 8 times as many."""
Stats = dict[str, torch.Tensor]
"""Sums over the positions of a step, by name."""


class Said(NamedTuple):
    """What is known of the supervised positions of some rows, one after the other."""

    teacher: dict[str, torch.Tensor]
    """[P, ...] by the names that `Target.tensors` has."""
    ids: torch.Tensor
    """[P]: the tokens of the completions."""
    counts: torch.Tensor | None = None
    """[P]: 1, and 0 for a position that is padding; None: there is none."""


def said(targets: Sequence[Target], device: torch.device) -> Said:
    """What `targets` say, in a row."""
    teacher = {name: torch.cat([t.tensors[name] for t in targets]).to(device) for name in targets[0].tensors}
    return Said(teacher, torch.tensor([i for t in targets for i in t.ids], device=device))


def position_loss(
    lm: LM, known: Said, section: TrainSection, stats: Stats | None = None
) -> Callable[[torch.Tensor, slice], torch.Tensor]:
    """The loss at each supervised position, as a function of the student's hidden states [p, d] there; `stats` collects
    sums over positions for the log."""
    kept, ids, counts = known
    soft = section.temperature

    def counted(values: torch.Tensor, where: slice) -> torch.Tensor:
        return values if counts is None else values * counts[where]

    def loss(hidden: torch.Tensor, where: slice) -> torch.Tensor:
        def note(name: str, values: torch.Tensor | None) -> None:
            if stats is not None and values is not None:
                add(stats, name, counted(values, where))

        if "topk_ids" in kept:
            logits, index = lm.head(hidden), kept["topk_ids"][where].long()  # [p, V], [p, K]
            student = losses.log_softmax(logits)  # [p, V]
            divergence = losses.topk_divergence(section.loss, kept["topk_logprobs"][where], index, student, soft)
            ce = losses.cross_entropy(student, ids[where])
            note("student_entropy", None if stats is None else losses.entropy(student))
        else:
            with torch.no_grad():  # a copy of what is kept, since it may be written over
                teacher = kept["logprobs"][where].clone() if "logprobs" in kept else lm.head(kept["hidden"][where])
            found = losses.terms(section.loss, teacher, lm.head(hidden), ids[where], soft, log=stats is not None)
            divergence, ce = found.divergence, found.cross_entropy
            note("teacher_entropy", found.teacher_entropy)
            note("student_entropy", found.student_entropy)
        # named by what it is: `kl` in the log is always KL(teacher || student)
        note("kl" if section.loss == "forward_kl" and soft == 1 else section.loss, divergence)
        if section.ce_weight == 0:
            return counted(divergence, where)
        note("ce", ce)
        return counted((1 - section.ce_weight) * divergence + section.ce_weight * ce, where)

    return loss


def add(stats: Stats, name: str, values: torch.Tensor) -> None:
    """Add to a sum that stays on the device: to read it in every chunk would make an accelerator wait."""
    total = values.detach().sum()
    stats[name] = stats[name] + total if name in stats else total


def batch_loss(lm: LM, batch: Sequence[Example], section: TrainSection, stats: Stats | None = None) -> torch.Tensor:
    """Sum of the loss over all supervised positions of `batch`, from one student forward."""
    known = said([e.target for e in batch], lm.device)  # before an accelerator is busy, for which copies would wait
    hidden = torch.cat(lm.hidden([join(e.prompt, e.target.ids) for e in batch]))  # [P, d]
    return total_loss(lm, hidden, known, section, stats)


def total_loss(
    lm: LM, hidden: torch.Tensor, known: Said, section: TrainSection, stats: Stats | None = None
) -> torch.Tensor:
    """Sum of the loss over positions with the student's hidden states [P, d]."""
    loss = position_loss(lm, known, section, stats)
    if lm.trains_head:  # its gradient needs all logits at once
        return loss(hidden, slice(None)).sum()
    at_once = LOGITS if lm.device.type == "cpu" else 8 * LOGITS
    chunk = max(16, at_once // lm.model.config.get_text_config().vocab_size)
    total, _ = losses.chunked(loss, hidden, chunk=chunk)
    return total
