"""The target store: what is kept of the teacher, a shard for each labelled batch.

In: targets, one batch at a time. Out: targets by key, read from the disk row by row. Invariants: a folder is only added to
while teachers are asked, by any number of processes; a shard that the index names is whole, and its checksum is compared
before anything of it is used; a key covers everything that its target depends on; 28 bytes per key stay in memory.

A shard is a safetensors file with the rows of a batch behind each other: `ids` [S] and what is kept at each of the S
positions. `index.jsonl` has a line for each shard: its name, checksum and size, and key and length of each row.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from ctxdistill import files
from ctxdistill.errors import RunError
from ctxdistill.recipe import Recipe
from ctxdistill.rundir import disk_error, fingerprint, write_atomic

INDEX, LOCK, USED = "index.jsonl", ".lock", "targets_used.txt"
RECENT = 4096
"""New keys that are collected before they are put in order among the others."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32,
}  # fmt: skip
"""What a shard can hold, by the format's names."""
Keys = np.ndarray[Any, Any]
"""Keys as 16 bytes each, [N]."""


@dataclass(frozen=True)
class Target:
    """What the student learns from one completion."""

    key: str
    ids: tuple[int, ...]
    """Completion ids, the same on both sides."""
    tensors: Mapping[str, torch.Tensor]
    """`hidden` [T, d]; or `logprobs` [T, V]; or `topk_logprobs` and `topk_ids` [T, K]. Read when it is asked for."""


class Shard(NamedTuple):
    """A line of the index."""

    shard: str
    """File name."""
    sha256: str
    bytes: int
    tensors: list[str]
    """Names, but for `ids`."""
    keys: list[str]
    """32 hex digits for each row."""
    lengths: list[int]
    """Supervised tokens of each row; 0 for a completion in which no answer was found."""


class Place(NamedTuple):
    """Where a row is."""

    shard: int
    start: int
    length: int


def packed(keys: Iterable[str]) -> Keys:
    """Hex digits as `Keys`."""
    return np.frombuffer(b"".join(map(bytes.fromhex, keys)), dtype="S16")


class KeyTable:
    """Key -> `Place`, 28 bytes for each. A later entry of a key replaces an earlier one."""

    def __init__(self) -> None:
        self.keys: Keys = np.empty(0, dtype="S16")  # in order
        self.places = np.empty((0, 3), dtype=np.int32)  # [N, 3]
        self.recent: dict[bytes, Place] = {}

    def __len__(self) -> int:
        return len(self.all())

    def all(self) -> Keys:
        """All keys, in order."""
        self._settle()
        return self.keys

    def add(self, number: int, shard: Shard) -> None:
        start = 0
        for key, length in zip(shard.keys, shard.lengths, strict=True):
            self.recent[bytes.fromhex(key)] = Place(number, start, length)
            start += length
        if len(self.recent) > max(RECENT, len(self.keys) // 16):
            self._settle()

    def find(self, key: str) -> Place | None:
        raw = bytes.fromhex(key)
        if raw in self.recent:
            return self.recent[raw]
        wanted = np.array(raw, dtype="S16")
        i = int(np.searchsorted(self.keys, wanted))
        return Place(*self.places[i].tolist()) if i < len(self.keys) and self.keys[i] == wanted else None

    def _settle(self) -> None:
        if self.recent:
            both = np.concatenate([np.frombuffer(b"".join(self.recent), dtype="S16"), self.keys])
            places = np.concatenate([np.array(list(self.recent.values()), dtype=np.int32), self.places])  # [N, 3]
            self.keys, first = np.unique(both, return_index=True)  # of the same keys the first, which is the newest
            self.places = places[first]
            self.recent.clear()


class TargetStore:
    """A folder of shards.

    Args:
        used: where to write down which keys were asked for, for `prune`.

    Raises (at construction): `RunError` for an index that is damaged or of an earlier version; (when a row is read)
    `RunError` naming a shard that is missing or whose bytes have changed.
    """

    def __init__(self, folder: Path, used: Path | None = None) -> None:
        self.folder, self.used = folder, used
        self.shards: list[Shard] = []
        self.table = KeyTable()
        self.verified: set[int] = set()
        self.opened: tuple[int, ShardFile] | None = None
        self.lock: Any = None
        if folder.is_dir():
            self._lock()
        for shard in read_index(folder):
            self._know(shard)

    @classmethod
    def of(cls, recipe: Recipe, run: Path) -> TargetStore:
        """The store of a run."""
        return cls(recipe.path(recipe.targets.dir) if recipe.targets.dir else run / "targets", run / USED)

    def _know(self, shard: Shard) -> None:
        self.table.add(len(self.shards), shard)
        self.shards.append(shard._replace(keys=[], lengths=[]))  # the table has them

    def _lock(self) -> None:
        """Keep `prune` away for as long as this object lives."""
        if self.lock is None:
            self.lock = locked(self.folder, exclusive=False)

    def __contains__(self, key: str) -> bool:
        return self.table.find(key) is not None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: str) -> Target:
        place = self.table.find(key)
        if place is None:
            raise KeyError(key)
        if not place.length:
            return Target(key, (), {})
        ids = tuple(self.read(place, "ids").tolist())
        return Target(key, ids, Stored(self, place))

    def read(self, place: Place, name: str) -> torch.Tensor:
        """The rows of a tensor that belong to a key, [T, ...]."""
        shard = self.shards[place.shard]
        try:
            if self.opened is None or self.opened[0] != place.shard:
                self.opened = None
                if place.shard not in self.verified:
                    check_shard(self.folder, shard)
                    self.verified.add(place.shard)
                self.opened = (place.shard, ShardFile(self.folder / shard.shard, shard.bytes))
            return self.opened[1].rows(name, place)
        except (OSError, ValueError, LookupError, TypeError) as error:  # whole, and yet not what the index says
            raise RunError(
                f"{self.folder / shard.shard} does not hold what {INDEX} says: {error}",
                fix=f"delete {self.folder}; the targets will be made again",
            ) from None

    def add(self, targets: Sequence[Target]) -> None:
        """Write one shard of targets of one kind, then its line of the index; a kill in between leaves a shard that
        nothing names."""
        self.adopt(*packed_shard(targets))

    def adopt(self, shard: Shard, raw: bytes) -> None:
        """Take a shard that was made elsewhere."""
        with contextlib.suppress(OSError):  # what is wrong with the folder shows when the shard is written
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
        write_atomic(self.folder / shard.shard, raw)
        append_line(self.folder / INDEX, line_of(shard))
        self._know(shard)

    def note_used(self, keys: Keys) -> None:
        """Add to the file of the keys that the run needs."""
        if self.used is not None:
            known = used_keys(self.used)
            every = np.unique(np.concatenate([keys, packed(()) if known is None else known]))
            if known is None or len(every) > len(known):
                write_atomic(self.used, every.tobytes().hex("\n", 16) + "\n")


