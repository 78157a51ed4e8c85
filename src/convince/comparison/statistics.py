"""Statistics of paired differences: intervals, p-values, posterior, corrections, stopping rules, verdicts.

A difference is change minus baseline on one seed, turned so that positive is better. Seeds are the
sample: the interval covers what the seed varies (split, initial weights, order), on this data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats
from scipy.optimize import brentq

Verdict = Literal["better", "worse", "equivalent", "not decided"]
VERDICTS: tuple[Verdict, ...] = ("better", "worse", "equivalent", "not decided")
EXACT = 14  # pairs up to which all sign flips are counted
SIMULATED = 100_000  # experiments without effect behind the limits of a stopping rule


@dataclass(frozen=True)
class Paired:
    """A mean difference with its spread, and two p-values against no difference (two-sided)."""

    n: int
    mean: float
    sd: float
    p: float  # paired t
    differences: tuple[float, ...]

    @property
    def p_flip(self) -> float:
        """By :func:`sign_flip`."""
        return sign_flip(np.array(self.differences))

    @property
    def se(self) -> float:
        """Standard error of the mean."""
        return self.sd / math.sqrt(self.n)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The t interval; endless with one pair, without width where all differences are equal."""
        if self.n < 2:
            return -math.inf, math.inf
        half = float(stats.t.ppf((1 + level) / 2, self.n - 1)) * self.se
        return self.mean - half, self.mean + half


def paired(differences: Sequence[float]) -> Paired:
    """The paired t-test and the sign-flip test of these differences, one a seed."""
    d = np.asarray(differences, float)
    n, mean = len(d), float(d.mean())
    sd = float(d.std(ddof=1)) if n > 1 else math.inf
    if np.ptp(d) == 0 and n > 1:  # equal differences: exact arithmetic says what a division by zero would not
        sd, mean = 0.0, float(d[0])
    p = 1.0 if n < 2 or mean == 0 else 0.0 if sd == 0 else float(2 * stats.t.sf(abs(mean) / (sd / math.sqrt(n)), n - 1))
    return Paired(n, mean, sd, p, tuple(d.tolist()))


def sign_flip(differences: np.ndarray, draws: int = 20_000) -> float:
    """Share of sign flips whose mean lies at least as far from 0 as the one seen; exact up to 14 pairs, else drawn.

    Its smallest value is ``2 / 2^n``: with fewer than six pairs it cannot reach .05.
    """
    d = np.asarray(differences, float)
    n, seen = len(d), abs(d.sum())
    slack = 1e-9 * np.abs(d).sum()
    if n <= EXACT:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((2 * bits - 1) @ d) >= seen - slack).mean())
    signs = np.random.default_rng(n).choice([-1.0, 1.0], (draws, n))
    return float((1 + (np.abs(signs @ d) >= seen - slack).sum()) / (1 + draws))


def within(found: Paired, margin: float, overlap: float = 0.0) -> float:
    """Posterior probability that the difference lies inside ``-margin..margin``.

    The posterior under a flat prior is Student's t with n - 1 degrees of freedom around the mean, its variance
    ``sd^2 (1/n + overlap / (1 - overlap))`` (Benavoli et al., JMLR 18, 2017, eq. 7); ``overlap`` is the
    correlation between pairs, 0 where the seeds are the sample.
    """
    if found.n < 2:
        return 0.0
    scale = found.sd * math.sqrt(1 / found.n + overlap / (1 - overlap))
    if scale == 0:
        return float(abs(found.mean) <= margin)
    low, high = stats.t.cdf([(-margin - found.mean) / scale, (margin - found.mean) / scale], found.n - 1)
    return float(high - low)


