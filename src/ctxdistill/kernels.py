"""PyTorch's flash attention with the logarithms that two of its results can be merged by.

In: queries, keys and values. Out: the `Kernel` for their device and type. Invariants: no kernel keeps or gives the scores;
`backward` gives the same bits each time; with what was seen and the logarithms of more keys than it is given it gives their part of
the gradient, since the weight of a key is exp(score - logarithm) (`tests/test_packing.py`, `tests/test_cuda.py`).

Dimensions: B batch, H heads, M queries, L keys, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

aten: Any = torch.ops.aten
BLOCK = 64
"""Keys of a block that CUDA's flash kernels take at a time, at least."""


class Kernel(NamedTuple):
    """What `scaled_dot_product_attention` calls on a device; called here because that does not give the logarithms."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """(q [B, H, M, D], k and v [B, H, L, D], causal, mask) -> what is seen, and the logarithms [B, H, M] of the sums of
    exponentials. Scores are not scaled."""
    backward: Callable[..., tuple[torch.Tensor, ...]]
    """(gradient, q, k, v, what was seen, logarithms, causal, mask) -> gradients of q, k, v, the same bits each time."""


def _of_cpu() -> Kernel | None:
    forward = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    backward = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    if not forward or not backward:
        return None
    return Kernel(
        lambda q, k, v, causal, mask: forward(q, k, v, 0.0, causal, attn_mask=mask, scale=1.0),
        lambda g, *x: backward(g, *x[:5], 0.0, x[5], attn_mask=x[6], scale=1.0),
    )


def _of_cuda_16_bits() -> Kernel:
    def backward(g: torch.Tensor, *x: Any) -> tuple[torch.Tensor, ...]:
        q, k, v, out, logs, causal, _ = x
        sizes = None, None, q.shape[2], k.shape[2]
        random = (q.new_empty(n, dtype=torch.uint64) for n in (2, ()))  # of dropout, which there is not
        # what one block of keys gives is summed in one order as it is, and more slowly with the other kernel
        with repeatable() if k.shape[2] > BLOCK else contextlib.nullcontext():
            made = aten._scaled_dot_product_flash_attention_backward(
                g, q, k, v, out, logs.contiguous(), *sizes, 0.0, causal, *random, scale=1.0
            )
        return tuple(made)

    return Kernel(
        lambda q, k, v, causal, _: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=1.0)[:2],
        backward,
    )


def _of_cuda_any() -> Kernel:
    """For 32 bits, and for cards before the eighth generation."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, _: None) -> tuple[torch.Tensor, ...]:
        out, logs, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=1.0)
        return out, logs[..., : q.shape[2]]

    def backward(g: torch.Tensor, *x: Any) -> tuple[torch.Tensor, ...]:
        q, k, v, out, logs, causal, _ = x
        logs = torch.nn.functional.pad(logs, (0, -logs.shape[2] % 32), value=torch.inf)  # as `forward` gives them
        random = q.new_empty((), dtype=torch.int64)
        wanted = [True, True, True, False]
        with repeatable():
            made = aten._scaled_dot_product_efficient_attention_backward(
                g, q, k, v, None, out, logs, random, random, 0.0, wanted, causal, scale=1.0
            )
        return tuple(made[:3])

    return Kernel(forward, backward)  # type: ignore[arg-type]


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Inside, kernels of CUDA that sum in any order are not used; memory that is not written yet stays as it is."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


CPU, FLASH, EFFICIENT = _of_cpu(), _of_cuda_16_bits(), _of_cuda_any()
FLOATS = torch.float32, torch.bfloat16, torch.float16


def kernel_of(q: torch.Tensor) -> Kernel | None:
    """The kernel for a tensor's device, type and head size; None: there is none."""
    if q.dtype not in FLOATS:
        return None
    if q.is_cuda:
        if q.shape[-1] % 8:
            return None
        flash = q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)
        return FLASH if flash else EFFICIENT
    return CPU if q.device.type == "cpu" else None
