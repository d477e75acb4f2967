"""Ready tasks, one file each: rows, prompt patterns, label words, sets in and out of domain.

In: a task's name and where its data lies. Out: `Task`s and their `Row`s. Invariant: rows are only given out when their
number and labels are the published ones.
"""

from __future__ import annotations

from ctxdistill.tasks import banking77, clinc150, cola, mnli, mrpc, qqp, rte, sms_spam, sst2, trec
from ctxdistill.tasks.source import Source, load
from ctxdistill.tasks.task import Pattern, Task

__all__ = ["TASKS", "Pattern", "Source", "Task", "load"]

_MODULES = (mnli, rte, qqp, mrpc, cola, sst2, trec, sms_spam, clinc150, banking77)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}
