"""Lane nets by hand: which lanes fill, what is counted, joins by plain arithmetic, parts of a super-network against networks of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.backbones import builder
from convince.backbones.lane_net import CARD, Join, LaneNet, Topology, coarser, macs, pairs, whole
from convince.backbones.mobilenetv2 import InvertedResidual
from convince.errors import Mistake
from convince.models.counting import count_named
from convince.parts import spell

BASE = {"num_classes": 3, "in_chans": 1, "widths": (4, 6, 8), "expansion": 2}


@st.composite
def topologies(draw):
    lanes, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def digits(length):
        return "".join(draw(st.lists(st.sampled_from("01"), min_size=length, max_size=length)))

    return tuple(digits(columns) for _ in range(lanes)), tuple(digits(lanes * (lanes - 1)) for _ in range(columns))


def test_lanes_fill_by_joins():
    """0>1 after the first column, 1>2 after the second; the block of lane 2 in the second column and the join 2>0 after it read an empty lane."""
    assert pairs(3) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    found = Topology(("100", "010", "011"), ("100000", "000110", "000000"))
    assert found.filled() == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2}]
    assert found.cells() == [(0, 0), (1, 1), (2, 2)]
    assert found.joins() == [(0, 0, 1), (1, 1, 2)]
    assert found.pruned() == Topology(("100", "010", "001"), ("100000", "000100", "000000"))


@settings(deadline=None, max_examples=40)
@given(topologies())
def test_pruning_changes_no_network(rows):
    one = Topology(*rows)
    again = one.pruned()
    assert (again.cells(), again.joins(), again.filled()[-1]) == (one.cells(), one.joins(), one.filled()[-1])
    assert again.pruned() == again


def test_multiply_adds_by_hand():
    """2 lanes of 2 and 3 channels on 4x4 pixels, one column, expansion 2, 5 classes, grey."""
    one = Topology(("1", "0"), ("10",))
    stem, block = 9 * 2 * 16, (2 * 4 + 9 * 4 + 4 * 2) * 16  # lane 0 has 16 pixels, lane 1 has 4
    join, ends, head = 2 * 3 * 4, 2 * 4 * 16 + 3 * 6 * 4, (4 + 6) * 5
    assert macs(one, (2, 3), 2, (4, 4), 5, 1) == stem + block + join + ends + head


@settings(deadline=None, max_examples=12)
@given(topologies(), st.integers(1, 2), st.integers(1, 2), st.integers(5, 9))
def test_multiply_adds_are_those_counted(rows, expansion, stride, side):
    one = Topology(*rows)
    widths = (4, 6, 8)[: len(one.blocks)]
    options = {"widths": widths, "blocks": list(one.blocks), "fusions": list(one.fusions), "expansion": expansion, "stride": stride}
    counted = count_named(spell("lane-net", options), num_classes=3, size=(side, side), in_chans=2).macs
    assert macs(one, widths, expansion, (side, side), 3, 2, stride) == counted


def test_a_join_by_plain_arithmetic():
    """Down: means of 2x2 squares, at the edge of what there is, then the 1x1; up: the 1x1, then each pixel four times."""
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert coarser(x, 1).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]
    torch.manual_seed(0)
    down, up = Join(1, 2, 1).eval(), Join(1, 2, -1).eval()
    weight = down.conv[0].weight.flatten()
    scale = (1 + 1e-5) ** -0.5  # BN at its start
    torch.testing.assert_close(down(x, (2, 2)), coarser(x, 1) * weight.view(1, 2, 1, 1) * scale)
    small, weight = x[:, :, :2, :2], up.conv[0].weight.flatten()
    repeated = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(small, (4, 4)), repeated * weight.view(1, 2, 1, 1) * scale)


def test_a_single_lane_is_a_row_of_inverted_residuals():
    torch.manual_seed(0)
    net = LaneNet(3, 1, (4,), ("101",), ("", "", ""), 2).eval()
    assert [name for name, m in net.named_modules() if isinstance(m, InvertedResidual)] == ["cells.0_0", "cells.0_2"]
    x = torch.randn(2, 1, 6, 6)
    y = net.ends["0"](net.cells["0_2"](net.cells["0_0"](net.stem(x))))
    torch.testing.assert_close(net(x), net.fc(y.mean((2, 3))))


@pytest.mark.parametrize("side", [(8, 8), (7, 5), (1, 1)])
def test_a_part_of_a_super_network_is_the_network_of_its_own(side):
    """The same weights by name; the head reads zeros where a lane is empty, so its weights for that lane do not matter."""
    torch.manual_seed(0)
    full = whole(3, 2)
    net = LaneNet(**BASE, blocks=full.blocks, fusions=full.fusions).eval()
    x = torch.randn(2, 1, *side)
    for part in (Topology(("10", "01", "00"), ("100000", "001000")), Topology(("00", "00", "01"), ("010000", "000010")), full):
        alone = LaneNet(**BASE, blocks=part.blocks, fusions=part.fusions).eval()
        state = {name: tensor for name, tensor in net.state_dict().items() if name in alone.state_dict()}
        kept = [torch.arange(2 * w) + sum(2 * v for v in net.widths[:i]) for i, w in enumerate(net.widths) if i in alone.read]
        state["fc.weight"] = net.fc.weight.detach()[:, torch.cat(kept)]
        alone.load_state_dict(state)
        net.now = part
        if side != (7, 5):  # there the squares at the edges are not whole, and a mean depends on the coarsest lane that is read
            torch.testing.assert_close(net(x), alone(x))
        for i, lane in net.lanes(x).items():
            torch.testing.assert_close(lane, alone.lanes(x)[i])
    net.now = None


def test_a_lane_that_stays_empty_is_not_built():
    net = LaneNet(**BASE, blocks=("11", "11", "11"), fusions=("010000", "000000"))
    assert net.read == [0, 2]
    assert net.num_features == 2 * (4 + 8)
    assert not any(name.startswith(("cells.1", "ends.1", "joins.1")) for name, _ in net.named_parameters())
    assert [row["reduction"] for row in net.feature_info] == [1, 4]


def test_named_sizes():
    for name in ("lane-net", *CARD.variants):
        options = CARD.variants.get(name, {})
        if "blocks" in options:
            one = Topology(options["blocks"], options["fusions"])
            assert one.pruned() == one, f"{name} names parts that read an empty lane"
            assert one.filled()[-1] == set(range(len(options.get("widths", (16, 24, 40)))))
    chain = builder("lane-net-chain", num_classes=10, in_chans=3, size=(32, 32))()
    assert len(chain.cells) == 4
    assert len(chain.joins) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4, 6)}, r"a width for each of 3 lanes"),
        ({"blocks": ("11", "1", "11")}, "a string a lane, all of one length"),
        ({"fusions": ("111111",)}, "as many fusions as a string has digits"),
        ({"fusions": ("11", "11", "11", "11")}, r"3 lanes have 6 joins a column, a digit each: 0>1, 0>2, 1>0, 1>2, 2>0, 2>1"),
        ({"blocks": ("1112", "1111", "1111")}, r"every digit is 1 \(there\) or 0 \(not\)"),
        ({"blocks": "1111"}, "lists of strings of 0 and 1"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(Mistake, match=message):
        LaneNet(**options)
