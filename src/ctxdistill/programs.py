"""Code that a model wrote: found in its answer, and run against a row's tests.

In: a prediction and a row's columns. Out: 1 where all tests pass, else 0 (pass@1 of the one greedy answer). Invariants:
nothing runs that the recipe did not allow (`code.run`), and then only in the sandbox; tests that are not Python are an
error of the data, and no failure of the model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from ctxdistill import sandbox
from ctxdistill.errors import DataError
from ctxdistill.recipe import CodeSection

METRIC = "pass_at_1"
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = {"", "py", "python", "python3"}


def code_of(answer: str) -> str:
    """The program in an answer: the first fenced block that is marked as Python or not marked (up to the end, where the
    fence is not closed), or the whole answer where there is none."""
    blocks = (block[2] for block in FENCE.finditer(answer) if block[1].lower() in PYTHON)
    return next(blocks, answer)


def tests_of(row: Mapping[str, Any], section: CodeSection) -> tuple[list[str], list[str]]:
    """(tests, setup) of a row, each a list of statements; both empty where the row has no tests.

    Raises: `DataError` for a column that is no text and no list of texts, and for what is not Python.
    """
    tests, setup = (_statements(row, column) for column in (section.tests, section.setup))
    return (tests, setup) if tests else ([], [])


def _statements(row: Mapping[str, Any], column: str | None) -> list[str]:
    value = row.get(column) if column else None
    texts = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"the column {column!r} does not hold tests", expected="a text, or a list of texts", found=repr(value)[:80]
        )
    for text in texts:
        try:
            ast.parse(text)
        except (SyntaxError, ValueError) as error:
            raise DataError(
                f"the column {column!r} holds what is not Python: {error}",
                expected="statements such as assert f(1) == 2",
                found=repr(text)[:80],
            ) from None
    return [text for text in texts if text.strip()]


def pass_at_1(prediction: str, row: Mapping[str, Any], section: CodeSection) -> float | None:
    """1 where the program in `prediction` passes all tests of the row, else 0; None for a row without tests.

    Raises: `RunError` where programs cannot be run in the sandbox of this system.
    """
    tests, setup = tests_of(row, section)
    if not tests:
        return None
    sandbox.isolation()  # else every program would fail
    limits = sandbox.Limits(seconds=section.seconds, memory_mb=section.memory_mb)
    return float(sandbox.run(code_of(prediction), tests, setup, limits).passed)
