"""Residual expansion by hand: the worked tower, exact sums of linear ones, the order of what is missed, growth by scale; and scaled branches."""

import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.diagnose.residual_expansion import (
    ResidualExpansion,
    jacobian_norm,
    path_terms,
    residual_expansion,
    signal_growth,
    tower,
    trunk,
)
from convince.errors import Mistake
from convince.fit.weights import edit_by_name
from convince.layers.scaled_residual import ScaledResidual, Unnormalised, branch_ends, install, scale


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def matrices(n, d, seed=0):
    return [torch.randn(d, d, generator=gen(seed + i), dtype=torch.float64) / math.sqrt(d) for i in range(n)]


def linear(n, d, seed=0):
    return [lambda x, m=m: x @ m.T for m in matrices(n, d, seed)]


def bent(act, n=8, d=32, seed=0):
    """Branches W2 act(W1 x)."""
    pairs = zip(matrices(n, d, seed), matrices(n, d, seed + 100), strict=True)
    return [lambda x, a=a, b=b: act(x @ a.T) @ b.T for a, b in pairs]


# -- the expansion -----------------------------------------------------------------------------------


def test_the_worked_tower():
    """F_1 = 3, F_2 = 5, lam = 0.1: 1.3 * 1.5 = 1.95 = 1 + 0.8 + 0.15."""
    branches, x = [lambda z: 3 * z, lambda z: 5 * z], torch.ones(1, 1, dtype=torch.float64)
    states = tower(branches, x, 0.1)
    assert float(states[-1]) == pytest.approx(1.95)
    assert [float(t) for t in residual_expansion(branches, x, 3, 0.1)] == pytest.approx([1, 0.8, 0.15, 0])
    assert [float(t) for t in path_terms(branches, states, x, lam=0.1)] == pytest.approx([1, 0.8, 0.15])