def detectable(sd: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that ``n`` pairs of this spread show with this power (two-sided paired t-test).

    In the unit of ``sd``; infinite for fewer than two pairs.
    """
    if n < 2:
        return math.inf
    return sd * _effect(n, alpha, power)


@functools.cache
def _effect(n: int, alpha: float, power: float) -> float:
    """Detectable difference in standard deviations of a pair."""
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))

    def missing(effect: float) -> float:
        shift = effect * math.sqrt(n)
        wrong_side = float(np.nan_to_num(stats.nct.cdf(-critical, n - 1, shift)))  # scipy gives NaN where it is next to nothing
        return power - float(stats.nct.sf(critical, n - 1, shift)) - wrong_side

    high = 1.0
    while missing(high) > 0:
        high *= 2
    return float(brentq(missing, 0.0, high, xtol=1e-6))


def fewest_pairs(alpha: float = 0.05) -> int:
    """Pairs from which the sign-flip test can reach ``alpha``: six at .05."""
    return math.ceil(math.log2(2 / alpha))


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method: the chance of any false win stays below alpha."""
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(list(p), method="holm")[1]] if p else []


@dataclass(frozen=True)
class Looks:
    """When a comparison is looked at (pairs, rising), and how sure it must be each time.

    The error is spent as ``alpha (n / n_last)^3`` (Kim and DeMets 1987): little at the early looks. The limits on the
    p-value of the paired t-test that spend exactly that are found by simulating experiments without effect.
    One look is the plain test.
    """

    pairs: tuple[int, ...]

    def spent(self, alpha: float) -> list[float]:
        """The error spent up to each look."""
        return [alpha * (n / self.pairs[-1]) ** 3 for n in self.pairs]

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a value of two numbers, not an object with a life
    def limits(self, alpha: float) -> tuple[float, ...]:
        """At each look, the largest p-value that decides."""
        if len(self.pairs) == 1:
            return (alpha,)
        p = _nulls(self.pairs)
        alive = np.ones(len(p), bool)
        out, before = [], 0.0
        for i, spent in enumerate(self.spent(alpha)):
            count = int((spent - before) * len(p))
            column = p[alive, i]
            place = min(count, len(column)) - 1
            limit = float(np.partition(column, place)[place]) if count >= 20 and len(column) else spent - before  # too rare to simulate: its share
            alive &= p[:, i] > limit
            out.append(limit)
            before = spent
        return tuple(out)

    def sequential_p(self, seen: Sequence[float]) -> float:
        """The smallest alpha at which one of the looks so far (their p-values in order) would have decided."""
        if len(self.pairs) == 1:
            return float(seen[0])

        def decides(alpha: float) -> bool:
            return any(p <= limit for p, limit in zip(seen, self.limits(alpha), strict=False))

        low, high = 0.0, 1.0
        if not decides(high):
            return 1.0
        while high - low > 1e-3 * high + 1e-9:
            middle = (low + high) / 2
            low, high = (low, middle) if decides(middle) else (middle, high)
        return high


@functools.cache
def _nulls(pairs: tuple[int, ...]) -> np.ndarray:
    """P-values of paired t-tests at each look of simulated experiments without effect [SIMULATED looks]."""
    z = np.random.default_rng(sum(pairs)).standard_normal((SIMULATED, pairs[-1]))
    total, square = z.cumsum(1), (z * z).cumsum(1)
    out = np.empty((SIMULATED, len(pairs)))
    for i, n in enumerate(pairs):
        mean = total[:, n - 1] / n
        variance = np.maximum(square[:, n - 1] - n * mean**2, 1e-12) / (n - 1)
        out[:, i] = 2 * stats.t.sf(np.abs(mean) / np.sqrt(variance / n), n - 1)
    return out


def looks(n: int, early: bool) -> Looks:
    """The looks of ``n`` pairs: one at the end, or with early stopping at about a half, three quarters and the end."""
    if not early or n < 4:
        return Looks((n,))
    return Looks(tuple(sorted({max(3, math.ceil(n / 2)), max(3, math.ceil(3 * n / 4)), n})))


def verdict(found: Paired, decided: bool, margin: float, sure: float = 0.95) -> Verdict:
    """What the differences say.

    "better" or "worse" where the corrected test has ``decided``, else "equivalent" where the difference lies
    inside the margin with posterior probability ``sure``, else "not decided". A win that lies inside the
    margin stays a win, so that the error rate is the stated one; the sentence then says how small it is.
    """
    if decided:
        return "better" if found.mean > 0 else "worse"
    if found.n >= 2 and within(found, margin) >= sure:
        return "equivalent"
    return "not decided"
