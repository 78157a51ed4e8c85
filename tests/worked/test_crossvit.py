"""CrossViT by hand: its grids, the linear cost of cross-attention, timm's network with the same weights, the other fusions, refusals."""

import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.crossvit import CrossAttention

from convince.backbones import builder
from convince.backbones.crossvit import CrossVit, OtherFusion, grids
from convince.backbones.maps import feature_maps
from convince.errors import Mistake
from convince.models.counting import count

SMALL = {"patches": (2, 4), "dims": (6, 12), "depths": (1, 1), "encoders": 2, "ratio": (1, 1)}


def test_worked_grids():
    assert grids((240, 240), (12, 16), (15, 14)) == [(20, 20), (14, 14)]
    assert grids((408, 408), (12, 16), (17, 16)) == [(34, 34), (24, 24)]
    assert grids((28, 32), (4, 8), (1, 1)) == [(7, 8), (4, 4)]
    assert grids((224, 224), (12, 16), (15, 14)) == [(19, 19), (14, 14)]  # 228 and 224 pixels: resized


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 20))
def test_grids_just_cover_the_image(side, small, large):
    (a, _), (b, _) = grids((side, side), (small, large), (15, 14))
    assert (a - 1) * small < side <= a * small
    assert (b - 1) * large * 15 < side * 14 <= b * large * 15


def test_our_weights_in_timms_network_give_its_scores():
    """Published size 9: timm's names and shapes, and equal scores when our one linear layer is split into its two heads."""
    ours = CrossVit(num_classes=7, dims=(128, 256), heads=4, depths=(1, 3), mlp_ratio=3).eval()
    theirs = timm.create_model("crossvit_9_240", num_classes=7).eval()
    torch.nn.init.normal_(ours.fc.bias)
    weights = {name.replace("cls_token.", "cls_token_").replace("pos_embed.", "pos_embed_"): p for name, p in ours.state_dict().items()}
    weight, bias = weights.pop("fc.weight"), weights.pop("fc.bias")
    for i, part in enumerate(weight.split((128, 256), 1)):
        weights |= {f"head.{i}.weight": 2 * part, f"head.{i}.bias": bias}
    theirs.load_state_dict(weights)  # strict: every name and shape agrees
    x = torch.randn(1, 3, 240, 240)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
        both = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(ours.forward_features(x), both, atol=1e-5, rtol=1e-4)


def test_cross_attention_by_the_formula_and_its_linear_cost():
    layer = CrossAttention(6, num_heads=3, qkv_bias=True).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    q, k, v = layer.wq(x[:, :1]), layer.wk(x), layer.wv(x)
    heads = []
    for h in (slice(0, 2), slice(2, 4), slice(4, 6)):  # softmax(q k^T / sqrt(C / h)) v
        heads.append((q[..., h] @ k[..., h].mT / 2**0.5).softmax(-1) @ v[..., h])
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -1)))

    def macs(tokens):
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            CrossAttention(48, num_heads=3)(torch.empty(1, 1 + tokens, 48))
        return counter.get_total_flops() // 2

    assert 3.92 < macs(1600) / macs(400) < 4.08
    whole = count(CrossVit(img_size=(8, 8), **SMALL, fusion="all"), (8, 8)).macs
    assert whole > count(CrossVit(img_size=(8, 8), **SMALL), (8, 8)).macs


def test_branches_that_stay_apart_do_not_hear_each_other():
    def moved(fusion):
        model = CrossVit(img_size=(8, 8), **SMALL, fusion=fusion).eval()
        x = torch.randn(1, 3, 8, 8)
        with torch.no_grad():
            before = model.forward_features(x)[:, :6]
            model.patch_embed[1].proj.weight.mul_(-3)
            return float((model.forward_features(x)[:, :6] - before).abs().max())

    assert moved(None) == 0
    assert all(moved(fusion) > 1e-6 for fusion in ("cross", "all", "class", "pairwise"))


def test_other_fusions_by_their_equations():
    grid = [(4, 4), (2, 2)]
    x = [torch.randn(2, 17, 6), torch.randn(2, 5, 12)]
    for kind in ("class", "pairwise", "all"):
        layer = OtherFusion((6, 12), (1, 1), 3, 2.0, grid, kind)
        layer.blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        small, large = layer(x)
        f, g = layer.f, layer.g
        cls = f[0](x[0][:, 0]) + f[1](x[1][:, 0])
        if kind == "all":
            y = torch.cat((f[0](x[0]), f[1](x[1])), 1)
            y = y + layer.attn(layer.norm(y))
            torch.testing.assert_close(small, g[0](y[:, :17]))
            torch.testing.assert_close(large, g[1](y[:, 17:]))
            continue
        torch.testing.assert_close(small[:, 0], g[0](cls))
        torch.testing.assert_close(large[:, 0], g[1](cls))
        if kind == "class":
            assert torch.equal(small[:, 1:], x[0][:, 1:])
        else:  # the four small patches in a corner of the middle mean the large patch's place
            down = f[0](x[0][:, 1:]).unflatten(1, (4, 4))[:, :2, :2].mean((1, 2))
            torch.testing.assert_close(large[:, 1], g[1](f[1](x[1][:, 1]) + down))


def test_fusions_share_the_weights_of_their_blocks_by_name():
    from convince.fit.weights import build_by_name, shared

    cross, apart = (build_by_name(builder(f"crossvit-mini:fusion={kind}", num_classes=10, in_chans=1, size=(32, 32)), 0) for kind in ("cross", "none"))
    assert shared(cross, apart) == 1


def test_feature_maps_have_the_grids_of_the_branches():
    for size, shapes in {(28, 28): ((7, 7), (4, 4)), (32, 16): ((8, 4), (4, 2))}.items():
        model = builder("crossvit-mini", num_classes=10, in_chans=1, size=size)()
        found = {name: m.shape for name, m in feature_maps(model.eval(), torch.randn(1, 1, *size)).items()}
        assert found["blocks.1.blocks.0"] == (1, 48, *shapes[0])
        assert found["blocks.1.blocks.1"] == (1, 96, *shapes[1])
    with torch.device("meta"):
        assert [row["reduction"] for row in CrossVit().feature_info] == [12, 12, 12, 18, 18, 18], "240 / 14 is 17.1; 18 steps give 14 columns"


def test_wrong_settings_are_refused():
    import pytest

    for wrong, said in (
        ({"img_size": (1, 8)}, "1x8 pixels holds no patch of 2"),
        ({"heads": 5}, "multiples of the heads"),
        ({"fusion": "sum"}, "fusion='sum' must be 'cross'"),
        ({"stem": "convs"}, "patches of 12 and 16"),
        ({"patches": (2,)}, "two numbers each"),
    ):
        with pytest.raises(Mistake, match=f"^crossvit: .*{said}"):
            CrossVit(**{"img_size": (8, 8), **SMALL, **wrong})
