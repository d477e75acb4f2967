"""Rows that were written for other tools, and the recipe that reads them as they are.

In: a data file. Out: the format that it has, in words, and the text of a recipe whose keys name its columns. Invariants: a
format is recognised by its columns, which every row must have, and never by a part of the rows; what goes where is said;
the recipe that is returned has been read, with its rows.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxdistill import rows as data
from ctxdistill.errors import DataError, several
from ctxdistill.readers import must_be_file
from ctxdistill.recipe import Recipe

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Format:
    """How a tool writes its rows: `columns` that all rows have, and what they become."""

    name: str
    columns: tuple[str, ...]
    context: Mapping[str, str]
    """Keys of `[context]`; empty where the rows hold none."""
    queries: Mapping[str, str]
    """Keys of `[queries]`."""
    remarks: tuple[str, ...]
    """What goes where, for people."""


CONVERSATION = {"messages": "messages", "turns": "conversation"}
FORMATS = (
    Format(
        "TRL self-distillation (SDFT): prompt, privileged_context",
        ("prompt", "privileged_context"),
        {"column": "privileged_context"},
        {"prompt": "prompt"},  # or messages, where they are lists
        ("privileged_context becomes the teacher's system prompt (TRL writes it behind the question)",),
    ),
    Format(
        "ms-swift with a teacher prompt: messages, teacher_prompt",
        ("messages", "teacher_prompt"),
        {"teacher_prompt": "teacher_prompt"},
        {"messages": "messages", "turns": "answered"},
        ("teacher_prompt is the teacher's whole prompt", "a last assistant's turn is the row's answer"),
    ),
    Format(
        "bakery with a prefix of each row: messages, prefix_messages",
        ("messages", "prefix_messages"),
        {"column": "prefix_messages"},
        {"messages": "messages", "turns": "answered"},
        ("prefix_messages come before the teacher's query", "a last assistant's turn is the row's answer"),
    ),
    Format(
        "bakery: prompt, response", ("prompt", "response"), {}, {"prompt": "prompt", "answer": "response"},
        ("response is the row's answer",),
    ),
    Format(
        "OpenAI fine-tuning (and ms-swift, TRL): messages", ("messages",), {}, CONVERSATION,
        ("a first system turn is the teacher's context, and not the student's", "a last assistant's turn is the row's answer"),
    ),
)  # fmt: skip
"""The first whose columns are there is the one: those with more columns come first."""


def recognise(path: Path) -> tuple[Format, Rows]:
    """The format of a data file, and its rows.

    Raises: `DataError` when the file cannot be read, no format fits, or some rows lack a column of it.
    """
    rows = data.read_rows(path)
    known = {name for row in rows for name in row}
    found = next((f for f in FORMATS if set(f.columns) <= known), None)
    if found is None:
        raise DataError(
            f"{path}: no format is recognised",
            expected="; ".join(f.name for f in FORMATS),
            found=f"columns {', '.join(sorted(known)) or 'none'}",
            fix="write a recipe with `ctxdistill init` and name the columns in it: docs/recipe.md",
        )
    lacking = [f"row {n}: no {c}" for n, row in enumerate(rows, 1) for c in found.columns if row.get(c) is None]
    if lacking:
        raise several(DataError, f"{path} looks like {found.name}, but", lacking, fix="mend or remove these rows")
    return found, rows


def recipe_for(path: Path, recipe: Path, *, model: str = MODEL, context: Path | None = None) -> tuple[str, list[str]]:
    """The text of a recipe at `recipe` that reads the rows at `path`, and what to tell the person.

    Args:
        context: a text file with the system prompt, for rows that hold none.

    Raises: `DataError` as `recognise`, when there is no context or two, and when the rows cannot be read with it.
    """
    form, rows = recognise(path)
    shown = [f"recognised: {form.name} ({len(rows):,} rows)", *form.remarks]
    queries, kept, remarks = dict(form.queries), dict(form.context), list[str]()
    if isinstance(rows[0].get("prompt"), list):
        queries = {"messages": queries.pop("prompt"), **queries}
    if form.context.get("teacher_prompt"):
        _check_whole(path, rows)
    if queries.get("turns") == "conversation":
        kept, remarks = _system_of(path, rows)
    if bool(kept) == (context is not None):
        raise DataError(
            f"{path}: {'the rows have a context of their own' if kept else 'the rows hold no context'}",
            expected="one context: in the rows, or the system prompt as a text file",
            found="both" if kept else "neither",
            fix="leave --context out" if kept else "name the system prompt's file: --context system.txt",
        )
    here = recipe.absolute().parent
    if context is not None:
        must_be_file(context, "--context")
        kept = {"system_file": os.path.relpath(context.absolute(), here)}
    used = {queries.get(key, "") for key in ("prompt", "messages", "answer")} | set(form.columns)
    if unused := sorted({name for row in rows for name in row} - used - set(kept.values())):
        remarks.append(f"columns that are not used: {', '.join(unused)}")
    text = _text(form, os.path.relpath(path.absolute(), here), model, kept, queries)
    made = Recipe.from_dict({"name": recipe.stem, **tomllib.loads(text)}, base_dir=here)
    data.read(made.queries, made, "queries")  # as `distill` will
    return text, shown + remarks


def _check_whole(path: Path, rows: Rows) -> None:
    """A teacher's prompt as a text is its one user's turn, so the student's query must be one, too."""
    problems = []
    for number, row in enumerate(rows, 1):
        roles = (
            [m.get("role") for m in row["messages"] if isinstance(m, dict)] if isinstance(row["messages"], list) else []
        )
        if isinstance(row["teacher_prompt"], str) and roles not in (["user"], ["user", "assistant"]):
            problems.append(
                f"row {number}: turns {', '.join(map(str, roles))}, of which a teacher_prompt in text holds none"
            )
    if problems:
        fix = "write teacher_prompt as a list of messages that holds the whole prompt, system turn and history included"
        raise several(DataError, f"{path}", problems, fix=fix)


