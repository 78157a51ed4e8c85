"""The Poincaré ball by hand: maps, sums, transport, means; the layers against the literal formulas; what the two initialisations do."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.errors import Mistake
from convince.layers.poincare import (
    PoincareBall,
    PoincareConv2d,
    PoincareLinear,
    PoincareMidpointBN2d,
    beta_ratio,
    conformal,
    dist,
    expmap,
    expmap0,
    frechet_mean,
    fully_connected,
    gyration,
    logmap,
    logmap0,
    midpoint,
    mobius_add,
    tangent_connected,
    transp,
)

C = 0.7


def points(seed: int, n: int = 64, d: int = 5, spread: float = 0.6) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return expmap0(spread * torch.randn(n, d, generator=gen, dtype=torch.float64), C)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.7, 1.0, 2.5]))
def test_the_maps_are_inverse(seed, c):
    v = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / (2 * math.sqrt(c))
    torch.testing.assert_close(logmap0(expmap0(v, c), c), v, rtol=1e-6, atol=1e-6)
    x = expmap0(v.flip(0) / 2, c)
    step = v / conformal(x, c)
    torch.testing.assert_close(logmap(x, expmap(x, step, c), c), step, rtol=1e-6, atol=1e-6)


def test_the_step_at_the_origin_is_twice_as_long_as_it_looks():
    """``lambda_0 = 2``: exp at the origin is expmap0, and the distance to the origin is twice the tangent vector's length."""
    v = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros_like(v)
    torch.testing.assert_close(expmap(zero, v, C), expmap0(v, C))
    torch.testing.assert_close(logmap(zero, expmap0(v, C), C), v)
    torch.testing.assert_close(dist(zero, expmap0(v, C), C)[:, 0], 2 * v.norm(dim=1))


def test_mobius_addition():
    x, y = points(0), points(1)
    torch.testing.assert_close(mobius_add(x, -x, C), torch.zeros_like(x), rtol=0, atol=1e-15)
    torch.testing.assert_close(mobius_add(-x, mobius_add(x, y, C), C), y)
    torch.testing.assert_close(mobius_add(torch.zeros_like(y), y, C), y)
    a, b = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    assert float(mobius_add(a, b, 1.0)) == pytest.approx(0.8 / 1.15)  # on a line: the sum of velocities, (a + b) / (1 + c a b)
    torch.testing.assert_close(mobius_add(x, y, 1e-12), x + y)


def test_distance_is_that_of_the_metric():
    x, y = points(2), points(3)
    by_cosh = torch.acosh(1 + 2 * C * (x - y).square().sum(1) / ((1 - C * x.square().sum(1)) * (1 - C * y.square().sum(1)))) / math.sqrt(C)
    torch.testing.assert_close(dist(x, y, C)[:, 0], by_cosh)
    step = logmap(x, y, C)
    torch.testing.assert_close((step * conformal(x, C)).norm(dim=1), by_cosh)


def test_gyration_is_what_the_sum_lacks_of_associativity():
    u, v, w = points(4), points(5), points(6)
    by_definition = mobius_add(-mobius_add(u, v, C), mobius_add(u, mobius_add(v, w, C), C), C)
    torch.testing.assert_close(gyration(u, v, w, C), by_definition)
    torch.testing.assert_close(gyration(u, v, w, C).norm(dim=1), w.norm(dim=1))


def test_transport_keeps_lengths_and_angles_and_carries_a_geodesic_along_itself():
    x, y = points(7), points(8)
    v, w = torch.randn(64, 5, dtype=torch.float64), torch.randn(64, 5, dtype=torch.float64)
    a, b = transp(x, y, v, C), transp(x, y, w, C)
    torch.testing.assert_close((a * b).sum(1, True) * conformal(y, C) ** 2, (v * w).sum(1, True) * conformal(x, C) ** 2)
    torch.testing.assert_close(transp(x, y, logmap(x, y, C), C), -logmap(y, x, C))


