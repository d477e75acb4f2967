"""What a recipe may do to the machine that reads it: run code, and write files.

In: what a recipe or a run folder asks for. Out: nothing, or an error. Invariants: code that is not this program's is loaded
only where the person who runs it has said so, on the command line or in the environment, never because a file says so; a
recipe has nothing written but below its own folder or the working directory, and one that came with a run only below the run
or the working directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ctxdistill.errors import RecipeError

ALLOW = "CTXDISTILL_ALLOW_CODE"
"""Environment variable; 1 allows code. `ctxdistill --allow-code` sets it for one command."""


def code_allowed() -> bool:
    """Whether code that a recipe names may run."""
    return os.environ.get(ALLOW, "") == "1"


def need_code(what: str) -> None:
    """Raise `RecipeError` where `what` would run code and nobody has allowed it."""
    if not code_allowed():
        raise RecipeError(
            f"{what} runs code that is not ctxdistill's",
            expected="your word that you trust it",
            fix=f"look at the code, then: ctxdistill --allow-code ... (or {ALLOW}=1)",
        )


def outside(written: Mapping[str, Path], *folders: Path) -> list[str]:
    """A problem for each key whose path is below none of `folders`, links followed."""
    known = [folder.resolve() for folder in folders]
    where = ", ".join(map(str, dict.fromkeys(known)))
    return [
        f"{key}: {path} would be written outside of {where}"
        for key, path in written.items()
        if not any(path.resolve().is_relative_to(folder) for folder in known)
    ]
