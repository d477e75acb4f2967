"""Rows that write, one token each at a time.

In: the prompts of some rows, behind a start that they may share. Out: the state after each row's last token, from which the next
one is chosen. Invariants: a row sees the shared start and itself; nothing is read twice. `Growing` has caches that grow
with the rows and forgets a row at once; `Fixed` goes on from there with caches of full length, so that a GPU can
record one token and replay it (`graphs`).

Dimensions: B rows, L tokens of the longest so far, M new ones, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ctxdistill.caches import FixedLayer, RoomyLayer
from ctxdistill.graphs import recorded
from ctxdistill.packing import Behind, Layers

Forward = Callable[..., torch.Tensor]
"""(ids [B, M], positions [B, M], cache, mask or None, `Behind` or None) -> states of the last tokens [B, d]."""


class Growing:
    """Rows whose caches grow.

    Args:
        bodies: ids of each row behind the start.
        start: tokens of the shared start.
        shared: its keys and values, where the model can attend to them itself; else the cache has a copy for each row, which
            `cache` begins with.
        pad: id of padding, which comes before a row.
    """

    def __init__(
        self,
        forward: Forward,
        bodies: Sequence[Sequence[int]],
        cache: DynamicCache,
        device: torch.device,
        *,
        start: int,
        shared: Layers | None,
        pad: int,
    ) -> None:
        length = max(map(len, bodies))
        self.forward, self.cache, self.start, self.shared = forward, cache, start, shared
        self.ids = torch.tensor([[pad] * (length - len(b)) + [*b] for b in bodies], device=device)  # [B, M]
        self.mask = torch.tensor([[0] * (length - len(b)) + [1] * len(b) for b in bodies], device=device)  # [B, L]
        self.positions = start + (self.mask.cumsum(1) - 1).clamp(min=0)  # [B, M]
        self.sharable = all(type(layer) is RoomyLayer for layer in cache.layers)

    def read(self) -> torch.Tensor:
        """States after the tokens that were added last, [B, d]."""
        new, length = self.ids.shape[1], self.mask.shape[1]
        if self.shared is None:
            seen = self.mask
            if self.start:
                seen = torch.cat([seen.new_ones(len(seen), self.start), seen], 1)
            return self.forward(self.ids, self.positions, self.cache, seen, None)
        later = torch.ones(new, length, dtype=torch.bool, device=self.mask.device).triu(length - new + 1)  # [M, L]
        hidden = (self.mask == 0)[:, None] | later  # [B, M, L]
        return self.forward(self.ids, self.positions, self.cache, None, Behind(self.shared, hidden[None, :, None]))

    def keep(self, rows: Sequence[int]) -> bool:
        """Forget all rows but these; False, where that cannot be done."""
        if self.sharable and len(rows) < len(self.mask):
            index = torch.tensor(rows, device=self.mask.device)
            self.cache.batch_select_indices(index)
            self.mask, self.positions = self.mask[index], self.positions[index]
        return self.sharable

    def write(self, chosen: Sequence[int]) -> torch.Tensor:
        """Add a token to each row; states after them."""
        self.ids = torch.tensor(chosen, device=self.mask.device)[:, None]  # [B, 1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.positions = self.positions[:, -1:] + 1
        return self.read()


class Fixed:
    """Rows that `Growing` has begun, with room for `room` more tokens each."""

    def __init__(self, begun: Growing, config: Any, room: int) -> None:
        rows, length = begun.mask.shape
        device = begun.mask.device
        self.forward, self.device = begun.forward, device
        self.at = torch.tensor([length], device=device)  # where the next token of all rows goes
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = begun.positions[:, -1:].clone()
        self.hidden = torch.ones(1, rows, 1, 1, length + room, dtype=torch.bool, device=device)
        self.hidden[0, :, 0, 0, :length] = begun.mask == 0
        self.cache = DynamicCache(config=config)
        self.cache.layers = [FixedLayer(layer, room, self.at) for layer in begun.cache.layers]
        self.shared: Layers = begun.shared or tuple((nothing(x.keys), nothing(x.values)) for x in begun.cache.layers)
        self.run: Callable[[], torch.Tensor] | None = None

    def keep(self, rows: Sequence[int]) -> bool:
        """Forget all rows but these, which is recorded anew, once half of them are done; False before."""
        if 2 * len(rows) > len(self.ids):
            return False
        index = torch.tensor(rows, device=self.device)
        self.ids, self.positions, self.hidden = self.ids[index], self.positions[index], self.hidden[:, index]
        self.cache.batch_select_indices(index)
        self.run = None
        return True

    def write(self, chosen: Sequence[int]) -> torch.Tensor:
        """Add a token to each row; states after them. Raises: RuntimeError the first time, for a model that cannot be recorded."""
        self.ids.copy_(torch.tensor(chosen)[:, None])
        self.positions += 1
        self.run = self.run or recorded(self._work, self.device)
        last = self.run().clone()
        self.at += 1
        return last

    def _work(self) -> torch.Tensor:
        self.hidden.index_fill_(4, self.at, False)
        return self.forward(self.ids, self.positions, self.cache, None, Behind(self.shared, self.hidden))


def nothing(states: torch.Tensor) -> torch.Tensor:
    """A start of no tokens, [1, heads, 0, size], that does not hold on to the memory of `states` as a slice would."""
    return states.new_empty(1, states.shape[1], 0, states.shape[3])
