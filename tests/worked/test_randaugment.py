"""RandAugment beside torchvision's: every operation and magnitude; draws are even and come from the generator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import RandAugment as Reference
from torchvision.transforms.autoaugment import _apply_op

from convince.augment.randaugment import OPS, SIGNED, RandAugment, apply, randaugment, strength_of
from convince.errors import Mistake
from convince.fit.randomness import generator

NAMES = {"shear-x": "ShearX", "shear-y": "ShearY", "translate-x": "TranslateX", "translate-y": "TranslateY", "autocontrast": "AutoContrast"}


def reference(op):
    return NAMES.get(op, op.capitalize())


def images(n=4, c=3, h=20, w=16):
    return torch.randint(0, 256, (n, c, h, w), generator=generator("images"), dtype=torch.uint8)


@pytest.mark.parametrize("magnitude", [0, 5, 9, 30])
def test_magnitudes_are_torchvisions(magnitude):
    space = Reference()._augmentation_space(31, (20, 16))
    assert [reference(op) for op in OPS] == list(space)
    for op in OPS:
        values, signed = space[reference(op)]
        expected = float(values[magnitude] if values.ndim else values)
        assert strength_of(op, magnitude, 20, 16) == pytest.approx(expected / 255 if op == "solarize" else expected, abs=1e-6)
        assert signed == (op in SIGNED)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("op", OPS)
def test_operations_are_torchvisions(op, channels):
    x = images(c=channels)
    for sign in (1, -1) if op in SIGNED else (1,):
        strength = sign * strength_of(op, 9, 20, 16)
        ours = apply(op, x.double() / 255, strength).clamp(0, 1)
        rows = [_apply_op(row, reference(op), strength * (255 if op == "solarize" else 1), InterpolationMode.NEAREST, None) for row in x]
        assert float((ours * 255 - torch.stack(rows)).abs().max()) <= 1.3, "levels of 256: torchvision rounds the mean grey too"


def test_worked_numbers():
    """Magnitude 9 of 30 bins: a slope of 0.09, a turn of 9 degrees, factors 1 +- 0.27, 7 bits, threshold 0.7."""
    assert strength_of("shear-x", 9, 32, 32) == pytest.approx(0.09)
    assert strength_of("rotate", 9, 32, 32) == pytest.approx(9)
    assert strength_of("color", 9, 32, 32) == pytest.approx(0.27)
    assert strength_of("posterize", 9, 32, 32) == 7
    assert strength_of("solarize", 9, 32, 32) == pytest.approx(0.7)
    assert strength_of("translate-x", 30, 32, 331) == pytest.approx(150)


def test_draws_are_even_and_each_image_has_its_own():
    x = torch.rand(1, 3, 8, 8).expand(2800, 3, 8, 8)
    changed = randaugment(x, 1, 15, generator(0))
    kinds, counts = torch.unique((changed * 1e4).round().flatten(1), dim=0, return_counts=True)
    assert len(kinds) > 14, "signs make more than fourteen outcomes"
    same = int((changed == x).flatten(1).all(1).sum())
    assert abs(same - 200) < 4 * (200 * 13 / 14) ** 0.5, "identity is one of fourteen"
    assert int(counts.max()) < 300


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 3), st.integers(0, 30), st.integers(1, 4), st.integers(0, 10**6))
def test_pixels_stay_in_range_and_inputs_unchanged(layers, magnitude, channels, seed):
    x = images(c=channels).double() / 255
    kept = x.clone()
    out = randaugment(x, layers, magnitude, generator(seed))
    assert out.dtype == torch.float64
    assert out.shape == x.shape
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert torch.equal(x, kept)
    assert torch.equal(out, randaugment(x, layers, magnitude, generator(seed)))
    if layers == 0:
        assert out is x


@pytest.mark.parametrize("options", [{"layers": -1}, {"magnitude": 31}, {"magnitude": -1}])
def test_refusals(options):
    with pytest.raises(Mistake, match=next(iter(options))):
        RandAugment(**options)
