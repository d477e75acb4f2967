"""GGUF files: what llama.cpp will compute from them is what transformers computes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import tiny
from ctxdistill import gguf_export
from ctxdistill.adapters import scale
from ctxdistill.errors import ModelError
from ctxdistill.weights import quiet_peft

WRITABLE = ["llama", "qwen2", "gemma2", "gemma3"]
IDS = torch.arange(5, 29)[None]  # [1, 24], longer than the sliding window


def model_of(architecture: str, **changes: Any) -> Any:
    """A tiny model whose weights 16-bit floats hold exactly."""
    torch.manual_seed(1)
    config = tiny.CONFIGS[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) / 8)
            parameter.copy_(parameter.half())
    return model


def write(folder: Path, model: Any, base: Path | None = None) -> Path:
    path = folder / ("again.gguf" if base else "model.gguf")
    gguf_export.write_model(path, model, tiny.tokenizer(), base, name="tiny", end=3)
    return path


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def values(path: Path) -> dict[str, Any]:
    return {key: f.contents() for key, f in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def adapted(folder: Path, model: Any, rank: int = 2, alpha: int = 6, rslora: bool = False) -> Any:
    """The model with a random adapter on all linear layers of the blocks, which is also saved into `folder`."""
    torch.manual_seed(2)
    with quiet_peft():
        peft = get_peft_model(
            model,
            LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=rslora),
        )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
    peft.save_pretrained(str(folder))
    return peft


@pytest.mark.parametrize("architecture", WRITABLE)
def test_transformers_reads_back_the_same_model(tmp_path: Path, architecture: str) -> None:
    model = model_of(architecture)
    path = write(tmp_path, model)
    again = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, config=model.config, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "rslora"), [*((name, False) for name in WRITABLE), ("llama", True)])
def test_the_base_with_the_adapter_is_the_merged_model(tmp_path: Path, architecture: str, rslora: bool) -> None:
    """W + strength * alpha / rank * B A, from the files alone, as llama.cpp computes it."""
    model = model_of(architecture)
    base = tensors(write(tmp_path, model))
    student = adapted(tmp_path / "adapter", model, rslora=rslora)
    gguf_export.write_adapter(tmp_path / "lora.gguf", model.config, tmp_path / "adapter", strength=0.5)
    lora, meta = tensors(tmp_path / "lora.gguf"), values(tmp_path / "lora.gguf")
    assert (meta["general.type"], meta["adapter.type"]) == ("adapter", "lora")
    alpha = 6 * 2**0.5 if rslora else 6  # llama.cpp divides by the rank; never 0, which it takes for a scale of 1
    assert meta["adapter.lora.alpha"] == pytest.approx(alpha)
    assert meta["general.architecture"] == values(tmp_path / "model.gguf")["general.architecture"]
    scale(student, 0.5)
    merged = student.merge_and_unload()
    arch = gguf_export.architecture_of(model.config)
    want = {name: tensor.detach().numpy() for name, tensor in gguf_export.model_tensors(arch, merged)}
    names = {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert len(lora) == 2 * len(names) == 2 * 7 * 3
    for name in names:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]  # [r, in], [out, r]
        assert a.shape[0] == b.shape[1] == 2
        found = base[name] + meta["adapter.lora.alpha"] / 2 * (b @ a)
        np.testing.assert_allclose(found, want[name], rtol=1e-4, atol=1e-4)
        assert np.abs(b @ a).max() > 0.05


def test_rows_of_q_and_k_change_places_as_llama_cpp_rotates_them() -> None:
    heads, size = 2, 6
    rows = torch.arange(heads * size * 2.0).view(heads * size, 2)
    found = gguf_export.interleaved(rows, heads)
    for head in range(heads):
        for i in range(size // 2):
            at = head * size
            assert torch.equal(found[at + 2 * i], rows[at + i])
            assert torch.equal(found[at + 2 * i + 1], rows[at + i + size // 2])


def test_the_divisors_of_llama_3_are_those_of_its_formula(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**tiny.llama, "head_dim": 16}, rope_parameters=scaling))
    found = tensors(write(tmp_path, model))["rope_freqs.weight"]
    want = []
    for i in range(8):
        length = 2 * math.pi * 500.0 ** (2 * i / 16)
        smooth = (64 / length - 1.0) / (4.0 - 1.0)
        factor = 1.0 if length < 64 / 4 else 8.0 if length > 64 / 1 else 1 / ((1 - smooth) / 8.0 + smooth)
        want.append(factor)
    assert want[0] == 1.0 and want[-1] == 8.0 and any(1 < w < 8 for w in want)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_what_a_base_in_gguf_says_is_kept(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny.llama, rope_parameters=scaling))
    base = write(tmp_path, model)
    again = write(tmp_path, model, base)
    assert values(again) == values(base)
    first, second = tensors(base), tensors(again)
    assert list(first) == list(second) and "rope_freqs.weight" in second
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_the_tokenizer_and_its_template_are_in_the_file(tmp_path: Path) -> None:
    known = values(write(tmp_path, model_of("llama")))
    tokenizer = tiny.tokenizer()
    assert known["tokenizer.ggml.model"] == "gpt2" and known["tokenizer.ggml.pre"] == "gpt-2"
    assert known["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(tiny.VOCABULARY))
    assert known["tokenizer.ggml.token_type"][:6] == [3, 3, 3, 3, 3, 1]
    assert known["tokenizer.chat_template"] == tiny.TEMPLATE
    ids = [known[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")]
    assert ids == [0, 1, 3]
    assert known["tokenizer.ggml.add_bos_token"] is False  # the template writes it
    assert gguf_export.adds_bos(tmp_path / "model.gguf") is False


@pytest.mark.parametrize(("cuts", "name"), gguf_export.PRE_TOKENIZERS.items())
def test_pre_tokenizers_are_told_apart(cuts: tuple[tuple[str, Any], ...], name: str) -> None:
    made = {
        "ByteLevel": lambda key: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=key),
        "Digits": lambda key: pre_tokenizers.Digits(individual_digits=key),
        "Split": lambda key: pre_tokenizers.Split(Regex(key), "isolated"),
    }
    steps = [made[kind](key) for kind, key in cuts]
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    assert gguf_export.PRE_TOKENIZERS[gguf_export.pre_tokenization(json.loads(backend.to_str()))] == name
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("1234")]
    assert pieces == {"gpt-2": ["1234"], "llama-bpe": ["123", "4"]}.get(name, ["1", "2", "3", "4"])


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    odd = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ModelError, match="tokenizer is not known") as caught:
        gguf_export.write_model(tmp_path / "x.gguf", model_of("llama"), odd, None, name="x")
    assert "Whitespace" in caught.value.found
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["opt-125m", "gpt2"])
def test_other_architectures_are_refused(tmp_path: Path, architecture: str) -> None:
    with pytest.raises(ModelError, match="cannot be written as GGUF") as caught:
        write(tmp_path, model_of(architecture))
    assert "llama" in caught.value.expected


@pytest.mark.parametrize(
    ("architecture", "change", "found"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16"),
        ("gemma3", {"layer_types": ["full_attention"] * 3}, "sliding layers []"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, ""),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, architecture: str, change: dict[str, Any], found: str
) -> None:
    with pytest.raises(ModelError, match=r"otherwise|yarn") as caught:
        write(tmp_path, model_of(architecture, **change))
    assert found in caught.value.found


@pytest.mark.parametrize("change", [{"rank_pattern": {"q_proj": 4}}, {"use_dora": True}, {"bias": "all"}])
def test_adapters_that_gguf_cannot_hold_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder, model = tmp_path / "adapter", model_of("llama")
    adapted(folder, model)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ModelError, match=r"cannot hold this adapter|cannot be loaded"):
        gguf_export.write_adapter(tmp_path / "x.gguf", model.config, folder)
