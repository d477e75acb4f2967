"""The playground as a person meets it: the real server, a real browser, a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import tiny
from ctxdistill import pipeline
from ctxdistill.recipe import Recipe
from test_report_browser import LOW_CONTRAST

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytest.importorskip("gradio", reason="the extra playground is not installed")

HOSTILE = "<img src=x onerror=\"document.title='owned'\"> ${document.title='owned'} {{7*7}}"
KEYS = {"Enter": "\ue007", "Left": "\ue012", "Home": "\ue011", "Tab": "\ue004"}


class Outside:
    """Stands in for the network: a proxy that counts who comes, and lets nobody through."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._count, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def _count(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.came.append(connection.recv(200))


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    found = Outside()
    yield found
    found.socket.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, llama: Path, outside: Outside) -> Iterator[str]:
    runs = []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp(name)
        (folder / "model").symlink_to(llama)
        raw = tiny.recipe_dict(folder, name=f"{name} {HOSTILE}")
        rows = [{"prompt": p, "answer": "X"} for p in (f"please say {name}", f"say {HOSTILE}", "please say bee")]
        tiny.write_jsonl(folder / "eval.jsonl", rows)
        runs.append(str(pipeline.distill(Recipe.from_dict(raw, base_dir=folder), folder / "run").path))
    code = "import sys; from ctxdistill.cli import main; sys.exit(main())"
    environment = {**os.environ, "HTTP_PROXY": outside.url, "HTTPS_PROXY": outside.url, "NO_PROXY": ""}
    command = [sys.executable, "-c", code, "playground", *runs, "--port", "0", "--json"]
    errors = tmp_path_factory.mktemp("server") / "stderr"
    with (
        errors.open("w") as file,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True) as server,
    ):
        assert server.stdout
        try:
            yield json.loads(server.stdout.readline())["url"]
            server.send_signal(signal.SIGINT)  # Ctrl-C, while the page is open
            assert server.wait(120) in (0, 130)
            assert "Traceback" not in errors.read_text()
        finally:
            server.kill()


