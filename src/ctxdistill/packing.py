"""Many rows in one sequence without padding, behind a prefix that is there once.

In: rows of token ids that share a start. Out: a `Pack`, the tokens of one sequence of batch size 1, and an attention function in
which each row sees the shared start and itself alone. Invariants: every token is in the sequence once, the shared start
included, so that the linear layers, nine tenths of the arithmetic, compute nothing twice and no padding but what `replay` adds; a
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

from ctxdistill.kernels import kernel_of

NAME = "ctxdistill_packed"
CACHE = 2**21
"""Scores that are computed at a time on a CPU; 8 MB in fp32."""
FEW = 128
"""Keys of a token, below which all scores at once are as fast as the flash kernel called twice."""
COPIED = 64
"""Tokens of a start whose keys and values are copied to each row's own: one product then takes the place of two."""
KEPT = 2**22
"""Scores of a layer that are kept for the backward pass."""
Layers = tuple[tuple[torch.Tensor, torch.Tensor], ...]
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tree = Sequence[tuple[int, int]]
"""Tokens that follow a row in many ways: (id, index of the token before it in the tree, -1: the row's last one)."""


class CannotPackError(Exception):
    """The model's attention does something that the packed one does not know."""


@dataclass(frozen=True)
class Pack:
    """One sequence, and where its rows are."""

    ids: torch.Tensor
    """[1, S]: the shared start, without what is cached of it, and the rows one after the other."""
    positions: torch.Tensor
    """[1, S]: of each token in its own row, everything before it counted."""
    where: list[slice]
    """Each row's tokens among the S."""
    rows: torch.Tensor
    """[R, L]: index among the S of each row's tokens, padded with the row's last."""
    back: torch.Tensor
    """Index among R L of every token behind the start."""
    start: int
    """Tokens of the shared start that are in the sequence itself."""
    cached: Layers | None
    """Keys and values [1, K, C, D] of the first C tokens of all rows in each layer, where they were computed before."""
    hidden: torch.Tensor | None
    """[1, R, 1, L, L]: which keys of its row a token must not see; None: those after it."""


def pack(
    bodies: Sequence[Sequence[int]],
    start: Sequence[int],
    cached: Layers | None,
    device: torch.device,
    *,
    before: int = 0,
    tree: Tree = (),
) -> Pack:
    """Lay rows out behind what they share: what is `cached`, of `before` tokens, and then `start`, which is read once.

    Args:
        bodies: ids of each row behind that, none of them empty.
        tree: what follows each row, in many ways at once; its tokens come after the row's in `where`.
    """
    ids, positions, where = list(start), list(range(before, before + len(start))), list[slice]()
    depths, lines = (
        list[int](),
        list[set[int]](),
    )  # of each token of the tree: how deep it is, and what it descends from
    for number, (_, parent) in enumerate(tree):
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
        lines.append({number, *(lines[parent] if parent >= 0 else ())})
    for body in bodies:
        where.append(slice(len(ids), len(ids) + len(body) + len(tree)))
        first = before + len(start)
        ids += [*body, *(token for token, _ in tree)]
        positions += [*range(first, first + len(body)), *(first + len(body) + depth for depth in depths)]
    longest = max(s.stop - s.start for s in where)
    rows = [[min(s.start + i, s.stop - 1) for i in range(longest)] for s in where]
    back = [row * longest + i for row, s in enumerate(where) for i in range(s.stop - s.start)]
    hidden = None
    if tree:
        apart = torch.tensor([[key not in line for key in range(len(tree))] for line in lines], device=device)
        hidden = later(longest, device).repeat(1, len(bodies), 1, 1, 1)
        for mask, body in zip(hidden[0, :, 0], bodies, strict=True):
            mask[len(body) : len(body) + len(tree), len(body) : len(body) + len(tree)] = apart
    return Pack(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        where,
        torch.tensor(rows, device=device),
        torch.tensor(back, device=device),
        len(start),
        cached,
        hidden,
    )


@dataclass(frozen=True)
class Behind:
    """Rows of a batch, each with a cache of its own, that write on behind a shared start that is there once."""

    cached: Layers
    """Keys and values [1, K, C, D] of the shared start in each layer."""
    hidden: torch.Tensor
    """[1, R, 1, M, L]: which of its L own keys, padding among them, each of a row's M new tokens must not see."""


_pack: contextvars.ContextVar[Pack | Behind] = contextvars.ContextVar("pack")


