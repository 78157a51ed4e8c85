"""ViT-ResNAS by hand: the skip of a reduction, blocks against timm's, masked normalisation, cut-out networks, counts, refusals."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from convince.backbones import builder
from convince.backbones.maps import feature_maps
from convince.backbones.vit_resnas import Block, ConvStem, Norm, ResidualSpatialReduction, VitResnas, cut, macs, mask, masked_norm, shortcut
from convince.errors import Mistake
from convince.fit.weights import build_by_name, shared
from convince.models.counting import count, count_named

TWO = {"widths": (6, 12), "heads": ((2, 3), (2, 2)), "hidden": ((8, 8), (12, 10)), "head_dims": (2, 4), "patch": 2, "stem_width": 4, "drop_path": 0.0}


def network(**more):
    torch.manual_seed(0)
    net = VitResnas(**{"num_classes": 5, "in_chans": 1, "img_size": (8, 8), **TWO, **more})
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def test_worked_shortcut():
    """Class token 9, patches 1 2 / 3 6 of one channel: the pool is 3, and a second channel is 0."""
    x = torch.tensor([[[9.0], [1.0], [2.0], [3.0], [6.0]]])
    assert shortcut(x, (2, 2), 2).tolist() == [[[9.0, 0.0], [3.0, 0.0]]]
    odd = torch.tensor([[[9.0], [1.0], [2.0], [4.0]]])  # a plane of 1x3: the last patch stands alone
    assert shortcut(odd, (1, 3), 1).tolist() == [[[9.0], [1.5], [4.0]]]


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 3))
def test_convolution_and_shortcut_agree_on_the_plane(down, across, more):
    layer = ResidualSpatialReduction(2, 2 + more, (down, across))
    x = torch.randn(2, 1 + down * across, 2)
    assert layer(x).shape == (2, 1 + -(-down // 2) * -(-across // 2), 2 + more)


def test_a_reduction_is_its_branch_plus_the_raw_input():
    torch.manual_seed(0)
    whole, bare = ResidualSpatialReduction(3, 5, (4, 4)), ResidualSpatialReduction(3, 5, (4, 4), skip=False)
    nn.init.normal_(whole.pos_embed)
    bare.load_state_dict(whole.state_dict())
    x = torch.randn(2, 17, 3)
    torch.testing.assert_close(whole(x) - bare(x), shortcut(x, (4, 4), 5))
    y = F.layer_norm(x, (3,), whole.norm.weight, whole.norm.bias, 1e-6)
    patches = F.conv2d(y[:, 1:].mT.reshape(2, 3, 4, 4), whole.conv.weight, whole.conv.bias, 2, 1).flatten(2).mT + whole.pos_embed
    torch.testing.assert_close(bare(x), torch.cat((whole.token(y[:, :1]), patches), 1))


def test_a_block_is_timms():
    torch.manual_seed(0)
    mine, theirs = Block(12, 3, 4, 24, 0.0).eval(), TimmBlock(12, 3, mlp_ratio=2.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
    theirs.load_state_dict(mine.state_dict())  # strict: every name and shape agrees
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(mine(x, {}, "1.1", None), theirs(x), rtol=1e-5, atol=1e-5)


def test_worked_masked_norm():
    """Kept channels 1 and 3: mean 2, variance 1; the masked third would have moved both."""
    norm, width = nn.LayerNorm(3, eps=0.0), mask({"width1": torch.tensor([2])}, "width1", 3, torch.ones(1))
    assert width.tolist() == [[[1.0, 1.0, 0.0]]]
    assert masked_norm(torch.tensor([[[1.0, 3.0, 0.0]]]), norm, width).tolist() == [[[-1.0, 1.0, 0.0]]]
    x, whole = torch.randn(2, 4, 3), Norm(3)
    torch.testing.assert_close(whole(x, torch.ones(2, 1, 3)), whole(x))


def test_the_stem_by_hand():
    torch.manual_seed(0)
    stem = ConvStem(1, 3, 5, 4).eval()
    x = torch.randn(2, 1, 8, 8)
    a = F.relu(stem.conv1[1](F.conv2d(x, stem.conv1[0].weight, None, 2, 1)))
    b = F.relu(stem.conv3[1](F.conv2d(F.relu(stem.conv2[1](F.conv2d(a, stem.conv2[0].weight, None, 1, 1))), stem.conv3[0].weight, None, 1, 1)))
    wanted = F.conv2d(a + b, stem.proj.weight, stem.proj.bias, 2)
    torch.testing.assert_close(stem(x), wanted)
    assert wanted.shape == (2, 5, 2, 2)


CHOICES = {"width1": [4, 6], "width2": [7, 12], "heads1.1": [1, 2], "heads1.2": [2, 3], "heads2.1": [1, 2], "hidden1.1": [3, 8], "hidden1.2": [5, 8]}
CHOICES |= {"hidden2.1": [2, 12], "block1.2": [0, 1], "block2.2": [0, 1], "heads2.2": [1, 2], "hidden2.2": [1, 10]}


def own_options(genes):
    here = [[0, 1] if genes[f"block{i}.2"] else [0] for i in (1, 2)]
    rows = {what: [[genes[f"{what}{i}.{j + 1}"] for j in row] for i, row in enumerate(here, 1)] for what in ("heads", "hidden")}
    return {**TWO, **rows, "widths": [genes["width1"], genes["width2"]]}, here


@settings(deadline=None, max_examples=20)
@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()}))
def test_a_masked_super_network_is_the_cut_out_one(genes):
    net, x = network().eval(), torch.randn(3, 1, 8, 8)
    small = cut(net, *own_options(genes))
    with torch.no_grad():
        own = small(x)
        net.kept = {name: torch.tensor([value]) for name, value in genes.items()}
        torch.testing.assert_close(net(x), own, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in net.parameters())


def test_rows_of_a_batch_can_be_several_networks():
    net, x = network().eval(), torch.randn(4, 1, 8, 8)
    first, second = ({name: values[i] for name, values in CHOICES.items()} for i in (0, 1))
    with torch.no_grad():
        apart = torch.cat([cut(net, *own_options(genes))(rows) for genes, rows in ((first, x[:2]), (second, x[2:]))])
        net.kept = {name: torch.tensor([first[name]] * 2 + [second[name]] * 2) for name in CHOICES}
        torch.testing.assert_close(net(x), apart, rtol=1e-5, atol=1e-5)
        with pytest.raises(Mistake, match=r"^vit-resnas: multi-arch-sampling chose networks for 4 images, and another part runs 3"):
            net(x[:3])


def test_published_networks_and_the_closed_form():
    """Counts of the printed definitions, by the layers and by :func:`macs`; 1,794.4 M is the limit of the paper's tiny search."""
    found = count_named("vit-resnas-tiny", num_classes=1000, size=(224, 224))
    assert (found.parameters, found.macs) == (40793552, 1782630272)
    with torch.device("meta"):
        assert macs(VitResnas().options, (224, 224), 1000) == 1794378240
    for size, more in (((8, 8), {}), ((7, 12), {"stem": "patch"})):
        net = network(img_size=size, **more)
        assert macs(net.options, size, 5, 1) == count(net, size, 1).macs


