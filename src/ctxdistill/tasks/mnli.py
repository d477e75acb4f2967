"""MNLI (Williams et al. 2018), binary: neutral is dropped, as in the paper and in Mosbach et al. 2023.

The whole training set is on the hub; the local file is a subset of 8,999 rows.
"""

from __future__ import annotations

from ctxdistill.tasks import hans
from ctxdistill.tasks.patterns import entailment, fields
from ctxdistill.tasks.source import Hub, Local, Source
from ctxdistill.tasks.task import Task

LABELS = ("entailment", "contradiction")
PAIR = ("sentence1", "sentence2")
COLUMNS = ("premise", "hypothesis")

TRAIN = Source(
    name="MNLI train",
    labels=LABELS,
    local=Local(
        file="mnli_train9k.jsonl",
        columns=PAIR,
        counts={"entailment": 3061, "neutral": 2980, "contradiction": 2958},
    ),
    hub=Hub(
        path="nyu-mll/glue",
        config="mnli",
        columns=COLUMNS,
        index="idx",
        counts={"entailment": 130_899, "neutral": 130_900, "contradiction": 130_903},
    ),
)
MATCHED = {"entailment": 3479, "neutral": 3123, "contradiction": 3213}
VALIDATION = Source(
    name="MNLI validation, matched",
    labels=LABELS,
    local=Local(file="mnli_dev_matched.jsonl", columns=PAIR, counts=MATCHED),
    hub=Hub(
        path="nyu-mll/glue", config="mnli", split="validation_matched", columns=COLUMNS, index="idx", counts=MATCHED
    ),
)
TASK = Task(
    name="mnli",
    version=1,
    title="MNLI",
    labels=LABELS,
    train=TRAIN,
    evaluation=VALIDATION,
    ood={"hans": hans.source(LABELS)},
    extra_ood=hans.others(LABELS),
    patterns=entailment(LABELS, fields("Premise", "Hypothesis")),
    default_pattern="paper",
)
