"""Orthogonal convolutions by hand: the penalty's value, its identity with the dense operator, shapes that exist, singular values, the start."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings as run_settings
from convince.fit.train import prepare
from convince.layers.orthogonal_conv import (
    begin,
    bound,
    conv_matrix,
    delta_orthogonal,
    dilate,
    exists_orthogonal,
    l_orth,
    penalty,
    singular_values,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def kernel(m, c, k, seed=0):
    return torch.randn(m, c, k, k, generator=gen(seed), dtype=torch.float64)


def test_worked_values():
    """One filter of taps (1, 2) in a row: products at shifts -1, 0, 1 are 2, 5, 2, so 4 + 16 + 4."""
    taps = torch.tensor([[[[1.0, 2.0]]]])
    assert float(l_orth(taps)) == 24
    assert float(l_orth(taps, stride=2)) == 16, "a stride of 2 knows no shift by 1"
    columns = torch.full((4, 1, 1, 1), 0.5)  # K^T K = 1, and 4 filters of 1 channel: E is 1/4 everywhere
    assert float(l_orth(columns)) == pytest.approx(0, abs=1e-6)
    assert float(l_orth(2 * columns)) == pytest.approx(9)  # K^T K = 4


@pytest.mark.parametrize(("m", "c", "k", "s"), [(3, 4, 3, 1), (6, 2, 3, 1), (4, 2, 3, 2), (10, 2, 3, 2), (2, 1, 5, 3), (5, 1, 2, 2)])
def test_the_penalty_is_the_operators_distance_at_every_size(m, c, k, s):
    weight = kernel(m, c, k)
    for n in (5, 6, 9):
        dense = conv_matrix(weight, n, s)
        gram = dense @ dense.T if m <= c * s * s else dense.T @ dense
        gap = gram - torch.eye(len(gram), dtype=gram.dtype)
        assert float(gap.square().sum()) == pytest.approx(n * n * float(l_orth(weight, s)), rel=1e-12)
        assert float(torch.linalg.matrix_norm(gap, 2)) <= bound(weight, s) + 1e-9
        torch.testing.assert_close(singular_values(weight, n, s), torch.linalg.svdvals(dense), rtol=1e-9, atol=1e-9)


def test_the_matrix_is_torchs_convolution():
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
    x = torch.randn(2, 3, 8, 8, generator=gen(), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(x.flatten(1) @ conv_matrix(conv.weight, 4, 2).T, conv(x).flatten(1))


def test_a_kernel_wider_than_the_image_goes_round():
    weight = kernel(2, 1, 5)
    torch.testing.assert_close(singular_values(weight, 3), torch.linalg.svdvals(conv_matrix(weight, 3)), rtol=1e-9, atol=1e-9)


def test_groups_and_dilation_are_small_convolutions():
    weight = kernel(6, 2, 3)
    apart = l_orth(weight[:2]) + l_orth(weight[2:4]) + l_orth(weight[4:])
    assert float(l_orth(weight, groups=3)) == pytest.approx(float(apart))
    x = torch.randn(1, 2, 12, 12, generator=gen(), dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(x, dilate(weight, (2, 3))), F.conv2d(x, weight, dilation=(2, 3)))
    assert float(l_orth(dilate(weight, 2))) == pytest.approx(float(l_orth(weight)), rel=1e-12), "the taps only move apart"


@given(st.integers(1, 14), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_what_exists_can_be_drawn_and_the_rest_is_refused(m, c, k, s):
    if exists_orthogonal(m, c, k, s):
        drawn = delta_orthogonal(m, c, k, s, gen=gen(m), dtype=torch.float64)
        assert abs(float(l_orth(drawn, s))) < 1e-12
        values = singular_values(drawn, k, s)
        torch.testing.assert_close(values, torch.ones_like(values))
    else:
        with pytest.raises(Mistake, match=r"no .* convolution of stride"):
            delta_orthogonal(m, c, k, s, gen=gen())


def test_worked_shapes():
    assert exists_orthogonal(9, 1, 3, 3)
    assert not exists_orthogonal(10, 1, 3, 4), "10 filters of 9 numbers cannot be orthonormal"
    assert exists_orthogonal(64, 3, 3, 2)
    assert not exists_orthogonal(64, 3, 1, 2), "a stride of 2 skips pixels that 1x1 taps never see"
    with pytest.warns(UserWarning, match="outer taps are 0"):
        assert exists_orthogonal(4, 4, 3, 1, padding="zeros")
    with pytest.raises(Mistake, match="'circular', 'zeros' or 'valid'"):
        exists_orthogonal(4, 4, 3, 1, padding="same")


def test_a_network_starts_orthogonal_and_says_what_it_could_not():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 40, 1, stride=2), nn.Conv2d(8, 16, 3, stride=2))
    assert begin(net, gen()) == ["1", "2"]
    assert float(l_orth(net[0].weight.detach())) == pytest.approx(0, abs=1e-5)
    assert float(l_orth(net[3].weight.detach(), 2)) == pytest.approx(0, abs=1e-5)
    assert not net[0].bias.any()


def test_a_run_comes_nearer_with_the_penalty():
    def distance(*parts):
        how = {"model": "plain-cnn:layers=(1,1),widths=(4,8)", "batch": 8, "epochs": 4, "lr": 0.02, "precision": "fp32", "augment": "none", "kernels": {}}
        run = prepare(run_settings(parts=parts, **how), tiny_images())
        fit(run)
        return float(penalty(run.model).detach())

    free, kept, begun = distance(), distance("orthogonal-conv:lam=1"), distance("orthogonal-conv:lam=1,delta=true")
    assert kept < 0.25 * free
    assert begun < kept


def test_wrong_settings_and_networks_are_refused():
    from convince.layers.orthogonal_conv import OrthogonalConv

    with pytest.raises(Mistake, match="orthogonal-conv: lam=-1"):
        OrthogonalConv(lam=-1)
    with pytest.raises(Mistake, match="Linear has no convolution"):
        penalty(nn.Linear(2, 2))