@contextlib.contextmanager
def packed(config: Any, layout: Pack | Behind) -> Iterator[None]:
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
    """Attention of a packed sequence: query [1, H, S, D], key and value [1, K, S, D] -> [1, S, H, D]; or of rows that
    are `Behind` something: query [R, H, M, D], key and value [R, K, L, D] -> [R, M, H, D].

    Two small products take the place of one with a mask of S x S: all tokens with the shared start, and each row with
    itself (or one, of each row with a copy of a short start and itself). Query heads of one key-value head are laid side
    by side, so that they share its keys.

    Raises: `CannotPackError` for soft-capped scores, attention sinks, biases and windows.
    """
    unknown = [name for name in ("softcap", "s_aux", "sliding_window", "position_bias") if others.get(name) is not None]
    if unknown or attention_mask is not None:
        raise CannotPackError(", ".join(unknown) or "attention_mask")
    p, scale = _pack.get(), query.shape[-1] ** -0.5 if scaling is None else scaling
    (heads, size), kv = query.shape[1::2], key.shape[1]
    query = query * scale
    group = heads // kv
    if isinstance(p, Behind):
        start_k, start_v = p.cached[module.layer_idx]
        q = query.view(len(query), kv, group, -1, size).transpose(0, 1)  # [K, R, G, M, D]
        made = _behind(q, key.transpose(0, 1), value.transpose(0, 1), start_k[0], start_v[0], p.hidden, dropout)
        return made.permute(1, 3, 0, 2, 4).reshape(len(query), -1, heads, size), None
    parts = [Apart.apply(x.squeeze(0), p.rows, p.back) for x in (query, key, value)]  # type: ignore[no-untyped-call]
    (q, k, v), own = zip(*parts, strict=True)  # [., P, D]; [., R L, D]
    shared: tuple[torch.Tensor, torch.Tensor] | None = None
    begun = q
    if p.cached:
        keys, values = p.cached[module.layer_idx]
        shared = keys[0], values[0]  # [K, C, D]
    if p.start:
        q = q.view(kv, 1, group, p.start, size)
        if shared:
            begun = _behind(q, k[:, None], v[:, None], *shared, None, dropout)
            shared = torch.cat([shared[0], k], 1), torch.cat([shared[1], v], 1)  # [K, C + P, D]
        else:
            begun, shared = _alone(q, k[:, None], v[:, None], dropout), (k, v)
        begun = begun.reshape(heads, p.start, size)
    r, longest = p.rows.shape
    q = own[0].view(kv, group, r, longest, size).transpose(1, 2)  # [K, R, G, L, D]
    k, v = (x.view(kv, r, longest, size) for x in own[1:])
    if shared or p.hidden is not None:
        shared = shared or (k[:, 0, :0], v[:, 0, :0])
        result = _behind(q, k, v, *shared, p.hidden, dropout)
    else:
        result = _alone(q, k, v, dropout)
    made = result.transpose(1, 2).reshape(heads, r * longest, size)
    return Together.apply(begun, made, p.back).transpose(0, 1)[None], None  # type: ignore[no-untyped-call]


class Apart(torch.autograd.Function):
    """Tokens [., S, D] to the start's [., P, D] and padded rows [., R L, D]. Indexing alone would sum the gradients of equal
    indices, for which it has to sort them; here nothing comes back from padding, which no token sees, so each token has the
    gradient of one place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, back: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`rows`, `back`: as in `Pack`."""
        ctx.save_for_backward(back)
        return x[:, : x.shape[1] - len(back)].clone(), x.index_select(1, rows.flatten())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, for_start: torch.Tensor, for_rows: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return torch.cat([for_start, for_rows.index_select(1, back)], 1), None, None


