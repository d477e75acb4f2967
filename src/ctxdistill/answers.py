"""Is a short answer right? As SQuAD scores it.

In: a prediction and the reference answers. Out: numbers from 0 to 1. Invariants: case, punctuation, articles and white space
never matter, unless the reference is nothing else; with several references the best one counts.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any


def normalise(text: str, *, articles: bool = False, punctuation: bool = False) -> list[str]:
    """The words of an answer, without case, and without punctuation (all of `string.punctuation`, and Unicode's) and articles
    unless asked for. A comma or point between digits is kept out, too: `1,150` and `1150` are one word."""
    text = unicodedata.normalize("NFKC", text).casefold()
    if not punctuation:
        text = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return (text if articles else re.sub(r"\b(?:a|an|the)\b", " ", text)).split()


def _words(prediction: str, answer: str) -> tuple[list[str], list[str]]:
    """The normalised words of both; with articles, and then with punctuation, where the answer is nothing else."""
    articles = not normalise(answer)
    punctuation = not normalise(answer, articles=True)
    found, right = (normalise(text, articles=articles, punctuation=punctuation) for text in (prediction, answer))
    return found, right


def exact(prediction: str, answer: str) -> float:
    """1 when the normalised words are the same, in order."""
    found, right = _words(prediction, answer)
    return float(found == right)


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of the shares of words that prediction and answer have in common."""
    found, right = _words(prediction, answer)
    if not found or not right:
        return float(found == right)
    common = (Counter(found) & Counter(right)).total()
    return 2 * common / (len(found) + len(right))


def contains(prediction: str, answer: str) -> float:
    """1 when the answer's words stand in the prediction, together and in order: for models that answer in sentences. An
    empty answer stands in an empty prediction alone."""
    found, right = _words(prediction, answer)
    if not right:
        return float(not found)
    return float(any(found[i : i + len(right)] == right for i in range(len(found) - len(right) + 1)))


def references(answer: str, row: Mapping[str, Any]) -> list[str]:
    """All right answers of a row: its column `answers`, if that is a list, and its reference answer."""
    more = row.get("answers")
    return [answer, *(str(a) for a in more)] if isinstance(more, list) else [answer]


def squad_exact(prediction: str, answer: str | None, row: Mapping[str, Any]) -> float | None:
    """`exact` for the best of the row's references; None without any."""
    return None if answer is None else max(exact(prediction, a) for a in references(answer, row))


def squad_f1(prediction: str, answer: str | None, row: Mapping[str, Any]) -> float | None:
    """`f1` for the best of the row's references; None without any."""
    return None if answer is None else max(f1(prediction, a) for a in references(answer, row))


def squad_contains(prediction: str, answer: str | None, row: Mapping[str, Any]) -> float | None:
    """`contains` for the best of the row's references; None without any."""
    return None if answer is None else max(contains(prediction, a) for a in references(answer, row))


METRICS = {"squad_contains": squad_contains, "squad_exact": squad_exact, "squad_f1": squad_f1}
