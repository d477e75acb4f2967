"""RTE (GLUE): does the first text entail the second?"""

from __future__ import annotations

from ctxdistill.tasks import hans
from ctxdistill.tasks.patterns import entailment, fields
from ctxdistill.tasks.source import Hub, Local, Source
from ctxdistill.tasks.task import Task

LABELS = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")


def _source(name: str, file: str, split: str, counts: tuple[int, int]) -> Source:
    found = dict(zip(LABELS, counts, strict=True))
    return Source(
        name=name,
        labels=LABELS,
        local=Local(file=file, columns=PAIR, counts=found),
        hub=Hub(path="nyu-mll/glue", config="rte", split=split, columns=PAIR, index="idx", counts=found),
    )


HANS = fields("Premise", "Hypothesis")
"""The paper's code names the fields after the columns of the set, so that HANS is asked in other words than RTE."""

TASK = Task(
    name="rte",
    version=2,
    title="RTE",
    labels=LABELS,
    train=_source("RTE train", "rte_train.jsonl", "train", (1249, 1241)),
    evaluation=_source("RTE validation", "rte_dev.jsonl", "validation", (146, 131)),
    ood={"hans": hans.source(LABELS)},
    extra_ood=hans.others(LABELS),
    patterns=entailment(
        LABELS,
        fields("Sentence1", "Sentence2"),
        ood={"hans": HANS, **{f"hans_{heuristic}": HANS for heuristic in hans.HEURISTICS[1:]}},
    ),
    default_pattern="paper",
)
