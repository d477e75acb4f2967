"""Files made to hang, to fill the memory, or to reach what they should not; and what `test_rubbish.py` has found."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from ctxdistill import cli, files, formats
from ctxdistill import rows as data
from ctxdistill.adapters import settings_of
from ctxdistill.errors import CtxDistillError, DataError, ModelError, RecipeError, RunError, TrainError
from ctxdistill.grid import Study
from ctxdistill.lm import LM
from ctxdistill.recipe import ModelSection, Recipe
from ctxdistill.rundir import RunDir, fingerprint
from ctxdistill.store import TargetStore
from ctxdistill.train import read_checkpoint

GB = 1_000_000_000


def recipe(folder: Path, name: str) -> Recipe:
    return Recipe.from_dict(
        {"model": {"name": "m"}, "context": {"system": "s"}, "queries": {"data": name}}, base_dir=folder
    )


def read(folder: Path, name: str) -> Any:
    r = recipe(folder, name)
    return data.read(r.queries, r, "queries")


READ = """
import resource
from ctxdistill import readers, rows
from ctxdistill.errors import CtxDistillError
from ctxdistill.recipe import Recipe
import pyarrow.parquet
readers.MAX_PARQUET = (500_000_000, 30)  # quicker than 2 GB
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
recipe = Recipe.from_dict({{"model": {{"name": "m"}}, "context": {{"system": "s"}}, "queries": {{"data": {path!r}}}}})
try:
    print("read", len(rows.read(recipe.queries, recipe, "queries").rows))
