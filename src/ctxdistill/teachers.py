"""What frozen models say with one context or many, put right and averaged, as targets for a student.

In: `Reading`s, the label scores of N rows under each of K contexts. Out: a `Target` per row, the mixture of what was said.
Invariants: the mixture is exact, also for labels of several tokens; calibration moves the shares of the labels and not
their mass.

Dimensions: N rows, L labels, K contexts, T positions of an answer, V vocabulary, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ctxdistill.errors import DataError
from ctxdistill.lm import LM
from ctxdistill.prompts import Prompter, join
from ctxdistill.store import Target
from ctxdistill.targets import LabelScores, point_mass

Prompts = list[tuple[int, ...]]


class Calibration(NamedTuple):
    """Label probabilities are put right as softmax(scale * log p + bias)."""

    scale: float
    bias: torch.Tensor
    """[L]"""


@dataclass(frozen=True)
class Reading:
    """What a frozen model says on N rows with one context."""

    prompter: Prompter
    prompts: Prompts
    scores: LabelScores
    calibration: Calibration | None = None

    def shares(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Labels' log-probabilities [..., L], calibrated if asked for: the mass of all stays, the shares change."""
        if self.calibration is None:
            return logprobs
        scale, bias = self.calibration
        return (scale * logprobs.log_softmax(-1) + bias).log_softmax(-1) + logprobs.logsumexp(-1, keepdim=True)

    @property
    def answers(self) -> torch.Tensor:
        """Log-probability of each label, [N, L], calibrated if asked for."""
        return self.shares(self.scores.logprobs)

    def calibrated(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities at the first answer position, [V], with the labels' shares calibrated if asked for (exact
        for labels of one token, as calibration is of whole labels)."""
        if self.calibration is None:
            return logprobs
        ids = torch.tensor([label[0] for label in self.prompter.labels.values()])  # [L]
        if len(set(ids.tolist())) < len(ids):
            raise DataError(
                "label words share their first token, so that a calibrated teacher cannot be taught",
                expected="label words that differ in the first token",
                fix="leave the calibrated arms out for this task",
            )
        return logprobs.index_copy(0, ids, self.shares(logprobs[ids]))


def fitted(logprobs: torch.Tensor, labels: torch.Tensor) -> Calibration:
    """Scale and bias by maximum likelihood on M labelled rows (Platt scaling for several classes: one slope, a bias for
    each label), drawn towards no change by a standard normal prior on log scale and biases.

    Args:
        logprobs: [M, L].
        labels: index of the true label, [M].
    """
    given = logprobs.log_softmax(1)
    weights = torch.zeros(1 + given.shape[1], requires_grad=True)  # log scale, biases
    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        solver.zero_grad()
        scores = weights[0].exp() * given + weights[1:]
        value = torch.nn.functional.cross_entropy(scores, labels, reduction="sum") + 0.5 * weights.square().sum()
        torch.autograd.backward([value])
        return value.item()

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    found = weights.detach()
    return Calibration(float(found[0].exp()), found[1:])


def teach(
    readings: Sequence[Reading], lm: LM, *, soft: bool, batch_size: int, label_weight: float = 0.0
) -> list[Target]:
    """The teacher's targets on N queries, averaged over K contexts: the mixture of its distributions.

    `label_weight` is the part of the first position's target in which the label words share all probability: the gradient
    is then (1 - w) times that of the KL over the vocabulary + w times that of the KL to the labels' shares.

    The answer that is taught is the label that the mixture prefers. At a later position of that label each context counts
    by how probable it found the label so far, which is what the mixture's own conditional distribution is.
    """
    k = len(readings)
    labels = list(readings[0].prompter.labels.values())
    chosen = average([r.answers for r in readings]).argmax(1).tolist()  # N
    if not soft:
        size = lm.model.get_output_embeddings().weight.shape[0]
        return [point_mass(labels[i], size) for i in chosen]
    later = [later_positions(r, lm, [labels[i] for i in chosen], batch_size) for r in readings]
    targets = []
    for n, choice in enumerate(chosen):  # one query at a time: K T V numbers in memory
        ids = labels[choice]
        hidden = torch.stack(
            [torch.cat([r.scores.first[n][None], rest[n]]) for r, rest in zip(readings, later, strict=True)]
        )  # [K, T, d]
        with torch.no_grad():
            each = lm.head(hidden.to(lm.device)).log_softmax(-1).cpu()  # [K, T, V]
        each[:, 0] = torch.stack([r.calibrated(first) for r, first in zip(readings, each[:, 0], strict=True)])
        said = each[:, range(len(ids)), ids]  # [K, T]
        before = torch.cat([torch.zeros(k, 1), said.cumsum(1)[:, :-1]], 1)  # [K, T]: log p(the answer so far | context)
        mixed = (each + before.log_softmax(0)[:, :, None]).logsumexp(0)  # [T, V]
        mixed[0] = focused(mixed[0], [label[0] for label in labels], label_weight)
        targets.append(Target("", ids, {"logprobs": mixed}))
    return targets


def focused(logprobs: torch.Tensor, tokens: Sequence[int], weight: float) -> torch.Tensor:
    """`weight` parts of the distribution [V] restricted to `tokens`, and the rest of it as it is; log-probabilities."""
    if weight == 0:
        return logprobs
    ids = torch.tensor(sorted(set(tokens)))
    restricted = torch.full_like(logprobs, -torch.inf).index_copy(0, ids, logprobs[ids].log_softmax(0))
    whole = torch.tensor(weight)
    return torch.logaddexp(logprobs + torch.log1p(-whole), restricted + whole.log())


def later_positions(
    reading: Reading, lm: LM, answers: Sequence[tuple[int, ...]], batch_size: int
) -> list[torch.Tensor]:
    """Final hidden states after the first token of each answer: N of [T - 1, d], empty for answers of one token."""
    found = [reading.scores.first[:0]] * len(answers)
    rows = [n for n, ids in enumerate(answers) if len(ids) > 1]
    with torch.no_grad(), lm.adapter(False):
        prefix = lm.prefix(reading.prompts) if rows else None
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            hidden = lm.hidden([join(reading.prompts[n], answers[n]) for n in some], prefix)
            for n, h in zip(some, hidden, strict=True):
                found[n] = h[1:].cpu()
    return found


def average(logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of K distributions given as log-probabilities of one shape."""
    return torch.stack(list(logprobs)).logsumexp(0) - math.log(len(logprobs))
