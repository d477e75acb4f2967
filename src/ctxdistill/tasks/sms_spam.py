"""SMS Spam Collection (Almeida et al. 2011): 5,574 messages, 747 of them spam.

The collection has no official split. Here about a fifth is for evaluation: the messages the hash of whose text (without
regard to case and spaces, so that copies of a message stay on one side) is divisible by 5.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

from ctxdistill.readers import Record, lines
from ctxdistill.rows import Row, query_key
from ctxdistill.tasks.source import Hub, Local, Source
from ctxdistill.tasks.task import Pattern, Task

LABELS = ("ham", "spam")
COUNTS = {"ham": 4827, "spam": 747}


def held_out(row: Row) -> bool:
    """Whether the message is for evaluation."""
    digest = hashlib.sha256(query_key(row.fields["text"]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 5 == 0


def _train(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not held_out(row)]


def _evaluation(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if held_out(row)]


def _read(path: Path, most: int, problems: list[str]) -> tuple[list[Record], int]:
    """Label, tab, message; copies of the file that went through a spreadsheet have three empty columns more, and quotes
    around some messages."""
    records: list[Record] = []
    for number, line in lines(path, problems):
        label, _, text = line.rstrip("\r\n").partition("\t")
        if "\t" in text:
            text = next(csv.reader([text], "excel-tab"))[0]
        records.append((f"{path.name}:{number}", {"label": label, "text": text}))
    return records[: most or None], len(records)


def _source(name: str, choose: str) -> Source:
    part = {"train": _train, "evaluation": _evaluation}[choose]
    return Source(
        name=name,
        labels=LABELS,
        local=Local(file="sms_spam/SMSSpamCollection", read=_read, counts=COUNTS, choose=part),
        hub=Hub(path="ucirvine/sms_spam", config="plain_text", columns=("sms",), counts=COUNTS, choose=part),
    )


TASK = Task(
    name="sms_spam",
    version=1,
    title="SMS spam",
    labels=LABELS,
    train=_source("SMS spam, four fifths", "train"),
    evaluation=_source("SMS spam, one fifth", "evaluation"),
    patterns={"default": Pattern("Message: {text}\nType:", {"ham": "normal", "spam": "spam"})},
)
