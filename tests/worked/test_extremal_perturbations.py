"""Extremal perturbations: geometry and area term by hand, exact optima, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.extremal_perturbations import (
    Canvas,
    ExtremalPerturbations,
    SmoothMax,
    area_gap,
    channel_extremal,
    extremal_perturbation,
    gaussian_blur,
    minimal_extremal_area,
    perturb,
    perturbation_pyramid,
    reward_of,
    smooth_max_mask,
)


class Sums(nn.Module):
    """Scores are the sums of the pixels on the left and on the right."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[3] // 2
        return torch.stack([x[..., :half].mean((1, 2, 3)), x[..., half:].mean((1, 2, 3))], 1) * 30


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "step", "sigma", "grid", "radius", "padding", "canvas"),
    [(224, 7, 21, 32, 4, 7, 260), (56, 2, 5, 28, 4, 6, 63), (8, 1, 0.75, 8, 2, 3, 10)],
)
def test_the_canvas_of_the_released_code(size: int, step: int, sigma: float, grid: int, radius: int, padding: int, canvas: int) -> None:
    found = Canvas((size, size), step, sigma)
    assert (found.grid, found.radius, found.padding, found.sides) == ((grid, grid), radius, padding, (canvas, canvas))
    assert found.weights().shape == ((2 * radius + 1) ** 2, step**2)


