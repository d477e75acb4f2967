"""Many rows in one sequence without padding, behind a prefix that is there once.

In: rows of token ids that share a start. Out: a `Pack`, the tokens of one sequence of batch size 1, and an attention function in
which each row sees the shared start and itself alone. Invariants: every token is in the sequence once, the shared start
included, so that the linear layers, nine tenths of the arithmetic, compute nothing twice and nothing for padding; a
gradient reaches the shared start from all rows; what comes out equals the rows one by one (`tests/test_packing.py`).

The start is either the first tokens of the sequence itself (a student's template, which has a gradient), or a key-value
cache that an earlier forward pass left (a teacher's context, which has none).

Dimensions: R rows, L longest row, S tokens of the sequence, P shared start, H heads, K key-value heads, D head size.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

NAME = "ctxdistill_packed"
CACHE = 2**19
"""Scores that are computed at a time on a CPU; 2 MB in fp32."""
KEPT = 2**22
"""Scores of a layer that are kept for the backward pass."""
Layers = tuple[tuple[torch.Tensor, torch.Tensor], ...]


class CannotPackError(Exception):
    """The model's attention does something that the packed one does not know."""


@dataclass(frozen=True)
class Pack:
    """One sequence, and where its rows are."""

    ids: torch.Tensor
    """[1, S]: the shared start, unless it is cached, and the rows one after the other."""
    positions: torch.Tensor
    """[1, S]: of each token in its own row, the start counted."""
    where: list[slice]
    """Each row's tokens among the S."""
    rows: torch.Tensor
    """[R, L]: index among the S of each row's tokens, padded with the row's last."""
    back: torch.Tensor
    """Index among R L of every token behind the start."""
    start: int
    """Tokens of the shared start that are in the sequence itself."""
    cached: Layers | None
    """Keys and values [1, K, P, D] of the shared start in each layer, where it was computed before."""
    hidden: torch.Tensor
    """[1, 1, 1, L, L]: which keys of its row a token must not see."""


def pack(bodies: Sequence[Sequence[int]], start: Sequence[int], cached: Layers | None, device: torch.device) -> Pack:
    """Lay rows out behind a shared start.

    Args:
        bodies: ids of each row behind the start, none of them empty.
        start: ids of the shared start; with `cached`, they are not forwarded again.
    """
    inside = 0 if cached else len(start)
    ids, positions, where = list(start[:inside]), list(range(inside)), list[slice]()
    for body in bodies:
        where.append(slice(len(ids), len(ids) + len(body)))
        ids += body
        positions += range(len(start), len(start) + len(body))
    longest = max(map(len, bodies))
    rows = [[min(s.start + i, s.stop - 1) for i in range(longest)] for s in where]
    back = [row * longest + i for row, body in enumerate(bodies) for i in range(len(body))]
    return Pack(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        where,
        torch.tensor(rows, device=device),
        torch.tensor(back, device=device),
        inside,
        cached,
        torch.ones(longest, longest, dtype=torch.bool, device=device).triu(1)[None, None, None],
    )


_pack: contextvars.ContextVar[Pack] = contextvars.ContextVar("pack")


