"""Tied features by hand: closed forms, the two ends of beta, the first-order prediction near collapse, the falling path, and profiles of known networks."""

import itertools
import math

import pytest
import torch
from torch import nn

from convince.backbones import builder
from convince.diagnose.nc_perturbation import (
    NcPerturbation,
    central_path,
    collapsed,
    depth_profile,
    near_collapse_report,
    one_hot,
    optimal_features,
    optimal_weights,
    shrinkage,
    spots,
    tethered_features,
)
from convince.diagnose.neural_collapse_linear import nc1, nc1_ratio
from convince.errors import Mistake


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(k=4, n=25, d=12, spread=0.5, seed=0):
    """Normal classes, scaled to unit mean square."""
    y = torch.arange(k).repeat_interleave(n)
    h = torch.randn(k, d, generator=gen(seed), dtype=torch.float64)[y] + spread * torch.randn(k * n, d, generator=gen(seed + 1), dtype=torch.float64)
    return h / h.square().mean().sqrt(), y


def objective(w, h, h0, y, lam_w, lam_h, beta):
    """Kn times the paper's objective, rows for columns."""
    n = len(h) / y.shape[1]
    return (h @ w.T - y).square().sum() / 2 + n * lam_w / 2 * w.square().sum() + lam_h / 2 * h.square().sum() + beta / 2 * (h - h0).square().sum()


def test_closed_forms_leave_no_gradient():
    h0, labels = blobs()
    y = one_hot(labels)
    w = optimal_weights(h0, y, 0.05).requires_grad_()
    objective(w, h0, h0, y, 0.05, 0.02, 0.3).backward()
    assert float(w.grad.abs().max()) < 1e-9
    h = optimal_features(w.detach(), h0, y, 0.02, 0.3).requires_grad_()
    objective(w.detach(), h, h0, y, 0.05, 0.02, 0.3).backward()
    assert float(h.grad.abs().max()) < 1e-9


def test_one_feature_by_hand():
    """W = 2, h0 = 1, y = 1, lam_h = 1, beta = 1: (4 + 2) h = 2 + 1."""
    one = torch.ones(1, 1, dtype=torch.float64)
    assert float(optimal_features(2 * one, one, one, 1.0, 1.0)) == pytest.approx(0.5)
    assert float(optimal_weights(2 * one, one, 1.0)) == pytest.approx(2 / 5)  # Y H' / (H H' + n lam)


def test_minimiser_is_stationary_and_rises_with_beta():
    h0, labels = blobs()
    spreads = []
    for beta in (1e-3, 1e-2, 0.1, 1, 10):
        found = tethered_features(h0, labels, 0.05, 0.05, beta)
        y = one_hot(labels)
        w, h = found.w.clone().requires_grad_(), found.h.clone().requires_grad_()
        objective(w, h, h0, y, 0.05, 0.05, beta).backward()
        assert found.residual < 1e-8
        assert float(w.grad.norm() / found.w.norm()) < 1e-6
        assert float(h.grad.norm() / found.h.norm()) < 1e-6
        spreads.append((nc1(found.h, labels), nc1_ratio(found.h, labels)))
    for values in zip(*spreads, strict=True):
        assert list(values) == sorted(values)
    assert spreads[-1][0] < nc1(h0, labels)


def test_a_stiff_tie_keeps_the_features():
    h0, labels = blobs()
    torch.testing.assert_close(tethered_features(h0, labels, 0.05, 0.05, 1e6).h, h0, rtol=1e-4, atol=1e-4)


