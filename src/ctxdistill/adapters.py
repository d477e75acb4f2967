"""What can be done to trained adapters: turned up and down, and added.

In: a model with adapters of peft. Out: the same model. Invariants: strength 0 is the base model and 1 the adapter as it was
trained, to the last bit; a weighted sum is the sum of the updates themselves, not of their factors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from ctxdistill.errors import ModelError


def encoder_of(model: Any) -> Any:
    """The part of peft's model that holds a cartridge, or None where the adapter is of another kind."""
    encoders = getattr(model, "prompt_encoder", None) if isinstance(model, PeftModel) else None
    return encoders[model.active_adapter] if encoders else None


def scale(model: Any, value: float) -> None:
    """Multiply the update of the adapter that is on by `value` (at least 0), for good.

    DoRA's update has a magnitude per output, too: it moves from the base weights' own (0) to the trained one (1) and on.

    Raises: `ModelError` for a cartridge, which is no update.
    """
    if value != 1 and encoder_of(model) is not None:
        raise ModelError("a cartridge has no strength", expected="1", found=f"{value:g}", fix="leave the strength out")
    for layer, name in _layers(model):
        layer.scaling[name] *= value
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name]
            with torch.no_grad():
                base = torch.linalg.norm(layer.get_base_layer().weight, dim=1)  # [out]
                magnitude.weight.copy_(base + value * (magnitude.weight - base))


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
