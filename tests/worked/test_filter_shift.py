"""Filter shift by hand: entropies and thresholds, degenerate layers and their verdicts, the drift of two histograms, names."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as kullback_leibler
from torch import nn

from convince.diagnose.filter_shift import (
    FilterShift,
    chance,
    entropy_threshold,
    extract_filters,
    filter_shift,
    fit_threshold,
    principal,
    scaled,
    sparsity,
    variance_entropy,
    verdict,
)
from convince.errors import Mistake


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, seed=0):
    return torch.randn(n, 3, 3, generator=gen(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "value"), [(16, 0.723), (64, 0.905), (256, 0.942), (1024, 0.9487), (4096, 0.9498)])
def test_worked_thresholds(n, value):
    """By hand from the law's numbers rounded to two places; with all their digits a little higher."""
    assert entropy_threshold(n, (1.26, 2.30, 0.89, -0.31)) == pytest.approx(value, abs=6e-4)
    assert entropy_threshold(n) == pytest.approx(value, abs=2e-3)


def test_worked_entropy():
    """Variances of 4 and 1 along two taps: shares 0.8 and 0.2."""
    kernels = torch.zeros(4, 9, dtype=torch.float64)
    kernels[0, 0], kernels[1, 0], kernels[2, 5], kernels[3, 5] = 2, -2, 1, -1
    kernels = kernels.reshape(4, 3, 3)
    assert variance_entropy(kernels) == pytest.approx(-0.8 * math.log10(0.8) - 0.2 * math.log10(0.2))
    assert variance_entropy(torch.ones(4, 3, 3)) == 0


@pytest.mark.parametrize("n", [64, 256, 1024])
def test_random_layers_reach_the_threshold(n):
    reached = [variance_entropy(normal(n, seed)) >= entropy_threshold(n) - 0.005 for seed in range(200)]
    assert sum(reached) >= 190
    mean = sum(variance_entropy(normal(n, seed)) for seed in range(50)) / 50
    assert mean == pytest.approx({64: 0.920, 256: 0.946, 1024: 0.9521}[n], abs=3e-3)


def test_a_fit_by_simulation_comes_near_the_published_one():
    counts = (16, 32, 64, 128, 256, 512, 1024)
    fitted = fit_threshold(counts, 50, gen())
    for n in counts[2:]:
        assert entropy_threshold(n, fitted) == pytest.approx(entropy_threshold(n), abs=0.02)


def test_half_of_the_kernels_dead():
    kernels = normal(64)
    kernels[::2] = 0
    assert sparsity(kernels) == 0.5
    kernels[1::2] = kernels[1::2].sign()
    kernels[::2] = 0.0099
    assert sparsity(kernels) == 0.5
    kernels[::2] = 0.0101
    assert sparsity(kernels) == 0
    assert sparsity(torch.zeros(3, 3, 3)) == 1


def test_verdicts():
    copies = normal(1).expand(256, 3, 3)
    lengths = torch.rand(256, 1, 1, generator=gen(1), dtype=torch.float64)
    noise = 0.01 * normal(256, 2)
    assert verdict(normal(256)) == "random"
    assert verdict(copies * lengths + noise) == "low diversity"
    assert variance_entropy(copies * lengths + noise) < 0.05
    assert verdict(copies + noise) == "low diversity"
    assert variance_entropy(copies + noise) > 0.9, "centred copies are their noise: entropy alone would call them random"
    assert verdict(normal(9)) == "too few"
    assert verdict(torch.zeros(256, 3, 3)) == "sparse"
    smooth = normal(256) * torch.tensor([1.0, 0.5, 0.2]).double()
    assert verdict(smooth) == "sound"


def test_scaled_by_the_largest_weight_and_zeros_left_alone():
    kernels = torch.stack([torch.full((3, 3), -0.5), torch.zeros(3, 3)])
    kernels[0, 1, 1] = 0.25
    assert scaled(kernels)[0].tolist() == [-1, -1, -1, -1, 0.5, -1, -1, -1, -1]
    assert not scaled(kernels)[1].any()


def test_drift_by_numpy():
    """The same by numpy's histograms and scipy's divergence, component by component."""
    a, b = normal(300), normal(200, 1) * torch.tensor([1.0, 0.5, 2.0]).double()
    one, two = scaled(a).numpy(), scaled(b).numpy()
    both = np.concatenate([one, two])
    _, s, v = np.linalg.svd(both - both.mean(0), full_matrices=False)
    v *= np.sign(v[np.arange(9), np.abs(v).argmax(1)])[:, None]
    u, w = ((part - both.mean(0)) @ v.T for part in (one, two))
    edges = (min(u.min(), w.min()), max(u.max(), w.max()))
    wanted = 0.0
    for i in range(9):
        p, q = (np.histogram(part[:, i], bins=70, range=edges, density=True)[0] for part in (u, w))
        p, q = (np.where(h == 0, np.finfo(np.float32).eps, h) for h in (p, q))
        wanted += s[i] ** 2 / (s**2).sum() * (kullback_leibler(p, q) + kullback_leibler(q, p))
    assert filter_shift(a, b) == pytest.approx(wanted, rel=1e-6)


@given(st.integers(2, 80), st.integers(2, 80), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_drift_is_symmetric_not_negative_and_blind_to_scale(n, m, factor):
    a, b = normal(n), normal(m, 1)
    drift = filter_shift(a, b)
    assert drift >= 0
    assert drift == pytest.approx(filter_shift(b, a), rel=1e-6, abs=1e-9)
    assert filter_shift(a, a) == 0
    assert filter_shift(a * factor, a) == pytest.approx(0, abs=1e-3)
    assert filter_shift(a, b, reference=normal(50, 2)) >= 0


def test_other_kernels_drift_farther_than_chance_and_few_farther_than_many():
    smooth = normal(1000) * torch.tensor([1.0, 0.5, 0.2]).double()
    assert filter_shift(normal(1000, 1), smooth) > 5 * chance(normal(1000, 1), smooth, gen())
    assert chance(normal(50), normal(50, 1), gen()) > 5 * chance(normal(5000), normal(5000, 1), gen())
    assert filter_shift(torch.ones(2, 3, 3), torch.ones(3, 3, 3)) == 0


def test_basis_explains_all_variance():
    basis = principal(scaled(normal(100)))
    assert float(basis.explained.sum()) == pytest.approx(1)
    torch.testing.assert_close(basis.components @ basis.components.T, torch.eye(9, dtype=torch.float64))


def test_every_3x3_convolution_is_read():
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, (3, 3)))
    found = extract_filters(net)
    assert [(k.name, k.depth, k.depthwise, len(k.weight)) for k in found] == [("0", 1, False, 16), ("2", 2, True, 8), ("3", 3, False, 48)]
    assert torch.equal(found[0].weight[3].float(), net[0].weight[1, 1])
    x, y = torch.zeros(1, 2, 9, 9), torch.zeros(1, dtype=torch.int64)
    values = {r.name: r.value for r in FilterShift().probe(net, x, y).readings}
    assert values["layers: too few"] == 1
    assert sum(v for name, v in values.items() if name.startswith("layers: ")) == 3
    assert "2: entropy over that of random kernels" not in values
    assert values["3: drift from the layer before"] > 0


def test_networks_without_are_refused():
    with pytest.raises(Mistake, match="filter-shift: Sequential has no 3x3 convolution"):
        FilterShift().probe(nn.Sequential(nn.Conv2d(1, 1, 5)), torch.zeros(1, 1, 9, 9), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(Mistake, match="both sets need at least one kernel"):
        filter_shift(normal(3), normal(3)[:0])
