"""Neural collapse by hand: the metrics' worked numbers, the predicted lengths, and that the free-feature model comes to them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.diagnose.neural_collapse_linear import (
    NeuralCollapseLinear,
    class_means,
    last_layer,
    nc1,
    nc1_ratio,
    nc2,
    nc_metrics,
    orthogonal_frame,
    predicted_geometry,
    products,
    simplex_frame,
    unconstrained_feature_model,
)
from convince.errors import Mistake

COUNTS = (200, 100, 50, 4)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_metrics_by_hand():
    """Two classes of two rows: S_W = [[1, -.5], [-.5, .5]], S_B = diag(4, 0): nc1 = (1/4) / 2, ratio = 1.5 / 4."""
    h, y = torch.tensor([[1.0, 1], [3, -1], [-1, 0], [-3, 0]]), torch.tensor([0, 0, 1, 1])
    assert nc1(h, y) == pytest.approx(0.125)
    assert nc1_ratio(h, y) == pytest.approx(0.375)


def test_nc1_is_the_trace_with_the_inverse():
    """Parity with the formula written out, for unequal classes and more features than classes."""
    h, y = torch.randn(30, 7, generator=gen(), dtype=torch.float64), torch.tensor([0] * 15 + [1] * 10 + [4] * 5)
    means = torch.stack([h[y == c].mean(0) for c in (0, 1, 4)])
    within = h - torch.stack([h[y == c].mean(0) for c in y.tolist()])
    between = means - h.mean(0)
    s_w, s_b = within.T @ within / 30, between.T @ between / 3
    assert nc1(h, y) == pytest.approx(float(torch.trace(s_w @ torch.linalg.pinv(s_b, rtol=1e-10))) / 3)
    assert nc1_ratio(h, y) == pytest.approx(float(torch.trace(s_w) / torch.trace(s_b)))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10**6))
def test_full_collapse_is_zero(k, seed):
    """An orthogonal frame, and the simplex frame it makes when centred: each metric is 0 on its own frame, in any rotation and scale."""
    frame = 3 * torch.linalg.qr(torch.randn(10, 10, generator=gen(seed), dtype=torch.float64)).Q[:k]
    y = torch.arange(k).repeat(4)
    orthogonal, simplex = nc_metrics(frame[y], y, 2 * frame), nc_metrics((frame - frame.mean(0))[y], y, frame - frame.mean(0))
    assert max(orthogonal[m] for m in ("nc1", "nc1_ratio", "nc2_of", "nc2_means_of", "nc3_of", "nc4", "nc2_means_etf")) < 1e-6
    assert max(simplex[m] for m in ("nc1", "nc1_ratio", "nc2_etf", "nc2_means_etf", "nc3_etf")) < 1e-6
    assert orthogonal["nc2_etf"] == pytest.approx(math.sqrt(2 - 2 * math.sqrt((k - 1) / k)))  # 0.5177 for k = 4


def test_frames_have_length_one():
    assert float(simplex_frame(5).norm()) == pytest.approx(1)
    assert float(orthogonal_frame(5).norm()) == pytest.approx(1)
    assert nc2(torch.diag(torch.tensor([3.0, 1])), orthogonal_frame(torch.tensor([3.0, 1]))) == pytest.approx(0, abs=1e-7)


def test_nc4_counts_answers_that_are_not_the_nearest_means():
    h, y = torch.tensor([[0.0, 1], [0, 3], [4, 0], [6, 0]]), torch.tensor([0, 0, 1, 1])
    assert nc_metrics(h, y, torch.tensor([[0.0, 1], [1, 0]]))["nc4"] == 0
    assert nc_metrics(h, y, torch.tensor([[0.0, 1], [1, 0]]), torch.tensor([2.0, -3]))["nc4"] == 0.25  # (4, 0): 2 against 1
    assert nc_metrics(h, y, torch.tensor([[9.0, 9], [0.0, 1], [1, 0]])[1:].repeat(2, 1))["nc4"] == 0  # classes without rows are no answer here


@pytest.mark.parametrize(
    ("lam", "w", "h"),
    [
        (1e-3, (3.7132, 3.1058, 2.5917, 1.2830), (0.2626, 0.3106, 0.3665, 0.6415)),
        (3e-3, (3.6166, 2.9896, 2.4513, 0.9685), (0.2557, 0.2990, 0.3467, 0.4843)),
        (6e-3, (3.4667, 2.8064, 2.2242, 0), (0.2451, 0.2806, 0.3145, 0)),
    ],
)
def test_predicted_lengths(lam, w, h):
    """Worked numbers for classes of 200, 100, 50 and 4, and the closed form of one layer."""
    found = predicted_geometry(COUNTS, [lam], lam)
    assert found.weight.tolist() == pytest.approx(w, abs=6e-5)
    assert found.feature.tolist() == pytest.approx(h, abs=6e-5)
    closed = [math.sqrt(max(math.sqrt(n) - 354 * lam, 0)) for n in COUNTS]
    assert found.weight.tolist() == pytest.approx(closed, abs=1e-9)


def test_threshold_of_minority_collapse():
    """n <= N^2 lam_w lam_h: with lam 6e-3 below 4.511 of 354 rows."""
    assert predicted_geometry((200, 100, 50, 4), [6e-3], 6e-3).weight[3] == 0
    assert predicted_geometry((200, 100, 49, 5), [6e-3], 6e-3).weight[3] > 0


@pytest.mark.parametrize("layers", [1, 2])
def test_free_features_come_to_the_prediction(layers):
    counts, lam = (12, 6, 3), [1e-2] * layers
    found, said = unconstrained_feature_model(counts, 4, lam, 1e-2, gen(1)), predicted_geometry(counts, lam, 1e-2)
    means, _ = class_means(found.h, found.y)
    top = products(found.weights)[-1]
    assert found.gradient < 1e-8
    assert top.norm(dim=1).tolist() == pytest.approx(said.weight.tolist(), rel=1e-4)
    assert means.norm(dim=1).tolist() == pytest.approx(said.feature.tolist(), rel=1e-4)
    assert nc2(top, orthogonal_frame(said.weight)) < 1e-4
    assert nc1(found.h, found.y) < 1e-8


@pytest.mark.parametrize(("loss", "bias"), [("mse", True), ("ce", False)])
def test_equal_classes_with_bias_or_cross_entropy_make_a_simplex(loss, bias):
    found = unconstrained_feature_model((10, 10, 10), 5, [5e-3], 5e-3, gen(), loss=loss, bias=bias)
    metrics = nc_metrics(found.h, found.y, found.weights[0], found.bias)
    assert max(metrics[m] for m in ("nc1", "nc2_etf", "nc2_means_etf", "nc3_etf", "nc4")) < 1e-4
    assert metrics["nc2_of"] > 0.3


def test_products_of_layers():
    w1, w2, w3 = (torch.randn(*shape, generator=gen()) for shape in ((5, 4), (5, 5), (3, 5)))
    found = products([w1, w2, w3])
    torch.testing.assert_close(found[0], w3)
    torch.testing.assert_close(found[2], w3 @ w2 @ w1)


def test_probe_reads_a_known_network():
    """A network that hands on one-hot features: an orthogonal frame at once, and nothing is missed."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = 2 * torch.eye(4)
    y = torch.arange(4).repeat(3)
    found = {r.name: r.value for r in NeuralCollapseLinear().probe(nn.Sequential(nn.Flatten(), layer), F.one_hot(y, 4).float().view(12, 1, 2, 2), y).readings}
    assert found["nc2 of weights, orthogonal frame"] == pytest.approx(0, abs=1e-7)
    assert found["nc1, tr(Sw pinv Sb) / K"] == pytest.approx(0, abs=1e-12)
    assert found["nc4, answers that are not the nearest class mean's"] == 0
    assert found["answers that are the last layer's"] == 1
    assert found["difference between class means"] == 1


