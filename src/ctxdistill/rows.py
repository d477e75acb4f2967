"""Contexts, queries and answers become rows with stable ids.

In: local files or hub data sets, and the recipe that names their columns. Out: `Row`s in file order. Invariants:
columns are named and never guessed; nothing is repaired or skipped in silence, and all that is wrong with a file is
reported at once, with file and line; a row's id depends on its content alone.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctxdistill import readers
from ctxdistill.errors import DataError, several
from ctxdistill.readers import Fields, Record
from ctxdistill.recipe import DataSection, Recipe, fields_of
from ctxdistill.spool import Lazy, Records, after

HUB = "hub:"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One line of data."""

    id: str
    """16 hex digits that depend on `fields` alone."""
    fields: Fields
    """All columns."""
    origin: str
    """Where it comes from, such as `queries.jsonl:12`."""


@dataclass(frozen=True)
class Rows:
    """What `read` found."""

    rows: Sequence[Row]
    left_out: int
    """Rows after the first `limit`."""
    source: str
    """The file, or the hub data set with its configuration and split."""


@dataclass(frozen=True)
class _Column:
    """What a column has to hold, and the recipe's key that names it."""

    kind: Literal["text", "value", "answer", "messages", "context"]
    key: str
    required: bool = True


def read(
    section: DataSection, recipe: Recipe, what: str, *, answers: Literal["optional", "required"] = "optional"
) -> Rows:
    """The rows of `section.data`.

    Args:
        section: names the source and its columns.
        recipe: says which columns the prompts need, and where relative paths start.
        what: the recipe's key of this data, for messages: `queries`, `eval` or `context.demos`.
        answers: whether each row must have an answer.

    Raises: `DataError` that lists all that is wrong.
    """
    if not section.data:
        raise DataError(f"{what}: no data is named", expected="a data file or hub:owner/name")
    problems: list[str] = []
    most = section.limit and section.skip + section.limit
    if section.data.startswith(HUB):
        fix = f"check {what}.data, {what}.config and {what}.split, and the network; or use a local file"
        name = section.data.removeprefix(HUB)
        source, records, total = readers.read_hub(name, section.config, section.split, most, what=what, fix=fix)
    else:
        path, reader = _local(section.data, recipe, what)
        source = str(path)
        records, total = reader(path, most, problems)
    records, total = after(records, section.skip), max(0, total - section.skip)
    if not records and not problems:
        where = f"has no row after {what}.skip = {section.skip}" if section.skip else "is empty"
        raise DataError(f"{what}: {source} {where}", expected="at least one row", found="none")
    if section.messages and section.turns != "query":
        split_records = Records()
        split_records.extend(_split_turns(record, section, recipe, problems) for record in records)
        records = split_records
    problems += _check(records, _columns(section, recipe, what, answers), recipe.prompt.label_words)
    if problems:
        if not section.data.startswith(HUB):
            readers.refuse_other_separator(recipe.path(section.data), what)
        fix = readers.fix_of(problems, "mend these lines, or name other columns in the recipe")
        raise several(DataError, f"{what}: {source}", problems, fix=fix)
    return Rows(rows_of(records), total - len(records), source)


def require_files(recipe: Recipe) -> None:
    """Raises: `DataError` when a local file that the recipe names is not there, which can be said before anything is loaded."""
    c = recipe.context
    for what, name in (("queries", recipe.queries.data), ("eval", recipe.eval.data), ("context.demos", c.demos)):
        if name and not name.startswith(HUB):
            _local(name, recipe, what)
    documents = [("context.documents", name) for name in c.documents]
    for what, name in (("context.system_file", c.system_file), ("context.messages", c.messages), *documents):
        if name:
            readers.must_be_file(recipe.path(name), what)


def _local(name: str, recipe: Recipe, what: str) -> tuple[Path, readers.Reader]:
    """A data file that is there, and its reader."""
    path = recipe.path(name)
    written = what == "queries" and recipe.queries.synthesize
    return path, readers.reader_of(
        path, what, "delete queries.data where the model writes all of them" if written else ""
    )


