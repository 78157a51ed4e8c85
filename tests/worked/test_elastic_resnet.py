"""Elastic ResNet by hand: a plain ResNet at 32 bits, bytes by counting, slices of a large network, quantised blocks against plain arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import BasicBlock

from convince.backbones import builder
from convince.backbones.elastic_resnet import ElasticBlock, ElasticResnet, conv, sliced, stored_bytes, sub_network
from convince.compress.qat import QatConv2d
from convince.errors import Mistake


def test_a_block_of_32_bits_is_torchvisions():
    torch.manual_seed(0)
    mine = ElasticBlock(4, 6, 2, first=True, bits=32).eval()
    downsample = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    theirs = BasicBlock(4, 6, 2, downsample).eval()
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_policy_of_32_bits_is_a_plain_network():
    torch.manual_seed(0)
    plain = ElasticResnet(depths=(2, 1), widths=(4, 6), stem=4).eval()
    same = ElasticResnet(depths=(2, 1), widths=(4, 6), bits=(32, 32, 32), stem=4).eval()
    same.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert not any(isinstance(m, QatConv2d) for m in same.modules())
    assert torch.equal(plain(x), same(x))
    assert torch.equal(sub_network(plain, (2, 1), (4, 6), (32, 32, 32))(x), plain(x)), "so is the whole of it, taken out"


def test_bytes_by_hand():
    # stem 27*2 weights and 2 biases: 224. Block 1: 2*3*9 + 3*3*9 + 2*3 = 141 weights, 9 channels. Head: 4*(3+1)*4 = 64.
    assert stored_bytes((1,), (3,), (32,), stem=2, num_classes=4) == 224 + 141 * 4 + 9 * 4 + 64
    assert stored_bytes((1,), (3,), (8,), stem=2, num_classes=4) == 224 + 141 + 9 * 8 + 64
    assert stored_bytes((1,), (3,), (4,), stem=2, num_classes=4) == 224 + 70.5 + 9 * 8 + 64


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.data(),
)
def test_bytes_are_those_of_the_layers(stages, stem, in_chans, data):
    depths, widths = zip(*stages, strict=True)
    bits = data.draw(st.lists(st.sampled_from([4, 8, 32]), min_size=sum(depths), max_size=sum(depths)))
    with torch.device("meta"):
        net = ElasticResnet(3, in_chans, depths, widths, bits, stem)
    total = 4.0 * (net.fc.weight.numel() + net.fc.bias.numel())
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            low = isinstance(module, QatConv2d)
            total += module.weight.numel() * (module.settings["w_bits"] if low else 32) / 8 + len(module.weight) * (8 if low else 4)
    assert stored_bytes(depths, widths, bits, stem, 3, in_chans) == total


def test_a_slice_is_the_first_blocks_and_channels():
    torch.manual_seed(0)
    large = ElasticResnet(depths=(3, 2), widths=(4, 8), stem=4)
    small = sub_network(large, (1, 2), (2, 6), (8, 32, 4))
    assert torch.equal(small.layer1[0].conv1.weight, large.layer1[0].conv1.weight[:2])
    assert torch.equal(small.layer2[1].conv2.weight, large.layer2[1].conv2.weight[:6, :6])
    assert torch.equal(small.layer2[0].downsample[0].weight, large.layer2[0].downsample[0].weight[:6, :2])
    assert torch.equal(small.fc.weight, large.fc.weight[:, :6])
    assert [len(small.layer1), len(small.layer2)] == [1, 2]
    assert float(small.layer1[0].bn1.running_var.min()) == 1
    views = sliced(dict(large.named_parameters()), small)
    views["layer2.1.conv2.weight"].sum().backward()
    grad = large.layer2[1].conv2.weight.grad
    assert grad[:6, :6].eq(1).all()
    assert not grad[6:].any()
    assert not grad[:, 6:].any()
    with pytest.raises(Mistake, match=r"depths=\(4, 2\), widths=\(4, 8\) are no part of a network of \(3, 2\)"):
        sub_network(large, (4, 2), (4, 8))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_convolution_by_hand(bits):
    """One scale a channel for the weights, one and a zero for the input whose range was seen: then plain sums of codes."""
    torch.manual_seed(0)
    layer = conv(2, 3, 3, 1, bits).train()
    x = torch.rand(2, 2, 5, 5) * 3 - 1
    layer(x)
    layer.eval()
    low, high, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0), 2**bits - 1
    step = (high - low) / top
    zero = round(-low / step)
    codes_x = ((x / step).round() + zero).clamp(0, top) - zero
    scale = layer.weight.abs().amax((1, 2, 3), keepdim=True) / (2 ** (bits - 1) - 1)
    codes_w = (layer.weight / scale).round()
    wanted = nn.functional.conv2d(codes_x * step, codes_w * scale, padding=1)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)


def test_eight_bits_are_close_and_four_are_farther():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    plain = ElasticResnet(depths=(1, 1), widths=(8, 8), stem=8).eval()
    gaps = []
    for bits in (8, 4):
        low = ElasticResnet(depths=(1, 1), widths=(8, 8), bits=(bits, bits), stem=8).eval()
        low.load_state_dict(plain.state_dict(), strict=False)
        for module in low.modules():
            module.training = isinstance(module, QatConv2d)
        with torch.no_grad():
            low(x)
            gaps.append(float((low.eval()(x) - plain(x)).square().mean() / plain(x).square().mean()))
    assert gaps[0] < 1e-3 < gaps[1]


def test_quantised_blocks_learn():
    torch.manual_seed(0)
    net = ElasticResnet(2, 1, (1, 1), (4, 4), (4, 8), 4).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 2
    x[y == 1] += 1.5
    losses = []
    for _ in range(15):
        losses.append(nn.functional.cross_entropy(net(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_named_sizes():
    largest, int8 = (builder(name, num_classes=10, in_chans=3, size=(32, 32))() for name in ("elastic-resnet-largest", "elastic-resnet-int8"))
    assert sum(p.numel() for p in largest.parameters()) == sum(p.numel() for p in int8.parameters())
    share = stored_bytes(int8.depths, int8.widths, int8.bits) / stored_bytes(largest.depths, largest.widths, largest.bits)
    assert 0.25 < share < 0.28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 0)}, "one depth and one width a stage, all at least 1"),
        ({"depths": (1,), "widths": (4, 8)}, "one depth and one width a stage"),
        ({"depths": (1, 1), "widths": (4, 4), "bits": (8,)}, r"bits=\(8,\) names 1 blocks, and depths=\(1, 1\) has 2"),
        ({"depths": (1,), "widths": (4,), "bits": (16,)}, "each must be one of 4, 8, 32"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(Mistake, match=message):
        ElasticResnet(**options)
