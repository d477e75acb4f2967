"""One split of one public data set becomes rows whose columns have the names that all tasks share.

In: a `Source`, which says where the split lies on the hub and below a local folder, and what must be found there. Out:
`Row`s with the columns `text` or `text1` and `text2`, `label` and `index`. Invariants: nothing is read whose row count
or label split is not the published one; rows come in the order of the data set; `index` counts the rows of the data set
before any of them is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ctxdistill.errors import DataError, several
from ctxdistill.readers import READERS, Reader, Record, lines, read_hub
from ctxdistill.rows import Row, row_id

Choose = Callable[[Sequence[Row]], list[Row]]
"""Which of a split's rows are used, and in which order."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the rows of a source lie, how they are written there and how many there must be."""

    counts: Mapping[str, int] | int
    """Rows per label as published, labels that the task leaves out among them; where no split by label is published,
    the number of rows."""
    columns: tuple[str, ...] = ("text",)
    """The column with the text, or the two with the pair."""
    label: str = "label"
    """The column with the label."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label as written there -> name of the task's label. Others keep their names."""
    only: Mapping[str, str] = field(default_factory=dict)
    """Column -> the value that a row must have; `counts` are those of such rows."""
    choose: Choose | None = None
    """Applied last."""


@dataclass(frozen=True, kw_only=True)
class Hub(Place):
    """A data set of the Hugging Face hub that needs no loading script."""

    path: str
    """`owner/name`."""
    config: str | None = None
    split: str = "train"
    index: str | None = None
    """The column with the row's number; unset, the rows are counted."""
    parquet: str | None = None
    """The files of the split in the branch that the hub itself fills with Parquet, for data sets that still consist of
    a script."""


@dataclass(frozen=True, kw_only=True)
class Local(Place):
    """A file below `tasks.root`."""

    file: str
    read: Reader | None = None
    """Unset: the reader of the file's suffix."""


@dataclass(frozen=True)
class Source:
    """One split of one data set."""

    name: str
    """For messages and tables: `RTE train`."""
    labels: tuple[str, ...]
    """Rows with another label are left out (MNLI: neutral, CLINC150: oos)."""
    local: Local
    hub: Hub | None
    """None: the hub does not have it in a form that can be loaded without running code."""


def load(source: Source, root: Path | None) -> list[Row]:
    """The rows of `source` from the folder `root`, or from the hub.

    Each row has `text` or `text1` and `text2`, `label` (one of `source.labels`) and `index` (from 0, GLUE's `idx`).

    Raises: `DataError` when it cannot be read, or when rows or labels are not as many as published.
    """
    if root is not None:
        place: Place = source.local
        where, records, column = _local(source.local, source.name, root)
    elif source.hub is not None:
        place = source.hub
        where, records, column = _hub(source.hub, source.name)
    else:
        raise DataError(
            f"{source.name} is not on the hub in a form that can be loaded without running code",
            expected=f"tasks.root, a folder with {source.local.file}",
            fix="make the file as its authors describe, and name its folder",
        )
    rows = [_row(record, number, place, column, source.name) for number, record in enumerate(records)]
    rows = [row for row, (_, fields) in zip(rows, records, strict=True) if _holds(fields, place.only)]
    _check(rows, place, source.name, where)
    kept = [row for row in rows if row.fields["label"] in source.labels]
    return place.choose(kept) if place.choose else kept


def labelled(encoding: str = "utf-8") -> Reader:
    """A reader of files whose lines are a label, a space and the text: `1 a fine film`, `DESC:def What is an atom ?`
    (what stands after the colon is a finer label, and left out)."""
    return partial(_read_labelled, encoding=encoding)


def _read_labelled(path: Path, most: int, problems: list[str], *, encoding: str) -> tuple[list[Record], int]:
    records: list[Record] = []
    for number, line in lines(path, problems, encoding):
        label, _, text = line.rstrip("\r\n").partition(" ")
        records.append((f"{path.name}:{number}", {"label": label.partition(":")[0], "text": text}))
    return records[: most or None], len(records)


def _local(place: Local, name: str, root: Path) -> tuple[str, Sequence[Record], str | None]:
    """(where, records, the column with the index)."""
    path = root / place.file
    if not path.is_file():
        raise DataError(
            f"{name}: there is no file {path}",
            expected=f"{place.file} in the folder that tasks.root names",
            found="a folder" if path.exists() else "nothing",
            fix="mend tasks.root, or leave it out to load the data from the hub",
        )
    problems: list[str] = []
    records, _ = (place.read or READERS[path.suffix])(path, 0, problems)
    if problems:
        raise several(DataError, f"{name}: {path}", problems, fix="get the file again")
    return str(path), records, None


def _hub(place: Hub, name: str) -> tuple[str, Sequence[Record], str | None]:
    options: dict[str, Any] = {}
    if place.parquet:
        options = {"revision": "refs/convert/parquet", "data_files": {place.split: place.parquet}}
    fix = "check the network, or name a folder with the data in tasks.root"
    config = None if place.parquet else place.config
    where, records, _ = read_hub(place.path, config, place.split, what=name, fix=fix, **options)
    return where, records, place.index


def _row(record: Record, number: int, place: Place, column: str | None, name: str) -> Row:
    """A row as all tasks have it."""
    origin, fields = record
    missing = [key for key in (*place.columns, place.label) if not isinstance(fields.get(key), str | int)]
    if missing:
        raise DataError(
            f"{name}: {origin} has no {missing[0]!r}",
            expected=f"the columns {', '.join((*place.columns, place.label))}",
            found=", ".join(fields),
        )
    names = ("text",) if len(place.columns) == 1 else ("text1", "text2")
    # Some data sets keep the end of the line in the text. Other spaces stay: they are what the authors' prompts hold.
    made: dict[str, Any] = {
        key: str(fields[column]).rstrip("\r\n") for key, column in zip(names, place.columns, strict=True)
    }
    raw = str(fields[place.label])
    made |= {"label": place.labels.get(raw, raw), "index": int(fields[column]) if column else number}
    return Row(row_id(made), made, origin)


def _holds(fields: Mapping[str, Any], only: Mapping[str, str]) -> bool:
    return all(fields.get(key) == value for key, value in only.items())


def _check(rows: Sequence[Row], place: Place, name: str, where: str) -> None:
    found = Counter(row.fields["label"] for row in rows)
    expected = place.counts
    if len(rows) == expected if isinstance(expected, int) else found == Counter(expected):
        return
    raise DataError(
        f"{name}: {where} does not hold what was published",
        expected=_counts(expected),
        found=_counts(found),
        fix="get the data again: numbers on other rows cannot be compared",
    )


def _counts(counts: Mapping[str, int] | int) -> str:
    if isinstance(counts, int):
        return f"{counts} rows"
    split = ", ".join(f"{n} {label}" for label, n in list(counts.items())[:8])
    return f"{sum(counts.values())} rows: {split}{', ...' if len(counts) > 8 else ''}"
