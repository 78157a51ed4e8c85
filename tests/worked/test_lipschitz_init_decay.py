"""Lipschitz init decay by hand: worked layers, Lipschitz bounds, predicted shares, profiles of known networks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.diagnose.lipschitz_init_decay import LipschitzInitDecay, decay_rate, depth_profile, layers_of, layers_until, mean_square, profile, redraw
from convince.errors import Mistake
from convince.layers.one_lipschitz import (
    LAWS,
    AOLConv2d,
    AOLLinear,
    MaxMin,
    SLLConv2d,
    SLLLinear,
    aol_weight,
    draw_,
    overlap,
    predicted_aol_variance,
    predicted_gain,
    predicted_sll_gain,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def readings(net, x, **options):
    found = LipschitzInitDecay(**options).probe(net, x, torch.arange(len(x)) % 3)
    return {r.name: r.value for r in found.readings}


# -- layers ------------------------------------------------------------------------------------------


def test_worked_aol():
    """W = [[1,1],[0,1]]: W^T W = [[1,1],[1,2]], rows sum to 2 and 3."""
    w = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert overlap(w.T).tolist() == [[1, 1], [1, 2]]
    torch.testing.assert_close(aol_weight(w), w * torch.tensor([0.70711, 0.57735]), rtol=0, atol=1e-5)


def test_worked_sll():
    """T = (2, 3), W^T x = (1, 2), so y = (1, 1) - 2 W (1/2, 2/3) = (1, 1) - (7/3, 4/3)."""
    layer = SLLLinear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))  # W^T
    assert layer(torch.ones(1, 2)).tolist() == [pytest.approx([-4 / 3, -1 / 3])]


def test_worked_overlap_of_kernels():
    """Taps (1, 2) and (3, -1) slide over one another: 1*3 - 2*1 at rest, 2*3 and -1*1 at the two shifts: 1 + 6 + 1."""
    kernels = torch.tensor([[[[1.0, 2.0]]], [[[3.0, -1.0]]]])
    assert overlap(kernels).tolist() == [[5 + 2 + 2, 1 + 6 + 1], [1 + 6 + 1, 10 + 3 + 3]]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_linear_layers_are_1_lipschitz_whatever_the_scale(n, m, seed):
    aol, sll = AOLLinear(n, m).double(), SLLLinear(n, m).double()
    with torch.no_grad():
        aol.weight.copy_(randn(m, n, seed=seed))
        sll.weight.copy_(3 * randn(m, n, seed=seed))
        sll.log_q.copy_(randn(m, seed=seed + 1))
    assert float(torch.linalg.matrix_norm(aol_weight(aol.weight.detach()), 2)) <= 1 + 1e-9
    torch.testing.assert_close(aol_weight(1e3 * aol.weight), aol_weight(aol.weight))
    a, b = randn(40, n, seed=seed + 2), randn(40, n, seed=seed + 3)
    for layer in (aol, sll):
        assert bool(((layer(a) - layer(b)).norm(dim=1) <= (a - b).norm(dim=1) * (1 + 1e-9)).all())


@pytest.mark.parametrize("make", [lambda: AOLConv2d(2, 3, 3), lambda: AOLConv2d(2, 3, 3, stride=2), lambda: AOLConv2d(2, 4, 2), lambda: SLLConv2d(2, 3, 3)])
def test_convolutions_are_1_lipschitz(make):
    layer, x = make().double(), randn(1, 2, 5, 5)
    jacobian = torch.autograd.functional.jacobian(lambda u: layer(u).flatten(), x).flatten(1)
    assert 0.1 < float(torch.linalg.matrix_norm(jacobian, 2)) <= 1 + 1e-9


def test_convolutions_of_one_tap_are_the_linear_layers():
    for linear, conv in ((AOLLinear(4, 3), AOLConv2d(4, 3, 1)), (SLLLinear(4, 3), SLLConv2d(4, 3, 1))):
        with torch.no_grad():
            conv.weight.copy_(linear.weight[..., None, None])
        x = torch.randn(2, 4, 3, 3, generator=gen())
        torch.testing.assert_close(conv(x), linear(x.movedim(1, -1)).movedim(-1, 1))


def test_maxmin_by_hand_and_its_length():
    assert MaxMin()(torch.tensor([[1.0, 4.0, 3.0, 2.0]])).tolist() == [[4, 1, 3, 2]]
    x = randn(2, 6, 3, 3)
    torch.testing.assert_close(MaxMin()(x).square().sum(), x.square().sum())


@pytest.mark.parametrize("law", LAWS)
def test_laws_have_their_deviation(law):
    w = torch.empty(80, 80)
    draw_(w, law, gen(), 0.5)
    want = 0.25 / (80 if law == "orthogonal" else 1)
    assert mean_square(w) == pytest.approx(want, rel=0.06)
    assert float(w.mean()) == pytest.approx(0, abs=0.02)
    again = torch.empty(80, 80)
    draw_(again, law, gen(), 0.5)
    assert torch.equal(w, again)


def test_orthogonal_weights_pass_everything_on():
    w = torch.empty(8, 8, dtype=torch.float64)
    draw_(w, "orthogonal", gen(), 7.0)
    torch.testing.assert_close(aol_weight(w) @ aol_weight(w).T, torch.eye(8, dtype=torch.float64))


# -- predictions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "aol", "sll"), [(32, 0.185, 0.734), (128, 0.100, 0.828), (512, 0.0525, 0.903)])
def test_predictions_for_square_layers(n, aol, sll):
    """Shares measured apart in another program (normal weights and inputs)."""
    assert n * predicted_aol_variance(n, n) == pytest.approx(aol, rel=0.01)
    assert predicted_sll_gain(n, n) == pytest.approx(sll, rel=0.01)


@pytest.mark.parametrize("law", ["normal", "uniform", "laplace"])
@pytest.mark.parametrize("shape", [(128, 128), (64, 256), (256, 64), (32, 24, 3, 3)])
def test_predicted_variance_of_any_law(law, shape):
    found = []
    for seed in range(6):
        w = torch.empty(shape)
        draw_(w, law, gen(seed), 3.0)
        found.append(mean_square(aol_weight(w)))
    predicted = predicted_aol_variance(shape[0], shape[1], shape[2:] or (1, 1))
    assert sum(found) / 6 == pytest.approx(predicted, rel=0.03)


def test_which_layers_are_predicted():
    assert predicted_gain(AOLLinear(64, 32)) == pytest.approx(64 / (32 + 63 * math.sqrt(64 / math.pi)))
    assert predicted_gain(AOLConv2d(64, 32, 1)) == pytest.approx(predicted_gain(AOLLinear(64, 32)))
    assert predicted_gain(SLLLinear(16, 32)) == predicted_sll_gain(16, 32)
    assert predicted_gain(nn.Linear(4, 4)) is None


# -- profiles ----------------------------------------------------------------------------------------


def test_rates_by_hand():
    assert decay_rate([1.0, 0.3, 0.04, 0.001]) == pytest.approx(0.1)
    assert layers_until(0.09) == 6, "0.09^5 = 5.9e-6, 0.09^6 = 5.3e-7"
    assert layers_until(0.5, 0.25) == 3, "0.25 is not below 0.25"
    assert layers_until(1.0) is None
    assert decay_rate([1.0, 0.0]) > 0


def test_a_known_network():
    """Halved twice: mean squares 1, 1/4, 1/16; the gradient of the sum is 1/4, 1/2, 1."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for layer in net:
        layer.weight.data = torch.eye(4) / 2
    found = profile(net, dict(net.named_children()), torch.ones(3, 4), lambda out: out.sum())
    assert found.names == ["0", "1"]
    assert found.signal == [1, 1 / 4, 1 / 16]
    assert found.gradient == [1 / 16, 1 / 4, 1]
    assert found.gains == [1 / 4, 1 / 4]
    assert decay_rate(found.signal) == pytest.approx(1 / 4)


