"""Care for a target store: are its shards whole, what is in it, and what can go.

In: a run's folder or a store's. Out: what was found, as plain data. Invariants: rows that a run uses stay, and of a store that
several runs may share all rows do; a prune that is interrupted leaves every row that was whole; no run uses the store
meanwhile.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import load

from ctxdistill.errors import RunError
from ctxdistill.rundir import Progress, RunDir, no_progress, write_atomic
from ctxdistill.store import (
    INDEX,
    USED,
    Keys,
    KeyTable,
    Shard,
    Target,
    damage,
    line_of,
    locked,
    packed,
    packed_shard,
    read_index,
    used_keys,
)  # fmt: skip

FULL = 2**26
"""Bytes of a shard that `prune` writes."""
KINDS = {"hidden": "hidden", "logprobs": "full", "topk_ids": "topk"}
"""What a shard holds -> `targets.kind`."""


class Store(NamedTuple):
    """Where targets are."""

    folder: Path
    run: Path | None
    """The run, where one was named."""
    used: Keys | None
    """The keys that the run needs, where it alone uses the store and has written them down."""


def locate(path: Path) -> Store:
    """The store of a run, or the one at `path`. Raises: `RunError` when it is neither."""
    if (path / "recipe.json").is_file():
        stored = RunDir(path).read_json("recipe.json")
        shared = stored["recipe"]["targets"]["dir"]
        if shared:
            return Store(Path(stored["base_dir"]) / Path(shared).expanduser(), path, None)
        return Store(path / "targets", path, used_keys(path / USED))
    if not (path / INDEX).is_file():
        found = "no such folder" if not path.is_dir() else f"neither recipe.json nor {INDEX} in it"
        raise RunError(f"{path} holds no targets", expected="the folder of a run, or of a target store", found=found)
    return Store(path, None, None)


def verify(path: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """`damaged`: shards that are missing or whose bytes have changed, with the reason."""
    store = locate(path)
    shards = [(shard._replace(keys=[], lengths=[]), len(shard.keys)) for shard in read_index(store.folder)]
    damaged = []
    for number, (shard, rows) in enumerate(shards, 1):
        if problem := damage(store.folder, shard):
            damaged.append({"shard": shard.shard, "rows": rows, "problem": problem})
        progress("verify", number, len(shards))
    return {
        "folder": str(store.folder), "shards": len(shards), "rows": sum(rows for _, rows in shards),
        "bytes": sum(shard.bytes for shard, _ in shards), "damaged": damaged,
    }  # fmt: skip


def stats(path: Path) -> dict[str, Any]:
    """What is in the store, from its index. `unused`: rows that the run does not need; None where that is not known."""
    store = locate(path)
    table = KeyTable()
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    shards = 0
    for shards, shard in enumerate(read_index(store.folder), 1):
        table.add(shards, shard)
        size = {"shards": 1, "rows": len(shard.keys), "tokens": sum(shard.lengths), "bytes": shard.bytes}
        kinds[kind_of(shard)].update(size)
    total = sum(kinds.values(), Counter[str]())
    unused = None if store.used is None else int((~np.isin(table.all(), store.used)).sum())
    return {
        "folder": str(store.folder), "shards": shards, "rows": len(table), "repeated": total["rows"] - len(table),
        "tokens": total["tokens"], "bytes": total["bytes"], "bytes_per_token": per(total["bytes"], total["tokens"]),
        "kinds": {k: {**c, "bytes_per_token": per(c["bytes"], c["tokens"])} for k, c in sorted(kinds.items())},
        "unused": unused, "leftovers": len(leftovers(store.folder, {s.shard for s in read_index(store.folder)})),
    }  # fmt: skip


def prune(path: Path, *, full: int = FULL, progress: Progress = no_progress) -> dict[str, Any]:
    """Drop what is damaged, repeated, left over or, in a run's own store, not used; put small shards together.

    New shards are written beside the old ones, then the index is replaced in one step, then the old ones are deleted.

    Raises: `RunError` when a run uses the store.
    """
    store = locate(path)
    with contextlib.ExitStack() as stack:
        if store.run:
            run = RunDir(store.run)
            run.lock()
            stack.callback(run.release)
        if not (store.folder / INDEX).is_file():
            raise RunError(f"{store.folder} holds no targets yet", fix="finish the run first, with --resume")
        stack.enter_context(locked(store.folder, exclusive=True))
        return _prune(store, full, progress)


def _prune(store: Store, full: int, progress: Progress) -> dict[str, Any]:
    table, good = KeyTable(), set[int]()
    count: Counter[str] = Counter()
    before = [shard.shard for shard in read_index(store.folder, skip_damaged=True)]
    for number, shard in enumerate(read_index(store.folder, skip_damaged=True)):
        if damage(store.folder, shard):
            count["damaged"] += len(shard.keys)
        else:
            good.add(number)
            table.add(number, shard)
        count["before"] += shard.bytes
        progress("verify", number + 1, len(before))
    lines = list[bytes]()
    names = set[str]()
    for number, shard in enumerate(_compacted(store, table, good, full, count)):
        lines.append(line_of(shard))
        names.add(shard.shard)
        count["after"] += shard.bytes
        progress("write", number + 1, len(before))
    write_atomic(store.folder / INDEX, b"".join(lines))  # from here on the old shards are not used any more
    gone = leftovers(store.folder, names)
    for file in gone:
        file.unlink(missing_ok=True)
    return {
        "folder": str(store.folder), "rows": count["rows"], "shards": len(names), "bytes": count["after"],
        "before": {"shards": len(before), "bytes": count["before"]},
        "dropped": {name: count[name] for name in ("unused", "repeated", "damaged")}, "deleted": len(gone),
        "unused_known": store.used is not None,
    }  # fmt: skip


def _compacted(store: Store, table: KeyTable, good: set[int], full: int, count: Counter[str]) -> Iterator[Shard]:
    """The shards that stay, old and new; at most one for each kind of target is not full."""
    pending: dict[Any, list[Target]] = defaultdict(list)
    sizes: Counter[Any] = Counter()

    def written(like: Any) -> Shard:
        sizes[like] = 0
        shard, raw = packed_shard(pending.pop(like))
        write_atomic(store.folder / shard.shard, raw)
        return shard

    for number, shard in enumerate(read_index(store.folder, skip_damaged=True)):
        if number not in good:
            continue
        keep = _kept(shard, number, table, store.used, count)
        count["rows"] += int(keep.sum())
        if keep.all() and shard.bytes >= full:
            yield shard
            continue
        if not keep.any():
            continue
        tensors = load((store.folder / shard.shard).read_bytes())
        start = 0
        for key, length, wanted in zip(shard.keys, shard.lengths, keep.tolist(), strict=True):
            rows = slice(start, start := start + length)
            if not wanted:
                continue
            mine = {name: tensors[name][rows] for name in shard.tensors if length}
            like = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in mine.items())
            pending[like].append(Target(key, tuple(tensors["ids"][rows].tolist()), mine))
            sizes[like] += sum(tensor.nbytes for tensor in mine.values())
            if sizes[like] >= full:
                yield written(like)
    for like in list(pending):
        yield written(like)


def _kept(shard: Shard, number: int, table: KeyTable, used: Keys | None, count: Counter[str]) -> np.ndarray[Any, Any]:
    """Which rows of a shard stay."""
    places = [table.find(key) for key in shard.keys]
    newest = np.array([place is not None and place.shard == number for place in places])
    needed = np.ones(len(newest), dtype=bool) if used is None else np.isin(packed(shard.keys), used)
    count["repeated"] += int((~newest).sum())
    count["unused"] += int((newest & ~needed).sum())
    kept: np.ndarray[Any, Any] = newest & needed
    return kept


def leftovers(folder: Path, named: set[str]) -> list[Path]:
    """Shards that no line of the index names, and what a kill left of files."""
    return [
        file
        for file in sorted(folder.iterdir() if folder.is_dir() else ())
        if (file.suffix == ".safetensors" and file.name not in named) or file.name.endswith(".tmp")
    ]


def kind_of(shard: Shard) -> str:
    """`targets.kind` of a shard; `none` where no row has a token."""
    return next((KINDS[name] for name in shard.tensors if name in KINDS), "none")


def per(size: int, tokens: int) -> float | None:
    return size / tokens if tokens else None
