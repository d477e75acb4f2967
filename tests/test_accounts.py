"""FLOPs against torch's own counter on every architecture, forward and backward; peak memory of what was inside."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import tiny
from ctxdistill import accounts
from ctxdistill.accounts import Peak, cost, forward_flops, notes, training_flops
from ctxdistill.dataset import prepare
from ctxdistill.display import pays_off
from ctxdistill.lm import LM
from ctxdistill.recipe import LoraSection, ModelSection, Recipe

CONTEXT = list(range(10, 50))


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    """With what torch's counter sees: eager attention over padded rows, torch's own products, and peft's own layers, since it
    does not count products that are added in place."""
    folder = tiny.save(tmp_path_factory.mktemp(request.param), request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctxdistill.products.use", lambda model: None)
        lm = LM.load(ModelSection(name=str(folder), device="cpu", attention="eager"))
    lm.can_pack = False
    return lm


def windows(lm: LM) -> list[int]:
    """Most keys that a position of each layer sees, as the model's own cache knows it."""
    return [getattr(layer, "sliding_window", None) or 1 << 20 for layer in DynamicCache(config=lm.model.config).layers]


def masked(lm: LM, new: int, before: int = 0) -> float:
    """FLOPs of the products that eager attention computes and then masks: counted one query and key at a time."""
    config = lm.model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = itertools.product(windows(lm), range(before, before + new), range(before + new))
    return (
        4.0
        * config.num_attention_heads
        * size
        * sum(key > query or query - key >= window for window, query, key in pairs)
    )


@pytest.mark.parametrize(("length", "supervised"), [(2, 1), (12, 3), (40, 5)])
def test_forward_equals_torchs_counter_but_for_masked_products(lm: LM, length: int, supervised: int) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.head(lm.hidden([(CONTEXT[:length], supervised)])[0])  # the last token is not forwarded
    expected = forward_flops(lm, length - 1, projected=supervised) + masked(lm, length - 1)
    assert counter.get_total_flops() == expected


def test_forward_after_a_cached_prefix_equals_torchs_counter(lm: LM) -> None:
    rows = [(CONTEXT + list(range(60, 69)), 3), (CONTEXT + list(range(80, 89)), 3)]
    prefix = lm.prefix([ids for ids, _ in rows])
    if prefix is None:
        assert not lm.can_share
        return
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.hidden(rows, prefix)
    new, before = len(rows[0][0]) - 1 - len(prefix.ids), len(prefix.ids)
    assert counter.get_total_flops() == 2 * (forward_flops(lm, new, before) + masked(lm, new, before))


def test_parts_of_a_sequence_add_up(lm: LM) -> None:
    whole = forward_flops(lm, 50, projected=4)
    assert whole == forward_flops(lm, 13) + forward_flops(lm, 30, 13) + forward_flops(lm, 7, 43, projected=4)
    assert whole == sum(forward_flops(lm, 1, i) for i in range(50)) + forward_flops(lm, 0, projected=4)


def read_embeddings(lm: LM) -> list[Any]:
    """The layers below which nothing is trained with LoRA: they need no gradient of what they read."""
    names = ("project_in", "0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj", "h.0.attn.c_attn")
    return [module for name, module in lm.model.named_modules() if name.endswith(names)]


def backward_flops(lm: LM, length: int, supervised: int) -> int:
    with FlopCounterMode(display=False) as counter:
        lm.head(lm.hidden([(CONTEXT[:length], supervised)])[0]).sum().backward()
    return int(counter.get_total_flops())


