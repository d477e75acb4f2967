"""The adapted linear layer, and the norm, as one step of autograd each.

In: a model, with a LoRA adapter of peft or without. Out: the same model, whose layers compute the same numbers in fewer passes
over memory and without a graph of their own. Invariants: values and gradients are those of peft's layer and of the model's
own norm (`tests/test_fused.py`); parameters, names and files stay theirs; whatever this does not know is left to them.
Behind weights of 16 bits the adapter is kept in 32, as peft does, and multiplied in 16, where peft converts all that comes in.

Dimensions: T tokens, r rank, d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear

from ctxdistill.products import linear

Tensor = torch.Tensor


def fuse(model: torch.nn.Module) -> None:
    """Fuse every adapted layer that is a plain linear layer with a plain adapter."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is torch.nn.Linear and not module.lora_variant:
            module.forward = _Forward(module)


class _Forward:
    """In place of an adapted layer's `forward`."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        names = layer.active_adapters
        if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A or args or kwargs:
            return layer.__class__.forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = names
        base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        dropout = layer.lora_dropout[name]
        noisy = layer.training and getattr(dropout, "p", 0.0) > 0
        same = x.dtype == base.weight.dtype and a.dtype == b.dtype and a.dtype in (x.dtype, torch.float32)
        if noisy or not same or base.weight.requires_grad or layer.lora_bias[name]:
            return layer.__class__.forward(layer, x)  # type: ignore[no-any-return]
        return _Adapted.apply(x, base.weight, base.bias, a, b, layer.scaling[name])  # type: ignore[no-any-return,no-untyped-call]


class _Adapted(torch.autograd.Function):
    """y = x W' + bias + scale (x A') B', with W frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [T, in]
        ctx.kept = a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        y = linear(flat, weight, bias)  # [T, out]
        down = linear(flat, a)  # [T, r]
        y.addmm_(down, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, down)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        flat, weight, a, b, down = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])  # [T, out]
        up = linear(g, b.T)
        up *= ctx.scale  # [T, r]
        for_x = for_a = for_b = None
        if ctx.needs_input_grad[4]:
            for_b = linear(down.T, g.T).T.to(ctx.kept) * ctx.scale  # [out, r]
        if ctx.needs_input_grad[3]:
            for_a = linear(up.T, flat.T).to(ctx.kept)  # [r, in]
        if ctx.needs_input_grad[0]:
            for_x = linear(g, weight.T).addmm_(up, a).view(ctx.shape)
        return for_x, None, None, for_a, for_b, None


def fuse_norms(model: torch.nn.Module) -> None:
    """Fuse every root-mean-square norm that computes what this knows; that is tried, since they are named and written in many
    ways."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and _is_plain(module):
            module.forward = _Norm(module)


@torch.no_grad()
def _is_plain(module: Any) -> bool:
    """Whether a norm computes x / sqrt(mean x^2 + eps) times a weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or weight.is_meta or _epsilon(module) is None:
        return False
    # small numbers among them, for which epsilon matters
    x = torch.linspace(-2, 3, 4 * len(weight)).view(4, -1) * torch.tensor([1.0, 1e-3, 10.0, 1e-2])[:, None]
    x = x.to(weight)
    try:
        own = module(x)
    except Exception:  # it wants something else
        return False
    if not isinstance(own, torch.Tensor) or own.dtype != x.dtype or own.shape != x.shape:
        return False
    return torch.allclose(_normed(x, module), own, rtol=8 * torch.finfo(x.dtype).eps, atol=0)


def _epsilon(module: Any) -> float | None:
    found: float | None = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found


def _normed(x: Tensor, module: Any) -> Tensor:
    """By torch's own on an accelerator, where it is one kernel; on a CPU that takes as many passes as the model's code."""
    if x.device.type == "cpu":
        return _RootMeanSquare.apply(x, module.weight, _epsilon(module))  # type: ignore[no-any-return,no-untyped-call]
    made: Tensor = torch.nn.functional.rms_norm(x, module.weight.shape, module.weight, _epsilon(module))
    return made


class _Norm:
    """In place of a norm's `forward`."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._can(args[0]):  # without a gate, for instance
            return _normed(args[0], self.norm)
        return self.norm.__class__.forward(self.norm, *args, **kwargs)

    def _can(self, x: Tensor) -> bool:
        weight = self.norm.weight
        if x.dtype != weight.dtype:
            return False
        # on an accelerator teacher and student round alike when all weights are trained, too
        return x.device.type != "cpu" or (x.dtype != torch.float64 and not weight.requires_grad)


class _RootMeanSquare(torch.autograd.Function):
    """y = x w / sqrt(mean x^2 + eps), with w frozen; x [..., d], w [d]. The sum is in fp32 for types of 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = _wide(x)
        square: Tensor = torch.linalg.vecdot(wide, wide) / x.shape[-1]  # [...]
        scale = (square + epsilon).rsqrt_()[..., None]  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        g, wide = _wide(gradient * weight), _wide(x)
        along = torch.linalg.vecdot(g, wide)[..., None] * scale**3 / -x.shape[-1]  # [..., 1]
        return g.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
