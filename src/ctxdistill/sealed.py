"""Tensors and text in one safetensors file that knows its own checksum.

In: tensors by name, a text. Out: bytes; from a file, the same again or an error. Invariant: what `load` returns is what
`save` was given, bit by bit; safetensors alone notices only what breaks its header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ctxdistill import files


def digest(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """SHA-256 of names, types, shapes and bytes of `tensors`, and of `text`."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def save(tensors: Mapping[str, torch.Tensor], text: str = "") -> bytes:
    """A safetensors file with its checksum in it."""
    metadata = {"text": text, "sha256": digest(tensors, text)}
    return bytes(safetensors.torch.save(dict(tensors), metadata=metadata))


def load(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """What `save` was given, on the CPU. Raises: ValueError that says how the file is damaged."""
    if path.exists() and not path.is_file():
        raise ValueError(f"it is {files.kind(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from None
    found = digest(tensors, stored.get("text", ""))
    if found != stored.get("sha256"):
        raise ValueError(f"its checksum is {found[:16]}..., and should be {stored.get('sha256', 'in it')[:16]}...")
    return tensors, stored["text"]
