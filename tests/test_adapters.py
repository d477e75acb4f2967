"""An adapter saved, and turned up and down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from ctxdistill.adapters import save, scale, settings_of, strengthened
from ctxdistill.lm import LM
from ctxdistill.recipe import LoraSection, ModelSection

ROWS = [([0, 5, 6, 7, 8, 9, 10], 3), ([0, 9, 8, 20], 2)]


@pytest.fixture
def student(llama: Path) -> LM:
    lm = LM.load(ModelSection(name=str(llama)))
    lm.add_adapter(LoraSection(rank=4), 0)
    tiny.disturb(lm)
    lm.training(False)
    return lm


def hidden(lm: LM) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(lm.hidden(ROWS))


def test_strength_0_is_the_base_and_1_the_adapter_to_the_last_bit(student: LM) -> None:
    trained = hidden(student)
    with student.adapter(False):
        base = hidden(student)
    with strengthened(student.peft, 0.0):
        assert torch.equal(hidden(student), base)
    with strengthened(student.peft, 1.0):
        assert torch.equal(hidden(student), trained)
    assert torch.equal(hidden(student), trained) and not torch.allclose(base, trained, atol=1e-3)


def test_the_same_adapter_is_the_same_bytes_in_every_process(student: LM, tmp_path: Path) -> None:
    """peft keeps the names of layers in a set, which one process writes in one order and another in another."""
    config = student.peft.peft_config["default"]
    names, kept = sorted(config.target_modules), []
    for number, order in enumerate((names, names[::-1], names[3:] + names[:3])):
        config.target_modules = order
        folder = save(student.peft, tmp_path / str(number))
        kept.append([(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")])
    config.target_modules = set(names)
    assert kept[0] == kept[1] == kept[2]
    assert settings_of(folder)["target_modules"] == names and len(names) == 7


@pytest.mark.parametrize("value", [0.25, 1.5])
def test_strength_multiplies_the_update(student: LM, value: float) -> None:
    """Against weights with the scaled update added in."""
    with strengthened(student.peft, value):
        fast = hidden(student)
    with torch.no_grad():
        for module in student.model.modules():
            if hasattr(module, "lora_A"):
                update = module.lora_B["default"].weight @ module.lora_A["default"].weight
                module.base_layer.weight.add_(value * module.scaling["default"] * update)
    with student.adapter(False):
        torch.testing.assert_close(fast, hidden(student), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2's weights are [in, out]
@pytest.mark.parametrize("value", [0.25, 1.5])
def test_strength_moves_doras_magnitudes_from_those_of_the_base(
    architecture: str, value: float, tmp_path: Path
) -> None:
    """Against weights made by the formula: each output's magnitude times its direction."""
    lm = LM.load(ModelSection(name=str(tiny.save(tmp_path, architecture))))
    lm.add_adapter(LoraSection(rank=4, method="dora"), 0)
    tiny.disturb(lm)
    lm.training(False)
    with strengthened(lm.peft, value):
        fast = hidden(lm)
    with torch.no_grad():
        for module in lm.model.modules():
            if hasattr(module, "lora_A"):
                weight = module.base_layer.weight.T if architecture == "gpt2" else module.base_layer.weight
                base = weight.norm(dim=1)  # [out]
                magnitude = base + value * (module.lora_magnitude_vector["default"].weight - base)
                update = module.lora_B["default"].weight @ module.lora_A["default"].weight
                new = weight + value * module.scaling["default"] * update
                weight.copy_(magnitude[:, None] * new / new.norm(dim=1, keepdim=True))
    with lm.adapter(False):
        torch.testing.assert_close(fast, hidden(lm), rtol=1e-4, atol=1e-4)


def test_a_failure_inside_gives_the_strength_back(student: LM) -> None:
    trained = hidden(student)
    with pytest.raises(KeyError), strengthened(student.peft, 0.5):
        raise KeyError
    assert torch.equal(hidden(student), trained)
    scale(student.peft, 0.5)
    scale(student.peft, 2.0)
    assert torch.equal(hidden(student), trained)