def test_skip_or_not_are_the_same_weights():
    a, b = (build_by_name(builder(f"vit-resnas-mini:skip={skip}", num_classes=10, in_chans=1, size=(32, 32)), 0) for skip in (True, False))
    assert shared(a, b) == 1
    x = torch.randn(1, 1, 32, 32)
    assert not torch.allclose(a.eval()(x), b.eval()(x))


def test_feature_maps_have_the_stages_planes():
    net = builder("vit-resnas-mini", num_classes=3, in_chans=1, size=(28, 20))()
    found = feature_maps(net.eval(), torch.randn(1, 1, 28, 20))
    assert [tuple(m.shape[1:]) for m in found.values()] == [(64, 7, 5), (128, 4, 3), (256, 2, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (6,)}, "one entry a stage in each"),
        ({"heads": ((2,), (2, 2))}, "one number for each block"),
        ({"heads": ((2, 0), (2, 2))}, "all numbers at least 1"),
        ({"widths": (12, 6)}, "a stage cannot be narrower than the one before"),
        ({"patch": 3}, "'convs' with an even patch"),
        ({"stem": "linear"}, "'convs' with an even patch, or 'patch'"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(Mistake, match=f"^vit-resnas: .*{message}"):
        VitResnas(img_size=(8, 8), **{**TWO, **options})


def test_other_images_and_too_large_cuts_are_refused():
    with pytest.raises(Mistake, match=r"vit-resnas is built for \(8, 8\) pixels, and the images have \(6, 8\)"):
        network()(torch.zeros(1, 1, 6, 8))
    with pytest.raises(Mistake, match=r"the super-network has less than is asked for in"):
        cut(network(), {**TWO, "widths": (6, 13)}, [[0, 1], [0, 1]])
