from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ctxdistill import docs
from ctxdistill.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")] if p.exists())


@pytest.mark.parametrize("name", docs.PAGES)
def test_reference_pages_are_up_to_date(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == docs.PAGES[name](), "run `make docs`"


def test_every_key_has_its_documentation() -> None:
    page = docs.recipe_page()
    keys = [line for line in page.splitlines() if line.startswith("- **`")]
    assert len(keys) > 60
    assert [line for line in keys if re.search(r"\): *(None)?$", line)] == []
    assert "base_dir" not in page
    assert "- **`lr`** (number, above 0; default `0.0005`): Peak learning rate" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    local = [link.partition("#")[0] for pair in links for link in pair if link and not re.match(r"\w+:|#", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


HOWTOS = [p for p in sorted((ROOT / "docs").glob("howto-*.md")) if "```toml" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", HOWTOS, ids=lambda p: p.stem)
def test_the_recipe_of_a_howto_is_valid(page: Path, tmp_path: Path) -> None:
    first = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    (tmp_path / "recipe.toml").write_text(first)
    assert Recipe.load(tmp_path / "recipe.toml").model.name


@pytest.mark.parametrize("page", HOWTOS, ids=lambda p: p.stem)
def test_a_row_of_a_howto_is_one_line(page: Path) -> None:
    for rows in re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        assert all(isinstance(json.loads(line), dict) for line in rows.splitlines())