except CtxDistillError as error:
    print(str(error)[:500])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def apart(path: Path) -> tuple[str, int]:
    """(what reading a file says, MB that it took), in a process of its own."""
    script = READ.format(path=str(path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    said, _, mb = done.stdout.strip().rpartition("\n")
    return said, int(mb)


# -- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt", "toml"])
def test_a_line_of_a_gigabyte(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"q.{suffix}"
    with path.open("wb") as file:  # takes no room on the disk
        file.write(b'[{"prompt": "')
        file.truncate(GB)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reads: dict[str, Callable[[], Any]] = {
        "toml": lambda: Recipe.load(path),
        "txt": lambda: data.read_text(path.name, recipe(tmp_path, path.name), "context.system_file"),
    }
    with pytest.raises(CtxDistillError, match=r"longer than 10 MB|too large|larger than"):
        reads.get(suffix, lambda: read(tmp_path, path.name))()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 600_000  # KB


def plain_bomb(path: Path) -> None:
    """0.8 GB of one letter."""
    table = pa.table({"prompt": pa.array(["a" * (32 << 20)], pa.large_string())})
    with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(25):
            writer.write_table(table)


def dictionary_bomb(path: Path) -> None:
    """A text of 1 MB, 100,000 times."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["a" * (1 << 20)]))
    pq.write_table(pa.table({"prompt": column}), path, compression="zstd", store_schema=False)


@pytest.mark.parametrize("bomb", [plain_bomb, dictionary_bomb])
def test_a_small_file_of_gigabytes(bomb: Callable[[Path], None], tmp_path: Path) -> None:
    bomb(tmp_path / "q.parquet")
    assert (tmp_path / "q.parquet").stat().st_size < 200_000
    said, mb = apart(tmp_path / "q.parquet")
    assert "q.parquet: needs more than 0.5 GB of memory to be read" in said
    assert mb < 700


def test_the_bound_of_memory_ends_with_the_block() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), files.bounded_memory(500_000_000):
        bytearray(GB)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(GB)) == GB


def test_a_file_of_nothing_but_problems(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("x\n" * 300_000)
    with pytest.raises(DataError) as caught:
        read(tmp_path, "q.jsonl")
    assert "1001 problems" in str(caught.value)
    assert len(str(caught.value)) < 5000


def test_a_json_text_that_is_all_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_PARTS", 1000)
    with pytest.raises(ValueError, match="1,002 objects and lists, more than 1,000"):
        files.parse_json("[" + "[]," * 1000 + "[]]")
    assert files.parse_json("[" + "[]," * 900 + "[]]")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nested too deeply"):
        files.parse_json("[" * 100_000)


def test_a_thousand_keys_twice_takes_no_time(tmp_path: Path) -> None:
    names = [f'"{n}": 1' for n in range(100_000)]
    (tmp_path / "q.jsonl").write_text("{" + ", ".join([*names, names[-1]]) + "}\n")
    with pytest.raises(DataError, match="the key '99999' occurs twice"):
        read(tmp_path, "q.jsonl")


# -- kind -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_pipes_devices_and_folders_are_no_data(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    (tmp_path / f"zero.{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"loop.{suffix}").symlink_to(tmp_path / f"loop.{suffix}")
    for name, found in (("pipe", "a pipe"), ("folder", "a folder"), ("zero", "a device"), ("loop", "")):
        with pytest.raises(CtxDistillError) as caught:
            read(tmp_path, f"{name}.{suffix}")
        assert found in str(caught.value)
    (tmp_path / "q.jsonl").write_text('{"prompt": "a link to a file is fine"}\n')
    (tmp_path / "link.jsonl").symlink_to("q.jsonl")
    assert len(read(tmp_path, "link.jsonl").rows) == 1


def test_pipes_in_the_place_of_recipes_and_run_files(finished: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.toml")
    for load in (Recipe.load, Study.load):
        with pytest.raises(RecipeError, match="is a pipe, and no regular file"):
            load(tmp_path / "r.toml")
    shutil.copytree(finished, tmp_path / "run")
    for name in ("recipe.json", "evaluation.json", "scores.jsonl", "adapter/adapter_config.json", "prompts.jsonl"):
        good = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).unlink()
        os.mkfifo(tmp_path / "run" / name)
        assert cli.main(["report", str(tmp_path / "run")]) in (0, 2)
        assert cli.main(["show", str(tmp_path / "run")]) in (0, 2)
        with pytest.raises(RunError):
            settings_of(tmp_path / "run" / "adapter") if "adapter" in name else RunDir(tmp_path / "run").read_json(name)
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).write_bytes(good)


# -- adapters and models ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "adapter", tmp_path / "run" / "adapter"))


def settle(adapter: Path, **settings: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"r": 10**9}, "r = 1000000000"),
        ({"target_modules": "(a+)+$"}, "target_modules = '(a+)+$'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config = {'a': 1}"),
        ({"megatron_core": "antigravity"}, "megatron_core = 'antigravity'"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"peft_type": "XLORA"}, "peft_type 'XLORA'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights = 'eva'"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
        ({"auto_mapping": {"parent_library": "antigravity"}}, "auto_mapping"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    ],
)
def test_an_adapter_cannot_ask_for_more_than_an_adapter(settings: dict[str, Any], found: str, adapter: Path) -> None:
    settings_of(adapter)
    settle(adapter, **settings)
    with pytest.raises(ModelError) as caught:
        settings_of(adapter)
    assert found in caught.value.found


def test_an_adapter_is_safetensors_and_whole(adapter: Path, llama: Path) -> None:
    lm = LM.load(ModelSection(name=str(llama)))
    before = list(lm.model.state_dict())
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(ModelError, match="does not fit"):  # a part of it would be left out
        lm.load_adapter(adapter)
    assert list(lm.model.state_dict()) == before  # and nothing of it stays on the model
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(RunError, match="no weights of an adapter"):
        lm.load_adapter(adapter)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**9}, {"hidden_size": 2**20, "head_dim": 8}, {"vocab_size": 10**9}]
)
def test_a_model_cannot_ask_for_more_than_its_weights(change: dict[str, int], llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match="are too few for its configuration"):
        LM.load(ModelSection(name=str(tmp_path / "model")))


# -- what generated rubbish has found ---------------------------------------------------------------------------------


def test_numbers_that_are_too_long_for_a_recipe(tmp_path: Path) -> None:
    for text in ("a = " + "9" * 5000, "a = " + "[" * 5000, "\ufeffa = 1\n[b", "a = 2020-13-45"):
        (tmp_path / "r.toml").write_text(text)
        with pytest.raises(RecipeError, match="not valid TOML"):
            Recipe.load(tmp_path / "r.toml")


def test_a_system_turn_that_is_no_text(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": []}, {"role": "user", "content": "u"}]
    (tmp_path / "q.json").write_text(json.dumps([{"messages": turns}, {"messages": turns}]))
    with pytest.raises(DataError, match="the system turn of row 1 holds no text"):
        formats.recipe_for(tmp_path / "q.json", tmp_path / "r.toml")


def test_names_of_megabytes_are_not_repeated_in_messages(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("x" * 5_000_000 + ",b\n1,2\n")
    with pytest.raises(DataError) as caught:
        read(tmp_path, "q.csv")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "line",
    [
        None,
        [],
        {},
        {"shard": "../x", "keys": [], "lengths": []},
        {"shard": "x", "keys": ["0"], "lengths": [1]},
        {"shard": "x", "keys": ["00" * 16], "lengths": [-1]},
        {"shard": "x", "keys": [], "lengths": [[1]]},
    ],
)
def test_an_index_of_targets_that_is_none(line: Any, tmp_path: Path) -> None:
    if line:
        line = {"sha256": "", "bytes": 1, "tensors": [], **line}
        line["check"] = fingerprint(line)
    (tmp_path / "index.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(RunError, match=r"index.jsonl:1 is damaged"):
        TargetStore(tmp_path)


def test_run_files_of_the_wrong_shape(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for name, text in (
        ("evaluation.json", '{"arms": 1, "table": 1}'),
        ("scores.jsonl", "7\n"),
        ("metrics.jsonl", "null\n"),
    ):
        good = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_text(text)
        assert cli.main(["report", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert "cannot be understood" in said or "is damaged" in said
        (tmp_path / "run" / name).write_bytes(good)


def test_a_pipe_in_a_model_or_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "added_tokens.json")
    with pytest.raises(ModelError, match=r"added_tokens\.json is a pipe"):
        LM.load(ModelSection(name=str(tmp_path / "model")))
    os.mkfifo(tmp_path / "step-00000001.safetensors")
    with pytest.raises(TrainError, match="is damaged: it is a pipe"):
        read_checkpoint(tmp_path / "step-00000001.safetensors")
