"""TREC questions (Li and Roth 2002): what kind of thing is asked for? The six coarse classes."""

from __future__ import annotations

from ctxdistill.tasks.source import Hub, Local, Source, labelled
from ctxdistill.tasks.task import Pattern, Task

WORDS = {
    "ABBR": "abbreviation",
    "ENTY": "entity",
    "DESC": "description",
    "HUM": "person",
    "LOC": "location",
    "NUM": "number",
}
LABELS = tuple(WORDS)


def _source(split: str, *counts: int) -> Source:
    found = dict(zip(LABELS, counts, strict=True))
    return Source(
        name=f"TREC {split}",
        labels=LABELS,
        local=Local(file=f"trec/TREC.{split}", read=labelled("latin-1"), counts=found),
        hub=Hub(
            path="CogComp/trec",
            split=split,
            parquet=f"default/{split}/*.parquet",
            label="coarse_label",
            counts=found,
        ),
    )


TASK = Task(
    name="trec",
    version=1,
    title="TREC",
    labels=LABELS,
    train=_source("train", 86, 1250, 1162, 1223, 835, 896),
    evaluation=_source("test", 9, 94, 138, 65, 81, 113),
    patterns={"default": Pattern("Question: {text}\nAnswer type:", WORDS)},
)