def _system_of(path: Path, rows: Rows) -> tuple[dict[str, str], list[str]]:
    """Keys of `[context]` for conversations: the one system text, or the column that holds each row's."""
    firsts = [row["messages"][0] if isinstance(row["messages"], list) and row["messages"] else {} for row in rows]
    texts = [m.get("content") if isinstance(m, dict) and m.get("role") == "system" else None for m in firsts]
    if strange := [n for n, text in enumerate(texts, 1) if not isinstance(text, str | None)]:
        raise DataError(f"{path}: the system turn of row {strange[0]} holds no text", expected="a text as its content")
    without = texts.count(None)
    if without == len(texts):
        return {}, []
    if without:
        raise DataError(
            f"{path}: {without} of {len(texts)} rows have no system turn",
            expected="a system turn in each row, or in none",
            fix="put the same system turn into all rows, or take it out and give it with --context",
        )
    if len(set(texts)) == 1:
        return {"system": str(texts[0])}, ["all rows have the same system turn: it is the recipe's context.system"]
    return {"column": "system"}, [
        f"the rows have {len(set(texts))} different system turns: each row has its own context"
    ]


def _text(form: Format, file: str, model: str, context: Mapping[str, str], queries: Mapping[str, str]) -> str:
    def keys(values: Mapping[str, str]) -> str:
        return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())

    answers = queries.get("answer") or queries.get("turns")
    return (
        f"# Rows of {form.name}.\n# All keys: docs/recipe.md. Relative paths start at this file's folder.\n\n"
        f"[model]\nname = {_toml(model)}  # hub id, local folder or .gguf file\n\n"
        f"[context]\n# What the teacher sees and the student does not.\n{keys(context)}\n"
        f"[queries]\ndata = {_toml(file)}\n{keys(queries)}# duplicates = \"drop\"  # keep the first of repeated queries\n\n"
        "[completions]\nmax_new_tokens = 128                # longest answer; those that reach it are counted in the report\n"
        + ('# source = "data"                   # learn on the rows\' own answers instead of the teacher\'s\n' if answers else "")
        + "\n[eval]\nshare = 0.15                        # held out from the rows\nmax_new_tokens = 128\n"
    )  # fmt: skip


def _toml(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
