"""A local page where base model, teacher and student answer side by side.

In: folders of finished runs. Out: a server of this machine alone, unless another address is asked for. Invariants: the
page loads nothing from elsewhere, and the server answers only the paths that the page needs, so that it reads and writes
no files; all text from models and data is escaped by the template; what a person can cause is a message on the page.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ctxdistill.errors import CtxDistillError, DataError, RunError
from ctxdistill.report import environment
from ctxdistill.results import HEAT, arm_label, cells, verdict
from ctxdistill.rundir import RunDir
from ctxdistill.session import Answer, Piece, Session, Token

MOST = 20_000
"""Characters of a message."""
LARGEST = 1_000_000
"""Bytes of a request."""
SHOWN = 8
"""Held-out rows to click."""
STRONGEST = 1.5
PAUSE = 0.05
"""Seconds between two updates of the page while an answer is written."""
TITLES = {"zero_shot": "base model", "in_context": "teacher, with the context", "distilled": "student"}
LOCAL = ("127.0.0.1", "localhost", "::1")
OPEN = (
    "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/assets/", "/static/",
    "/gradio_api/queue/", "/gradio_api/heartbeat/", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/info",
    "/gradio_api/app_id", "/gradio_api/theme.css", "/gradio_api/startup-events",
)  # fmt: skip
"""What the page needs of the server, beside itself; the rest (uploads, files, proxies) is not there."""
COLOURS = {
    "body_background_fill": "page", "body_text_color": "ink", "body_text_color_subdued": "soft",
    "block_background_fill": "card", "block_border_color": "line", "block_label_text_color": "ink",
    "block_title_text_color": "ink", "block_info_text_color": "soft", "input_background_fill": "tint",
    "input_placeholder_color": "soft", "slider_color": "student",
    "button_primary_background_fill": "send", "button_primary_background_fill_hover": "send",
}  # fmt: skip
"""Gradio's colours, named as in `base.css`."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""What the browser may load, whatever the page says: nothing from elsewhere."""


class Runs:
    """Finished runs by number; one of them at a time has its model in memory."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        """Raises: `RunError` for a folder that is not a finished run, `ModelError` when the first one's model is not there."""
        self.folders = [RunDir.existing(folder) for folder in folders]
        self.evaluations = [folder.read_json("evaluation.json") for folder in self.folders]
        self.current, self.session = 0, Session.load(self.folders[0].path)

    @property
    def names(self) -> list[str]:
        return [str(folder.path) for folder in self.folders]

    def __getitem__(self, number: int) -> Session:
        if number != self.current:
            self.session = Session.load(self.folders[number].path, before=self.session)
            self.current = number
        return self.session

    def head(self, number: int) -> str:
        """The run in a few words, as HTML."""
        session, evaluation = self[number], self.evaluations[number]
        about = {
            "name": session.recipe.name or "unnamed",
            "model": Path(session.recipe.model.name).name,
            "context_tokens": max(0, (evaluation.get("gate") or {}).get("context_tokens", 0)),
            "verdict": verdict(evaluation)["sentence"],
        }
        return _html("head", about)


# -- what a message brings --------------------------------------------------------------------------------------------


def respond(session: Session, text: str, strength: float) -> Iterator[str]:
    """The page's part below the message, as HTML, again and again while the answers are written."""
    said: dict[str, str] = dict.fromkeys(TITLES, "")
    answers: dict[str, Answer] = {}
    try:
        if len(text) > MOST:
            raise DataError(
                "the message is too long",
                expected=f"at most {MOST:,} characters",
                found=f"{len(text):,}",
                fix="shorten it",
            )
        reference = session.pair(text).answer
        updated = 0.0
        for part in session.answer(text, strength=strength):
            if isinstance(part, Answer):
                answers[part.arm], said[part.arm] = part, part.text
            elif isinstance(part, Piece):
                said[part.arm] += part.text
            if time.monotonic() - updated > PAUSE:
                yield _view(session, said, answers, reference, strength, writing=part.arm)
                updated = time.monotonic()
        yield _view(session, said, answers, reference, strength, writing="distilled")
        tokens = session.differences(text, answers["in_context"].ids, strength=strength)
        yield _view(session, said, answers, reference, strength, tokens=tokens)
    except CtxDistillError as error:
        yield _html("alert", str(error))


