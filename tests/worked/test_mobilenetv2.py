"""MobileNetV2 by hand: rounded widths, the block and its ablations, torchvision's twin, memory of a block evaluated in groups."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.maps import feature_maps
from convince.backbones.mobilenetv2 import TABLE, Inverted, InvertedResidual, WideShortcuts, memory_estimate, mobilenetv2, scaled
from convince.errors import Mistake
from convince.layers.eca import install
from convince.layers.places import residual_blocks

MINI = {"stem": "small", "blocks": ((6, 8, 1, 1), (6, 12, 2, 2), (6, 16, 2, 2)), "first": 8, "last": 64, "dropout": 0.0}


def test_worked_widths():
    assert [scaled(c, 0.5) for c in (32, 16, 24, 64, 96, 160, 320)] == [16, 8, 16, 32, 48, 80, 160]
    assert [scaled(c, 1.4) for c in (32, 16, 24, 1280)] == [48, 24, 32, 1792]
    assert scaled(32, 0.35) == 16, "11.2 is nearer to 8, but 8 is below 90 % of it"
    assert scaled(12, 1.0) == 12, "a width of 1 changes nothing"


@given(st.integers(8, 2000), st.floats(0.1, 3))
def test_a_scaled_width_is_a_multiple_of_8_and_never_far_below(channels, width):
    found = scaled(channels, width)
    assert found == channels if width == 1 else found % 8 == 0
    assert found >= 0.9 * channels * width


def test_table_and_depth():
    assert sum(n for _, _, n, _ in TABLE) == 17
    with torch.device("meta"):
        model = mobilenetv2(stem="small")
        assert [row["reduction"] for row in model.feature_info] == [1, 1, 2, 4, 4, 8, 8]
        assert model.forward_features(torch.empty(1, 3, 32, 32)).shape == (1, 1280, 4, 4)


def test_torchvisions_twin_timms_and_ours():
    """One set of weights in three networks, taken over in the order of the state dict."""
    twin = torchvision.models.mobilenet_v2(weights=None)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    wired = builder("mobilenetv2-100", num_classes=1000, in_chans=3, size=(224, 224))()
    own = Inverted(1000, 3, TABLE, 1.0, 2, 32, 1280, True, "thin", 0.0)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = twin.eval()(x)
        scale = float(expected.abs().max())
        for model in (wired, own):
            model.load_state_dict(dict(zip(model.state_dict(), twin.state_dict().values(), strict=True)))
            torch.testing.assert_close(model.eval()(x) / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "same"), [(0.5, True), (0.75, True), (1.4, True), (0.6, False)])
def test_our_own_at_other_widths_has_timms_shapes(width, same):
    with torch.device("meta"):
        found = mobilenetv2(7, width=width)
        own = Inverted(7, 3, TABLE, width, 2, 32, 1280, True, "thin", 0.0)
    assert (type(found) is not Inverted) == same
    assert [tuple(p.shape) for p in found.parameters()] == [tuple(p.shape) for p in own.parameters()]


def constant(block: InvertedResidual, projected: float) -> InvertedResidual:
    """A block in eval mode whose branch gives ``projected`` everywhere."""
    with torch.no_grad():
        block.project[0].weight.zero_()
        block.project[1].bias.fill_(projected)
    return block.eval()


def test_the_thin_end_is_linear_and_the_sum_is_left_alone():
    x = torch.full((1, 4, 3, 3), 10.0)
    assert constant(InvertedResidual(4, 4), -2.0)(x).unique().tolist() == [8.0]
    assert constant(InvertedResidual(4, 4, linear=False), -2.0)(x).unique().tolist() == [10.0], "ReLU6 before the sum"
    assert constant(InvertedResidual(4, 4, linear=False), 9.0)(x).unique().tolist() == [16.0], "at most 6 is added"
    assert constant(InvertedResidual(4, 4, skip=False), -2.0)(x).unique().tolist() == [-2.0]
    for other in (InvertedResidual(4, 4, stride=2), InvertedResidual(4, 5)):
        assert constant(other, -2.0)(x).unique().tolist() == [-2.0], "no shortcut where stride or channels change"


def test_shape_of_a_block():
    block = InvertedResidual(3, 5, stride=2, t=6)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.groups, c.stride[0], c.bias) for c in convs] == [(3, 18, 1, 1, None), (18, 18, 18, 2, None), (18, 5, 1, 1, None)]
    assert sum(p.numel() for p in block.parameters()) == 3 * 18 + 9 * 18 + 18 * 5 + 2 * (18 + 18 + 5)
    assert isinstance(InvertedResidual(3, 5, t=1).expand, nn.Identity)


def test_ablations_share_weights_and_differ_in_the_function():
    x = torch.randn(2, 3, 16, 16)
    base = mobilenetv2(4, **MINI).eval()
    scores = [base(x)]
    for change in ({"linear": False}, {"shortcut": "off"}, {"shortcut": "wide"}):
        other = mobilenetv2(4, **MINI, **change).eval()
        other.load_state_dict(base.state_dict())
        scores.append(other(x))
    assert not any(torch.allclose(a, b) for i, a in enumerate(scores) for b in scores[:i])


def test_wide_shortcuts_by_hand():
    """Two blocks of one shape: the second's expansion gets the first's; a third of other channels gets nothing."""
    blocks = [InvertedResidual(4, 4, skip=False).eval(), InvertedResidual(4, 6, skip=False).eval(), InvertedResidual(6, 6, skip=False).eval()]
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        wide = blocks[0].expand(x)
        y = blocks[0].project(blocks[0].filter(wide))
        y = blocks[1].project(blocks[1].filter(blocks[1].expand(y) + wide))
        torch.testing.assert_close(WideShortcuts(*blocks)(x), blocks[2](y))


def test_wide_maps_can_be_read():
    model = mobilenetv2(4, **MINI, shortcut="wide").eval()
    assert [tuple(m.shape) for m in feature_maps(model, torch.randn(1, 3, 16, 16)).values()] == [(1, 8, 16, 16), (1, 12, 8, 8), (1, 16, 4, 4)]


def test_without_expansion_thin_and_wide_shortcuts_are_the_same():
    """With t=1 nothing is wide: both add a block's input to its output (the last block has no successor, so here it changes its channels)."""
    table = {**MINI, "blocks": ((1, 8, 3, 1), (1, 12, 1, 1))}
    thin, wide = (mobilenetv2(4, **table, shortcut=which).eval() for which in ("thin", "wide"))
    wide.load_state_dict(thin.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(thin(x), wide(x))


def test_memory_by_hand():
    """96 to 96 channels at 14x14: 18,816 in, 18,816 out, 576 x 196 expanded; in two groups half of that."""
    block = InvertedResidual(96, 96)
    assert memory_estimate(block, (14, 14)) == 2 * 18_816 + 112_896
    assert memory_estimate(block, (14, 14), t_split=2) == 2 * 18_816 + 56_448
    assert memory_estimate(InvertedResidual(16, 24, stride=2), (7, 5)) == 16 * 35 + 24 * 12 + 96 * 35
    assert memory_estimate(block, (14, 14), t_split=576) == 2 * 18_816 + 196


def test_its_blocks_are_found_by_layers():
    model = mobilenetv2(4, **MINI)
    assert len(residual_blocks(model)) == 5
    install(model, k=3)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mobilenetv2(width=0.0), "width > 0"),
        (lambda: mobilenetv2(blocks=((6, 8, 1),)), "each row is"),
        (lambda: mobilenetv2(t=0), "every number is at least 1"),
        (lambda: memory_estimate(InvertedResidual(4, 4), (8, 8), t_split=5), "does not divide the 24"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(Mistake, match=words):
        make()
