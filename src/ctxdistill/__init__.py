"""Internalise a context into a LoRA adapter, and measure how faithful the result is.

from ctxdistill import Recipe, distill, load_student
run = distill(Recipe.load("my-recipe.toml"))
model, tokenizer = load_student(run.path)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxdistill.errors import CtxDistillError
    from ctxdistill.lm import LM
    from ctxdistill.pipeline import Run, demo, distill, gate, load_student, show, try_text
    from ctxdistill.prompts import Context, Prompter
    from ctxdistill.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "LM", "Context", "CtxDistillError", "Prompter", "Recipe", "Run", "__version__", "demo", "distill", "gate", "load_student",
    "show", "try_text",
]  # fmt: skip

# Imported on first use: `ctxdistill --help` must not wait for torch. `evaluate`, `plan` and `report` are modules
# here; the functions of that name are in `ctxdistill.pipeline`.
_HOMES = {"Recipe": "recipe", "Context": "prompts", "CtxDistillError": "errors", "LM": "lm", "Prompter": "prompts"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"ctxdistill.{_HOMES.get(name, 'pipeline')}"), name)
    raise AttributeError(f"module 'ctxdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
