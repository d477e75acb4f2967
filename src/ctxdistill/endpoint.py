"""Answers of an OpenAI-compatible server, such as vLLM.

In: requests, or chat messages with a seed each. Out: answers, or a text per conversation, and whether it ended by itself.
Invariants: the API key comes from an environment variable, goes into one header and nowhere else; redirects, which would
carry it to another host, are not followed; an answer is bounded in size; what may pass is tried again with growing pauses.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ctxdistill import files
from ctxdistill.errors import ModelError, RecipeError

MAX_BYTES = 4_000_000
"""Largest answer that is read."""
LONGEST_PAUSE = 60.0
AT_ONCE = 8
"""Requests under way together."""
WRONG = (ValueError, KeyError, IndexError, TypeError, AttributeError)
"""What reading an answer of another form raises."""
T = TypeVar("T")
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses that may pass."""


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, or no address at all
        return False


def opener_of(url: str, *handlers: Any) -> urllib.request.OpenerDirector:
    """What opens `url`: through the proxy that the environment names, but on this machine without: a proxy may not reach it."""
    direct = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
    return urllib.request.build_opener(*direct, *handlers)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # then it is an error like any other status


@dataclass(frozen=True)
class Server:
    """`POST {url}/...` for one model.

    Args:
        url: the base, such as `http://localhost:8000/v1`.
        key_variable: name of the environment variable with the API key, if the server wants one.
        section: of the recipe, where all this is set.
        wait: sleeps so many seconds.
    """

    url: str
    model: str
    key_variable: str | None = None
    retries: int = 5
    timeout: float = 120.0
    section: str = "synthesis"
    wait: Callable[[float], None] = time.sleep

    @property
    def name(self) -> str:
        """What answers, for people."""
        return f"{self.model} at {self.url}"

    def key(self) -> str:
        """The API key, "" without one. Raises: `RecipeError` when its variable is not set."""
        if self.key_variable is None:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise RecipeError(
                f"the environment variable {self.key_variable}, which {self.section}.key_variable names, holds no API key",
                expected="a key of printable ASCII characters",
                fix=f"export {self.key_variable}=..., or remove {self.section}.key_variable",
            )
        return key

    def ask(self, path: str, body: dict[str, Any], read: Callable[[Any], T], *, key: str, most: int = MAX_BYTES) -> T:
        """What `read` makes of the answer, which it refuses with the errors of `WRONG`. Tried again while that may help.

        Raises: `ModelError` when the server does not answer as expected.
        """
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/{path}", json.dumps(body).encode(), headers, method="POST"
        )
        opener = opener_of(self.url, _NoRedirect)
        for tried in range(self.retries + 1):
            pause = min(LONGEST_PAUSE, 2.0**tried)
            try:
                with opener.open(request, timeout=self.timeout) as response:
                    raw = response.read(most + 1)
                if len(raw) > most:
                    raise ValueError("the answer is too large")
                return read(files.parse_json(raw.decode()))
            except urllib.error.HTTPError as error:
                with error:
                    found = f"HTTP status {error.code}: {_start(error.read(2000), key)}"
                if error.code not in PASSING:
                    raise self.failed(path, found) from None
                asked = error.headers.get("Retry-After") or ""
                pause = min(LONGEST_PAUSE, float(asked)) if asked.isdigit() else pause
            except (
                urllib.error.URLError,
                OSError,
                http.client.HTTPException,
            ) as error:  # no connection, or a broken one
                found = f"{type(error).__name__}: {_start(str(error).encode(), key)}"
            except WRONG as error:
                said = _start(f"{type(error).__name__}: {error}".encode(), key)
                found = f"an answer that is not a {path.rstrip('s').replace('/', ' ')} ({said})"
            if tried < self.retries:
                self.wait(pause)
        raise self.failed(path, f"{found} (tried {self.retries + 1} times)")

    def failed(self, path: str, found: str) -> ModelError:
        return ModelError(
            f"the server at {self.url} does not write",
            expected=f"POST {self.url.rstrip('/')}/{path} to answer with a completion of {self.model}",
            found=found,
            fix=f"check {self.section}.endpoint, endpoint_model and key_variable; what was written so far is kept",
        )


@dataclass(frozen=True)
class Endpoint(Server):
    """A server that writes texts."""

    temperature: float = 0.9
    max_new_tokens: int = 64

    @property
    def identity(self) -> list[Any]:
        """What a text depends on beside messages and seed."""
        return [self.url, self.model, self.temperature, self.max_new_tokens]

    def write(self, conversations: Sequence[Sequence[dict[str, Any]]], seeds: Sequence[int]) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) for each conversation, in order.

        Raises: `RecipeError` when the key's variable is not set, `ModelError` when the server does not answer as expected.
        """
        key = self.key()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda messages, seed: self._one(messages, seed, key), conversations, seeds))

    def _one(self, messages: Sequence[dict[str, Any]], seed: int, key: str) -> tuple[str, bool]:
        body = {
            "model": self.model, "messages": list(messages), "temperature": self.temperature,
            "max_tokens": self.max_new_tokens, "seed": seed % 2**31,
        }  # fmt: skip
        return self.ask("chat/completions", body, _text, key=key)


def _text(answer: Any) -> tuple[str, bool]:
    choice = answer["choices"][0]
    text, reason = choice["message"]["content"], choice.get("finish_reason")
    if not isinstance(text, str):
        raise ValueError("the content is no text")
    return text, reason != "length"


def _start(raw: bytes, key: str) -> str:
    """The beginning of what a server said, on one line, without the key that it may repeat."""
    text = " ".join(raw.decode("utf-8", errors="replace").split())
    return (text.replace(key, "***") if key else text)[:200]
