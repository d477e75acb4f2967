"""Similarity against its definition, by the index and by comparing everything with everything."""

from __future__ import annotations

import random

import pytest

from ctxdistill.similar import Index, diversity, grams


def jaccard(a: str, b: str) -> float:
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


WORDS = ["the", "tower", "is", "high", "how", "old", "red", "boat"]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=random.Random(-i).randint(1, 7))) for i in range(60)]


def test_by_hand() -> None:
    assert jaccard("How high is the tower?", "how HIGH is the tower") == 1.0
    # how-high-is, high-is-the, is-the-tower against high-is-the, is-the-tower: 2 of 3
    assert jaccard("how high is the tower", "high is the tower") == pytest.approx(2 / 3)
    assert jaccard("塔有多高？", "塔有多高") == 1.0 and jaccard("塔有多高", "塔有多长") == pytest.approx(1 / 3)
    assert grams("") == grams("") and len(grams("?")) == 1


def test_the_index_finds_what_comparing_all_finds() -> None:
    index = Index()
    for i, text in enumerate(TEXTS):
        slow = [jaccard(text, other) for other in TEXTS[:i]]
        best = max(slow, default=0.0)
        similarity, number = index.nearest(text)
        assert similarity == pytest.approx(best)
        assert number == (slow.index(best) if best else None)
        index.add(text)


def test_diversity_is_its_definition() -> None:
    found = diversity(TEXTS)
    pairs = [(a, b) for i, a in enumerate(TEXTS) for b in TEXTS[:i]]
    assert found["mean_distance"] == pytest.approx(sum(1 - jaccard(a, b) for a, b in pairs) / len(pairs))
    nearest = [max(jaccard(a, b) for j, b in enumerate(TEXTS) if j != i) for i, a in enumerate(TEXTS)]
    assert found["nearest_distance"] == pytest.approx(1 - sum(nearest) / len(nearest))
    assert diversity(["a b c", "a b c"]) == {
        "distinct_1": 0.5, "distinct_2": 0.5, "mean_distance": 0.0, "nearest_distance": 0.0,
    }  # fmt: skip
    assert diversity(["one"]) == {}