def rows_of(records: Sequence[Record]) -> Sequence[Row]:
    """The records as rows."""
    return Lazy.over(records, lambda record: Row(row_id(record[1]), record[1], record[0]))


def read_rows(path: Path) -> list[Fields]:
    """All rows of the data file that `--from` names, as they are, no column named. Raises `DataError` that lists all that is wrong."""
    problems = list[str]()
    records, _ = readers.reader_of(path, "--from")(path, 0, problems)
    if problems or not records:
        problems = problems or ["there are no rows"]
        fix = readers.fix_of(problems, "a row is an object: one a line in .jsonl, a list in .json")
        raise several(DataError, str(path), problems, fix=fix)
    return [fields for _, fields in records]


def _split_turns(record: Record, section: DataSection, recipe: Recipe, problems: list[str]) -> Record:
    """The record with the last assistant's turn as its answer and, of a `conversation`, the system turn as its context."""
    origin, fields = record
    column = str(section.messages)
    turns = fields.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(m, dict) for m in turns):
        return record  # `_check` says what is wrong with it
    found: Fields = {}
    if section.taught == "last" and turns[-1].get("role") == "assistant":
        found[section.answer], turns = turns[-1].get("content"), turns[:-1]
    if section.turns == "conversation" and turns and turns[0].get("role") == "system":
        found["system"], turns = turns[0].get("content"), turns[1:]
        own = recipe.context.column == "system"
        if not own and str(found["system"]).strip() != (recipe.context.system or "").strip():
            problems.append(f"{origin}: the system turn is neither context.system nor named by context.column")
    if taken := sorted(set(found) & set(fields)):
        problems.append(f"{origin}: the turns give the column {taken[0]!r}, which the row has already")
    return origin, {**fields, column: turns, **found}


def values(row: Row, section: DataSection) -> dict[str, str]:
    """The columns as text, for the `{column}` fields of a pattern; `prompt` and `answer` are the columns that the
    section calls so. A list of texts is one text a line; columns without a value are left out."""
    named = {"prompt": row.fields.get(section.prompt), "answer": row.fields.get(section.answer)}
    found = {name: value for name, value in {**row.fields, **named}.items() if value is not None}
    return {name: "\n".join(value) if _texts(value) else str(value) for name, value in found.items()}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def query_key(text: str) -> str:
    """What two queries have in common when they are the same but for case, spaces and Unicode form."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def check_overlap(groups: Mapping[str, Sequence[tuple[Row, str]]]) -> None:
    """Raise `DataError` when a query occurs twice in a group, or in two groups.

    Args:
        groups: name (`demos`, `train queries`, `eval`) -> rows with their query texts.
    """
    keys = {name: _Keys(group) for name, group in groups.items()}
    problems = []
    for name, own in keys.items():
        if len(twice := own.repeated.tolist()):
            problems.append(
                f"{name}: {readers.count(len(twice), 'row')} with a query that occurred before: {own.examples(own, twice)}"
            )
    for a, b in itertools.combinations(groups, 2):
        if shared := np.flatnonzero(np.isin(keys[b].all, keys[a].found)).tolist():
            examples = keys[a].examples(keys[b], shared)
            problems.append(f"{a} and {b} overlap in {readers.count(len(shared), 'row')} of {b}: {examples}")
    if problems:
        fix = 'remove these rows from one of the sides; queries.duplicates = "drop" drops repeated rows inside a file'
        raise several(DataError, "rows that should be different are the same", problems, fix=fix)


def drop_duplicates(rows: Sequence[Row], key: Callable[[Row], str]) -> tuple[Sequence[Row], int]:
    """The rows without those whose query already occurred, and how many these were. `key` gives a row's query text."""
    keys = _Keys(Lazy.over(rows, lambda row: (row, key(row))))
    return Lazy(np.sort(keys.firsts), rows.__getitem__), len(keys.repeated)


