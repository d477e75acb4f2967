"""The page in a real browser: nothing is fetched, nothing fails, nothing overflows, at phone and desktop width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctxdistill.report import write_report
from test_report import HOSTILE, build_run, estimate

WIDTHS = (390, 1280)


LOW_CONTRAST = """
    const rgba = text => { const c = text.match(/[\\d.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c; };
    const ground = e => e === null ? [255, 255, 255] : over(rgba(getComputedStyle(e).backgroundColor), e.parentElement);
    const over = ([r, g, b, a], under) =>
        a === 1 ? [r, g, b] : ground(under).map((v, i) => v * (1 - a) + [r, g, b][i] * a);
    const linear = v => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
    const light = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
    const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
    const found = [];
    for (const e of document.querySelectorAll("h1, .claim, .badge, .soft, .k, td, th, dt, dd, .arm .text, pre"))
        found.push([e.className, contrast(rgba(getComputedStyle(e).color), ground(e))]);
    for (const e of document.querySelectorAll("svg text"))
        found.push(["svg text", contrast(rgba(getComputedStyle(e).fill), ground(e.closest("div")))]);
    return found.length < 100 ? "too few" : found.filter(([, value]) => !(value >= 4.5));"""


@pytest.fixture(scope="module", params=["plain", "hostile"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    hostile = request.param == "hostile"
    run = build_run(tmp_path_factory.mktemp("page") / request.param, hostile=hostile)
    evaluation = json.loads((run / "evaluation.json").read_text())
    some = estimate(0.5, 0.25)
    system = HOSTILE if hostile else "Answer every message with one short sentence in capital letters."
    evaluation["behaviour"] = {
        "rows": 12,
        "unrelated": {"rows": 16, "kl": some, "same": some},
        "again": {"rows": 12, "kl": some, "same": some, "alone": some},
        "other": {"system": system, "kl": some, "obeys": some, "keeps": some, "base_keeps": some},
        "strengths": [{"strength": s, "kl_closed": some, "unrelated_kl": some} for s in (0.0, 0.5, 1.0)],
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return write_report(run)


def load(browser: Any, url: str, width: int, scheme: str = "light") -> tuple[list[str], list[str]]:
    """Load a page; returns the addresses that it asked for, and what the console says."""
    for log in ("performance", "browser"):
        browser.get_log(log)  # what came before
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(url)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return asked, [entry["message"] for entry in browser.get_log("browser")]


def test_these_checks_see_requests_errors_and_overflow(browser: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="missing.png"><p style="width: 2000px">wide</p><script>throw new Error("seen")</script>')
    asked, console = load(browser, bad.as_uri(), 390)
    assert (tmp_path / "missing.png").as_uri() in asked
    assert any("seen" in line for line in console)
    assert browser.execute_script("return document.documentElement.scrollWidth") > 390


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_fetched_and_nothing_fails(browser: Any, page: Path, width: int) -> None:
    asked, console = load(browser, page.as_uri(), width)
    assert asked == [page.as_uri()]
    assert console == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_does_not_scroll_sideways(browser: Any, page: Path, width: int) -> None:
    load(browser, page.as_uri(), width)
    assert browser.execute_script("return window.innerWidth") == width
    wide, seen = browser.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert wide == seen  # less than the width by a scroll bar, where there is one
    sticking_out = """
        return [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, svg, pre, .text")
            && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.execute_script(sticking_out) == []
    squeezed = """
        return [...document.querySelectorAll("main dd, main td, main p")].filter(e => e.textContent.trim().length > 20
            && e.checkVisibility() && e.getBoundingClientRect().width < 60).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.execute_script(squeezed) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_title_verdict_and_plots_are_visible(browser: Any, page: Path, width: int) -> None:
    load(browser, page.as_uri(), width)
    assert "reminders" in browser.title
    for selector, text in (
        ("h1", "reminders"),
        ("#verdict .badge", "faithful"),
        ("#verdict .claim", "97.1 % [96.5, 97.6]"),
    ):
        element = browser.find_element("css selector", selector)
        assert element.is_displayed()
        assert text in element.text
    verdict = browser.find_element("id", "verdict").rect
    assert verdict["y"] < 900  # seen without scrolling
    plots = browser.find_elements("css selector", "svg[role=img]")
    assert len(plots) == 4
    assert all(plot.rect["width"] > 250 and plot.rect["height"] > 150 for plot in plots)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_plots_stand_out_from_the_background(browser: Any, page: Path, scheme: str) -> None:
    load(browser, page.as_uri(), 1280, scheme)
    assert browser.execute_script(LOW_CONTRAST) == []
