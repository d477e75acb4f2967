"""Sequences in files: what comes back is what went in, and little of it is in memory."""

from __future__ import annotations

import datetime
import math
from pathlib import Path

import pytest

from ctxdistill import spool
from ctxdistill.errors import RunError
from ctxdistill.spool import IdPairs, Lazy, Records, after, joined

ROWS = [(f"a.jsonl:{i}", {"prompt": f"say {i} \ud800 ü", "n": i, "deep": [{"x": None}, 1.5]}) for i in range(50)]


@pytest.mark.parametrize("buffer", [1, 100, 2**20])  # every item, some, none on the disk
def test_records_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch, buffer: int) -> None:
    monkeypatch.setattr(spool, "BUFFER", buffer)
    rows = Records()
    for number, row in enumerate(ROWS):
        rows.append(row)
        assert rows[number] == row and len(rows) == number + 1
    assert list(rows) == ROWS and rows[3:5] == ROWS[3:5] and rows[-1] == ROWS[-1] and rows[::-7] == ROWS[::-7]
    assert (rows.file is None) == (buffer == 2**20)
    with pytest.raises(IndexError):
        rows[50]


def test_what_json_would_change_stays_as_it_is() -> None:
    odd = [("a", {"day": datetime.date(2020, 1, 2)}), ("b", {"pairs": [("x", 1)]}), ("c", {"nan": math.nan}), ROWS[0]]
    rows = Records()
    rows.extend(odd)
    assert rows[0][1]["day"] == datetime.date(2020, 1, 2) and rows[1][1]["pairs"] == [("x", 1)]
    assert math.isnan(rows[2][1]["nan"]) and rows[3] == ROWS[0] and list(rows.odd) == [0, 1, 2]


def test_what_prompts_begin_with_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "BUFFER", 64)
    context = tuple(range(1000, 3000))
    items = [
        ((*context, 1, 2), (1, 2)),
        ((*context, 7), (7, 8, 9)),
        ((*context[:5], 4), ()),
        (context, (3,)),
        ((), (5,)),
    ]
    pairs = IdPairs()
    pairs.extend(items)
    assert list(pairs) == items
    assert pairs.ends[-1] < 1.1 * 4 * len(context)  # of four prompts with the context


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spool, "BUFFER", 1)
    rows = Records()
    rows.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 (the spool's own to close)
    with pytest.raises(RunError, match=r"(?s)No space left.*TMPDIR"):
        rows.append(ROWS[0])


def test_lazy_items_are_made_when_asked_for() -> None:
    made: list[int] = []
    lazy = Lazy(range(10, 20), lambda i: made.append(i) or i * i)
    assert len(lazy) == 10 and not made
    assert lazy[2] == 144 and lazy[-1] == 361 and lazy[1:3] == [121, 144] and made == [12, 19, 11, 12]
    assert list(Lazy.over("abc", str.upper)) == ["A", "B", "C"]
    assert list(after("abcd", 2)) == ["c", "d"] and list(after("ab", 3)) == [] and after("ab", 0) == "ab"
    assert list(joined([1, 2], [3])) == [1, 2, 3] and joined([1, 2], []) == [1, 2] and joined([1], [2])[-1] == 2
