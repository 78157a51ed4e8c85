"""RICS and shift consistency: bounds by hand, exact consistency of the cyclic variant, equal crops to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.errors import Mistake
from convince.robust.rics import (
    CropChosen,
    Rics,
    choose,
    contrast_filters,
    crop_scores,
    cut,
    cyclic_shift,
    random_filters,
    realistic_shift,
    takes,
    theoretical_consistency,
    worst_of_eight,
    zero_pad_shift,
)
from convince.robust.shift_consistency import ShiftConsistency, consistency, neighbours, representations


class Sees(nn.Module):
    """Scores that tell any two crops apart: a random linear map of a convolution's pooled output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def seeded(make, seed: int = 0):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def noise(n: int, side: int, seed: int = 0, channels: int = 1) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, side, side), generator=gen).float() / 255


# -- what is promised --------------------------------------------------------------------------------


def test_bounds_by_hand() -> None:
    """k = 9 and 29 places: one pixel sideways 2 / (k + 1), the worst of eight 1 - (k - 2)^2 / (k + 2)^2."""
    assert 1 - theoretical_consistency(17, 9, 1) == pytest.approx(0.2)
    assert 1 - theoretical_consistency(64, 36, 1) == pytest.approx(0.066667, abs=1e-6)
    assert 1 - worst_of_eight(17, 9) == pytest.approx(0.595041, abs=1e-6)
    assert 1 - worst_of_eight(64, 36) == pytest.approx(0.241415, abs=1e-6)
    assert theoretical_consistency(10, 6, (1, 1)) == 16 / 34  # 5 x 5 places, 4 x 4 shared
    assert theoretical_consistency(10, 6, 0) == 1
    assert theoretical_consistency(10, 6, 7) == 0
    with pytest.raises(Mistake, match="n=5, m=6"):
        theoretical_consistency(5, 6, 1)


@given(st.integers(2, 60), st.integers(1, 60))
def test_one_pixel_sideways_is_two_over_k_plus_one(k: int, m: int) -> None:
    assert 1 - theoretical_consistency(k + m - 1, m, 1) == pytest.approx(2 / (k + 1))


# -- the score and the choice ------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    """A 2x2 filter on the middle of 4x4 crops of a 6x6 image: 3 x 3 places, its patch one pixel inside each crop."""
    x = torch.arange(36.0).view(1, 1, 6, 6) / 255
    filters = torch.tensor([[[[1.0, 0], [0, 0]]], [[[0.0, 0], [0, 1]]]])
    scores = crop_scores(x, filters, (4, 4))
    assert scores[0, 0].tolist() == [[7, 8, 9], [13, 14, 15], [19, 20, 21]]
    assert scores[0, 1].tolist() == [[14, 15, 16], [20, 21, 22], [26, 27, 28]]
    around = crop_scores(x, filters, (4, 4), cyclic=True)
    assert around.shape == (1, 2, 6, 6)
    assert around[0, 0, :3, :3].tolist() == scores[0, 0].tolist()
    assert around[0, 0, 5, 5] == 0  # the crop at (5, 5) goes round: its patch starts at (0, 0)
    assert [int(v) for v in choose(scores)] == [2, 2]
    assert cut(x, *choose(scores), (4, 4)).equal(x[:, :, 2:, 2:])


