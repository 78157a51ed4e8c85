"""Wide CNN learnability by hand: worked kernels, finite networks that have them, targets of patches, regression and exponents."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.diagnose.wide_cnn_learnability import (
    WideCnnLearnability,
    fit_exponent,
    fully_connected_ntk,
    gaussian_target,
    hierarchical_ntk,
    kernel_spectrum,
    krr,
    learning_curve,
    nested,
    patch_spheres,
    prepared,
    tree_kernels,
)
from convince.errors import Mistake
from convince.layers.infinite_depth_ntk import ntk


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def circles(*angles):
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64).flatten()[None]


# -- kernels -----------------------------------------------------------------------------------------


def test_worked_kernel():
    """Two circles with cosines 1 and 1/2: S = (1 + 0.608998)/2, T = (2 + 0.608998 + 1/2 * 2/3)/2, then k1(S) + T k0(S)."""
    x, z = circles(0, 0), circles(0, math.pi / 3)
    s1, t1 = tree_kernels(x, z, (2, 2), "nngp")[0], tree_kernels(x, z, (2, 2))[0]
    assert float(s1) == pytest.approx(0.804499, abs=1e-6)
    assert float(t1) == pytest.approx(1.471166, abs=1e-6)
    assert float(hierarchical_ntk(x, z, (2, 2))) == pytest.approx(2.004054, abs=1e-6)
    assert float(hierarchical_ntk(x, x, (2, 2))) == pytest.approx(3)


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_every_prefix_is_the_shorter_networks_kernel(kind):
    x, z = patch_spheres(5, 8, 2, gen()), patch_spheres(4, 8, 2, gen(1))
    whole = tree_kernels(x, z, (2, 2, 2, 2), kind)
    for length in range(1, 5):
        torch.testing.assert_close(whole[length - 1], hierarchical_ntk(x, z, (2,) * length, kind))


def test_fully_connected_is_the_ntk_of_rows_of_length_1():
    x = F.normalize(torch.randn(6, 5, generator=gen(), dtype=torch.float64), dim=1)
    torch.testing.assert_close(fully_connected_ntk(7 * x, x, 3), ntk(x, x, "relu", 3))


def test_a_wide_network_has_the_kernel():
    """Two layers with filters 2 and 2, random outputs: the products of its gradients come to the kernel, those of its outputs to "nngp"."""
    x, z, width, seeds = circles(0.3, 1.9), circles(0.8, 2.2), 300, 40
    products, outputs = [], []
    for seed in range(seeds):
        g = gen(seed)
        weights = [torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((width, 2), (width, width, 2), (width,))]

        def net(rows, weights=weights):
            first = (rows.view(2, 2) @ weights[0].T).relu() * math.sqrt(2)  # [2 patches, width]
            second = torch.einsum("wcp,pc->w", weights[1], first).div(math.sqrt(2 * width)).relu() * math.sqrt(2)
            return (second * weights[2]).sum() / math.sqrt(width)

        a, b = net(x), net(z)
        pairs = zip(torch.autograd.grad(a, weights), torch.autograd.grad(b, weights), strict=True)
        products.append(float(sum((u * v).sum() for u, v in pairs)))
        outputs.append(float((a * b).detach()))
    assert sum(products) / seeds == pytest.approx(float(hierarchical_ntk(x, z, (2, 2))), rel=0.06)
    spread = torch.tensor(outputs).std() / seeds**0.5
    assert abs(sum(outputs) / seeds - float(hierarchical_ntk(x, z, (2, 2), "nngp"))) < 4 * float(spread)


@given(st.integers(0, 50), st.sampled_from([(2,), (2, 2), (4, 2), (2, 2, 2)]), st.sampled_from(["ntk", "nngp"]))
@settings(max_examples=25, deadline=None)
def test_kernels_are_symmetric_positive_and_bounded(seed, sizes, kind):
    x = patch_spheres(9, 8, 2, gen(seed))
    k = hierarchical_ntk(x, x, sizes, kind)
    torch.testing.assert_close(k, k.T)
    assert float(kernel_spectrum(k).min()) > -1e-9
    top = len(sizes) + 1 if kind == "ntk" else 1
    torch.testing.assert_close(k.diagonal(), torch.full((9,), float(top), dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert float(k.abs().max()) <= top + 1e-6


def test_the_order_of_patches_matters_beyond_the_first_level_only():
    x = patch_spheres(6, 8, 2, gen())
    mixed = x.unflatten(1, (8, 2))[:, [0, 4, 2, 6, 1, 5, 3, 7]].flatten(1)
    torch.testing.assert_close(hierarchical_ntk(x, x, (2,)), hierarchical_ntk(mixed, mixed, (2,)))
    assert not torch.allclose(hierarchical_ntk(x, x, (2, 2)), hierarchical_ntk(mixed, mixed, (2, 2)))


# -- targets and regression --------------------------------------------------------------------------


def test_targets_have_their_covariance_and_are_sums_over_patches():
    x = patch_spheres(4, 4, 2, gen())
    k = hierarchical_ntk(x, x, (2,))
    draws = torch.cat([gaussian_target(k, gen(seed)) for seed in range(3000)], 1)
    torch.testing.assert_close(draws @ draws.T / 3000, k, rtol=0, atol=0.2)
    a, b, c, d = (torch.cat(pair)[None] for pair in ((x[0, :2], x[0, 2:4]), (x[1, :2], x[0, 2:4]), (x[0, :2], x[1, 2:4]), (x[1, :2], x[1, 2:4])))
    corners = torch.cat([a, b, c, d])
    y = gaussian_target(hierarchical_ntk(corners, corners, (2,)), gen())[:, 0]
    assert float(y[0] - y[1] - y[2] + y[3]) == pytest.approx(0, abs=1e-3), "f(a) + g(b) has no interaction"


def test_regression_by_hand():
    """k = [[2, 1], [1, 2]], y = (3, 3): weights 1, 1; at a point with kernels (1, 0) it says 1. With ridge 1 the weights are 3/4."""
    k, y, cross = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.full((2, 1), 3.0), torch.tensor([[1.0, 0.0]])
    assert float(krr(k, y, cross)) == pytest.approx(1)
    assert float(krr(k, y, cross, 1.0)) == pytest.approx(0.75)
    with pytest.raises(Mistake, match="the kernel of these 2 points cannot be inverted with ridge=0"):
        krr(torch.ones(2, 2), y, cross)


def test_curves_and_exponents_by_hand():
    assert fit_exponent([(n, 7 * n**-0.4) for n in (10, 20, 40)]) == pytest.approx(0.4)
    y = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
    assert learning_curve(torch.eye(4), y, [1, 2], 2) == [(1, 1.0), (2, 1.0)], "unrelated points tell nothing"
    assert learning_curve(torch.eye(4), y, [2], 2, centre=True) == [(2, 1.0)]
    known = torch.tensor([[1.0, 0, 0, 0.5], [0, 1, 0.5, 0], [0, 0.5, 1, 0], [0.5, 0, 0, 1]])
    ((_, error),) = learning_curve(known, torch.tensor([[2.0], [4.0], [2.0], [1.0]]), [2], 2)
    assert error == pytest.approx(0), "2 and 1 are half of 4 and of 2"


def test_spectrum_by_hand():
    assert kernel_spectrum(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).tolist() == pytest.approx([1.5, 0.5])


def test_local_targets_are_learnt_sooner_by_the_local_network():
    x = patch_spheres(600, 4, 2, gen())
    kernels = tree_kernels(x, x, (2, 2, 2))
    y = gaussian_target(kernels[0], gen(1))
    local, dense = (learning_curve(k, y, [50, 200, 400], 200, 1e-9) for k in (kernels[-1], fully_connected_ntk(x, x, 3)))
    assert local[-1][1] < 0.8 * dense[-1][1]
    assert fit_exponent(local) > 0.4


# -- images ------------------------------------------------------------------------------------------


def test_patches_of_images_stand_together():
    """A 4x4 image numbered by rows: its first four numbers are the first 2x2 patch, the next those to its right."""
    rows, sizes = nested(torch.arange(16.0).view(1, 1, 4, 4))
    assert rows.int().tolist() == [[0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]]
    assert sizes == [4, 4]
    colour, sizes = nested(torch.stack([torch.arange(4.0).view(2, 2), 10 + torch.arange(4.0).view(2, 2)])[None])
    assert colour.int().tolist() == [[0, 10, 1, 11, 2, 12, 3, 13]]
    assert sizes == [8]


@pytest.mark.parametrize(("side", "want"), [((28, 28), 16), ((8, 8), 8), ((13, 9), 8), ((224, 100), 16)])
def test_images_are_brought_to_a_power_of_two(side, want):
    x = prepared(torch.rand(3, 2, *side, generator=gen()))
    assert x.shape == (3, 2, want, want)
    assert x.mean((0, 2, 3)).abs().max() < 1e-12


def test_the_probe_finds_what_the_scores_depend_on():
    """Scores that are sums of functions of the directions of 2x2 patches, in images of noise: the kernel of those patches is best by far."""

    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, generator=gen(3)))

        def forward(self, x):
            patches = F.unfold(x - x.mean(), 2, stride=2)
            return (self.weight @ F.normalize(patches, dim=1)).relu().sum(2)

    x = torch.rand(256, 1, 4, 4, generator=gen())
    found = {r.name: r.value for r in WideCnnLearnability().probe(Local(), x, torch.arange(256) % 2).readings}
    small = found["scores, patches of 2x2 px: error at 192 images"]
    assert small < 0.9 * found["scores, patches of 4x4 px: error at 192 images"]
    assert found["scores: best local over fully connected"] < 0.5
    assert found["labels, fully connected: error at 192 images"] > 0.8, "labels at random cannot be learnt"


def test_refusals():
    x = patch_spheres(3, 4, 2, gen())
    with pytest.raises(Mistake, match=r"sizes=\(3,\) must be at least 1 and multiply to a divisor"):
        hierarchical_ntk(x, x, (3,))
    with pytest.raises(Mistake, match="kind='rf' must be"):
        hierarchical_ntk(x, x, (2,), "rf")
    with pytest.raises(Mistake, match="images=2, draws=3"):
        WideCnnLearnability(images=2)
    net, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.zeros(8, dtype=torch.long)
    with pytest.raises(Mistake, match="at least 6 images"):
        WideCnnLearnability().probe(net, torch.rand(3, 1, 4, 4), y[:3])
    with pytest.raises(Mistake, match="all are of class 0"):
        WideCnnLearnability().probe(net, torch.rand(8, 1, 4, 4), y)