@contextlib.contextmanager
def packed(config: Any, layout: Pack) -> Iterator[None]:
    """Inside, the model of `config` attends as `layout` says."""
    before, token = config._attn_implementation, _pack.set(layout)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _pack.reset(token)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed sequence: query [1, H, S, D], key and value [1, K, S, D] -> [1, S, H, D].

    Two small products take the place of one with a mask of S x S: all tokens with the shared start, and each row with
    itself. Query heads of one key-value head are laid side by side, so that no key is copied.

    Raises: `CannotPackError` for soft-capped scores, attention sinks, biases and windows.
    """
    unknown = [name for name in ("softcap", "s_aux", "sliding_window", "position_bias") if others.get(name) is not None]
    if unknown or attention_mask is not None:
        raise CannotPackError(", ".join(unknown) or "attention_mask")
    p, scale = _pack.get(), query.shape[-1] ** -0.5 if scaling is None else scaling
    (heads, size), kv = query.shape[1::2], key.shape[1]
    query = query * scale
    out, shared = [], None
    if p.start:
        first = slice(0, p.start)
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, first],
                key[:, :, first].repeat_interleave(heads // kv, 1),
                value[:, :, first].repeat_interleave(heads // kv, 1),
                dropout_p=dropout,
                is_causal=True,
                scale=1.0,
            )[0]
        )  # [H, P, D]
        shared = key[0, :, first], value[0, :, first]  # [K, P, D]
    elif p.cached:
        keys, values = p.cached[module.layer_idx]
        shared = keys[0], values[0]
    (r, longest), group = p.rows.shape, heads // kv
    q = query[0][:, p.rows].view(kv, group, r, longest, size).transpose(1, 2)  # [K, R, G, L, D]
    k, v = key[0][:, p.rows], value[0][:, p.rows]  # [K, R, L, D]
    if shared is None:  # one fused kernel; padding comes last, where no token sees it
        four = (kv * r, group, longest, size)
        result = torch.nn.functional.scaled_dot_product_attention(
            q.reshape(four),
            k[:, :, None].expand(q.shape).reshape(four),
            v[:, :, None].expand(q.shape).reshape(four),
            dropout_p=dropout,
            is_causal=True,
            scale=1.0,
        ).view_as(q)
    else:
        result = _behind(q, k, v, *shared, p.hidden, dropout)
    out.append(result.transpose(1, 2).reshape(heads, r * longest, size)[:, p.back])  # [H, S - P, D]
    return torch.cat(out, 1).transpose(0, 1)[None], None


def _behind(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_k: torch.Tensor,
    start_v: torch.Tensor,
    hidden: torch.Tensor,
    dropout: float,
) -> torch.Tensor:
    """`_attend` in pieces whose scores fit the processor's cache; where a gradient would have to keep many of them, they
    are computed again in the backward pass."""
    _, rows, _, longest, _ = q.shape
    width = q[:, 0, :, 0, 0].numel() * (longest + start_k.shape[1])  # scores of one query position in all heads
    at_once = CACHE if q.device.type == "cpu" else 64 * CACHE
    some = max(1, at_once // (width * longest))
    positions = longest if some > 1 else max(16, at_once // width)
    again = torch.is_grad_enabled() and q.requires_grad and rows * longest * width > KEPT
    made = []
    for i in range(0, rows, some):
        part = slice(i, i + some)
        pieces = []
        for j in range(0, longest, positions):
            seen = slice(j, j + positions)
            inputs = (q[:, part, :, seen], k[:, part], v[:, part], start_k, start_v, hidden[..., seen, :], dropout)
            pieces.append(checkpoint(_attend, *inputs, use_reentrant=False) if again else _attend(*inputs))
        made.append(torch.cat(pieces, 3) if len(pieces) > 1 else pieces[0])
    return torch.cat(made, 1) if len(made) > 1 else made[0]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_k: torch.Tensor,
    start_v: torch.Tensor,
    hidden: torch.Tensor,
    dropout: float,
) -> torch.Tensor:
    """Rows with themselves, q [K, R, G, M, D] of M positions, k and v [K, R, L, D], and with the shared start [K, P, D];
    one softmax over both -> [K, R, G, M, D]."""
    kv, r, group, m, size = q.shape
    longest = k.shape[2]
    own = q.reshape(kv, r, group * m, size) @ k.transpose(-1, -2)  # [K, R, G M, L]
    own = own.view(kv, r, group, m, longest).masked_fill(hidden, -torch.inf)
    start = q.reshape(kv, r * group * m, size) @ start_k.transpose(-1, -2)  # [K, R G M, P]
    scores = torch.cat([start.view(kv, r, group, m, -1), own], -1)  # [K, R, G, M, P + L]
    weights = torch.nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype), dropout)
    from_start = weights[..., :-longest].reshape(kv, r * group * m, -1) @ start_v
    from_own = weights[..., -longest:].reshape(kv, r, group * m, longest) @ v
    return from_start.view_as(q) + from_own.view_as(q)


AttentionInterface.register(NAME, attention)
