"""UniRepLKNet by hand: GRN's example, dense kernels, merged networks equal to 1e-4, the published counts of both forms, layouts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.unireplknet import (
    BRANCHES,
    DilatedReparamBlock,
    Grn,
    MergedBlock,
    UniRepBlock,
    UniRepLKNet,
    dense_kernel,
    global_response,
    merge_reparam,
)
from convince.errors import Mistake
from convince.layers.map_layouts import to_map_audio, to_map_points, to_map_series, to_map_video
from convince.models.counting import count


def shaken(model: nn.Module) -> nn.Module:
    """Random weights and batch statistics, in eval mode: what training leaves, not what initialisation does."""
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=gen) + 0.5)
            elif "num_batches" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=gen) * 0.3)
    return model.eval()


def test_worked_grn():
    x = torch.tensor([[[[3.0, 0.0], [4.0, 1.0]]]])  # one row, a plane of 1x2, channels (3, 4) and (0, 1): G = (5, 1), N = (5/3, 1/3)
    found = global_response(x, torch.ones(2))
    torch.testing.assert_close(found, torch.tensor([[[[8.0, 0.0], [32 / 3, 4 / 3]]]]))
    assert torch.equal(Grn(2)(x), x), "at first it does nothing"


def test_grn_is_timms():
    from timm.layers.grn import GlobalResponseNorm

    ours, theirs = shaken(Grn(6)), GlobalResponseNorm(6)
    theirs.weight.data, theirs.bias.data = ours.gamma.data, ours.beta.data
    x = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@given(st.sampled_from([3, 5, 7]), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_a_dense_kernel_does_what_the_dilated_one_does(kernel, dilation):
    weight, x = torch.randn(3, 1, kernel, kernel), torch.randn(2, 3, 12, 9)
    dense = dense_kernel(weight, dilation)
    assert dense.shape[2] == dilation * (kernel - 1) + 1
    torch.testing.assert_close(dense, F.conv_transpose2d(weight, torch.ones(1, 1, 1, 1), stride=dilation))  # eq. 1 as the paper writes it
    dilated = F.conv2d(x, weight, padding=dilation * (kernel // 2), dilation=dilation, groups=3)
    torch.testing.assert_close(F.conv2d(x, dense, padding=dense.shape[2] // 2, groups=3), dilated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", BRANCHES)
def test_merged_branches_are_one_large_kernel(kernel):
    assert all(dilation * (k - 1) + 1 <= kernel for k, dilation in BRANCHES[kernel]), "no branch reaches beyond the large kernel"
    block, x = shaken(DilatedReparamBlock(4, kernel)), torch.randn(2, 4, 19, 16)
    one = block.merge()
    assert one.kernel_size == (kernel, kernel)
    assert one.bias is not None
    with torch.no_grad():
        torch.testing.assert_close(one(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"se": False}, {"dilated": False, "kernels": ((3,), (13, 5))}, {"stem": 4}])
def test_a_merged_network_gives_equal_scores(options):
    model = shaken(UniRepLKNet(**{"num_classes": 5, "depths": (1, 2), "width": 12, "kernels": ((3,), (13, 3)), "stem": 2, **options}))
    x, before = torch.randn(3, 3, 24, 24), {name: t.clone() for name, t in model.state_dict().items()}
    merged = merge_reparam(model)
    with torch.no_grad():
        scores = model(x)
        assert scores.std() > 0.1
        torch.testing.assert_close(merged(x), scores, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items()), "the original is left alone"
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    assert all(p.requires_grad for p in merged.parameters())
    assert not merged.training
    with pytest.raises(Mistake, match="has no UniRepBlock to merge"):
        merge_reparam(merged)


def test_an_answer_can_be_merged():
    from convince.fit.answer import Answer, Normalise

    answer = Answer(Normalise((0.5,), (0.2,)), shaken(UniRepLKNet(num_classes=3, in_chans=1, depths=(1,), width=8, kernels=((7,),), stem=1))).eval()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(merge_reparam(answer)(x), answer(x), rtol=1e-4, atol=1e-4)


# parameters after merging, and multiply-adds of that form
MERGED = {
    "unireplknet-a": (4_437_300, 0.64e9),
    "unireplknet-f": (6_235_216, 0.91e9),
    "unireplknet-p": (10_741_704, 1.57e9),
    "unireplknet-n": (18_318_560, 2.77e9),
    "unireplknet-t": (31_037_980, 4.90e9),
    "unireplknet-s": (55_645_984, 9.09e9),
    "unireplknet-b": (98_008_456, 16.06e9),
}


@pytest.mark.parametrize("name", MERGED)
def test_published_counts(name):
    from convince.backbones.unireplknet import CARD

    with torch.device("meta"):
        model = builder(name, num_classes=1000, in_chans=3, size=(224, 224))()
        merged = merge_reparam(model)
        assert sum(p.numel() for p in model.parameters()) == CARD.published[name]["parameters"]
        assert sum(p.numel() for p in merged.parameters()) == MERGED[name][0]
        assert sum(isinstance(m, MergedBlock) for m in merged.modules()) == sum(CARD.variants[name]["depths"])
        if name in ("unireplknet-a", "unireplknet-n"):  # the others take long to count and are built alike
            assert count(merged, (224, 224)).macs == pytest.approx(MERGED[name][1], rel=0.01)


def test_kernels_go_round_in_a_stage_and_guidelines_are_switches():
    with torch.device("meta"):
        blocks = [m for m in builder("unireplknet-s", num_classes=10, in_chans=3, size=(64, 64))().modules() if isinstance(m, UniRepBlock)]
        plain = UniRepBlock(8, 13, se=False, dilated=False)
    large = [isinstance(b.spatial, DilatedReparamBlock) for b in blocks]
    assert large == [False] * 3 + [True] * 3 + [True, False, False] * 9 + [True] * 3
    assert isinstance(plain.spatial, nn.Conv2d)
    assert isinstance(plain.se, nn.Identity)


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match=r"unireplknet: depths=.*every stage needs a block"):
        UniRepLKNet(depths=(1, 1), kernels=((3,),))
    with pytest.raises(Mistake, match="kernels are odd"):
        UniRepLKNet(depths=(1,), kernels=((4,),))
    with pytest.raises(Mistake, match=r"kernel 31 has no dilated branches.*or give dilated=False"):
        UniRepLKNet(depths=(1,), kernels=((31,),))
    with pytest.raises(Mistake, match="stem is 1, 2 or 4"):
        UniRepLKNet(depths=(1,), kernels=((3,),), stem=3)
    assert UniRepLKNet(depths=(1,), kernels=((31,),), dilated=False, width=4)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


# -- layouts -----------------------------------------------------------------------------------------


def test_audio_is_an_image_of_one_channel():
    x = torch.randn(2, 7, 5)
    assert torch.equal(to_map_audio(x)[:, 0], x)


def test_series_lie_in_reading_order_on_a_nearly_square_map():
    x = torch.arange(1.0, 15).view(1, 7, 2)
    found = to_map_series(x)
    assert found.shape == (1, 1, 4, 4)
    assert found[0, 0, 0].tolist() == [1, 2, 3, 4]
    assert found[0, 0, 3].tolist() == [13, 14, 0, 0]
    assert to_map_series(torch.zeros(3, 48, 768)).shape == (3, 1, 192, 192)  # the paper's weather series
    assert to_map_series(x, nn.Linear(2, 3)).shape == (1, 1, 5, 5)
    with pytest.raises(Mistake, match="has no numbers"):
        to_map_series(torch.zeros(1, 0, 2))


@given(st.integers(1, 40), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_series_loses_nothing_and_fills_its_map(length, d):
    x = torch.randn(2, length, d)
    found = to_map_series(x)
    h, w = found.shape[2:]
    assert h <= w <= h + 1
    assert torch.equal(found.flatten(1)[:, : length * d], x.flatten(1))
    assert not found.flatten(1)[:, length * d :].any()


def test_points_are_seen_along_each_axis():
    x = torch.tensor([[[0.0, 0.0, 0.0], [4.0, 4.0, 4.0], [0.0, 4.0, 2.0]]])
    found = to_map_points(x, side=4)[0]
    assert found.shape == (3, 4, 4)
    along_x = found[0]  # rows are y, columns z
    assert along_x[0, 0] == 0.5  # the farthest place
    assert along_x[3, 3] == 1.0
    assert along_x[3, 2] == 0.5
    assert int((along_x > 0).sum()) == 3
    hidden = torch.tensor([[[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]])
    assert to_map_points(hidden, side=2)[0, 0, 1, 1] == 1.0, "the nearer of two points is seen"
    torch.testing.assert_close(to_map_points(3 * x + 7, side=4)[0], found)
    assert to_map_points(torch.ones(2, 5, 3), side=3).count_nonzero() == 6, "one place is one pixel a view"
    with pytest.raises(Mistake, match=r"points are \[n p 3\]"):
        to_map_points(torch.zeros(2, 5, 4))


def test_frames_are_tiles_in_reading_order():
    x = torch.arange(3.0)[None, :, None, None, None].expand(1, 3, 2, 2, 3) + 1
    found = to_map_video(x)
    assert found.shape == (1, 2, 4, 6)
    assert found[0, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert found[0, 1, 2].tolist() == [3, 3, 3, 0, 0, 0]
    assert to_map_video(torch.zeros(1, 16, 3, 224, 224)).shape == (1, 3, 896, 896)  # the paper's clips
    frames = torch.randn(2, 4, 1, 3, 5)
    assert torch.equal(to_map_video(frames)[:, :, 3:, :5], frames[:, 2])
    with pytest.raises(Mistake, match="has no frames"):
        to_map_video(torch.zeros(1, 0, 3, 4, 4))
