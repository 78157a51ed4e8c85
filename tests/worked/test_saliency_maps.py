"""Saliency maps of 2013: the class image in closed form, ten crops, and segmentation by one cut against all labellings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.activation_maximisation import ActivationMaximisation, class_image
from convince.explain.localisation import iou
from convince.explain.saliency import Saliency
from convince.explain.weak_segmentation import colour_model, min_cut, weak_segmentation
from convince.fit.answer import Answer, Normalise


def linear(c: int = 1, side: int = 4, k: int = 3, seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(c * side * side, k)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(k, c * side * side, generator=torch.Generator().manual_seed(seed)))
    return net.eval()


def test_the_map_of_a_linear_answer_is_its_weights_whatever_the_image() -> None:
    net = linear(3)
    found = Saliency()(net, torch.rand(4, 3, 4, 4).double(), 2).map
    torch.testing.assert_close(found, net[1].weight[2].view(1, 3, 4, 4).abs().amax(1, keepdim=True).detach().expand(4, -1, -1, -1))


# -- class images ------------------------------------------------------------------------------------


def test_the_class_image_of_a_linear_answer_is_in_closed_form() -> None:
    """arg max w.x - lam |x - mean|^2 is mean + w / (2 lam); the normalisation's mean is the zero, its deviation a factor of w."""
    net = Answer(Normalise([0.3], [0.5]), linear()).double().eval()
    weight = net.model[1].weight.view(3, 1, 4, 4) / 0.5
    found = class_image(net, torch.tensor([0, 1, 2, 0]), (1, 4, 4), lam=2.0, steps=600, lr=0.02)
    torch.testing.assert_close(found, (0.3 + weight / 4).detach()[[0, 1, 2, 0]], rtol=0, atol=2e-3)
    part = ActivationMaximisation(l2=2.0, tv=0, blur_every=0, jitter=0, start="mean", bounded=False, steps=600, lr=0.02)
    assert torch.equal(part(net, torch.rand(2, 1, 4, 4).double(), torch.tensor([1, 2])).images["image"], found[1:3])


# -- ten crops ---------------------------------------------------------------------------------------


class Sum(nn.Module):
    """One score, the sum of all pixels; the weight is there to be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x.flatten(1).sum(1, keepdim=True)


def test_ten_crops_lie_in_place() -> None:
    """Each crop of 14 x 14 is enlarged to 16 x 16, so that its gradients sum to 256, wherever it lies."""
    found = Saliency(crops=10)(Sum(), torch.rand(2, 1, 16, 16).double(), 0).map
    seen = torch.zeros(16, 16).double()
    for top, left in [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]:
        seen[top : top + 14, left : left + 14] += 2
    assert seen[0, 0] == 2
    assert seen[8, 8] == 10
    torch.testing.assert_close((found * seen).sum((1, 2, 3)), torch.full((2,), 2560.0).double())
    torch.testing.assert_close(found[0, 0, 6:10, 6:10].mean(), torch.tensor((16 / 14) ** 2).double(), rtol=0.05, atol=0)


def test_ten_crops_of_the_mirror_image() -> None:
    class Mirrored(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flip(3))

    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3)).double().eval()
    x = torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(4)).double()
    a, b = Saliency(crops=10)(net, x, 1).map, Saliency(crops=10)(Mirrored(net), x.flip(3), 1).map
    torch.testing.assert_close(a, b.flip(3))
    assert not torch.allclose(a, Saliency()(net, x, 1).map)


def test_crops_refuse_in_words() -> None:
    with pytest.raises(Mistake, match="crops=5: must be 1"):
        Saliency(crops=5)
    with pytest.raises(Mistake, match="cuts images"):
        Saliency(crops=10)(nn.Linear(5, 3), torch.rand(2, 5), 0)


# -- segmentation ------------------------------------------------------------------------------------


def energy(mask: np.ndarray, inside: np.ndarray, outside: np.ndarray, right: np.ndarray, down: np.ndarray) -> float:
    parted = right[mask[:, 1:] != mask[:, :-1]].sum() + down[mask[1:] != mask[:-1]].sum()
    return float(inside[mask].sum() + outside[~mask].sum() + parted)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_the_cut_has_the_least_energy_of_all_512_labellings(seed: int) -> None:
    draw = np.random.default_rng(seed)
    inside, outside = draw.integers(-30, 30, (2, 3, 3)) / 10
    right, down = draw.integers(0, 20, (3, 2)) / 10, draw.integers(0, 20, (2, 3)) / 10
    labellings = (np.array(bits, dtype=bool).reshape(3, 3) for bits in itertools.product((False, True), repeat=9))
    least = min(energy(mask, inside, outside, right, down) for mask in labellings)
    assert energy(min_cut(inside, outside, right, down), inside, outside, right, down) == pytest.approx(least)


def test_two_pixels_by_hand() -> None:
    """Apart they cost 1 + 1 and the pair 3; as one object 1 + 2. Without the pair's cost they part."""
    inside, outside = np.array([[1.0, 2.0]]), np.array([[5.0, 1.0]])
    none = np.zeros((0, 2))
    assert min_cut(inside, outside, np.array([[3.0]]), none).tolist() == [[True, True]]
    assert min_cut(inside, outside, np.array([[0.5]]), none).tolist() == [[True, False]]


def scene(side: int = 24, scale: int = 1) -> tuple[Tensor, Tensor]:
    """A bright square of 8 in dim noise and a small one of 3; a map that is high in a part of the large one only."""
    x = 0.3 * torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    x[..., 6:14, 10:18] += 0.65
    x[..., 19:22, 2:5] += 0.65
    found = torch.zeros(1, 1, side, side)
    found[..., 9:12, 12:16] = 1
    return tuple(t.repeat_interleave(scale, 2).repeat_interleave(scale, 3) for t in (x, found))  # type: ignore[return-value]


@pytest.mark.parametrize("scale", [1, 4])
def test_an_object_is_cut_out_of_its_seed(scale: int) -> None:
    x, found = scene(scale=scale)
    mask, box = weak_segmentation(torch.cat([x, x.flip(3)]), torch.cat([found, found.flip(3)]), grid=24)
    true = torch.zeros_like(mask)
    true[0, 0, 6 * scale : 14 * scale, 10 * scale : 18 * scale] = True
    true[1] = true[0].flip(2)
    assert torch.equal(mask, true)  # the small square has the object's colours and is no part of it
    wanted = torch.tensor([[10.0, 6, 18, 14], [6, 6, 14, 14]]) * scale
    assert torch.equal(box, wanted)
    assert iou(box, wanted).tolist() == [1.0, 1.0]


def test_a_flat_image_and_a_flat_map_are_no_error() -> None:
    mask, box = weak_segmentation(torch.full((1, 3, 9, 9), 0.5), torch.zeros(1, 1, 9, 9))
    assert mask.shape == (1, 1, 9, 9)
    assert bool(torch.isfinite(box).all())


def test_colours_are_never_fewer_than_their_model() -> None:
    assert colour_model(np.array([[0.0], [0.0], [1.0]]), 5, 0).n_components == 2


def test_segmentation_refuses_in_words() -> None:
    with pytest.raises(Mistake, match=r"they must be \[n c h w\] and \[n 1 h w\]"):
        weak_segmentation(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 7))
    with pytest.raises(Mistake, match=r"bg_q=0.9 must lie below fg_q=0.5"):
        weak_segmentation(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), fg_q=0.5, bg_q=0.9)