def test_depth_profiles_of_both_kinds():
    x = torch.randn(256, 64, generator=gen())
    aol = depth_profile(lambda: AOLLinear(64, 64), 8, x, gen(1))
    assert decay_rate(aol.signal) == pytest.approx(64 * predicted_aol_variance(64, 64), rel=0.15)
    assert decay_rate(aol.gradient[::-1]) == pytest.approx(64 * predicted_aol_variance(64, 64), rel=0.15)
    sll = depth_profile(lambda: SLLLinear(64, 64), 8, x, gen(1))
    assert decay_rate(sll.signal) == pytest.approx(predicted_sll_gain(64, 64), rel=0.05)


def test_a_layer_called_twice_and_one_never():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(self.a(x))

    net = Twice()
    assert profile(net, layers_of(net), torch.ones(2, 3), torch.sum).names == ["a", "a, call 2"]


def test_layers_are_the_innermost_owners():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3), nn.Sequential(AOLLinear(3, 2)))
    net.token = nn.Parameter(torch.zeros(1, 3))
    assert list(layers_of(net)) == ["0", "2.0"]
    assert list(layers_of(nn.Linear(2, 2))) == [""]
    assert redraw(net) == 1, "a reset does not reach parametrised weights"


# -- the probe ---------------------------------------------------------------------------------------


