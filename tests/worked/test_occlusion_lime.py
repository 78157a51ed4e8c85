"""Occlusion, LIME and the maskers: by hand, closed forms on linear answers, and against captum and scikit-learn."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.lime import Lime, closeness, fit, grid_segments, lime, samples_of
from convince.explain.maskers import FILLS, MASKERS, masked_scores
from convince.explain.occlusion import Occlusion, places
from convince.fit.answer import Answer, Normalise


class Linear(nn.Module):
    """w.x for two scores, as numbers of their own; no chance is taken."""

    logits = False

    def __init__(self, channels: int = 1, side: int = 8) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(3)).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", x, self.w)


class Curved(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() + super().forward(x.square())


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()


# -- occlusion ---------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    found = places(5, 2, 2)
    assert found.int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]  # the last stands out over the edge
    assert len(places(8, 3, 1)) == 6
    assert bool(places(9, 4, 3).any(0).all())


def test_occlusion_of_a_linear_answer_is_exact(x: Tensor) -> None:
    net = Linear(2)
    found = Occlusion(window=2, stride=2, masker="black")(net, x, 1)
    wanted = (net.w[1] * x).sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(found.map[:, 0], wanted.detach())
    grey = Occlusion(window=1)(net, x, 0)  # (x - 1/2) w, pixel by pixel
    torch.testing.assert_close(grey.map[:, 0], ((x - 0.5) * net.w[0]).sum(1).detach())


def test_occlusion_watches_the_chance(x: Tensor) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(128, 3)).double()
    found = Occlusion(window=8)(net, x, 2)
    fall = net(x).softmax(1)[:, 2] - net(torch.full_like(x, 0.5)).softmax(1)[:, 2]
    torch.testing.assert_close(found.map, fall.detach()[:, None, None, None].expand(-1, 1, 8, 8))


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 2), (4, 3), (5, 1)])
def test_captum_gives_the_same_occlusion(x: Tensor, window: int, stride: int) -> None:
    net, target = Curved(2), torch.tensor([0, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attr = pytest.importorskip("captum.attr")
        theirs = attr.Occlusion(net).attribute(x, (2, window, window), strides=(2, stride, stride), target=target, baselines=0.5)
    torch.testing.assert_close(Occlusion(window, stride)(net, x, target).map.float(), theirs[:, :1].detach())


def test_the_window_scales_with_the_image() -> None:
    for side, wanted in ((8, (2, 1)), (28, (5, 2)), (48, (8, 4)), (2, (2, 1))):
        table = Occlusion()(Linear(1, side), torch.rand(1, 1, side, side).double(), 0).table
        assert (table["window"], table["stride"]) == wanted


# -- lime --------------------------------------------------------------------------------------------


def test_cells_and_closeness_by_hand() -> None:
    assert grid_segments((2, 5), 2).tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 3, 3]]
    shown = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    wanted = [1.0, math.exp(-4.0), math.exp(-16.0)]  # distances 0, 1/2 and 1 at width 1/4
    assert closeness(shown, 0.25).tolist() == pytest.approx(wanted)
    gen = torch.Generator().manual_seed(0)
    drawn = samples_of(2000, 9, gen)
    assert bool(drawn[0].all())
    assert float(drawn[1:].double().mean()) == pytest.approx(0.5, abs=0.02)


def test_the_regression_is_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    gen = torch.Generator().manual_seed(0)
    shown, y, weight = samples_of(60, 9, gen), torch.randn(4, 60, generator=gen).double(), torch.rand(60, generator=gen).double()
    w, b, r2 = fit(shown, y, weight, 0.7)
    for i in range(4):
        ridge = linear_model.Ridge(0.7).fit(shown.double().numpy(), y[i].numpy(), sample_weight=weight.numpy())
        torch.testing.assert_close(w[i], torch.from_numpy(ridge.coef_))
        assert float(b[i]) == pytest.approx(ridge.intercept_)
        assert float(r2[i]) == pytest.approx(ridge.score(shown.double().numpy(), y[i].numpy(), sample_weight=weight.numpy()))
    assert fit(shown, torch.ones(1, 60).double(), weight, 1.0)[2].tolist() == [1.0]


def test_lime_of_a_linear_answer_is_exact(x: Tensor) -> None:
    """Showing a cell adds the sum of w x over it; with next to no ridge that is the weight."""
    net = Linear(2)
    found = Lime(samples=100, cells=4, masker="black", ridge=1e-9)(net, x, 0)
    wanted = (net.w[0] * x).sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2))
    torch.testing.assert_close(found.map[:, 0, ::2, ::2], wanted.detach(), rtol=1e-5, atol=1e-6)
    assert found.table["fit"] == pytest.approx(1)


def test_captum_gives_the_same_lime(x: Tensor) -> None:
    """The same samples, kernel and ridge handed to captum's LimeBase."""
    net, cells = Curved(2), 3
    segments = grid_segments((8, 8), cells)
    shown = samples_of(50, 9, torch.Generator().manual_seed(4))
    ours, _ = lime(net.requires_grad_(False), x, torch.tensor([1, 1, 1]), segments, shown, "black", width=0.5, ridge=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attr = pytest.importorskip("captum.attr")
        model = pytest.importorskip("captum._utils.models.linear_model")
        for i in range(3):
            rows = iter(shown.double())
            base = attr.LimeBase(
                net,
                interpretable_model=model.SkLearnRidge(alpha=0.2),
                similarity_func=lambda original, perturbed, row, **_: closeness(row > 0.5, 0.5)[0],
                perturb_func=lambda original, rows=rows, **_: next(rows)[None],
                perturb_interpretable_space=True,
                from_interp_rep_transform=lambda row, original, **_: original * row[0][segments],
                to_interp_rep_transform=None,
            )
            theirs = base.attribute(x[i : i + 1], target=1, n_samples=50)
            torch.testing.assert_close(ours[i], theirs[0].to(ours), rtol=1e-3, atol=1e-4)


# -- maskers -----------------------------------------------------------------------------------------


def test_maskers_by_hand(x: Tensor) -> None:
    net = Linear(2)
    keep = torch.zeros(3, 1, 1, 8, 8, dtype=torch.bool)
    keep[..., :4, :] = True
    for masker, fill in (("black", 0.0), ("grey", 0.5), ("mean", 0.5)):
        wanted = net(torch.where(keep[:, 0], x, fill))
        torch.testing.assert_close(masked_scores(net, x, keep, masker)[:, 0], wanted.detach())
    answer = Answer(Normalise([0.3, 0.7], [1.0, 1.0]), net).double()
    mean = torch.where(keep[:, 0], x, torch.tensor([0.3, 0.7]).view(1, 2, 1, 1).double())
    torch.testing.assert_close(masked_scores(answer, x, keep, "mean")[:, 0], answer(mean).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(masked_scores(net, x, keep, "noise"), masked_scores(net, x, keep, "noise"))
    assert float(FILLS["noise"](net, x).std()) == pytest.approx(12**-0.5, rel=0.1)
    assert torch.allclose(FILLS["blur"](net, torch.full_like(x, 0.3)), torch.full_like(x, 0.3))
    many = torch.rand(3, 90, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5  # more rows than one pass holds
    found = masked_scores(net, x, many, "black")
    assert found.shape == (3, 90, 2)
    torch.testing.assert_close(found, torch.einsum("nchw,nmhw,kchw->nmk", x, many[:, :, 0].double(), net.w).detach())


@pytest.mark.parametrize("masker", MASKERS)
def test_rows_do_not_depend_on_their_batch(x: Tensor, masker: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    for part in (Occlusion(window=3, masker=masker), Lime(samples=20, cells=3, masker=masker)):
        whole = part(net, x, torch.tensor([0, 1, 2])).map
        assert whole.shape == (3, 1, 8, 8)
        for i in range(3):
            torch.testing.assert_close(part(net, x[i : i + 1], i).map, whole[i : i + 1])


def test_refusals_say_why(x: Tensor) -> None:
    for make, said in (
        (lambda: Occlusion(masker="gray"), "occlusion: masker='gray' is none; did you mean 'grey'"),
        (lambda: Occlusion(window=0), "window=0 must be at least 1"),
        (lambda: Occlusion(window=9)(Linear(2), x), "window=9 is larger than images of 8x8"),
        (lambda: Occlusion(window=2, stride=3)(Linear(2), x), "stride=3 is larger than the window"),
        (lambda: Lime(samples=1), "samples=1"),
        (lambda: Lime(width=0), "width=0"),
        (lambda: Lime(cells=9)(Linear(2), x), "cells=9 does not fit images of 8x8"),
        (lambda: Lime()(nn.Linear(4, 3), torch.rand(2, 4)), "the input has shape"),
        (lambda: Occlusion()(nn.Linear(4, 3), torch.rand(2, 4)), "the input has shape"),
        (lambda: Occlusion(masker="layer")(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)).double(), x), "no convolution of this answer"),
    ):
        with pytest.raises(Mistake, match=said):
            make()
