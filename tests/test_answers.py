"""Short answers, scored by hand."""

from __future__ import annotations

import string
from typing import Any

import pytest

from ctxdistill.answers import contains, exact, f1, normalise, squad_contains, squad_exact, squad_f1


def test_what_does_not_matter() -> None:
    assert normalise(" The  Patient-Heron, an old  BOAT!\n") == ["patientheron", "old", "boat"]
    assert normalise("1,150") == normalise("1150") and normalise("theatre anthem") == ["theatre", "anthem"]
    assert exact("the needle shoal.", "Needle Shoal") == 1.0 and exact("Shoal Needle", "Needle Shoal") == 0.0
    assert exact("$5", "5") == 1.0 and normalise("~5 + 3 = 8 (approx.)") == ["5", "3", "8", "approx"]
    assert normalise(string.punctuation) == []


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [
        ("red slate", "red slate", 1.0), ("It is red slate", "red slate", 2 * 2 / (4 + 2)), ("blue", "red slate", 0.0),
        ("slate slate", "slate", 2 / 3), ("", "slate", 0.0), ("the", "a", 0.0), ("slate", "", 0.0), ("", "", 1.0),
    ],
)  # fmt: skip
def test_f1_by_hand(prediction: str, answer: str, value: float) -> None:
    assert f1(prediction, answer) == pytest.approx(value)


def test_the_best_reference_counts() -> None:
    row = {"answers": ["six weeks", "6 weeks"]}
    assert squad_exact("6 weeks", "six weeks", row) == 1.0 and squad_exact("6 weeks", "six weeks", {}) == 0.0
    assert squad_f1("about 6 weeks", "six weeks", row) == pytest.approx(0.8)
    assert squad_exact("x", None, row) is None and squad_f1("x", None, row) is None
    assert squad_f1("6 weeks", "six weeks", {"answers": "6 weeks"}) == pytest.approx(0.5)  # a text is no list


def test_an_answer_in_a_sentence() -> None:
    assert (
        contains("The tower is 31 metres high.", "31 metres") == 1.0
        and contains("It is 311 metres", "31 metres") == 0.0
    )
    assert (
        contains("metres 31", "31 metres") == 0.0
        and contains("", "31") == 0.0
        and contains("31 Metres!", "the 31 metres") == 1.0
    )
    assert squad_contains("it took six weeks", "6 weeks", {"answers": ["six weeks"]}) == 1.0
    assert squad_contains("x", None, {}) is None


@pytest.mark.parametrize("metric", [squad_contains, squad_exact, squad_f1])
def test_a_reference_of_an_article_alone_is_asked_for(metric: Any) -> None:
    """Multiple choice: the letter A is an article."""
    for right in ("A", "a.", "(A)"):
        assert metric(right, "A", {}) == 1.0
    for wrong in ("B", "the", "an", "", "I do not know"):
        assert metric(wrong, "A", {}) == 0.0 and metric(wrong, "x", {"answers": ["A"]}) == 0.0


@pytest.mark.parametrize("metric", [squad_contains, squad_exact, squad_f1])
def test_a_reference_without_words_is_not_right_by_itself(metric: Any) -> None:
    assert metric("<", " < ", {}) == 1.0 and metric(">", "<", {}) == metric("x", "<", {}) == metric("", "<", {}) == 0.0
    assert metric("x", "", {}) == 0.0 and metric("", "", {}) == 1.0  # as SQuAD 2 scores what has no answer


def test_the_letter_in_a_sentence() -> None:
    assert contains("The answer is A.", "A") == 1.0 and contains("The answer is B", "A") == 0.0
    assert contains("It is the Answer", "A") == 0.0
