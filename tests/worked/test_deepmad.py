"""DeepMAD's networks by hand: a block put together from its convolutions, shortcuts, gates, odd sides, wrong specifications."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.backbones.deepmad import Block, Deepmad, Gate, Stage, checked, squeezed
from convince.errors import Mistake
from convince.models.counting import count_named


def test_a_bottleneck_by_hand():
    block = Block(4, Stage(1, 2, 6, 5, 2), 2, depthwise=False).eval()
    x = torch.randn(2, 4, 6, 6)
    convs = [m for m in block.branch.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [tuple(m.weight.shape) for m in convs] == [(2, 4, 1, 1), (2, 2, 5, 5), (6, 2, 1, 1)]
    scale = (1 + 1e-5) ** -0.5  # batch normalisation at its start, in eval mode
    y = (F.conv2d(x, convs[0].weight) * scale).relu()
    y = (F.conv2d(y, convs[1].weight, stride=2, padding=2) * scale).relu()
    y = F.conv2d(y, convs[2].weight) * scale
    means = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(block(x), (y + F.conv2d(means, block.shortcut[0].weight) * scale).relu())


def test_the_shortcut_is_the_input_where_nothing_changes():
    block = Block(6, Stage(1, 2, 6, 3, 1), 1, depthwise=False).eval()
    x = torch.rand(2, 6, 5, 5)
    with torch.no_grad():
        block.branch[-1][1].weight.zero_()
    assert torch.equal(block(x), x)


def test_a_depthwise_block_has_a_gate_and_no_shortcut_where_channels_change():
    wider, same = (Block(c, Stage(1, 12, 6, 5, 1), 1, depthwise=True) for c in (4, 6))
    assert (wider.shortcut, sum(p.numel() for p in same.shortcut.parameters())) == (None, 0)
    assert wider.branch[2][0].groups == 12
    gates = [m for m in wider.branch if isinstance(m, Gate)]
    assert [m.reduce[0].weight.shape[0] for m in gates] == [8]
    x = torch.rand(2, 4, 3, 3)
    with torch.no_grad():
        wider.branch[-1][1].weight.zero_()
    assert not wider.eval()(x).any(), "SiLU of 0"


def test_gates_by_hand():
    assert [squeezed(c) for c in (8, 32, 63, 64, 95, 240)] == [8, 8, 16, 16, 24, 56]  # 63/4 = 15.75 is first rounded to 16
    gate = Gate(8).eval()
    with torch.no_grad():
        gate.expand[1].weight.zero_()
        gate.expand[1].bias.fill_(2.0)
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(gate(x), x / (1 + torch.tensor(-2.0).exp()))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["bottleneck", "depthwise"]), st.sampled_from([0, 12]))
def test_any_side_halves_rounded_up(h, w, block, head):
    net = Deepmad(3, 1, 4, ((1, 4, 8, 3, 2), (2, 4, 8, 5, 1), (1, 6, 12, 3, 2)), 1, block, head).eval()
    out = net.forward_features(torch.randn(2, 1, h, w))
    assert out.shape == (2, head or 12, -(-h // 4), -(-w // 4))
    assert [row["num_chs"] for row in net.feature_info] == [8, 8, 12]
    assert [row["reduction"] for row in net.feature_info] == [2, 2, 4]


def test_published_sizes():
    found = count_named("deepmad-r18", num_classes=1000, size=(224, 224))
    assert found.parameters == 11_677_864, "published as 11.69 M"
    assert found.macs == pytest.approx(1.783e9, rel=1e-3), "published as 1.82 G, normalisation and activations among them"
    small = count_named("deepmad-mini", num_classes=10, size=(32, 32))
    assert small.parameters <= 0.3e6
    assert small.macs <= 20e6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": "plain"}, "block='plain': must be bottleneck or depthwise"),
        ({"stages": ()}, "0 stages"),
        ({"stem": 0}, "stem=0"),
        ({"stem_stride": 4}, "stem_stride=4"),
        ({"head": -1}, "head=-1"),
        ({"stages": ((1, 4, 8, 4, 1),)}, r"the stage \(1, 4, 8, 4, 1\): must be .*odd kernel"),
        ({"stages": ((1, 4, 8, 3),)}, "must be"),
        ({"stages": ((1, 4, 8, 3, 3),)}, "stride of 1 or 2"),
        ({"stages": ((0, 4, 8, 3, 1),)}, "whole numbers from 1"),
    ],
)
def test_wrong_specifications_are_refused(options, words):
    with pytest.raises(Mistake, match="deepmad: .*" + words):
        Deepmad(**options)


def test_rows_by_name():
    assert checked([2, 4, 8, 3, 1]) == Stage(blocks=2, bottleneck=4, out=8, kernel=3, stride=1)
