"""SpaRTAN by hand: the aggregation, the turn as torch's complex product, groups of its convs, the published count, a step of a block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.spartan import CARD, CMixer, SMixer, Spartan, SpartanBlock, aggregate, wave
from convince.errors import Mistake
from convince.models.counting import count_named


def test_worked_aggregation():
    x = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)  # the second channel is strongest
    weight, theta = (torch.tensor(v).view(1, 4, 1, 1) for v in ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]))
    assert aggregate(x, weight, theta).flatten().tolist() == [17, 24, 33, 44]  # products 5, 12, 21, 32, each plus 2 * 6


def test_worked_turn():
    f = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    turn = torch.tensor([[0.0, 1.0], [2.0, -1.0]])  # i, and 2 - i
    assert wave(f, turn).flatten().tolist() == [-2, 1, 10, 5]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_the_turn_is_a_complex_product_and_one_leaves_it(pairs, h, w):
    f, turn = torch.randn(2, 2 * pairs, h, w), torch.randn(pairs, 2)
    by_torch = torch.view_as_complex(f.permute(0, 2, 3, 1).reshape(2, h, w, pairs, 2).contiguous()) * torch.view_as_complex(turn)
    torch.testing.assert_close(wave(f, turn), torch.view_as_real(by_torch).flatten(3).permute(0, 3, 1, 2))
    assert torch.equal(wave(f, torch.tensor([[1.0, 0.0]]).expand(pairs, 2)), f)


def test_the_turn_is_in_full_precision():
    assert wave(torch.ones(1, 2, 1, 1, dtype=torch.bfloat16), torch.ones(1, 2)).dtype == torch.float32
    assert wave(torch.ones(1, 2, 1, 1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_published_counts():
    found = count_named("spartan-t", num_classes=1000, size=(224, 224))
    assert found.parameters == 3_820_296
    assert found.macs == pytest.approx(0.80e9, rel=0.01)
    assert count_named("spartan", num_classes=1000, size=(224, 224)) == found, "the paper's network is the default"


def test_groups_change_places_half_way():
    with torch.device("meta"):
        blocks = [m for m in builder("spartan-t", num_classes=10, in_chans=3, size=(64, 64))().modules() if isinstance(m, SpartanBlock)]
    dims, expand = (32, 64, 128, 256), (4, 4, 2, 2)
    at = [i for i, count in enumerate(CARD.variants["spartan-t"]["depths"]) for _ in range(count)]
    for i, block in zip(at, blocks, strict=True):
        c, neck = dims[i], dims[i] * expand[i]
        mixing = {m.groups for m in block.smixer.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
        assert mixing == ({1} if i < 2 else {c // 2})
        assert block.cmixer.conv[0].groups == (neck if i < 2 else c)
        assert (block.smixer.near_se.excite[0].out_channels, block.cmixer.se.excite[0].out_channels) == (c // 8, c // 4)
    rates = [block.drop_path.rate for block in blocks]
    assert rates == [pytest.approx(0.1 * k / 20) for k in range(20)]


def test_initial_weights_follow_the_fan_out():
    torch.manual_seed(0)
    model = Spartan(dims=(64, 128), depths=(1, 1), expand=(2, 2))
    dense, depth = model.stages[0][0].smixer.near[0].weight.detach(), model.stages[0][0].cmixer.conv[0].weight.detach()
    assert float(dense.std()) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
    assert float(depth.std()) == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    assert model.stages[0][0].smixer.gamma.detach().unique().tolist() == [pytest.approx(1e-5)]


def test_the_dilated_path_sees_nine_pixels_wide_and_dilation_one_five():
    for dilation, side in ((2, 9), (1, 5)):
        far = SMixer(8, dense=True, dilation=dilation).eval().far
        x = torch.zeros(1, 4, 15, 15, requires_grad=True)
        far(x)[..., 7, 7].sum().backward()
        assert x.grad is not None
        seen = x.grad.abs().sum((0, 1)).nonzero()
        assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [side, side]


def test_a_block_adds_its_mixers_in_order():
    block = SpartanBlock(8, 2, dense=True, dilation=2, drop_path=0.5, layer_scale=0.3).eval()
    x = torch.randn(2, 8, 5, 4)
    with torch.no_grad():
        y = x + 0.3 * block.smixer(nn.functional.group_norm(x, 1, eps=1e-6))
        torch.testing.assert_close(block(x), y + 0.3 * block.cmixer(nn.functional.group_norm(y, 1, eps=1e-6)), rtol=1e-4, atol=1e-5)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    from convince.backbones.unireplknet import DropPath

    torch.manual_seed(0)
    drop, x = DropPath(0.25).train(), torch.ones(4000, 2, 1, 1)
    y = drop(x)
    assert {round(v, 4) for v in y.unique().tolist()} == {0.0, round(1 / 0.75, 4)}
    assert torch.equal(y[:, 0], y[:, 1])
    assert float(y.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_gradients_reach_the_turn():
    mixer = CMixer(8, 2, dense=False)
    mixer(torch.randn(2, 8, 4, 4)).square().sum().backward()
    assert mixer.turn.grad is not None
    assert bool((mixer.turn.grad != 0).all())


def test_wrong_settings_and_small_images_are_refused():
    with pytest.raises(Mistake, match="one number a stage each"):
        Spartan(dims=(8, 16), depths=(1,), expand=(2, 2))
    with pytest.raises(Mistake, match="expand from 2"):
        Spartan(dims=(8,), depths=(1,), expand=(1,))
    with pytest.raises(Mistake, match="dims are multiples of 8"):
        Spartan(dims=(12,), depths=(1,), expand=(2,))
    with pytest.raises(Mistake, match="spartan: 16x40 pixels are too few for 4 stages"):
        Spartan(depths=(1, 1, 1, 1)).eval()(torch.zeros(1, 3, 16, 40))
