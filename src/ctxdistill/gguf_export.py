"""GGUF files for llama.cpp and Ollama: a LoRA adapter, or the whole model.

In: a transformers model or its config, a PEFT adapter's folder, a tokenizer or the GGUF file that the base came from. Out: one
`.gguf` file, written whole. Invariants: names come from the `gguf` package's own tables; what llama.cpp has built in (order
of rotary pairs, norms with one added, attention scale, window pattern) is brought about or checked here, so that a file
that is written computes what transformers computes; a base that came as GGUF gives its key-values as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

from ctxdistill.adapters import settings_of
from ctxdistill.errors import ModelError
from ctxdistill.rundir import disk_error

FILE_TYPE_F16 = 1


def nowhere(layer: int) -> bool:
    """No layer slides."""
    return False


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of a transformers `model_type`."""

    name: str
    """Its name in GGUF."""
    activation: str
    pairs_interleaved: bool = False
    """Rotary pairs lie side by side; transformers keeps the halves apart, so rows of q and k change places."""
    norm_offset: float = 0.0
    """Added to the weights of norms: Gemma multiplies by 1 + weight, llama.cpp by the weight."""
    slides: Callable[[int], bool] = nowhere
    """Whether a layer (from 0) attends within a window, which llama.cpp has built in."""
    scale_from_config: bool = False
    """Whether transformers takes the scale of attention from the config, where llama.cpp has 1/sqrt(head size)."""


