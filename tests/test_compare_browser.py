"""The page of several runs in a real browser: nothing is fetched, nothing overflows, everything can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctxdistill.compare import compare, write_page
from test_compare import make
from test_report import HOSTILE
from test_report_browser import LOW_CONTRAST, WIDTHS, load


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_loads_nothing_fits_and_can_be_read(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    names = ("plain", HOSTILE[0], "a-name-without-any-space" * 8)
    folders = [
        make(tmp_path / f"r{n}", right=2 + n, recipe__name=name, model__name="/a/path" * 30)
        for n, name in enumerate(names)
    ]
    url = write_page(compare(folders), tmp_path / "page.html").as_uri()
    asked, said = load(browser, url, width, scheme)
    assert [address for address in asked if not address.startswith(("chrome:", "data:"))] == [url]
    assert said == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(LOW_CONTRAST.replace("found.length < 100", "found.length < 60")) == []
