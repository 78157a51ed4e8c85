"""Infinitely wide and deep networks by hand: Hermite coefficients, duals, the recursions, the three types, classifiers of few points, the finite layer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.errors import Mistake
from convince.layers.dual_activations import dual_activation, erf, hermite_coeffs, named, relu, sine
from convince.layers.hermite_activation import HermiteActivation, hermite, install, optimal_activation
from convince.layers.infinite_depth_ntk import (
    DIRICHLET,
    InfiniteDepthNtk,
    NTKClassifier,
    dirichlet_bayes,
    dirichlet_points,
    hilbert_estimate,
    log_kernels,
    majority_vote,
    nngp,
    ntk,
    one_nearest,
    taxonomy,
)
from convince.types import Budget

NAMES = ("relu", "erf", "sine:2.676", "optimal:1", "optimal:2", "optimal:3", "hermite:2", "hermite:7", (0.5, 0.5, 0.5, 0.5))


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def pair(xi):
    """Two rows of length 1 with this cosine."""
    return numbers(1.0, 0.0)[None], numbers(xi, math.sqrt(1 - xi * xi))[None]


def octant(n, coordinates, seed=0):
    x = torch.randn(n, coordinates, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs()
    return x / x.norm(dim=1, keepdim=True)


# -- Hermite polynomials and duals -----------------------------------------------------------------


def test_worked_polynomials():
    """At x = 2: h_1 = 2, h_2 = 3/sqrt 2, h_3 = (8 - 6)/sqrt 6."""
    for i, value in enumerate((1, 2, 3 / math.sqrt(2), 2 / math.sqrt(6))):
        assert float(hermite(numbers(2.0), [*[0.0] * i, 1.0])) == pytest.approx(value)
    both = hermite(numbers(2.0, -1.0), [0.5, 0.0, 2.0])
    assert both.tolist() == pytest.approx([0.5 + 6 / math.sqrt(2), 0.5]), "h_2 is 0 at -1"


def test_worked_coefficients():
    """ReLU over sqrt(1/2): c_0^2, c_1^2, c_2^2 = 1/pi, 1/2, 1/(2 pi), c_3 = 0; the cube is 3 h_1 + sqrt 6 h_3, over sqrt 15."""
    found = hermite_coeffs(torch.relu)
    assert len(found) == 21
    assert [c * c for c in found[:4]] == pytest.approx([1 / math.pi, 1 / 2, 1 / (2 * math.pi), 0])
    assert hermite_coeffs(lambda z: z**3, 4) == pytest.approx([0, 3 / math.sqrt(15), 0, math.sqrt(6 / 15), 0])
    assert hermite_coeffs(torch.cos, 5)[1::2] == [0, 0, 0], "an even activation has no odd coefficient at all"
    mine = (0.1, -0.2, 0.3, 0.4)
    length = math.sqrt(sum(c * c for c in mine))
    assert hermite_coeffs(lambda z: hermite(z, mine), 3) == pytest.approx([c / length for c in mine])


@pytest.mark.parametrize(("phi", "dual"), [(torch.relu, relu()), (torch.erf, erf()), (lambda z: torch.sin(math.sqrt(2.676) * z), sine(2.676))])
def test_series_come_to_the_closed_forms(phi, dual):
    series, xi = dual_activation(hermite_coeffs(phi, 60)), torch.linspace(0, 0.9, 10, dtype=torch.float64)
    torch.testing.assert_close(series.value(xi), dual.value(xi), rtol=0, atol=2e-3 if dual.name == "relu" else 1e-8)
    assert float(dual.value(numbers(1.0))) == pytest.approx(1)


def test_a_dual_is_the_mean_over_correlated_gaussians():
    """``chk(xi) = E phi(u) phi(v)`` for normal u and v of correlation xi, by quadrature over both."""
    coefficients, xi = optimal_activation(3), 0.3
    node, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
    weight = weight / weight.sum()
    u, v = node[:, None], xi * node[:, None] + math.sqrt(1 - xi * xi) * node
    mean = (weight[:, None] * weight * hermite(u, coefficients) * hermite(v, coefficients)).sum()
    assert float(mean) == pytest.approx(dual_activation(coefficients).at(xi)[0])


@pytest.mark.parametrize("name", NAMES)
def test_slopes_quotients_and_local_powers(name):
    dual, xi = named(name), torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(dual.value(xi).sum(), xi)
    x = xi.detach()
    torch.testing.assert_close(dual.slope(x), slope)
    torch.testing.assert_close(dual.rest(x) * x**dual.order, dual.value(x))
    torch.testing.assert_close(dual.power(x), x * slope / dual.value(x))
    assert float(dual.power(numbers(0.0))) == dual.order


def test_the_papers_four_duals():
    squares = {d: [c * c for c in optimal_activation(d)] for d in (1, 2, 4, 8)}
    assert squares[1] == pytest.approx([0, 1 / 2, 0, 0, 0, 0, 0, 1 / 2])
    assert squares[2] == pytest.approx([0, 1 / 2, 0, 1 / 2])
    assert squares[4] == pytest.approx([0, 1 / 4, 1 / 2, 1 / 4])
    assert squares[8] == pytest.approx([0, 1 / 16, 7 / 8, 1 / 16])


# -- the three types -------------------------------------------------------------------------------


@given(st.integers(1, 30))
@settings(deadline=None)
def test_the_optimal_activation_is_singular_of_order_d(d):
    found = taxonomy(optimal_activation(d))
    assert found.kind == "singular kernel"
    assert found.alpha == pytest.approx(d)
    assert (found.slope_0, found.slope_1) == pytest.approx((1 / 2, 4) if d == 1 else (2 ** (-d / 2), 2))


@pytest.mark.parametrize(("phi", "alpha"), [("erf", 0.888), ("sine:1", 1.186), ("sine:2.676", 2), ("sine:6.13539", 4), ("sine:13.8258", 8)])
def test_orders_of_the_released_activations(phi, alpha):
    assert taxonomy(phi).alpha == pytest.approx(alpha, abs=1e-3)


def test_other_types():
    assert taxonomy("relu")[:2] == ("majority vote", pytest.approx(1 / math.pi))
    assert taxonomy("hermite:2")[:4] == ("1-nearest neighbour", 0, 0, 2)
    assert taxonomy(hermite_coeffs(torch.tanh)).kind == "singular kernel"
    assert taxonomy(hermite_coeffs(torch.nn.functional.gelu)).kind == "majority vote"
    assert taxonomy("hermite:1").kind == "none", "a linear network stays what it is"


# -- the recursions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "s", "t"), [
    (0, 0.5, 0.5), (1, 0.3125, 0.75), (2, 0.1715087890625, 0.6563720703125), (3, 0.0882768828, 0.4454239552),
])  # fmt: skip
def test_worked_kernels(depth, s, t):
    """The activation for d = 2 at a cosine of 1/2: chk = (xi + xi^3)/2, so S_1 = 5/16 and T_1 = 1/2 (1/2 + 3/8) + 5/16 = 3/4."""
    x, z = pair(0.5)
    assert float(nngp(x, z, "optimal:2", depth)) == pytest.approx(s, abs=1e-10)
    assert float(ntk(x, z, "optimal:2", depth)) == pytest.approx(t, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_logarithms_agree_with_the_plain_recursion(name):
    x, z = octant(6, 4), octant(5, 4, 1)
    log_s, log_t = log_kernels((x @ z.T).clamp(0, 1), name, 3)
    torch.testing.assert_close(log_s.exp(), nngp(x, z, name, 3), rtol=1e-9, atol=1e-300)
    torch.testing.assert_close(log_t.exp(), ntk(x, z, name, 3), rtol=1e-9, atol=1e-300)


@given(st.floats(0.01, 1), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_the_nearest_neighbour_type_in_closed_form(xi, depth):
    """For h_2 exactly ``S_L = xi^(2^L)`` and ``T_L = (2^(L+1) - 1) xi^(2^L)``, far below the smallest float."""
    log_s, log_t = log_kernels(numbers(xi), "hermite:2", depth)
    assert float(log_s) == pytest.approx(2**depth * math.log(xi))
    assert float(log_t) == pytest.approx(2**depth * math.log(xi) + math.log(2 ** (depth + 1) - 1))


@given(st.floats(0, 1), st.sampled_from(NAMES))
@settings(max_examples=40, deadline=None)
def test_deep_logarithms_are_numbers_and_at_most_those_of_1(xi, name):
    log_s, log_t = log_kernels(numbers(xi, 1.0), name, 60)
    assert not bool(torch.isnan(log_s).any() | torch.isnan(log_t).any())
    assert float(log_s.max()) <= 0
    assert log_t[0] <= log_t[1] + 1e-9


def test_a_singular_kernel_has_its_order():
    """Deep down ``S`` goes as ``|x - z|^-alpha``; ``T`` of only 60 layers as if alpha were 2 more, for its first layers multiply slopes of B' = 2."""
    distance = numbers(0.04, 0.005)
    for d in (2, 4):
        slopes = [float(log.diff()) / math.log(8) for log in log_kernels(1 - distance.square() / 2, f"optimal:{d}", 60)]
        assert slopes == pytest.approx([d, d + 2], rel=0.05)


