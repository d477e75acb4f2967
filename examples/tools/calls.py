"""Is an answer a call of a tool, of the right one, with the right arguments? Metrics and a checker for `recipe.toml`.

In: (answer, reference, row). Out: 1 or 0, or None where there is no reference.
"""

from __future__ import annotations

import json
from typing import Any


def _call(text: str) -> dict[str, Any] | None:
    """The call that a whole answer is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    well_formed = (
        isinstance(value, dict) and set(value) == {"tool", "arguments"} and isinstance(value["arguments"], dict)
    )
    return value if well_formed else None


def valid(answer: str, reference: str | None, row: Any) -> float:
    """One JSON object with a tool and its arguments, and nothing around it."""
    return float(_call(answer) is not None)


def right_tool(answer: str, reference: str | None, row: Any) -> float | None:
    """The tool of the reference, whatever the arguments."""
    call = _call(answer)
    return None if reference is None else float(call is not None and call["tool"] == json.loads(reference)["tool"])


def right_call(answer: str, reference: str | None, row: Any) -> float | None:
    """Tool and arguments of the reference; `1` and `true` are not the same, the order of keys does not matter."""
    call = _call(answer)
    if reference is None or call is None:
        return None if reference is None else 0.0
    return float(json.dumps(call, sort_keys=True) == json.dumps(json.loads(reference), sort_keys=True))
