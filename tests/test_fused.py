"""The fused adapted layer against peft's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from ctxdistill import fused
from ctxdistill.fused import fuse, fuse_norms
from ctxdistill.lm import LM
from ctxdistill.recipe import ModelSection


class Net(torch.nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 10, bias=bias), torch.nn.Linear(10, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.second(torch.tanh(self.first(x))))


def adapted(
    bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float32, two: bool = False, **more: Any
) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["first", "second"], **more)
    net = get_peft_model(Net(bias).to(dtype), config, autocast_adapter_dtype=True)  # type: ignore[arg-type]
    if two:
        net.add_adapter("other", config)
        net.base_model.set_adapter(["default", "other"])
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    return net


def results(net: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of a loss for the input and the adapter."""
    x = x.clone().requires_grad_()
    out = net(x)
    parameters = [p for p in net.parameters() if p.requires_grad]
    torch.manual_seed(1)
    return [out, *torch.autograd.grad((out * torch.randn(out.shape)).sum(), [x, *parameters])]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the fused step was taken."""
    found: list[int] = []
    apply = fused._Adapted.apply
    monkeypatch.setattr(fused._Adapted, "apply", lambda *inputs: found.append(1) or apply(*inputs))
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6)])
def test_values_and_gradients_are_those_of_peft(bias: bool, shape: tuple[int, ...], calls: list[int]) -> None:
    net, x = adapted(bias), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    slow = results(net, x)
    fuse(net)
    for a, b in zip(slow, results(net, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * a.abs().max().item(), rtol=1e-5)
    assert len(calls) == 2
    with net.disable_adapter(), torch.no_grad():
        assert torch.equal(net(x), Net.forward(net.base_model.model, x))
        assert len(calls) == 2
    assert torch.equal(results(net, x)[0], results(net, x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_32_bits_behind_weights_in_16_is_as_exact_as_with_peft(
    dtype: torch.dtype, calls: list[int]
) -> None:
    draw = torch.Generator().manual_seed(2)
    sums = [torch.zeros(6, dtype=torch.float64) for _ in range(2)]  # of squared errors: output, x, A, B, A, B
    for _ in range(20):
        net, x = adapted(dtype=dtype), torch.randn(64, 6, generator=draw).to(dtype)
        assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
        slow = results(net, x)
        fuse(net)
        fast = results(net, x)
        exact = results(net.double(), x.double())  # type: ignore[no-untyped-call]
        for total, found in zip(sums, (slow, fast), strict=True):
            assert [a.dtype for a in found] == [dtype, dtype, *[torch.float32] * 4]
            total += torch.stack([(a.double() - e).square().mean() for a, e in zip(found, exact, strict=True)])
    assert len(calls) == 80
    rounding = torch.finfo(dtype).eps
    for name, slow_error, fast_error, e in zip(
        ("y", "x", "A", "B", "A", "B"), *(t.div(20).sqrt() for t in sums), exact, strict=True
    ):
        assert 0 < fast_error <= 1.5 * slow_error + rounding * e.square().mean().sqrt(), name


@pytest.mark.parametrize("what", ["dropout", "other types", "merged", "trained base", "two", "lora_bias", "use_dora"])
def test_what_it_does_not_know_is_left_to_peft(what: str, calls: list[int]) -> None:
    more = {what: True} if what in ("two", "lora_bias", "use_dora") else {}
    net = adapted(dropout=0.5 if what == "dropout" else 0.0, **more)
    x = torch.randn(3, 6)
    if what == "other types":
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.double()
    if what == "merged":
        net.merge_adapter()
    if what == "trained base":
        net.requires_grad_(True)
    net.train()
    torch.manual_seed(3)
    slow = net(x)
    fuse(net)
    torch.manual_seed(3)
    assert torch.equal(slow, net(x)) and not calls
    if what == "dropout":
        net.eval()
        net(x)
        assert len(calls) == 2


# -- norms ------------------------------------------------------------------------------------------------------------


class RMSNorm(torch.nn.Module):
    """The slow, obvious one; `offset` as some models add to the weight."""

    def __init__(self, size: int, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 2, size, dtype=dtype), requires_grad=False)
        self.eps, self.offset = 1e-3, offset

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * gate
        scale = (x.float().pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return (x.float() * scale).to(x.dtype) * (self.weight + self.offset)


def is_fused(net: torch.nn.Module) -> bool:
    return isinstance(net.forward, fused._Norm)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 3, 4, 24)])
def test_values_and_gradients_are_those_of_the_norm(shape: tuple[int, ...]) -> None:
    net = RMSNorm(24)
    found = []
    for _ in range(2):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).mul_(0.1).requires_grad_()
        out = net(x)
        found.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, 24)).sum(), x)])
        fuse_norms(net)
    assert is_fused(net) and found[1][0].grad_fn.name().startswith("_RootMeanSquare")
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_norm_gradcheck() -> None:
    x, weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: fused._RootMeanSquare.apply(x, weight, 1e-2), (x,))


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    for other in (RMSNorm(24, offset=1.0), torch.nn.LayerNorm(24).requires_grad_(False)):
        fuse_norms(other)
        assert not is_fused(other)
    eps = RMSNorm(24)
    eps.variance_epsilon = 1e-6  # type: ignore[assignment]
    fuse_norms(eps)  # what it says is not what it does
    assert not is_fused(eps)


@pytest.mark.parametrize("kind", ["a pair", "another type", "another dimension", "three dimensions only"])
def test_a_norm_that_gives_or_wants_something_else_is_left_alone(kind: str) -> None:
    class OddRMSNorm(RMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> Any:
            if kind == "a pair":
                return super().forward(x), x
            if kind == "another type":
                return super().forward(x).double()
            assert kind != "three dimensions only" or x.ndim == 3
            return super().forward(x) * x.mean(2 if kind == "another dimension" else 1, keepdim=True)

    net = OddRMSNorm(24)
    fuse_norms(net)
    assert not is_fused(net)


def test_what_a_norm_is_not_tried_on_goes_to_its_own_code() -> None:
    net, x = RMSNorm(24), torch.randn(3, 24)
    fuse_norms(net)
    gate = torch.rand(3, 24)
    assert torch.equal(net(x, gate=gate), RMSNorm.forward(net, x, gate))
    assert torch.equal(net(x=x), RMSNorm.forward(net, x))
    assert net(x.bfloat16()).dtype == torch.float32  # as it is with its own
    net.weight.requires_grad_()  # all weights are trained
    net(x).sum().backward()
    assert net.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_16_bits_sums_in_32(dtype: torch.dtype) -> None:
    net, sizes = RMSNorm(240, dtype=dtype), torch.tensor([1.0, 1e-2, 30.0, 1.0, 9.0])[:, None]
    start = (torch.randn(5, 240) * sizes).to(dtype)
    upstream, found = torch.randn(5, 240).to(dtype), []
    for _ in range(2):
        x = start.clone().requires_grad_()
        out = net(x)
        found.append([out.detach(), *torch.autograd.grad(out, x, upstream)])
        fuse_norms(net)
    assert is_fused(net) and all(value.dtype == dtype for value in found[1])
    exact = start.double().requires_grad_()
    scale = (exact.square().mean(-1, keepdim=True) + net.eps).rsqrt()
    out = exact * scale * net.weight.double()
    exactly = [out.detach(), *torch.autograd.grad(out, exact, upstream.double())]
    for own, fused_, wanted in zip(*found, exactly, strict=True):
        error = (own - wanted).norm()
        assert (fused_ - wanted).norm() <= 1.05 * error + 1e-9 and error <= 1e-2 * wanted.norm()


def test_the_norms_of_a_loaded_model_are_fused_and_compute_the_same(tmp_path: Path) -> None:
    lm = LM.load(ModelSection(name=str(tiny.save(tmp_path, "llama")), device="cpu"))
    norms = [m for m in lm.model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(norms) == 2 * lm.model.config.num_hidden_layers + 1 and all(map(is_fused, norms))
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        x = torch.randn(1, 9, lm.model.config.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = lm.model(inputs_embeds=x, use_cache=False).logits
        found.append([out, *torch.autograd.grad(out.logsumexp(-1).sum(), x)])
        for norm in norms:
            norm.__dict__.pop("forward", None)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