def test_ties_break_by_content_then_nearest_the_middle() -> None:
    scores = torch.zeros(4, 2, 3, 3, dtype=torch.int64)
    scores[0, 0, 0, 1] = scores[0, 0, 2, 2] = 5
    scores[0, 1, 2, 2] = 1  # the second filter decides
    scores[0, 1, 1, 1] = 9  # but only among the best of the first
    scores[1, 0, 0, 0] = scores[1, 0, 2, 1] = 7  # equal to both: (2, 1) is nearer the middle
    scores[3] = -4
    row, column = choose(scores)
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == [(2, 2), (2, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("patch", [2, 3, 5, 7])
def test_filters_are_whole_numbers_without_mean(patch: int) -> None:
    for filters in (random_filters(patch, 3), contrast_filters(patch, 3)):
        assert filters.shape == (2, 1, patch, patch)
        assert torch.equal(filters, filters.round())
        assert filters.flatten(1).sum(1).tolist() == [0.0, 0.0]
        assert float(filters.abs().sum(1).amax()) * 255 * 3 < 2**24  # exact in fp32
    assert torch.equal(random_filters(patch, 3), random_filters(patch, 3))
    assert not torch.equal(random_filters(patch, 3), random_filters(patch, 4))


def test_contrast_by_hand() -> None:
    assert contrast_filters(3, 0)[0, 0].tolist() == [[-1.0, -1.0, -1.0], [-1.0, 8.0, -1.0], [-1.0, -1.0, -1.0]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), down=st.integers(-2, 2), right=st.integers(-2, 2), channels=st.sampled_from([1, 3]))
def test_equal_content_scores_equally_to_the_bit(seed: int, down: int, right: int, channels: int) -> None:
    big, filters = noise(2, 18, seed, channels), random_filters(5, seed)
    a = crop_scores(realistic_shift(big, (0, 0), (14, 14)), filters, (8, 8))
    b = crop_scores(realistic_shift(big, (down, right), (14, 14)), filters, (8, 8))
    r, c = max(down, 0), max(right, 0)
    h, w = 7 - abs(down), 7 - abs(right)
    assert torch.equal(a[:, :, r : r + h, c : c + w], b[:, :, r - down : r - down + h, c - right : c - right + w])


# -- shifts ------------------------------------------------------------------------------------------


def test_shifts_by_hand() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert realistic_shift(x, (0, 0), (2, 2)).flatten().tolist() == [5, 6, 9, 10]
    assert realistic_shift(x, (-1, 1), (2, 2)).flatten().tolist() == [2, 3, 6, 7]
    assert cyclic_shift(x, (1, 0))[0, 0, :, 0].tolist() == [4, 8, 12, 0]
    assert zero_pad_shift(x, (1, 0))[0, 0, :, 0].tolist() == [4, 8, 12, 0]
    assert zero_pad_shift(x, (0, -1))[0, 0, 1].tolist() == [0, 4, 5, 6]
    with pytest.raises(Mistake, match=r"d=\(2, 0\)"):
        realistic_shift(x, (2, 0), (2, 2))
    assert len(set(neighbours())) == 8


# -- the wrapped answer ------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), down=st.integers(0, 12), right=st.integers(0, 12))
def test_cyclic_never_changes_under_circular_shifts(seed: int, down: int, right: int) -> None:
    x, wrapped = noise(4, 13, seed), Rics(crop=9, cyclic=True).wrap(seeded(Sees))
    moved = cyclic_shift(x, (down, right))
    assert torch.equal(wrapped.chosen(moved), wrapped.chosen(x))
    assert torch.equal(wrapped(moved), wrapped(x))  # exactly 0 flips, equal to the bit


def test_where_the_crop_is_the_same_the_logits_are_too() -> None:
    """Over the eight neighbours: the same place in the scene, the same bits. About (k - 2)^2 / (k + 2)^2 keep their crop in all."""
    big = noise(300, 34)
    wrapped = CropChosen(seeded(Sees), random_filters(5, 0), 16)
    frame = realistic_shift(big, (0, 0), (32, 32))
    (row, column), before = wrapped.place(frame), wrapped(frame)
    kept_all, rates = torch.ones(300, dtype=torch.bool), []
    for d in neighbours():
        shifted = realistic_shift(big, d, (32, 32))
        (r, c), after = wrapped.place(shifted), wrapped(shifted)
        same = (r + d[0] == row) & (c + d[1] == column)
        assert torch.equal(after[same], before[same])
        kept_all &= same
        rates.append((theoretical_consistency(32, 16, d), float(same.double().mean())))
    # k = 17; the score of noise is close to exchangeable: five standard errors of a share of 300
    for bound, rate in rates:
        assert abs(rate - bound) < 5 * (bound * (1 - bound) / 300) ** 0.5
    assert abs(float(kept_all.double().mean()) - worst_of_eight(32, 16)) < 5 * 0.03


def test_a_smooth_score_sits_on_borders_more_often() -> None:
    big = noise(200, 34)
    smooth = torch.stack([torch.ones(1, 9, 9), random_filters(9, 0)[1]])
    changed = {}
    for name, filters in (("random", random_filters(5, 0)), ("smooth", smooth)):
        wrapped = CropChosen(seeded(Sees), filters, 16)
        a, b = (wrapped.place(realistic_shift(big, d, (32, 32))) for d in ((0, 0), (0, 1)))
        changed[name] = float(((b[0] != a[0]) | (b[1] + 1 != a[1])).double().mean())
    assert changed["smooth"] > changed["random"]


def test_off_is_the_answer_itself_and_wrapping_is_inert() -> None:
    net, x = seeded(Sees), noise(3, 12)
    assert torch.equal(Rics(crop=1.0).wrap(net)(x), net(x))
    wrapped = Rics(crop=8).wrap(net)
    assert not wrapped.training
    mixed = nn.Sequential(seeded(Sees)).train()
    mixed[0].eval()
    Rics().wrap(mixed)
    assert [m.training for m in mixed.modules()] == [True, False, False, False]  # the modes beneath stay
    assert torch.equal(copy.deepcopy(wrapped)(x), wrapped(x))
    assert set(wrapped.state_dict()) == {"answer." + name for name in net.state_dict()}  # the filter follows from the seed
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wrapped.chosen(x), wrapped.chosen(x.clone()))
    assert torch.equal(wrapped.double().chosen(x.double()).float(), wrapped.float().chosen(x))
    a, b = (Rics(crop=8, seed=s).wrap(net).place(noise(40, 12)) for s in (0, 1))
    assert not torch.equal(torch.stack(a), torch.stack(b))


