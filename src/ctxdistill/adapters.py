"""What can be done to trained adapters: saved, turned up and down, and added.

In: a model with adapters of peft; an adapter's folder. Out: the same model; the adapter's settings, checked. Invariants:
strength 0 is the base model and 1 the adapter as it was trained, to the last bit; a weighted sum is the sum of the updates
themselves, not of their factors; peft is given no adapter that is not safetensors, or that asks for more than its tensors.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import CartridgeConfig, LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from safetensors import SafetensorError, safe_open

from ctxdistill import files
from ctxdistill.errors import ModelError, RunError

CONFIGS = {"LORA": LoraConfig, "CARTRIDGE": CartridgeConfig}
FREE = {
    "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout", "num_attention_heads",
    "num_frozen_tokens", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "peft_type", "peft_version", "r",
    "revision", "target_modules", "task_type", "token_dim", "use_dora", "use_rslora",
}  # fmt: skip
"""Settings that may differ from peft's own: others import modules, match names by patterns, or copy layers."""


def save(model: PeftModel, folder: Path, name: str = "default") -> Path:
    """Write an adapter of the model in PEFT's format, the same bytes for the same adapter; returns where in `folder` it is.

    Raises: OSError, SafetensorError.
    """
    model.save_pretrained(str(folder), selected_adapters=[name])
    found = folder if name == "default" else folder / name
    config = found / "adapter_config.json"
    settings = files.read_json(config)
    if isinstance(named := settings.get("target_modules"), list):
        settings["target_modules"] = sorted(named)  # a set in memory, in another order in every process
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for file in found.iterdir():
        file.chmod(0o644)  # safetensors are written for the owner alone; a server often runs as somebody else
    return found


def settings_of(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of an adapter that is safe to load.

    Raises: `RunError` where there is no adapter or it is damaged, `ModelError` where it is of a kind that is not made here.
    """
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not path.is_file():
        raise RunError(f"no adapter in {folder}", expected=path.name, fix="finish the run with --resume")
    if not weights.is_file():  # peft would look for other kinds of files, and ask the hub
        raise RunError(f"no weights of an adapter in {folder}", expected=weights.name, fix="train again with --resume")
    try:
        settings = files.read_json(path, files.MAX_RECIPE)
        with safe_open(weights, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__} in {path.name}")
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(
            f"the adapter in {folder} is damaged: {error}", fix="delete it and go on with --resume"
        ) from None
    if problem := _problem(settings, shapes):
        raise ModelError(
            f"the adapter in {folder} cannot be loaded",
            expected="a LoRA adapter or a cartridge as `ctxdistill distill` writes it",
            found=problem,
        )
    return settings


def _problem(settings: dict[str, Any], shapes: dict[str, list[int]]) -> str:
    """Why peft shall not see an adapter with tensors of these shapes; empty when it may."""
    kind = settings.get("peft_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        return f"peft_type {kind!r:.60}"
    usual = CONFIGS[kind](task_type="CAUSAL_LM").to_dict()
    for name, value in settings.items():
        if name not in FREE and value and value != usual.get(name):
            return f"{name} = {value!r:.60}"
    if settings.get("task_type") != "CAUSAL_LM":
        return f"task_type {settings.get('task_type')!r:.60}"
    key = "r" if kind == "LORA" else "num_virtual_tokens"
    sizes = {shape[0] for name, shape in shapes.items() if (kind == "CARTRIDGE" or ".lora_A." in name) and shape}
    if sizes != {settings.get(key)} or isinstance(settings[key], bool):
        return f"{key} = {settings.get(key)!r:.60}, tensors for {', '.join(map(str, sorted(sizes)[:5])) or 'none'}"
    if kind == "CARTRIDGE":
        return ""
    named = settings.get("target_modules")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return f"target_modules = {named!r:.60}"  # a text would be a pattern
    for name in ("lora_alpha", "lora_dropout"):
        number = settings.get(name)
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            return f"{name} = {number!r:.60}"
    return ""


def encoder_of(model: Any) -> Any:
    """The part of peft's model that holds a cartridge, or None where the adapter is of another kind."""
    encoders = getattr(model, "prompt_encoder", None) if isinstance(model, PeftModel) else None
    return encoders[model.active_adapter] if encoders else None


def scale(model: Any, value: float) -> None:
    """Multiply the update of the adapter that is on by `value` (at least 0), for good.

    DoRA's update has a magnitude per output, too: it moves from the base weights' own (0) to the trained one (1) and on.

    Raises: `ModelError` for a cartridge, which is no update.
    """
    if value == 1:  # and DoRA's magnitudes keep their last bits
        return
    if encoder_of(model) is not None:
        raise ModelError("a cartridge has no strength", expected="1", found=f"{value:g}", fix="leave the strength out")
    for layer, name in _layers(model):
        layer.scaling[name] *= value
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name]
            with torch.no_grad():
                weight = dequantize_module_weight(layer.get_base_layer())
                base = torch.linalg.norm(transpose(weight, layer.fan_in_fan_out), dim=1)  # [out]
                magnitude.weight.copy_(base + value * (magnitude.weight - base))


def take_off(model: Any) -> None:
    """Take off the layers that peft had put on a model when it failed; `unload` needs a whole model of peft."""
    for path, layer in [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextlib.contextmanager
def strengthened(model: Any, value: float) -> Iterator[None]:
    """Inside, the adapter has this strength (see `scale`)."""
    before = [
        (layer, name, layer.scaling[name], _copy(layer.lora_magnitude_vector, name)) for layer, name in _layers(model)
    ]
    scale(model, value)
    try:
        yield
    finally:
        for layer, name, scaling, magnitude in before:
            layer.scaling[name] = scaling
            if magnitude is not None:
                with torch.no_grad():
                    layer.lora_magnitude_vector[name].weight.copy_(magnitude)


def _layers(model: Any) -> Iterator[tuple[Any, str]]:
    """The adapted layers with the name of their active adapter."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                if name in module.scaling:
                    yield module, name


def _copy(magnitudes: Any, name: str) -> torch.Tensor | None:
    return magnitudes[name].weight.detach().clone() if name in magnitudes else None
