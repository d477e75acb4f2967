"""A study's page in a real browser: nothing is fetched, nothing fails, nothing overflows, and it can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctxdistill.study_report import write_report
from test_analysis import build_study
from test_report_browser import LOW_CONTRAST, WIDTHS, load
from test_study_report import build_hostile

UNFOLD = "document.querySelectorAll('details').forEach(e => e.open = true)"


@pytest.fixture(scope="module", params=["plain", "hostile"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = build_hostile if request.param == "hostile" else build_study
    return write_report(build(tmp_path_factory.mktemp("study") / request.param))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_fetched_fails_or_scrolls_sideways(browser: Any, page: Path, width: int) -> None:
    asked, console = load(browser, page.as_uri(), width)
    assert asked == [page.as_uri()]
    assert console == []
    browser.execute_script(UNFOLD)
    wide, seen = browser.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert wide == seen
    sticking_out = """
        return [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, svg, pre, .text")
            && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.execute_script(sticking_out) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_claims_are_seen_first_and_plots_are_large_enough(browser: Any, page: Path, width: int) -> None:
    load(browser, page.as_uri(), width)
    assert "study" in browser.title
    first = browser.find_element("css selector", "#claims .badge")
    assert first.is_displayed()
    assert first.rect["y"] < 900  # seen without scrolling
    plots = browser.find_elements("css selector", "svg[role=img]")
    assert len(plots) == 5
    assert all(plot.rect["width"] > 250 and plot.rect["height"] > 150 for plot in plots)
    marks = browser.find_elements("css selector", ".keys .mark")
    assert marks
    assert all(5 < mark.rect["width"] < 25 for mark in marks)


def test_tables_show_what_matters_without_scrolling(browser: Any, tmp_path: Path) -> None:
    page = write_report(build_study(tmp_path / "s", sets=(0, 1, 2), rows=30))
    load(browser, page.as_uri(), 390)
    browser.execute_script(UNFOLD)
    narrow = """
        return [...document.querySelectorAll(".pairs tbody tr")].map(row => {
            const [arms, points] = [row.children[2], row.children[3]].map(e => e.getBoundingClientRect());
            return [arms.width, points.right - row.closest(".scroll").getBoundingClientRect().right]; })"""
    found = browser.execute_script(narrow)
    assert found
    assert all(width > 110 and beyond < 1 for width, beyond in found)
    load(browser, page.as_uri(), 1200)
    browser.execute_script(UNFOLD)
    beyond = """
        return [...document.querySelectorAll(".costs")].map(e => [e.scrollWidth, e.closest(".scroll").clientWidth])"""
    assert all(wide <= room for wide, room in browser.execute_script(beyond))
    pairs = """
        return [...document.querySelectorAll(".part .plots")].map(plots => [...plots.children].map(e => {
            const r = e.getBoundingClientRect(); return [Math.round(r.top), Math.round(r.height)]; }))"""
    for plots in browser.execute_script(pairs):
        heights = [{height for top, height in plots if top == row} for row in {top for top, _ in plots}]
        assert all(len(of_row) == 1 for of_row in heights)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_plots_stand_out_from_the_background(browser: Any, page: Path, scheme: str) -> None:
    load(browser, page.as_uri(), 1280, scheme)
    browser.execute_script(UNFOLD)
    more = LOW_CONTRAST.replace('"h1, ', '"h1, h2, h3, summary, li, a, .up, .down, .same, ')
    assert browser.execute_script(more) == []
