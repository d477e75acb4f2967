"""PAWS-QQP (Zhang et al. 2019): pairs of questions with the same words in another order, out of domain for QQP and MRPC.

677 rows, the authors' development and test set, 191 of them paraphrases. Quora's terms do not allow to hand the questions
on, so the hub has a script at most; the file is made with google-research-datasets/paws (without the `b'...'` that it
leaves around each question).
"""

from __future__ import annotations

from collections.abc import Sequence

from ctxdistill.tasks.source import Local, Source


def source(labels: Sequence[str]) -> Source:
    """Paraphrases get the second of `labels`, other pairs the first."""
    other, paraphrase = labels
    return Source(
        name="PAWS-QQP",
        labels=(other, paraphrase),
        local=Local(
            file="paws_qqp_dev_test.jsonl",
            columns=("sentence1", "sentence2"),
            labels={"0": other, "1": paraphrase},
            counts={other: 486, paraphrase: 191},
        ),
        hub=None,
    )
