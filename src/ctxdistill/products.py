"""Products with frozen matrices, and the fused adapter's, on AMD's processors by oneDNN.

In: fp32 tensors on a CPU of AMD's. Torch leaves their products to MKL, which is made for Intel's processors; oneDNN, which
torch brings along, is faster there: with AVX-512 always, without it where outputs are many, as the head's (docs/performance.md).
Out: the same numbers up to rounding, which is up to 2.2 times MKL's, and below 1e-6 of a product's size. Invariant: everything
else (other processors and devices, other types, small products, layers that are trained, a torch without oneDNN) is multiplied by
torch as usual.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch

Tensor = torch.Tensor
WORTH = 2**19
"""Multiplications below which oneDNN's preparation of each new shape costs more than it gains."""
WIDE = 2048
"""Outputs from which oneDNN is faster without AVX-512, too, if each one's weights lie side by side."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + bias, [..., in] and [out, in] -> [..., out], without a gradient. W may have any strides."""
    return _by_one_dnn(x, weight, bias) if _can(x, weight) else torch.nn.functional.linear(x, weight, bias)


def _can(x: Tensor, weight: Tensor) -> bool:
    large = x.numel() * len(weight) >= WORTH
    if not large or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or not one_dnn():
        return False
    return avx512() or (len(weight) >= WIDE and weight.stride(-1) == 1)


def _by_one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


@functools.cache
def one_dnn() -> bool:
    """Whether oneDNN multiplies here. Its operator is none of torch's public ones, so it is tried once."""
    if not by_amd() or not torch.backends.mkldnn.enabled:
        return False
    x, weight, bias = torch.ones(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        return torch.equal(_by_one_dnn(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    except (AttributeError, RuntimeError):
        return False


def by_amd() -> bool:
    """Whether the processor is one of AMD's."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            about = file.read(2000)
    except OSError:  # not Linux
        about = platform.processor()
    return "AuthenticAMD" in about


@functools.cache
def avx512() -> bool:
    """Whether torch uses AVX-512 here."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def use(model: torch.nn.Module) -> None:
    """Have every linear layer of a model multiply so while its weights are frozen."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = _Forward(module)  # type: ignore[assignment]


class _Forward:
    """In place of a linear layer's `forward`."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if not _can(x, weight) or weight.requires_grad or (bias is not None and bias.requires_grad):
            return torch.nn.functional.linear(x, weight, bias)
        return _Frozen.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


class _Frozen(torch.autograd.Function):
    """x W' + bias, with W and the bias frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradient, weight.T), None, None
