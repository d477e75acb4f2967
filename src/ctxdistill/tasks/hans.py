"""HANS (McCoy et al. 2019): entailment where the words of the hypothesis all occur in the premise, out of domain for
MNLI and RTE. In: a heuristic and a task's two labels. Out: its `Source`.

The published set has 30,000 rows, 10,000 for each heuristic, half of them entailment. The local file is a new draw from
the authors' generator (both seeds 0): same size and split, other sentences, in the generator's order (non-entailment
first).
"""

from __future__ import annotations

from collections.abc import Sequence

from ctxdistill.tasks.source import Hub, Local, Source

HEURISTICS = ("lexical_overlap", "subsequence", "constituent")


def source(labels: Sequence[str], heuristic: str = "lexical_overlap") -> Source:
    """Entailment is the first of `labels`, non-entailment the second."""
    entailment, other = labels
    names = {"entailment": entailment, "non-entailment": other}
    counts = {entailment: 5000, other: 5000}
    return Source(
        name=f"HANS {heuristic}",
        labels=(entailment, other),
        local=Local(
            file=f"hans/hans_regen_seed0_{heuristic}.tsv",
            columns=("sentence1", "sentence2"),
            label="gold_label",
            labels=names,
            only={"heuristic": heuristic},
            counts=counts,
        ),
        hub=Hub(
            path="jhu-cogsci/hans",
            split="validation",
            parquet="plain_text/validation/*.parquet",
            columns=("premise", "hypothesis"),
            labels=names,
            only={"heuristic": heuristic},
            counts=counts,
        ),
    )


def others(labels: Sequence[str]) -> dict[str, Source]:
    """The two heuristics that the paper does not use."""
    return {f"hans_{heuristic}": source(labels, heuristic) for heuristic in HEURISTICS[1:]}