def split(
    rows: Sequence[Row], share: float, seed: int, group: Callable[[Row], str] = lambda row: row.id
) -> tuple[Sequence[Row], Sequence[Row]]:
    """(kept, held out), both in their order: `share` of the groups is held out, chosen by hash of seed and group.

    The choice depends on content and not on position, and changes little when rows are added. Rows of one `group` (by
    default: with the same id) stay together. With a share above 0 and at least two groups, neither side is empty.
    """
    drawn = _digests(f"{seed}:{group(row)}" for row in rows)  # [N]
    groups = np.unique(drawn)
    count = min(max(1, round(share * len(groups))), len(groups) - 1) if share > 0 and len(groups) else 0
    held = drawn <= groups[count - 1] if count else np.zeros(len(drawn), dtype=bool)
    return Lazy(np.flatnonzero(~held), rows.__getitem__), Lazy(np.flatnonzero(held), rows.__getitem__)


def read_text(name: str, recipe: Recipe, what: str) -> str:
    """A text file of the context as it is, without a byte order mark. Raises `DataError`."""
    path = recipe.path(name)
    readers.must_be_file(path, what)
    raw = readers.bounded(path, readers.MAX_BYTES, what)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{what}: {path}:{line} is not valid UTF-8", expected="a UTF-8 text file", fix=readers.SAVE_AS_UTF8
        ) from None
    if not text.strip():
        raise DataError(f"{what}: {path} is empty", expected="a text", fix=f"write one, or remove {what}")
    return text


def read_messages(name: str, recipe: Recipe, what: str) -> list[dict[str, Any]]:
    """A message history from a `.json` list or a `.jsonl` file. Raises `DataError` that lists all that is wrong."""
    path, problems = recipe.path(name), list[str]()
    readers.must_be_file(path, what)
    suffix = path.suffix.lower()
    if suffix not in {".json", ".jsonl"}:
        raise DataError(f"{what}: cannot read {path}", expected="a .json or .jsonl file", found=suffix or "no suffix")
    records, _ = readers.READERS[suffix](path, 0, problems)
    problems += [f"{origin}: {problem}" for origin, fields in records for problem in _message_problems(fields)]
    if problems:
        fix = readers.fix_of(problems, 'each message is {"role": "user", "content": "..."}')
        raise several(DataError, f"{what}: {path}", problems, fix=fix)
    if not records:
        raise DataError(f"{what}: {path} is empty", expected="at least one message", found="none")
    return [fields for _, fields in records]


# -- checks -----------------------------------------------------------------------------------------------------------


def _columns(section: DataSection, recipe: Recipe, what: str, answers: str) -> dict[str, _Column]:
    """Every column that the recipe uses of this data."""
    demos = what.startswith("context.")
    keys = "queries" if demos else what
    columns: dict[str, _Column] = {}
    if not demos:
        columns |= {
            column: _Column("context", f"context.{key}")
            for key, column in (("column", recipe.context.column), ("teacher_prompt", recipe.context.teacher_prompt))
            if column
        }
    columns[section.answer] = _Column("answer", f"{keys}.answer", answers == "required")
    patterns = [("prompt.answer_pattern", recipe.prompt.answer_pattern)] if answers == "required" else []
    if section.messages:
        columns[section.messages] = _Column("messages", f"{keys}.messages")
    else:
        patterns.append(("prompt.pattern", recipe.prompt.pattern))
    for key, pattern in patterns:
        for name in sorted(fields_of(pattern) - {"prompt", "answer"}):
            columns.setdefault(name, _Column("value", key))
        if "prompt" in fields_of(pattern):
            columns[section.prompt] = _Column("text", f"{keys}.prompt")
    return columns


