"""I-GOS: regulariser, direction and line search by hand; the plain search beside it; deletion and insertion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.blur import gaussian_blur
from convince.explain.i_gos import IGos, Removal, baseline_of, cells_of, deletion, enlarge, i_gos, insertion, mask_opt_plain, masked, regulariser
from convince.fit.answer import Answer, Normalise


class Light(nn.Module):
    """One score, a number of its own: ``scale`` times the mean pixel, to a power."""

    logits = False

    def __init__(self, scale: float, power: int = 1) -> None:
        super().__init__()
        self.scale, self.power = scale, power

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x.mean((1, 2, 3)) ** self.power)[:, None]


class Patch(nn.Module):
    """Class 1 where the upper left quarter is light, else class 0."""

    def forward(self, x: Tensor) -> Tensor:
        light = x[:, :, : x.shape[2] // 2, : x.shape[3] // 2].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(light), 12 * light - 6], 1)


def small_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
        net[4].weight.data *= 8
    return net.to(dtype).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- by hand -----------------------------------------------------------------------------------------


def test_the_worked_regulariser() -> None:
    mask = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    assert regulariser(mask, 1.0, 0.0).tolist() == [0.25]
    assert regulariser(mask, 0.0, 1.0).tolist() == [1.0]
    assert regulariser(mask, 1.0, 20.0).tolist() == [20.25]


def test_masks_are_enlarged_corner_on_corner_and_applied() -> None:
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    large = enlarge(mask, (3, 3))
    assert large[0, 0].tolist() == [[1.0, 0.5, 0.0], [0.5, 0.5, 0.5], [0.0, 0.5, 1.0]]
    x, b = torch.full((1, 2, 3, 3), 0.8), torch.full((1, 2, 3, 3), 0.4)
    torch.testing.assert_close(masked(x, b, large)[0, 1], 0.4 + 0.4 * large[0, 0])


def test_sizes_go_with_the_image() -> None:
    x = noise(1, 1, 224, 240)
    torch.testing.assert_close(baseline_of(x), gaussian_blur(x, 50.0, 25))
    small = x[..., :28, :28]
    torch.testing.assert_close(baseline_of(small), gaussian_blur(small, 6.25, 3))
    assert float(baseline_of(x, "black").sum()) == 0
    assert [cells_of(torch.zeros(1, 1, side, 64), None) for side in (8, 28, 56)] == [4, 14, 28]
    assert cells_of(x, None) == 28
    assert cells_of(x, 112) == 112


def test_the_line_search_by_hand() -> None:
    """A white image, baseline black: F(m) = c mean(m) + l1 (1 - mean m) for an even mask. It falls with the mask where c > l1 only."""
    x = torch.ones(2, 1, 4, 4, dtype=torch.float64)
    how = {"baseline": "black", "size": 2, "tv": 0.0, "l1": 1.0, "iterations": 1, "noise": 0.0, "ig_steps": 1}
    gone, values = i_gos(Light(3.0), x, torch.tensor([0, 0]), **how)
    assert gone.tolist() == [[[[0.0] * 2] * 2]] * 2  # 200 g = 100 is far more than enough
    torch.testing.assert_close(values, torch.tensor([[3.0, 1.0]] * 2, dtype=x.dtype))
    kept, values = i_gos(Light(0.5), x, torch.tensor([0, 0]), **how)
    # |1 - m| has no slope at m = 1, so g = 0.125 points down, where nothing falls: the first step below 1e-5 is taken, 200 * 0.2^11
    torch.testing.assert_close(kept, torch.full_like(kept, 1 - 200 * 0.2**11 * 0.125), rtol=0, atol=1e-12)
    torch.testing.assert_close(values, torch.tensor([[0.5, 0.5]] * 2, dtype=x.dtype), rtol=0, atol=1e-6)

    # from m = 1/2 with F = mean(m)^2 + 2 (1 - mean m): dF/dm = (2 * 0.5 - 2) / 4 = -1/4 a cell, |g|^2 = 1/4
    task = Removal(Light(1.0, 2), x[:1], x[:1] * 0, torch.tensor([0]), 2.0, 0.0)
    half = torch.full((1, 1, 2, 2), 0.5, dtype=x.dtype)
    g = task.direction(half, torch.zeros(1, 1, 4, 4))
    torch.testing.assert_close(g, torch.full_like(half, -0.25))
    before = task.objective(half, torch.tensor([0]))
    assert float(before) == pytest.approx(1.25)
    # a = 2: m = 1, F = 1 and 1.25 - 2e-4 * 2 / 4 is above that
    torch.testing.assert_close(task.descend(half, g, before, 2.0), torch.ones_like(half))
    # uphill nothing falls: 2 * 0.2^8 = 5.12e-6 is the first step below 1e-5, and it is taken
    torch.testing.assert_close(task.descend(half, -g, before, 2.0), half - 2.0 * 0.2**8 * 0.25, rtol=0, atol=1e-12)


def test_each_row_searches_by_itself() -> None:
    """F = (c mean m)^2 is steep for one row and flat for another: their steps differ, and neither looks at the other."""
    x = torch.cat([torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.1)]).double()
    how = {"baseline": "black", "size": 2, "tv": 0.0, "l1": 0.3, "iterations": 3, "noise": 0.0, "ig_steps": 2, "alpha0": 8.0}
    both, values = i_gos(Light(1.0, 2), x, torch.tensor([0, 0]), **how)
    for i in range(2):
        alone, own = i_gos(Light(1.0, 2), x[i : i + 1], torch.tensor([0]), **how)
        torch.testing.assert_close(alone, both[i : i + 1])
        torch.testing.assert_close(own, values[i : i + 1])
    assert float(both[0].mean()) < 0.5 < float(both[1].mean())


# -- directions --------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_the_direction_is_the_gradient_of_the_averaged_path(seed: int, steps: int) -> None:
    net, x, mask = small_net(), noise(3, 1, 8, 8, seed=seed), noise(3, 1, 4, 4, seed=seed + 1)
    added, target = noise(steps, 1, 8, 8, seed=seed + 2) - 0.5, torch.tensor([0, 1, 2])
    task = Removal(net, x, baseline_of(x), target, 1.0, 20.0)
    leaf = mask.clone().requires_grad_(True)
    large = F.interpolate(leaf, size=(8, 8), mode="bilinear", align_corners=True)
    total = regulariser(leaf, 1.0, 20.0).sum()
    for s in range(1, steps + 1):
        shown = x * (s / steps * large) + task.baseline * (1 - s / steps * large) + added[s - 1]
        total = total + net(shown).softmax(1).gather(1, target[:, None]).sum() / steps
    torch.testing.assert_close(task.direction(mask, added), torch.autograd.grad(total, leaf)[0])


def test_one_step_without_noise_is_the_slope_of_what_the_search_compares() -> None:
    net, x, mask, target = small_net(), noise(2, 1, 8, 8), noise(2, 1, 4, 4, seed=1), torch.tensor([0, 1])
    task = Removal(net, x, baseline_of(x), target, 1.0, 20.0)
    slope = task.direction(mask, torch.zeros(1, 1, 8, 8, dtype=x.dtype))
    for row, i, j in ((0, 0, 0), (1, 2, 3)):
        up, down = mask.clone(), mask.clone()
        up[row, 0, i, j] += 1e-5
        down[row, 0, i, j] -= 1e-5
        rise = (task.objective(up, torch.arange(2)) - task.objective(down, torch.arange(2))) / 2e-5
        assert float(rise[row]) == pytest.approx(float(slope[row, 0, i, j]), rel=1e-4, abs=1e-7)


def test_noise_is_in_units_of_the_normalised_image() -> None:
    class Hidden(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    answer = Answer(Normalise([0.3], [0.25]), small_net()).double().eval()
    x, target, how = noise(2, 1, 8, 8), torch.tensor([0, 1]), {"iterations": 2, "ig_steps": 4, "l1": 0.0, "tv": 0.01, "baseline": "black"}
    said, _ = i_gos(answer, x, target, noise=0.4, **how)
    pixels, _ = i_gos(Hidden(answer), x, target, noise=0.1, **how)
    torch.testing.assert_close(said, pixels)
    none, _ = i_gos(answer, x, target, noise=0.0, **how)
    assert float((said - none).abs().max()) > 0.01


# -- what is found -----------------------------------------------------------------------------------


def test_both_searches_find_the_patch_and_never_climb() -> None:
    x = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    how = {"baseline": "black", "l1": 0.3, "tv": 0.5}
    for mask, values in (i_gos(Patch(), x, torch.tensor([1]), **how), mask_opt_plain(Patch(), x, torch.tensor([1]), iterations=40, **how)):
        heat = 1 - enlarge(mask, (16, 16))
        assert float(heat[..., :8, :8].sum() / heat.sum()) > 0.6  # a quarter of the image
        assert float(values[0, 0]) == pytest.approx(1 / (1 + torch.e**-6), abs=1e-3)
        assert float(values[0, -1]) < 0.5
        assert bool((values.diff() <= 1e-5).all())


def test_the_map_is_what_is_taken_away() -> None:
    x = noise(2, 3, 12, 12)
    found = IGos(iterations=3, ig_steps=4)(Patch(), x, 1)
    mask, values = i_gos(Patch(), x, torch.tensor([1, 1]), iterations=3, ig_steps=4)
    assert found.map is not None
    torch.testing.assert_close(found.images["mask"], mask)
    torch.testing.assert_close(found.map, 1 - enlarge(mask, (12, 12)))
    assert found.table["mask"] == [6, 6]
    assert found.table["F"] == pytest.approx([float(values[:, 0].mean()), float(values[:, -1].mean())])
    assert 0 < found.table["chance left"] < 1
    other = IGos(iterations=3, ig_steps=4, seed=1)(Patch(), x, 1)
    assert other.map is not None
    assert not torch.equal(found.map, other.map)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    net, x, target = small_net(dtype), noise(5, 1, 12, 12).to(dtype), torch.tensor([0, 1, 2, 1, 0])
    part = IGos(iterations=4, ig_steps=9)
    whole = part(net, x, target).map
    assert whole is not None
    assert whole.dtype == dtype
    for i in (0, 3):
        torch.testing.assert_close(part(net, x[i : i + 1], int(target[i])).map, whole[i : i + 1], rtol=0, atol=1e-4)


def test_works_in_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = IGos(iterations=1, ig_steps=2)(small_net(torch.float32), noise(2, 1, 8, 8).float(), 1)
    assert found.map is not None
    assert found.map.dtype == torch.float32


# -- deletion and insertion --------------------------------------------------------------------------


def test_areas_under_the_curves_by_hand() -> None:
    """Pixels 4, 2, 1, 1 in order of heat: deletion reads 8, 4, 2, 1, 0 eighths, insertion 0, 4, 6, 7, 8."""
    x = torch.tensor([[[[4.0, 2.0], [1.0, 1.0]]]])
    heat = torch.tensor([[[[0.9, 0.8], [0.5, 0.1]]]])
    arguments = Light(1.0), x, heat, torch.tensor([0]), torch.zeros_like(x)
    assert deletion(*arguments, steps=4).tolist() == [(4 + 4 + 2 + 1) / 8 / 4]
    assert insertion(*arguments, steps=4).tolist() == [(4 + 6 + 7 + 4) / 8 / 4]
    worst = Light(1.0), x, -heat, torch.tensor([0]), torch.zeros_like(x)
    assert deletion(*worst, steps=4).tolist() == [(4 + 7 + 6 + 4) / 8 / 4]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_deleting_by_heat_is_inserting_by_cold(seed: int) -> None:
    x, heat = noise(2, 1, 5, 5, seed=seed), noise(2, 1, 5, 5, seed=seed + 1)
    black, target = torch.zeros_like(x), torch.tensor([0, 0])
    torch.testing.assert_close(deletion(Light(1.0), x, heat, target, black, 25), insertion(Light(1.0), x, -heat, target, black, 25))


# -- what is refused ---------------------------------------------------------------------------------


def test_refusals_say_why() -> None:
    with pytest.raises(Mistake, match="baseline='white': must be 'blur' or 'black'"):
        IGos(baseline="white")
    with pytest.raises(Mistake, match="size=1: the mask's side must be at least 2"):
        IGos(size=1)
    with pytest.raises(Mistake, match="ig_steps=0 and iterations=15 must be at least 1"):
        IGos(ig_steps=0)
    with pytest.raises(Mistake, match=r"noise=-0\.1 must be at least 0"):
        IGos(noise=-0.1)
    with pytest.raises(Mistake, match=r"i-gos masks images \[n c h w\]"):
        IGos()(nn.Linear(4, 3), torch.rand(2, 4))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    net.differentiable = False  # type: ignore[assignment]
    with pytest.raises(Mistake, match="i-gos needs gradients"):
        IGos()(net, torch.rand(2, 1, 8, 8))
