"""ResNeXt by hand: the paper's table of equal costs, three forms of one block, torchvision's twin, the order of a block."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.resnext import Block, as_form, match_width, path_weights, resnext
from convince.errors import Mistake

NARROW = "resnext:depth=11,cardinality={},width={},outputs=(128,256,512)"


def moved(model: nn.Module) -> nn.Module:
    """The network with batch norms that have seen something, so that every one of their numbers matters."""
    gen = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.running_var):
                value.uniform_(0.5, 1.5, generator=gen)
            for value in (module.bias.data, module.running_mean):
                value.normal_(0, 0.2, generator=gen)
    return model


@pytest.mark.parametrize(
    ("channels", "rows"),
    [
        (256, {(1, 64): 69_632, (2, 40): 69_760, (4, 24): 69_888, (8, 14): 71_456, (32, 4): 70_144}),
        (128, {(1, 32): 17_408, (2, 20): 17_440, (4, 12): 17_472, (8, 7): 17_864}),
    ],
)
def test_equal_costs(channels, rows):
    budget = next(iter(rows.values()))
    for (c, d), weights in rows.items():
        assert path_weights(c, d, channels) == weights
        assert c == 1 or match_width(c, budget, channels) == d


@given(st.integers(1, 64), st.integers(100, 10**6), st.integers(1, 512))
def test_a_matched_width_is_the_largest_within_three_percent(cardinality, budget, channels):
    try:
        d = match_width(cardinality, budget, channels)
    except Mistake:
        d = 0
    assert d == 0 or path_weights(cardinality, d, channels) <= 1.03 * budget
    assert path_weights(cardinality, d + 1, channels) > 1.03 * budget


def test_a_blocks_weights_are_those_of_its_paths():
    block = Block(256, 4, 32, 256)
    assert sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Conv2d)) == path_weights(32, 4)
    assert isinstance(block.downsample, nn.Identity)
    assert all(m.bias is None for m in block.modules() if isinstance(m, nn.Conv2d))
    assert isinstance(Block(256, 4, 32, 256, stride=2).downsample[0], nn.Conv2d), "type B: projected where the shape changes"


def test_a_path_sees_nothing_of_its_neighbours_and_the_relu_stands_behind_the_sum():
    block = Block(4, 1, 4, 4).eval()
    with torch.no_grad():
        block.conv1.weight.copy_(torch.eye(4)[:, :, None, None])
        block.conv2.weight.zero_()
        block.conv2.weight[:, 0, 1, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        block.conv3.weight.copy_(torch.eye(4)[:, :, None, None])
        for norm in (block.bn1, block.bn2, block.bn3):
            norm.eps = 0.0
        x = torch.tensor([1.0, 1.0, -1.0, 1.0]).view(1, 4, 1, 1)
        assert block(x).flatten().tolist() == [2.0, 3.0, 0.0, 5.0]


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.sampled_from([1, 2]), st.sampled_from([8, 12]))
def test_the_three_forms_of_a_block_are_one_function(cardinality, width, stride, c_out):
    c = moved(nn.Sequential(Block(8, width, cardinality, c_out, stride)))
    x = torch.randn(2, 8, 5, 5)
    for mode in (True, False):
        c.train(mode)
        for form in ("a", "b"):
            other = as_form(c, form)
            assert len(other[0].paths) == cardinality
            torch.testing.assert_close(other(x), c(x), rtol=1e-4, atol=1e-5)


def test_the_three_forms_of_networks_ours_and_timms():
    for name, side in (("resnext-mini", 16), ("resnext50-32x4d:cardinality=8,width=2", 32)):
        model = moved(builder(name, num_classes=10, in_chans=3, size=(side, side))()).eval()
        x = torch.randn(1, 3, side, side)
        with torch.no_grad():
            scores = model(x)
            scale = float(scores.abs().max())
            for form in ("a", "b"):
                torch.testing.assert_close(as_form(model, form)(x) / scale, scores / scale, rtol=0, atol=1e-5)
            assert torch.equal(model(x), scores), "the network itself is left as it was"


def test_torchvisions_twin():
    ours = builder("resnext50-32x4d", num_classes=1000, in_chans=3, size=(64, 64))()
    twin = moved(torchvision.models.resnext50_32x4d(weights=None)).eval()
    mine, theirs = ours.state_dict(), list(twin.state_dict().values())
    ours.load_state_dict(dict(zip(mine, theirs, strict=True)))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = twin(x)
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours.eval()(x) / scale, expected / scale, rtol=0, atol=1e-5)


def test_the_last_norm_of_a_block_starts_at_one():
    for name in ("resnext-mini", "resnext50-32x4d"):
        model = builder(name, num_classes=10, in_chans=3, size=(32, 32))()
        assert all(bool((m.weight == 1).all()) for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_counts_of_the_claims_networks():
    for (c, d), expected in {(1, 32): 506_058, (8, 7): 484_050}.items():
        with torch.device("meta"):
            model = builder(NARROW.format(c, d), num_classes=10, in_chans=3, size=(16, 16))()
        assert sum(p.numel() for p in model.parameters()) == expected


def test_widths_double_and_sides_halve():
    with torch.device("meta"):
        model = resnext()
        assert [getattr(model, f"layer{i}")[0].conv2.weight.shape[:2] for i in (1, 2, 3)] == [(512, 64), (1024, 128), (2048, 256)]
        assert [len(getattr(model, f"layer{i}")) for i in (1, 2, 3)] == [3, 3, 3]
        assert model.forward_features(torch.empty(1, 3, 32, 32)).shape == (1, 1024, 8, 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: resnext(depth=30), "9 a block and 2"),
        (lambda: resnext(depth=50), "need stem=photo"),
        (lambda: resnext(depth=29, stem="photo"), "the depth is 50 or 101"),
        (lambda: resnext(cardinality=0), "at least one path"),
        (lambda: match_width(32, 1000), "take fewer paths"),
        (lambda: as_form(nn.Linear(2, 2), "a"), "Linear has no blocks of grouped"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(Mistake, match=words):
        make()
