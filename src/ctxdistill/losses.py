"""Divergences between a teacher's and a student's distributions over the vocabulary, as pure tensor functions.

In: logits, or the teacher's kept log-probabilities. Out: one value in nats per position, never reduced; the caller
owns masks and denominators. Invariants: the maths is done in log space and in at least fp32; equal inputs give exactly
0; a token that both sides exclude (-inf) contributes nothing; NaN in gives NaN out, and is never hidden.

Letters: P supervised positions, p positions of one chunk, V vocabulary, K kept tokens, d width of the hidden state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """A loss and what it computes."""

    name: str
    formula: str
    function: Callable[[Tensor, Tensor], Tensor]
    """(teacher's log-probabilities [..., V], student's [..., V]) -> [...]"""


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) from log-probabilities [..., V] -> [...]; infinite where b excludes what a allows."""
    nothing = log_a == -math.inf  # 0 log 0 = 0
    excluded = (log_b == -math.inf) & ~nothing
    gap = (log_a - log_b).masked_fill(nothing | excluded, 0.0)  # [..., V]
    # The infinite terms are put in after the product: their gradient is then 0 and not NaN.
    return (log_a.exp() * gap).masked_fill(excluded, math.inf).sum(-1)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_q, log_p)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence from log-probabilities [..., V] -> [...]."""
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    # The clamp is for infinite gaps only: beyond 100 the smaller side's mass is below e^-100.
    gap = (log_q - log_p).masked_fill(neither, 0.0).clamp(-100.0, 100.0)  # [..., V]
    return 0.5 * (-log_p.exp() * _log_mean_exp(gap) - log_q.exp() * _log_mean_exp(-gap)).sum(-1)


def _log_mean_exp(gap: Tensor) -> Tensor:
    """log((1 + e^gap) / 2): how far the mixture's log lies above the first side's. Exactly 0 at 0, never overflows."""
    return gap.relu() + torch.log1p(torch.expm1(-gap.abs()) / 2)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    if log_p.requires_grad:
        return _kl(log_p, log_q)
    return _ForwardKL.apply(log_p, log_q)  # type: ignore[no-any-return,no-untyped-call]


class _ForwardKL(torch.autograd.Function):
    """`_kl` for a fixed teacher in a third of the passes over memory, with its gradient by the formula."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        p = log_p.exp()  # [..., V]
        ctx.save_for_backward(p)
        return _expectation(p, log_p - log_q)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        (p,) = ctx.saved_tensors
        return None, p * -upstream[..., None]


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """sum_v p_v x_v, [..., V] -> [...], where an infinite or undefined x_v counts only if p_v is not 0."""
    # mostly there is nothing to mend; a CPU, on which mending takes longer than the rest, may look, a GPU would wait
    if x.device.type == "cpu":
        value: Tensor = torch.linalg.vecdot(p, x)
        if not value.isnan().any():
            return value
    value = torch.linalg.vecdot(p, x.masked_fill(p == 0, 0.0))
    return value


LOSSES: dict[str, Divergence] = {
    loss.name: loss
    for loss in (
        Divergence("forward_kl", "KL(teacher || student) = sum_v p_v (log p_v - log q_v)", _forward_kl),
        Divergence("reverse_kl", "KL(student || teacher) = sum_v q_v (log q_v - log p_v)", _reverse_kl),
        Divergence("jsd", "JSD = KL(teacher || m) / 2 + KL(student || m) / 2, m = (teacher + student) / 2", _jsd),
    )
}