def test_fresh_is_the_start_and_now_is_not():
    """Orthogonal weights keep the signal now; drawn afresh the same network loses what is predicted."""
    net = nn.Sequential(*[layer for _ in range(6) for layer in (AOLLinear(64, 64), MaxMin())], AOLLinear(64, 3))
    for layer in layers_of(net).values():
        draw_(layer.weight.data, "orthogonal", gen(2))
    before = [p.clone() for p in net.parameters()]
    x = torch.randn(40, 64, generator=gen())
    found = readings(net, x)
    assert found["now: signal passed on by a layer"] > 0.6
    assert found["fresh: signal passed on by a layer"] < 0.25
    assert found["fresh: depth at which a signal of 1 falls below 1e-06"] < 12
    assert found["fresh: passed on by 2 alone"] == pytest.approx(found["fresh: passed on by 2 alone, predicted"], rel=0.2)
    assert found["layers drawn anew for the fresh start"] == 7
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_layers_without_a_law_are_read_as_they_stand():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3))

        def forward(self, x):
            return x @ self.weight

    found = readings(Own(), torch.randn(8, 3, generator=gen()))
    assert found["layers drawn anew for the fresh start"] == 0
    assert not any(name.startswith("fresh") for name in found)


@pytest.mark.parametrize("spec", ["resnet:layers=(1,1),widths=(4,8)", "timm/test_vit", "conv-stem-vit:dim=16,depth=2,heads=2"])
def test_any_network(spec):
    size = (160, 160) if spec.startswith("timm") else (16, 16)
    net = builder(spec, num_classes=3, in_chans=3, size=size)()
    found = readings(net, torch.rand(4, 3, *size, generator=gen()))
    assert 0 < found["fresh: signal passed on by a layer"] < 100
    assert 0 < found["now: gradient passed back by a layer"] < 100


def test_refusals():
    with pytest.raises(Mistake, match="images=1 must be at least 2"):
        LipschitzInitDecay(images=1)
    with pytest.raises(Mistake, match="at least 2 labelled images, and got 1"):
        readings(nn.Linear(2, 3), torch.ones(1, 2))
    with pytest.raises(Mistake, match="Flatten has no layer with a matrix"):
        readings(nn.Flatten(), torch.ones(2, 3))
    with pytest.raises(Mistake, match="law='norml' is none of normal"):
        draw_(torch.empty(2, 2), "norml", gen())
    with pytest.raises(Mistake, match="SLLConv2d: kernel_size=2 must be odd"):
        SLLConv2d(2, 2, 2)
