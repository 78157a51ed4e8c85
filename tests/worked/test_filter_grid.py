"""Filter grid by hand: what each shape reaches and costs, the circle's taps, how epochs are counted."""

import pytest
import torch

from convince.diagnose.filter_grid import SHAPES, CircleConv2d, FilterGrid, epochs_to, filter_shape, three_convs
from convince.errors import Mistake
from convince.types import Budget


@pytest.mark.parametrize(("shape", "parameters", "reach"), [
    ("full", 3 * 8 * 25, 5), ("1x1", 3 * 8, 1), ("separable", 3 * 8 * 5 + 8 * 8 * 5, 5),
    ("dilated", 3 * 8 * 9, 5), ("depthwise", 3 * 25 + 3 * 8, 5), ("circle", 3 * 8 * 25, 5),
])  # fmt: skip
def test_shapes(shape, parameters, reach):
    conv = filter_shape(3, 8, 5, shape)
    assert sum(p.numel() for p in conv.parameters()) == parameters
    x = torch.zeros(1, 3, 11, 11)
    x[0, :, 5, 5] = 1
    seen = conv(x)[0].abs().sum(0) > 0
    assert seen.shape == (11, 11)
    assert int(seen.any(0).sum()) == (3 if shape == "dilated" else reach), "columns that see the middle"
    assert int(seen.any(0).nonzero().max()) - 5 == reach // 2


def test_a_circle_has_no_corners():
    conv = CircleConv2d(1, 1, 3)
    assert conv.mask.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1]], "the corners of 3x3 lie 1.41 away, and the radius is 1.5"
    assert CircleConv2d(1, 1, 5).mask.sum() == 25 - 4
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 0, 0] = 1
    assert CircleConv2d(1, 1, 5)(x)[0, 0, 2, 2] == 0


def test_epochs_are_counted_from_one():
    assert epochs_to([0.2, 0.5, 0.91, 0.9, 1.0]) == 3
    assert epochs_to([1.0, 0.5]) == 1


def test_all_shapes_make_a_network_and_others_are_refused():
    for shape in SHAPES:
        assert three_convs(3, 1, 4, 3, shape)(torch.zeros(2, 1, 9, 7)).shape == (2, 3)
    with pytest.raises(Mistake, match="shape='round' is none of full"):
        filter_shape(1, 1, 3, "round")
    with pytest.raises(Mistake, match="k=4: must be odd"):
        filter_shape(1, 1, 4)
    with pytest.raises(Mistake, match="give whole epochs"):
        FilterGrid().run(Budget(100, "steps"))
