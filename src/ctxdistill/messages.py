"""A message of a conversation, and the arguments of the tools that it calls.

In: a message as a file holds it. Out: the same for chat templates, or for servers. Invariant: nothing but the form of
tool calls' arguments is ever changed: templates get objects, and servers texts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

from ctxdistill import files

Message = dict[str, Any]
"""`role` and `content`, as chat templates take them; other keys pass through, and `tool_calls` with their arguments as objects."""


def said(message: Message) -> str:
    """A message's text; empty for one that only calls a tool."""
    return str(message.get("content") or "")


def with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """The message with the arguments of its tool calls `change`d."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**called, "arguments": change(called["arguments"])}}
        if isinstance(called := call.get("function"), dict) and "arguments" in called
        else call
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def as_object(arguments: Any) -> Any:
    """Arguments of a tool call as chat templates take them: OpenAI's clients write the object as a text, which a template
    that writes JSON would quote once more. What is no object in JSON stays."""
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            found = files.parse_json(arguments)
            return found if isinstance(found, dict) else arguments
    return arguments


def as_text(arguments: Any) -> Any:
    """Arguments of a tool call as OpenAI-compatible servers take them."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