def test_sizes_as_pixels_shares_and_default() -> None:
    net = seeded(Sees)
    assert Rics().wrap(net).chosen(noise(2, 8)).shape == (2, 1, 7, 7)
    assert Rics(crop=0.5).wrap(net).chosen(noise(2, 28)).shape == (2, 1, 14, 14)
    assert Rics(crop=10).wrap(net).chosen(noise(2, 28)).shape == (2, 1, 10, 10)
    assert Rics(crop=0.5).wrap(net).chosen(torch.rand(2, 1, 20, 30)).shape == (2, 1, 10, 15)
    for options, said in (({"crop": 0.0}, "crop=0.0"), ({"crop": 0}, "crop=0"), ({"score": "hash"}, "score='hash'"), ({"patch": 1}, "patch=1")):
        with pytest.raises(Mistake, match=said):
            Rics(**options)
    with pytest.raises(Mistake, match="larger than the image of 8x8"):
        Rics(crop=9).wrap(net)(noise(1, 8))
    with pytest.raises(Mistake, match="smaller than the filter of 5"):
        Rics(crop=4).wrap(net)(noise(1, 8))
    with pytest.raises(Mistake, match=r"images \[n c h w\]"):
        Rics().wrap(net)(torch.rand(2, 5))


def test_crops_are_enlarged_only_where_the_answer_needs_it() -> None:
    fixed = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 4)))
    x = noise(3, 12)
    wrapped = Rics(crop=8).wrap(fixed)
    by_hand = F.interpolate(wrapped.chosen(x), size=(12, 12), mode="bilinear", align_corners=False)
    assert torch.equal(wrapped(x), fixed(by_hand))
    batch = nn.Sequential(nn.BatchNorm2d(1), fixed).train()
    assert not takes(batch, x, (8, 8))
    assert takes(batch, x, (12, 12))
    assert batch.training
    assert int(batch[0].num_batches_tracked) == 0
    free = seeded(Sees)
    assert torch.equal(Rics(crop=8).wrap(free)(x), free(Rics(crop=8).wrap(free).chosen(x)))


def test_gradients_reach_the_chosen_pixels_only() -> None:
    x = noise(2, 12).requires_grad_(True)
    wrapped = Rics(crop=8).wrap(seeded(Sees))
    wrapped(x).sum().backward()
    row, column = wrapped.place(x)
    for i in range(2):
        inside = torch.zeros(12, 12, dtype=torch.bool)
        inside[row[i] : row[i] + 8, column[i] : column[i] + 8] = True
        assert bool((x.grad[i, 0][inside] != 0).any())
        assert not bool(x.grad[i, 0][~inside].any())


# -- the probe ---------------------------------------------------------------------------------------


def test_consistency_by_hand() -> None:
    """Scores are two pixels: image 0 flips in the second shift, image 1 never, image 2 in both."""

    def answer(x: Tensor) -> Tensor:
        return x.flatten(1).log()

    def images(*rows: tuple[float, float]) -> Tensor:
        return torch.tensor(rows).view(-1, 1, 1, 2)

    frame = images((0.8, 0.2), (0.3, 0.7), (0.6, 0.4))
    shifted = [images((0.7, 0.3), (0.3, 0.7), (0.4, 0.6)), images((0.2, 0.8), (0.4, 0.6), (0.2, 0.8))]
    found = consistency(answer, frame, shifted, torch.tensor([0, 1, 1]))
    assert found["flips"] == pytest.approx(3 / 6)
    assert found["worst_flips"] == pytest.approx(2 / 3)
    assert found["moved"] == pytest.approx((0.1 + 0.0 + 0.2 + 0.6 + 0.1 + 0.4) / 6)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["worst_accuracy"] == pytest.approx(1 / 3)
    with pytest.raises(Mistake, match="at least one image"):
        consistency(answer, frame[:0], [], torch.tensor([], dtype=torch.int64))


def test_the_probe_reads_eight_neighbours() -> None:
    x, y = noise(20, 14), torch.arange(20) % 4
    net = seeded(Sees)
    values = {r.name: r.value for r in ShiftConsistency().probe(net, x, y).readings}
    assert len(values) == 6
    assert 0 <= values["changed answers, one shift"] <= values["changed answers, worst of 8 shifts"] <= 1
    cyclic = Rics(crop=9, cyclic=True).wrap(net)
    found = {r.name: r.value for r in ShiftConsistency(kind="cyclic").probe(cyclic, x, y).readings}
    assert found["changed answers, worst of 8 shifts"] == 0
    assert found["change of the answer's probability"] == 0
    assert found["changed representations, cosine below 0.9"] == 0
    fixed = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(196, 4)))
    assert len(ShiftConsistency().probe(fixed, x, y).readings) == 6  # frames of 12 px are enlarged to 14
    assert torch.equal(representations(fixed, x), x.flatten(1))
    assert representations(seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 14), nn.Flatten())), x) is None
    for options, said in (({"pixels": 0}, "pixels=0"), ({"kind": "wrap"}, "kind='wrap'"), ({"similar": 2.0}, "similar=2.0")):
        with pytest.raises(Mistake, match=said):
            ShiftConsistency(**options)