@pytest.mark.parametrize(("size", "step", "sigma"), [((7, 9), 2, 3), ((8, 8), 1, 2), ((10, 6), 3, 4)])
def test_the_mask_by_the_formula_pixel_by_pixel(size: tuple[int, int], step: int, sigma: int) -> None:
    """At each pixel of the canvas the smooth maximum over (2 radius + 1)^2 grid points from ``floor(u / step) - padding`` on, zeros outside the grid."""
    canvas = Canvas(size, step, sigma)
    values = noise(2, 1, *canvas.grid)
    mask, whole = smooth_max_mask(values, canvas)
    high, wide = canvas.sides
    wanted = torch.zeros(2, 1, high, wide, dtype=torch.float64)
    for row in range(2):
        for y in range(high):
            for x in range(wide):
                near = []
                for i in range(y // step - canvas.padding, y // step - canvas.padding + 2 * canvas.radius + 1):
                    for j in range(x // step - canvas.padding, x // step - canvas.padding + 2 * canvas.radius + 1):
                        inside = 0 <= i < canvas.grid[0] and 0 <= j < canvas.grid[1]
                        z = math.hypot(y - sigma - step * i, x - sigma - step * j) / sigma
                        near.append(math.exp(-2 * max(z - 0.5, 0) ** 2) * float(values[row, 0, i, j]) if inside else 0.0)
                v = torch.tensor(near, dtype=torch.float64)
                wanted[row, 0, y, x] = (v * (20 * v).softmax(0)).sum()
    torch.testing.assert_close(whole, wanted)
    assert torch.equal(mask, whole[:, :, sigma : sigma + size[0], sigma : sigma + size[1]])


def test_the_smooth_maximums_gradient() -> None:
    values, weights = noise(4, 3, seed=1).requires_grad_(True), noise(4, 2, seed=2)
    assert torch.autograd.gradcheck(lambda v: SmoothMax.apply(v, weights), values)


def test_a_blur_by_hand() -> None:
    line = torch.tensor([0.0, 0, 1, 0, 0], dtype=torch.float64).expand(1, 1, 5, 5)
    bell = torch.tensor([math.exp(-0.5), 1, math.exp(-0.5)]) / (1 + 2 * math.exp(-0.5))
    torch.testing.assert_close(gaussian_blur(line, 1.0, 1)[0, 0, 0, 1:4], bell.double(), rtol=1e-6, atol=0)
    assert torch.equal(gaussian_blur(line, 0.0), line)
    torch.testing.assert_close(gaussian_blur(torch.full((1, 2, 4, 6), 0.3), 5.0), torch.full((1, 2, 4, 6), 0.3))  # edges are repeated


def test_the_pyramid_and_its_levels() -> None:
    x = noise(2, 3, 8, 8)
    fade = perturbation_pyramid(x, "fade", 3)
    torch.testing.assert_close(fade, torch.stack([x * 0, x / 2, x], 1))
    for value, wanted in ((0.0, x * 0), (0.25, x / 4), (0.6, x * 0.6), (1.0, x)):  # linear between levels, so a faded picture is x m
        torch.testing.assert_close(perturb(fade, torch.full((2, 1, 8, 8), value, dtype=x.dtype)), wanted)
    blur = perturbation_pyramid(x, "blur", 8)
    assert torch.equal(blur[:, -1], x)
    torch.testing.assert_close(blur[:, 0], gaussian_blur(x, 20 * 8 / 224))
    torch.testing.assert_close(blur[:, 3], gaussian_blur(x, 20 * 8 / 224 * (1 - 3 / 7)))
    mask = torch.full((2, 1, 8, 8), 0.5, dtype=x.dtype)  # level 3.5
    torch.testing.assert_close(perturb(blur, mask), (blur[:, 3] + blur[:, 4]) / 2)


# -- the objective -----------------------------------------------------------------------------------


def test_the_area_term_by_hand() -> None:
    mask = torch.tensor([[1.0, 0.5, 0.0, 0.9]])
    assert area_gap(mask, torch.tensor([0.5])).tolist() == pytest.approx([(0.5**2 + 0.1**2) / 4])
    assert area_gap(mask, torch.tensor([0.5]), power=1).tolist() == pytest.approx([0.6 / 4])
    assert area_gap(mask, torch.tensor([0.25])).tolist() == pytest.approx([(0.5**2 + 0.9**2) / 4])  # sorted: 0 .5 .9 1 against 0 0 0 1
    even = torch.full((1, 4), 1.0, requires_grad=True)
    gap = area_gap(even, torch.tensor([0.25]))
    assert gap.tolist() == [0.75]
    assert torch.autograd.grad(gap.sum(), even)[0].tolist() == [[2 * 0.75 / 4] * 4]  # equal pixels are treated alike


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_the_area_term_is_the_sorted_distance(seed: int, area: float) -> None:
    mask = noise(2, 1, 6, 7, seed=seed)
    reference = (torch.arange(42) >= int(42 * (1 - area) + 1e-3)).double()
    ordered = mask.flatten(1).sort(1).values
    for power in (1, 2):
        torch.testing.assert_close(area_gap(mask, torch.tensor([area] * 2), power), (ordered - reference).abs().pow(power).mean(1), rtol=1e-3, atol=1e-4)


def test_rewards_by_hand() -> None:
    found, target = torch.tensor([[1.0, 4.0, 2.5], [3.0, 0.0, 1.0]]), torch.tensor([1, 2])
    assert reward_of(found, target).tolist() == [4.0, 1.0]
    assert reward_of(found, target, "contrastive").tolist() == [1.5, -2.0]


def test_the_history_of_three_iterations_by_hand() -> None:
    """Step 1, sigma 1, all parameters 1: reward is the faded score, the area term starts at 300 and grows by 1.0035; the first look is at the mirror image."""
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    x[..., :4] = 1.0
    how = {"perturbation": "fade", "step": 1, "sigma": 1.0}
    _, history = extremal_perturbation(Sums(), x, torch.tensor([0]), 0.2, iterations=3, **how)
    mask, whole = smooth_max_mask(torch.ones(1, 1, 8, 8, dtype=torch.float64), Canvas((8, 8), 1, 1.0))
    assert float(history[0, 0, 0]) == 0.0  # all the light is on the right of the mirror image
    assert float(history[0, 0, 1]) > 20
    plain = extremal_perturbation(Sums(), x, torch.tensor([0]), 0.2, iterations=3, jitter=False, **how)[1]
    assert float(plain[0, 0, 0]) == pytest.approx(float((mask * x)[..., :4].mean()) * 30)
    assert float(plain[0, 1, 0]) == pytest.approx(-300 * float(area_gap(whole, torch.tensor([0.2]))[0]))

    of_image = extremal_perturbation(Sums(), x, torch.tensor([0]), 0.2, iterations=1, area_of="image", **how)[1]
    assert float(of_image[0, 1, 0]) == pytest.approx(-300 * float(area_gap(mask, torch.tensor([0.2]))[0]))

    # the same two steps with SGD written out: v <- g, then v <- 0.9 v + 0.1 g
    p, v, weight = torch.ones(1, 1, 8, 8, dtype=torch.float64), None, 300.0
    for t in range(2):
        p.requires_grad_(True)
        mask, whole = smooth_max_mask(p, Canvas((8, 8), 1, 1.0))
        energy = (mask * x)[..., :4].mean() * 30 - weight * area_gap(whole, torch.tensor([0.2]))[0]
        assert float(energy.detach()) == pytest.approx(float(plain[0, :, t].sum()))
        (g,) = torch.autograd.grad(energy, p)
        v = g if v is None else 0.9 * v + 0.1 * g
        p, weight = (p.detach() + 0.01 * v).clamp(0, 1), weight * 1.0035
    assert float(plain[0, 1, 2]) == pytest.approx(-300 * 1.0035**2 * float(area_gap(smooth_max_mask(p, Canvas((8, 8), 1, 1.0))[1], torch.tensor([0.2]))[0]))


# -- what is found -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["preserve", "delete", "dual"])
def test_the_mask_goes_where_the_score_comes_from(variant: str) -> None:
    x = torch.ones(2, 1, 12, 12, dtype=torch.float64)
    part = ExtremalPerturbations(0.2, variant=variant, perturbation="fade", iterations=100, jitter=False, area_of="image")
    found = part(Sums(), x, torch.tensor([0, 1]))
    assert found.map is not None
    left = found.map[..., :6].sum((1, 2, 3)) / found.map.sum((1, 2, 3))
    assert float(left[0]) > 0.95
    assert float(left[1]) < 0.05
    assert found.table["reached"] == pytest.approx([0.2], abs=0.05)
    assert found.table["areas"] == [0.2]
    torch.testing.assert_close(found.map[:1], found.map[1:].flip(3))  # the two tasks are mirror images


def test_areas_are_rows_of_their_own_and_averaged() -> None:
    x = noise(2, 3, 8, 8, seed=3)
    both = ExtremalPerturbations((0.1, 0.3), iterations=20)(Sums(), x, 1)
    for area in (0.1, 0.3):
        alone = ExtremalPerturbations(area, iterations=20)(Sums(), x, 1)
        assert alone.map is not None
        torch.testing.assert_close(both.images[f"mask {area}"], alone.map)
    torch.testing.assert_close(both.map, (both.images["mask 0.1"] + both.images["mask 0.3"]) / 2)
    smooth = ExtremalPerturbations((0.1, 0.3), iterations=20, smooth=0.09)(Sums(), x, 1)
    torch.testing.assert_close(smooth.map, gaussian_blur(both.map, 0.09 * 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    """Also from the even mask at the start, where sorting would choose among equal pixels by their rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    x, target = noise(5, 1, 12, 12).to(dtype), torch.tensor([0, 1, 2, 1, 0])
    whole = ExtremalPerturbations(iterations=60)(net, x, target).map
    assert whole is not None
    for i in (0, 3):
        torch.testing.assert_close(ExtremalPerturbations(iterations=60)(net, x[i : i + 1], int(target[i])).map, whole[i : i + 1], rtol=0, atol=2e-3)


def test_the_smallest_area_that_is_enough() -> None:
    """Light in a patch of 4 x 4 on the left: the larger the area, the more of it is kept."""
    x = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
    x[0, :, 4:8, 1:5] = 6.0
    areas, how = (0.02, 0.15), {"perturbation": "fade", "iterations": 100, "jitter": False}
    kept = {a: float((extremal_perturbation(Sums(), x[:1], torch.tensor([0]), a, **how)[0] * x[:1])[..., :6].mean()) * 30 for a in areas}
    assert kept[0.02] < kept[0.15]
    threshold = (kept[0.02] + kept[0.15]) / 2
    found = minimal_extremal_area(Sums(), x, torch.tensor([0, 0]), areas, threshold, **how)
    assert found.tolist() == [0.15, math.inf]  # no part of a black picture is enough


def test_channels_that_alone_keep_the_score() -> None:
    """Channels are x times (1, 2, 3, 4), the score of class 0 weighs them (0, 3, -1, 0.5): the best is channel 1, the second channel 3."""
    conv, head = nn.Conv2d(1, 4, 1, bias=False), nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        conv.weight[:, 0, 0, 0] = torch.tensor([1.0, 2, 3, 4])
        head.weight[:] = torch.tensor([[0.0, 3, -1, 0.5], [0, 0, 1, 0]]) * 10
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double().eval()
    x = noise(3, 1, 6, 6) + 0.5
    first, history = channel_extremal(net, x, torch.tensor([0, 0, 1]), 1, "0", iterations=150)
    assert history.shape == (3, 2, 150)
    assert first.argmax(1).tolist() == [1, 1, 2]
    second, _ = channel_extremal(net, x[:1], torch.tensor([0]), 2, "0", iterations=150)
    assert set(second[0].topk(2).indices.tolist()) == {1, 3}
    assert not conv._forward_hooks
    with pytest.raises(Mistake, match=r"keep=5: layer '0' has 4 channels; keep 1 to 4"):
        channel_extremal(net, x, torch.tensor([0, 0, 1]), 5, "0")


# -- what is refused ---------------------------------------------------------------------------------


def test_refusals_say_why() -> None:
    with pytest.raises(Mistake, match=r"areas=\(1.2,\): give at least one share of the image"):
        ExtremalPerturbations(1.2)
    with pytest.raises(Mistake, match="variant='keep': must be one of preserve, delete, dual"):
        ExtremalPerturbations(variant="keep")
    with pytest.raises(Mistake, match="iterations=1 and levels=8 must be at least 2"):
        ExtremalPerturbations(iterations=1)
    with pytest.raises(Mistake, match="step=0 must be at least 1 pixel"):
        ExtremalPerturbations(step=0)
    with pytest.raises(Mistake, match=r"masks images \[n c h w\]"):
        ExtremalPerturbations()(nn.Linear(4, 3), torch.rand(2, 4))
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(Mistake, match="this answer has one score; take reward=simple"):
        ExtremalPerturbations(reward="contrastive")(one, torch.rand(2, 1, 8, 8))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    net.differentiable = False  # type: ignore[assignment]
    with pytest.raises(Mistake, match="extremal-perturbations needs gradients"):
        ExtremalPerturbations()(net, torch.rand(2, 1, 8, 8))