@pytest.mark.parametrize("name", ["resnet:layers=(1,1),widths=(4,8)", "timm/resnet10t"])
def test_last_layer_of_ours_and_timms(name):
    model = builder(name, num_classes=3, in_chans=1, size=(32, 32))().eval()
    x = torch.rand(6, 1, 32, 32, generator=gen())
    last = last_layer(model, x, batch=4)
    torch.testing.assert_close(F.linear(last.h, last.w, last.bias), last.scores, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(last.h, model.forward_head(model.forward_features(x), pre_logits=True), atol=1e-5, rtol=1e-5)


def test_a_dead_network_is_told():
    """All features equal: nc1 has no value, and the first reading is 0."""
    dead = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.constant_(dead[1].weight, 0)
    found = NeuralCollapseLinear().probe(dead, torch.rand(4, 1, 2, 2, generator=gen()), torch.tensor([0, 0, 1, 1])).readings
    assert found[0].value == 0
    assert not any(r.name.startswith("nc1") for r in found)


def test_what_it_refuses():
    conv = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(Mistake, match="has no last linear layer with one output a class"):
        NeuralCollapseLinear().probe(conv, torch.rand(4, 1, 4, 4), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(Mistake, match="the labels hold 1"):
        nc1(torch.rand(4, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(Mistake, match="each must be above 0"):
        predicted_geometry(COUNTS, [0.0], 1e-3)
