"""Confidence intervals and paired tests on arrays of scores.

In: one number per row, for each arm in the same order, or a table of S demonstration sets x N rows of them. Out:
estimates with 95 % intervals, and p-values. Invariants: rows (and demonstration sets) are what is resampled, and all
arms of one estimate see the same resamples; the same seed gives the same interval; scores that are all 0 or 1 never get
an interval of width zero.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
MIN_SETS = 3
"""With fewer demonstration sets than this, an interval is over rows only: two sets do not show how much sets differ."""
REACH = 2**22
"""Largest sum of differences, in steps, whose flips are counted: a table of 64 MB."""
FLIPS = 20_000
"""Flips that are drawn where they are not counted."""
SEED = 0
"""Of the resampling, in all runs and studies: the same rows have the same interval everywhere."""
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
        from scipy.stats import binomtest  # SciPy takes half a second to load, scikit-learn another

        low, high = binomtest(int(x.sum()), len(x)).proportion_ci(method="wilson")
        return Estimate(float(x.mean()), float(low), float(high), len(x))
    return _estimate(float(x.mean()), _resampled_means([x], resamples, seed)[:, 0], len(x))


def t_mean(values: ArrayLike) -> Estimate:
    """Mean with Student's t interval, which holds for a few values, too, where these are about normal: times, or paired
    differences of these. (A bootstrap of two values is their minimum and maximum.) One value gets the interval of width zero.

    Raises: as `bootstrap_mean`.
    """
    (x,) = _columns(values)
    mean, n = float(x.mean()), len(x)
    if n == 1:
        return Estimate(mean, mean, mean, 1)
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * float(x.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


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

    Returns: the estimate, or the reason why there is none: the interval of the teacher's gain reaches down to 0 or
    below, so that the ratio has no meaning or is one of harms.

    Raises: as `paired_difference`.
    """
    s, z, t = _columns(student, zero_shot, teacher)
    if len(s) < 2:
        return "one row tells nothing about the gap"
    gain = paired_difference(t, z, resamples=resamples, seed=seed)
    if gain.low <= 0:
        return _no_gain(gain, 1)
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
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_p(a: ArrayLike, b: ArrayLike, *, resamples: int, seed: int) -> float:
    """Two-sided p-value of the sign-flip test that a - b is as likely to have the other sign on each row.

    Of `resamples` random flips (and the one that was observed), the share whose mean is at least as far from 0. All 2^N
    flips are counted where there are no more than `resamples` of them. For scores of 0 and 1, `mcnemar` is exact.

    Raises: as `paired_difference`.
    """
    x, y = _columns(a, b)
    difference = x - y  # [N]
    n, random = len(difference), np.random.default_rng(seed)
    least = abs(difference.sum()) * (1 - 1e-12)  # a flip that gives the same sum in another order counts
    exact = n < 63 and 2**n <= resamples
    hits, block = 0, max(1, 2**22 // n)
    total = 2**n if exact else resamples
    for start in range(0, total, block):
        size = min(block, total - start)
        if exact:
            bits = (np.arange(start, start + size)[:, None] >> np.arange(n)) & 1  # [size, N]
        else:
            bits = random.integers(0, 2, (size, n), dtype=np.int8)
        hits += int((np.abs((1.0 - 2.0 * bits) @ difference) >= least).sum())
    return hits / total if exact else (hits + 1) / (total + 1)


# ---- several demonstration sets on the same rows


def crossed_mean(values: ArrayLike, *, resamples: int, seed: int) -> Estimate:
    """Mean of scores 0 to 1, [S, N], of S demonstration sets on the same N rows, with an interval over sets and rows.

    Sets and rows are drawn with replacement, independently of each other (crossed or "pigeonhole" bootstrap, Owen 2007).
    With few sets these draws are too narrow, since S values show less spread than there is and their quantiles are
    those of a normal and not of a t distribution; so the sets' deviations are widened by sqrt(S / (S - 1)) t / z
    (Hesterberg 2015), as far as they exceed what noise alone would give. Simulated coverage with 3 sets: 93 to 99 %,
    against 77 % without this. With fewer than `MIN_SETS` sets, the interval is over rows only.

    Two rows of ones and two of zeros are added for the interval (Agresti-Coull), so that it keeps a width; one set is
    left to `bootstrap_mean`. `n` is the number of rows.

    Raises: `ValueError` for values outside of 0 to 1, for no rows and for shapes that differ.
    """
    (x,) = _tables(values)  # [S, N]
    if len(x) == 1:
        return bootstrap_mean(x[0], resamples=resamples, seed=seed)
    extra = np.repeat([[1.0, 1.0, 0.0, 0.0]], len(x), axis=0)
    draws = _crossed_draws([np.hstack([x, extra])], resamples, seed)[:, 0]
    return _clipped(_estimate(float(x.mean()), draws, x.shape[1]), 0.0)


def crossed_difference(a: ArrayLike, b: ArrayLike, *, resamples: int, seed: int) -> Estimate:
    """Mean of a - b, scores [S, N] or [1, N] (an arm that has no demonstrations), paired by set and row.

    The interval is that of `crossed_mean`, on the differences, with one row of +1 and one of -1 added (Bonett-Price);
    one set is left to `paired_difference`.

    Raises: as `crossed_mean`.
    """
    x, y = _tables(a, b)
    if len(x) == 1:
        return paired_difference(x[0], y[0], resamples=resamples, seed=seed)
    extra = np.repeat([[1.0, -1.0]], len(x), axis=0)
    draws = _crossed_draws([np.hstack([x - y, extra])], resamples, seed)[:, 0]
    return _clipped(_estimate(float((x - y).mean()), draws, x.shape[1]), -1.0)


def crossed_closed(
    student: ArrayLike, zero_shot: ArrayLike, teacher: ArrayLike, *, resamples: int, seed: int
) -> Estimate | str:
    """`closed` over sets and rows: arrays [S, N] or [1, N].

    Returns: the estimate, or the reason why there is none, as `closed`. Raises: as `crossed_mean`.
    """
    s, z, teach = _tables(student, zero_shot, teacher)
    if len(s) == 1:
        return closed(s[0], z[0], teach[0], resamples=resamples, seed=seed)
    gain = crossed_difference(teach, z, resamples=resamples, seed=seed)
    if gain.low <= 0:
        return _no_gain(gain, len(s))
    draws = _crossed_draws([s - z, teach - z], resamples, seed)  # [resamples, 2]
    return _estimate(float((s - z).mean() / (teach - z).mean()), _ratios(draws), s.shape[1])


def sign_flip(differences: ArrayLike) -> float:
    """Two-sided p-value of the sign-flip test on rows, for differences [S, N] of scores.

    If two arms are equally good on a row, its summed difference over the sets is as likely to have the other sign; all
    2^N flips are counted, by convolution, without drawing any. With one set of 0/1 scores this is `mcnemar`. The p-value
    speaks of rows like these, under these demonstration sets: whether it holds for others is what `crossed_difference`
    shows.

    Scores are 0, 1 or means of these over several contexts, whose sums are whole multiples of a small step. Where they
    are not, or the table of all sums would be longer than 2 `REACH`, the flips are drawn, as in `paired_p`.

    Raises: `ValueError` for no rows and for values that are not finite.
    """
    from scipy.signal import convolve
    from scipy.stats import binom

    summed = _finite_table(differences).sum(0)  # [N]
    steps = _steps(summed)
    if steps is None:
        return paired_p(summed, np.zeros_like(summed), resamples=FLIPS, seed=0)
    parts = deque([np.ones(1)])  # the chances of each total of some rows, from -reach to +reach
    for size, count in sorted(Counter(np.abs(steps[steps != 0]).tolist()).items()):
        flips = np.zeros(2 * size * count + 1)  # totals -size * count, ... in steps of 2 * size
        flips[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        parts.append(flips)
    while len(parts) > 1:  # pairs of about one length; long ones by FFT, with an error of about 1e-14
        parts.append(convolve(parts.popleft(), parts.popleft()))
    (chance,) = parts
    reach, total = len(chance) // 2, abs(int(steps.sum()))
    return float(np.clip(2 * chance[reach + total :].sum(), 0.0, 1.0)) if total else 1.0


def _steps(values: Array) -> NDArray[np.int64] | None:
    """`values` [N] in units of the largest step of which all are whole multiples; None where that takes more than `REACH`."""
    denominators = (Fraction(v).limit_denominator(10**6).denominator for v in np.unique(values).tolist())
    scale = math.lcm(*denominators)
    if scale > REACH or np.abs(values).sum() * scale > REACH:
        return None
    steps = np.rint(values * scale)
    return steps.astype(np.int64) if np.abs(values * scale - steps).max() < 1e-6 else None


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: p-values, in the same order, that can be held against 5 % however many there are.

    Raises: `ValueError` for values outside of 0 to 1.
    """
    values = np.asarray(p, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p-values lie between 0 and 1")
    order, found = np.argsort(values, kind="stable"), np.empty(len(values))
    steps = values[order] * np.arange(len(values), 0, -1)
    found[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(value) for value in found]


def macro_f1(answers: Sequence[str] | NDArray[np.str_], predictions: Sequence[str] | NDArray[np.str_]) -> float:
    """F1 averaged over the classes that occur among the answers; a prediction outside of these is wrong, not a class.

    Raises: `ValueError` for no answers and for lengths that differ.
    """
    gold, said = [str(a) for a in answers], [str(p) for p in predictions]
    if not gold or len(gold) != len(said):
        raise ValueError(f"expected as many predictions as answers and at least one, found {len(said)} and {len(gold)}")
    from sklearn.metrics import f1_score

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


def _tables(*tables: ArrayLike) -> list[Array]:
    """Scores as arrays [S, N], those of one set repeated; raises ValueError unless they fit together."""
    arrays = [_finite_table(table) for table in tables]
    shapes = [a.shape for a in arrays]
    sets = max(shape[0] for shape in shapes)
    if len({shape[1] for shape in shapes}) > 1 or any(shape[0] not in (1, sets) for shape in shapes):
        raise ValueError(f"expected the same sets and rows in each table, found shapes {shapes}")
    if not all(((a >= 0) & (a <= 1)).all() for a in arrays):
        raise ValueError("scores over several sets lie between 0 and 1")
    return [np.broadcast_to(a, (sets, a.shape[1])) for a in arrays]


def _finite_table(table: ArrayLike) -> Array:
    array = np.atleast_2d(np.asarray(table, dtype=np.float64))
    if array.ndim != 2:
        raise ValueError(f"expected sets x rows, found shape {array.shape}")
    if not array.size:
        raise ValueError("no rows: a mean of nothing has no value")
    if not np.isfinite(array).all():
        raise ValueError("values that are not finite")
    return array


def _crossed_draws(tables: Sequence[Array], resamples: int, seed: int) -> Array:
    """Means of C tables [S, N], each draw over the same sets and rows, [resamples, C]."""
    sets, rows = tables[0].shape
    by_row = _weights(rows, resamples, seed)  # [resamples, N]
    if sets < MIN_SETS:
        return np.stack([by_row @ table.mean(0, dtype=np.float32) for table in tables], axis=-1).astype(np.float64)
    by_set = _weights(sets, resamples, seed + 1)  # [resamples, S]
    columns = []
    for table in tables:
        offsets = table.mean(1) - table.mean()  # [S]
        rest = by_row @ (table - offsets[:, None]).T.astype(np.float32)  # [resamples, S]
        columns.append((by_set * (_widening(table) * offsets + rest)).sum(1))
    return np.stack(columns, axis=-1)


def _widening(table: Array) -> float:
    """What the deviations of the sets' means are multiplied by, see `crossed_mean`; 1 when they are noise."""
    sets, rows = table.shape
    by_set, by_row, mean = table.mean(1, keepdims=True), table.mean(0, keepdims=True), table.mean()
    between = rows * float(((by_set - mean) ** 2).sum()) / (sets - 1)
    if not between or rows < 2:
        return 1.0
    noise = float(((table - by_set - by_row + mean) ** 2).sum()) / ((sets - 1) * (rows - 1))
    from scipy.stats import t

    full: float = math.sqrt(sets / (sets - 1)) * float(t.ppf(0.975, sets - 1)) / Z95
    return float(1.0 + (full - 1.0) * max(0.0, 1.0 - noise / between))


@lru_cache(maxsize=6)  # thousands of estimates of one study are over the same few numbers of rows
def _weights(n: int, resamples: int, seed: int) -> NDArray[np.float32]:
    """How often each of n things is drawn, as a share of n draws with replacement, [resamples, n]."""
    random = np.random.default_rng(seed)
    counts = [np.bincount(random.integers(0, n, n), minlength=n) for _ in range(resamples)]
    weights = (np.stack(counts) / n).astype(np.float32)
    weights.setflags(write=False)
    return weights


def _no_gain(gain: Estimate, sets: int) -> str:
    over = f"{gain.n} rows" + (f" and {sets} demonstration sets" if sets > 1 else "")
    text = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] on {over}"
    if gain.high < 0:
        return f"the context makes it worse: the teacher's gain over zero-shot is {text}"
    return f"the teacher's gain over zero-shot is not different from 0: {text}"


def _clipped(estimate: Estimate, least: float) -> Estimate:
    """The interval inside of what is possible (up to 1) and around the mean, which the added rows may have left."""
    low, high = min(estimate.mean, estimate.low), max(estimate.mean, estimate.high)
    return Estimate(estimate.mean, max(least, low), min(1.0, high), estimate.n)


def _ratios(draws: Array) -> Array:
    """First column over second, without the draws where the second is 0 and there is no ratio."""
    kept = draws[draws[:, 1] != 0]
    return np.asarray(kept[:, 0] / kept[:, 1])


def _estimate(mean: float, draws: Array, n: int) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(mean, float(low), float(high), n)
