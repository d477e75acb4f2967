"""The adapted linear layer as one step of autograd.

In: a model with a LoRA adapter of peft. Out: the same model, whose adapted layers compute the same numbers with two passes less
over their outputs and without a graph of their own. Invariants: values and gradients are those of peft's layer
(`tests/test_fused.py`); parameters, names and files stay peft's; whatever this does not know is left to peft.
Behind weights of 16 bits the adapter is kept in 32, as peft does, and multiplied in 16, where peft converts all that comes in.

Dimensions: T tokens, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear

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
        y = torch.nn.functional.linear(flat, weight, bias)  # [T, out]
        down = flat @ a.T  # [T, r]
        y.addmm_(down, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, down)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        flat, weight, a, b, down = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])  # [T, out]
        up = g @ b
        up *= ctx.scale  # [T, r]
        for_x = for_a = for_b = None
        if ctx.needs_input_grad[4]:
            for_b = (down.T @ g).T.to(ctx.kept) * ctx.scale  # [out, r]
        if ctx.needs_input_grad[3]:
            for_a = (up.T @ flat).to(ctx.kept)  # [r, in]
        if ctx.needs_input_grad[0]:
            for_x = (g @ weight).addmm_(up, a).view(ctx.shape)
        return for_x, None, None, for_a, for_b, None
