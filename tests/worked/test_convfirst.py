"""ConvFirst by hand: the size of a block, its order, tiles that give what the whole block gives, their workspace, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.convfirst import ConvFirst, ConvFirstBlock, block_fusion, halo
from convince.errors import Mistake
from convince.models.counting import count


def seen(block, x):
    """In eval mode, after its norms have seen data and been moved from where they begin."""
    block.train()(x)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return block.eval()


def test_worked_size():
    """64 channels, 3x3, groups of 8, expansion 4: 4,608 + 32,768 + 768 parameters, 37,376 multiply-adds a pixel."""
    block = ConvFirstBlock(64, 64)
    assert block.conv.weight.numel() == 4608
    assert sum(p.numel() for p in block.parameters()) == 38_144
    assert count(block, (32, 32), 64).macs == 37_376 * 1024
    assert ConvFirstBlock(64, 64, group_width=1).conv.weight.numel() == 576
    assert ConvFirstBlock(64, 64, group_width=64).conv.groups == 1


@given(st.sampled_from([(8, 1), (8, 4), (12, 4), (16, 8)]), st.sampled_from([1, 3, 5]), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_size_by_formula(widths, k, e):
    c, g = widths
    block = ConvFirstBlock(c, c, k, group_width=g, expansion=e)
    assert sum(p.numel() for p in block.parameters()) == c * k * k * g + 2 * e * c * c + 2 * (2 * c + e * c)


def test_order_and_shortcut():
    names = [type(m).__name__ for m in ConvFirstBlock(8, 8).modules() if not list(m.children())]
    assert names == ["Conv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "SiLU", "Conv2d", "BatchNorm2d"]
    assert not any(m.bias is not None for m in ConvFirstBlock(8, 8).modules() if isinstance(m, nn.Conv2d))
    x = -torch.rand(2, 8, 4, 4)
    block = ConvFirstBlock(8, 8).eval()
    nn.init.zeros_(block.pointwise[-1].weight)
    assert torch.equal(block(x), x), "negative values pass the sum: nothing stands after it"
    assert not ConvFirstBlock(8, 8, stride=2).has_skip
    assert not ConvFirstBlock(8, 16).has_skip


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 3]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_tiles_give_what_the_block_gives(h, w, th, tw, k, stride, wider):
    x = torch.randn(2, 4, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h * w))
    block = seen(ConvFirstBlock(4, 8 if wider else 4, k, stride, group_width=2).double(), torch.randn(4, 4, 6, 6, dtype=torch.float64))
    tiled = block_fusion(block, x, (th, tw))
    torch.testing.assert_close(tiled.output, block(x).detach(), rtol=1e-10, atol=1e-10)
    assert tiled.workspace <= block_fusion(block, x).workspace


def test_workspace_is_that_of_a_tile():
    """32x32 in tiles of 8x8: the widest step holds 4 c twice, on 64 of 1,024 positions."""
    block, x = seen(ConvFirstBlock(64, 64), torch.randn(2, 64, 8, 8)), torch.randn(1, 64, 32, 32)
    whole, tiled = block_fusion(block, x), block_fusion(block, x, (8, 8))
    assert whole.workspace == 8 * 64 * 1024
    assert tiled.workspace == 8 * 64 * 64
    torch.testing.assert_close(tiled.output, whole.output, rtol=0, atol=1e-4)


def test_halo_at_an_edge_and_inside():
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    part, lacking = halo(x, (0, 2), (2, 4), 3, 1)
    assert lacking == (0, 0, 1, 0)
    assert torch.equal(part, x[:, :, 0:3, 1:5])


def test_training_mode_and_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="block_fusion is for eval mode"):
        block_fusion(ConvFirstBlock(8, 8).train(), torch.zeros(1, 8, 4, 4))
    with pytest.raises(Mistake, match=r"tile=\(0, 4\)"):
        block_fusion(ConvFirstBlock(8, 8).eval(), torch.zeros(1, 8, 4, 4), (0, 4))
    with pytest.raises(Mistake, match="convfirst: k=3, group_width=8, expansion=4 with 12 channels"):
        ConvFirstBlock(12, 12)
    with pytest.raises(Mistake, match="convfirst: depths=\\(1,\\)"):
        ConvFirst(depths=(1,), dims=(8, 8))
    with pytest.raises(Mistake, match="the stem's patch is 4 px, and the image has 3x3"):
        builder("convfirst", num_classes=2, in_chans=1, size=(3, 3))()


def test_the_network_by_its_plan():
    net = builder("convfirst-mini", num_classes=10, in_chans=3, size=(32, 32))()
    assert [(row["num_chs"], row["reduction"]) for row in net.feature_info] == [(16, 1), (32, 2), (64, 4)]
    assert count(net, (32, 32)).macs == 10_814_080
    with torch.device("meta"):
        large = ConvFirst(1000)
        assert large.forward_features(torch.empty(1, 3, 224, 224)).shape == (1, 768, 7, 7)
