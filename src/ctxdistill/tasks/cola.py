"""CoLA (Warstadt et al. 2019): is a sentence good English? Development rows from the sources of the training set are in
domain, those from other sources (CoLA-OOD) out of domain. GLUE's validation set is the one after the other."""

from __future__ import annotations

from ctxdistill.tasks.patterns import mosbach
from ctxdistill.tasks.source import Hub, Local, Source
from ctxdistill.tasks.task import Pattern, Task

LABELS = ("unacceptable", "acceptable")


def _source(name: str, file: str, split: str, counts: tuple[int, int]) -> Source:
    found = dict(zip(LABELS, counts, strict=True))
    return Source(
        name=name,
        labels=LABELS,
        local=Local(file=file, columns=("sentence",), labels={"0": "unacceptable", "1": "acceptable"}, counts=found),
        hub=Hub(
            path="nyu-mll/glue", config="cola", split=split, columns=("sentence",), index="idx", counts=sum(counts)
        ),
    )


TASK = Task(
    name="cola",
    version=1,
    title="CoLA",
    labels=LABELS,
    train=_source("CoLA train", "cola_train.jsonl", "train", (2528, 6023)),
    evaluation=_source("CoLA in domain", "cola_dev_in_domain.jsonl", "validation[:527]", (162, 365)),
    ood={"cola_ood": _source("CoLA out of domain", "cola_ood.jsonl", "validation[527:]", (162, 354))},
    patterns={
        "default": Pattern("Sentence: {text}\nAcceptable:", dict(zip(LABELS, ("no", "yes"), strict=True))),
        # Mosbach et al. put a space between demonstrations here, and an empty line everywhere else.
        "minimal": Pattern("{text} ?", dict(zip(LABELS, ("No", "Yes"), strict=True)), separator=" "),
        **mosbach(
            LABELS,
            gpt_3=("grammatical: {text} Yes or No? answer:", ("No", "Yes")),
        ),
    },
)
