"""Which texts say nearly the same, and how different a set of texts is.

In: texts. Out: the most similar earlier text, measures of diversity. Invariant: exact, not estimated. Two texts are
compared by the Jaccard index of their word 3-grams (shared / all), of character 3-grams where a text has fewer than three
words or its script puts no spaces between them. An index from each 3-gram to the texts that have it means that only texts
with something in common are compared: a text costs as many steps as its 3-grams have occurred before, so n texts cost
O(n^2) at worst (all alike) and about O(n) where they differ.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

Grams = frozenset[tuple[str, ...]]


def grams(text: str) -> Grams:
    """What texts are compared by."""
    words = re.findall(r"\w+", text.casefold())
    if len(words) < 3:
        squeezed = " ".join(words) or text
        return frozenset(("", squeezed[i : i + 3]) for i in range(max(1, len(squeezed) - 2)))
    return frozenset(zip(words, words[1:], words[2:], strict=False))


class Index:
    """Texts that were added, to be asked for the most similar one."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._sizes: list[int] = []
        self._where: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)  # 3-gram -> texts that have it

    def add(self, text: str) -> None:
        """Remember `text`."""
        for gram in (found := grams(text)):
            self._where[gram].append(len(self.texts))
        self.texts.append(text)
        self._sizes.append(len(found))

    def shared(self, text: str) -> dict[int, float]:
        """Number of an earlier text -> its similarity to `text`, for those with any."""
        found = grams(text)
        common = Counter(i for gram in found for i in self._where.get(gram, ()))
        return {i: n / (len(found) + self._sizes[i] - n) for i, n in common.items()}

    def nearest(self, text: str) -> tuple[float, int | None]:
        """(similarity, number) of the most similar earlier text; the first of equals, (0, None) where none is similar."""
        found = [(similarity, -i) for i, similarity in self.shared(text).items()]
        if not found:
            return 0.0, None
        similarity, number = max(found)
        return similarity, -number


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """How different texts are.

    Returns: `distinct_1` and `distinct_2`, the share of different words and word pairs among all; `mean_distance`, the mean
    of 1 - similarity over all pairs; `nearest_distance`, its mean to the most similar other text. Empty for fewer than two.
    """
    if len(texts) < 2:
        return {}
    index, total = Index(), 0.0
    closest = [0.0] * len(texts)
    for i, text in enumerate(texts):
        for j, similarity in index.shared(text).items():
            total += similarity
            closest[i], closest[j] = max(closest[i], similarity), max(closest[j], similarity)
        index.add(text)
    split = [re.findall(r"\w+", text.casefold()) for text in texts]
    ones = [word for words in split for word in words]
    twos = [pair for words in split for pair in itertools.pairwise(words)]
    return {
        "distinct_1": len(set(ones)) / max(1, len(ones)),
        "distinct_2": len(set(twos)) / max(1, len(twos)),
        "mean_distance": 1 - total / (len(texts) * (len(texts) - 1) / 2),
        "nearest_distance": 1 - statistics.fmean(closest),
    }