def test_a_linear_tower_is_its_paths():
    branches, x = linear(8, 12), torch.randn(3, 12, generator=gen(9), dtype=torch.float64)
    states = tower(branches, x, 0.7)
    terms = path_terms(branches, states, x, lam=0.7)
    assert len(terms) == 9
    torch.testing.assert_close(sum(terms), states[-1], atol=1e-10, rtol=0)
    by_hand = 0.7**2 * sum(branches[j](branches[i](x)) for i, j in itertools.combinations(range(8), 2))
    torch.testing.assert_close(terms[2], by_hand, atol=1e-10, rtol=0)
    for order in range(4):
        for a, b in zip(residual_expansion(branches, x, order, 0.7), terms, strict=False):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    for a, b in zip(path_terms(branches, states, x, 3, 0.7), terms[:4], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@given(st.integers(1, 12))
@settings(max_examples=12, deadline=None)
def test_there_are_binomially_many_paths(n):
    """Branches that are the identity: binomial(n, k) paths of length k, 2^n in all."""
    x = torch.ones(1, 1, dtype=torch.float64)
    branches = [lambda z: z] * n
    terms = path_terms(branches, tower(branches, x), x)
    assert [float(t) for t in terms] == [math.comb(n, k) for k in range(n + 1)]


@pytest.mark.parametrize(("act", "order", "low", "high"), [
    (F.gelu, 1, 1.9, 2.1), (F.gelu, 2, 2.9, 3.1), (torch.tanh, 2, 2.9, 3.1), (torch.tanh, 3, 3.9, 4.1), (F.gelu, 3, 3.9, 4.1), (F.relu, 2, 2.4, 2.9),
])  # fmt: skip
def test_what_is_missed_is_of_the_next_order(act, order, low, high):
    """The slope of log error against log lam, from 1/8 to 1/256."""
    branches, x = bent(act), torch.randn(512, 32, generator=gen(7), dtype=torch.float64)
    at = [2.0**-k for k in range(3, 9)]
    logs = [math.log(float((tower(branches, x, lam)[-1] - sum(residual_expansion(branches, x, order, lam))).norm())) for lam in at]
    u = torch.tensor(at).log()
    v = torch.tensor(logs)
    slope = float(((u - u.mean()) * (v - v.mean())).sum() / (u - u.mean()).square().sum())
    assert low < slope < high


def test_the_derivative_is_the_sum_over_paths():
    branches, x = bent(F.gelu), torch.randn(4, 32, generator=gen(7), dtype=torch.float64)
    v = torch.randn(4, 32, generator=gen(8), dtype=torch.float64)
    whole = torch.func.jvp(lambda z: tower(branches, z)[-1], (x,), (v,))[1]
    torch.testing.assert_close(sum(path_terms(branches, tower(branches, x), v)), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("lam", "depth"), [(lam, n) for lam in ("1", "1/sqrt(n)", "1/n") for n in (4, 16, 64)])
def test_growth_at_the_start(lam, depth):
    """W1 of variance 2/width, W2 of 1/width keep the variance, so it grows (1 + lam^2)^n: 4, 256, 4e9 at lam = 1, below 1.7 otherwise."""
    value = 1.0 if lam == "1" else scale(lam, depth)
    weights = [(torch.randn(64, 64, generator=gen(i)) * math.sqrt(2 / 64), torch.randn(64, 64, generator=gen(i + 1000)) / 8) for i in range(depth)]
    branches = [lambda x, a=a, b=b: F.relu(x @ a.T) @ b.T for a, b in weights]
    grown = signal_growth(tower(branches, torch.randn(256, 64, generator=gen(5)), value))
    assert len(grown) == depth + 1
    expected = (1 + value**2) ** (depth / 2)
    assert math.log(grown[-1] / expected) == pytest.approx(0, abs=0.1 + 0.02 * depth * value**2)


def test_geometric_complexity_by_hand():
    """Scores W x: the squared Frobenius norm of W, whatever x; with more scores than draws an estimate near it."""
    w = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert jacobian_norm(lambda x: x @ w.T, torch.rand(5, 2)) == pytest.approx(25)
    wide = torch.randn(400, 30, generator=gen())
    estimate = jacobian_norm(lambda x: x @ wide.T, torch.rand(2, 30), gen(1), draws=200)
    assert estimate == pytest.approx(float(wide.square().sum()), rel=0.1)
    with pytest.raises(Mistake, match="give a generator for the estimate"):
        jacobian_norm(lambda x: x @ wide.T, torch.rand(2, 30))


# -- the probe ---------------------------------------------------------------------------------------


def test_trunks_are_found():
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        resnet = builder("resnet:layers=(3,2),widths=(4,8)", num_classes=3, in_chans=1, size=(8, 8))().eval()
        assert trunk(resnet, x).names == ["layer1.0", "layer1.1", "layer1.2"]
        assert trunk(resnet, x, ("layer2.*",)).names == ["layer2.1"]
        vit = builder("conv-stem-vit:dim=16,depth=2,heads=2", num_classes=3, in_chans=1, size=(8, 8))().eval()
        found = trunk(vit, x)
        assert found.names == ["blocks.0", "blocks.1"]
        torch.testing.assert_close(tower(found.branches, found.x)[-1], vit.blocks(found.x))
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3))
        assert trunk(plain, x, ("1", "2")).names == ["1", "2"]


