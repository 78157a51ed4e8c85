"""Inception-ResNet by hand: words of the tables, joins, scaled residuals, timm's blocks and counts, the widths that the paper prints."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import ConvNormAct
from timm.models.inception_resnet_v2 import Block8, Block17
from torch import nn

from convince.backbones import builder
from convince.backbones.inception_resnet import PLANS, Inception, Mixed, Residual, inception_resnet, read
from convince.errors import Mistake
from convince.models.counting import count

WHOLE = {"small": False, "width": 1.0, "branch": 1.0, "scales": (0.17, 0.1, 0.2), "dropout": 0.2}


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Their weights, drawn anew, into ours; both list them by branch in order."""
    torch.manual_seed(0)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.copy_(torch.rand(b.shape) - 0.3)
            a.copy_(b)
    ours.eval(), theirs.eval()


def test_words():
    assert read("3x3/2V 96") == ((3, 3), 2, True, 96)
    assert read("1x7 224") == ((1, 7), 1, False, 224)


def test_a_join_by_hand():
    mixed = Mixed(3, "max/2 | 1x1 8 - 3x3/2 16 | 1x1 4 - {1x3 8, 3x1 8}", width=0.5)
    assert mixed.channels == 3 + 8 + 4 + 4
    kinds = [type(m).__name__ for m in mixed.branches[1]]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 2
    assert {m.eps for m in mixed.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert all(m.bias is None for m in mixed.modules() if isinstance(m, nn.Conv2d))
    assert Mixed(3, "1x1 8", width=0.01).channels == 1


def test_at_scale_zero_a_residual_block_is_relu():
    block, x = Residual(6, PLANS["v2"].a, 0.0, width=0.1), torch.randn(2, 6, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_a_residual_block_by_hand():
    block, x = Residual(6, "1x1 4", 0.1).eval(), torch.randn(2, 6, 5, 5)
    conv, norm, _ = block.mixed.branches[0]
    y = torch.relu(torch.einsum("nchw,dc->ndhw", x, conv.weight[:, :, 0, 0]) / (norm.running_var[0] + 1e-3).sqrt())
    y = torch.einsum("nchw,dc->ndhw", y, block.linear.weight[:, :, 0, 0]) + block.linear.bias[:, None, None]
    torch.testing.assert_close(block(x), torch.relu(x + 0.1 * y))


@pytest.mark.parametrize(
    ("place", "c", "table"),
    [
        ("features.6", 384, "1x1 96 | 1x1 64 - 3x3 96 | 1x1 64 - 3x3 96 - 3x3 96 | avg - 1x1 96"),
        ("features.10", 384, "3x3/2V 384 | 1x1 192 - 3x3 224 - 3x3/2V 256 | max/2V"),
        ("features.18", 1024, "1x1 192 - 3x3/2V 192 | 1x1 256 - 1x7 256 - 7x1 320 - 3x3/2V 320 | max/2V"),
    ],
)
def test_modules_are_timms(place, c, table):
    with torch.device("meta"):
        theirs = timm.create_model("inception_v4").get_submodule(place)
    theirs = theirs.to_empty(device="cpu")
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
    ours, x = Mixed(c, table), torch.rand(1, c, 7, 9)
    copied(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    own = next(t for t in (PLANS["v4"].a, PLANS["v4"].reduce_a, PLANS["v4"].reduce_b) if sorted(t.split(" | ")) == sorted(table.split(" | ")))
    assert Mixed(c, own).channels == ours.channels, "the same branches as in our table, in another order"


@pytest.mark.parametrize(("kind", "c", "plan", "scale"), [(Block17, 1088, PLANS["v2"].b, 0.1), (Block8, 2080, PLANS["v2"].c, 0.2)])
def test_residual_blocks_are_timms(kind, c, plan, scale):
    conv = partial(ConvNormAct, padding=0, norm_layer="batchnorm2d", act_layer="relu", norm_kwargs={"eps": 1e-3})
    theirs = kind(scale=scale, conv_block=conv)
    ours, x = Residual(c, plan, scale), torch.rand(1, c, 3, 4)
    copied(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_our_tables_of_v4_have_timms_counts():
    with torch.device("meta"):
        found = count(Inception(1000, 3, PLANS["v4"], **WHOLE), (299, 299))
        theirs = count(timm.create_model("inception_v4"), (299, 299))
    assert found == theirs
    assert found.parameters == 42_679_816


@pytest.mark.parametrize(("net", "widths"), [("v1", (256, 896, 1792)), ("v2", (384, 1152, 2144))])
def test_the_trunks_and_grids_of_the_paper(net, widths):
    with torch.device("meta"):
        model = inception_resnet(1000, net=net)
        x, shapes = torch.empty(1, 3, 299, 299), []
        for name in ("stem", "a", "b", "c"):
            x = getattr(model, name)(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(widths[0], 35, 35), (widths[0], 35, 35), (widths[1], 17, 17), (widths[2], 8, 8)]
    assert [len([m for m in getattr(model, name) if isinstance(m, Residual)]) for name in "abc"] == [5, 10, 5]
    assert {block.scale for block in model.b if isinstance(block, Residual)} == {0.1}


def test_minis_cost_the_same_and_wide_branches_leave_the_trunk():
    with torch.device("meta"):
        macs = {name: count(builder(name, num_classes=10, in_chans=3, size=(32, 32))(), (32, 32)).macs for name in ("inception-mini", "inception-resnet-mini")}
        wide = builder("inception-resnet-mini:branch=4", num_classes=10, in_chans=3, size=(32, 32))()
    assert abs(macs["inception-mini"] / macs["inception-resnet-mini"] - 1) < 0.05
    assert wide.num_features == 252
    assert wide.a[0].mixed.channels == 4 * (4 + 4 + 8)
    assert {m.kernel_size for m in wide.modules() if isinstance(m, nn.Conv2d)} == {(1, 1), (3, 3), (1, 5), (5, 1), (1, 3), (3, 1)}


def test_dropout_is_the_papers_and_rests_in_eval():
    model = inception_resnet(small=True, width=0.05)
    assert model.dropout.p == pytest.approx(0.2), "keep 0.8"
    with torch.device("meta"):
        assert inception_resnet(net="v4").head_drop.p == pytest.approx(0.2)


def test_wrong_settings_are_refused():
    for size in ((74, 299), (299, 32)):
        with pytest.raises(Mistake, match=rf"at least 75 pixels \(the paper has 299\); the image has {size[0]}x{size[1]}"):
            builder("inception-v4", num_classes=2, in_chans=3, size=size)()
    with pytest.raises(Mistake, match="net='v3' must be one of v4, v1, v2, slim"):
        inception_resnet(net="v3")
    with pytest.raises(Mistake, match="is timm's network, which has no small"):
        inception_resnet(net="slim", small=True)
    with pytest.raises(Mistake, match="a scale for A, B and C each"):
        inception_resnet(scales=(0.1,))


def test_75_pixels_are_enough():
    with torch.device("meta"):
        for net in ("v1", "v4", "slim"):
            assert inception_resnet(3, net=net, img_size=(75, 75)).eval()(torch.empty(1, 3, 75, 75)).shape == (1, 3)
