"""Packed rows give the hidden states and the gradients of rows one by one, whatever they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

import tiny
from ctxdistill import kernels, packing
from ctxdistill.lm import LM
from ctxdistill.recipe import LoraSection, ModelSection

START = list(range(10, 50))
SHARED = [(START + list(range(s, s + n)), t) for s, n, t in ((60, 9, 3), (70, 14, 5), (80, 7, 6), (90, 20, 1))]
APART = [([s, *ids], t) for s, (ids, t) in enumerate(SHARED, 100)]
"""The same rows, without anything in common."""
PACKS = sorted(set(tiny.CONFIGS) - {"gemma2", "gemma3"})


@pytest.fixture(params=[0, packing.FEW], ids=["flash", ""])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of these tests are short: with and without the flash kernel."""
    monkeypatch.setattr(packing, "FEW", request.param)


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LM]:
    lm = LM.load(ModelSection(name=str(tiny.save(tmp_path_factory.mktemp(request.param), request.param)), device="cpu"))
    lm.add_adapter(LoraSection(rank=2), seed=0)
    with torch.no_grad():  # a fresh adapter does nothing, and half of its gradient is 0
        for parameter in lm.trainable().values():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    yield lm
    lm.remove_adapter()


def one_by_one(lm: LM, rows: list[tuple[list[int], int]]) -> list[torch.Tensor]:
    """The obvious way: the backbone's own forward over each row."""
    return [
        lm._backbone(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -n - 1 : -1]
        for ids, n in rows
    ]


def gradients(lm: LM, hidden: list[torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """A loss in which every number of every state counts differently, as a share of the sum of their sizes, and its
    gradient."""
    lm.model.zero_grad()
    states = torch.cat(hidden)
    counted = states * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    counted.sum().backward()
    return (counted.sum() / counted.abs().sum()).item(), {
        n: p.grad.clone() for n, p in lm.trainable().items() if p.grad is not None
    }


def assert_same(a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], abs=1e-6)
    assert a[1].keys() == b[1].keys()
    largest = max(g.abs().max().item() for g in a[1].values())
    for name, gradient in a[1].items():
        torch.testing.assert_close(gradient, b[1][name], atol=1e-4 * largest, rtol=1e-3, msg=name)


def test_the_models_that_can_be_packed(lm: LM, request: pytest.FixtureRequest) -> None:
    assert lm.can_pack == (request.node.callspec.params["lm"] in PACKS)


@pytest.mark.parametrize("rows", [SHARED, APART], ids=["shared", "apart"])
@pytest.mark.usefixtures("few")
def test_loss_and_gradient_equal_those_of_rows_one_by_one(lm: LM, rows: list[tuple[list[int], int]]) -> None:
    slow = one_by_one(lm, rows)
    fast = lm.hidden(rows)
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert_same(gradients(lm, slow), gradients(lm, fast))


@torch.no_grad()
@pytest.mark.usefixtures("few")
def test_a_cached_start_equals_a_start_that_is_read(lm: LM) -> None:
    prefix = lm._read_prefix(START)
    if lm.can_pack:
        for a, b in zip(one_by_one(lm, SHARED), lm._packed(SHARED, prefix), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "own", "start"), [(1, 1, 0), (1, 7, 40), (3, 33, 1), (4, 19, 700), (2, 530, 0)])
