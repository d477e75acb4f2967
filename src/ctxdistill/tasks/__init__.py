"""Ready tasks, one file each: rows, prompt patterns, label words, sets in and out of domain.

In: a task's name and where its data lies. Out: `Task`s and their `Row`s. Invariant: rows are only given out when their
number and labels are the published ones.
"""

from __future__ import annotations

import difflib

from ctxdistill.errors import RecipeError
from ctxdistill.tasks import banking77, clinc150, cola, mnli, mrpc, qqp, rte, sms_spam, sst2, trec
from ctxdistill.tasks.source import Source, load
from ctxdistill.tasks.task import Pattern, Task

__all__ = ["TASKS", "Pattern", "Source", "Task", "find", "load"]

_MODULES = (mnli, rte, qqp, mrpc, cola, sst2, trec, sms_spam, clinc150, banking77)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}


def find(name: str) -> Task:
    """The task of this name. Raises `RecipeError` that names the nearest one."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    raise RecipeError(
        f"there is no task {name!r}",
        expected=f"one of {', '.join(TASKS)}",
        fix=f"did you mean {near[0]!r}?" if near else "name a task of this list",
    )