def test_a_linear_trunk_misses_nothing():
    """Two linear layers named as blocks: the expansion to order 2 is the output itself."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3))
    found = ResidualExpansion(blocks=("1", "2")).probe(net, torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    values = {r.name: r.value for r in found.readings}
    assert values["missed by terms up to 2"] < 1e-5
    assert values["missed by terms up to 1"] > 0.01
    assert len(found.figures[1].values) == 3


def test_refusals():
    x, y = torch.rand(4, 6), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(Mistake, match="residual-expansion: Sequential has no residual blocks that it knows"):
        ResidualExpansion().probe(nn.Sequential(nn.Linear(6, 2), nn.ReLU()), x, y)
    with pytest.raises(Mistake, match="has no residual blocks named 9"):
        ResidualExpansion(blocks=("9",)).probe(nn.Sequential(nn.Linear(6, 2)), x, y)
    with pytest.raises(Mistake, match="order 1 to 3"):
        ResidualExpansion(order=4)
    with pytest.raises(Mistake, match="path_terms gives all orders"):
        residual_expansion([], x, 4)
    with pytest.raises(Mistake, match="1 states for 2 branches"):
        path_terms([torch.tanh, torch.tanh], [x], x)
    with pytest.raises(Mistake, match="input is zero"):
        signal_growth([torch.zeros(2, 2)])


# -- scaled residual ---------------------------------------------------------------------------------


def test_scales_by_name():
    assert scale("1/n", 16) == 1 / 16
    assert scale("1/sqrt(n)", 16) == 1 / 4
    assert scale(0.3, 16) == 0.3
    for wrong in ("1/m", -1.0, math.nan, True):
        with pytest.raises(Mistake, match=r"scaled-residual: lam=.* must be '1/n'"):
            scale(wrong, 16)


def test_branches_are_multiplied_before_the_addition():
    net = builder("resnet:layers=(2,1),widths=(4,8)", num_classes=3, in_chans=1, size=(8, 8))().eval()
    x = torch.rand(2, 4, 8, 8, generator=gen())
    block = net.layer1[0]
    branch = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x)))))
    with install(net) as done:
        assert done.places == ["layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2"]
        torch.testing.assert_close(block(x), (branch / 3 + x).relu())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "resnetv2_18"])
def test_silent_branches_leave_the_skips(name):
    """SkipInit begins with every branch at 0: a block that keeps its shape hands its input on; only lam gets a gradient."""
    net = timm.create_model(name, num_classes=3)
    done = install(net, lam=0, learn=True)
    assert done.added == len(done.places) == len(branch_ends(net))
    x = torch.rand(2, 3, *((160, 160) if name == "test_vit" else (64, 64)))
    with torch.no_grad():
        net.eval()
        found = trunk(net, x)
        torch.testing.assert_close(tower(found.branches, found.x)[-1], found.x)
    net(x).sum().backward()
    assert all(m.lam.grad is not None for m in net.modules() if isinstance(m, ScaledResidual))


def test_a_run_keeps_the_first_lam():
    """Weights by name are drawn anew when a layer is put in; a learned lam begins where it was told to."""
    net = builder("resnet:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=1, size=(8, 8))()
    edit_by_name(net, lambda model: install(model, lam="1/sqrt(n)", learn=True), 3)
    assert [p.item() for name, p in net.named_parameters() if name.endswith("scaled_residual.lam")] == pytest.approx([math.sqrt(0.5)] * 2)
    assert "lam=0.707107, learned" in repr(net)


def test_blocks_without_an_addition_are_left_alone():
    assert branch_ends(timm.create_model("test_efficientnet")) == []
    ends = [name for name, _ in branch_ends(builder("mobilenetv2-mini", num_classes=3, in_chans=1, size=(28, 28))())]
    assert ends == ["blocks.0.project.1", "blocks.2.project.1", "blocks.4.project.1"]


def test_norms_taken_away_keep_scale_and_shift():
    net = builder("resnet:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=1, size=(8, 8))().eval()
    names = {name for name, _ in net.named_parameters()}
    with torch.no_grad():
        net.bn1.weight.fill_(2)
        net.bn1.bias.fill_(3)
    with install(net, norms=False):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        assert {name for name, _ in net.named_parameters()} == names
        torch.testing.assert_close(net.bn1(torch.ones(1, 4, 2, 2)), torch.full((1, 4, 2, 2), 5.0))
        assert isinstance(net.layer1[0].bn2, Unnormalised)
    assert isinstance(net.bn1, nn.BatchNorm2d)


def test_the_layer_refuses():
    net = builder("resnet:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=1, size=(8, 8))()
    with pytest.raises(Mistake, match="lam=0 silences every branch for good"):
        install(net, lam=0)
    with pytest.raises(Mistake, match="scaled-residual: PlainCNN has no residual branches"):
        install(builder("plain-cnn:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=1, size=(8, 8))())
    with pytest.raises(Mistake, match="no batch normalisation to take away"):
        install(timm.create_model("test_vit"), norms=False)
