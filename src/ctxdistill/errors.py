"""What a user can cause, and can fix.

Every message says what was expected, what was found and what to do. The command line turns these into exit code 2 and
never shows a traceback; anything else that escapes is a bug (exit code 1).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
"""Names of environment variables whose values are nobody's business."""
LONGEST = 500
"""Characters of one of several problems: a name that is quoted may be megabytes."""


class CtxDistillError(Exception):
    """Base of all errors that the user can fix.

    Args:
        message: what is wrong, in one sentence.
        expected: what would have been right.
        found: what was there instead.
        fix: what to do about it.
    """

    def __init__(self, message: str, *, expected: str = "", found: str = "", fix: str = "") -> None:
        self.message, self.expected, self.found, self.fix = map(redact, (message, expected, found, fix))
        parts = [("expected", self.expected), ("found", self.found), ("fix", self.fix)]
        super().__init__("\n".join([self.message, *(f"  {name}: {text}" for name, text in parts if text)]))


class RecipeError(CtxDistillError):
    """The recipe is wrong: unknown key, wrong type, values that contradict each other."""


class DataError(CtxDistillError):
    """Rows cannot be read or do not fit together: broken lines, missing columns, duplicates, overlap."""


class ModelError(CtxDistillError):
    """The model, tokenizer or adapter cannot be loaded or cannot do what the recipe asks."""


class FitError(CtxDistillError):
    """A prompt does not fit the model's window. Nothing is ever cut in silence."""


class RunError(CtxDistillError):
    """The run folder is missing, incomplete, damaged, locked or belongs to another recipe."""


class GateError(CtxDistillError):
    """The gate found nothing to teach and the recipe says to stop then."""


class TrainError(CtxDistillError):
    """Training cannot go on: a loss that is not finite, a gradient that is zero."""


def as_memory_error(error: BaseException) -> ModelError | None:
    """What to say when an error of Python's, torch's or a GPU's is that there is too little memory; else None."""
    said = str(error).strip().partition("\n")[0]
    # torch's own class, which is not to be loaded for this; on a CPU torch has none
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if not kinds & {"MemoryError", "OutOfMemoryError"} and "can't allocate memory" not in said:
        return None
    return ModelError(
        "the memory does not hold what is to be done at once",
        found=said,
        fix="lower targets.batch_size for rows that are written, read or measured side by side, and train.micro_batch for training; "
        'set model.quantize = "4bit"; take a smaller model; or close what else uses the device',
    )


def redact(text: str) -> str:
    """`text` without the values of secret environment variables, and without the user in an address (`//user:word@host`)."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return re.sub(r"(?<=://)[^/\s@'\"]+@", "***@", text)


def several(
    kind: type[CtxDistillError], what: str, problems: Sequence[str], *, fix: str = "", most: int = 20
) -> CtxDistillError:
    """One error that lists all problems, at most `most` of them spelled out, so that the user mends them in one go."""
    lines = [f"  - {problem[:LONGEST]}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  - ... and {len(problems) - most} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return kind("\n".join([f"{what}: {count}", *lines]), fix=fix)