def test_midpoint_by_hand_and_through_the_klein_model():
    line = torch.tensor([[0.5], [0.0]], dtype=torch.float64)
    assert float(midpoint(line, 1.0)) == pytest.approx(0.26795, abs=1e-5)  # 2 - sqrt(3)
    x = points(9)
    klein = 2 * x / (1 + C * x.square().sum(1, True))
    gamma = (1 - C * klein.square().sum(1, True)) ** -0.5
    mean = (gamma * klein).sum(0) / gamma.sum(0)
    torch.testing.assert_close(midpoint(x, C)[0], mean / (1 + (1 - C * mean.square().sum()).sqrt()))


def test_midpoint_is_nearly_the_frechet_mean():
    x = points(10, n=512)
    exact, near = frechet_mean(x, C, tol=1e-12), midpoint(x, C)

    def spread(m):
        return float(dist(m, x, C).square().sum())

    assert spread(exact) <= spread(near) < 1.05 * spread(exact)
    for direction in torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        assert spread(exact) < spread(expmap(exact, 0.01 * direction[None], C))


def test_the_frechet_mean_passes_its_gradient():
    x = (0.2 * points(11, n=6, d=2)).requires_grad_(True)
    (got,) = torch.autograd.grad(frechet_mean(x, C, tol=1e-12)[0, 0], x)
    moved = x.detach().clone()
    moved[2, 0] += 1e-5
    slope = float(frechet_mean(moved, C, tol=1e-13)[0, 0] - frechet_mean(x.detach(), C, tol=1e-13)[0, 0]) / 1e-5
    assert float(got[2, 0]) == pytest.approx(slope, rel=0.02)  # to first order in the curvature


def test_a_square_layer_that_starts_from_the_identity_returns_its_input():
    layer = PoincareLinear(2, 2, PoincareBall(0.1)).double()
    v = torch.tensor([[0.6, -0.3]], dtype=torch.float64)
    torch.testing.assert_close(layer(v), v)
    torch.testing.assert_close(fully_connected(expmap0(v, 0.1), layer.weight, layer.bias, 0.1), expmap0(v, 0.1))


def test_the_short_form_is_the_literal_one():
    gen = torch.Generator().manual_seed(0)
    v, z, r = (0.4 * torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((7, 5), (4, 5), (4,)))
    literal = logmap0(fully_connected(expmap0(v, C), z, r, C), C)
    short = tangent_connected(v @ z.T, v.norm(dim=1, keepdim=True), z.norm(dim=1), r, C)
    torch.testing.assert_close(short, literal)


def test_outputs_are_signed_distances_to_hyperplanes():
    """``|v_k|`` is ``2 |z_k|`` times the distance to the hyperplane through the point at distance ``2 r`` along ``z_k`` (HNN++): nearest point by search."""
    z, x, r = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([[0.2, 0.4]], dtype=torch.float64), 0.3
    p = expmap0(torch.tensor([[r, 0.0]], dtype=torch.float64), 1.0)
    along = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    on_plane = expmap(p, torch.linspace(-2, 2, 400_001, dtype=torch.float64)[:, None] * along, 1.0)
    nearest = float(dist(on_plane, x, 1.0).min())
    y = fully_connected(x, z[None], torch.tensor([r], dtype=torch.float64), 1.0)
    w = 2 * y / (1 - y.square())  # y = w / (1 + sqrt(1 + w^2))
    assert abs(float(torch.asinh(w))) == pytest.approx(2 * nearest, rel=1e-6)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2)])
