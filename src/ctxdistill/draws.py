"""Which rows are demonstrations, queries and evaluation rows.

In: a task's rows and a seed. Out: the same rows on every machine. Invariants: no row is both a demonstration and a query;
the queries depend neither on the number of demonstrations nor on that of contexts, and the first context not on the
number of queries, so that everything in a study that has the same seed has the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctxdistill.errors import DataError, RecipeError
from ctxdistill.rows import Row, query_key


@dataclass(frozen=True)
class Draw:
    """The training side of a cell."""

    contexts: tuple[tuple[Row, ...], ...]
    """Demonstration sets, each in the order of the prompt; the first is that of everything with a single context."""
    queries: tuple[Row, ...]


def draw(
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    n: int,
    queries: int,
    seed: int,
    contexts: int = 1,
    mode: Literal["clean", "paper"] = "clean",
) -> Draw:
    """Demonstration sets and queries from `rows` (without rows of the same text: see `without`).

    Args:
        labels: all labels, in the order of the data set's classes.
        n: demonstrations per context.
        queries: number of queries.
        contexts: number of demonstration sets.
        mode: `clean`: demonstrations are spread over the labels as evenly as n allows and shuffled. Those of the first
            context for a smaller n are among those for a larger one; a smaller number of queries is the beginning of a
            larger one. Contexts share no row while there are enough. `paper`: the authors' procedure, see `_paper`.

    Raises: `DataError` when there are not enough rows, `RecipeError` for what the paper's procedure does not know.
    """
    if mode == "paper":
        return _paper(rows, labels, n, queries, seed, contexts)
    if queries > len(rows):
        raise _too_few("rows", queries, len(rows))
    order = [rows[i] for i in np.random.default_rng([seed, 0]).permutation(len(rows))]
    # Queries from the front, demonstrations from the back: neither number moves the other's rows.
    pools = {label: [row for row in order[queries:] if row.fields["label"] == label] for label in labels}
    left = {label: list(pool) for label, pool in pools.items()}
    sets = []
    for number in range(contexts):
        random = np.random.default_rng([seed, 1, number])
        names = [labels[i] for i in random.permutation(len(labels))]
        chosen = [
            row
            for i, label in enumerate(names)
            for row in _take(left, pools, label, n // len(names) + (i < n % len(names)), random)
        ]
        sets.append(tuple(chosen[i] for i in random.permutation(n)))
    return Draw(tuple(sets), tuple(order[:queries]))


def _take(
    left: dict[str, list[Row]],
    pools: dict[str, list[Row]],
    label: str,
    count: int,
    random: np.random.Generator,
) -> list[Row]:
    """The last `count` rows of a label that no context has had; when they run out, all are there again."""
    if count > len(pools[label]):
        raise _too_few(f"rows of label {label}", count, len(pools[label]))
    if count > len(left[label]):
        rest = {row.id for row in left[label]}
        again = [row for row in pools[label] if row.id not in rest]
        left[label] = [again[i] for i in random.permutation(len(again))] + left[label]
    keep = len(left[label]) - count
    taken, left[label] = left[label][keep:][::-1], left[label][:keep]
    return taken


def _paper(rows: Sequence[Row], labels: Sequence[str], n: int, queries: int, seed: int, contexts: int) -> Draw:
    """The sampling of the paper's code, bit for bit: numpy's legacy generator draws n / 2 rows of each label in the order
    of the classes, then the queries from all other rows; demonstrations in the order of the data set, queries in that
    of the draw."""
    if contexts > 1 or len(labels) != 2 or n % 2:
        raise RecipeError(
            "the paper's sampling knows one context, two labels and an even number of demonstrations",
            expected="contexts = 1, two labels, an even n",
            found=f"contexts = {contexts}, {len(labels)} labels, n = {n}",
            fix='use mode = "clean"',
        )
    random = np.random.RandomState(seed)  # the generator behind np.random.seed, without touching the global one
    demos: set[int] = set()
    for label in labels:
        where = [i for i, row in enumerate(rows) if row.fields["label"] == label]
        if len(where) < n // 2:
            raise _too_few(f"rows of label {label}", n // 2, len(where))
        demos.update(int(i) for i in random.choice(where, n // 2, replace=False))
    others = [i for i in range(len(rows)) if i not in demos]
    if len(others) < queries:
        raise _too_few("rows beside the demonstrations", queries, len(others))
    asked = random.choice(others, queries, replace=False)
    return Draw((tuple(rows[i] for i in sorted(demos)),), tuple(rows[int(i)] for i in asked))


def held_out(
    rows: Sequence[Row], *, limit: int, seed: int, mode: Literal["clean", "paper-first", "paper-shuffled"] = "clean"
) -> list[Row]:
    """Evaluation rows; `limit` 0 means all.

    `clean`: a random sample, in the order of the data set. The paper's code takes the first rows in domain
    (`paper-first`), and HANS after a shuffle with the run's seed + 1 (`paper-shuffled`, in the shuffled order).
    """
    most = limit or len(rows)
    if mode == "paper-first":
        return list(rows[:most])
    if mode == "paper-shuffled":
        return [rows[i] for i in np.random.default_rng(seed + 1).permutation(len(rows))[:most]]
    return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:most])]


def without(rows: Sequence[Row], others: Iterable[Row]) -> tuple[list[Row], int]:
    """(the rows whose text is in none of `others` and did not occur before, how many were left out)."""
    seen = {text_key(row) for row in others}
    kept = []
    for row in rows:
        key = text_key(row)
        if key not in seen:
            kept.append(row)
            seen.add(key)
    return kept, len(rows) - len(kept)


def text_key(row: Row) -> tuple[str, ...]:
    """The same for rows whose texts differ in case, spaces and Unicode form only. Of a pair, the order matters."""
    return tuple(query_key(row.fields[name]) for name in ("text", "text1", "text2") if name in row.fields)


def _too_few(what: str, expected: int, found: int) -> DataError:
    return DataError(
        f"not enough {what}", expected=f"at least {expected}", found=str(found), fix="ask for fewer, or give more rows"
    )