def divergence(kind: str, teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence at each position, in nats, times temperature squared.

    Args:
        kind: a key of `LOSSES`.
        teacher_logits: [..., V], any float type; log-probabilities are logits, too.
        student_logits: the same shape.
        temperature: divides both sides' logits.

    Returns: [...], fp32 (fp64 for fp64 inputs), at least 0 up to rounding.

    Raises: `ValueError` for shapes that differ, `KeyError` for an unknown kind.
    """
    if teacher_logits.shape != student_logits.shape:
        shapes = f"teacher {tuple(teacher_logits.shape)}, student {tuple(student_logits.shape)}"
        raise ValueError(f"expected logits of the same shape, found {shapes}")
    return of_logprobs(
        kind, log_softmax(teacher_logits, temperature), log_softmax(student_logits, temperature), temperature
    )


def of_logprobs(kind: str, log_p: Tensor, log_q: Tensor, temperature: float = 1.0) -> Tensor:
    """`divergence`, from log-probabilities [..., V] of teacher and student that are softened already."""
    return LOSSES[kind].function(log_p, log_q) * temperature**2


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [..., V] in fp32 (fp64 for fp64 inputs)."""
    x = _at_least_fp32(logits)
    return (x if temperature == 1 else x / temperature).log_softmax(-1)


def topk_divergence(
    kind: str, teacher_topk_logprobs: Tensor, topk_ids: Tensor, student_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """Divergence over K kept tokens and one more bucket, the tail, that holds the mass of all others.

    A lower bound of the full divergence, equal to it for K >= V - 1.

    Args:
        kind: a key of `LOSSES`.
        teacher_topk_logprobs: [P, K], normalised over the whole vocabulary before selection.
        topk_ids: [P, K] int64, each id at most once in a row.
        student_logits: [P, V].

    Returns: [P], fp32.

    Raises: `ValueError` for a temperature other than 1: softening needs the tail's tokens one by one.
    """
    if temperature != 1:
        raise ValueError(
            f"top-k targets work at temperature 1 only, found {temperature}: the tail is one number, and cannot be "
            "softened without its single tokens; use targets.kind = 'hidden' or 'full'"
        )
    log_q = log_softmax(student_logits, 1.0)  # [P, V]
    log_p = _at_least_fp32(teacher_topk_logprobs)  # [P, K]
    kept = log_q.gather(-1, topk_ids)  # [P, K]
    if topk_ids.shape[-1] == log_q.shape[-1]:
        return LOSSES[kind].function(log_p, kept)
    # Summing the tail keeps its gradient where 1 - sum(kept) would round to 0.
    rest = log_q.scatter(-1, topk_ids, -math.inf)  # [P, V]
    log_q_tail = _logsumexp(rest)  # [P]
    log_p_tail = _log1mexp(log_p.logsumexp(-1))  # [P]
    # A teacher's tail below the resolution of fp32 is rounding, not knowledge: there it agrees with the student's.
    resolution = math.log(2 * torch.finfo(torch.float32).eps)
    unknown = log_q_tail.detach().clamp(max=resolution)
    log_p_tail = torch.where(log_p_tail < resolution, unknown, log_p_tail)
    teacher = torch.cat([log_p, log_p_tail[:, None]], -1)  # [P, K + 1]
    student = torch.cat([kept, log_q_tail[:, None]], -1)  # [P, K + 1]
    return LOSSES[kind].function(teacher, student)


def cross_entropy(logprobs: Tensor, ids: Tensor) -> Tensor:
    """-log q(ids), from log-probabilities [P, V] and ids [P] int64 -> [P]."""
    return -logprobs.gather(-1, ids[:, None])[:, 0]


def entropy(logprobs: Tensor) -> Tensor:
    """Entropy in nats at each position, from log-probabilities [..., V] -> [...], without a gradient."""
    with torch.no_grad():
        return -_expectation(logprobs.exp(), logprobs)


class Terms(NamedTuple):
    """What a step of training needs to know of each position, [P] each; the entropies are for the log and have no gradient."""

    divergence: Tensor
    cross_entropy: Tensor
    teacher_entropy: Tensor | None
    student_entropy: Tensor | None


def terms(
    kind: str, teacher: Tensor, student: Tensor, ids: Tensor, temperature: float = 1.0, *, log: bool = True
) -> Terms:
    """`divergence`, and at temperature 1 the student's `cross_entropy` and, for the log, both entropies.

    Args:
        kind: a key of `LOSSES`.
        teacher: logits [P, V], without a gradient; log-probabilities are logits, too. They may be written over.
        student: logits [P, V].
        ids: [P] int64.
    """
    if kind == "forward_kl" and temperature == 1:
        return Terms(*_ForwardKLTerms.apply(teacher, student, ids, log))  # type: ignore[no-untyped-call]
    log_p, log_q = log_softmax(teacher), log_softmax(student)  # [P, V]
    soft = of_logprobs(kind, log_p, log_q) if temperature == 1 else divergence(kind, log_p, student, temperature)
    entropies = (entropy(log_p), entropy(log_q)) if log else (None, None)
    return Terms(soft, cross_entropy(log_q, ids), *entropies)


CACHED = 2**19
"""Numbers of a tensor, 2 MB in fp32, of which a CPU's cache holds a few. An accelerator gets 64 times as many."""


class _ForwardKLTerms(torch.autograd.Function):
    """`terms` of forward KL in fewer passes again and half as much memory; some positions at a time, all passes over them while
    they are in a CPU's cache."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, ids: Tensor, log: bool) -> tuple[Tensor | None, ...]:
        """`teacher` is written over."""
        p = _at_least_fp32(teacher)  # [P, V]
        q = torch.empty_like(student, dtype=torch.promote_types(student.dtype, torch.float32))  # [P, V]
        found = []
        for some in _blocks(q):
            log_p, log_q = p[some].log_softmax(-1), log_softmax(student[some])
            torch.exp(log_p, out=p[some])
            torch.exp(log_q, out=q[some])
            entropies = [-_expectation(p[some], log_p), -_expectation(q[some], log_q)] if log else []
            ce = cross_entropy(log_q, ids[some])
            found.append([_expectation(p[some], log_p.sub_(log_q)), ce, *entropies])
        ctx.save_for_backward(p, q, ids)
        kl, ce, *entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.mark_non_differentiable(*entropies)
        return kl, ce, *(entropies or (None, None))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, for_kl: Tensor, for_ce: Tensor, *_: Any) -> tuple[None, Tensor, None, None]:
        """d KL / d logits = q - p, d CE / d logits = q - 1 at the id."""
        p, q, ids = ctx.saved_tensors
        for_kl, for_ce, ids = for_kl[:, None], for_ce[:, None], ids[:, None]
        gradient = torch.empty_like(q)  # [P, V]
        for some in _blocks(q):
            torch.mul(p[some], -for_kl[some], out=gradient[some]).addcmul_(q[some], (for_kl + for_ce)[some])
        gradient.scatter_(-1, ids, gradient.gather(-1, ids) - for_ce)
        return None, gradient, None, None


def _blocks(x: Tensor) -> list[slice]:
    """Positions of x [P, V] to be worked on at a time."""
    at_once = CACHED if x.device.type == "cpu" else 64 * CACHED
    return _slices(len(x), max(1, at_once // x.shape[-1])) or [slice(0)]


def chunked(fn: Callable[[Tensor, slice], Tensor], hidden: Tensor, *, chunk: int) -> tuple[Tensor, Tensor]:
    """Sum of a loss over positions, with the logits of only one chunk in memory at any time, backward pass included.

    Args:
        fn: (hidden states [p, d], their slice of 0..P) -> loss at each of them [p]. Called once per chunk. It may
            depend on no other tensor that needs a gradient (the head is frozen): such a gradient would be lost.
        hidden: [P, d].
        chunk: largest p.

    Returns: the sum, a scalar with the gradient for `hidden`, and the single values [P], detached.
    """
    if chunk < 1:
        raise ValueError(f"expected chunk >= 1, found {chunk}")
    if torch.is_grad_enabled() and hidden.requires_grad:
        total, values = _Chunked.apply(hidden, fn, chunk)  # type: ignore[no-untyped-call]
        return total, values
    with torch.no_grad():
        values = _cat([fn(hidden[where], where) for where in _slices(len(hidden), chunk)], hidden)
    return values.sum(), values


class _Chunked(torch.autograd.Function):
    """The gradient is taken chunk by chunk in the forward pass, so that no chunk's logits outlive it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, fn: Callable[[Tensor, slice], Tensor], chunk: int) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden)  # [P, d]
        values = []
        for where in _slices(len(hidden), chunk):
            with torch.enable_grad():
                part = hidden[where].detach().requires_grad_()  # [p, d]
                value = fn(part, where)  # [p]
                (gradient[where],) = torch.autograd.grad(value.sum(), part)
            values.append(value.detach())
            del value
        ctx.save_for_backward(gradient)
        single = _cat(values, hidden)
        ctx.mark_non_differentiable(single)
        return single.sum(), single

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None


def _slices(length: int, chunk: int) -> list[slice]:
    """Even pieces of at most `chunk`: a small last one would be slow."""
    size, longer = divmod(length, max(1, -(-length // chunk)))
    ends = [0]
    while ends[-1] < length:
        ends.append(ends[-1] + size + (len(ends) <= longer))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _cat(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(values) if values else like.new_zeros(0, dtype=torch.float32)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _logsumexp(x: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension whose gradient is 0, not NaN, for rows that are -inf throughout."""
    empty = (x == -math.inf).all(-1, keepdim=True)
    return x.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, without cancellation; a sum that rounding put above 0 counts as 0."""
    x = x.clamp(max=0.0)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
