"""Draws: demonstrations, queries and evaluation rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxdistill.draws import Draw, draw, held_out, text_key, without
from ctxdistill.errors import DataError, RecipeError
from ctxdistill.rows import Row

INDICES = Path(__file__).parents[2] / "shared" / "paper" / "run_indices.json"


def make(*labels: str) -> list[Row]:
    return [Row(f"{i:04}", {"text": f"text {i}", "label": x, "index": i}, f"f:{i}") for i, x in enumerate(labels)]


def ids(rows: Sequence[Row]) -> list[str]:
    return [row.id for row in rows]


def spread(rows: Sequence[Row]) -> Counter[str]:
    return Counter(row.fields["label"] for row in rows)


ROWS = make(*"aabcabcabb" * 20)  # 80 a, 80 b, 40 c


def test_balanced_and_shuffled() -> None:
    assert spread(draw(ROWS, "abc", n=12, queries=5, seed=0).contexts[0]) == {"a": 4, "b": 4, "c": 4}
    rests = [spread(draw(ROWS, "abc", n=13, queries=5, seed=s).contexts[0]).most_common(1)[0] for s in range(30)]
    assert {count for _, count in rests} == {5} and {label for label, _ in rests} == set("abc")
    few = [spread(draw(ROWS, "abc", n=2, queries=5, seed=s).contexts[0]) for s in range(30)]
    assert all(len(one) == 2 for one in few) and {label for one in few for label in one} == set("abc")
    labels = [
        "".join(r.fields["label"] for r in draw(ROWS, "ab", n=8, queries=5, seed=s).contexts[0]) for s in range(9)
    ]
    assert len(set(labels)) > 5  # neither by label nor in the order of the data set


def test_the_same_again_and_another_with_another_seed() -> None:
    def take(seed: int) -> Draw:
        return draw(ROWS, "abc", n=6, queries=20, seed=seed, contexts=3)

    assert take(1) == take(1)
    assert ids(take(1).queries) != ids(take(2).queries)
    assert ids(take(1).contexts[0]) != ids(take(2).contexts[0])


def test_everything_of_a_seed_shares_its_rows() -> None:
    large = draw(ROWS, "abc", n=12, queries=40, seed=3, contexts=4)
    for n, queries, contexts in ((3, 40, 1), (12, 8, 1), (2, 16, 7)):
        other = draw(ROWS, "abc", n=n, queries=queries, seed=3, contexts=contexts)
        assert ids(other.queries) == ids(large.queries)[:queries]
        assert set(ids(other.contexts[0])) <= set(ids(large.contexts[0]))
    one = draw(ROWS, "abc", n=12, queries=40, seed=3, contexts=1)
    assert one.contexts[0] == large.contexts[0]


def test_contexts_share_no_row_while_there_are_enough() -> None:
    found = draw(ROWS, "abc", n=12, queries=40, seed=0, contexts=5).contexts
    assert len({row.id for context in found for row in context}) == 60


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abc"), min_size=12, max_size=60),
    n=st.integers(0, 9),
    queries=st.integers(0, 20),
    contexts=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_never_an_overlap(labels: list[str], n: int, queries: int, contexts: int, seed: int) -> None:
    try:
        found = draw(make(*labels), "abc", n=n, queries=queries, seed=seed, contexts=contexts)
    except DataError:  # too few rows, which is right
        return
    asked = set(ids(found.queries))
    assert (len(asked), len(found.contexts)) == (queries, contexts)
    for context in found.contexts:
        assert len(set(ids(context))) == n and not asked & set(ids(context))
        assert max(spread(context).values(), default=0) - min((spread(context)[x] for x in "abc"), default=0) <= 1


def test_contexts_beyond_the_rows_draw_again() -> None:
    rows = make(*"aaaabbbb")
    found = draw(rows, "ab", n=4, queries=0, seed=0, contexts=20).contexts
    assert all(spread(context) == {"a": 2, "b": 2} and len(set(ids(context))) == 4 for context in found)
    assert len({frozenset(ids(context)) for context in found}) > 6  # not always the same halves


@pytest.mark.parametrize(
    ("n", "queries", "message"),
    [(8, 0, "not enough rows of label b"), (2, 12, "not enough rows"), (2, 11, "not enough rows of label")],
)
def test_too_few_rows(n: int, queries: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        draw(make(*"aaaaaaaabbb"), "ab", n=n, queries=queries, seed=0)


def test_paper_sampling_is_numpy_s_own() -> None:
    rows = make(*"abbabaabbabbbaab" * 5)
    np.random.seed(99)
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    found = draw(rows, "ab", n=6, queries=10, seed=7, mode="paper")
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr]
    np.random.seed(7)
    chosen = np.concatenate(
        [np.random.choice([i for i, r in enumerate(rows) if r.fields["label"] == x], 3, replace=False) for x in "ab"]
    )
    asked = np.random.choice([i for i in range(80) if i not in chosen], 10, replace=False)
    assert [r.fields["index"] for r in found.contexts[0]] == sorted(chosen)
    assert [r.fields["index"] for r in found.queries] == list(asked)
    assert spread(found.contexts[0]) == {"a": 3, "b": 3}


@pytest.mark.skipif(not INDICES.is_file(), reason="the indices of the paper's runs are not there")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [2, 16, 32])
def test_paper_sampling_draws_the_paper_s_queries(seed: int, n: int) -> None:
    """The labels of those rows are not known here, but where the queries are among the rows that are no demonstrations
    only depends on how many rows have each label; 642 to 645 of 1,000 in the first class give all of the paper's runs."""
    from ctxdistill.tasks.qqp import subsample

    run = json.loads(INDICES.read_text())[f"qqp|seed{seed}|n{n}"]
    theirs = [i for i in subsample(363_846) if i not in run["context_indices"]]
    rows = make(*("a" * 643 + "b" * 357))
    found = draw(rows, "ab", n=n, queries=32, seed=seed, mode="paper")
    ours = [row for row in rows if row not in found.contexts[0]]
    assert [theirs.index(i) for i in run["query_indices"]] == [ours.index(row) for row in found.queries]