def until(found: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := found():
                return value
        except Exception as error:  # the page is being drawn anew
            what = f"{what} ({type(error).__name__})"[:300]
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def select(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def text_of(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def visit(browser: Any, url: str, width: int = 1280, scheme: str = "light") -> None:
    for log in ("performance", "browser"):
        browser.get_log(log)  # what came before
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(url)
    until(lambda: select(browser, "#message textarea").is_displayed(), "the page")
    assert "owned" not in browser.title


def ask(browser: Any, message: str) -> None:
    box = select(browser, "#message textarea")
    box.clear()
    box.send_keys(message, KEYS["Enter"])
    finished(browser, 1)


def finished(browser: Any, strength: float) -> None:
    """Wait until all three have answered, the student at this strength, and the tokens are compared."""
    until(lambda: text_of(browser, ".arm.distilled header .soft") == f"strength {strength:g}", f"strength {strength}")
    until(lambda: select(browser, ".differences").is_displayed(), "the differences")


def student(browser: Any) -> str:
    return text_of(browser, ".arm.distilled .text")


def mean_kl(browser: Any) -> float:
    found = re.search(r"nats, ([\d.]+) on average", text_of(browser, ".differences"))
    assert found
    return float(found[1])


def test_type_see_three_answers_and_turn_the_dial(browser: Any, url: str, outside: Outside) -> None:
    visit(browser, url)
    ask(browser, "say emu")
    for arm in ("zero_shot", "in_context", "distilled"):
        assert re.search(r"prompt tokens\d+.*time[\d.]+ s", text_of(browser, f".arm.{arm} dl"))
    before, kl = student(browser), mean_kl(browser)
    assert before != text_of(browser, ".arm.zero_shot .text")

    dial = select(browser, "#strength input[type=range]")
    dial.send_keys(KEYS["Home"])
    finished(browser, 0)
    assert student(browser) == text_of(browser, ".arm.zero_shot .text") != before
    assert mean_kl(browser) > kl
    dial.send_keys(KEYS["Left"])  # already at its start
    assert dial.get_attribute("value") == "0"

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {urlsplit(m["params"]["request"]["url"]) for m in asked if m["method"] == "Network.requestWillBeSent"}
    assert {a.hostname for a in addresses if a.scheme in ("http", "https", "ws", "wss")} == {"127.0.0.1"}
    assert {a.path for a in addresses} >= {"/", "/theme.css", "/gradio_api/queue/join"}
    failed = [m["params"]["response"]["url"] for m in asked
              if m["method"] == "Network.responseReceived" and m["params"]["response"]["status"] >= 400]  # fmt: skip
    assert failed == []
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert outside.came == []


def test_a_token_shows_both_sides_on_hover_and_on_focus(browser: Any, url: str) -> None:
    visit(browser, url)
    ask(browser, "say emu")
    first = select(browser, ".tokens .k")
    tip = first.find_element("css selector", ".tip")
    assert not tip.is_displayed()
    webdriver.ActionChains(browser).move_to_element(first).perform()
    assert until(tip.is_displayed, "the tip on hover")
    assert len(tip.find_elements("css selector", ".teacher code")) == len(
        tip.find_elements("css selector", ".student code")
    ) == 5  # fmt: skip
    webdriver.ActionChains(browser).move_to_element(select(browser, "#head h1")).perform()
    until(lambda: not tip.is_displayed(), "the tip to go")
    # by keyboard alone: from the last control before the tokens
    browser.execute_script("arguments[0].focus()", select(browser, "#examples button:last-of-type"))
    for _ in range(12):
        webdriver.ActionChains(browser).send_keys(KEYS["Tab"]).perform()
        if browser.switch_to.active_element == first:
            break
    assert tip.is_displayed()
    assert first.get_attribute("aria-describedby") == tip.get_attribute("id")
    webdriver.ActionChains(browser).send_keys(KEYS["Tab"]).perform()
    assert not tip.is_displayed()


def test_a_held_out_query_can_be_clicked_and_hostile_text_is_text(browser: Any, url: str) -> None:
    visit(browser, url)
    button = next(b for b in browser.find_elements("css selector", "#examples button") if "onerror" in b.text)
    button.click()
    finished(browser, 1)
    assert select(browser, "#message textarea").get_attribute("value") == f"say {HOSTILE}"
    assert "reference answer: X" in text_of(browser, "#view")
    assert HOSTILE in text_of(browser, "#head h1")
    assert browser.execute_script("return document.querySelectorAll('#view img, #head img, #examples img').length") == 0
    assert "owned" not in browser.title


def test_another_run_can_be_chosen(browser: Any, url: str) -> None:
    visit(browser, url)
    assert text_of(browser, "#head h1").startswith("first")
    select(browser, "#run input").click()
    until(lambda: browser.find_elements("css selector", "[role=option]")[1].is_displayed(), "the choices")
    browser.find_elements("css selector", "[role=option]")[1].click()
    until(lambda: text_of(browser, "#head h1").startswith("second"), "the second run")
    until(lambda: "please say second" in text_of(browser, "#examples"), "its held-out queries")
    ask(browser, "say emu")
    assert mean_kl(browser) >= 0


def test_a_message_that_is_too_long_is_refused_in_words(browser: Any, url: str) -> None:
    visit(browser, url)
    box = select(browser, "#message textarea")
    browser.execute_script(
        "arguments[0].value = 'x'.repeat(20001); arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", box
    )
    select(browser, "#send").click()
    until(lambda: "at most 20,000 characters" in text_of(browser, "#view [role=alert]"), "the message")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_screen_and_can_be_read(browser: Any, url: str, width: int, scheme: str) -> None:
    visit(browser, url, width, scheme)
    ask(browser, "say emu")
    browser.execute_script("document.querySelector('.tokens .k').focus()")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for selector in ("#message textarea", "#send", "#strength input[type=range]", ".arm.distilled", ".tip"):
        place = select(browser, selector).rect
        assert place["x"] >= 0 and place["x"] + place["width"] <= width and place["width"] > 40
    what = ".play h1, .play h2, .play p, .play .text, .play dt, .play dd, .legend .k, .tokens .k, .tip b, .tip code, "
    what += "#message span, #strength span, #send, #examples button"
    script = LOW_CONTRAST.replace('"h1, .claim, .badge, .soft, .k, td, th, dt, dd, .arm .text, pre"', json.dumps(what))
    assert what in script
    assert browser.execute_script(script.replace("found.length < 100", "found.length < 40")) == []


@pytest.mark.parametrize(
    "path",
    ["gradio_api/file=/etc/hostname", "gradio_api/file=pyproject.toml", "gradio_api/proxy=http://example.org/", "docs"],
)
def test_the_server_hands_out_no_files(url: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}{path}", timeout=20)


def test_the_server_takes_no_files(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}gradio_api/upload", data=b"x", timeout=20)
