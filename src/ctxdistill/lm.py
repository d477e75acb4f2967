"""The only door to transformers and peft: load a model, switch the adapter, score, generate.

In: token ids. Out: final hidden states at the positions asked for, logits in fp32, generated ids. Invariants: there is
one copy of the weights, frozen and without dropout; the teacher and the base model are this model with the adapter off,
the student is it with the adapter on; only inside `all_weights`, for the study's fine-tuned arms, are the weights
themselves trained, and they are put back at its end; a shared prefix is forwarded once and its key-value cache is never
changed: rows are packed or written behind it; scoring against it equals the full forward
(`tests/test_lm.py` holds this for every supported architecture).

Dimensions: B batch, L sequence, P prefix, T supervised positions, V vocabulary, d hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import CartridgeConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from ctxdistill import files, processes, products
from ctxdistill.adapters import encoder_of, settings_of, strengthened, take_off
from ctxdistill.caches import Prefix, RoomyLayer
from ctxdistill.decoding import Fixed, Growing
from ctxdistill.errors import FitError, ModelError
from ctxdistill.fused import fuse, fuse_norms
from ctxdistill.packing import Behind, CannotPackError, Pack, Tree, pack, packed
from ctxdistill.recipe import LoraSection, ModelSection
from ctxdistill.rundir import fingerprint
from ctxdistill.weights import (
    check_size,
    keep_differentiable,
    keep_freed_memory,
    load_tokenizer,
    loading,
    locate,
    memory_of,
    pick_device,
    pick_dtype,
    quantized,
    quiet_peft,
    tokenizer_hash,
    weights_in,
)

LEAST = 16
"""Tokens of a shared start that is worth a cache of its own."""
WORTH_SHARING = 8
"""A shared start below this part of the rows saves less than attention without one, in a single fused kernel, does."""
FEW, MANY = 32, 256
"""Rows side by side that keep a CPU busy, and an accelerator."""
HELD = 2**32
"""Bytes of the keys and values of rows that are written side by side on an accelerator, if it has them."""
SPARE = 4
"""One in so many of the bytes that a GPU has beside the model may be taken for one purpose."""
WORTH_RECORDING = 8
"""Tokens still to write that make up for recording one of them."""
AT_ONCE = 2**14
"""Tokens of rows that are read in one forward pass without a gradient, if the memory is there; more of them are no faster."""
PAD = 0  # padding is masked everywhere, so any id that has an embedding will do; a tokenizer's own may have none


@dataclass
class LM:
    """A frozen causal language model with its tokenizer, and the student's adapter once there is one."""

    model: Any
    tokenizer: Any
    device: torch.device
    info: dict[str, Any]
    peft: Any = None
    trains_head: bool = False
    """Whether the output head is trained, too; else it is shared by teacher and student, and frozen."""
    classes: torch.nn.Linear | None = None
    """A classification head in place of the vocabulary's, while there is one."""
    base_only: bool = False
    """Whether the adapter is off."""
    sharded: bool = False
    """Whether each process has a part of the weights."""
    records: bool = False
    """Whether writing is recorded and replayed; turned off where that fails."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, such as a fall-back that was taken."""

    @classmethod
    def load(
        cls, section: ModelSection, base_dir: Path = Path("."), *, dropout: bool = False, key: str = "model.name"
    ) -> LM:
        """Load the model and tokenizer that the recipe names (with `key`), frozen, in eval mode; `dropout` leaves the model's
        own in.

        Raises: `ModelError` when there is no such model, or its head is not understood.
        """
        device = pick_device(section.device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # what streams, graphs and waiting mean
        keep_freed_memory()
        dtype = pick_dtype(section.dtype, device)
        source, weights = locate(section, base_dir)
        options: dict[str, Any] = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
        tokenizer = load_tokenizer(section, base_dir, key=key)
        with loading(section.name, key):
            config = AutoConfig.from_pretrained(source, **options)
            if weights and not section.trust_remote_code:
                check_size(config, sorted(Path(source).glob("*.safetensors")), section.name)
            for name, value in config.to_dict().items():
                kind = (
                    name == "layerdrop"
                    or name.endswith("_pdrop")
                    or any(word in name for word in ("dropout", "jitter"))
                )
                if kind and isinstance(value, float) and not dropout:
                    setattr(config, name, 0.0)  # a frozen model has no noise; then train mode changes nothing either
            if section.attention != "auto":
                options["attn_implementation"] = section.attention
            options |= quantized(section.quantize, device, dtype)
            model = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, use_safetensors=True, **options
            )
        if section.quantize == "none":
            model.to(device)
        else:  # it is there, and must not be moved
            keep_differentiable(model)
        model.eval().requires_grad_(False)
        fuse_norms(model)
        if device.type == "cpu":
            products.use(model)
        info = {
            "name": section.name,
            "revision": getattr(config, "_commit_hash", None) or section.revision,
            "weights_sha256": weights,
            "tokenizer_sha256": tokenizer_hash(tokenizer),
            "template_sha256": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,  # which of several changes nothing
            "architecture": type(model).__name__,
            "parameters": sum(map(weights_in, model.parameters())),
            "window": min(window_of(config), section.window or window_of(config)),
            "trust_remote_code": section.trust_remote_code,
            **({} if section.quantize == "none" else {"quantize": section.quantize}),
        }
        lm = cls(model, tokenizer, device, info)
        lm._check_head()
        lm.records = lm.can_pack and device.type == "cuda"  # tried now, while there is neither adapter nor dropout
        if lm.can_share and not lm.can_pack:
            lm._note(
                f"{info['architecture']} does not give the same for rows in one sequence; they are padded, which is slower"
            )
        return lm

    @property
    def window(self) -> int:
        """Longest sequence in tokens."""
        return int(self.info["window"])

    @property
    def fingerprint(self) -> str:
        """Changes when the teacher's distributions could change: weights, code, types."""
        return fingerprint(
            [self.info, self.model.config._attn_implementation, torch.__version__, transformers.__version__]
        )

    @property
    def stop_ids(self) -> set[int]:
        """Token ids that end an answer."""
        eos = self.model.generation_config.eos_token_id
        ids = eos if isinstance(eos, list) else [eos]
        return {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}

    # -- forward ------------------------------------------------------------------------------------------------------

    def _backbone(self, **inputs: Any) -> Any:
        return getattr(self.model, self.model.base_model_prefix)(**inputs)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [..., d] -> logits [..., V] in fp32, with the model's own scale and softcap."""
        if self.classes is not None:
            return torch.as_tensor(self.classes(hidden).float())  # [..., classes]
        config = self.model.config.get_text_config()
        out = self.model.get_output_embeddings()
        logits = out(hidden.to(out.weight.dtype))  # [..., V]
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        logits = logits.float()
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return torch.as_tensor(logits)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Backbone plus `head` must be the model's own logits; a head that does more would silently change the loss."""
        ids = torch.arange(4, device=self.device)[None] + 5  # [1, 4]
        own = self.model(input_ids=ids, use_cache=False).logits.float()  # [1, 4, V]
        ours = self.head(self._backbone(input_ids=ids, use_cache=False).last_hidden_state)  # [1, 4, V]
        limit = (1e-4 if own.dtype == self.model.dtype else 2e-2) * own.abs().max().clamp(min=1.0)
        if own.shape != ours.shape or not torch.isfinite(own).all() or (own - ours).abs().max() > limit:
            finite = "finite" if torch.isfinite(own).all() else "NaN or infinite"
            raise ModelError(
                f"the output head of {self.info['architecture']} cannot be used",
                expected="logits = output embedding of the final hidden state, with logit scale and softcap from the config",
                found=f"other logits than the model's own, which are {finite}",
                fix="check the weights, or use another model",
            )

    @property
    def can_share(self) -> bool:
        """Whether rows can share a prefix's cache: a sliding-window layer drops keys that the next row still needs, and
        a state-space layer has no keys."""
        layers = DynamicCache(config=self.model.config).layers
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def prefix(self, sequences: Sequence[Sequence[int]]) -> Prefix | None:
        """The longest common prefix of `sequences`, forwarded once, or None where sharing it does not pay or is not
        possible: shorter than `LEAST` tokens, or a cache that is not a plain key-value cache (sliding window, state space)."""
        if self.cartridge():  # what is behind it changes with it
            return None
        ids = common_prefix(sequences)
        if len(ids) < LEAST or len(sequences) < 2:
            return None
        if not self.can_share:
            self._note(
                f"{self.info['architecture']} has no cache that rows can share; the context is read again for each row"
            )
            return None
        return self._read_prefix(ids)

    def shared(self, sequences: Sequence[Sequence[int]]) -> int:
        """Tokens that `prefix` would read once for all of `sequences`; 0 where it would not."""
        n = len(common_prefix(sequences)) if len(sequences) > 1 else 0
        return n if n >= LEAST and self.can_share and not self.cartridge() else 0

    @torch.no_grad()
    def _read_prefix(self, ids: Sequence[int]) -> Prefix:
        cache = DynamicCache(config=self.model.config)
        self._backbone(input_ids=torch.tensor([ids], device=self.device), cache=cache, use_cache=True)
        return Prefix(tuple(ids), tuple((layer.keys, layer.values) for layer in cache.layers))

    def same(self, states: torch.Tensor, others: torch.Tensor) -> bool:
        """Whether states that were computed in two ways differ by rounding only. In 16 bits that grows with the layers: 28 of
        random weights differ by 6 % in all, single numbers by more."""
        off = (states - others).float()
        if self.model.dtype == torch.float32 and self.info.get("quantize") != "8bit":  # LLM.int8 rounds activations
            return bool(off.abs().max() <= 1e-4 * others.abs().max())
        layers = self.model.config.get_text_config().num_hidden_layers
        return bool(off.norm() <= max(5e-2, 2e-2 * layers**0.5) * others.float().norm())

    def rows_at_once(self, given: int | None, tokens: int, shared: int = 0) -> int:
        """Rows to write, read or score side by side: as many as are `given`, else what suits the device, for rows of at most so many
        `tokens`, of which all share the first ones. The same for the same model and kind of device, so that batches are formed
        alike each time."""
        tokens -= shared if self.can_pack else 0  # else each has a copy
        if given:
            return given
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        if self.device.type == "cpu" or not heads:
            return FEW
        each = 2 * config.num_hidden_layers * heads * head_size(config) * self.model.dtype.itemsize  # bytes of a token
        held = HELD if self.room is None else min(HELD, self.room // SPARE)
        return int(max(1, min(MANY, held // (each * max(1, tokens)))))

    @functools.cached_property
    def room(self) -> int | None:
        """Bytes that a GPU has beside the model, whoever uses them; None on other devices."""
        whole = memory_of(self.device)
        return whole and max(0, whole - sum(p.numel() * p.element_size() for p in self.model.parameters()))

    @property
    def _tokens_at_once(self) -> int:
        """At most `AT_ONCE`, and no more than the room is for what a block keeps of each while it works."""
        config = self.model.config.get_text_config()
        width = getattr(config, "intermediate_size", None)
        if self.room is None or not isinstance(width, int):
            return AT_ONCE
        each = (3 * width + 4 * config.hidden_size) * self.model.dtype.itemsize
        return int(max(1, min(AT_ONCE, self.room // SPARE // each)))

    @functools.cached_property
    def can_pack(self) -> bool:
        """Whether the model computes the same for packed rows as for padded ones: tried once, on a few tokens of the
        loaded model, since no list of architectures could be complete."""
        if not self.can_share:
            return False
        rows: list[tuple[Sequence[int], int]] = [(range(5, 5 + n), 2) for n in (6, 9)]
        rows.append(([5, 6, 7, 3, 2, 4, 8], 3))
        prefix = self._read_prefix([5, 6, 7])
        try:
            with torch.no_grad():
                slow = torch.cat(self._padded(rows, None))
                return all(self.same(torch.cat(self._packed(rows, shared)), slow) for shared in (None, prefix))
        except (CannotPackError, AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError):
            return False

    @functools.cached_property
    def _turn(self) -> int:
        """Tokens from which on a model with LongRoPE takes other positions, for all rows of a batch; 0 for others."""
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        turns = rope.get("rope_type") == "longrope"
        return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings) if turns else 0

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def hidden(self, rows: Sequence[tuple[Sequence[int], int]], prefix: Prefix | None = None) -> list[torch.Tensor]:
        """Final hidden states at the positions that predict the last tokens of each row, in one forward pass; without a
        gradient in as many as keep each below `AT_ONCE` tokens, or fewer on a small GPU.

        Args:
            rows: (ids, T) pairs; the last T ids of each are the completion.
            prefix: a shared start of all rows; its tokens are not forwarded again.

        Returns: one [T, d] tensor per row; entry t predicts completion token t.
        """
        if self._turn and max(len(ids) for ids, _ in rows) > self._turn:
            self._note(
                f"{self.info['architecture']} has LongRoPE: all positions are other ones as soon as one row is longer than "
                f"{self._turn} tokens; what is read in batches, or behind a shared context, then differs a little from rows alone"
            )
        before = len(prefix.ids) if prefix else 0
        many = len(rows) > 1 and sum(len(ids) - before for ids, _ in rows) > self._tokens_at_once
        # processes that share the weights must come to as many passes
        if many and not self.sharded and not torch.is_grad_enabled():
            half = len(rows) // 2
            return self.hidden(rows[:half], prefix) + self.hidden(rows[half:], prefix)
        if own := self.cartridge():
            rows, prefix = [((*own.ids, *ids), n) for ids, n in rows], own
        # a checkpointed layer is computed again in the backward pass, when the layout of the pack is gone
        pack_them = self.can_pack and not self.model.is_activation_checkpointing
        return (self._packed if pack_them else self._padded)(rows, prefix)

    def follow(self, prompts: Sequence[Sequence[int]], tree: Tree, prefix: Prefix | None = None) -> list[torch.Tensor]:
        """Final hidden states after each prompt and after each token of `tree` behind it, in one forward pass: what
        predicts the next token there.

        Returns: one [1 + len(tree), d] tensor per prompt.
        """
        if self.can_pack:
            if own := self.cartridge():
                prompts, prefix = [(*own.ids, *ids) for ids in prompts], own
            return self._packed([((*ids, PAD), 1) for ids in prompts], prefix, tree)
        paths: list[tuple[int, ...]] = []  # the tokens on the way to each token of the tree, itself included
        for token, parent in tree:
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        rows = [((*ids, *path, PAD), 1) for ids in prompts for path in [(), *paths]]
        found = torch.cat([h for i in range(0, len(rows), 32) for h in self.hidden(rows[i : i + 32], prefix)])
        return list(found.view(len(prompts), 1 + len(tree), -1))

    def _packed(
        self, rows: Sequence[tuple[Sequence[int], int]], prefix: Prefix | None, tree: Tree = ()
    ) -> list[torch.Tensor]:
        """`hidden` in one sequence without padding; what all rows start with is in it once (see `packing`). The states
        of `tree` come after those of each row."""
        # The last token predicts nothing that is supervised, so it need not be forwarded.
        before, longest = len(prefix.ids) if prefix else 0, max(len(ids) for ids, _ in rows)
        start = common_prefix([ids[before : len(ids) - n] for ids, n in rows])
        if len(rows) > 1 and WORTH_SHARING * len(start) < longest - before:
            start = []
        bodies = [ids[before + len(start) : -1] for ids, _ in rows]
        layout = pack(bodies, start, prefix.layers if prefix else None, self.device, before=before, tree=tree)
        hidden = self.states(layout)
        return [
            hidden[where.stop - len(tree) - n : where.stop] for where, (_, n) in zip(layout.where, rows, strict=True)
        ]

    def states(self, layout: Pack) -> torch.Tensor:
        """Final hidden states [S, d] of the tokens of a packed sequence."""
        with packed(self.model.config.get_text_config(), layout):
            out = self._backbone(input_ids=layout.ids, position_ids=layout.positions, use_cache=False)
        return torch.as_tensor(out.last_hidden_state[0])

    def _padded(self, rows: Sequence[tuple[Sequence[int], int]], prefix: Prefix | None) -> list[torch.Tensor]:
        """`hidden` with a row of the batch for each row and a copy of the prefix's cache for each, for any model."""
        start = len(prefix.ids) if prefix else 0
        bodies = [list(ids[start:-1]) for ids, _ in rows]
        length = max(map(len, bodies))
        ids = torch.tensor([body + [PAD] * (length - len(body)) for body in bodies], device=self.device)  # [B, L]
        mask = torch.tensor(
            [[1] * (start + len(b)) + [0] * (length - len(b)) for b in bodies], device=self.device
        )  # [B, P+L]
        positions = torch.arange(start, start + length, device=self.device).expand(len(rows), -1)  # [B, L]
        out = self._backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            cache=prefix.cache(len(rows)) if prefix else None,
            use_cache=prefix is not None,
        ).last_hidden_state  # [B, L, d]
        return [out[i, len(body) - n : len(body)] for i, (body, (_, n)) in enumerate(zip(bodies, rows, strict=True))]

    def generate(self, prompts: Sequence[Sequence[int]], **how: Any) -> list[list[int]]:
        """The ids that `write` gives."""
        return self.write(prompts, **how)[0]

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        ends: Callable[[list[int]], bool] | None = None,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
        prefix: Prefix | None = None,
        on_token: Callable[[int], None] | None = None,
        record: bool = True,
    ) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Continue each prompt until `ends(ids so far)` (default: the last one is a stop token; it is kept) or
        `max_new_tokens`.

        Rows are sampled with a generator of their own (`seeds`), so a row's text does not depend on its batch.
        `on_token` is told each token of the first row as it comes. On a GPU a token is recorded and replayed, if `record`.

        Returns: the ids of each row; and the states that they were chosen from, one [T, d] per row, which are what `hidden` gives
            for prompt and ids, up to rounding.
        """
        ends = ends or (lambda ids: ids[-1] in self.stop_ids)
        if own := self.cartridge():
            prompts, prefix = [(*own.ids, *ids) for ids in prompts], own
        begun = self._begin(prompts, prefix)
        writer: Growing | Fixed = begun
        generators = [torch.Generator().manual_seed(seed) for seed in seeds] if temperature > 0 else []
        written: list[list[int]] = [[] for _ in prompts]
        states: list[list[torch.Tensor]] = [[] for _ in prompts]
        alive = list(range(len(prompts)))  # the rows that the writer has
        last = begun.read()  # [B, d]
        for left in range(max_new_tokens - 1, -1, -1):
            logits = self.head(last)  # [B, V]
            check_finite(logits.amax(-1), "the next-token logits")
            if temperature > 0:
                probabilities = (logits / temperature).softmax(-1).cpu()  # [B, V]
                rows = [
                    torch.multinomial(p, 1, generator=generators[i]) for p, i in zip(probabilities, alive, strict=True)
                ]
                chosen = torch.cat(rows).tolist()
            else:
                chosen = logits.argmax(-1).tolist()
            for row, token, state in zip(alive, chosen, last, strict=True):
                if not (written[row] and ends(written[row])):
                    written[row].append(token)
                    states[row].append(state)
                    if row == 0 and on_token:
                        on_token(token)
            keep = [i for i, row in enumerate(alive) if not ends(written[row])]
            if not keep or not left:
                break
            if writer.keep(keep):
                alive, chosen = [alive[i] for i in keep], [chosen[i] for i in keep]
            if writer is begun and record and self.records and begun.sharable and left >= WORTH_RECORDING:
                try:
                    writer = Fixed(begun, self.model.config, left)
                    last = writer.write(chosen)
                    begun.cache.layers.clear()  # which were copied
                    continue
                except torch.OutOfMemoryError:  # to go on without would give other bits than a resumed run
                    raise ModelError(
                        f"the GPU's memory does not hold {len(alive)} rows that write side by side",
                        fix="set targets.batch_size to fewer",
                    ) from None
                except RuntimeError:  # the model waits for the GPU somewhere
                    writer, self.records = begun, False
            last = writer.write(chosen)
        return written, [torch.stack(row) for row in states]

    def _begin(self, prompts: Sequence[Sequence[int]], prefix: Prefix | None) -> Growing:
        """Rows that are about to write: with caches that are empty, where the prefix can stay where it is, or hold a copy of it."""
        start, config = len(prefix.ids) if prefix else 0, self.model.config
        copied = prefix if prefix and not self.can_pack else None
        cache = copied.cache(len(prompts)) if copied else DynamicCache(config=config)
        if self.can_share and not copied:
            cache.layers = [RoomyLayer() for _ in cache.layers]
        bodies = [ids[start:] for ids in prompts]
        shared = prefix.layers if prefix and not copied else None
        return Growing(self._last, bodies, cache, self.device, start=start, shared=shared, pad=PAD)

    def _last(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: Any, mask: torch.Tensor | None, behind: Behind | None
    ) -> torch.Tensor:
        """States of the last of some new tokens [B, M] of rows that have a cache, [B, d]."""
        layout = packed(self.model.config.get_text_config(), behind) if behind else contextlib.nullcontext()
        with layout:
            out = self._backbone(
                input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
            )
        return torch.as_tensor(out.last_hidden_state[:, -1].clone())  # a view would keep the states of all prompts

    # -- the adapter --------------------------------------------------------------------------------------------------

    def cartridge(self) -> Prefix | None:
        """The trained key-value cache that the student has in the place of the context, while it is on."""
        encoder = None if self.peft is None or self.base_only else encoder_of(self.peft)
        if encoder is None:
            return None
        config = self.model.config.get_text_config()
        size = head_size(config)
        weight = encoder.weight.to(self.model.dtype)  # [C, layers 2 K D], as peft lays it out
        each = weight.view(len(weight), config.num_hidden_layers, 2, -1, size).permute(1, 2, 3, 0, 4)  # [., 2, K, C, D]
        return Prefix((PAD,) * len(weight), tuple((keys[None], values[None]) for keys, values in each))

    def _add_cartridge(self, lora: LoraSection, seed: int, start: Sequence[int]) -> None:
        if not self.can_pack:
            raise ModelError(
                f"a cartridge cannot be trained on {self.info['architecture']}",
                expected="plain attention, whose rows can share a cache",
                fix='use lora.method = "lora"',
            )
        if start and len(start) < lora.tokens:
            raise ModelError(
                "the context is shorter than the cartridge",
                expected=f"at least lora.tokens = {lora.tokens} tokens that all of the teacher's prompts start with",
                found=f"{len(start)}",
                fix="lower lora.tokens; contexts of each row (context.column) have no common one",
            )
        torch.manual_seed(seed)
        with quiet_peft():
            config = CartridgeConfig(num_virtual_tokens=lora.tokens, task_type="CAUSAL_LM", num_frozen_tokens=1)
            self.peft = get_peft_model(self.model, config)
        if start:
            with self.adapter(False):
                read = self._read_prefix(start[: lora.tokens])
            flat = prompt_embeddings_from_past_key_values(read.layers, num_virtual_tokens=lora.tokens)
            encoder_of(self.peft).load_prompt_embeddings(flat)

    def add_adapter(self, lora: LoraSection, seed: int, start: Sequence[int] = ()) -> None:
        """Put a fresh adapter on. LoRA and its kin sit on the linear layers of the blocks: a no-op until they are trained
        (B = 0). A cartridge begins as the key-value cache of the first tokens of `start`, and without one at random."""
        if lora.method == "cartridge":
            self._add_cartridge(lora, seed, start)
            return
        targets = self.adapted_by(lora)
        conv = any(isinstance(module, Conv1D) for module in self.model.modules())
        torch.manual_seed(seed)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            fan_in_fan_out=conv,
            use_dora=lora.method == "dora",
            use_rslora=lora.method == "rslora",
            revision=self.info["revision"],
        )
        with quiet_peft():
            self.peft = get_peft_model(self.model, config)
        fuse(self.model)

    def adapted_by(self, lora: LoraSection) -> list[str]:
        """Last name parts of the layers that an adapter will sit on, as peft takes them.

        Raises: `ModelError` for one of `lora.targets` that names no layer, or one that is not a linear layer of the blocks.
        """
        inside, leaves = linear_layers(self.model)
        if lora.targets == "all-linear":
            return sorted(leaves)
        named = {
            target: [name for name, _ in self.model.named_modules() if f".{name}".endswith(f".{target}")]
            for target in lora.targets
        }
        linear = f"linear layers of the blocks: {', '.join(sorted(leaves))}"
        if unknown := [target for target, names in named.items() if not names]:
            raise ModelError(
                f"lora.targets names no layer of {self.info['architecture']}",
                expected=linear,
                found=", ".join(unknown),
                fix='name existing layers, or use "all-linear"',
            )
        if outside := sorted({name for names in named.values() for name in names} - set(inside)):
            raise ModelError(
                "lora.targets reaches outside the blocks",
                expected=linear,
                found=", ".join(outside[:5]),
                fix="serving stacks refuse adapters on head or embeddings; name the block's layers only",
            )
        return list(lora.targets)

    def load_adapter(self, folder: Path, name: str = "default") -> None:
        """Put a trained adapter on, under a `name`. Raises `ModelError` when it was made for another base or does not fit;
        the model then has no adapter."""
        config = settings_of(folder)
        made_for = made_for_hash(folder)
        if made_for and made_for != self.info["weights_sha256"]:
            raise ModelError(
                f"the adapter in {folder} was made for another base model",
                expected=f"weights {made_for[:16]}... ({config.get('base_model_name_or_path')})",
                found=f"weights {self.info['weights_sha256'][:16]}... ({self.info['name']})",
                fix="load it on the model it was trained on",
            )
        try:
            with quiet_peft():
                warnings.filterwarnings(
                    "error", message=".*missing adapter keys.*"
                )  # it would be a part of the adapter
                self.peft = PeftModel.from_pretrained(self.model, str(folder), name, is_trainable=False)
        except Exception as error:  # peft raises what it likes, the warning above among it
            take_off(self.model)
            raise ModelError(
                f"the adapter in {folder} does not fit {self.info['name']}", found=str(error).split("\n")[0][:300]
            ) from None
        fuse(self.model)
        self.training(False)

    def remove_adapter(self) -> None:
        """Take the adapter off for good; the base model is as it was."""
        if self.peft is not None:
            self.model = self.model if encoder_of(self.peft) else self.peft.unload()
            self.peft = None
        self.training(False)

    @contextlib.contextmanager
    def all_weights(self, classes: int = 0, seed: int = 0) -> Iterator[None]:
        """Inside, all weights are trained, with a classification head of so many `classes` if asked for; afterwards they
        are what they were before. They are in fp32 meanwhile: 16 bits would round an update of 1e-5 away."""
        before = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        try:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.float()
            self.model.requires_grad_(True)
            self.trains_head = True
            if classes:
                torch.manual_seed(seed)
                width = self.model.get_output_embeddings().in_features
                self.classes = torch.nn.Linear(width, classes, bias=False).to(self.device)
            yield
        finally:
            self.classes, self.trains_head = None, False
            self.model.requires_grad_(False)
            for name, parameter in self.model.named_parameters():
                parameter.data, parameter.grad = before[name].to(self.device), None
            self.training(False)

    def shard(self) -> None:
        """Share the frozen blocks out among the processes, to train; a shared-out model is of no use to one of them."""
        blocks = [block for name in block_lists(self.model) for block in self.model.get_submodule(name)]
        self.sharded = True
        processes.shard(blocks, self.device)

    def training(self, on: bool) -> None:
        """Switch dropout on or off, where there is any."""
        (self.peft or self.model).train(on)

    def recompute(self, on: bool) -> None:
        """Whether the backward pass computes activations again, instead of keeping them."""
        if on:
            self.model.activation_checkpointing_enable()
        elif self.model.is_activation_checkpointing:
            self.model.activation_checkpointing_disable()
            self.model.disable_input_require_grads()

    @contextlib.contextmanager
    def adapter(self, on: bool, strength: float = 1.0) -> Iterator[None]:
        """Inside, the model is the student (`on`) or the frozen base and teacher (off). `strength` multiplies the scale of
        the student's update: 0 is the base model, 1 the student as it was trained."""
        if on and self.peft is None and not self.trains_head:
            raise RuntimeError("there is no adapter")  # a bug, not the user's
        if not on and self.trains_head:
            raise RuntimeError("the base model is being trained")  # a bug, not the user's
        before, self.base_only = self.base_only, not on
        how: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.peft is not None:
            how = strengthened(self.peft, strength) if on else self.peft.disable_adapter()
        try:
            with how:
                yield
        finally:
            self.base_only = before

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """What is trained (the adapter's tensors) by name, in a fixed order."""
        head = self.classes.named_parameters(prefix="classes") if self.classes is not None else ()
        encoder = encoder_of(self.peft)
        own = encoder.named_parameters(prefix="cartridge") if encoder is not None else ()
        return {n: p for n, p in sorted([*self.model.named_parameters(), *head, *own]) if p.requires_grad}


# -- finding and loading ----------------------------------------------------------------------------------------------


def common_prefix(sequences: Iterable[Sequence[int]]) -> list[int]:
    """Longest common start that leaves every sequence at least one token."""
    every = iter(sequences)
    low = high = tuple(next(every))  # lexicographic extremes share exactly what all share
    limit = len(low)
    for sequence in every:
        one = tuple(sequence)
        low, high, limit = min(low, one), max(high, one), min(limit, len(one))
    n = 0
    while n < limit - 1 and low[n] == high[n]:
        n += 1
    return list(low[:n])


def block_lists(model: Any) -> list[str]:
    """Names of the lists of transformer blocks."""
    count = model.config.get_text_config().num_hidden_layers
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]


def linear_layers(model: Any) -> tuple[list[str], set[str]]:
    """Full names of the linear layers inside the transformer blocks, and their last name parts."""
    blocks = block_lists(model)
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and any(name.startswith(f"{block}.") for block in blocks)
    ]
    return inside, {name.rsplit(".", 1)[-1] for name in inside}


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def window_of(config: Any) -> int:
    """Longest sequence the positions allow."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if value := getattr(config, name, None):
            return int(value)
    return 1 << 20


def made_for_hash(folder: Path) -> str | None:
    """Hash of the weights that the run folder around an adapter was made with."""
    try:
        found = files.read_json(folder.parent / "recipe.json")["model"]["weights_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def check_finite(values: torch.Tensor, what: str, rows: Sequence[str] = ()) -> None:
    """Raise `ModelError` where the model says NaN or infinity, naming `rows`."""
    if not torch.isfinite(values).all():
        raise ModelError(
            f"{what} of the model are not finite",
            expected="numbers",
            found="NaN or infinity" + (f" in rows {', '.join(rows[:8])}" if rows else ""),
            fix="check the weights; float16 overflows easily: use model.dtype bfloat16 or float32",
        )


FIT = (
    "use fewer demonstrations (context.demos_limit), documents in chunks (context.chunk_tokens), fewer max_new_tokens, or a model "
    "with a larger window; where the query itself is too long, shorten or remove that row"
)
"""What to do about rows of a recipe that are too long."""


def check_fit(lengths: Iterable[tuple[str, int]], window: int, what: str, fix: str = FIT) -> None:
    """Raise `FitError` naming the longest sequences that do not fit. `lengths`: (where from, tokens) pairs."""
    count, long, longest = 0, 0, (0, "")
    for where, n in lengths:
        count, long, longest = count + 1, long + (n > window), max(longest, (n, where))
    if long:
        n, where = longest
        raise FitError(
            f"{what} does not fit the model's window: {long} of {count} rows",
            expected=f"at most {window} tokens, answer included",
            found=f"{n} tokens ({where})",
            fix=f"{fix}; nothing is cut in silence",
        )
