"""The playground without a browser: what a message brings, and what the server refuses."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tiny
from ctxdistill import pipeline, playground
from ctxdistill.errors import RunError
from ctxdistill.playground import Runs, _Guard, respond, serve
from ctxdistill.recipe import Recipe
from ctxdistill.session import Token

HOSTILE = "<img src=x onerror=alert(1)></div><script>alert(2)</script> ${alert(3)} {{ 7 * 7 }} \u202egnp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("job")
    (folder / "model").symlink_to(llama)
    raw = tiny.recipe_dict(folder, name=HOSTILE.replace("/", ""), cost={"per_million_tokens": 2.0})
    tiny.write_jsonl(
        folder / "eval.jsonl",
        [{"prompt": f"please say {w}", "answer": f"{HOSTILE} {w}"} for w in ("ant", "bee", "cat")],
    )
    pipeline.distill(Recipe.from_dict(raw, base_dir=folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    return Runs([folder])


class Tags(HTMLParser):
    """Which elements there are, and that they are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.open.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_message_brings_answers_costs_and_differences(runs: Runs) -> None:
    steps = list(respond(runs[0], "please say ant", 1.0))
    assert 'aria-busy="true"' in steps[0] and 'aria-busy="false"' in steps[-1]
    last = steps[-1]
    teacher, student = runs[0].pair("please say ant").teacher, runs[0].pair("please say ant").student
    assert f"<dd>{len(student)} ({100 * len(student) / len(teacher):.0f} % of the teacher&#39;s)</dd>" in last
    assert f"{2.0 * len(teacher) / 1e6:.6f}" in last
    ids = next(p for p in runs[0].answer("please say ant") if p.arm == "in_context" and hasattr(p, "ids")).ids
    assert len(re.findall(r'class="k k\d" tabindex="0"', last)) == len(ids)
    assert last.count("<code") == len(ids) * 10


def test_text_of_models_and_data_is_never_markup(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = [Token(HOSTILE, 3.0, ((HOSTILE, 0.5),), ((HOSTILE, 0.5),))]
    monkeypatch.setattr(runs[0], "differences", lambda *_, **__: hostile)
    html = list(respond(runs[0], "please say ant", 1.0))[-1] + runs.head(0)
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") + html.count("&lt;img␣src=x␣onerror=alert(1)&gt;") >= 5
    assert Tags(html).found <= {
        "div",
        "p",
        "bdi",
        "section",
        "header",
        "b",
        "span",
        "dl",
        "dt",
        "dd",
        "h1",
        "h2",
        "code",
    }
    assert "\u202e" not in html


def test_what_cannot_be_answered_is_said_on_the_page(runs: Runs) -> None:
    (long,) = respond(runs[0], "x" * 20_001, 1.0)
    assert 'role="alert"' in long and "at most 20,000 characters" in long and "20,001" in long
    (unfit,) = respond(runs[0], "x" * 600, 1.0)
    assert 'role="alert"' in unfit and "does not fit the model" in unfit


def test_runs_must_be_finished(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        Runs([folder, tmp_path / "none"])
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(RunError, match=r"evaluation\.json is missing"):
        Runs([folder, tmp_path])


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200), ("/config", 200), ("/assets/a.js", 200), ("/gradio_api/queue/join", 200),
        ("/gradio_api/file=/etc/hostname", 404), ("/gradio_api/upload", 404), ("/gradio_api/proxy=https://example.org", 404),
        ("/docs", 404), ("/gradio_api/run/predict", 404), ("/monitoring", 404),
    ],
)  # fmt: skip
def test_only_what_the_page_needs_is_there(path: str, status: int) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(_Guard(inner)({"type": "http", "path": path}, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == status
    if status == 200:
        policy = dict(sent[0]["headers"])[b"content-security-policy"].decode()
        assert "default-src 'self';" in policy and "http" not in policy


def test_without_gradio_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RunError, match=r"ctxdistill\[playground\]"):
        serve([folder])


def test_an_address_in_use_is_an_error(folder: Path) -> None:
    pytest.importorskip("gradio", reason="the extra playground is not installed")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(RunError, match="--port"):
            serve([folder], port=other.getsockname()[1])


def test_every_colour_that_is_named_exists() -> None:
    css = "".join((Path(playground.__file__).parent / name).read_text() for name in ("base.css", "playground.css"))
    assert [c for c in playground.COLOURS.values() if f"--{c}:" not in css] == []
