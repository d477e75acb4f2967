"""A conversation becomes one row for each of its assistant's turns (`taught = "every"`).

In: rows with a list of messages. Out: rows whose messages end just before a turn, with the turn's text as their answer.
Invariants: a turn is asked for exactly as it will be in serving, with all that stands before it rendered by the chat
template at that point (so what a template changes in earlier turns, such as dropping their think blocks, is as in serving);
no message is changed; rows of one conversation stay together, and a turn that has no text is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctxdistill.errors import DataError, several
from ctxdistill.recipe import DataSection
from ctxdistill.rows import Row, rows_of
from ctxdistill.spool import Records

CONVERSATION = "conversation"
"""The column that says which conversation a turn is of."""


def turns(rows: Sequence[Row], section: DataSection) -> tuple[Sequence[Row], int]:
    """(a row for each taught turn, number of turns that hold a tool call and no text, which cannot be an answer).

    Raises: `DataError` that lists the conversations without a turn to teach.
    """
    if section.taught == "last" or not section.messages:
        return rows, 0
    made = Records()
    problems, silent = [], 0
    for row in rows:
        messages: list[dict[str, Any]] = row.fields[section.messages]
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant" and asked(messages[:i])]
        spoken = [i for i in places if str(messages[i].get("content") or "").strip()]
        if not spoken:
            problems.append(f"{row.origin}: no assistant's turn with a text behind a user's or tool's")
        silent += len(places) - len(spoken)
        for i in spoken:
            fields = {
                **row.fields,
                section.messages: messages[:i],
                section.answer: messages[i]["content"],
                CONVERSATION: row.id,
            }
            made.append((f"{row.origin}, message {i + 1}", fields))
    if problems:
        raise several(DataError, "conversations", problems, fix='or end them with a question, and use taught = "last"')
    return rows_of(made), silent


def asked(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether somebody waits for an answer after these messages."""
    return bool(messages) and messages[-1]["role"] in {"user", "tool"}
