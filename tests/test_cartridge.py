"""A trained key-value cache in the place of the context, against the model's own forward with that cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tiny
from ctxdistill import pipeline
from ctxdistill.dataset import prepare
from ctxdistill.errors import ModelError
from ctxdistill.lm import LM, common_prefix
from ctxdistill.recipe import LoraSection, ModelSection, Recipe
from ctxdistill.train import mean_kl

CARTRIDGE = LoraSection(method="cartridge", tokens=20)
ROWS = [([0, 5, 6, 7, 8, 9, 10], 3), ([0, 9, 8, 20], 2)]


@pytest.fixture
def student(llama: Path) -> LM:
    lm = LM.load(ModelSection(name=str(llama)))
    lm.add_adapter(CARTRIDGE, 0, list(range(10, 60)))
    return lm


def slow(lm: LM, ids: list[int], layers: Any) -> torch.Tensor:
    """Logits of the model itself behind a cache, [L, V]."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    with lm.adapter(False):
        return lm.model(input_ids=torch.tensor([ids]), cache=cache).logits[0]


def test_untrained_it_is_the_context_itself(student: LM) -> None:
    """The first tokens of the context before the student's prompt, read as one sequence."""
    with torch.no_grad():
        fast = student.hidden(ROWS)
        for (ids, n), hidden in zip(ROWS, fast, strict=True):
            with student.adapter(False):
                whole = student.model(input_ids=torch.tensor([[*range(10, 30), *ids]])).logits[0]
            torch.testing.assert_close(student.head(hidden), whole[-n - 1 : -1], rtol=1e-4, atol=1e-4)


def test_values_and_gradient_are_those_of_a_cache(student: LM) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (name,) = student.trainable()
    assert student.trainable()[name].shape == (19, 3 * 2 * 2 * 8)  # the first token is frozen
    own = student.cartridge()
    assert own is not None
    fast = sum(student.head(h).logsumexp(-1).sum() for h in student.hidden(ROWS))
    one = sum(slow(student, ids, own.layers)[-n - 1 : -1].logsumexp(-1).sum() for ids, n in ROWS)
    torch.testing.assert_close(fast, one, rtol=1e-5, atol=1e-4)
    a, b = (torch.autograd.grad(x, student.trainable()[name])[0] for x in (fast, one))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert a.abs().max() > 1e-4


def test_it_writes_behind_the_cache(student: LM) -> None:
    own = student.cartridge()
    assert own is not None and student.prefix([ids for ids, _ in ROWS * 9]) is None
    written = student.generate([ids for ids, _ in ROWS], max_new_tokens=5, ends=lambda ids: False)
    for (ids, _), found in zip(ROWS, written, strict=True):
        so_far = list(ids)
        for token in found:
            with torch.no_grad():
                assert token == slow(student, so_far, own.layers)[-1].argmax().item()
            so_far.append(token)
    tree = [(7, -1), (8, 0)]
    with torch.no_grad():
        (states,) = student.follow([ROWS[0][0]], tree)
        path = slow(student, [*ROWS[0][0], 7, 8], own.layers)[-3:]
    torch.testing.assert_close(student.head(states), path, rtol=1e-4, atol=1e-4)


def test_off_it_is_the_base_model(student: LM, llama: Path) -> None:
    base = LM.load(ModelSection(name=str(llama)))
    with torch.no_grad(), student.adapter(False):
        assert student.cartridge() is None
        for a, b in zip(student.hidden(ROWS), base.hidden(ROWS), strict=True):
            assert torch.equal(a, b)
    student.remove_adapter()
    with torch.no_grad():
        assert torch.equal(student.hidden(ROWS)[0], base.hidden(ROWS)[0])


@pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|past_key_values).*:FutureWarning")  # peft's own
def test_a_run_with_a_cartridge(job: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train = {"epochs": 6, "batch_size": 4, "lr": 0.05, "validation": 0.2, "checkpoint_every": 2}
    raw = tiny.recipe_dict(job, lora={"method": "cartridge", "tokens": 24}, train=train, behaviour={"rows": 4})
    recipe = Recipe.from_dict(raw, base_dir=job)
    run = pipeline.distill(recipe, job / "run")
    assert run.evaluation["kl_closed"]["mean"] > 0.3
    assert run.evaluation["behaviour"]["strengths"] == [] and run.evaluation["behaviour"]["again"]["rows"] == 4
    card = (run.adapter / "README.md").read_text()
    assert "A trained key-value cache (cartridge) for" in card and "vllm serve" not in card and "24 tokens" in card
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("CARTRIDGE", 24)
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(job / "model").eval()
    lm = LM.load(recipe.model)
    lm.load_adapter(run.adapter)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, str(run.adapter)).eval()(ids).logits[0, :-1]
        ours = lm.head(lm.hidden([(ids[0].tolist(), 4)])[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert pipeline.evaluate(run.path)["kl_closed"] == run.evaluation["kl_closed"]
    with pytest.raises(ModelError, match="no strength"):
        pipeline.load_student(run.path, strength=0.5)
    with pytest.raises(ModelError, match="cannot be merged"):
        pipeline.load_student(run.path, merge=True)


def test_training_starts_near_the_teacher(job: Path) -> None:
    """All of the context's cache leaves little to learn: the prompt's own start is there twice, no more."""
    recipe = Recipe.from_dict(tiny.recipe_dict(job), base_dir=job)
    lm, prompter, data = prepare(recipe)
    examples = pipeline.make_examples(
        recipe, lm, prompter, data.pairs["train"], pipeline.TargetStore(job / "t"), lambda *_: None
    )
    start = common_prefix([p.teacher for p in data.pairs["train"]])
    found = {}
    for name, begin in (("context", start), ("random", ())):
        lm.add_adapter(LoraSection(method="cartridge", tokens=len(start)), 0, begin)
        found[name] = mean_kl(lm, examples, 4)
        lm.remove_adapter()
    assert found["context"] < found["random"]


def test_what_cannot_be_a_cartridge(llama: Path, tmp_path: Path) -> None:
    lm = LM.load(ModelSection(name=str(llama)))
    with pytest.raises(ModelError, match="shorter than the cartridge"):
        lm.add_adapter(CARTRIDGE, 0, [5, 6, 7])
    sliding = LM.load(ModelSection(name=str(tiny.save(tmp_path / "gemma", "gemma2"))))
    with pytest.raises(ModelError, match="cannot be trained on Gemma2"):
        sliding.add_adapter(CARTRIDGE, 0, list(range(10, 60)))
