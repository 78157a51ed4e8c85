"""Frame scattering by hand: tight frames, bounds, circular convolutions, paths, and that no admissible extractor stretches a distance."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.backbones.frame_scattering import (
    Bank,
    FrameLayer,
    FrameScattering,
    frame_bound,
    haar,
    learned_bank,
    named,
    nonlinearity,
    paths,
    pooling,
    response,
    scatter,
    weyl_heisenberg,
)
from convince.errors import Mistake


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed))


def chain(bank, plane, depth=2, **how):
    layers = []
    for _ in range(depth + 1):
        layers.append(FrameLayer(bank, layers[-1].next_plane if layers else plane, **how))
    return layers


def energy(bank, plane):
    return (np.abs(response(bank.filters, plane)) ** 2).sum(0) + np.abs(response(bank.atom[None], plane)[0]) ** 2


# -- banks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", [(32, 32), (7, 12), (2, 1)])
@pytest.mark.parametrize("bank", [haar(1), haar(3), weyl_heisenberg(), weyl_heisenberg(3)])
def test_tight_frames_have_bound_one_everywhere(bank, plane):
    np.testing.assert_allclose(energy(bank, plane), 1, atol=1e-12)


def test_haar_by_hand():
    bank = haar(1)
    np.testing.assert_allclose(bank.atom, np.full((2, 2), 0.25), atol=1e-15)
    np.testing.assert_allclose(bank.filters[2], [[0.25, -0.25], [-0.25, 0.25]], atol=1e-15)
    np.testing.assert_allclose(haar(2).atom, np.full((4, 4), 1 / 16), atol=1e-15)
    assert haar(3).scale == (0, 0, 0, 1, 1, 1, 2, 2, 2)


def test_morlet_filters_sum_to_zero_and_gabor_filters_peak_at_one():
    np.testing.assert_allclose(named("morlet").filters.sum((1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(np.abs(response(named("gabor").filters, (64, 64))).max((1, 2)), 1, atol=1e-12)
    assert abs(named("gabor").atom.sum() - 1) < 1e-12


def test_kernels_of_a_convolution():
    bank = learned_bank(noise(4, 2, 3, 3))
    assert bank.filters.shape == (8, 3, 3)
    assert bank.atom.sum() == pytest.approx(1)


def test_convolution_goes_round():
    """A filter that is 1 at its centre and 2 below: y[r] = x[r] + 2 x[r - 1]."""
    kernel = np.zeros((1, 3, 3))
    kernel[0, 1, 1], kernel[0, 2, 1] = 1, 2
    layer = FrameLayer(Bank(kernel, np.ones((1, 1)), (0,)), (5, 4), "relu", "none", 1, admissible=False)
    x = noise(2, 1, 5, 4).abs()
    torch.testing.assert_close(layer.propagate(x)[:, 0], x + 2 * x.roll(1, 2))
    torch.testing.assert_close(layer.output(x), x)


def test_admissible_layers_are_divided_by_the_root_of_the_bound():
    bank = Bank(3 * haar(1).filters, 3 * haar(1).atom, (0, 0, 0))
    layer = FrameLayer(bank, (8, 8))
    assert layer.bound == pytest.approx(9)
    assert layer.divided_by == pytest.approx(3)
    assert frame_bound(bank, (8, 8)) == pytest.approx(9)


# -- nonlinearities, pooling -----------------------------------------------------------------------


def test_nonlinearities_by_hand():
    z = torch.tensor([3 - 4j])
    assert nonlinearity(z, "modulus").tolist() == [5]
    assert nonlinearity(z, "relu").tolist() == [3]
    assert nonlinearity(z, "tanh")[0].imag.item() == pytest.approx(math.tanh(-4))
    assert nonlinearity(torch.zeros(1), "logistic").item() == 0


def test_pooling_by_hand():
    u = torch.arange(6.0).view(1, 1, 1, 2, 3)
    assert pooling(u, "none", 2).flatten().tolist() == [0, 2]
    assert pooling(u, "mean", 2).flatten().tolist() == [2 * (0 + 1 + 3 + 4) / 4, 2 * (2 + 5) / 4]
    assert pooling(u, "max", 2).flatten().tolist() == [4, 5]
    assert pooling(-u, "max", 2).flatten().tolist() == [0, -2]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["modulus", "relu", "tanh", "logistic"]), st.sampled_from(["none", "mean", "max"]), st.integers(1, 3), st.integers(0, 99))
def test_no_step_stretches_a_distance(name, pool, stride, seed):
    a, b = (torch.complex(noise(1, 1, 1, 5, 7, seed=s), noise(1, 1, 1, 5, 7, seed=s + 1)) for s in (seed, seed + 200))
    limit = 0.25 if name == "logistic" else 1
    after = (nonlinearity(a, name) - nonlinearity(b, name)).abs().square().sum().sqrt()
    assert after <= limit * (a - b).abs().square().sum().sqrt() * (1 + 1e-6)
    assert (pooling(a, pool, stride) - pooling(b, pool, stride)).abs().square().sum() <= (a - b).abs().square().sum() * (1 + 1e-6)


# -- scattering ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["haar", "gabor", "morlet", "weyl-heisenberg", "random"]),
    st.sampled_from(["modulus", "relu", "tanh", "logistic"]),
    st.sampled_from(["none", "mean", "max"]),
    st.integers(1, 2),
)
def test_extractors_are_non_expansive(bank, name, pool, stride):
    layers = chain(named(bank), (9, 8), nonlinearity=name, pool=pool, stride=stride)
    f, h = 5 * noise(2, 1, 9, 8), 5 * noise(2, 1, 9, 8, seed=1)
    gap = sum((a - b).abs().square().sum() for a, b in zip(scatter(f, layers), scatter(h, layers), strict=True))
    assert gap <= (f - h).square().sum() * (1 + 1e-5)


def test_energy_is_kept_by_a_tight_frame_without_pooling():
    """Modulus keeps lengths: outputs of layers 0 and 1 and what is propagated to layer 2 hold all the energy."""
    first, second = chain(haar(1), (8, 8), 1, pool="none", stride=1)
    x = noise(1, 1, 8, 8)
    u = first.propagate(x).flatten(1, 2)
    held = [first.output(x), second.output(u), second.propagate(u)]
    torch.testing.assert_close(sum(v.square().sum() for v in held), x.square().sum())


def test_features_go_round_with_the_image_where_nothing_is_left_out():
    layers = chain(named("gabor"), (8, 8), nonlinearity="relu", pool="none", stride=1)
    x = noise(1, 2, 8, 8)
    for a, b in zip(scatter(x.roll((3, 2), (2, 3)), layers), scatter(x, layers), strict=True):
        torch.testing.assert_close(a, b.roll((3, 2), (2, 3)))


def test_paths_of_growing_scales():
    """Two scales of 8 orientations, every position kept: 1 + 16 + 64 paths; with a stride of 2 the second layer is one scale coarser."""
    still = chain(named("morlet", 2, 8), (8, 8), stride=1)
    assert [len(p) for p in paths(still, True)] == [16, 64]
    assert [len(p) for p in paths(still)] == [16, 256]
    layers = chain(haar(2), (8, 8))
    scale = haar(2).scale
    want = [6 * i + j for i, j in itertools.product(range(6), range(6)) if scale[j] + 1 > scale[i]]
    assert paths(layers, True) == [list(range(6)), want]
    x = noise(1, 1, 8, 8)
    assert torch.equal(scatter(x, layers, True)[2], scatter(x, layers)[2][:, want])


def test_channels_are_scattered_by_themselves():
    layers, x = chain(haar(1), (8, 8)), noise(2, 3, 8, 8)
    for whole, *single in zip(scatter(x, layers), *(scatter(x[:, c : c + 1], layers) for c in range(3)), strict=True):
        torch.testing.assert_close(whole, torch.cat(single, 1))


# -- the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ({"bank": "haar"}, 32**2 + 6 * 16**2 + 36 * 8**2),
        ({"bank": "haar", "in_chans": 3}, 3 * (32**2 + 6 * 16**2 + 36 * 8**2)),
        ({"nonlinearity": "relu", "depth": 1}, 32**2 + 2 * 8 * 16**2),
        ({"bank": "morlet", "pool": "none", "stride": 1, "orientations": 8, "decreasing": True, "output_stride": 4}, 81 * 8 * 8),
    ],
)
def test_number_of_features(how, count):
    net = FrameScattering(**how)
    assert net.num_features == count
    assert net.forward_features(noise(2, net.in_chans, 32, 32)).shape == (2, count)
    assert [name for name, _ in net.named_parameters()] == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"bank": "fourier"}, "bank='fourier' must be one of haar, gabor"),
        ({"nonlinearity": "gelu"}, "nonlinearity='gelu' must be one of modulus"),
        ({"pool": "sum"}, "pool='sum' must be one of none, mean, max"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"depth": 0}, "depth=0, scales=2"),
    ],
)
def test_wrong_options(how, words):
    with pytest.raises(Mistake, match="frame-scattering: " + words):
        FrameScattering(**how)


def test_images_of_another_size_are_refused():
    with pytest.raises(Mistake, match="frame-scattering: made for 32x32 pixels, given 16x32"):
        FrameScattering()(torch.zeros(1, 1, 16, 32))
