"""MRPC (Dolan and Brockett 2005): are two sentences from the news paraphrases? The paper does not use it; its pattern for
paraphrases is applied by the same rule (fields named after the columns)."""

from __future__ import annotations

from ctxdistill.tasks import paws_qqp
from ctxdistill.tasks.patterns import PARAPHRASE, fields, mosbach, paper
from ctxdistill.tasks.source import Hub, Local, Source
from ctxdistill.tasks.task import Task

LABELS = ("not_equivalent", "equivalent")
PAIR = ("sentence1", "sentence2")


def _source(split: str, *counts: int) -> Source:
    found = dict(zip(LABELS, counts, strict=True))
    names = {"0": "not_equivalent", "1": "equivalent"}
    return Source(
        name=f"MRPC {split}",
        labels=LABELS,
        local=Local(file=f"mrpc_{split}.jsonl", columns=PAIR, labels=names, counts=found),
        hub=Hub(path="nyu-mll/glue", config="mrpc", split=split, columns=PAIR, index="idx", counts=found),
    )


TASK = Task(
    name="mrpc",
    version=2,
    title="MRPC",
    labels=LABELS,
    train=_source("train", 1194, 2474),
    evaluation=_source("validation", 129, 279),
    ood={"paws_qqp": paws_qqp.source(LABELS)},
    patterns={
        "paper": paper(
            LABELS,
            ("no", "yes"),
            PARAPHRASE,
            fields("Sentence1", "Sentence2"),
            ood={"paws_qqp": fields("Question1", "Question2")},
        ),
        **mosbach(LABELS, minimal=("{text1} {text2} ?", ("No", "Yes"))),
    },
    default_pattern="paper",
)
