"""Keys and values that were computed before: those of a start that many prompts share, and those of rows that are being written.

In: key and value states. Out: caches of transformers. Invariants: what a `Prefix` holds is never changed; a row's cache equals the
one that transformers would have made of the same states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer with room at its end: a new token is written in place, where `DynamicLayer` copies the whole past
    for each. May start from a copy of a shared prefix, for models that cannot attend to the prefix itself."""

    room = 64

    def start(self, keys: torch.Tensor, values: torch.Tensor, batch: int) -> None:
        """Begin with a prefix [1, heads, P, head size] in each of `batch` rows."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, L, head size]; returns all keys and values so far, as views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.get_seq_length(), key_states.shape[-2]
        if not self.buffers or self.buffers[0].shape[-2] < past + new:
            buffers = []
            for old, state in ((self.keys, key_states), (self.values, value_states)):
                batch, heads, _, size = state.shape
                buffer = state.new_empty(batch, heads, past + new + self.room, size)
                if past:
                    buffer[:, :, :past] = old
                buffers.append(buffer)
            self.buffers = buffers
        for buffer, state in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, past : past + new] = state
        self.keys, self.values = (buffer[:, :, : past + new] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        super().batch_select_indices(indices)
        self.buffers = []  # the kept rows are new tensors


class FixedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer of full length: a new token is written where `at` says, a tensor, and all of it is given back, so what is not
    written yet must be masked. Each token is the same work, which a GPU can record."""

    def __init__(self, begun: RoomyLayer, room: int, at: torch.Tensor) -> None:
        """With what is in `begun`, and room for so many more tokens."""
        super().__init__()
        self.lazy_initialization(begun.keys, begun.values)
        self.at = at
        self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, room)) for x in (begun.keys, begun.values))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, heads, 1, head size]; returns all keys and values."""
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values


@dataclass(frozen=True)
class Prefix:
    """Token ids that many prompts start with, and their key-value cache: one [1, heads, P, head size] pair per layer."""

    ids: tuple[int, ...]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def cache(self, batch: int) -> DynamicCache:
        """A cache that a batch of `batch` rows may grow; the stored tensors stay as they are."""
        cache = DynamicCache()
        for keys, values in self.layers:
            layer = RoomyLayer()
            layer.start(keys, values, batch)
            cache.layers.append(layer)
        return cache
