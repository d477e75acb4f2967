"""The benchmarks run, on a tiny model, and what they compare is the same work."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from ctxdistill.accounts import forward_flops, training_flops
from ctxdistill.lm import LM
from ctxdistill.recipe import LoraSection, ModelSection

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module(request.param)
    monkeypatch.delitem(sys.modules, request.param)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    code: int = module.main()
    return code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("benchmark", ["job"], indirect=True)
def test_the_job_and_the_naive_loop_start_from_the_same_loss(
    benchmark: ModuleType, dtype: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "ROWS", 16)
    model = ModelSection(name=str(llama), dtype=dtype, device="cpu")
    ours, naive = benchmark.ours(model, 258), benchmark.naive(model, 258)
    assert ours["first_loss"] == pytest.approx(naive["first_loss"], rel=benchmark.AGREE[dtype] / 10)
    assert ours["first_loss"] > 1e-3
    assert ours["steps"] == naive["steps"] == 4
    assert ours["planned"] > 0
    floor = benchmark.floor(model, 258)
    assert floor["steps"] == 4
    assert floor["seconds"] > floor["gflop_blocks"] / floor["gflops_per_second_blocks"] > 0  # the head's come on top


@pytest.mark.parametrize("benchmark", ["job"], indirect=True)
def test_the_floor_is_the_median_rate_of_turns(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0, 30.0, 38.0, 40.0, 42.0, 50.0, 54.0])  # torch 1 4 2 s, ours 2 8 4 s
    monkeypatch.setattr(benchmark, "TURNS", 3)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert benchmark.rates([torch.ones(2, 3)], 5) == [4 * 5 * 6 / 2.0, 4 * 5 * 6 / 4.0]


@pytest.mark.parametrize("benchmark", ["job"], indirect=True)
def test_the_job_fails_when_the_first_losses_differ(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    ours = {"seconds": 2.0, "teacher": 1.0, "rest": 1.0, "steps": 4, "peak_mb": 1.0, "first_loss": 0.5, "planned": 1.5}
    assert benchmark.table("short", {"ours": ours, "naive": {**ours, "seconds": 6.0}}, 1e-3)
    out = capsys.readouterr().out
    assert "3.00" in out
    assert "-25%" in out
    other = {"ours": ours, "naive": {**ours, "first_loss": 0.51}}
    assert not benchmark.table("short", other, 1e-3) and benchmark.table("short", other, 5e-2)


@pytest.mark.parametrize("benchmark", ["job"], indirect=True)
def test_the_job_keeps_the_fastest_of_several_runs_in_turn(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seconds, asked = iter([9.0, 7.0, 3.0, 5.0, 6.0, 4.0]), []

    def answer(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command[command.index("--one") + 1])
        found = {"seconds": (whole := next(seconds)), "teacher": 1.0, "rest": whole - 1.0, "steps": 2, "peak_mb": None,
                 "planned": 4.0, "first_loss": 0.5}  # fmt: skip
        return SimpleNamespace(returncode=0, stdout=json.dumps(found))

    monkeypatch.setattr(benchmark.subprocess, "run", answer)
    file = tmp_path / "found.json"
    chosen = ["--prompts", "short", "--systems", "floor", "ours", "--repeat", "3", "--json", str(file)]
    assert run(benchmark, monkeypatch, *chosen) == 0
    assert asked == ["floor", "ours"] * 3
    kept = json.loads(file.read_text())["jobs"]["short"]
    assert (kept["floor"]["seconds"], kept["ours"]["seconds"]) == (3.0, 4.0)
    assert "ours: the fastest of 7.0, 5.0, 4.0 s" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", ["job"], indirect=True)
def test_trl_is_compared_with_one_epoch_of_ours(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    ours = {
        "seconds": 40.0,
        "teacher": 8.0,
        "rest": 32.0,
        "steps": 16,
        "peak_mb": 1.0,
        "planned": 40.0,
        "first_loss": 0.5,
    }
    trl = {"seconds": 240.0, "steps": 8, "peak_mb": 1.0}
    assert benchmark.table("long", {"ours": ours, "trl": trl}, 0.1)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["trl"][-1] == "10.00"  # 240 / (8 + 32 / 2)
    assert lines["ours"][-1] == "1.00"


@pytest.mark.parametrize("benchmark", ["sweeps"], indirect=True)
def test_every_sweep_runs(
    benchmark: ModuleType,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {
        "TOKENS": (10, 250),
        "CONTEXTS": (0, 40, 80),
        "COMPLETIONS": (2,),
        "LABELS": (2, 10),
        "STEPS": ((2, 3, 4),),
        "TURNS": 1,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(benchmark, name, value)
    # in processes of their own these would draw ids that the tiny model does not have, and only start Python
    inside = set(benchmark.SWEEPS) - {"memory", "startup"}
    assert run(benchmark, monkeypatch, *sorted(inside), "--model", str(llama), "--json", str(tmp_path / "o.json")) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert {name: len(table) for name, table in found.items()} == {
        "labelling": 3, "labels": 2, "generation": 2, "training": 1, "products": 3
    }  # fmt: skip
    assert found["labelling"][0]["x_no_context"] == 1
    assert benchmark.peak(str(llama), 8)["peak_mb"] > 0
    assert "x_no_context" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", ["speedrun"], indirect=True)
def test_the_speedrun_finds_the_first_step_that_is_good_enough(
    benchmark: ModuleType, job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "packaged_gguf", lambda _: None)
    monkeypatch.setattr(benchmark, "VARIANTS", {"default": [], "still": ["train.lr=1e-9"], "all weights": []})
    recipe = job / "recipe.toml"
    values = tiny.recipe_dict(job, train={"lr": 0.005, "epochs": 8}, completions={"max_new_tokens": 6})
    values.pop("name")
    recipe.write_text("\n".join(tiny_toml(values)), encoding="utf-8")
    out = job / "o.json"
    assert run(benchmark, monkeypatch, str(recipe), "--variants", "all", "--every", "1", "--json", str(out)) == 0
    (found,) = json.loads(out.read_text()).values()
    moving, still = found["variants"]["default"], found["variants"]["still"]
    first = moving["steps_to_goal"]
    assert dict(moving["curve"])[first] >= 0.9
    assert all(closed < 0.9 for step, closed in moving["curve"] if step < first)
    assert moving["tokens_to_goal"] > 0
    assert still["steps_to_goal"] is None
    assert abs(still["final_kl_closed"]) < 1e-3
    whole = found["variants"]["all weights"]
    assert whole["bytes"] > moving["bytes"] > 0
    assert whole["final_kl_closed"] > 0.5
    assert "never" in capsys.readouterr().out


def tiny_toml(values: dict[str, dict[str, object]]) -> list[str]:
    """Just enough TOML for a recipe of numbers, strings and lists."""
    lines = []
    for section, keys in values.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return lines


@pytest.mark.parametrize("benchmark", ["volume"], indirect=True)
def test_the_volume_job_counts_every_stage(benchmark: ModuleType, tmp_path: Path) -> None:
    found = benchmark.job(tmp_path, 80)
    assert (found["rows"], found["steps"]) == (80, 2)  # one row is held out for validation
    assert set(found["cpu_seconds"]) == {"label", "train", "rest"} and min(found["cpu_seconds"].values()) > 0
    assert found["peak_mb"] > 50 and found["targets_mb"] > 0


@pytest.mark.parametrize("benchmark", ["scaling"], indirect=True)
def test_the_arithmetic_of_scaling_is_that_of_the_accounts(
    benchmark: ModuleType, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = benchmark.Shape("tiny", 32, 3, 4, 2, 8, 48, tiny.VOCABULARY)
    lm = LM.load(ModelSection(name=str(llama)))
    for tokens in ((7,), (7, 20), (1, 300, 1), (9, 0, 4)):
        assert shape.forward(*tokens) == pytest.approx(forward_flops(lm, *tokens))
    lm.add_adapter(LoraSection(rank=benchmark.RANK), 0)
    assert shape.adapter == sum(p.numel() for p in lm.trainable().values())
    both = training_flops(lm, 9, 4, "lora") + forward_flops(lm, 0, projected=4)
    assert shape.training(9, 4) == pytest.approx(both)
    cache = lm._read_prefix(range(5, 15)).layers
    assert 2 * shape.cache(10) == sum(t.nbytes for layer in cache for t in layer)  # 32-bit here, 16-bit there
    assert benchmark.target_bytes(shape)["hidden"] == 2 * 32 + 4
    seven, seventy = benchmark.SHAPES.values()
    assert 7e9 < seven.bytes / 2 < 8e9 and 69e9 < seventy.bytes / 2 < 72e9
    assert [benchmark.ways(seventy, gpus, 2000) for gpus in (1, 2, 8, 64)] == [None, None, 4, 4]
    assert run(benchmark, monkeypatch, "--price", "3") == 0
    out = capsys.readouterr().out
    assert "cost at 3 per GPU hour" in out and "does not fit" in out


@pytest.mark.parametrize("benchmark", ["accelerator"], indirect=True)
def test_the_gpu_benchmark_runs_on_a_cpu(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"CONTEXT": 40, "ROWS": 4, "WRITTEN": 3, "STEPS": ((2, 5),), "ATTENTIONS": ((2, 5, 7, True),)}
    for name, value in sizes.items():
        monkeypatch.setattr(benchmark, name, value)
    output = tmp_path / "o.json"
    assert run(benchmark, monkeypatch, "tiny", "--device", "cpu", "--json", str(output)) == 0
    found = json.loads(output.read_text())["shapes"]["tiny"]
    jobs = ["read the context", "label 4 rows", "write 4 rows", "  not recorded", "step of 2 x 5", "  not recorded"]
    assert [job["job"] for job in found] == jobs
    assert all(job["tokens_per_s"] > 0 and job["use"] > 0 for job in found)
    assert "2 rows of 5 behind 7, both ways" in capsys.readouterr().out
