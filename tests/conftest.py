from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub library is imported
os.environ.pop("COLUMNS", None)  # what is printed shall not depend on somebody's terminal
if "PYTEST_XDIST_WORKER" in os.environ:  # the commands that tests start share the cores, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import tiny

torch.set_num_threads(1)  # tiny models: threads cost more than they give

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background with it ignored


LONG = {"test_processes.py": 0, "test_demo.py": 1, "test_faults.py": 2, "test_pipeline.py": 3, "test_cells.py": 4}
"""Files that take longest: they come first, so that of several workers none is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Converted models go into a folder of this test run, unless the user already has a cache to use."""
    os.environ.setdefault("CTXDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a chat template."""
    return tiny.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def job(tmp_path: Path, llama: Path) -> Path:
    """A folder with the tiny model as `model` and room for a recipe's files."""
    (tmp_path / "model").symlink_to(llama)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """The folder of a finished run of the tiny model; not to be changed."""
    from ctxdistill import pipeline
    from ctxdistill.recipe import Recipe

    folder = tmp_path_factory.mktemp("finished")
    (folder / "model").symlink_to(llama)
    recipe = Recipe.from_dict(tiny.recipe_dict(folder, train__epochs=4), base_dir=folder)
    return pipeline.distill(recipe, folder / "run").path


FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real browser that logs what it fetches and says; tests that ask for it are skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    session.execute_cdp_cmd("Network.enable", {})
    yield session
    session.quit()