def test_the_flash_kernel_equals_all_scores_at_once(
    rows: int, own: int, start: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "FEW", 0)
    draw, kv, group, size = torch.Generator().manual_seed(0), 2, 3, 16
    shapes = (
        (kv, rows, group, own, size),
        (kv, rows, own, size),
        (kv, rows, own, size),
        (kv, start, size),
        (kv, start, size),
    )
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    weights = torch.randn(shapes[0], generator=draw, dtype=torch.float64)
    hidden = packing.later(own, torch.device("cpu"))
    if masked:  # what follows in many ways
        hidden = hidden | (torch.rand(1, rows, 1, own, own, generator=draw) < 0.4)
        hidden[..., range(own), range(own)] = False

    def found(attend: Any, dtype: torch.dtype, mask: torch.Tensor | None) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        out = attend(*leaves, mask, 0.0)
        (out * weights.to(dtype)).sum().backward()
        return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]

    exact = found(packing._attend, torch.float64, hidden)
    plain = found(packing._attend, torch.float32, hidden)
    flash = found(packing._behind, torch.float32, hidden if masked else None)
    for name, a, b, c in zip(["out", "q", "k", "v", "start_k", "start_v"], exact, plain, flash, strict=True):
        error = (b - a).abs().max().item() if a.numel() else 0.0
        torch.testing.assert_close(
            c.double(), a, atol=5 * error + 2e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_half_precision_loses_no_more_than_all_scores_at_once() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 3, 3, 21, 16), (2, 3, 21, 16), (2, 3, 21, 16), (2, 300, 16), (2, 300, 16)
    inputs = [torch.randn(shape, generator=draw).bfloat16() for shape in shapes]
    hidden = packing.later(21, torch.device("cpu"))
    exact = packing._attend(*(x.double() for x in inputs), hidden, 0.0)
    plain, flash = packing._attend(*inputs, hidden, 0.0), packing._behind(*inputs, None, 0.0)
    assert flash.dtype == torch.bfloat16
    torch.testing.assert_close(flash.double(), exact, atol=2 * (plain - exact).abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("own", "length"), [(1, 9), (5, 9)])
def test_half_of_the_flash_kernel_equals_all_scores_at_once(dtype: torch.dtype, own: int, length: int) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 4, 3, own, 16), (2, 4, length, 16), (2, 4, length, 16), (2, 300, 16), (2, 300, 16)
    inputs = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    hidden = torch.rand(1, 4, 1, own, length, generator=draw) < 0.5
    hidden[0, 1, 0, 0] = True  # padding before a row sees the start only
    exact, plain = (packing._attend(*(x.to(t) for x in inputs), hidden, 0.0) for t in (torch.float64, dtype))
    found = packing._half_flash(*inputs, hidden)
    assert found.dtype == dtype and found.shape == shapes[0]
    error = (plain.double() - exact).abs().max().item()
    torch.testing.assert_close(found.double(), exact, atol=2 * error + 1e-6, rtol=0)


