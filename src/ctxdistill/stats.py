"""Confidence intervals and paired tests on arrays of scores.

In: one number per row, for each arm in the same order. Out: estimates with 95 % intervals, and p-values. Invariants:
rows are what is resampled, and all arms of one estimate see the same resamples; the same seed gives the same interval;
scores that are all 0 or 1 never get an interval of width zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.metrics import f1_score

Array = NDArray[np.float64]

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
RESOLUTION = 1e-6
"""A KL per token below this, in nats, is rounding of fp32 logits."""


@dataclass(frozen=True)
class Estimate:
    """A mean (or another statistic), its 95 % interval and the number of rows behind it."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap_mean(values: ArrayLike, *, resamples: int, seed: int) -> Estimate:
    """Mean with a percentile bootstrap interval over rows, or, for values that are all 0 or 1, with a Wilson score
    interval, which keeps a width at 0 % and 100 %. One value that is not 0 or 1 gets the interval of width zero.

    Raises: `ValueError` for no values and for values that are not finite.
    """
    (x,) = _columns(values)
    if _binary(x):
        low, high = binomtest(int(x.sum()), len(x)).proportion_ci(method="wilson")
        return Estimate(float(x.mean()), float(low), float(high), len(x))
    return _estimate(float(x.mean()), _resampled_means([x], resamples, seed)[:, 0], len(x))


def paired_difference(a: ArrayLike, b: ArrayLike, *, resamples: int, seed: int) -> Estimate:
    """Mean of a - b over rows, paired: percentile bootstrap, or, where both are all 0 or 1, the Bonett-Price interval
    (Wald's on the discordant shares with one row added to each), which keeps a width where all rows agree.

    Raises: `ValueError` for no rows, for lengths that differ and for values that are not finite.
    """
    x, y = _columns(a, b)
    n, mean = len(x), float((x - y).mean())
    if not (_binary(x) and _binary(y)):
        return _estimate(mean, _resampled_means([x - y], resamples, seed)[:, 0], n)
    up, down = (float(((x - y) == sign).sum() + 1) / (n + 2) for sign in (1, -1))
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Estimate(mean, max(-1.0, min(mean, up - down - half)), min(1.0, max(mean, up - down + half)), n)


def closed(
    student: ArrayLike, zero_shot: ArrayLike, teacher: ArrayLike, *, resamples: int, seed: int
) -> Estimate | str:
    """(student - zero_shot) / (teacher - zero_shot) of the means, with a paired bootstrap interval over rows.

    Returns: the estimate, or the reason why there is none: the interval of the teacher's gain contains 0, so that the
    ratio has no meaning.

    Raises: as `paired_difference`.
    """
    s, z, t = _columns(student, zero_shot, teacher)
    if len(s) < 2:
        return "one row tells nothing about the gap"
    gain = paired_difference(t, z, resamples=resamples, seed=seed)
    if gain.low <= 0 <= gain.high:
        return (
            f"the teacher's gain over zero-shot is not different from 0: {gain.mean:+.3f} "
            f"[{gain.low:+.3f}, {gain.high:+.3f}] on {gain.n} rows"
        )
    draws = _resampled_means([s - z, t - z], resamples, seed)  # [resamples, 2]
    return _estimate(float((s - z).mean() / (t - z).mean()), _ratios(draws), len(s))


def kl_closed(
    student_kl_sums: ArrayLike, base_kl_sums: ArrayLike, tokens: ArrayLike, *, resamples: int, seed: int
) -> Estimate | None:
    """1 - KL of the student / KL of the base model, both per token, with a paired bootstrap interval over rows.

    Args:
        student_kl_sums, base_kl_sums: sum of the KL to the teacher over each row's tokens, in nats.
        tokens: number of these tokens.

    Returns: the estimate (1: the student is the teacher; 0: no better than the base model; below 0: worse), or None
    when the base model already is the teacher, up to rounding.

    Raises: as `paired_difference`.
    """
    student, base, count = _columns(student_kl_sums, base_kl_sums, tokens)
    if base.sum() <= RESOLUTION * count.sum():
        return None
    # Both per-token means divide by the same number of tokens, which cancels.
    draws = _resampled_means([student, base], resamples, seed)  # [resamples, 2]
    return _estimate(float(1 - student.sum() / base.sum()), 1 - _ratios(draws), len(base))


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Exact two-sided p-value of McNemar's test that two arms are right equally often, on 0/1 scores of the same rows.

    Raises: `ValueError` for values other than 0 and 1, for no rows and for lengths that differ.
    """
    x, y = _columns(a, b)
    if not (_binary(x) and _binary(y)):
        raise ValueError("McNemar's test needs scores that are 0 or 1")
    only_a, only_b = int((x > y).sum()), int((x < y).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def macro_f1(answers: Sequence[str] | NDArray[np.str_], predictions: Sequence[str] | NDArray[np.str_]) -> float:
    """F1 averaged over the classes that occur among the answers; a prediction outside of these is wrong, not a class.

    Raises: `ValueError` for no answers and for lengths that differ.
    """
    gold, said = [str(a) for a in answers], [str(p) for p in predictions]
    if not gold or len(gold) != len(said):
        raise ValueError(f"expected as many predictions as answers and at least one, found {len(said)} and {len(gold)}")
    return float(f1_score(gold, said, labels=sorted(set(gold)), average="macro", zero_division=0.0))


def constant_baseline(answers: Sequence[str]) -> tuple[str, float]:
    """The answer that is right most often when it is always given, and how often. Ties go to the first in the alphabet.

    Raises: `ValueError` for no answers.
    """
    if not len(answers):
        raise ValueError("no answers")
    answer, count = min(Counter(map(str, answers)).items(), key=lambda item: (-item[1], item[0]))
    return answer, count / len(answers)


def _columns(*columns: ArrayLike) -> list[Array]:
    """As float arrays [N]; raises ValueError unless they are finite, of one length and not empty."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if any(a.ndim != 1 for a in arrays) or len({len(a) for a in arrays}) != 1:
        raise ValueError(f"expected one value per row in each column, found shapes {[a.shape for a in arrays]}")
    if not len(arrays[0]):
        raise ValueError("no rows: a mean of nothing has no value")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("values that are not finite")
    return arrays


def _binary(x: Array) -> bool:
    return bool(np.isin(x, (0.0, 1.0)).all())


def _resampled_means(columns: Sequence[Array], resamples: int, seed: int) -> Array:
    """Means of C columns [N] over the same rows drawn with replacement, [resamples, C]."""
    table = np.stack(columns)  # [C, N]
    n, random = table.shape[1], np.random.default_rng(seed)
    block = max(1, 2**22 // n)  # bounds the memory; fixed by n alone, so that it does not change the result
    parts = []
    for start in range(0, resamples, block):
        draws = random.integers(0, n, (min(block, resamples - start), n))
        parts.append(table[:, draws].mean(-1).T)
    return np.concatenate(parts)


def _ratios(draws: Array) -> Array:
    """First column over second, without the draws where the second is 0 and there is no ratio."""
    kept = draws[draws[:, 1] != 0]
    return np.asarray(kept[:, 0] / kept[:, 1])


def _estimate(mean: float, draws: Array, n: int) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(mean, float(low), float(high), n)