class Together(torch.autograd.Function):
    """The other way: the start's [., P, D] and padded rows [., R L, D] to tokens [., S, D]."""

    @staticmethod
    def forward(ctx: Any, start: torch.Tensor, rows: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        """`back`: as in `Pack`."""
        ctx.save_for_backward(back)
        ctx.shape = rows.shape
        return torch.cat([start, rows.index_select(1, back)], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (back,) = ctx.saved_tensors
        start = gradient.shape[1] - len(back)
        return gradient[:, :start], gradient.new_zeros(ctx.shape).index_copy_(1, back, gradient[:, start:]), None


def later(length: int, device: torch.device) -> torch.Tensor:
    """Which keys a token must not see, [1, 1, 1, L, L]: those after it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None, None]


def _alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
    """Rows with themselves and nothing before them, in one fused kernel; padding comes last, where no token sees it."""
    if q.is_cuda and kernel_of(q) and not dropout:
        return _flash(q, k, v, k[:, 0, :0], v[:, 0, :0], None)  # gives the same bits again, which torch's own does not
    out = torch.nn.functional.scaled_dot_product_attention(
        *_with_itself(q, k, v), dropout_p=dropout, is_causal=True, scale=1.0
    )
    return out.view(q.shape)


def _behind(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_k: torch.Tensor,
    start_v: torch.Tensor,
    hidden: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Rows with themselves and with a shared start, as `_attend`: by the flash kernel where that can do it and pays."""
    if not dropout and hidden is not None and _is_for_half(q, k, start_k):
        return _half_flash(q, k, v, start_k, start_v, hidden)
    few = k.shape[2] + start_k.shape[1] < FEW
    if kernel_of(q) and not dropout and (hidden is None if q.is_cuda else not few):
        mask = None if hidden is None else hidden[0].to(q.dtype) * torch.finfo(q.dtype).min
        return _flash(q, k, v, start_k, start_v, mask)
    return _in_pieces(q, k, v, start_k, start_v, hidden, dropout)


def _is_for_half(q: torch.Tensor, k: torch.Tensor, start_k: torch.Tensor) -> bool:
    """Whether rows that may see only some of their keys suit `_half_flash`: few scores, as where they write."""
    few = q[..., 0].numel() * k.shape[2] <= 16 * CACHE
    return few and q.is_cuda and bool(start_k.shape[1]) and kernel_of(q) is not None and not q.requires_grad


def _half_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_k: torch.Tensor,
    start_v: torch.Tensor,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """`_attend` without a gradient: by the flash kernel with the start, and with all scores at once of rows with themselves, of
    which CUDA's kernel can hide none. Caches are read as they lie, row by row."""
    kernel = kernel_of(q)
    assert kernel
    (kv, r, group, m, size), length = q.shape, k.shape[2]
    begun, logs = kernel.forward(*_with_start(q, start_k, start_v), False, None)
    scores = q.transpose(0, 1).reshape(r, kv, group * m, size) @ k.transpose(0, 1).transpose(-1, -2)  # [R, K, G M, L]
    scores = scores.view(r, kv, group, m, length).float().masked_fill(hidden.transpose(0, 1), torch.finfo().min)
    weights = scores.softmax(-1).to(v.dtype).view(r, kv, group * m, length)
    own = (weights @ v.transpose(0, 1)).view(r, kv, group, m, size).transpose(0, 1)  # [K, R, G, M, D]
    total = scores.logsumexp(-1).transpose(0, 1)  # [K, R, G, M]
    return _merged(own, total, begun.reshape(q.shape), logs.reshape(total.shape))


def _merged(own: torch.Tensor, logs: torch.Tensor, begun: torch.Tensor, begun_logs: torch.Tensor) -> torch.Tensor:
    """What is seen in two parts [..., D] by the logarithms [...] of their sums of exponentials."""
    share = torch.sigmoid(begun_logs - logs)[..., None]  # fp32
    return torch.lerp(own.float(), begun.float(), share).to(own.dtype)


def _flash(*inputs: torch.Tensor | None) -> torch.Tensor:
    made: torch.Tensor = Flash.apply(*inputs)  # type: ignore[no-untyped-call]
    return made


class Flash(torch.autograd.Function):
    """`_attend` by two calls of the flash kernel, which keeps no scores: each row with itself, and all with the shared start.

    A softmax over both is the mean of the two results, weighted by the sums of exponentials of their scores, which the kernel
    gives as logarithms. The gradient is the sum of what the kernel's backward gives for each call, with the result and
    the logarithm of both: the weight of a key is exp(score - logarithm), whichever call it was in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start_k: torch.Tensor,
        start_v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Shapes as in `_attend`; `mask` [R, 1, M, L] is added to scores of rows with themselves, None: none of later keys."""
        kernel = kernel_of(q)
        assert kernel
        own, logs = kernel.forward(*_with_itself(q, k, v, mask), mask is None, _for_heads(mask, q))
        out: torch.Tensor = own.reshape(q.shape)
        total: torch.Tensor = logs.reshape(q.shape[:-1])
        if start_k.shape[1]:
            begun, logs = kernel.forward(*_with_start(q, start_k, start_v), False, None)
            begun, logs = begun.reshape(q.shape), logs.reshape(total.shape)
            out, total = _merged(out, total, begun, logs), torch.logaddexp(total, logs)
        ctx.save_for_backward(q, k, v, start_k, start_v, mask, out, total)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v, start_k and start_v."""
        q, k, v, start_k, start_v, mask, out, total = ctx.saved_tensors
        kernel = kernel_of(q)
        assert kernel

        def back(part: Part, causal: bool, added: torch.Tensor | None = None) -> list[torch.Tensor]:
            gradient, found, logs = (x.reshape(*part[0].shape[:3], *x.shape[4:]) for x in (gradients[0], out, total))
            return list(kernel.backward(gradient, *part, found, logs, causal, added))

        to_q, *own = back(_with_itself(q, k, v, mask), mask is None, _for_heads(mask, q))
        to_k, to_v = (x.reshape(*q.shape[:2], -1, *k.shape[2:]).sum(2) for x in own)
        to_q = to_q.reshape(q.shape)
        if not start_k.shape[1]:
            return to_q, to_k, to_v, None, None, None
        more, to_start_k, to_start_v = back(_with_start(q, start_k, start_v), False)
        return to_q + more.reshape(q.shape), to_k, to_v, to_start_k[0], to_start_v[0], None


def _with_itself(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> Part:
    """Each row with itself, as a kernel takes it: with a mask, the heads of a group are positions of one head, [K R, 1, G M, D]
    and twice [K R, 1, L, D]; a kernel that masks what comes later must see positions as they are, [K R, G, M, D], keys alike."""
    kv, r, group, m, size = q.shape
    if mask is not None:
        return q.reshape(kv * r, 1, group * m, size), k.reshape(kv * r, 1, -1, size), v.reshape(kv * r, 1, -1, size)
    keys, values = (x[:, :, None].expand(kv, r, group, -1, size).reshape(kv * r, group, -1, size) for x in (k, v))
    return q.reshape(kv * r, group, m, size), keys, values


def _with_start(q: torch.Tensor, start_k: torch.Tensor, start_v: torch.Tensor) -> Part:
    """All rows with the start: [1, K, R G M, D] and twice [1, K, P, D]."""
    return q.reshape(1, len(q), -1, q.shape[-1]), start_k[None], start_v[None]


def _for_heads(mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """[R, 1, M, L] -> [K R, 1, G M, L]."""
    return None if mask is None else mask.repeat(q.shape[0], 1, q.shape[2], 1)


def _in_pieces(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_k: torch.Tensor,
    start_v: torch.Tensor,
    hidden: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """`_attend` in pieces whose scores fit the processor's cache; where a gradient would have to keep many of them, they
    are computed again in the backward pass."""
    _, rows, _, longest, _ = q.shape
    hidden = later(longest, q.device) if hidden is None else hidden
    width = q[:, 0, :, 0, 0].numel() * (k.shape[2] + start_k.shape[1])  # scores of one query position in all heads
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
            mask = hidden[:, part] if hidden.shape[1] > 1 else hidden
            inputs = (q[:, part, :, seen], k[:, part], v[:, part], start_k, start_v, mask[..., seen, :], dropout)
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
    if 0 < start_k.shape[1] <= COPIED:
        hidden = torch.nn.functional.pad(hidden, (start_k.shape[1], 0))
        k, v = (
            torch.cat([begun[:, None].expand(-1, r, -1, -1), x], 2) for begun, x in ((start_k, k), (start_v, v))
        )  # [K, R, P + L, D]
        start_k = start_k[:, :0]
    length, once = k.shape[2], bool(start_k.shape[1])  # whether there is a start that all rows share as it is
    scores = (q.reshape(kv, r, group * m, size) @ k.transpose(-1, -2)).view(kv, r, group, m, length)
    scores = scores + scores.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    if once:
        start = q.reshape(kv, r * group * m, size) @ start_k.transpose(-1, -2)  # [K, R G M, P]
        scores = torch.cat([start.view(kv, r, group, m, -1), scores], -1)  # [K, R, G, M, P + L]
    weights = torch.nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype), dropout)
    found = (weights[..., -length:].reshape(kv, r, group * m, length) @ v).view_as(q)
    if once:
        found = found + (weights[..., :-length].reshape(kv, r * group * m, -1) @ start_v).view_as(q)
    return found


AttentionInterface.register(NAME, attention)
