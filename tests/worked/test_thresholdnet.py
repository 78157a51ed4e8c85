"""ThresholdNet by hand: the links and widths of a harmonic block, dense layers against torchvision, what thr counts, traffic, refusals."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convince.backbones.thresholdnet import DenseLayer, HarmonicBlock, ThresholdNet, activation_traffic, harmonic, links
from convince.errors import Mistake

SMALL = {"layers": (2, 4, 4), "growth": (4, 4, 4), "transitions": (8, 8, 12), "halve": (1, 0), "stem": (4,)}


def test_worked_links_and_widths():
    rows = harmonic(8, c_in=288, growth=40)
    assert [out for _, out, _ in rows] == [40, 68, 40, 116, 40, 68, 40, 196]
    assert rows[3][2] == [3, 2, 0]
    assert rows[3][0] == 40 + 68 + 288 == 396
    assert HarmonicBlock(16, 288, 40, 1.7).channels == 8 * 40 + 334 == 654


@given(st.integers(1, 64))
def test_every_layer_reads_the_one_before_and_a_link_more_for_each_factor_of_two(layer):
    read = links(layer)
    assert read[0] == layer - 1
    assert read == sorted(read, reverse=True)
    assert min(read) >= 0
    assert len(read) == 1 + (layer & -layer).bit_length() - 1
    assert (0 in read) == (layer & (layer - 1) == 0), "only powers of two read the input"


def test_a_harmonic_block_wires_its_layers_by_the_links():
    block = HarmonicBlock(4, 3, 2, 1.7).eval()
    x = torch.randn(2, 3, 5, 7)
    with torch.no_grad():
        one = block.convs[0](x)
        two = block.convs[1](torch.cat([one, x], 1))
        three = block.convs[2](two)
        four = block.convs[3](torch.cat([three, two, x], 1))
        torch.testing.assert_close(block(x), torch.cat([one, three, four], 1))


def test_a_dense_layer_is_torchvisions():
    theirs = torchvision.models.DenseNet(growth_rate=4, block_config=(1,), num_init_features=6).features.denseblock1.denselayer1.eval()
    ours = DenseLayer(6, 4).eval()
    own = list(theirs.state_dict().values())
    ours.load_state_dict(dict(zip(ours.state_dict(), own, strict=True)))
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), torch.cat([x, theirs(x)], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("thr", [0, 1, 2, 3])
def test_the_threshold_counts_blocks(thr):
    net = ThresholdNet(**SMALL, thr=thr)
    kinds = [next(m for m in block if isinstance(m, (DenseLayer, HarmonicBlock))) for block in net.blocks]
    assert [isinstance(kind, DenseLayer) for kind in kinds] == [i < thr for i in range(3)]
    assert [sum(isinstance(m, nn.MaxPool2d) for m in block) for block in net.blocks] == [0, 1, 0], "halve says after which block"


def test_a_photo_stem_halves_twice_and_odd_sides_pass():
    net = ThresholdNet(**{**SMALL, "stem": (4, 6)}, thr=1).eval()
    assert [row["reduction"] for row in net.feature_info] == [4, 8, 8]
    with torch.no_grad():
        assert net.forward_features(torch.zeros(1, 3, 32, 64)).shape == (1, 12, 4, 8)
        assert net.forward_features(torch.zeros(1, 3, 9, 1)).shape == (1, 12, 2, 1)


def test_worked_traffic():
    """Two convs on a 4x4 map: 2 -> 3 channels, then a strided 3 -> 5: (32 + 48) + (48 + 20) numbers of 4 bytes."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 5, 1, 2))
    x = torch.randn(1, 2, 4, 4)
    assert activation_traffic(model, x) == (32 + 48 + 48 + 20) * 4
    assert activation_traffic(model.double(), x.double()) == (32 + 48 + 48 + 20) * 8
    assert activation_traffic(model, torch.cat([x, x]).double()) == 2 * (32 + 48 + 48 + 20) * 8


def test_traffic_leaves_no_hook_behind_also_after_an_error():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        activation_traffic(model, torch.randn(1, 2, 4, 4))
    assert not any(m._forward_hooks for m in model.modules())


def test_fewer_links_cost_less_traffic():
    x = torch.randn(1, 3, 8, 8)
    costs = [activation_traffic(ThresholdNet(**SMALL, thr=thr).eval(), x) for thr in (3, 1, 0)]
    assert costs == sorted(costs, reverse=True)


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match=r"thresholdnet: layers=.*and of halve one fewer"):
        ThresholdNet(**{**SMALL, "halve": (1, 0, 0)})
    with pytest.raises(Mistake, match=r"thr=4.*thr counts blocks, 0 to 3"):
        ThresholdNet(**SMALL, thr=4)
    with pytest.raises(Mistake, match="stem is one number or two"):
        ThresholdNet(**{**SMALL, "stem": (4, 4, 4)})
