"""Sequences that are longer than memory: items in a file, or made when they are asked for.

In: items, one after the other, or a function. Out: `Sequence`s that code reads as it reads a list. Invariants: an item comes
back equal to what was given; 8 bytes per item stay in memory, and nothing is written to disk before there is a megabyte.
"""

from __future__ import annotations

import json
import os
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from ctxdistill.errors import RunError

BUFFER = 2**20
"""Bytes that are written at a time."""
T = TypeVar("T")
Ids = tuple[int, ...]


class Lazy(Sequence[T]):
    """Items that are made by `make` from a number each time they are asked for; `numbers` (a range, an array) are those
    numbers, in order."""

    def __init__(self, numbers: Any, make: Callable[[int], T]) -> None:
        self.numbers, self.make = numbers, make

    @classmethod
    def over(cls, items: Sequence[Any], make: Callable[[Any], T]) -> Lazy[T]:
        """`make` of each of `items`."""
        return cls(range(len(items)), lambda i: make(items[i]))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self.make(int(number)) for number in self.numbers[place]]
        return self.make(int(self.numbers[place]))

    def __iter__(self) -> Iterator[T]:
        return (self.make(int(number)) for number in self.numbers)


class Spool(Sequence[T]):
    """Items in a file without a name, which is gone when the process ends; `TMPDIR` says where."""

    @abstractmethod
    def encode(self, item: T) -> bytes:
        """An item as bytes."""

    @abstractmethod
    def decode(self, raw: bytes) -> T:
        """The item that was encoded."""

    def __init__(self) -> None:
        self.ends = array("Q", [0])
        self.written = 0
        self.buffer = bytearray()
        self.file: Any = None

    def append(self, item: T) -> None:
        """Add an item at the end. Raises: `RunError` when the disk is full."""
        self.buffer += self.encode(item)
        self.ends.append(self.written + len(self.buffer))
        if len(self.buffer) > BUFFER:
            self._write()

    def _write(self) -> None:
        try:
            self.file = self.file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it lives as long as this)
            while self.buffer:
                done = self.file.write(self.buffer)
                self.written += done
                del self.buffer[:done]
        except OSError as error:
            raise RunError(
                f"cannot write rows to a temporary file in {tempfile.gettempdir()}: {error.strerror or error}",
                fix="free some space there, or name another folder in the environment variable TMPDIR",
            ) from None

    def extend(self, items: Iterable[T]) -> None:
        """Add items at the end."""
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self.item(i) for i in range(*place.indices(len(self)))]
        return self.item(range(len(self))[place])

    def item(self, number: int) -> T:
        """The item with a number from 0."""
        start, end = self.ends[number], self.ends[number + 1]
        if start >= self.written:
            return self.decode(bytes(self.buffer[start - self.written : end - self.written]))
        return self.decode(os.pread(self.file.fileno(), end - start, start))


class Records(Spool[tuple[str, dict[str, Any]]]):
    """(origin, columns) pairs as JSON; one that JSON does not give back as it was (a date, a NaN) stays in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.odd: dict[int, tuple[str, dict[str, Any]]] = {}

    def encode(self, item: tuple[str, dict[str, Any]]) -> bytes:
        return json.dumps(item).encode()

    def decode(self, raw: bytes) -> tuple[str, dict[str, Any]]:
        origin, fields = json.loads(raw)
        return origin, fields

    def append(self, item: tuple[str, dict[str, Any]]) -> None:
        """Add a record at the end."""
        try:
            same = self.decode(self.encode(item)) == item
        except (TypeError, ValueError):
            same = False
        if not same:
            self.odd[len(self)] = item
        super().append(item if same else ("", {}))

    def item(self, number: int) -> tuple[str, dict[str, Any]]:
        """The record with a number from 0."""
        return self.odd[number] if number in self.odd else super().item(number)


class IdPairs(Spool[tuple[Ids, Ids]]):
    """Pairs of token ids, 4 bytes each on the disk; what a first side begins with as that of the first pair is there once."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Ids = ()
        self.known = np.empty(0, dtype=np.int32)  # the same as an array

    def encode(self, item: tuple[Ids, Ids]) -> bytes:
        one, other = (np.array(ids, dtype=np.int32) for ids in item)
        if not len(self):
            self.first, self.known = item[0], one
        n = min(len(one), len(self.known))
        differing = np.flatnonzero(one[:n] != self.known[:n])
        shared = int(differing[0]) if len(differing) else n
        return np.concatenate([np.array([shared, len(other)], dtype=np.int32), other, one[shared:]]).tobytes()

    def decode(self, raw: bytes) -> tuple[Ids, Ids]:
        shared, n, *rest = np.frombuffer(raw, dtype=np.int32).tolist()
        return (*self.first[:shared], *rest[n:]), tuple(rest[:n])


def after(items: Sequence[T], skip: int) -> Sequence[T]:
    """The items but the first `skip`; a slice would be a list."""
    return Lazy(range(skip, len(items)), items.__getitem__) if skip else items


def joined(first: Sequence[T], second: Sequence[T]) -> Sequence[T]:
    """The items of both."""
    n = len(first)
    return Lazy(range(n + len(second)), lambda i: first[i] if i < n else second[i - n]) if len(second) else first