def _check(records: Sequence[Record], columns: Mapping[str, _Column], labels: Sequence[str]) -> list[str]:
    """Everything that is wrong with the columns of `records`."""
    if not records:
        return []
    problems = []
    there = {name for _, fields in records for name in fields}
    for name, column in columns.items():
        if column.required and name not in there:
            problems.append(f"no row has the column {name!r}, which {column.key} names{_nearest(name, there)}")
            continue
        for origin, fields in records:
            if name not in fields:
                if column.required:
                    problems.append(f"{origin}: no column {name!r}{_nearest(name, fields)}")
            elif problem := _problem(fields[name], column, labels):
                problems.append(f"{origin}: {name}: {problem}")
    return problems


def _problem(value: Any, column: _Column, labels: Sequence[str]) -> str:
    """What is wrong with one value; empty when nothing is."""
    if column.kind == "messages" or (column.kind == "context" and isinstance(value, list)):
        return _history_problem(value)
    if column.kind == "answer" and not column.required and value is None:
        return ""
    if column.kind == "value" and _texts(value):
        value = "\n".join(value)
    kinds: tuple[type, ...] = (str, int, float) if column.kind in {"value", "answer"} else (str,)
    strange = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
    if strange or not isinstance(value, kinds):
        return f"expected a text{' or a number' if len(kinds) > 1 else ''}, found {readers.short(value)}"
    text = str(value)
    if not text.strip():
        return "the text is empty"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return f"half of a surrogate pair, which is no character, in {readers.short(text)}"
    if column.kind == "answer" and labels and text not in labels:
        return f"{readers.short(text)} is not one of prompt.label_words{_nearest(text, labels)}"
    return ""


def _history_problem(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return f'expected a list of messages [{{"role": "user", "content": "..."}}], found {readers.short(value)}'
    return "; ".join(f"message {i}: {problem}" for i, m in enumerate(value, 1) for problem in _message_problems(m))


def _message_problems(message: Any) -> list[str]:
    if not isinstance(message, dict):
        return [f"expected an object with role and content, found {readers.short(message)}"]
    problems = []
    if message.get("role") not in ROLES:
        problems.append(f"role: expected one of {', '.join(ROLES)}, found {readers.short(message.get('role'))}")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        problems.append(f"tool_calls: expected a list of objects, found {readers.short(calls)}")
    silent = message.get("role") == "assistant" and calls and message.get("content") is None  # a call alone
    if not isinstance(message.get("content"), str) and not silent:
        problems.append(f"content: expected a text, found {readers.short(message.get('content'))}")
    return problems


def row_id(fields: Fields) -> str:
    """16 hex digits that depend on the columns alone."""
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class _Keys:
    """Where the queries of a group are, 24 bytes for each."""

    def __init__(self, group: Sequence[tuple[Row, str]]) -> None:
        self.group = group
        self.all = _digests(query_key(text) for _, text in group)  # [N]
        self.found, self.firsts = np.unique(self.all, return_index=True)

    @property
    def repeated(self) -> np.ndarray[Any, Any]:
        """Numbers of the rows whose query occurred before."""
        first = np.zeros(len(self.all), dtype=bool)
        first[self.firsts] = True
        return np.flatnonzero(~first)

    def examples(self, others: _Keys, places: Sequence[int]) -> str:
        """The first few of the rows of `others` whose query is here, too."""
        shown = []
        for place in places[:3]:
            row, text = others.group[place]
            first, _ = self.group[self.firsts[np.searchsorted(self.found, others.all[place])]]
            shown.append(f"{row.origin} = {first.origin} ({readers.short(text, 40)})")
        return "; ".join(shown) + ("; ..." if len(places) > 3 else "")


def _digests(texts: Iterable[str]) -> np.ndarray[Any, Any]:
    """16 bytes for each text, equal where the texts are, [N]."""
    raw = bytearray()
    for text in texts:
        raw += hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
    return np.frombuffer(bytes(raw), dtype="S16")


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    more = ", ..." if len(names) > 12 else ""
    return f"; did you mean {close[0]!r}?" if close else f"; there is: {', '.join(names[:12])}{more}"