@pytest.mark.parametrize("name", ["erf", "optimal:2", "optimal:4"])
def test_both_kernels_have_one_deep_limit(name):
    """``T_L / (L S_L)`` comes to 1 for every pair, once ``L`` is far above ``1 / (1 - xi)``."""
    depth = 2000
    log_s, log_t = log_kernels(numbers(0.1, 0.5, 0.8), name, depth)
    assert (log_t - log_s - math.log(depth)).exp().tolist() == pytest.approx([1, 1, 1], abs=0.02)


# -- classifiers -----------------------------------------------------------------------------------


def test_the_smoother_is_the_sum_of_the_plain_kernel():
    x, y, z = octant(12, 3), np.array(list("abcabcabcabc")), octant(7, 3, 1)
    found = NTKClassifier("erf", 4).fit(x, y)
    kernel = ntk(z, x, "erf", 4)
    scores = torch.stack([kernel[:, torch.from_numpy(y == c)].sum(1) for c in "abc"], 1)
    torch.testing.assert_close(torch.from_numpy(found.decision_function(z)), scores / kernel.amax(1, keepdim=True))
    assert found.predict(z).tolist() == [list("abc")[i] for i in scores.argmax(1)]


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
def test_interpolation_solves_with_the_kernel(kernel):
    x, y, z = octant(9, 3), np.arange(9) % 2, octant(5, 3, 1)
    found = NTKClassifier("optimal:2", 3, "interpolate", kernel, batch=2).fit(x, y)
    assert found.predict(x).tolist() == y.tolist(), "training points keep their labels"
    plain = {"ntk": ntk, "nngp": nngp}[kernel]
    scores = plain(z, x, "optimal:2", 3) @ torch.linalg.solve(plain(x, x, "optimal:2", 3), torch.eye(2, dtype=torch.float64)[y])
    ours = torch.from_numpy(found.decision_function(z))
    torch.testing.assert_close(ours[:, 1] / ours[:, 0], scores[:, 1] / scores[:, 0], rtol=1e-6, atol=1e-6)