def _view(
    session: Session,
    said: dict[str, str],
    answers: dict[str, Answer],
    reference: str | None,
    strength: float,
    *,
    writing: str = "",
    tokens: Sequence[Token] = (),
) -> str:
    teacher = answers.get("in_context")
    arms = [
        {
            "arm": arm,
            "title": title,
            "about": f"strength {strength:g}" if arm == "distilled" else arm_label(arm),
            "text": said[arm],
            "took": _took(answers[arm], teacher, session.recipe.cost.per_million_tokens) if arm in answers else [],
        }
        for arm, title in TITLES.items()
    ]
    heat = [f"below {HEAT[0]:g}", *(f"{a:g} to {b:g}" for a, b in pairwise(HEAT)), f"{HEAT[-1]:g} and more"]
    mean = cells("kl", {"mean": statistics.fmean(token.kl for token in tokens)}) if tokens else ""
    return _html("answers", arms, writing, reference, [_token(token) for token in tokens], f"{strength:g}", heat, mean)


def _took(answer: Answer, teacher: Answer | None, price: float) -> list[tuple[str, str]]:
    """What an answer took, and how much that is of what the teacher's took."""

    def of_teacher(own: float, whole: float) -> str:
        return f" ({100 * own / whole:.0f} % of the teacher's)" if teacher and teacher is not answer and whole else ""

    t = teacher or answer
    end = "" if answer.ended else ", stopped at the limit"
    lines = [
        ("prompt tokens", f"{answer.prompt_tokens:,}{of_teacher(answer.prompt_tokens, t.prompt_tokens)}"),
        ("answer tokens", f"{len(answer.ids):,}{end}"),
        ("time", f"{answer.seconds:.2f} s{of_teacher(answer.seconds, t.seconds)}"),
        ("computation", f"{answer.flops / 1e9:,.1f} GFLOP{of_teacher(answer.flops, t.flops)}"),
    ]
    if price:
        lines.append(("price of the prompt", f"{price * answer.prompt_tokens / 1e6:.6f}"))
    return lines


def _token(token: Token) -> dict[str, Any]:
    sides = (("teacher", "Teacher", token.teacher), ("student", "Student", token.student))
    return {
        "text": token.text.replace("\n", "↵\n"),
        "kl": cells("kl", {"mean": token.kl}),
        "level": sum(token.kl >= limit for limit in HEAT),
        "sides": [
            {"kind": kind, "title": title, "choices": [_choice(text, chance) for text, chance in choices]}
            for kind, title, choices in sides
        ],
    }


def _choice(text: str, chance: float) -> dict[str, str]:
    shown = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return {"text": shown, "chance": f"{100 * chance:.1f} %", "share": f"{100 * chance:.1f}%"}


@functools.cache
def _macros() -> Any:
    return environment("html").get_template("playground.html.j2").module


def _html(macro: str, *values: Any) -> str:
    return str(getattr(_macros(), macro)(*values))


# -- the page and its server ------------------------------------------------------------------------------------------


def page(runs: Runs) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    def examples(number: int) -> list[list[str]]:
        return [[query] for query in list(runs[number].held_out)[:SHOWN]]

    def ask(number: int, text: str, strength: float) -> Iterator[tuple[str, str]]:
        if text.strip():
            for html in respond(runs[number], text, strength):
                yield html, text

    def again(number: int, asked: str, strength: float) -> Iterator[str]:
        if asked:
            yield from respond(runs[number], asked, strength)

    def choose(number: int) -> Any:
        try:
            return runs.head(number), gr.Dataset(samples=examples(number), visible=bool(examples(number))), "", ""
        except CtxDistillError as error:
            return _html("alert", str(error)), gr.Dataset(samples=[], visible=False), "", ""

    with gr.Blocks(title="ctxdistill playground", analytics_enabled=False) as blocks:
        first, asked = examples(0), gr.State("")
        run = gr.Dropdown(
            list(zip(runs.names, range(len(runs.names)), strict=True)),
            value=0, label="Run", visible=len(runs.names) > 1, filterable=False, elem_id="run",
        )  # fmt: skip
        head = gr.HTML(runs.head(0), apply_default_css=False, elem_id="head")
        with gr.Row(equal_height=True):
            text = gr.Textbox(
                label="Message", placeholder="Type a message; Enter sends it", lines=1, max_lines=8, elem_id="message",
                scale=8, min_width=280,
            )  # fmt: skip
            send = gr.Button("Send", variant="primary", elem_id="send", scale=1, min_width=110)
        dial = gr.Slider(
            0.0, STRONGEST, value=1.0, step=0.05, label="Strength of the adapter", elem_id="strength",
            info="0 is the base model, 1 the student as it was trained; beyond 1 the change is exaggerated",
        )  # fmt: skip
        samples = gr.Dataset(
            components=[gr.Textbox(visible=False)], samples=first, visible=bool(first), label="Held-out queries",
            samples_per_page=SHOWN, elem_id="examples",
        )  # fmt: skip
        view = gr.HTML("", apply_default_css=False, elem_id="view")

        # one at a time: there is one model
        alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        gr.on([text.submit, send.click], ask, [run, text, dial], [view, asked], **alone)
        samples.click(lambda sample: sample[0], samples, text, show_progress="hidden").then(
            ask, [run, text, dial], [view, asked], **alone
        )
        dial.change(again, [run, asked, dial], view, trigger_mode="always_last", **alone)
        run.change(choose, run, [head, samples, view, asked], **alone)
    return blocks