def test_convolution_is_one_linear_map_for_all_patches(kernel, stride):
    layer = PoincareConv2d(3, 4, kernel, PoincareBall(C), stride, init="normal").double()
    with torch.no_grad():
        layer.bias.normal_(std=0.3)
    v = torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    patches = F.unfold(v * beta_ratio(3, kernel**2), kernel, padding=kernel // 2, stride=stride).transpose(1, 2).flatten(0, 1)
    rows = logmap0(fully_connected(expmap0(patches, C), layer.weight.flatten(1), layer.bias, C), C)
    torch.testing.assert_close(layer(v), rows.unflatten(0, (2, -1)).transpose(1, 2).reshape(layer(v).shape))


def test_the_identity_copies_taps():
    layer = PoincareConv2d(3, 12, 3, PoincareBall(0.1)).double()
    assert float(layer.weight.detach()[10, 1, 0, 1]) == 0.5, "output 10 copies tap 1 of channel 1"
    assert int(layer.weight.count_nonzero()) == 12
    square = PoincareConv2d(4, 4, 1, PoincareBall(0.1)).double()
    v = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(square(v), v)


def test_beta_ratio_keeps_the_length_of_a_concatenation():
    from scipy.special import beta

    assert beta_ratio(16, 9) == pytest.approx(beta(72, 0.5) / beta(8, 0.5))
    assert beta_ratio(16, 9) == pytest.approx(1 / 3, abs=0.01)
    assert beta_ratio(5, 1) == 1


def test_batch_norm_is_the_literal_formula_and_centres():
    bn = PoincareMidpointBN2d(3, PoincareBall(C)).double()
    v = 0.5 * torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        bn.shift.copy_(torch.tensor([0.3, -0.2, 0.5]))
        bn.gain.fill_(2.0)
    x, b = expmap0(v, C, 1), expmap0(bn.shift.view(1, -1, 1, 1), C, 1)
    m = midpoint(x, C, 1, (0, 2, 3))
    var = dist(m, x, C, 1).square().mean()
    literal = expmap(b, (2.0 / (var + 1e-6)).sqrt() * transp(m, b, logmap(m, x, C, 1), C, 1), C, 1)
    torch.testing.assert_close(bn(v), logmap0(literal, C, 1))
    assert float(dist(b, literal, C, 1).detach().square().mean()) == pytest.approx(2.0, rel=1e-5)


def test_batch_norm_in_eval_mode_uses_what_it_has_seen():
    bn = PoincareMidpointBN2d(2, PoincareBall(C), momentum=1.0).double()
    v = torch.randn(8, 2, 3, 3, dtype=torch.float64) + 1
    expected = bn(v)
    torch.testing.assert_close(bn.eval()(v), expected)
    torch.testing.assert_close(bn(v[:1]), expected[:1])


def test_batch_norm_by_the_frechet_mean_centres_exactly():
    bn = PoincareMidpointBN2d(2, PoincareBall(C), mean=partial(frechet_mean, tol=1e-12)).double()
    out = bn(torch.randn(8, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64))
    assert float((4 * out.detach().square().sum(1)).mean()) == pytest.approx(1, rel=1e-5)


def test_a_learned_curvature_starts_where_it_is_told_and_learns():
    ball = PoincareBall(0.1, learnable=True)
    assert float(ball.c.detach()) == pytest.approx(0.1)
    PoincareLinear(3, 2, ball, init="normal")(torch.ones(1, 3)).sum().backward()
    assert ball.raw.grad is not None
    assert float(ball.raw.grad) != 0


@pytest.mark.parametrize("layer", [PoincareConv2d(2, 3, 3, PoincareBall()), PoincareMidpointBN2d(2, PoincareBall())])
def test_zeros_and_far_vectors_give_finite_numbers_and_gradients(layer):
    for scale in (0.0, 1e-20, 1e4):
        v = (scale * torch.randn(2, 2, 4, 4)).requires_grad_(True)
        out = layer(v)
        out.sum().backward()
        assert bool(torch.isfinite(out).all())
        assert bool(torch.isfinite(v.grad).all())


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="c=0 must be positive"):
        PoincareBall(0)
    with pytest.raises(Mistake, match="init='he' must be 'identity'"):
        PoincareLinear(2, 2, PoincareBall(), init="he")


def test_geoopt_agrees():
    geoopt = pytest.importorskip("geoopt")
    ball = geoopt.PoincareBall(c=C)
    x, y = points(12, spread=0.3), points(13, spread=0.3)  # geoopt clips what lies near the rim
    v = torch.randn(64, 5, dtype=torch.float64)
    torch.testing.assert_close(ball.mobius_add(x, y), mobius_add(x, y, C))
    torch.testing.assert_close(ball.dist(x, y), dist(x, y, C)[:, 0])
    torch.testing.assert_close(ball.expmap(x, 0.3 * v), expmap(x, 0.3 * v, C))
    torch.testing.assert_close(ball.logmap(x, y), logmap(x, y, C))
    torch.testing.assert_close(ball.transp(x, y, v), transp(x, y, v, C))
    torch.testing.assert_close(ball.weighted_midpoint(x, reducedim=[0]), midpoint(x, C)[0])
