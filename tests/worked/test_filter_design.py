"""Filter design by hand: each bank's numbers, k-means and whitening on patches that can be reckoned, scale, frozen and later layers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit, start
from convince.fit.settings import settings as run_settings
from convince.fit.train import prepare
from convince.layers.filter_design import BANKS, LAWS, FilterInit, contrast, dct, extend, filters, gabor, learnt, sample_patches, spherical_kmeans, zca


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def run_with(*parts, model="resnet:layers=(1,1),widths=(4,8)", epochs=1, go=True):
    how = {"model": model, "batch": 8, "epochs": epochs, "lr": 0.05, "precision": "fp32", "augment": "none", "kernels": {}}
    run = prepare(run_settings(parts=parts, **how), tiny_images())
    if go:
        fit(run)
    return run


def test_worked_gabor():
    bank = gabor(12, 5, 5)
    assert bank.shape == (12, 5, 5)
    assert float(bank[0, 2, 2]) == 1, "a cosine is 1 in the middle"
    assert float(bank[3, 2, 2]) == pytest.approx(0, abs=1e-12), "a sine (psi = pi/2) is 0 there"
    one_right = math.exp(-1 / (2 * (0.56 * 3) ** 2)) * math.cos(2 * math.pi / 3)
    assert float(bank[0, 2, 3]) == pytest.approx(one_right)
    assert float(bank[0, 3, 2]) == pytest.approx(math.exp(-0.25 / (2 * (0.56 * 3) ** 2))), "across the wave only the envelope falls, by gamma"
    torch.testing.assert_close(bank[6], bank[0].T)  # the second of two orientations is turned by 90 degrees


def test_the_cosine_basis_is_scipys():
    basis = dct(1, 3, 4)
    torch.testing.assert_close(basis @ basis.T, torch.eye(12, dtype=torch.float64))
    assert float(basis[0].std()) == pytest.approx(0, abs=1e-12), "the lowest frequency comes first"
    image = np.random.default_rng(0).normal(size=(3, 4))
    theirs = sorted(dctn(image, norm="ortho").ravel())
    assert sorted((basis @ torch.from_numpy(image.ravel())).tolist()) == pytest.approx(theirs)


def test_worked_contrast_and_whitening():
    found = contrast(torch.tensor([[0.0, 2.0], [5.0, 5.0]]), floor=8.0)
    assert found.tolist() == [[pytest.approx(-1 / 3), pytest.approx(1 / 3)], [0, 0]]
    patches = torch.randn(4000, 3, generator=gen(), dtype=torch.float64) @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0.5]], dtype=torch.float64)
    white = zca(patches, eps=0.0)
    torch.testing.assert_close(white, white.T)
    torch.testing.assert_close(torch.cov((patches @ white).T), torch.eye(3, dtype=torch.float64))


def test_kmeans_finds_the_directions():
    """Patches along three axes, either way: the centres are those axes, up to sign."""
    axes = torch.eye(3, dtype=torch.float64)
    patches = torch.cat([axes, -2 * axes, 3 * axes]).repeat(50, 1)
    centres = spherical_kmeans(patches, 3, gen(1))
    torch.testing.assert_close((centres @ centres.T).abs(), axes, rtol=0, atol=1e-2)
    assert bool((centres.abs().max(1).values > 0.99).all())


def test_principal_directions_are_scikit_learns():
    from sklearn.decomposition import PCA

    patches = torch.randn(300, 4, generator=gen(), dtype=torch.float64) * torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    found = learnt("pca-patches", patches, 3, gen())
    centred = patches - patches.mean(1, keepdim=True)
    theirs = PCA(3).fit(torch.cat([centred, -centred]).numpy()).components_  # pairs of opposite patches have mean 0
    for ours, other in zip(found.numpy(), theirs, strict=False):
        assert abs(ours @ other) == pytest.approx(1, abs=1e-9)


def test_components_separate_two_sources():
    sources = torch.rand(3000, 2, generator=gen(), dtype=torch.float64) - 0.5
    mixed = torch.cat([sources, -sources], 1) @ torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.float64)
    signals = (mixed - mixed.mean(1, keepdim=True)) @ learnt("ica", mixed, 2, gen(3)).T
    alike = np.abs(np.corrcoef(signals.T.numpy(), sources.T.numpy())[:2, 2:])
    assert alike.max(1) == pytest.approx([1, 1], abs=0.02)


@pytest.mark.parametrize("scheme", [name for name in (*LAWS, *BANKS, "patches", "pca-patches", "kmeans") if name != "zeros"])
def test_all_schemes_have_kaimings_scale(scheme):
    patches = torch.randn(500, 2 * 25, generator=gen(), dtype=torch.float64)
    found = filters(scheme, (7, 2, 5, 5), gen(), patches)
    assert float(found.square().mean()) == pytest.approx(2 / 50)
    own = filters(scheme, (7, 2, 5, 5), gen(), patches, rescale=False)
    torch.testing.assert_close(own / own.norm(), found / found.norm())


def test_laws_as_torch_has_them():
    shape = (400, 3, 3, 3)
    for scheme, std in {"normal": 0.01, "lecun": 27**-0.5, "kaiming": (2 / 27) ** 0.5, "xavier": (2 / (27 + 3600)) ** 0.5, "uniform": 0.05 / 3**0.5}.items():
        assert float(filters(scheme, shape, gen(), rescale=False).std()) == pytest.approx(std, rel=0.03)
    assert not filters("zeros", shape, gen()).any()
    assert len(filters("constant", shape, gen()).unique()) == 1
    rows = filters("orthogonal", (5, 3, 3, 3), gen(), rescale=False).flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5, dtype=torch.float64))


@given(st.integers(1, 40), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_banks_are_extended_by_negatives_and_mixtures(count, size):
    bank = torch.eye(size, dtype=torch.float64)
    found = extend(bank, count, gen())
    assert found.shape == (count, size)
    assert torch.equal(found[:size], bank[: min(count, size)])
    assert torch.equal(found[size : 2 * size], -bank[: max(min(count - size, size), 0)])


def test_patches_come_from_the_maps():
    x = torch.arange(2 * 36.0).reshape(2, 1, 6, 6)
    found = sample_patches(x, (2, 3), 200, gen())
    assert found.shape == (200, 6)
    assert torch.equal(found[:, 1] - found[:, 0], torch.ones(200))
    assert torch.equal(found[:, 3] - found[:, 0], torch.full((200,), 6.0))
    assert found[:, 0].max() >= 36, "patches of the second map too"
    assert sample_patches(torch.ones(1, 2, 1, 1), (3, 3), 4, gen()).sum() == 8, "what lies beyond a small map is 0"


def test_frozen_filters_and_biases_stay_while_the_rest_learns():
    model = "plain-cnn:layers=(1,1),widths=(4,8)"
    begun = run_with("filter-init", model=model, go=False)
    start(begun)
    for part in ("filter-init:frozen=true", "filter-init"):
        run = run_with(part, model=model, epochs=2)
        first, kept = FilterInit().chosen(run)[0][1], FilterInit().chosen(begun)[0][1]
        assert torch.equal(first.weight, kept.weight) is ("frozen" in part)
        others = [n for (n, p), (_, q) in zip(run.model.named_parameters(), begun.model.named_parameters(), strict=True) if not torch.equal(p, q)]
        assert len(others) > 3


def test_a_named_layer_learns_from_what_reaches_it():
    part = FilterInit("pca-patches", layers=("layer2.0.conv1",))
    run = run_with("filter-init:scheme=pca-patches,layers=('layer2.0.conv1',)", go=False)
    start(run)
    name, conv = part.chosen(run)[0]
    assert name == "layer2.0.conv1"
    rows = conv.weight.detach().flatten(1).double()
    cosines = (rows @ rows.T) / rows.norm(dim=1)[:, None] / rows.norm(dim=1)
    torch.testing.assert_close(cosines, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-5)


def test_filters_of_another_run(tmp_path):
    from safetensors.torch import save_file

    weight = torch.randn(4, 1, 3, 3, generator=gen())
    save_file({"conv1.weight": weight}, tmp_path / "model.safetensors")
    run = run_with(f"filter-init:scheme=transferred,source={tmp_path},frozen=true")
    assert torch.equal(run.model.conv1.weight, weight)
    save_file({"conv1.weight": weight[:2].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(Mistake, match=r"of shape \(2, 1, 3, 3\) for conv1"):
        run_with(f"filter-init:scheme=transferred,source={tmp_path}")
    with pytest.raises(Mistake, match="no weights can be read"):
        run_with(f"filter-init:scheme=transferred,source={tmp_path / 'nothing'}")


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match=r"scheme='gabour' is none of zeros, .*'gabor'"):
        FilterInit("gabour")
    with pytest.raises(Mistake, match="names the folder of a run in source"):
        FilterInit("transferred")
    with pytest.raises(Mistake, match="no convolution named conv9"):
        run_with("filter-init:layers=('conv9',)")
    with pytest.raises(Mistake, match="learns from patches"):
        filters("kmeans", (2, 1, 3, 3), gen())
    with pytest.raises(Mistake, match="at least 2 pixels"):
        filters("gabor", (2, 1, 1, 1), gen())
    with pytest.raises(Mistake, match="patches of one brightness"):
        learnt("patches", torch.ones(5, 9), 2, gen())
