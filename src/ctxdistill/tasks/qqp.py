"""QQP (GLUE): do two questions ask the same? 1,000 rows for training and 1,000 for validation, as in Mosbach et al. 2023.

numpy's legacy generator with seed 123 draws first from the training set, then goes on with the validation set; rows stay
in the order in which they were drawn. The local files are subsets of 8,999 and 1,000 rows, from which the same is drawn,
so that the rows differ from those of the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ctxdistill.rows import Row
from ctxdistill.tasks import paws_qqp
from ctxdistill.tasks.patterns import PARAPHRASE, fields, mosbach, paper
from ctxdistill.tasks.source import Hub, Local, Source
from ctxdistill.tasks.task import Task

LABELS = ("not_duplicate", "duplicate")
NAMES = {"0": "not_duplicate", "1": "duplicate"}
ROWS, SEED = 1000, 123


def subsample(total: int, before: Sequence[int] = ()) -> list[int]:
    """Numbers of the rows that are drawn from a set of `total` rows, after those of sets with `before` rows."""
    generator = np.random.RandomState(SEED)
    for size in before:
        generator.choice(size, ROWS, replace=False)
    return [int(i) for i in generator.choice(total, ROWS, replace=False)]


def _choose(rows: Sequence[Row], *, before: Sequence[int]) -> list[Row]:
    return [rows[i] for i in subsample(len(rows), before)]


def _source(split: str, file: str, there: tuple[int, int], here: tuple[int, int], before: tuple[int, int]) -> Source:
    """Counts on the hub and in the local file; `before`: the training set's rows on the hub and in the local file, if
    it is drawn from before this set."""
    after_hub, after_local = ((size,) if size else () for size in before)
    return Source(
        name=f"QQP {split}",
        labels=LABELS,
        local=Local(
            file=file,
            columns=("sentence1", "sentence2"),
            labels=NAMES,
            counts=dict(zip(LABELS, here, strict=True)),
            choose=partial(_choose, before=after_local),
        ),
        hub=Hub(
            path="nyu-mll/glue",
            config="qqp",
            split=split,
            columns=("question1", "question2"),
            index="idx",
            counts=dict(zip(LABELS, there, strict=True)),
            choose=partial(_choose, before=after_hub),
        ),
    )


QUERY = fields("Question1", "Question2")
TASK = Task(
    name="qqp",
    version=1,
    title="QQP",
    labels=LABELS,
    train=_source("train", "qqp_train_subset.jsonl", (229_468, 134_378), (5747, 3252), (0, 0)),
    evaluation=_source("validation", "qqp_dev_subset.jsonl", (25_545, 14_885), (623, 377), (363_846, 8999)),
    ood={"paws_qqp": paws_qqp.source(LABELS)},
    patterns={
        "paper": paper(LABELS, ("no", "yes"), PARAPHRASE, QUERY),
        # The paper's code names the classes 0 and 1 of every data set "yes" and "no": here that turns the answers round.
        "paper-compat": paper(LABELS, ("yes", "no"), PARAPHRASE, QUERY),
        **mosbach(
            LABELS,
            minimal=("{text1} {text2} ?", ("No", "Yes")),
            eval_harness=(
                "Question 1: {text1}\nQuestion 2: {text2}\nQuestion: Do both questions ask the same thing? Answer:",
                ("No", "Yes"),
            ),
        ),
    },
    default_pattern="paper",
)