def test_deep_networks_become_what_the_taxonomy_says():
    x, z = octant(300, 3), octant(100, 3, 1)
    y = (torch.arange(300) % 5 < 2).long()
    near = one_nearest(x, y, z)
    assert (NTKClassifier("hermite:2", 40).fit(x, y).predict(z) == near.numpy()).all()
    assert (NTKClassifier((0.3**0.5, 0.5**0.5, 0.2**0.5), 60).fit(x, y).predict(z) == majority_vote(y)).all()
    assert majority_vote(y) == 0
    tuned, hilbert = NTKClassifier("optimal:2", 60).fit(x, y).predict(z), hilbert_estimate(x, y, z).numpy()
    assert (tuned == hilbert).mean() > (near.numpy() == hilbert).mean(), "nearer to the estimate with the same singularity"


def test_worked_hilbert_estimate():
    """On a circle, one point of class 0 against three of class 1 at 0.4: with weights 1/r 10 against 7.5 from 0.1 away."""

    def at(*angles):
        return torch.stack([torch.tensor(angles).double().cos(), torch.tensor(angles).double().sin()], 1)

    y = torch.tensor([0, 1, 1, 1])
    assert hilbert_estimate(at(0.1, 0.4, 0.4, 0.4), y, at(0.0)).tolist() == [0]
    assert hilbert_estimate(at(0.2, 0.4, 0.4, 0.4), y, at(0.0)).tolist() == [1], "5 against 7.5"
    assert hilbert_estimate(at(0.2, 0.4, 0.4, 0.4), y, at(0.0), dimension=2).tolist() == [0], "25 against 18.75"
    assert hilbert_estimate(at(0.2, 0.4, 0.4, 0.4), y, at(0.4)).tolist() == [1], "a point met exactly decides"


def test_worked_bayes_classifier():
    """(1, 2) against (2, 1): densities 2 (1 - p) and 2 p, so class 1 where 0.4 (1 - p) > 0.6 p, that is p < 0.4."""
    p = numbers(0.1, 0.39, 0.41, 0.9)
    assert dirichlet_bayes(3 * torch.stack([p, 1 - p], 1)).tolist() == [1, 1, 0, 0]
    for d in DIRICHLET:
        x, y = dirichlet_points(d, 400, torch.Generator().manual_seed(d))
        assert x.shape == (400, d + 1)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(400, dtype=torch.float64))
        assert abs(float(y.double().mean()) - 0.4) < 0.1
        assert (dirichlet_bayes(x) == y).double().mean() > 0.6


