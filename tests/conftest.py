from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub library is imported

import pytest
import torch

import tiny

torch.set_num_threads(1)  # tiny models: threads cost more than they give


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
