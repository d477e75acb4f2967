"""Text from a server: order, retries, errors that say what is wrong, a key that nobody sees."""

from __future__ import annotations

from typing import Any

import pytest

from ctxdistill.endpoint import Endpoint, is_loopback
from ctxdistill.errors import ModelError, RecipeError
from server import completion, serve

KEY = "sk-very-secret-0123456789"
ASK = [[{"role": "user", "content": f"say {i}"}] for i in range(12)]


def echo(body: dict[str, Any], number: int) -> tuple[int, Any, dict[str, str]]:
    return 200, completion(body["messages"][-1]["content"].upper(), "length" if "7" in str(body) else "stop"), {}


def endpoint(url: str, pauses: list[float] | None = None, **more: Any) -> Endpoint:
    return Endpoint(url, "big", wait=(pauses if pauses is not None else []).append, **more)


def test_texts_come_in_order_with_their_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with serve(echo) as (url, seen):
        found = endpoint(url, key_variable="SOME_KEY", temperature=0.5, max_new_tokens=9).write(ASK, range(100, 112))
    assert [text for text, _ in found] == [f"SAY {i}" for i in range(12)]
    assert {r["path"] for r in seen} == {"/v1/chat/completions"}
    assert {r["headers"]["Authorization"] for r in seen} == {f"Bearer {KEY}"}
    by_text = {r["body"]["messages"][0]["content"]: r["body"] for r in seen}
    assert by_text["say 3"] == {
        "model": "big", "messages": ASK[3], "temperature": 0.5, "max_tokens": 9, "seed": 103,
    }  # fmt: skip
    assert [i for i, (_, ended) in enumerate(found) if not ended] == [7]


def test_a_server_on_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serve(lambda body, number: (200, completion("yes"), {})) as (url, seen):
        for address in (url, url.replace("127.0.0.1", "localhost")):
            assert endpoint(address).write([[]], [0]) == [("yes", True)]
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.2", True),
        ("http://[::1]:80/v1", True),
        ("http://localhost.example.org/v1", False),
        ("http://10.0.0.1:8000", False),
        ("http://[::1", False),
    ],
)
def test_which_addresses_are_this_machine(url: str, local: bool) -> None:
    assert is_loopback(url) is local


def test_what_may_pass_is_tried_again_with_pauses() -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, Any, dict[str, str]]:
        return [(503, "busy", {}), (429, "slow down", {"Retry-After": "17"}), (500, "", {}), echo(body, 0)][number]

    pauses: list[float] = []
    with serve(answer) as (url, seen):
        assert endpoint(url, pauses).write(ASK[:1], [0]) == [("SAY 0", True)]
    assert pauses == [1.0, 17.0, 4.0] and len(seen) == 4 and "Authorization" not in seen[0]["headers"]


def test_it_gives_up_and_says_why_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)

    def answer(body: dict[str, Any], number: int) -> tuple[int, Any, dict[str, str]]:
        return 401, f"no such key: {KEY}".encode(), {}

    with serve(answer) as (url, seen), pytest.raises(ModelError) as caught:
        endpoint(url, key_variable="SOME_KEY").write(ASK[:1], [0])
    assert len(seen) == 1  # a wrong key does not get better
    assert "HTTP status 401: no such key: ***" in str(caught.value) and KEY not in str(caught.value)
    pauses: list[float] = []
    with serve(lambda b, n: (503, "busy", {})) as (url, seen), pytest.raises(ModelError, match="tried 3 times"):
        endpoint(url, pauses, retries=2).write(ASK[:1], [0])
    assert len(seen) == 3 and pauses == [1.0, 2.0]
    with pytest.raises(ModelError, match=r"tried 1 times"):
        endpoint("http://127.0.0.1:9", retries=0).write(ASK[:1], [0])  # nobody listens


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with serve(echo) as (other, elsewhere):
        move = (307, "", {"Location": f"{other}/chat/completions"})
        with serve(lambda b, n: move) as (url, _), pytest.raises(ModelError, match="HTTP status 307"):
            endpoint(url, key_variable="SOME_KEY").write(ASK[:1], [0])
    assert elsewhere == []


@pytest.mark.parametrize(
    "value", [b"<html>", {"choices": []}, {"choices": [{"message": {"content": None}}]}, {"error": "x"}, [1], b"\xff"]
)
def test_an_answer_of_another_form(value: Any) -> None:
    with serve(lambda b, n: (200, value, {})) as (url, _), pytest.raises(ModelError, match="not a chat completion"):
        endpoint(url).write(ASK[:1], [0])


@pytest.mark.parametrize("value", [None, "", "two\nlines", "schlüssel"])
def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(RecipeError, match="SOME_KEY") as caught:
        endpoint("http://127.0.0.1:9", key_variable="SOME_KEY").write(ASK[:1], [0])
    assert not value or value not in str(caught.value)
