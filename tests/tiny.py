"""Tiny random models of every supported architecture, and a byte tokenizer, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|system|>be kind</s>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 256 + len(SPECIAL)

small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
llama = {**small, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}
gemma = {**llama, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
opt = {**small, "ffn_dim": 48, "max_position_embeddings": 512, "word_embed_proj_dim": 32}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**llama),
    "qwen2": lambda: Qwen2Config(**llama),
    "gemma2": lambda: Gemma2Config(**gemma, final_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**gemma),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCABULARY, n_positions=512),
    "opt-125m": lambda: OPTConfig(**opt),
    # post-norm, and embeddings narrower than the blocks, projected in and out
    "opt-350m": lambda: OPTConfig(**{**opt, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt-1.3b": lambda: OPTConfig(**{**opt, "hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 8}),
    "opt-2.7b": lambda: OPTConfig(**{**opt, "hidden_size": 40, "word_embed_proj_dim": 40, "num_hidden_layers": 4}),
}


def tokenizer(*, chat: bool = True) -> Any:
    """One token per byte, special tokens for BOS, EOS and the roles."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def save(
    folder: Path, architecture: str = "llama", *, chat: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """A model folder as the hub has it. Weights are large enough that the context changes the answer."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0 if "embed" not in name and "wte" not in name else 8.0)
    model.to(dtype).save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return folder


def disturb(lm: Any, seed: int = 3) -> None:
    """Move a fresh adapter away from nothing, so that the student is not the base model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_dict(folder: Path, **overrides: Any) -> dict[str, Any]:
    """A small recipe with data files beside it: shout the word back."""
    words = [
        "ant",
        "bee",
        "cat",
        "dog",
        "eel",
        "fox",
        "gnu",
        "hen",
        "ibis",
        "jay",
        "kid",
        "lynx",
        "mole",
        "newt",
        "owl",
        "pig",
    ]
    write_jsonl(folder / "demos.jsonl", [{"prompt": f"say {w}", "answer": w.upper()} for w in ("red", "blue", "green")])
    write_jsonl(folder / "queries.jsonl", [{"prompt": f"say {w}", "answer": w.upper()} for w in words])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"please say {w}", "answer": w.upper()} for w in words[:8]])
    raw: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": str(folder / "model")},
        "context": {"system": "Shout every word that you are given.", "demos": "demos.jsonl"},
        "queries": {"data": "queries.jsonl"},
        "completions": {"max_new_tokens": 6},
        "targets": {"batch_size": 4},
        "lora": {"rank": 4},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.01, "validation": 0.2, "checkpoint_every": 2},
        "eval": {
            "data": "eval.jsonl",
            "max_new_tokens": 6,
            "format": "(?P<word>[A-Z]+)",
            "latency_rows": 2,
            "bootstrap": 200,
        },
        "gate": {"on_fail": "warn"},
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            raw.setdefault(section, {})[name] = value
        else:
            raw[section] = value
    return raw


def write_recipe(path: Path, raw: dict[str, Any]) -> Path:
    """A recipe's dict as TOML."""
    parts = []
    for section, values in raw.items():
        if isinstance(values, dict):
            parts.append(
                "\n".join([f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())])
            )
        else:
            parts.insert(0, f"{section} = {json.dumps(values)}")
    path.write_text("\n".join(parts) + "\n")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
