"""Files and hub data sets become records: columns as they are there, and where each one is from.

In: a file, or the name of a data set. Out: `Record`s, in a temporary file while they are many; the problems of all lines. Invariants:
nothing is repaired or skipped in silence; no more of a file is in memory than a line, a list in `.json` being one.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ctxdistill import files
from ctxdistill.errors import DataError
from ctxdistill.spool import Records

MAX_BYTES = 10_000_000
"""Longest line, document or text file; more is a wrong file, and is not read into memory."""
MAX_PROBLEMS = 1000
"""Problems after which a file is not read on."""
MAX_PARQUET = (2_000_000_000, 30)
"""Memory that a Parquet file may take while it is read: bytes, and as many more for each byte of the file."""
NOT_UTF8 = "not valid UTF-8"
"""What problems with the encoding say."""
SAVE_AS_UTF8 = "save it as UTF-8"
TAB = "\t"
SEPARATORS = {".csv": (",", "commas"), ".tsv": (TAB, "tabs")}
"""Suffix -> what stands between fields, and its name."""

Fields = dict[str, Any]
Record = tuple[str, Fields]
"""(origin, columns)."""
Reader = Callable[[Path, int, list[str]], tuple[Sequence[Record], int]]
"""(file, most records or 0 for all, list that problems are added to) -> (records, number of records in the file)."""


def _read_jsonl(path: Path, most: int, problems: list[str]) -> tuple[Sequence[Record], int]:
    records = Records()
    total = 0
    for number, line in lines(path, problems):
        if not line.strip():
            continue
        total += 1
        origin = f"{path.name}:{number}"
        fields = parsed(line.rstrip("\r\n"), origin, problems)
        if isinstance(fields, dict):
            if not most or len(records) < most:
                records.append((origin, fields))
        elif fields is not None:
            problems.append(f"{origin}: expected an object {{...}}, found {short(fields)}")
    return records, total


def _read_json(path: Path, most: int, problems: list[str]) -> tuple[list[Record], int]:
    try:
        text = bounded(path, files.MAX_JSON, path.name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{path.name}: {NOT_UTF8} at byte {error.start + 1}")
        return [], 0
    items = parsed(text, path.name, problems) if text.strip() else []
    if items is None:
        return [], 0
    if not isinstance(items, list):
        problems.append(f"{path.name}: expected a list of objects [{{...}}, ...], found {short(items)}")
        return [], 0
    records = []
    for number, item in enumerate(items, 1):
        if isinstance(item, dict):
            records.append((f"{path.name}:item {number}", item))
        else:
            problems.append(f"{path.name}:item {number}: expected an object {{...}}, found {short(item)}")
    return records[: most or None], len(items)


def _read_csv(path: Path, most: int, problems: list[str], dialect: str = "excel") -> tuple[Sequence[Record], int]:
    texts = (line for _, line in lines(path, problems))
    before = csv.field_size_limit(MAX_BYTES)
    try:
        return _csv_records(csv.reader(texts, dialect, strict=True), path.name, most, problems)
    finally:
        csv.field_size_limit(before)


def _read_tsv(path: Path, most: int, problems: list[str]) -> tuple[Sequence[Record], int]:
    return _read_csv(path, most, problems, "excel-tab")


def refuse_other_separator(path: Path, what: str) -> None:
    """Raises: `DataError` when the fields of a `.csv` or `.tsv` file seem to be separated otherwise."""
    if path.suffix.lower() not in SEPARATORS:
        return
    own, name = SEPARATORS[path.suffix.lower()]
    header = next((line for _, line in lines(path, []) if line.strip()), "").strip("\r\n")
    other = next((character for character in ";\t," if character in header), None)
    if other and own not in header:
        raise DataError(
            f"{what}: the fields of {path} seem to be separated by {'tabs' if other == TAB else repr(other)}",
            expected=f"{name} between them, as in any {path.suffix.lower()} file",
            found=f"the header {short(header)}",
            fix=f"save it with {name}, or as .jsonl",
        )


def _csv_records(reader: Any, name: str, most: int, problems: list[str]) -> tuple[Sequence[Record], int]:
    header: list[str] | None = None
    records = Records()
    total = 0
    while True:
        start = reader.line_num + 1  # a quoted field may go over several lines
        try:
            cells = next(reader)
        except StopIteration:
            return records, total
        except csv.Error as error:
            problems.append(f"{name}:{start}: {error}")
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header) or not all(column.strip() for column in header):
                problems.append(f"{name}:{start}: column names must be different and not empty, found {short(header)}")
            continue
        total += 1
        if len(cells) != len(header):
            expected = count(len(header), "field")
            problems.append(f"{name}:{start}: expected {expected} as in the header, found {len(cells)}")
        elif not most or len(records) < most:
            # An empty cell is a missing value: the format knows no other way to leave one out.
            records.append((f"{name}:{start}", {k: cell or None for k, cell in zip(header, cells, strict=True)}))


def _read_parquet(path: Path, most: int, problems: list[str]) -> tuple[Sequence[Record], int]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    records = Records()
    try:
        memory = MAX_PARQUET[0] + MAX_PARQUET[1] * path.stat().st_size
        with files.bounded_memory(memory), pq.ParquetFile(path, pre_buffer=False) as file:
            total = int(file.metadata.num_rows)
            wanted = min(most or total, total)
            for batch in file.iter_batches(batch_size=1024, use_threads=False):
                start = len(records) + 1
                found = [(f"{path.name}:{i}", fields) for i, fields in enumerate(batch.to_pylist(), start)]
                records.extend(found[: wanted - len(records)])
                if len(records) >= wanted:
                    break
    except MemoryError:  # Arrow's is an ArrowException, too
        problems.append(f"{path.name}: needs more than {memory / 1e9:.1f} GB of memory to be read")
        return [], 0
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        problems.append(f"{path.name}: cannot be read as Parquet: {error}")
        return [], 0
    return records, total


def read_hub(
    name: str, config: str | None, split: str, most: int = 0, *, what: str, fix: str, **options: Any
) -> tuple[str, Sequence[Record], int]:
    """(source, records, number of records there) of a hub data set, class labels read as their names.

    Args:
        most: most records, or 0 for all.
        what, fix: for the error message.
        options: passed on to `datasets.load_dataset`.

    Raises: `DataError` when it cannot be loaded.
    """
    from datasets import load_dataset

    source = f"{name} ({config or 'default'}, {split})"
    try:
        table = load_dataset(name, config, split=split, **options)
    except Exception as error:  # the library raises what it likes, network errors among it
        raise DataError(
            f"{what}: cannot load the data set {source}",
            expected="a data set of the hub, one of its configurations and one of its splits",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            fix=fix,
        ) from None
    total = len(table)
    chosen = table.select(range(min(most or total, total)))
    names = {column: feature for column, feature in table.features.items() if hasattr(feature, "int2str")}
    records = Records()
    for number, row in enumerate(chosen, 1):
        named = {k: _class_name(names[k], v) if k in names else v for k, v in row.items()}
        records.append((f"{name}:{split}:{number}", named))
    return source, records, total


def _class_name(feature: Any, value: int | None) -> str | None:
    """The name of a class label; -1 is how the hub writes that there is none."""
    return None if value is None or value < 0 else str(feature.int2str(value))


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet,
}  # fmt: skip


def reader_of(path: Path, what: str, otherwise: str = "") -> Reader:
    """The reader of a file that is there; arguments and errors as of `must_be_file`."""
    must_be_file(path, what, otherwise)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{what}: cannot read {path}",
            expected=f"a file that ends in {', '.join(READERS)}{'' if _is_option(what) else ', or hub:owner/name'}",
            found=path.suffix or "no suffix",
            fix="convert it, or rename it if it is one of these",
        )
    return reader


def _is_option(what: str) -> bool:
    return what.startswith("--")


def must_be_file(path: Path, what: str, otherwise: str = "") -> None:
    """Raises: `DataError` when it is not.

    Args:
        what: the recipe's key that names the file, or the option of the command line.
        otherwise: what to do if not to mend that.
    """
    if path.is_file():
        return
    folder = path.parent
    message, found = f"{what}: there is no file {path}", f"there is no folder {folder}"
    if path.exists():
        message, found = f"{what}: {path} is {files.kind(path)}, and no file", ""
    elif folder.is_dir():
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        some = ", ".join([*names[:5], "..."] if len(names) > 5 else names)
        found = f"similar names in {folder}: {', '.join(near)}" if near else f"in {folder}: {some or 'no files'}"
    raise DataError(
        message,
        expected="a file" if _is_option(what) else "a file; relative paths start at the recipe's folder",
        found=found,
        fix=f"mend {what}{'' if _is_option(what) else ' in the recipe'}{otherwise and f', or {otherwise}'}",
    )


def bounded(path: Path, most: int, what: str) -> bytes:
    """The bytes of a file that is not larger than `most`."""
    with open_file(path, what) as file:
        raw: bytes = file.read(most + 1)
    if len(raw) > most:
        raise DataError(f"{what}: {path} is too large", expected=f"at most {most // 1_000_000} MB", fix="split it")
    return raw


def open_file(path: Path, what: str) -> Any:
    """A text file to be read. Raises: `DataError`, also for one in UTF-16, whose lines would all be wrong."""
    try:
        file = files.open_regular(path)
    except OSError as error:
        raise DataError(f"{what}: cannot open {path}: {error.strerror}", fix="check its permissions") from None
    if files.is_utf16(file.peek(2)):
        file.close()
        raise DataError(f"{what}: {path} looks like UTF-16", expected="a UTF-8 text file", fix=SAVE_AS_UTF8)
    return file


def lines(path: Path, problems: list[str], encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """(number, text) of each line. A line that is too long is left out, and what is not of this encoding is replaced;
    both are problems, so that no such row gets any further."""
    with open_file(path, path.name) as file:
        for number in itertools.count(1):
            raw: bytes = file.readline(MAX_BYTES + 1)
            if not raw:
                return
            if len(problems) >= MAX_PROBLEMS:
                problems.append(f"{path.name}:{number}: after {MAX_PROBLEMS:,} problems the rest is not read")
                return
            if len(raw) > MAX_BYTES:
                problems.append(f"{path.name}:{number}: line longer than {MAX_BYTES // 1_000_000} MB")
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_BYTES)
                continue
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw  # byte order mark
            try:
                text = raw.decode(encoding)
            except UnicodeDecodeError as error:
                problems.append(
                    f"{path.name}:{number}: not valid {encoding.upper()} at byte {error.start + 1} of the line"
                )
                text = raw.decode(encoding, errors="replace")
            yield number, text


def parsed(text: str, origin: str, problems: list[str]) -> Any:
    """The value, or None and a problem more."""

    def once(pairs: list[tuple[str, Any]]) -> Fields:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the key {short(name)} occurs twice")
        return fields

    try:
        value = files.parse_json(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        problems.append(f"{origin}: not valid JSON{line}, column {error.colno}: {error.msg}")
    except ValueError as error:
        problems.append(f"{origin}: not valid JSON: {error}")
    else:
        if value is not None:
            return value
        problems.append(f"{origin}: expected an object {{...}}, found null")
    return None


def fix_of(problems: Sequence[str], otherwise: str) -> str:
    """What to do about the problems of a file: about its encoding, and about all else `otherwise`."""
    encoding = sum(NOT_UTF8 in problem for problem in problems)
    return "; ".join([SAVE_AS_UTF8] * bool(encoding) + [otherwise] * (encoding < len(problems)))


def short(value: Any, most: int = 60) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
