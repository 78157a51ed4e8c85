"""The nets of 2011 by hand: lines of text, the size rule, skips, tables of links, fixed filters, and parity with the column of multi-column nets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.ciresan_net import CARD, CiresanNet, PartialConv2d, Processing, Step, build_ciresan, fitting, mexican_hat, parse, side_after, table
from convince.backbones.mcdnn_column import McdnnColumn
from convince.errors import Mistake

LINE = "1x29x29-20C4-MP2-40C5-MP3-150N-10N"


def test_worked_line():
    shape, steps = parse(LINE)
    assert shape == (1, 29, 29)
    assert steps == [Step("C", 20, (4, 4)), Step("MP", 0, (2, 2)), Step("C", 40, (5, 5)), Step("MP", 0, (3, 3)), Step("N", 150), Step("N", 10)]
    assert parse("8C4x3S1-6C2S1x0-5N") == (None, [Step("C", 8, (4, 3), (1, 1)), Step("C", 6, (2, 2), (1, 0)), Step("N", 5)])


@pytest.mark.parametrize("name", list(CARD.variants))
def test_every_size_can_be_read(name):
    _, steps = parse(CARD.variants[name]["layers"])
    maps = [str(s.count) for s in steps if s.kind == "C"]
    if name.startswith("ciresan-mnist") and name != "ciresan-mnist-six":
        assert "-".join(maps) == name.removeprefix("ciresan-mnist-").removesuffix("-150n")
    if "mnist" in name:
        assert side_after(29, steps), "the report's digits are 29 pixels wide"


def test_worked_sides():
    assert side_after(29, parse(LINE)[1]) == [26, 13, 9, 3]
    assert side_after(29, parse("1C5")[1]) == [25]
    assert side_after(25, parse("1C3S1")[1]) == [12]
    assert side_after(7, parse("1C2x4")[1], axis=0) == [6]
    assert side_after(7, parse("1C2x4")[1], axis=1) == [4]
    with pytest.raises(Mistake, match=r"ciresan-net: layer 2 has kernels of 2 at a stride of 2, which do not divide a side of 25 pixels"):
        side_after(28, parse("20C4-MP2")[1])


@given(st.integers(1, 80), st.sampled_from([v["layers"] for v in CARD.variants.values()]))
def test_padding_goes_to_the_next_side_that_divides(side, layers):
    steps = parse(layers)[1]
    wide = fitting(side, steps)
    assert wide >= side
    side_after(wide, steps)
    for less in range(side, wide):
        with pytest.raises(Mistake):
            side_after(less, steps)


def test_a_digit_of_28_pixels_is_padded_to_29_by_its_edge():
    net = CiresanNet(layers="2C4-MP2-3C5-MP3", img_size=(28, 28)).eval()
    assert net.side == (29, 29)
    x = torch.rand(1, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(net(x), net(nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")))


def test_the_column_of_multi_column_nets_is_one_of_these():
    ours, theirs = build_ciresan(LINE).eval(), McdnnColumn().eval()
    assert sum(p.numel() for p in ours.parameters()) == 76_040
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        a.data.copy_(b.data)
    x = torch.randn(3, 1, 29, 29)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_skips_are_strides_less_one_columns_before_rows():
    net = CiresanNet(in_chans=1, layers="2C4x2S1x0", img_size=(5, 8))
    conv = net.maps[0]
    assert (conv.kernel_size, conv.stride) == ((2, 4), (1, 2))
    assert net.forward_features(torch.zeros(1, 1, 5, 8)).shape == (1, 2, 4, 3)


def test_weights_begin_uniform_in_a_twentieth():
    weights = torch.cat([p.detach().flatten() for p in build_ciresan(LINE).parameters()])
    assert weights.abs().max() <= 0.05
    assert weights.std() == pytest.approx(0.05 / 3**0.5, rel=0.01)


@given(st.integers(1, 12), st.integers(1, 20), st.floats(0.01, 1))
def test_a_table_gives_every_map_the_same_number_of_links(maps_out, maps_in, links):
    rows = table(maps_out, maps_in, links).sum(1)
    assert set(rows.tolist()) == {max(round(links * maps_in), 1)}


def test_masked_weights_are_and_stay_zero():
    net = CiresanNet(num_classes=3, layers="8C3-MP2-8C2-5N", links=0.5, img_size=(8, 8))
    convs = [m for m in net.modules() if isinstance(m, PartialConv2d)]
    off = [~conv.links.expand_as(conv.weight) for conv in convs]
    assert [int(o.sum()) for o in off] == [0, 8 * 4 * 4]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    before = convs[1].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(6, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    assert not convs[1].weight[off[1]].any()
    assert bool((convs[1].weight != before)[~off[1]].all()), "the others learn"


def test_a_table_is_drawn_by_the_seed_and_kept_with_the_weights():
    net = builder("ciresan-net:layers=4C3-8C3,links=0.5", num_classes=3, in_chans=1, size=(8, 8))
    a, b = net(), net()
    assert not torch.equal(a.maps[1].links, b.maps[1].links)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.maps[1].links, b.maps[1].links)


def test_the_mexican_hat_sums_to_nothing_and_is_largest_in_its_middle():
    hat = mexican_hat()
    assert hat.shape == (21, 21)
    assert float(hat.sum()) == pytest.approx(0, abs=1e-6)
    assert float(hat.clamp_min(0).sum()) == pytest.approx(1, abs=1e-6)
    assert hat.argmax() == 21 * 21 // 2
    assert torch.equal(hat, hat.T)


def test_contrast_maps_tell_a_bright_point_from_a_dark_one_and_are_silent_on_grey():
    layer = Processing("contrast", 1)
    flat = torch.full((1, 1, 30, 30), 0.7)
    torch.testing.assert_close(layer(flat), torch.cat([flat, 0 * flat, 0 * flat], 1), rtol=0, atol=1e-6)
    bright = flat.clone()
    bright[..., 15, 15] = 1.0
    on, off = layer(bright)[0, 1:]
    assert on[15, 15] == pytest.approx(0.3 * float(mexican_hat()[10, 10]), rel=1e-4)
    assert off[15, 15] == 0
    on, off = layer(2 * flat - bright)[0, 1:]
    assert on[15, 15] == 0
    assert off[15, 15] > 0


def test_edge_maps_are_the_slope_across_and_down_channel_by_channel():
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    out = Processing("edges", 2)(torch.stack([2 * columns, 3 * rows])[None])
    assert out.shape == (1, 6, 6, 6)
    assert out[0, 2:, 2, 2].tolist() == [2.0, 0.0, 0.0, 3.0]


def test_fixed_filters_do_not_learn():
    net = CiresanNet(layers="2C3", processing="contrast", img_size=(8, 8))
    assert [name for name, _ in net.named_parameters()] == ["maps.0.weight", "maps.0.bias", "fc.weight", "fc.bias"]
    assert net.maps[0].in_channels == 3


def test_wrong_lines_are_refused():
    with pytest.raises(Mistake, match="'3D2' cannot stand there"):
        parse("20C4-3D2")
    with pytest.raises(Mistake, match="'5C2' cannot stand there"):
        parse("20C4-10N-5C2")
    with pytest.raises(Mistake, match=r"begin with the input \(1x29x29\) and end with the output units"):
        build_ciresan("20C4-10N")
    with pytest.raises(Mistake, match="which do not divide a side of 28"):
        build_ciresan("1x28x28-20C5S1-10N")
    with pytest.raises(Mistake, match="it comes from the data"):
        CiresanNet(layers="1x8x8-4C3")
    with pytest.raises(Mistake, match="at least one convolution"):
        CiresanNet(layers="10N")
    with pytest.raises(Mistake, match="links=0: a share"):
        CiresanNet(links=0)