def test_training_equals_torchs_counter(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxdistill.lm.fuse", lambda model: None)
    with lm.all_weights():
        full = backward_flops(lm, 30, 5)
    assert full == training_flops(lm, 29, 5, "full") + 3 * masked(lm, 29)

    base = forward_flops(lm, 29, projected=5)
    lm.add_adapter(LoraSection(rank=2), seed=0)
    try:
        assert forward_flops(lm, 29, projected=5) == base  # the adapter can be merged
        lora = backward_flops(lm, 30, 5)
        # an adapted layer's parameters are its own and both of its adapter's; the adapter's second reads the first
        unneeded = sum(
            parameter.numel()
            for module in read_embeddings(lm)
            for name, parameter in module.named_parameters()
            if name.endswith("weight") and "lora_B" not in name
        )
        assert lora == training_flops(lm, 29, 5, "lora") + 3 * masked(lm, 29) - 2 * 29 * unneeded
    finally:
        lm.remove_adapter()


def test_a_classification_head_in_place_of_the_vocabulary(lm: LM) -> None:
    with lm.all_weights(classes=7):
        flops = backward_flops(lm, 12, 1)
    assert flops == training_flops(lm, 11, 1, "full", classes=7) + 3 * masked(lm, 11)


def test_a_llama_by_hand(llama: Path) -> None:
    """d 32, 4 heads, 2 key-value heads, MLP 48, 3 layers, 261 words."""
    lm = LM.load(ModelSection(name=str(llama)))
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    seen = 6 + 7 + 8  # keys of three tokens after five
    assert forward_flops(lm, 3, 5, 2) == 2 * 3 * block * 3 + 4 * 32 * seen * 3 + 2 * 32 * 261 * 2


def test_layers_that_share_their_weights_count_each(llama: Path) -> None:
    lm = LM.load(ModelSection(name=str(llama)))
    before = forward_flops(lm, 3)
    first, second, _ = lm.model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    assert forward_flops(lm, 3) == before


def test_when_a_run_pays_off_by_hand(job: Path) -> None:
    """100 s of a machine at 36 an hour are 1; a request saves 500 tokens, which are 0.001, and 50 ms."""
    prices = {"machine_hour": 36.0, "per_million_tokens": 2.0, "requests_per_day": 100.0}
    recipe = Recipe.from_dict(tiny.recipe_dict(job, cost=prices), base_dir=job)
    long, short = ({"prompt_tokens": {"mean": tokens}} for tokens in (520.0, 20.0))
    saved = {"mean": 50.0, "low": 45.0, "high": 55.0, "n": 24}
    result = {"table": {"in_context": long, "distilled": short}, "ms_saved": saved}
    found = cost(recipe, result, {"total": 100.0}, 40_000)
    assert found == {
        "seconds": {"total": 100.0}, "prompt_tokens_saved": 500.0, "ms_saved": saved, "break_even_requests": 2000,
        "break_even_money": {"requests": 1000, "days": pytest.approx(10.0)}, "training_tokens": 40_000, "break_even_tokens": 80,
    }  # fmt: skip
    for timed in (None, {"mean": -50.0, "low": -55.0, "high": -45.0, "n": 24}, {**saved, "low": -1.0}):
        assert cost(recipe, {**result, "ms_saved": timed}, {"total": 100.0}, 40_000)["break_even_requests"] is None
    other = {"table": {"in_context": short, "distilled": long}, "ms_saved": None}
    never = cost(recipe, other, {"total": 100.0}, 40_000)
    assert [never[name] for name in ("break_even_requests", "break_even_money", "break_even_tokens")] == [None] * 3


def test_a_run_pays_off_with_its_last_request_not_the_one_before(job: Path) -> None:
    """149 tokens are earned back at 100 a request with the second, 1.49 s at 1 s, and money at the same rate."""
    prices = {"machine_hour": 3600.0, "per_million_tokens": 1e4}
    recipe = Recipe.from_dict(tiny.recipe_dict(job, cost=prices), base_dir=job)
    table = {arm: {"prompt_tokens": {"mean": n}} for arm, n in (("in_context", 120.0), ("distilled", 20.0))}
    saved = {"mean": 1000.0, "low": 900.0, "high": 1100.0, "n": 24}
    found = cost(recipe, {"table": table, "ms_saved": saved}, {"total": 1.49}, 149)
    assert found["break_even_requests"] == pytest.approx(1.49) and found["break_even_tokens"] == pytest.approx(1.49)
    said = [line for line in pays_off(found) if line.startswith("pays off")]
    assert len(said) == 3 and all(line.startswith("pays off after 2 requests") for line in said)


def test_what_a_reader_must_know(job: Path) -> None:
    recipe = Recipe.from_dict(tiny.recipe_dict(job, targets={"kind": "topk", "k": 8}), base_dir=job)
    lm, prompter, rows = prepare(recipe)
    training = {"truncated_completions": 0, "train_rows": 13, "topk_mass": None, "best_step": 4, "memory_savings": 0}
    always = notes(recipe, lm, prompter, rows, training)
    rows = dataclasses.replace(rows, counts={"turns_without_text": 7, "dropped_duplicates": 8, "left_out_by_limit": 9})
    training = {"truncated_completions": 2, "train_rows": 13, "topk_mass": 0.875, "best_step": 0, "memory_savings": 2}
    found = notes(recipe, lm, prompter, rows, training)
    wanted = [
        "the device's memory does not hold a training step of 4 rows; steps are not recorded, are taken 2 rows at a time",
        "7 assistant's turns hold a tool call", "8 rows with a repeated query", "9 rows were left out by a limit",
        "2 of 13 training completions reached max_new_tokens = 6 without an end", "top-8 targets hold 87.5 %",
        "never lowered the held-out loss",
    ]  # fmt: skip
    more = [note for note in found if note not in always]
    assert len(more) == len(wanted) and all(part in note for part, note in zip(wanted, more, strict=True))


CPU = torch.device("cpu")


def test_peak_is_that_of_what_was_inside() -> None:
    with Peak(CPU) as before:
        pass
    with Peak(CPU) as much:
        block = torch.ones(48 * 2**18)  # 48 MB
        del block
    with Peak(CPU) as after:
        pass
    if much.since_start:
        assert after.mb >= much.mb >= before.mb > 0
    else:
        assert 40 < much.mb - before.mb < 80
        assert after.mb < much.mb - 30


def test_peak_without_a_resettable_counter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(accounts.Path, "write_text", refuse)
    with Peak(CPU) as peak:
        pass
    assert peak.since_start and peak.mb > 50  # torch alone is more


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_on_a_gpu() -> None:
    device = torch.device("cuda")
    with Peak(device) as peak:
        block = torch.ones(48 * 2**18, device=device)
        del block
    assert 48 <= peak.mb < 4096 and not peak.since_start
