"""A text in chunks: nothing lost, nothing too long, cut where people would cut."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from ctxdistill.chunks import Chunk, nearest_chunk, quotas, sentences, split_document

TOKENIZER = tiny.tokenizer()


def count(text: str) -> int:
    """One token per byte."""
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def coarse(text: str) -> int:
    """A tokenizer whose counts of parts do not add up: runs of three letters are one token."""
    return -(-len(text.replace(" ", "")) // 3)


def lost(text: str, chunks: list[Chunk]) -> list[int]:
    """Places of characters, white space aside, that no chunk has."""
    covered = {i for chunk in chunks for i in range(chunk.start, chunk.end)}
    return [i for i, c in enumerate(text) if not c.isspace() and i not in covered]


TEXTS = st.text(alphabet=st.sampled_from("ab é。.!?\n\t-€"), max_size=400)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.integers(8, 60), st.integers(0, 20), st.sampled_from([count, coarse]))
def test_nothing_is_lost_and_nothing_is_too_long(text: str, limit: int, overlap: int, counted: object) -> None:
    chunks = split_document(text, "t", limit, overlap, counted)  # type: ignore[arg-type]
    assert lost(text, chunks) == []
    assert [c.number for c in chunks] == list(range(1, len(chunks) + 1))
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end] and chunk.of == len(chunks)
        assert chunk.tokens == counted(chunk.text) <= limit  # type: ignore[operator]
    for a, b in itertools.pairwise(chunks):
        assert a.start < b.start and a.end < b.end  # each has something new
        assert counted(text[b.start : max(a.end, b.start)].strip()) <= overlap + 0  # type: ignore[operator]


def test_a_chunk_ends_with_a_paragraph_where_it_can() -> None:
    paragraphs = ["One two. Three four. Five six.", "Seven eight. Nine ten.", "Eleven. Twelve. Thirteen. Fourteen."]
    chunks = split_document("\n\n".join(paragraphs), "t", 62, 0, count)
    assert [c.text for c in chunks] == ["\n\n".join(paragraphs[:2]), paragraphs[2]]
    assert [c.name for c in chunks] == ["t:1", "t:2"] and chunks[1].title == "t (part 2 of 2)"
    # a paragraph that would leave the chunk nearly empty is no reason to end it
    long = split_document("Hi.\n\n" + " ".join(f"Sentence {i:02d}." for i in range(9)), "t", 62, 0, count)
    assert long[0].text.startswith("Hi.\n\nSentence 00.") and long[0].text.endswith("Sentence 03.")


def test_overlap_is_whole_sentences() -> None:
    text = " ".join(f"Sentence number {i}." for i in range(12))  # 18 bytes each
    chunks = split_document(text, "t", 80, 40, count)
    assert chunks[0].text.endswith("Sentence number 3.") and chunks[1].text.startswith("Sentence number 2.")
    assert split_document(text, "t", 80, 10, count)[1].text.startswith("Sentence number 4.")


def test_long_words_and_long_sentences_are_split_but_kept() -> None:
    text = "x" * 100 + " " + " ".join(["word"] * 40)
    chunks = split_document(text, "t", 32, 0, count)
    assert lost(text, chunks) == [] and max(c.tokens for c in chunks) <= 32
    assert all("wo rd" not in c.text and not c.text.startswith("rd") for c in chunks)


def test_wrapped_lines_are_one_sentence_and_list_items_are_not() -> None:
    (chunk,) = split_document(
        "A line that\ngoes on here.\n- first item of a list\n- second item of a list", "t", 500, 0, count
    )
    assert sentences(chunk) == ["A line that goes on here.", "- first item of a list", "- second item of a list"]


def piece(name: str, text: str, tokens: int = 10) -> Chunk:
    return Chunk(name, 1, 1, 0, len(text), text, tokens)


def test_quotas_add_up_and_follow_the_length() -> None:
    chunks = [piece("a", "", 100), piece("b", "", 50), piece("c", "", 49)]
    assert quotas(chunks, 20) == [10, 5, 5]
    assert quotas(chunks, 20, most=6) == [6, 5, 5]
    for total in (1, 2, 7, 199):
        sizes = random.Random(total).choices(range(1, 99), k=9)
        assert sum(quotas([piece("x", "", n) for n in sizes], total)) == total


@pytest.mark.parametrize(("query", "name"), [("Where is the TOWER?", "b"), ("the salt?", "a"), ("nothing known", "a")])
def test_a_query_finds_its_chunk_by_rare_words(query: str, name: str) -> None:
    chunks = [
        piece("a", "the salt is in the sea"),
        piece("b", "the tower is in the town"),
        piece("c", "the sea, the town"),
    ]
    assert nearest_chunk(query, chunks).source == name