@pytest.mark.parametrize("cache", [1, 2000, 2**21])
@pytest.mark.parametrize("kept", [0, 2**22])
@pytest.mark.parametrize("copied", [0, 64])
def test_pieces_and_recomputation_change_nothing(
    llama: object, cache: int, kept: int, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LM.load(ModelSection(name=str(llama), device="cpu"))
    lm.add_adapter(LoraSection(rank=2), seed=0)
    rows = [
        ([*START, *range(s, s + n)], 4) for s, n in ((60, 37), (100, 21), (130, 18))
    ]  # more positions than the smallest piece
    slow = gradients(lm, one_by_one(lm, rows))
    calls = []
    attend = packing._attend
    monkeypatch.setattr(packing, "_attend", lambda *inputs: calls.append(inputs[0].shape) or attend(*inputs))
    monkeypatch.setattr(packing, "_behind", packing._in_pieces)  # as on a device without the kernel
    monkeypatch.setattr(packing, "CACHE", cache)
    monkeypatch.setattr(packing, "KEPT", kept)
    monkeypatch.setattr(packing, "COPIED", copied)  # the start's keys for each row, or once
    assert_same(slow, gradients(lm, lm.hidden(rows)))
    layers, pieces = 3, {1: 9, 2000: 9, 2**21: 1}[cache]
    assert len(calls) == layers * pieces * (2 if kept == 0 else 1)


def test_checkpointed_layers_are_not_packed(llama: object) -> None:
    """They are computed again when the pack is gone."""
    lm = LM.load(ModelSection(name=str(llama), device="cpu"))
    lm.add_adapter(LoraSection(rank=2), seed=0)
    slow = gradients(lm, one_by_one(lm, SHARED))
    lm.training(True)
    lm.model.activation_checkpointing_enable()
    lm.model.enable_input_require_grads()
    assert lm.can_pack
    assert_same(slow, gradients(lm, lm.hidden(SHARED)))


@pytest.mark.parametrize("what", ["softcap", "s_aux", "sliding_window", "position_bias", "attention_mask"])
def test_attention_that_is_not_understood_is_refused(what: str) -> None:
    with pytest.raises(packing.CannotPackError, match=what):
        packing.attention(None, *[torch.zeros(1)] * 3, **{"attention_mask": None, what: 50.0})  # type: ignore[arg-type]


def test_the_models_own_attention_is_put_back(llama: object, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM.load(ModelSection(name=str(llama)))
    before = lm.fingerprint
    monkeypatch.setattr(LM, "_backbone", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm._packed(SHARED, None)
    assert lm.fingerprint == before


TREE = [(7, -1), (8, 0), (9, 0), (11, 2), (7, -1), (12, 4)]
"""Two continuations of one token each, which part again."""
PATHS = [(7,), (7, 8), (7, 9), (7, 9, 11), (7,), (7, 12)]


@torch.no_grad()
@pytest.mark.parametrize("prefix", [None, START[:5], START])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.usefixtures("few")
def test_what_follows_in_many_ways_equals_each_way_alone(lm: LM, prefix: list[int] | None, rows: int) -> None:
    prompts = [ids for ids, _ in SHARED[:rows]]
    shared = lm._read_prefix(prefix) if prefix and lm.can_share else None
    for prompt, found in zip(prompts, lm.follow(prompts, TREE, shared), strict=True):
        slow = torch.cat(one_by_one(lm, [([*prompt, *path, 5], 1) for path in [(), *PATHS]]))
        torch.testing.assert_close(found, slow, atol=1e-4, rtol=1e-4)
    assert [len(h) for h in lm.follow(prompts, ())] == [1] * rows


@torch.no_grad()
@pytest.mark.usefixtures("few")
def test_rows_of_a_batch_share_more_than_all_rows_do(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system prompt is cached for all rows; a document that the rows of one batch have in common is read once there."""
    if not lm.can_pack:
        pytest.skip("padded")
    document = list(range(150, 180))
    rows = [([*START, *document, *range(s, s + n)], 3) for s, n in ((60, 9), (70, 14), (80, 7))]
    read: list[int] = []
    backbone = LM._backbone
    monkeypatch.setattr(LM, "_backbone", lambda self, **x: read.append(x["input_ids"].numel()) or backbone(self, **x))
    found = lm.hidden(rows, lm._read_prefix(START))
    assert read == [len(START), len(document) + 9 + 14 + 7 - 3]
    for a, b in zip(one_by_one(lm, rows), found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_what_rounding_may_do_grows_with_the_layers_in_16_bits(llama: object) -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(10, 100, generator=draw)
    noise = torch.randn(10, 100, generator=draw)
    exact, half = (LM.load(ModelSection(name=str(llama), device="cpu", dtype=d)) for d in ("float32", "bfloat16"))  # type: ignore[arg-type]
    assert exact.same(states + 1e-5 * noise, states) and not exact.same(states + 1e-3 * noise, states)
    assert half.same(states + 0.04 * noise, states) and not half.same(states + 0.06 * noise, states)
    half.model.config.num_hidden_layers = 28
    assert half.same(states + 0.1 * noise, states) and not half.same(states + 0.12 * noise, states)


class OnCuda(NamedTuple):
    """What is asked of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_cuda: bool = True
    device: torch.device = torch.device("cuda")


def test_old_cards_and_32_bits_get_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, half in (((7, 5), kernels.EFFICIENT), ((8, 0), kernels.FLASH), ((9, 0), kernels.FLASH)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        for dtype, wanted in ((torch.bfloat16, half), (torch.float32, kernels.EFFICIENT), (torch.float64, None)):
            assert kernels.kernel_of(OnCuda(dtype, (1, 1, 1, 64))) is wanted  # type: ignore[arg-type]
        assert kernels.kernel_of(OnCuda(torch.bfloat16, (1, 1, 1, 9))) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_attends_otherwise_is_padded_and_that_is_said(llama: object, dtype: str) -> None:
    section = ModelSection(name=str(llama), device="cpu", dtype=dtype)  # type: ignore[arg-type]
    right = packing.attention
    assert LM.load(section).can_pack and not LM.load(section).notes
    for wrong in (
        lambda m, q, *x, **how: right(m, 1.5 * q, *x, **how),
        lambda m, q, k, v, *x, **how: right(m, q, k, -v, *x, **how),
    ):
        packing.AttentionInterface.register(packing.NAME, wrong)
        try:
            lm = LM.load(section)
        finally:
            packing.AttentionInterface.register(packing.NAME, right)
        assert not lm.can_pack and "they are padded" in lm.notes[0]
