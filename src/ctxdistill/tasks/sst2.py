"""SST-2 (Socher et al. 2013), whole sentences only (6,920 / 872 / 1,821), not the phrases of GLUE's version."""

from __future__ import annotations

from ctxdistill.tasks import cr
from ctxdistill.tasks.source import Hub, Local, Source, labelled
from ctxdistill.tasks.task import Pattern, Task

LABELS = ("negative", "positive")
NAMES = {"0": "negative", "1": "positive"}


def _source(split: str, negative: int, positive: int) -> Source:
    counts = {"negative": negative, "positive": positive}
    return Source(
        name=f"SST-2 {split}",
        labels=LABELS,
        local=Local(file=f"sst/stsa.binary.{split}", read=labelled(), labels=NAMES, counts=counts),
        hub=Hub(path="SetFit/sst2", split=split, labels=NAMES, counts=counts),
    )


TASK = Task(
    name="sst2",
    version=1,
    title="SST-2",
    labels=LABELS,
    train=_source("train", 3310, 3610),
    evaluation=_source("test", 912, 909),
    ood={"cr": cr.SOURCE},
    patterns={"default": Pattern("Review: {text}\nSentiment:", {label: label for label in LABELS})},
)