class ShardFile:
    """A shard of which single rows are read. (The reader of safetensors keeps 28 bytes for every tensor or slice that it has
    given out, as of 0.8.0; with rows in random order that is memory for each row of each epoch.)

    Raises: OSError, ValueError, LookupError or TypeError for what is no safetensors file.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.file = files.open_regular(path)
        head = int.from_bytes(self.file.read(8), "little")
        self.data = 8 + head
        if self.data > size:
            raise ValueError(f"a header of {head:,} bytes in {size:,}")
        self.header = files.parse_json(self.file.read(head).decode())

    def rows(self, name: str, place: Place) -> torch.Tensor:
        """The rows of a tensor at a place, [T, ...]."""
        about = self.header[name]
        dtype, (count, *shape), (first, end) = DTYPES[about["dtype"]], about["shape"], about["data_offsets"]
        width = math.prod(shape) * dtype.itemsize
        if place.start + place.length > count or end - first != count * width:
            raise ValueError(
                f"{count:,} rows of {name} in {end - first:,} bytes, asked for {place.length} from {place.start}"
            )
        found = torch.empty(place.length, *shape, dtype=dtype)
        into = memoryview(found.view(-1).view(torch.uint8).numpy().data)
        if os.preadv(self.file.fileno(), [into], self.data + first + place.start * width) != len(into):
            raise ValueError(f"{name} is cut off")
        return found


class Stored(Mapping[str, torch.Tensor]):
    """The tensors of a row, read each time."""

    def __init__(self, store: TargetStore, place: Place) -> None:
        self.store, self.place = store, place

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.store.shards[self.place.shard].tensors:
            raise KeyError(name)
        return self.store.read(self.place, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.store.shards[self.place.shard].tensors)

    def __len__(self) -> int:
        return len(self.store.shards[self.place.shard].tensors)


# -- files ------------------------------------------------------------------------------------------------------------


def packed_shard(targets: Sequence[Target]) -> tuple[Shard, bytes]:
    """A shard and its bytes. Targets without ids hold nothing else."""
    full = [t for t in targets if t.ids]
    names = list(full[0].tensors) if full else []
    tensors = {name: torch.cat([t.tensors[name] for t in full]).contiguous() for name in names}
    tensors["ids"] = torch.tensor([i for t in full for i in t.ids], dtype=torch.int32)
    raw = save(tensors)
    keys, lengths = [t.key for t in targets], [len(t.ids) for t in targets]
    sha256 = hashlib.sha256(raw).hexdigest()
    # of the same keys two processes may make other bits, and neither may replace the other's
    name = f"{fingerprint([keys, sha256])}.safetensors"
    return Shard(name, sha256, len(raw), names, keys, lengths), raw


def read_index(folder: Path, *, skip_damaged: bool = False) -> Iterator[Shard]:
    """The shards of a folder; a last line that a kill cut off is dropped.

    Raises: `RunError` for a damaged line (unless `skip_damaged`), or for the index of an earlier version.
    """
    if (folder / "index.json").is_file() and not (folder / INDEX).is_file():
        raise RunError(
            f"{folder} was written by an earlier version",
            expected=f"{INDEX} in it",
            found="index.json",
            fix=f"delete {folder}; the targets will be made again",
        )
    if not (folder / INDEX).is_file():
        return
    with files.open_regular(folder / INDEX) as file:
        for number in itertools.count(1):
            line = file.readline(files.MAX_LINE)
            if not line.endswith(b"\n") and len(line) < files.MAX_LINE:
                return
            try:
                yield shard_of(line)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                if not skip_damaged:
                    raise RunError(
                        f"{folder / INDEX}:{number} is damaged: {str(error)[:80]}",
                        fix=f"ctxdistill targets prune {folder} drops the line; its rows will be made again",
                    ) from None


def shard_of(line: bytes) -> Shard:
    """What `line_of` wrote. Raises an error for a line that it has not written, or that names a file elsewhere."""
    found = files.parse_json(line.decode())
    if not isinstance(found, dict) or found.pop("check") != fingerprint(found):
        raise ValueError("its checksum is another")
    shard = Shard(**found)
    lengths = np.array(shard.lengths)
    shapely = lengths.dtype.kind == "i" and lengths.shape == (len(shard.keys),) and lengths.min(initial=0) >= 0
    named = Path(shard.shard).name == shard.shard and all(isinstance(t, str) for t in [shard.sha256, *shard.tensors])
    if not shapely or not named or lengths.sum() >= 2**31 or len(packed(shard.keys)) != len(shard.keys):
        raise ValueError("not the line of a shard")
    return shard


def check_shard(folder: Path, shard: Shard) -> None:
    """Raises `RunError` naming a shard that is missing, or whose bytes have changed."""
    if found := damage(folder, shard):
        raise RunError(
            f"the target shard {folder / shard.shard} is damaged",
            expected=f"sha256 {shard.sha256}",
            found=found,
            fix=f"ctxdistill targets prune {folder} drops it; its rows will be made again with --resume",
        )


def damage(folder: Path, shard: Shard) -> str:
    """What is there in the place of a shard; empty when it is whole."""
    try:
        with files.open_regular(folder / shard.shard) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error.strerror or str(error)
    return f"sha256 {found}" if found != shard.sha256 else ""


def line_of(shard: Shard) -> bytes:
    """A shard's line of the index, with a checksum of its own."""
    found = shard._asdict()
    return json.dumps({**found, "check": fingerprint(found)}).encode() + b"\n"


def append_line(path: Path, line: bytes) -> None:
    """Add a line, whole, while others may do the same; what a kill has left of a line is cut off first."""
    try:
        with open(path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
            file.flush()
    except OSError as error:
        raise disk_error(path, error, len(line)) from None


def locked(folder: Path, *, exclusive: bool) -> Any:
    """An open file that holds the folder's lock. Raises: `RunError` when others hold it in a way that excludes this."""
    try:
        file = open(folder / LOCK, "ab")  # noqa: SIM115 (the lock lasts until it is closed)
    except OSError as error:
        if exclusive:
            raise disk_error(folder / LOCK, error) from None
        return contextlib.nullcontext()  # a folder that cannot be written cannot be pruned either
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        file.close()
        doing = "in use by a run" if exclusive else "being pruned"
        raise RunError(f"the targets in {folder} are {doing}", fix="wait until that has ended") from None
    return file


def used_keys(path: Path) -> Keys | None:
    """The keys that a run has asked for; None when it has not written that down."""
    try:
        return np.frombuffer(bytes.fromhex(path.read_text(encoding="ascii")), dtype="S16")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged: {error}", fix="delete it; `ctxdistill evaluate` writes a part of it again"
        ) from None
