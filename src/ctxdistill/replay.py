"""A step's forward and backward pass with fixed sizes, which a GPU records once and replays with other rows.

In: rows to learn from. Out: the sum of their loss and the gradient that `objective.batch_loss` gives. Invariants: padding is seen by
no row, counts for nothing and gets no gradient; whether a step is replayed depends on the rows and the seed alone, so a
resumed run has the same bits (`tests/test_replay.py`, `tests/test_cuda.py`).

Dimensions: R rows, L longest row, S tokens of the sequence, P supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from ctxdistill.graphs import recorded
from ctxdistill.lm import LM, PAD, WORTH_SHARING, common_prefix
from ctxdistill.objective import Example, Said, Stats, add, said, total_loss
from ctxdistill.packing import Pack
from ctxdistill.prompts import join
from ctxdistill.recipe import TrainSection

WASTE = 0.5
"""Of the tokens of a step, the part that may be padding: then small steps gain much and large ones lose little."""
ROUND = 32
"""Sizes are multiples of this."""


Gradients = list[torch.Tensor | None]
"""Of the trained weights, in their order."""


class Sizes(NamedTuple):
    """How much room rows take, behind what all rows start with."""

    rows: int
    tokens: int
    longest: int
    supervised: int


class Replay:
    """The pass for rows of at most some `sizes`, which all begin with `start`."""

    def __init__(
        self, lm: LM, section: TrainSection, start: Sequence[int], sizes: Sizes, like: Example, log: bool
    ) -> None:
        """`like`: a row whose target has the tensors that all have; `log`: whether there are sums for the log."""
        self.lm, self.section, self.start, self.sizes, self.log = lm, section, list(start), sizes, log
        self.parameters = list(lm.trainable().values())
        self.run: Callable[[], tuple[torch.Tensor, Stats, Gradients]] | None = None
        self.own: dict[torch.nn.Parameter, torch.Tensor] = {}

        def room(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=lm.device)

        behind, p = sizes.tokens + 1, sizes.supervised  # at least one token is padding
        total = len(start) + behind
        self.pack = Pack(
            ids=room(1, total), positions=room(1, total), where=[], rows=room(sizes.rows + 1, sizes.longest),
            back=room(behind), start=len(start), cached=None, hidden=None,
        )  # fmt: skip
        teacher = {name: room(p, *x.shape[1:], dtype=x.dtype) for name, x in like.target.tensors.items()}
        self.known = Said(teacher, room(p), room(p, dtype=torch.float32))
        self.where, self.scale = room(p), room(1, dtype=torch.float32)

    @classmethod
    def of(cls, lm: LM, batches: Iterable[Sequence[Example]], section: TrainSection, *, log: bool) -> Replay | None:
        """For steps that are like `batches`; None, where a step cannot be recorded or would be padding for the most part."""
        fixed = lm.can_pack and not lm.model.is_activation_checkpointing and not lm.trains_head and not lm.cartridge()
        noisy = any(getattr(m, "p", 0) > 0 for m in lm.model.modules() if isinstance(m, torch.nn.Dropout))
        if not fixed or noisy:
            return None
        like, rows = None, []
        for batch in batches:  # what the teacher said of so many rows would be gigabytes
            like = like or batch[0]
            rows.append([join(e.prompt, e.target.ids) for e in batch])
        if like is None:
            return None
        start = common_prefix([ids[: len(ids) - n] for batch in rows for ids, n in batch])
        if WORTH_SHARING * len(start) < max(len(ids) for batch in rows for ids, _ in batch):
            start = []
        found = [measured(batch, len(start)) for batch in rows]
        most = Sizes(*(max(column) for column in zip(*found, strict=True)))
        sizes = Sizes(most.rows, *(-(-n // ROUND) * ROUND for n in most[1:]))
        if sum(each.tokens for each in found) < (1 - WASTE) * most.tokens * len(found):
            return None
        return cls(lm, section, start, sizes, like, log)

    def fits(self, batch: Sequence[Example]) -> bool:
        """Whether the rows have the room and the start."""
        n = len(self.start)
        if any(list(e.prompt[:n]) != self.start or len(e.prompt) <= n for e in batch):
            return False
        needed = measured([join(e.prompt, e.target.ids) for e in batch], n)
        return all(a <= b for a, b in zip(needed, self.sizes, strict=True))

    def __call__(self, batch: Sequence[Example], divisor: float, stats: Stats | None) -> torch.Tensor:
        """Add the gradient of the loss of `batch` over `divisor` to that of the trained weights; returns the loss.

        Raises: RuntimeError the first time, for a model that cannot be recorded; then the gradient is as it was.
        """
        self._fill(batch, divisor)
        before = [p.grad for p in self.parameters]
        try:
            self.run = self.run or recorded(self._work, self.lm.device)
            loss, sums, found = self.run()
        finally:
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient
        self._add(found)
        for name, value in sums.items() if stats is not None else ():
            add(stats, name, value)  # type: ignore[arg-type]
        return loss.clone()

    def _add(self, found: Gradients) -> None:
        """What a pass found goes to the weights' gradients in memory of their own: the next pass writes where this one did."""
        some = [(p, g) for p, g in zip(self.parameters, found, strict=True) if g is not None]
        fresh = [(p, g) for p, g in some if p.grad is None]
        more = [(p.grad, g) for p, g in some if p.grad is not None]
        own = [self.own[p] if p in self.own else torch.empty_like(g) for p, g in fresh]
        if fresh:
            torch._foreach_copy_(own, [g for _, g in fresh])
        for (parameter, _), gradient in zip(fresh, own, strict=True):
            parameter.grad = self.own[parameter] = gradient
        if more:
            torch._foreach_add_(*map(list, zip(*more, strict=True)))

    def _fill(self, batch: Sequence[Example], divisor: float) -> None:
        """Put the rows where the work reads them."""
        rows = [join(e.prompt, e.target.ids) for e in batch]
        n, p = len(self.start), self.pack
        behind, (most, longest) = len(p.back), p.rows.shape
        ids, positions, where = list(self.start), list(range(n)), list[int]()
        table, back = list[list[int]](), list[int]()
        for row, (whole, supervised) in enumerate(rows):
            body, first = whole[n:-1], len(ids)
            ids += body
            positions += range(n, n + len(body))
            where += range(len(ids) - supervised, len(ids))
            table.append([first + min(i, len(body) - 1) for i in range(longest)])
            back += range(row * longest, row * longest + len(body))
        padding, last = n + behind - len(ids), n + behind - 1  # the last token is always padding
        table += [[last] * longest] * (most - len(table))
        known = said([e.target for e in batch], self.lm.device)
        count = len(where)
        for buffer, values in (
            (p.ids[0], ids + [PAD] * padding), (p.positions[0], positions + [0] * padding), (p.rows, table),
            (p.back, back + [(most - 1) * longest] * padding), (self.where, where + [last] * (len(self.where) - count)),
        ):  # fmt: skip
            buffer.copy_(torch.tensor(values))
        both = [(self.known.ids, known.ids), *((self.known.teacher[k], v) for k, v in known.teacher.items())]
        for buffer, found in both:
            buffer[:count] = found
            buffer[count:] = found[-1]  # anything that gives a finite loss
        assert self.known.counts is not None
        self.known.counts.zero_()
        self.known.counts[:count] = 1
        self.scale.fill_(1 / divisor)

    def _work(self) -> tuple[torch.Tensor, Stats, Gradients]:
        for parameter in self.parameters:
            parameter.grad = None
        stats = Stats()
        # unlike indexing, its gradient need not sort: what equal indices get is 0
        hidden = self.lm.states(self.pack).index_select(0, self.where)  # [P, d]
        loss = total_loss(self.lm, hidden, self.known, self.section, stats if self.log else None) * self.scale[0]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), stats, [parameter.grad for parameter in self.parameters]


def measured(rows: Sequence[tuple[Sequence[int], int]], start: int) -> Sizes:
    """The room that (ids, supervised ones at their end) take behind a start of so many tokens; a row's last token predicts nothing."""
    bodies = [len(ids) - start - 1 for ids, _ in rows]
    return Sizes(len(rows), sum(bodies), max(bodies), sum(n for _, n in rows))