ARCHITECTURES = {
    "llama": Architecture("llama", "silu", pairs_interleaved=True),
    "mistral": Architecture("llama", "silu", pairs_interleaved=True),
    "qwen2": Architecture("qwen2", "silu"),
    "qwen3": Architecture("qwen3", "silu"),
    "gemma": Architecture("gemma", "gelu_pytorch_tanh", norm_offset=1.0),
    "gemma2": Architecture(
        "gemma2", "gelu_pytorch_tanh", norm_offset=1.0, slides=lambda layer: layer % 2 == 0, scale_from_config=True
    ),
    "gemma3_text": Architecture(
        "gemma3", "gelu_pytorch_tanh", norm_offset=1.0, slides=lambda layer: layer % 6 != 5, scale_from_config=True
    ),
}
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[tuple[str, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"), ("ByteLevel", False)): "llama-bpe",
    (("Split", rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"), ("ByteLevel", False)): "qwen2",
}
"""How a tokenizer cuts text before it merges -> llama.cpp's name for it."""


def architecture_of(config: Any) -> Architecture:
    """Raises `ModelError` for an architecture that this cannot write, which is most that llama.cpp lacks and some it has."""
    try:
        return ARCHITECTURES[config.model_type]
    except KeyError:
        raise ModelError(
            f"models of type {config.model_type!r} cannot be written as GGUF",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            fix="export it as peft or merged, which transformers and vLLM load",
        ) from None


# -- tensors ----------------------------------------------------------------------------------------------------------


def gguf_name(arch: Architecture, config: Any, name: str) -> str:
    """llama.cpp's name of a tensor of transformers. Raises `ModelError` when it has none."""
    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == arch.name)
    found = gguf.get_tensor_name_map(kind, config.num_hidden_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(
            f"llama.cpp has no tensor for {name} in the architecture {arch.name}",
            fix="export it as peft or merged, which transformers and vLLM load",
        )
    return str(found)


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * size, ...] whose rotary pairs are (i, i + size/2) in each head, reordered so that they are (2i, 2i+1)."""
    size = rows.shape[0] // heads
    return rows.view(heads, 2, size // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def converted(arch: Architecture, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor (or the rows of a LoRA B) of the layer `name` as llama.cpp wants it."""
    if arch.pairs_interleaved and ".q_proj." in name:
        return interleaved(tensor, config.num_attention_heads)
    if arch.pairs_interleaved and ".k_proj." in name:
        return interleaved(tensor, config.num_key_value_heads)
    if arch.norm_offset and name.endswith("norm.weight"):
        return tensor + arch.norm_offset
    return tensor


def model_tensors(arch: Architecture, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of the model by their names in GGUF; a tied head is left out, as llama.cpp expects."""
    config = model.config
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield gguf_name(arch, config, name), converted(arch, config, name, tensor)


# -- files ------------------------------------------------------------------------------------------------------------


def write_adapter(path: Path, config: Any, adapter: Path, strength: float = 1.0) -> None:
    """The PEFT adapter in the folder `adapter` as a GGUF file for `llama-server --lora`.

    llama.cpp multiplies B A by alpha / rank, but by 1 where alpha is 0; so `strength` goes into B.
    """
    arch = architecture_of(config)
    settings = settings_of(adapter)
    rank, alpha = settings["r"], settings["lora_alpha"]
    special = [key for key in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias") if settings.get(key)]
    if special or settings.get("bias", "none") != "none":
        raise ModelError(
            "llama.cpp cannot hold this adapter",
            expected="one rank and one alpha for all layers, no bias",
            found=", ".join(special) or f"bias {settings['bias']}",
            fix="export it as merged or gguf",
        )
    writer = gguf.GGUFWriter(None, arch.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    scale = rank**0.5 if settings.get("use_rslora") else 1.0
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha * scale)
    for key, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        name, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        part = {"lora_A": "lora_a", "lora_B": "lora_b"}[side]
        tensor = tensor.float()  # A [r, in], B [out, r]
        if part == "lora_b":
            tensor = converted(arch, config, f"{name}.weight", tensor * strength)
        writer.add_tensor(f"{gguf_name(arch, config, f'{name}.weight')}.{part}", tensor.contiguous().numpy())
    _write(writer, path)


def write_model(
    path: Path, model: Any, tokenizer: Any, base: Path | None, *, name: str, end: int | None = None
) -> None:
    """The model in 16-bit floats (vectors, and what does not fit, in 32) with its tokenizer and chat template.

    Args:
        base: the GGUF file that the model came from; its key-values are kept. None: they are made from the config.
        end: the token that ends an answer, where it is not the tokenizer's EOS.

    Raises: `ModelError` for what llama.cpp would compute otherwise, and for a tokenizer that it does not know.
    """
    arch = architecture_of(model.config)
    writer = gguf.GGUFWriter(None, arch.name)
    written: set[str] = set()
    extra: dict[str, torch.Tensor] = {}
    if base is None:
        extra = _settings(writer, arch, model)
        _tokenizer(writer, tokenizer, model.config.vocab_size, end)
        writer.add_name(name)
        writer.add_type(gguf.GGUFType.MODEL)
    else:
        reader = gguf.GGUFReader(base)
        _copy(writer, reader)
    writer.add_file_type(FILE_TYPE_F16)
    for tensor_name, tensor in [*model_tensors(arch, model), *extra.items()]:
        tensor = tensor.detach().float().cpu().contiguous()
        fits = tensor.dim() > 1 and tensor.abs().max() <= torch.finfo(torch.float16).max
        writer.add_tensor(tensor_name, (tensor.half() if fits else tensor).numpy())
        written.add(tensor_name)
    if base is not None:
        for kept in reader.tensors:  # such as rope_freqs.weight, which transformers has in its config
            if kept.name not in written:
                writer.add_tensor(kept.name, kept.data, raw_dtype=kept.tensor_type)
    _write(writer, path)


def _write(writer: gguf.GGUFWriter, path: Path) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(beside)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(beside, path)
    except OSError as error:
        raise disk_error(path, error) from None
    finally:
        beside.unlink(missing_ok=True)


# -- key-values -------------------------------------------------------------------------------------------------------


def _copy(writer: gguf.GGUFWriter, reader: gguf.GGUFReader) -> None:
    """All key-values of a GGUF file, but for those about how its tensors are stored."""
    ours = {"general.architecture", "general.file_type", "general.quantization_version", "general.alignment"}
    for key, field in reader.fields.items():
        if key in ours or key.startswith(("GGUF.", "split.")):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)


def _settings(writer: gguf.GGUFWriter, arch: Architecture, model: Any) -> dict[str, torch.Tensor]:
    """The config's numbers; returns tensors that llama.cpp wants beside the weights."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _check_built_in(arch, config, head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    if any(map(arch.slides, range(config.num_hidden_layers))):
        writer.add_sliding_window(config.sliding_window)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    return _rope(writer, arch, model, head)


def _rope(writer: gguf.GGUFWriter, arch: Architecture, model: Any, head: int) -> dict[str, torch.Tensor]:
    """Rotary positions: their base, and a linear factor or (Llama 3) a divisor for each frequency."""
    rope = model.config.rope_parameters
    rope = rope.get("full_attention", rope)
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3" and arch.name == "llama":
        plain = theta ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)  # [head size / 2]
        actual = model.get_decoder().rotary_emb.inv_freq.double().cpu()  # [head size / 2]
        return {"rope_freqs.weight": (plain / actual).float()}
    elif kind != "default":
        raise ModelError(
            f"positions scaled by {kind!r} cannot be written as GGUF for {arch.name}",
            expected="default, linear, or llama3 on Llama models",
            fix="convert the base with llama.cpp and export gguf-adapter, or export merged",
        )
    return {}


def _check_built_in(arch: Architecture, config: Any, head: int) -> None:
    """Raise `ModelError` if the model differs from what llama.cpp has built in for its architecture."""
    layers = range(config.num_hidden_layers)
    rope = config.rope_parameters
    every = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = getattr(config, "layer_types", None) or [every] * len(layers)
    values: list[tuple[str, Any, Any]] = [
        ("activation", arch.activation, getattr(config, "hidden_activation", None) or config.hidden_act),
        ("sliding layers", [i for i in layers if arch.slides(i)], [i for i in layers if kinds[i] != "full_attention"]),
    ]
    if arch.scale_from_config:
        values.append(("query_pre_attn_scalar", head, config.query_pre_attn_scalar))
    if local := rope.get("sliding_attention"):
        values.append(("rope_theta of sliding layers", 10000.0, local["rope_theta"]))
    if wrong := [value for value in values if value[1] != value[2]]:
        raise ModelError(
            f"llama.cpp would compute this {arch.name} model otherwise",
            expected="; ".join(f"{what} {built_in}" for what, built_in, _ in wrong),
            found="; ".join(f"{what} {found}" for what, _, found in wrong),
            fix="export it as peft or merged",
        )


def _tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int, end: int | None) -> None:
    """A byte-level BPE tokenizer: its tokens, merges, special tokens and chat template. Raises `ModelError` for others."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    cuts = pre_tokenization(backend)
    if backend["model"]["type"] != "BPE" or cuts not in PRE_TOKENIZERS:
        raise ModelError(
            "llama.cpp's name for this tokenizer is not known",
            expected=f"a byte-level BPE tokenizer that cuts text like {', '.join(PRE_TOKENIZERS.values())}",
            found=f"{backend['model']['type']}, {cuts or 'no pre-tokenizer'}"[:200],
            fix="convert the base with llama.cpp's own converter and export gguf-adapter; or give model.name as a .gguf file, "
            "whose tokenizer is kept",
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[cuts])
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(size):
        kind = gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED  # an embedding without a token
        if i in added:
            kind = gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        types.append(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
    if merges:
        writer.add_token_merges(merges)
    for name, number in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id), ("eot", end)):
        if number is not None and not (name == "eot" and number == tokenizer.eos_token_id):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenization(backend: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """How a tokenizer (the JSON of the tokenizers library) cuts text, as a key of `PRE_TOKENIZERS`."""
    steps = backend.get("pre_tokenizer") or {}
    return tuple((step["type"], _decisive(step)) for step in (steps.get("pretokenizers") or [steps] if steps else []))


def _decisive(step: dict[str, Any]) -> Any:
    """What tells two pre-tokenizers of a type apart."""
    if step["type"] == "ByteLevel":
        return "prefix space" if step["add_prefix_space"] else step.get("use_regex", True)
    return {"Digits": step.get("individual_digits"), "Split": (step.get("pattern") or {}).get("Regex")}.get(
        step["type"]
    )


def adds_bos(path: Path) -> bool:
    """Whether llama.cpp begins each text with the BOS token of this GGUF file."""
    fields = gguf.GGUFReader(path).fields
    stated = fields.get("tokenizer.ggml.add_bos_token")
    return bool(stated.contents() if stated else fields["tokenizer.ggml.model"].contents() == "llama")
