"""CutMix by hand: the box of the released rule, exact shares, the timm parity, order beside crops; Mixup and Cutout."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.augment.cutmix import CutMix, box, cutmix, rand_bbox
from convince.augment.cutout import Cutout, cutout
from convince.augment.mixup import Mixup, mixup
from convince.checks.subject import MODEL, tiny_images
from convince.errors import Mistake
from convince.fit.adapters import seat
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.technique import Team
from convince.fit.train import prepare


def coded(n=6, h=8, w=8, k=None):
    """Images whose every pixel is the image's number, so that a pixel tells where it came from."""
    x = torch.arange(n, dtype=torch.float64).view(n, 1, 1, 1).expand(n, 1, h, w).contiguous()
    return x, F.one_hot(torch.arange(n), k or n).double()


def test_worked_box():
    """H = W = 8, lambda 0.75: side 4; centre (x 0, y 3): x 0 to 2, y 1 to 5, area 8, lambda after clipping 0.875."""
    top, bottom, left, right = box(8, 8, 0.25, row=3, column=0)
    assert (left, right) == (0, 2)
    assert (top, bottom) == (1, 5)
    assert 1 - (bottom - top) * (right - left) / 64 == 0.875


def test_sides_are_rounded_down_as_released():
    """28 px, lambda 0.5: int(28 sqrt 0.5) = 19, half 9: an inner box is 18 wide."""
    assert box(28, 28, 0.5, row=14, column=14) == (5, 23, 5, 23)
    assert box(8, 8, 0.0, row=4, column=4) == (4, 4, 4, 4)
    assert box(8, 8, 1.0, row=4, column=4) == (0, 8, 0, 8)


