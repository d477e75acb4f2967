"""Intervals and tests: known values, coverage by simulation, degenerate inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from ctxdistill.stats import (
    Estimate,
    bootstrap_mean,
    closed,
    constant_baseline,
    crossed_closed,
    crossed_difference,
    crossed_mean,
    holm,
    kl_closed,
    macro_f1,
    mcnemar,
    paired_difference,
    paired_p,
    sign_flip,
    t_mean,
)

OPTIONS = {"resamples": 1000, "seed": 0}


def test_estimate_to_dict() -> None:
    assert Estimate(0.5, 0.25, 0.75, 8).to_dict() == {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}


def test_wilson_known_values() -> None:
    # Wilson score interval of 8 of 10: 0.4902 to 0.9433.
    got = bootstrap_mean([1] * 8 + [0] * 2, **OPTIONS)
    assert (got.mean, got.n) == (0.8, 10)
    assert (got.low, got.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0.0, 0.2775), (1.0, 0.7225, 1.0)])
def test_none_and_all_right_keep_an_interval(value: float, low: float, high: float) -> None:
    got = bootstrap_mean([value] * 10, **OPTIONS)
    assert (got.mean, got.low, got.high) == (value, pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_bootstrap_interval_is_that_of_a_normal_mean() -> None:
    x = np.random.default_rng(1).normal(3, 2, 400)
    got = bootstrap_mean(x, resamples=4000, seed=0)
    half = 1.96 * x.std() / math.sqrt(400)
    assert got.mean == pytest.approx(x.mean())
    assert got.low == pytest.approx(x.mean() - half, abs=0.03)
    assert got.high == pytest.approx(x.mean() + half, abs=0.03)


def test_paired_is_narrower_than_unpaired() -> None:
    random = np.random.default_rng(2)
    base = random.normal(0, 10, 100)
    got = paired_difference(base + 1 + random.normal(0, 0.1, 100), base, **OPTIONS)
    assert 0.9 < got.low < got.mean < got.high < 1.1


def test_paired_difference_has_the_sign_of_a_minus_b() -> None:
    got = paired_difference([1, 1, 1, 0], [0, 0, 1, 0], **OPTIONS)
    assert got.mean == 0.5
    assert paired_difference([0.5, 0.2, 0.1], [0.6, 0.9, 0.3], **OPTIONS).high < 0


def test_paired_difference_of_scores_that_always_differ_keeps_an_interval() -> None:
    few, many = (paired_difference([1.0] * n, [0.0] * n, **OPTIONS) for n in (1, 100))
    assert few.low < 0 < few.mean == few.high == 1  # one row proves nothing
    assert 0.9 < many.low < many.mean == many.high == 1


def coverage(one: Callable[[np.random.Generator], Estimate], truth: float, repeats: int = 300) -> float:
    random = np.random.default_rng(7)
    return float(np.mean([(e := one(random)).low <= truth <= e.high for _ in range(repeats)]))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.97])
def test_coverage_of_shares(p: float) -> None:
    assert coverage(lambda r: bootstrap_mean(r.random(60) < p, resamples=300, seed=0), p) >= 0.92


def test_coverage_of_means() -> None:
    share = coverage(lambda r: bootstrap_mean(r.exponential(1.0, 80), resamples=300, seed=0), 1.0)
    assert 0.89 <= share <= 0.99  # a percentile bootstrap of a skewed mean covers a little less than 95 %


@pytest.mark.parametrize("n", [2, 3, 8])
def test_coverage_of_means_of_few_values(n: int) -> None:
    assert 0.92 <= coverage(lambda r: t_mean(r.normal(5.0, 2.0, n)), 5.0, 1000) <= 0.98


def test_t_interval_is_that_of_the_t_test() -> None:
    x = [31.0, 35.5, 29.0, 42.0]
    known = scipy.stats.ttest_1samp(x, 0.0).confidence_interval(0.95)
    got = t_mean(x)
    assert (got.mean, got.n) == (pytest.approx(np.mean(x)), 4)
    assert (got.low, got.high) == (pytest.approx(known.low), pytest.approx(known.high))
    assert t_mean([3.5]) == Estimate(3.5, 3.5, 3.5, 1)
    with pytest.raises(ValueError, match="no rows"):
        t_mean([])


def test_coverage_of_paired_shares() -> None:
    def one(random: np.random.Generator) -> Estimate:
        u = random.random(60)
        return paired_difference(u < 0.7, u < 0.5, resamples=300, seed=0)

    assert coverage(one, 0.2) >= 0.92


def test_coverage_of_closed_gap_and_kl() -> None:
    def gap(random: np.random.Generator) -> Estimate:
        z, gain = random.normal(0, 1, 80), random.normal(2, 1, 80)
        got = closed(z + 0.8 * gain + random.normal(0, 0.5, 80), z, z + gain, resamples=300, seed=0)
        assert isinstance(got, Estimate)
        return got

    def kl(random: np.random.Generator) -> Estimate:
        tokens = random.integers(1, 20, 80)
        base = tokens * random.gamma(4, 0.5, 80)
        got = kl_closed(base * random.uniform(0, 0.1, 80), base, tokens, resamples=300, seed=0)
        assert isinstance(got, Estimate)
        return got

    assert 0.89 <= coverage(gap, 0.8) <= 0.99
    assert 0.89 <= coverage(kl, 0.95) <= 0.99


def test_same_seed_same_interval_and_another_seed_another() -> None:
    x = np.random.default_rng(3).random(50)
    assert bootstrap_mean(x, **OPTIONS) == bootstrap_mean(x, **OPTIONS)
    assert bootstrap_mean(x, **OPTIONS) != bootstrap_mean(x, resamples=1000, seed=1)
    assert kl_closed(x / 9, x, x, **OPTIONS) == kl_closed(x / 9, x, x, **OPTIONS)


def test_many_rows_do_not_need_much_memory() -> None:
    x = np.random.default_rng(4).random(300_000)
    got = bootstrap_mean(x, resamples=100, seed=0)
    assert got.high - got.low == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 300_000), rel=0.3)


# -- ratios -----------------------------------------------------------------------------------------------------------


def test_closed_known_value() -> None:
    zero = np.zeros(40)
    teacher = np.r_[np.ones(30), np.zeros(10)]
    student = np.r_[np.ones(24), np.zeros(16)]
    got = closed(student, zero, teacher, **OPTIONS)
    assert isinstance(got, Estimate)
    assert got.mean == pytest.approx(0.8)
    assert 0.6 < got.low < 0.8 < got.high < 1
    same = closed(teacher, zero, teacher, **OPTIONS)
    assert isinstance(same, Estimate)
    assert (same.mean, same.low, same.high) == (1, 1, 1)


def test_closed_is_undefined_without_a_gain() -> None:
    random = np.random.default_rng(5)
    zero, teacher, student = (random.integers(0, 2, 50) for _ in range(3))
    got = closed(student, zero, teacher, **OPTIONS)
    assert isinstance(got, str)
    assert "not different from 0" in got
    assert "50 rows" in got
    for scores in ([1.0], [0.0], [1.0]), ([0.5], [0.1], [0.9]):
        assert closed(*scores, **OPTIONS) == "one row tells nothing about the gap"
    assert isinstance(closed([0.5] * 9, [0.5] * 9, [0.5] * 9, **OPTIONS), str)


def test_closed_is_undefined_where_the_context_makes_it_worse() -> None:
    zero, teacher = np.r_[np.ones(36), np.zeros(4)], np.r_[np.ones(16), np.zeros(24)]
    said = "the context makes it worse: the teacher's gain over zero-shot is -0.500 [-0."
    tables = [np.repeat([scores], 3, axis=0) for scores in (teacher, zero, teacher)]
    for got, over in (
        (closed(teacher, zero, teacher, **OPTIONS), "40 rows"),  # all the harm is kept
        (crossed_closed(*tables, **OPTIONS), "40 rows and 3 demonstration sets"),
    ):
        assert isinstance(got, str) and got.startswith(said) and got.endswith(over)


def test_kl_closed_weighs_tokens() -> None:
    # Row 1: one token, nothing closed; row 2: 99 tokens, all closed.
    got = kl_closed([1.0, 0.0], [1.0, 99.0], [1, 99], **OPTIONS)
    assert got is not None
    assert got.mean == pytest.approx(0.99)
    assert got.n == 2
    worse = kl_closed([2.0, 2.0], [1.0, 1.0], [3, 3], **OPTIONS)
    assert worse is not None
    assert worse.mean == -1


def test_kl_closed_is_none_when_the_base_is_the_teacher() -> None:
    assert kl_closed([0.0, 0.0], [0.0, 0.0], [5, 5], **OPTIONS) is None
    assert kl_closed([1e-9, 0.0], [2e-7, 1e-7], [5, 5], **OPTIONS) is None  # rounding of fp32


def test_ratio_survives_resamples_without_a_denominator() -> None:
    got = kl_closed([0.1, 0.0], [1.0, 0.0], [1, 1], **OPTIONS)  # a quarter of the resamples has a base of 0
    assert got is not None
    assert (got.mean, got.low, got.high) == pytest.approx((0.9, 0.9, 0.9))


# -- several demonstration sets ---------------------------------------------------------------------------------------


def answers(random: np.random.Generator, sets: int, rows: int, *, by_set: float, by_row: float = 1.0) -> np.ndarray:
    """0/1 scores [S, N] that are 1 half of the time; `by_set`, `by_row`: how much sets and rows differ (logits)."""
    effects = random.normal(0, by_set, (sets, 1)) + random.normal(0, by_row, (1, rows))
    return (effects + random.logistic(0, 1, (sets, rows)) > 0).astype(float)


@pytest.mark.parametrize(("sets", "by_set", "least"), [(3, 0.0, 0.94), (3, 1.0, 0.89), (4, 0.4, 0.91), (8, 1.0, 0.91)])
def test_coverage_over_sets_and_rows(sets: int, by_set: float, least: float) -> None:
    def one(random: np.random.Generator) -> Estimate:
        return crossed_mean(answers(random, sets, 100, by_set=by_set), resamples=400, seed=0)

    assert coverage(one, 0.5) >= least  # a crossed bootstrap that is not widened covers 77 % with 3 sets that differ


def test_coverage_of_a_difference_over_sets_and_rows() -> None:
    def one(random: np.random.Generator) -> Estimate:
        a, b = (answers(random, 3, 100, by_set=0.5) for _ in range(2))
        return crossed_difference(a, b, resamples=400, seed=0)

    assert coverage(one, 0.0) >= 0.91


def test_crossed_interval_is_that_of_a_slow_bootstrap() -> None:
    x = answers(np.random.default_rng(1), 30, 60, by_set=1.5)  # many sets: nothing to widen but a few per cent
    random, means = np.random.default_rng(2), []
    for _ in range(2000):
        sets, rows = random.integers(0, 30, 30), random.integers(0, 60, 60)
        means.append(x[np.ix_(sets, rows)].mean())
    got = crossed_mean(x, resamples=2000, seed=0)
    low, high = np.quantile(means, [0.025, 0.975])
    assert got.mean == x.mean()
    assert (got.low, got.high) == (pytest.approx(low, abs=0.015), pytest.approx(high, abs=0.015))


def test_sets_that_differ_widen_the_interval_and_fewer_than_three_do_not_count() -> None:
    rows = np.random.default_rng(3).random(200)
    apart = np.stack([rows < level for level in (0.2, 0.5, 0.8)])
    alike = np.stack([rows < 0.5] * 3)
    widths = [(e := crossed_mean(x, resamples=1000, seed=0)).high - e.low for x in (alike, apart, apart[[0, 2]])]
    assert widths[1] > 4 * widths[0]
    assert widths[2] == pytest.approx(widths[0], rel=0.5)  # over rows only
    one = crossed_mean(alike[:1], **OPTIONS)
    assert one == bootstrap_mean(alike[0], **OPTIONS)


def test_crossed_intervals_keep_a_width_and_stay_where_shares_are() -> None:
    ones = crossed_mean(np.ones((3, 20)), **OPTIONS)
    assert (ones.mean, ones.high, ones.n) == (1, 1, 20)
    assert 0.7 < ones.low < 0.95
    same = crossed_difference(np.ones((3, 20)), np.ones((3, 20)), **OPTIONS)
    assert -0.2 < same.low < 0 == same.mean < same.high < 0.2
    apart = crossed_difference(np.ones((3, 20)), np.zeros((3, 20)), **OPTIONS)
    assert 0.7 < apart.low < apart.mean == apart.high == 1
    halves = crossed_mean([[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2, **OPTIONS)
    assert halves.low < 0.5 < halves.high


def test_an_arm_without_demonstrations_is_paired_with_every_set() -> None:
    random = np.random.default_rng(4)
    many, one = answers(random, 4, 80, by_set=0.1), answers(random, 1, 80, by_set=0)
    repeated = crossed_difference(many, np.repeat(one, 4, axis=0), **OPTIONS)
    assert crossed_difference(many, one, **OPTIONS) == repeated
    backwards = crossed_difference(one, many, resamples=4000, seed=0)
    assert (backwards.mean, backwards.low) == (-repeated.mean, pytest.approx(-repeated.high, abs=0.03))


def test_crossed_closed() -> None:
    zero = np.zeros((1, 40))
    teacher = np.repeat([np.r_[np.ones(30), np.zeros(10)]], 3, axis=0)
    student = np.repeat([np.r_[np.ones(24), np.zeros(16)]], 3, axis=0)
    got = crossed_closed(student, zero, teacher, **OPTIONS)
    assert isinstance(got, Estimate)
    assert got.mean == pytest.approx(0.8)
    assert 0.6 < got.low < 0.8 < got.high < 1
    assert "3 demonstration sets" in str(crossed_closed(student, zero, np.repeat(zero, 3, axis=0), **OPTIONS))
    assert crossed_closed(student[:1], zero, teacher[:1], **OPTIONS) == closed(
        student[0], zero[0], teacher[0], **OPTIONS
    )


def test_sign_flip_counts_all_flips() -> None:
    random = np.random.default_rng(5)
    for sets, scale in ((1, 1), (3, 1), (4, 1), (2, 8)):
        a, b = (random.integers(0, scale + 1, (sets, 10)) / scale for _ in range(2))
        d = (a - b).sum(0)
        slow = np.mean([abs(np.dot(s, d)) >= abs(d.sum()) - 1e-9 for s in itertools.product((-1, 1), repeat=10)])
        assert sign_flip(a - b) == pytest.approx(slow)
    a, b = random.random((1, 200)) < 0.5, random.random((1, 200)) < 0.6
    assert sign_flip(a.astype(float) - b) == pytest.approx(mcnemar(a[0], b[0]))
    a, b = random.integers(0, 97, (2, 10)) / 96, random.integers(0, 2, (2, 10))  # a mean over 96 contexts
    d = (a - b).sum(0)
    slow = np.mean([abs(np.dot(s, d)) >= abs(d.sum()) - 1e-9 for s in itertools.product((-1, 1), repeat=10)])
    assert sign_flip(a - b) == pytest.approx(slow)
    assert sign_flip(np.zeros((3, 5))) == 1.0
    assert sign_flip(np.ones((3, 60))) == pytest.approx(2 / 2**60)  # no resolution that a Monte Carlo test would have


def test_sign_flip_draws_where_the_flips_are_too_many_to_count() -> None:
    random = np.random.default_rng(7)
    a, b = random.random((2, 12)), random.random((2, 12))
    d = (a - b).sum(0)
    slow = np.mean([abs(np.dot(s, d)) >= abs(d.sum()) for s in itertools.product((-1, 1), repeat=12)])
    assert sign_flip(a - b) == pytest.approx(slow)  # few rows: all of them, one by one
    a, b = random.random((2, 4, 3000))
    assert sign_flip(a) < 1e-3 < 0.01 < sign_flip(a - b) == sign_flip(a - b)


def test_sign_flip_is_right_five_times_in_a_hundred_when_arms_are_equal() -> None:
    random = np.random.default_rng(6)
    rejected = np.mean([
        sign_flip(answers(random, 3, 60, by_set=0.0) - answers(random, 3, 60, by_set=0.0)) < 0.05 for _ in range(400)
    ])  # fmt: skip
    assert 0.02 <= rejected <= 0.08


def test_holm_known_values() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.2]) == [0.2]
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, math.nan])


def test_tables_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"same sets and rows.*\(2, 3\).*\(3, 3\)"):
        crossed_difference(np.zeros((2, 3)), np.zeros((3, 3)), **OPTIONS)
    with pytest.raises(ValueError, match="between 0 and 1"):
        crossed_mean([[0.0, 2.0]], **OPTIONS)
    with pytest.raises(ValueError, match="no rows"):
        crossed_mean(np.zeros((2, 0)), **OPTIONS)
    with pytest.raises(ValueError, match="no rows"):
        sign_flip(np.zeros((2, 0)))


# -- tests and baselines ----------------------------------------------------------------------------------------------


def test_mcnemar_known_values() -> None:
    # 8 rows where only a is right, 1 where only b is: 2 * (C(9,0) + C(9,1)) / 2^9.
    a, b = [1] * 8 + [0] + [1] * 5, [0] * 8 + [1] + [1] * 5
    assert mcnemar(a, b) == pytest.approx(20 / 512)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0
    assert mcnemar([True] * 20, [False] * 20) == pytest.approx(2 / 2**20)
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5, 1], [0, 1])


def test_macro_f1() -> None:
    assert macro_f1(["a", "b"], ["a", "b"]) == 1.0
    # a: precision 1/2, recall 1, F1 2/3; b: recall 0.
    assert macro_f1(["a", "b"], ["a", "a"]) == pytest.approx(1 / 3)
    # An answer outside of the classes is wrong, and no class of its own.
    assert macro_f1(["a", "a", "b", "b"], ["a", "a", "b", "nonsense"]) == pytest.approx((1 + 2 / 3) / 2)
    assert macro_f1(np.array(["a", "b"]), np.array(["b", "a"])) == 0.0


def test_constant_baseline() -> None:
    assert constant_baseline(["b", "a", "b"]) == ("b", pytest.approx(2 / 3))
    assert constant_baseline(["b", "a"]) == ("a", 0.5)


# -- degenerate inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_mean([], **OPTIONS),
        lambda: paired_difference([], [], **OPTIONS),
        lambda: closed([], [], [], **OPTIONS),
        lambda: kl_closed([], [], [], **OPTIONS),
        lambda: mcnemar([], []),
    ],
)
def test_no_rows(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="no rows"):
        call()


def test_no_answers() -> None:
    with pytest.raises(ValueError, match="no answers"):
        constant_baseline([])
    with pytest.raises(ValueError, match="at least one"):
        macro_f1([], [])


def test_one_row() -> None:
    assert bootstrap_mean([3.5], **OPTIONS) == Estimate(3.5, 3.5, 3.5, 1)
    one = bootstrap_mean([1.0], **OPTIONS)
    assert (one.mean, one.high) == (1.0, 1.0)
    assert one.low < 0.25


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"one value per row.*\(2,\).*\(3,\)"):
        paired_difference([1, 2], [1, 2, 3], **OPTIONS)
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_mean([1.0, math.nan], **OPTIONS)
    with pytest.raises(ValueError, match="found 1 and 2"):
        macro_f1(["a", "b"], ["a"])


def test_paired_p_counts_sign_flips() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.8, 1, 9), rng.normal(0, 1, 9)
    d = a - b
    flips = np.array(list(itertools.product([1, -1], repeat=9)))
    by_hand = (np.abs((flips * d).sum(1)) >= abs(d.sum()) - 1e-12).mean()
    assert paired_p(a, b, resamples=1000, seed=0) == pytest.approx(by_hand)
    sampled = paired_p(a, b, resamples=511, seed=0)  # 2^9 is more than that
    assert sampled == pytest.approx(by_hand, abs=0.06) and sampled != by_hand
    assert paired_p(a, a, resamples=1000, seed=0) == 1.0
    right, wrong = [1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1, 1]
    assert paired_p(right, wrong, resamples=1000, seed=0) == pytest.approx(mcnemar(right, wrong))
    assert paired_p(right * 99, [0] * 792, resamples=1000, seed=0) == pytest.approx(1 / 1001)
