"""PoolNet by hand: the 36 placements, sizes, which map is halved where, shared norms, one set of weights at every placement, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.backbones.pool_net import PoolBlock, PoolNet, default_placement, placements
from convince.errors import Mistake
from convince.models.counting import count_named


def test_placements_of_resnet20():
    found = placements(9, 2)
    assert len(found) == len(set(found)) == 36
    assert found[:3] == [(1, 2), (1, 3), (1, 4)]
    assert found[-1] == (8, 9)
    assert {(4, 7), (5, 8), (7, 8)} <= set(found)
    assert default_placement(9, 2) == (4, 7)
    assert default_placement(6, 2) == (3, 5)
    assert default_placement(8, 3) == (3, 5, 7)


@given(st.integers(1, 10), st.integers(0, 4))
def test_there_are_as_many_placements_as_choices(blocks, count):
    assert len(placements(blocks, count)) == math.comb(blocks, count)
    if count < blocks:
        assert default_placement(blocks, count) in placements(blocks, count)


def by_hand(pools, side=32):
    """Multiply-adds of ResNet20's convolutions and head at a placement."""
    channels, c_in, total = (16, 16, 16, 32, 32, 32, 64, 64, 64), 16, 3 * 9 * 16 * side**2
    for i, c in enumerate(channels, 1):
        side = side // 2 if i in pools else side
        total += (9 * c_in * c + 9 * c * c + (c_in * c if c_in != c else 0)) * side**2
        c_in = c
    return total + 64 * 10


@pytest.mark.parametrize(("name", "pools"), [("pool-net20", (4, 7)), ("pool-net20-found", (5, 8)), ("pool-net20-best", (7, 8))])
def test_sizes_by_hand(name, pools):
    counts = count_named(name, num_classes=10, size=(32, 32))
    assert parts.get("pool-net").card.variants[name]["pools"] == pools
    assert counts.macs == by_hand(pools)
    convolutions = 3 * 9 * 16 + 6 * 9 * 16**2 + 9 * 16 * 32 + 5 * 9 * 32**2 + 9 * 32 * 64 + 5 * 9 * 64**2 + 16 * 32 + 32 * 64
    norms = 2 * (16 + 6 * 16 + 7 * 32 + 7 * 64)  # two a block, one a shortcut
    assert counts.parameters == convolutions + norms + 650 == 272_474


def test_the_map_is_halved_before_the_blocks_that_are_named():
    model = PoolNet(3, 1, (4, 4, 6, 6), (1, 4)).eval()
    sides = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    assert model.forward_features(torch.randn(2, 1, 12, 8)).shape == (2, 6, 3, 2)
    assert sides == [4, 4, 4, 2]
    assert [(row["module"], row["num_chs"], row["reduction"]) for row in model.feature_info] == [("stem", 4, 1), ("blocks.2", 6, 2), ("blocks.3", 6, 4)]


def test_a_block_by_hand():
    block = PoolBlock(2, 3, shared=False).eval()
    x = torch.randn(1, 2, 4, 4)
    with torch.no_grad():
        y = F.relu(F.conv2d(x, block.conv1.weight, padding=1) / (1 + 1e-5) ** 0.5)
        y = F.conv2d(y, block.conv2.weight, padding=1) / (1 + 1e-5) ** 0.5
        y = F.relu(y + F.conv2d(x, block.downsample[0].weight) / (1 + 1e-5) ** 0.5)
        torch.testing.assert_close(block(x), y)
    assert isinstance(PoolBlock(3, 3, shared=False).downsample, nn.Identity)


def test_one_set_of_weights_serves_every_placement():
    model = PoolNet(3, 1, (4, 4, 6), (2,)).eval()
    x = torch.randn(2, 1, 8, 8)
    answers = []
    for (place,) in placements(3, 1):
        other = PoolNet(3, 1, (4, 4, 6), (place,)).eval()
        other.load_state_dict(model.state_dict())
        model.place((place,))
        with torch.no_grad():
            answers.append(model(x))
            assert torch.equal(other(x), answers[-1])
        assert model.feature_info == other.feature_info
    assert not torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[1], answers[2])


def test_shared_norms_have_no_weights_and_read_the_batch():
    model = PoolNet(3, 1, (4, 6), (2,), shared=True).eval()
    assert {name.rpartition(".")[2] for name in model.state_dict() if ".bn" in name} == set()
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        y = model.stem[1](5 + 3 * x.expand(-1, 4, -1, -1))
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
        assert torch.equal(model(x), model.train()(x)), "evaluation normalises as training does"


def test_an_odd_last_row_is_left_out():
    model = PoolNet(3, 1, (4,), (1,)).eval()
    assert model.forward_features(torch.randn(1, 1, 5, 7)).shape == (1, 4, 2, 3)


def test_wrong_settings_are_refused():
    for pools in ((4, 4), (5, 2), (0, 3), (3, 10)):
        with pytest.raises(Mistake, match=r"pool-net: pools=\(\d+, \d+\): must be numbers of blocks, 1 to 9, in rising order and each once"):
            PoolNet(pools=pools)
    with pytest.raises(Mistake, match="pool-net: channels="):
        PoolNet(channels=())
    with pytest.raises(Mistake, match="pool-net: 2 poolings need at least 4 pixels a side"):
        PoolNet(in_chans=1)(torch.zeros(1, 1, 3, 8))