def timm_file(name):
    """One file of timm alone: importing the package takes seconds."""
    spec = importlib.util.find_spec("timm")
    path = Path(spec.submodule_search_locations[0], *name.split("."))
    spec = importlib.util.spec_from_file_location("oracle", path.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_box_agrees_with_timm(lam):
    """timm draws the same box around the same centre where a side is even, and one pixel more where it is odd."""
    timm_box = timm_file("data.mixup").rand_bbox
    tall, wide = (int(side * (1 - lam) ** 0.5) % 2 for side in (20, 28))
    for row, column in [(0, 0), (3, 25), (10, 14), (19, 27), (12, 2)]:
        with patch("numpy.random.randint", side_effect=[row, column]):
            top, bottom, left, right = (int(v) for v in timm_box((2, 1, 20, 28), lam))
        mine = box(20, 28, 1 - lam, row, column)
        assert (mine[0], mine[2]) == (top, left)
        assert mine[1] == bottom or (tall and mine[1] + 1 == bottom)
        assert mine[3] == right or (wide and mine[3] + 1 == right)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_box_lies_inside(h, w, lam, seed):
    top, bottom, left, right = rand_bbox(h, w, lam, generator(seed))
    assert 0 <= top <= bottom <= h
    assert 0 <= left <= right <= w
    assert (bottom - top) * (right - left) <= (1 - lam) * h * w + 1e-9


@given(st.integers(2, 9), st.sampled_from([(8, 8), (7, 10), (4, 16)]), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_label_share_is_the_pixel_share(n, size, seed):
    """Counting the pixels of each source image gives the label; rows sum to 1; inputs stay."""
    x, y = coded(n, *size)
    kept = x.clone(), y.clone()
    mixed, soft = cutmix(x, y, generator(seed))
    counted = torch.stack([torch.bincount(row.flatten().long(), minlength=n) for row in mixed]).double() / (size[0] * size[1])
    exact = size[0] * size[1] in (64, 32)  # shares of a power of two have no rounding
    torch.testing.assert_close(soft, counted, rtol=0, atol=0 if exact else 1e-15)
    torch.testing.assert_close(soft.sum(1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


def test_one_box_and_one_permutation_for_the_batch():
    x, y = coded(12)
    mixed, _ = cutmix(x, y, generator(5))
    changed = mixed != x
    masks = [changed[i, 0] for i in range(12) if changed[i].any()]
    assert len(masks) >= 8
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    inside = masks[0].nonzero()[0]
    assert sorted(mixed[:, 0, inside[0], inside[1]].tolist()) == list(range(12))


def test_lambda_is_beta():
    """alpha 10,000: lambda is about a half, so no box is larger; alpha 1: boxes of up to nearly the whole image occur."""
    y = torch.eye(2, dtype=torch.float64)
    x = torch.zeros(2, 1, 64, 64, dtype=torch.float64)

    def shares(alpha):
        mixed = [cutmix(x, y, generator("beta", i), alpha=alpha)[1] for i in range(200)]
        return torch.tensor([float(soft[0, 1]) for soft in mixed])

    narrow, wide = shares(1e4), shares(1.0)
    assert 0.45 < float(narrow.max()) < 0.51
    assert float(wide.max()) > 0.8
    assert 0.25 < float((wide > 0).double().mean()) < 0.65  # half of the permutations of two swap them


def test_prob_is_the_share_of_mixed_batches():
    x, y = coded(8)
    mixed = sum(cutmix(x, y, generator(i), prob=0.3)[0] is not x for i in range(1000))
    assert 240 < mixed < 360  # 300 expected, sd 14.5
    assert all(cutmix(x, y, generator(i), prob=0.0)[0] is x for i in range(50))
    assert all(cutmix(x, y, generator(i), prob=1.0)[0] is not x for i in range(50))


def test_layout_and_dtype_are_kept():
    x = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last)
    mixed, soft = cutmix(x, F.one_hot(torch.arange(4)).float(), generator(0))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mixed.dtype == soft.dtype == torch.float32


def test_mixing_comes_after_crops_and_before_smoothing():
    names = [s.name for s in Team([seat(n) for n in ("label-smoothing", "class-weights", "cutmix", "flip-crop", "mixup", "cutout")]).seats]
    assert names == ["flip-crop", "cutmix", "cutout", "mixup", "class-weights", "label-smoothing"]


def test_loop_sees_mixed_labels_of_the_same_box():
    """In a real run the soft labels of each batch equal the share of replaced pixels."""
    run = prepare(make(model=MODEL, batch=8, epochs=1, precision="fp64", parts=("cutmix",)), tiny_images())
    seen = []
    made = run.team.seats[0].technique
    inner = made.on_batch

    def watch(run):
        before = run.batch.x.clone()
        inner(run)
        seen.append(((run.batch.x != before).any(1).double().mean((1, 2)).max(), 1 - run.batch.y.max(1).values))

    made.on_batch = watch
    fit(run)
    assert len(seen) == 4
    assert any(float(share.max()) > 0 for _, share in seen)
    for pixels, share in seen:
        mixed = torch.minimum(share, 1 - share)[share > 0]
        if len(mixed):
            torch.testing.assert_close(mixed, torch.minimum(pixels, 1 - pixels).expand_as(mixed))


@pytest.mark.parametrize(("make_it", "words"), [
    (lambda: CutMix(prob=1.5), ("prob=1.5", "0", "1")), (lambda: CutMix(prob=-0.1), ("prob=-0.1",)),
    (lambda: CutMix(alpha=0.0), ("alpha=0.0", "prob=0")), (lambda: Mixup(alpha=-1.0), ("alpha=-1.0",)), (lambda: Cutout(size=2.0), ("size=2.0", "shorter")),
])  # fmt: skip
def test_bad_settings_are_named(make_it, words):
    with pytest.raises(Mistake) as found:
        make_it()
    assert all(word in str(found.value) for word in words)


def test_mixup_by_hand():
    """Two images 0 and 1: the blend of each pair keeps x equal to the label's weight of class 1."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous()
    y = torch.eye(2, dtype=torch.float64)
    blends = set()
    for i in range(20):
        mixed, soft = mixup(x, y, generator(i), alpha=1.0)
        torch.testing.assert_close(mixed[:, 0, 0, 0], soft[:, 1])
        torch.testing.assert_close(soft.sum(1), torch.ones(2, dtype=torch.float64))
        blends.add(round(float(soft[0, 1]), 6))
    assert len(blends) > 5
    assert mixup(x, y, generator(0), alpha=0.0)[0] is x
    tables = mixup(torch.rand(5, 3), torch.eye(5), generator(1))[0]
    assert tables.shape == (5, 3)


def test_cutout_by_hand():
    """8 px, size 0.5: at most 4x4 blank, 2x2 where the centre lies in the corner; blank pixels hold the mean of the batch."""
    x = torch.zeros(200, 1, 8, 8, dtype=torch.float64)
    x[::2] = 1
    out = cutout(x, generator(3))
    blank = (out == 0.5).sum((1, 2, 3))
    assert float(blank.max()) == 16
    assert float(blank.min()) == 4
    assert torch.equal(out[out != 0.5], x[out != 0.5])
    assert len({tuple(row.nonzero()[0].tolist()) for row in out == 0.5}) > 20  # each image has its own place
    assert cutout(x, generator(3), 0.0) is x
