"""A long text becomes chunks that fit: by paragraphs, then sentences, then words, with overlap.

In: a text, how many tokens a chunk may have, how many of them may repeat the chunk before, and a function that counts
tokens. Out: `Chunk`s, and the share of queries that each is due. Invariants: every chunk is a slice of the text and has at most
so many tokens by the tokenizer's own count; every character that is not white space is in a chunk; nothing is cut off.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Count = Callable[[str], int]
"""Number of tokens of a text."""

SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])\s*|\n[ \t]*\n\s*|\n(?=\s*(?:[-*•#|>]|\d+[.)]))")
"""What stands between two sentences: white space behind a full stop, an empty line, a new item of a list or table."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a document."""

    source: str
    """The document's name."""
    number: int
    """From 1."""
    of: int
    """Number of chunks of this document."""
    start: int
    end: int
    """It is `document[start:end]`."""
    text: str
    tokens: int

    @property
    def name(self) -> str:
        """What rows call it, such as `handbook.md:2`."""
        return f"{self.source}:{self.number}"

    @property
    def title(self) -> str:
        """What the teacher reads above it."""
        return self.source if self.of == 1 else f"{self.source} (part {self.number} of {self.of})"


@dataclass(frozen=True)
class _Unit:
    """What is never split: a sentence, or a part of one that is too long."""

    start: int
    end: int
    """White space behind it included."""
    tokens: int
    ends_paragraph: bool


def split_document(text: str, source: str, limit: int, overlap: int, count: Count) -> list[Chunk]:
    """`text` in chunks of at most `limit` tokens; the sentences at the end of a chunk, up to `overlap` tokens of them,
    begin the next one. A chunk ends with a paragraph where that leaves it at least half full.

    The tokenizer is asked a few times per chunk, so the work grows with the length of the text and not its square.
    """
    units = list(_units(text, limit, count))
    spans: list[tuple[int, int]] = []
    begin = new = 0  # first unit of the chunk, first one that no chunk has yet
    while new < len(units):
        while begin < new and _size(text, units, begin, new + 1, count) > limit:
            begin += 1  # overlap that leaves no room for anything new is no use
        end = _fill(text, units, begin, new, limit, count)
        spans.append((begin, end))
        begin = new = end
        while begin > spans[-1][0] + 1 and _size(text, units, begin - 1, new, count) <= overlap:
            begin -= 1
    chunks = []
    for number, (first, last) in enumerate(spans, 1):
        start, end = units[first].start, units[last - 1].end
        start, end = start + _blank(text[start:end]), start + len(text[start:end].rstrip())
        chunks.append(Chunk(source, number, len(spans), start, end, text[start:end], count(text[start:end])))
    return chunks


def _size(text: str, units: Sequence[_Unit], begin: int, end: int, count: Count) -> int:
    return count(text[units[begin].start : units[end - 1].end].strip())


def _fill(text: str, units: Sequence[_Unit], begin: int, new: int, limit: int, count: Count) -> int:
    """Where a chunk that starts with unit `begin` ends: behind `new` at least."""
    end, guess = new + 1, sum(unit.tokens for unit in units[begin : new + 1])
    while end < len(units) and guess + units[end].tokens <= limit:
        guess, end = guess + units[end].tokens, end + 1
    while end > new + 1 and _size(text, units, begin, end, count) > limit:
        end -= 1
    while end < len(units) and _size(text, units, begin, end + 1, count) <= limit:
        end += 1
    if end == len(units) or units[end - 1].ends_paragraph:
        return end
    before = next((e for e in range(end - 1, new, -1) if units[e - 1].ends_paragraph), 0)
    return before if before and 2 * _size(text, units, begin, before, count) >= limit else end


def _units(text: str, limit: int, count: Count) -> Iterator[_Unit]:
    cuts = [0, *sorted({match.end() for match in SENTENCE.finditer(text)} - {0, len(text)}), len(text)]
    for start, end in itertools.pairwise(cuts):
        if not text[start:end].strip():
            continue
        paragraph = re.search(r"\n\s*\n", text[start:end]) is not None or not text[end:].strip()
        parts = list(_halves(text, start, end, limit, count))
        for part in parts:
            yield _Unit(*part, ends_paragraph=paragraph and part is parts[-1])


def _halves(text: str, start: int, end: int, limit: int, count: Count) -> Iterator[tuple[int, int, int]]:
    """(start, end, tokens) of the parts of a sentence, which is split near its middle, between words if there are any."""
    tokens = count(text[start:end].strip())
    if tokens <= limit or end - start < 2:
        yield start, end, tokens
        return
    middle = (start + end) // 2
    spaces = [start + match.end() for match in re.finditer(r"\s+", text[start:end].rstrip())]
    cut = min((s for s in spaces if start < s < end), key=lambda s: abs(s - middle), default=middle)
    yield from _halves(text, start, cut, limit, count)
    yield from _halves(text, cut, end, limit, count)


def _blank(text: str) -> int:
    return len(text) - len(text.lstrip())


def sentences(chunk: Chunk, least: int = 4) -> list[str]:
    """Its sentences of at least `least` words, or the whole of it if there is none."""
    found = [" ".join(part.split()) for part in SENTENCE.split(chunk.text)]
    return [s for s in found if len(s.split()) >= least] or [" ".join(chunk.text.split())]


def quotas(chunks: Sequence[Chunk], total: int, most: int = 0) -> list[int]:
    """How many of `total` queries each chunk is due: by its length, by largest remainder, at most `most` (0: any)."""
    size = sum(chunk.tokens for chunk in chunks) or 1
    exact = [total * chunk.tokens / size for chunk in chunks]
    due = [math.floor(x) for x in exact]
    for i in sorted(range(len(chunks)), key=lambda i: due[i] - exact[i])[: total - sum(due)]:
        due[i] += 1
    return [min(n, most) if most else n for n in due]


def words(text: str) -> list[str]:
    """Its words, without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def nearest_chunk(text: str, chunks: Sequence[Chunk]) -> Chunk:
    """The chunk that shares most with `text`, each shared word counted by log(chunks / chunks that have it) plus a
    little; the first of equals."""
    have = [set(words(chunk.text)) for chunk in chunks]
    rarity = Counter(word for found in have for word in found)
    asked = sorted(set(words(text)))
    scores = [sum(1e-3 + math.log(len(chunks) / rarity[w]) for w in asked if w in found) for found in have]
    return chunks[scores.index(max(scores))]
