"""Products by oneDNN against torch's own."""

from __future__ import annotations

import io
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear as by_torch

import tiny
from ctxdistill import products
from ctxdistill.lm import LM
from ctxdistill.products import linear, one_dnn
from ctxdistill.recipe import ModelSection

pytestmark = pytest.mark.skipif(platform.machine().lower() not in {"x86_64", "amd64"}, reason="needs an x86 CPU")


@pytest.fixture(autouse=True)
def amd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor of AMD's with AVX-512, and with small products, too."""
    one_dnn.cache_clear()
    monkeypatch.setattr(products, "avx512", lambda: True)
    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "by_amd", lambda: True)
    assert one_dnn()
    yield
    one_dnn.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often oneDNN was asked."""
    found: list[int] = []
    plain = products._by_one_dnn
    monkeypatch.setattr(products, "_by_one_dnn", lambda *inputs: found.append(1) or plain(*inputs))
    return found


def strided(*shape: int) -> list[torch.Tensor]:
    """Tensors of this shape that lie in memory in different ways."""
    *most, last = shape
    draw = torch.randn
    found = [
        draw(shape),
        draw(*most, last + 4)[..., 1 : last + 1],
        draw(*most, 2 * last)[..., ::2],
        draw(last).expand(shape),
    ]
    return [*found, draw(*most[:-1], last, most[-1]).mT]


@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (0, 5), (2, 3, 5), (300, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_are_torchs_however_the_numbers_lie(shape: tuple[int, ...], bias: bool, calls: list[int]) -> None:
    torch.manual_seed(0)
    b = torch.randn(4) if bias else None
    for x in strided(*shape):
        for weight in strided(4, 5):
            before = x.clone(), weight.clone()
            torch.testing.assert_close(linear(x, weight, b), by_torch(x, weight, b))
            assert torch.equal(before[0], x) and torch.equal(before[1], weight)
    assert len(calls) == 25


def test_it_rounds_little_more_than_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 3000, generator=draw), torch.randn(96, 3000, generator=draw)
    exact = by_torch(x.double(), weight.double())
    ours, theirs = ((f(x, weight) - exact).square().mean().sqrt() for f in (linear, by_torch))
    assert 0 < ours <= 3 * theirs and ours < 1e-6 * exact.square().mean().sqrt()


def test_what_is_not_a_number_stays_so() -> None:
    x = torch.tensor([[float("nan"), 0.0], [float("inf"), 1.0], [1.0, 2.0]])
    torch.testing.assert_close(linear(x, torch.eye(2)), by_torch(x, torch.eye(2)), equal_nan=True)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_torchs(kind: torch.dtype, calls: list[int]) -> None:
    x, weight = torch.randn(3, 5).to(kind), torch.randn(4, 5).to(kind)
    assert torch.equal(linear(x, weight), by_torch(x, weight)) and not calls


def test_small_products_are_torchs(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(products, "WORTH", 3 * 5 * 4 + 1)
    linear(torch.randn(3, 5), torch.randn(4, 5))
    assert not calls
    linear(torch.randn(2, 2, 5), torch.randn(4, 5))
    assert len(calls) == 1


def test_without_avx512_only_many_outputs_are_one_dnns(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(products, "avx512", lambda: False)
    monkeypatch.setattr(products, "WIDE", 6)
    x, narrow, wide = torch.randn(3, 5), torch.randn(5, 5), torch.randn(6, 5)
    across = torch.randn(5, 6).T  # as in the backward pass
    for weight, expected in ((narrow, 0), (across, 0), (wide, 1)):
        torch.testing.assert_close(linear(x, weight), by_torch(x, weight))
        assert len(calls) == expected


@pytest.mark.parametrize(("found", "expected"), [("AVX2", False), ("AVX512", True), ("DEFAULT", False)])
def test_avx512_is_known(found: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: found)
    products.avx512.cache_clear()
    assert products.avx512() is expected
    products.avx512.cache_clear()


class Net(torch.nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 10, bias=bias), torch.nn.Linear(10, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6)])
def test_a_frozen_layer_gives_the_same_value_and_gradient(bias: bool, shape: tuple[int, ...], calls: list[int]) -> None:
    torch.manual_seed(0)
    net, start = Net(bias).requires_grad_(False), torch.randn(shape)
    found = []
    for _ in range(2):
        x = start.clone().requires_grad_()
        out = net(x)
        found.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, 4)).sum(), x)])
        products.use(net)
    torch.testing.assert_close(found[1], found[0])
    assert len(calls) == 4  # two layers, both ways


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5).double().requires_grad_(), torch.randn(4, 5).double(), torch.randn(4).double()
    assert torch.autograd.gradcheck(lambda x: products._Frozen.apply(x, weight, bias), (x,))


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_layer_that_is_trained_learns(what: str, calls: list[int]) -> None:
    layer = torch.nn.Linear(5, 4).requires_grad_(False)
    products.use(layer)
    getattr(layer, what).requires_grad_()
    layer(torch.randn(3, 5)).sum().backward()
    assert getattr(layer, what).grad.abs().min() > 0 and not calls


def test_on_another_processor_torch_multiplies(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(products, "by_amd", lambda: False)
    one_dnn.cache_clear()
    assert not one_dnn()
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    assert torch.equal(linear(x, weight), by_torch(x, weight)) and not calls


@pytest.mark.parametrize(("linux", "vendor"), [(True, "AuthenticAMD"), (True, "GenuineIntel"), (False, "AuthenticAMD")])
def test_the_processor_is_known(linux: bool, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def read(path: str, **_: Any) -> io.StringIO:
        assert path == "/proc/cpuinfo"
        if not linux:
            raise FileNotFoundError
        return io.StringIO(f"processor\t: 0\nvendor_id\t: {vendor}\n")

    monkeypatch.setattr("builtins.open", read)
    monkeypatch.setattr(products.platform, "processor", lambda: f"AMD64 Family 25, {vendor}" if not linux else "x86_64")
    assert products.by_amd() == (vendor == "AuthenticAMD")


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, None])
def test_an_operator_that_is_gone_or_gives_something_else_is_not_used(
    error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if error:
            raise error
        return x @ weight.T

    monkeypatch.setattr(products, "_by_one_dnn", broken)
    one_dnn.cache_clear()
    assert not one_dnn()


def test_a_loaded_model_multiplies_so(tmp_path: Path, calls: list[int]) -> None:
    lm = LM.load(ModelSection(name=str(tiny.save(tmp_path, "llama")), device="cpu"))
    layers = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear)]
    ids = torch.arange(5, 14)[None]
    calls.clear()
    ours = lm.model(input_ids=ids, use_cache=False).logits
    assert len(calls) == len(layers) > 10
    for layer in layers:
        layer.__dict__.pop("forward")
    torch.testing.assert_close(ours, lm.model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(layers)