def test_without_tie_the_features_collapse():
    """An orthogonal frame with |h|^2 = (1 - lam) for equal lam, whatever it started from."""
    h0, labels = blobs(k=3, n=8)
    h = tethered_features(h0, labels, 0.05, 0.05, 0.0).h
    means = torch.stack([h[labels == c].mean(0) for c in range(3)])
    assert nc1(h, labels) < 1e-12
    torch.testing.assert_close(means @ means.T, 0.95 * torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_zero_is_the_minimum_from_a_product_of_one():
    h0, labels = blobs(k=3, n=8)
    assert float(tethered_features(h0, labels, 1.1, 1.0, 0.0).h.norm()) < 1e-3
    with pytest.raises(Mistake, match="must be below 1"):
        collapsed(3, 4, 8, 1.1, 1.0, gen())


def test_collapsed_features_stay_where_they_are():
    h, labels = collapsed(4, 5, 9, 0.02, 0.1, gen())
    for beta in (0.0, 0.3):
        torch.testing.assert_close(tethered_features(h, labels, 0.02, 0.1, beta).h, h, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("lam_w", "lam_h"), [(0.05, 0.05), (0.01, 0.1)])
def test_near_collapse_the_prediction_is_exact_to_first_order(lam_w, lam_h):
    for predicted, found in near_collapse_report(4, 10, 9, lam_w, lam_h, (0.1, 1, 10), gen()).values():
        assert found == pytest.approx(predicted, rel=1e-3)


def test_shrinkage_by_hand():
    assert shrinkage(0.04, 0.01, 0.5) == pytest.approx((0.5, 0.5 / 0.51))
    assert shrinkage(0.01, 0.04, 0.5)[0] < 0.5  # more weight on features: nearer to collapse


def test_nc1_falls_along_the_central_path():
    h0, labels = blobs()
    path = central_path(h0, labels, 0.01, 0.01, steps=60)
    for values in (path.nc1, path.ratio):
        assert all(b < a for a, b in itertools.pairwise(values))
    assert path.nc1[0] == nc1(h0, labels)
    assert path.time[-1] == pytest.approx(12)


def test_a_step_is_shortened_where_it_would_be_unstable():
    h0, labels = blobs()
    w = 10 * torch.eye(4, 12, dtype=torch.float64)
    path = central_path(h0, labels, 0.01, 0.0, steps=2, frozen=w)
    assert path.time == pytest.approx([0, 0.01, 0.02])
    assert bool(path.h.isfinite().all())


class Known(nn.Module):
    """Two linear layers: the second sees twice the mean of class against class and the same spread."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.first.weight.data = torch.tensor([[2.0, 0], [0, 1]])

    def forward(self, x):
        return self.last(self.first(x))


def test_profile_by_hand():
    """Means (+-2, 0) before and (+-4, 0) behind; spread 1.5 before (see the metrics' worked example) and 4.5 behind: 4.5 / 16."""
    x, y = torch.tensor([[1.0, 1], [3, -1], [-1, 0], [-3, 0]]), torch.tensor([0, 0, 1, 1])
    assert depth_profile(Known(), x, y, batch=3) == {"before last": pytest.approx(4.5 / 16)}


def test_profile_equals_the_metric_on_the_whole():
    """Summed by batches, at the place where the last layer reads, it is nc1_ratio of those features."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).eval()
    x, y = torch.rand(20, 1, 3, 3, generator=gen()), torch.arange(20) % 3
    found = depth_profile(net, x, y, batch=7)
    assert list(found) == ["before 3", "before 5"]
    assert found["before 3"] == pytest.approx(nc1_ratio(net[:3](x).detach(), y), rel=1e-6)
    assert found["before 5"] == pytest.approx(nc1_ratio(net[:5](x).detach(), y), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet:layers=(2,1),widths=(4,8)", 4),
        ("timm/resnet10t", 5),
        ("conv-stem-vit:dim=16,depth=2,heads=2", 3),
        ("timm/vit_tiny_patch16_224", 13),
    ],
)
def test_blocks_of_networks(name, count):
    model = builder(name, num_classes=3, in_chans=1, size=(32, 32))().eval()
    assert len(spots(model)) == count
    found = NcPerturbation().probe(model, torch.rand(9, 1, 32, 32, generator=gen()), torch.arange(9) % 3)
    assert sum(": tr(Sw)" in r.name for r in found.readings) == count
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_dead_layer_is_counted():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(net[3].weight, 0)
    x, y = torch.rand(6, 1, 2, 2, generator=gen()), torch.arange(6) % 2
    assert math.isinf(depth_profile(net, x, y)["before 5"])
    found = {r.name: r.value for r in NcPerturbation().probe(net, x, y).readings}
    assert found["layers where all class means coincide"] == 1
    assert "before 5: tr(Sw) / tr(Sb)" not in found


def test_what_it_refuses():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(Mistake, match="has no two layers"):
        depth_profile(net, torch.rand(4, 1, 2, 2), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(Mistake, match="the labels hold 1"):
        depth_profile(net, torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(Mistake, match="not both 0"):
        tethered_features(*blobs(), 0.05, 0.0, 0.0)
