"""A base with quantised weights: the same model for teacher and student, frozen, and a way to say that it cannot be had."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import tiny
from ctxdistill import pipeline
from ctxdistill.errors import ModelError
from ctxdistill.lm import LM
from ctxdistill.objective import Example
from ctxdistill.recipe import LoraSection, ModelSection, Recipe
from ctxdistill.store import TargetStore
from ctxdistill.targets import label
from ctxdistill.train import mean_kl
from ctxdistill.weights import quantized

needs = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the package bitsandbytes is not installed"
)
KINDS = pytest.mark.parametrize("kind", ["8bit", "4bit"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose layers are wide enough for blocks of 64 weights."""
    from transformers import LlamaConfig

    before = tiny.CONFIGS["llama"]
    tiny.CONFIGS["llama"] = lambda: LlamaConfig(**{**tiny.llama, "hidden_size": 64, "intermediate_size": 128})
    try:
        return tiny.save(tmp_path_factory.mktemp("wide"))
    finally:
        tiny.CONFIGS["llama"] = before


def load(folder: Path, kind: str) -> LM:
    return LM.load(ModelSection(name=str(folder), device=DEVICE, dtype="float32", quantize=kind))  # type: ignore[arg-type]


def test_what_cannot_be_had_is_said(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantized("none", torch.device("cpu"), torch.float32) == {}
    with pytest.raises(ModelError, match="does not work on mps"):
        quantized("4bit", torch.device("mps"), torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="needs the package bitsandbytes"):
        load(wide, "4bit")


@needs
@KINDS
def test_weights_are_few_bits_and_close(wide: Path, kind: str) -> None:
    plain, small = load(wide, "none"), load(wide, kind)
    assert small.info["quantize"] == kind and small.info["parameters"] == plain.info["parameters"]
    assert small.fingerprint != plain.fingerprint  # targets of one are none of the other
    sizes = [
        sum(p.numel() * p.element_size() for n, p in lm.model.named_parameters() if "proj" in n)
        for lm in (plain, small)
    ]
    assert sizes[1] <= sizes[0] / (4 if kind == "8bit" else 8)
    rows: list[tuple[list[int], int]] = [(list(range(5, 15)), 4), (list(range(9, 16)), 2)]
    with torch.no_grad():
        exact, rounded = ([lm.head(h) for h in lm.hidden(rows)] for lm in (plain, small))
    for a, b in zip(exact, rounded, strict=True):
        assert 0 < (a - b).abs().max() < a.abs().max()


@needs
@KINDS
def test_rows_packed_behind_a_prefix_are_those_computed_alone(wide: Path, kind: str) -> None:
    lm = load(wide, kind)
    start = list(range(5, 30))
    rows = [([*start, *body], 2) for body in ([40, 41, 42, 43], [50, 51, 52])]
    with torch.no_grad():
        alone = [
            lm.model(input_ids=torch.tensor([ids], device=DEVICE)).logits[0, -n - 1 : -1].float() for ids, n in rows
        ]
        shared = [lm.head(h) for h in lm.hidden(rows, lm.prefix([ids for ids, _ in rows]))]
    for a, b in zip(alone, shared, strict=True):
        # in 8 bits the activations are rounded, too: a number at the edge goes to one side or the other
        torch.testing.assert_close(a, b, rtol=0, atol=(0.1 if kind == "8bit" else 1e-4) * float(a.abs().max()))


@needs
@KINDS
def test_the_loss_with_an_untrained_adapter_and_no_context_is_0(job: Path, wide: Path, kind: str) -> None:
    """Teacher and student are the same quantised model, so its rounding is in both."""
    (job / "model").unlink()
    (job / "model").symlink_to(wide)
    raw = tiny.recipe_dict(job, model__quantize=kind, model__device=DEVICE, model__dtype="float32")
    recipe = Recipe.from_dict(raw, base_dir=job)
    lm, prompter, rows = pipeline.prepare(recipe)
    same = [p.__class__(**{**p.__dict__, "teacher": p.student}) for p in rows.pairs["train"]]
    made = label(lm, prompter, same, recipe, TargetStore(job / "targets"))
    examples = [Example(p.id, p.student, t[0]) for p, t in zip(same, made, strict=True)]
    lm.add_adapter(LoraSection(rank=4), 0)
    assert mean_kl(lm, examples, 4) == pytest.approx(0, abs=1e-5 if kind == "4bit" else 1e-2)
    tiny.disturb(lm)
    assert mean_kl(lm, examples, 4) > 0.05


@needs
def test_loss_and_gradient_are_those_of_the_weights_that_4_bits_stand_for(wide: Path) -> None:
    """Against a model that holds the very numbers in 32 bits. Before, both read without a gradient, as teachers do."""
    import bitsandbytes

    small, plain = load(wide, "4bit"), load(wide, "none")
    with torch.no_grad():
        for name, module in small.model.named_modules():
            if hasattr(module.__dict__.get("_parameters", {}).get("weight"), "quant_state"):
                whole = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.model.get_submodule(name).weight.copy_(whole)
    rows: list[tuple[list[int], int]] = [(list(range(5, 15)), 4), (list(range(9, 16)), 2)]
    losses, gradients = [], []
    for lm in (small, plain):
        with torch.no_grad():
            lm.hidden(rows)
        lm.add_adapter(LoraSection(rank=4), 0)
        tiny.disturb(lm)
        loss = torch.stack([lm.head(h).log_softmax(-1)[:, 7].sum() for h in lm.hidden(rows)]).sum()
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in lm.trainable().items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, value in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], value, rtol=1e-3, atol=1e-4)


@needs
def test_a_run_on_4_bits(job: Path, wide: Path) -> None:
    (job / "model").unlink()
    (job / "model").symlink_to(wide)
    raw = tiny.recipe_dict(job, model__quantize="4bit", model__device=DEVICE, model__dtype="float32", train__epochs=4)
    run = pipeline.distill(Recipe.from_dict(raw, base_dir=job), job / "run")
    lines = [line["loss"] for line in tiny.read_jsonl(run.path / "metrics.jsonl") if line["event"] == "step"]
    assert lines[-1] < lines[0] and run.evaluation["kl_closed"]["mean"] > 0.2
    assert json.loads((run.path / "recipe.json").read_text())["model"]["quantize"] == "4bit"
    model, _ = pipeline.load_student(run.path, merge=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())  # merged into weights that are not quantised
