"""Internalise a context into a LoRA adapter, and measure how faithful the result is.

from ctxdistill import Recipe, distill, load_student
run = distill(Recipe.load("my-recipe.toml"))
model, tokenizer = load_student(run.path)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported on first use: `ctxdistill --help` must not wait for torch. `evaluate`, `plan` and `report` are modules
# here; the functions of that name are in `ctxdistill.pipeline`.
_HOMES = {
    "Recipe": "recipe", "Context": "prompts", "CtxDistillError": "errors", "LM": "lm", "Prompter": "prompts",
    "Run": "pipeline", "demo": "pipeline", "distill": "pipeline", "gate": "pipeline",
    "load_student": "pipeline", "show": "pipeline", "try_text": "pipeline",
}  # fmt: skip

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ctxdistill.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ctxdistill' has no attribute {name!r}")