@pytest.mark.parametrize("wrong", [{"contexts": 2}, {"labels": "abc"}, {"n": 3}])
def test_paper_sampling_refuses_what_it_does_not_know(wrong: dict[str, object]) -> None:
    given = {"labels": "ab", "n": 4, "queries": 4, "seed": 0, "mode": "paper", **wrong}
    with pytest.raises(RecipeError, match="paper's sampling"):
        draw(ROWS, **given)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="rows of label a"):
        draw(make(*"abbb"), "ab", n=4, queries=0, seed=0, mode="paper")
    with pytest.raises(DataError, match="beside the demonstrations"):
        draw(make(*"abbb"), "ab", n=2, queries=3, seed=0, mode="paper")


def test_held_out() -> None:
    clean = held_out(ROWS, limit=30, seed=1)
    assert len(clean) == 30 and ids(clean) == sorted(ids(clean)) and clean != ROWS[:30]
    assert clean == held_out(ROWS, limit=30, seed=1) != held_out(ROWS, limit=30, seed=2)
    assert held_out(ROWS, limit=0, seed=1) == ROWS == held_out(ROWS, limit=1000, seed=1)
    assert held_out(ROWS, limit=30, seed=1, mode="paper-first") == ROWS[:30]
    shuffled = held_out(ROWS, limit=30, seed=1, mode="paper-shuffled")
    assert [r.fields["index"] for r in shuffled] == np.random.default_rng(2).permutation(len(ROWS))[:30].tolist()


def test_always_yes_on_the_paper_s_hans_samples() -> None:
    """HANS has 5,000 rows of non-entailment, then 5,000 of entailment (paper: .47, .54, .49, .57)."""
    rows = make(*("n" * 5000 + "e" * 5000))
    shares = [spread(held_out(rows, limit=100, seed=s, mode="paper-shuffled"))["e"] for s in range(4)]
    assert shares == [47, 54, 49, 57]


def test_without() -> None:
    def row(i: int, **fields: str) -> Row:
        return Row(str(i), {**fields, "label": "a", "index": i}, "f")

    other = row(0, text="Known  text")
    rows = [row(1, text="new"), row(2, text="known TEXT"), row(3, text="NEW"), row(4, text="newer")]
    assert without(rows, [other]) == ([rows[0], rows[3]], 2)
    assert without(rows, []) == ([rows[0], rows[1], rows[3]], 1)
    pairs = [row(5, text1="a b", text2="c"), row(6, text1="a", text2="b c"), row(7, text1="c", text2="a b")]
    assert without(pairs, []) == (pairs, 0)  # the border between the texts counts, and their order
    assert text_key(pairs[0]) == ("a b", "c")
