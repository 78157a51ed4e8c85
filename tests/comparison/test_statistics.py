"""The statistics of pairs: by hand, against oracles, and as properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.power import TTestPower

from convince.comparison import statistics as stats

DIFFERENCES = st.lists(st.floats(-1, 1, allow_nan=False).map(lambda v: round(v, 3)), min_size=2, max_size=12)


def test_an_interval_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t(.975, 2) = 4.30265: 2 ± 4.30265 / sqrt(3)."""
    found = stats.paired([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    assert found.interval() == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert found.p == pytest.approx(scipy_stats.ttest_1samp([1, 2, 3], 0).pvalue)


def test_sign_flips_by_hand():
    """Of the eight flips of 1, 2, 3 only all plus and all minus are as far from 0 as 6: 2 / 8."""
    assert stats.sign_flip(np.array([1.0, 2.0, 3.0])) == 0.25
    assert stats.sign_flip(np.ones(6)) == 2 / 64
    assert stats.fewest_pairs(0.05) == 6
    assert 2 / 2**5 > 0.05 >= 2 / 2**6


@pytest.mark.parametrize("n", [15, 20])
def test_drawn_sign_flips_agree_with_scipy(n):
    d = np.random.default_rng(n).normal(0.3, 1, n)
    oracle = scipy_stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)).pvalue
    assert stats.sign_flip(d) == pytest.approx(oracle, abs=0.02)


@given(DIFFERENCES)
@settings(max_examples=60, deadline=None)
def test_turning_all_differences_turns_the_result(d):
    a, b = stats.paired(d), stats.paired([-x for x in d])
    assert a.mean == pytest.approx(-b.mean, abs=1e-12)
    assert (a.p, a.p_flip) == (pytest.approx(b.p), pytest.approx(b.p_flip))
    assert a.interval()[0] == pytest.approx(-b.interval()[1], abs=1e-9)


def test_equal_arms_give_exactly_nothing():
    found = stats.paired([0.0] * 8)
    assert (found.mean, found.sd, found.p, found.interval()) == (0.0, 0.0, 1.0, (0.0, 0.0))
    assert stats.verdict(found, False, 0.005) == "equivalent"


def test_equal_differences_that_are_not_nothing_decide():
    found = stats.paired([0.1] * 4)
    assert found.p == 0.0
    assert found.interval() == (0.1, 0.1)


def test_one_pair_decides_nothing():
    found = stats.paired([0.5])
    assert found.p == 1.0
    assert found.interval() == (-math.inf, math.inf)
    assert stats.verdict(found, False, 1.0) == "not decided"
    assert stats.detectable(1.0, 1) == math.inf


@pytest.mark.parametrize("n", [5, 8, 12])
@pytest.mark.parametrize("margin", [0.1, 0.5])
def test_the_posterior_is_that_of_baycomp(n, margin):
    baycomp = pytest.importorskip("baycomp")
    rng = np.random.default_rng(n)
    x, y = rng.normal(0, 1, n), rng.normal(0.2, 1, n)
    _, inside, _ = baycomp.single.CorrelatedTTest.probs(x, y, rope=margin)
    assert stats.within(stats.paired(list(y - x)), margin, overlap=1 / n) == pytest.approx(inside, abs=1e-9)


def test_without_overlap_the_posterior_is_the_t_interval():
    found = stats.paired(list(np.random.default_rng(0).normal(0, 1, 9)))
    low, high = found.interval(0.95)
    centred = stats.paired([d - found.mean for d in found.differences])
    assert stats.within(centred, (high - low) / 2) == pytest.approx(0.95, abs=1e-9)


def test_detectable_with_three_pairs_by_simulation():
    z = np.random.default_rng(0).standard_normal((200_000, 3)) + stats.detectable(1.0, 3, 0.01)
    assert (scipy_stats.ttest_1samp(z, 0, axis=1).pvalue <= 0.01).mean() == pytest.approx(0.8, abs=0.004)


@pytest.mark.parametrize("n", [6, 8, 20])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_detectable_differences_are_those_of_statsmodels(n, alpha):
    assert stats.detectable(2.0, n, alpha) == pytest.approx(2 * TTestPower().solve_power(nobs=n, alpha=alpha, power=0.8), rel=1e-3)


@given(st.integers(2, 40), st.sampled_from([0.05, 0.025, 0.005]))
@settings(max_examples=40, deadline=None)
def test_more_pairs_detect_less(n, alpha):
    assert stats.detectable(1.0, n + 1, alpha) < stats.detectable(1.0, n, alpha)


def test_holm_by_hand():
    """.01, .04, .03 of three: 3 x .01, then 2 x .03 and .04 raised to it."""
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


def test_one_look_is_the_plain_test():
    look = stats.looks(8, early=False)
    assert look.pairs == (8,)
    assert look.limits(0.05) == (0.05,)
    assert look.sequential_p([0.031]) == 0.031


def test_limits_spend_what_they_say():
    """Fresh experiments without effect: the share decided by each look is the share of error spent there."""
    look = stats.Looks((4, 6, 8))
    z = np.random.default_rng(77).standard_normal((40_000, 8))
    alive, decided = np.ones(len(z), bool), 0
    for n, limit, spent in zip(look.pairs, look.limits(0.05), look.spent(0.05), strict=True):
        p = scipy_stats.ttest_1samp(z[:, :n], 0, axis=1).pvalue
        decided += int((alive & (p <= limit)).sum())
        alive &= p > limit
        assert decided / len(z) == pytest.approx(spent, abs=0.004)


def test_a_sequential_p_decides_just_where_the_limits_do():
    look = stats.Looks((4, 6, 8))
    for seen in ([0.2, 0.01], [0.005], [0.3, 0.2, 0.03], [0.3, 0.2, 0.05]):
        decides = any(p <= limit for p, limit in zip(seen, look.limits(0.05), strict=False))
        assert (look.sequential_p(seen) <= 0.05) == decides


def test_looks_never_come_before_three_pairs():
    for n in range(2, 30):
        found = stats.looks(n, early=True).pairs
        assert found[-1] == n
        assert len(found) == 1 or found[0] >= 3
        assert list(found) == sorted(set(found))