def test_the_study_reads_sets_of_pictures(capsys):
    found = InfiniteDepthNtk("digits", ("optimal:8", "hermite:2"), depth=20, test=100, seeds=1).run(Budget(300, "images"))
    rows = {r["classifier"]: r["accuracy"] for r in found["table"]}
    assert rows["hermite:2"] == rows["1-nearest neighbour"] > 0.85
    assert rows["majority vote"] < 0.3
    assert "300 training points" in capsys.readouterr().out
    assert "bayes" not in rows


# -- the finite layer ------------------------------------------------------------------------------


def test_a_wide_layer_has_the_dual_as_its_kernel():
    """Rows of N(0, 1) weights: the mean product over 40,000 units comes to ``chk`` of the inputs' cosine."""
    x, z = pair(0.6)
    weight = torch.randn(40_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    act = HermiteActivation(optimal_activation(2), limit=math.inf)
    mean = (act(x @ weight.T) * act(z @ weight.T)).mean()
    assert float(mean) == pytest.approx((0.6 + 0.6**3) / 2, abs=0.05)


def test_the_layer_by_hand():
    act = HermiteActivation((0.0, 1.0, 1.0), normalise=False, limit=2.0)
    assert act(torch.tensor([[1.0, 2.0, 5.0]])).tolist() == [pytest.approx([1, 2 + 3 / math.sqrt(2), 2 + 3 / math.sqrt(2)])]
    scaled = HermiteActivation((0.0, 1.0))(torch.tensor([[3.0, 4.0], [-0.1, 0.1]]))
    torch.testing.assert_close(scaled, torch.tensor([[3.0, 4.0], [-1.0, 1.0]]) / torch.tensor([[12.5**0.5], [1.0]]), rtol=0, atol=1e-4)


def test_it_takes_the_rectifiers_places_and_gives_them_back():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
    done = install(net, dim=4, skip=("1",))
    assert done.places == ["2.1"]
    assert net[2][1].coefficients == optimal_activation(4)
    done.undo()
    assert type(net[2][1]) is nn.ReLU


# -- refusals --------------------------------------------------------------------------------------


def test_wrong_settings_are_refused():
    refusals = {"rellu": "'relu'", "hermite:x": "polynomial's degree", "hermite:-1": "1, 2", "sine:x": "could not convert", "sine:0": "above 0 and below 700"}
    for wrong, words in refusals.items():
        with pytest.raises(Mistake, match=words):
            named(wrong)
    for d in (0, -1):
        with pytest.raises(Mistake, match="dimension is at least 1"):
            optimal_activation(d)
    with pytest.raises(Mistake, match="not all 0"):
        dual_activation([0.0, 0.0])
    with pytest.raises(Mistake, match="mean square under N"):
        hermite_coeffs(torch.zeros_like)
    with pytest.raises(Mistake, match="one of c_1, c_2"):
        HermiteActivation((1.0, 0.0))
    with pytest.raises(Mistake, match=r"no nn\.ReLU module"):
        install(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(Mistake, match="dirichlet:1, dirichlet:2"):
        InfiniteDepthNtk("dirichlet:3").run(Budget(10, "images"))
    with pytest.raises(Mistake, match="seeds=0"):
        InfiniteDepthNtk(seeds=0)


def test_wrong_points_are_refused():
    x, y = octant(40, 2), np.arange(40) % 2
    with pytest.raises(Mistake, match="no negative coordinate"):
        NTKClassifier().fit(-x, y)
    with pytest.raises(Mistake, match="40 rows but 39 labels"):
        NTKClassifier().fit(x, y[:-1])
    with pytest.raises(Mistake, match="rows have 3 numbers, the training rows 2"):
        NTKClassifier().fit(x, y).predict(octant(2, 3))
    with pytest.raises(Mistake, match="mode='smooth'"):
        NTKClassifier(mode="smooth").fit(x, y)
    with pytest.raises(Mistake, match="depth=1 is too small"):
        NTKClassifier(depth=1, mode="interpolate").fit(x, y)  # a cubic in two coordinates tells no more than 6 points apart
    with pytest.raises(Mistake, match="two are equal"):
        NTKClassifier(depth=30, mode="interpolate").fit(x[[0, 0, 1]], y[:3])
    with pytest.raises(Mistake, match="more than hermite:7 can be reckoned to"):
        log_kernels(numbers(1.0), "hermite:7", 1000)