class _Guard:
    """ASGI middleware: only the paths in `OPEN`, no large requests, and the policy on every answer. With `local`, only who
    asks for this machine by its own name: a page of the internet cannot make its name mean this machine and ask."""

    def __init__(self, app: Any, local: bool = False) -> None:
        self.app, self.local = app, local

    def refuses(self, scope: MutableMapping[str, Any]) -> int:
        """The status with which a request is refused; 0 where it is not."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope.get("headers", [])}
        host = headers.get(b"host", "").rsplit(":", 1)[0].strip("[]") or headers.get(b"host", "")
        if self.local and host not in LOCAL:
            return 421
        if scope["type"] != "http":
            return 0
        if scope["path"] != "/" and not scope["path"].startswith(OPEN):
            return 404
        length = headers.get(b"content-length", "0")
        chunked = b"transfer-encoding" in headers  # whose end nobody knows
        return 413 if chunked or not length.isdigit() or int(length) > LARGEST else 0

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = {
                    b"content-security-policy": POLICY,
                    b"referrer-policy": "no-referrer",
                    b"x-content-type-options": "nosniff",
                }
                message["headers"] = [*message.get("headers", []), *((k, v.encode()) for k, v in headers.items())]
            await send(message)

        if scope["type"] in ("http", "websocket") and (status := self.refuses(scope)):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, guarded)


def application(runs: Runs, local: bool = True) -> Any:
    """The page as an ASGI application; `local`: for those who are on this machine alone."""
    import fastapi
    import gradio as gr
    from starlette.middleware import Middleware

    colours = {f"{name}{dark}": f"var(--{colour})" for name, colour in COLOURS.items() for dark in ("", "_dark")}
    styles = environment("html").from_string('{% include "base.css" %}{% include "playground.css" %}').render()
    fonts = {
        "font": ["system-ui", "sans-serif"],
        "font_mono": ["ui-monospace", "monospace"],
    }  # of the system: none is loaded
    app = fastapi.FastAPI(middleware=[Middleware(_Guard, local=local)], docs_url=None, redoc_url=None, openapi_url=None)
    mounted: Any = gr.mount_gradio_app(
        app, page(runs), path="/", footer_links=[], run_history=False, allowed_paths=[], show_error=False, max_file_size=0,
        ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False, head=f"<style>{styles}</style>",
        theme=gr.themes.Base(primary_hue="blue", neutral_hue="slate", **fonts).set(**colours),
    )  # fmt: skip
    return mounted


def serve(
    folders: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the page until Ctrl-C; `ready` is told its address. Port 0: any that is free.

    Raises: `RunError` when Gradio is missing or the address cannot be had, and as `Runs`.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise RunError(
            "the playground needs Gradio", found=str(error), fix='pip install "ctxdistill[playground]"'
        ) from None
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError) as error:
            raise RunError(
                f"cannot listen on {host}, port {port}: {error}", fix="choose another with --port, or --port 0 for any"
            ) from None
        # an open page holds a connection for as long as it is open: Ctrl-C does not wait for that
        config = uvicorn.Config(
            application(Runs(folders), host in LOCAL), log_level="warning", timeout_graceful_shutdown=1
        )
        listening.listen()  # who comes before the server is up waits
        name = f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{listening.getsockname()[1]}/")
        server = uvicorn.Server(config)
        end = server.handle_exit

        def handle_exit(*signal: Any) -> None:
            logging.getLogger("uvicorn.error").disabled = True  # that connections are cut is no error then
            end(*signal)

        server.handle_exit = handle_exit
        server.run(sockets=[listening])
