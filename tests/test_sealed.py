"""A sealed file gives back what was put in, or an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctxdistill import sealed

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.tensor(3.0),
    "c": torch.ones(2, dtype=torch.int32),
}


def test_what_comes_out_is_what_was_put_in(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(sealed.save(TENSORS, "the state: 5 \u00e4"))
    found, text = sealed.load(tmp_path / "x")
    assert text == "the state: 5 \u00e4" and found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_changed_bit_in_any_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    raw = sealed.save(TENSORS, '{"step": 12}')
    path = tmp_path / "x"
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << place % 8)]) + raw[place + 1 :])
        with pytest.raises(ValueError):
            sealed.load(path)
        path.write_bytes(raw[:place])
        with pytest.raises(ValueError):
            sealed.load(path)


def test_names_types_and_shapes_are_sealed_too() -> None:
    text = "x"
    others = [
        {**TENSORS, "b": torch.tensor([3.0])},
        {**TENSORS, "a": TENSORS["a"].view(torch.int16)},
        {"a": TENSORS["a"], "d": TENSORS["b"], "c": TENSORS["c"]},
        {"a": TENSORS["a"], "b": TENSORS["b"]},
    ]
    assert sealed.digest(TENSORS, text) not in {sealed.digest(other, text) for other in others}
    assert sealed.digest(TENSORS, text) != sealed.digest(TENSORS, text + " ")


def test_a_plain_file_of_tensors_is_not_sealed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "x")
    with pytest.raises(ValueError, match="checksum"):
        sealed.load(tmp_path / "x")
