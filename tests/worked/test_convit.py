"""ConViT by hand: positional weights of the paper's start, heads as shifts, gates, how far a head looks, rectangles, refusals."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.convit import GPSA

from convince.backbones.convit import attention, convit, gates, layers, nonlocality, offsets
from convince.errors import Mistake

SMALL = {"img_size": (10, 10), "patch": 2, "dim": 8, "heads": 4, "depth": 3, "local_layers": 2}


def local(heads, strength, side, width=2):
    """A local layer alone, at its start, on a square grid."""
    layer = GPSA(heads * width, num_heads=heads, locality_strength=strength)
    layer.local_init()
    torch.nn.init.zeros_(layer.pos_proj.bias)
    torch.nn.init.eye_(layer.proj.weight)
    torch.nn.init.zeros_(layer.proj.bias)
    layer.rel_indices = offsets(side, side)[None]
    return layer


def test_worked_positional_weights():
    layer = local(9, 1.0, 5)
    head = 7  # centred at one patch to the right
    assert layer.pos_proj.weight[head].tolist() == [2, 0, -1]
    weights = layer.pos_proj(layer.rel_indices[0])[12, :, head].detach().softmax(0).view(5, 5)  # of the centre
    assert weights[2, 3] == pytest.approx(0.3216, abs=1e-4)
    for row, column in ((1, 3), (3, 3), (2, 2), (2, 4)):
        assert weights[row, column] == pytest.approx(0.1183, abs=1e-4)
    for row, column in ((1, 2), (3, 2), (1, 4), (3, 4)):
        assert weights[row, column] == pytest.approx(0.0435, abs=1e-4)
    narrow = local(9, 10.0, 5)
    assert float(narrow.pos_proj(narrow.rel_indices[0])[12, :, head].detach().softmax(0)[13]) == pytest.approx(0.9998, abs=1e-4)


def test_a_narrow_start_makes_each_head_a_shift():
    layer, side = local(9, 50.0, 5), 5
    torch.nn.init.constant_(layer.gating_param, 20.0)
    x = torch.randn(1, side * side, 18)
    with torch.no_grad():
        y = layer(x)[0].view(side, side, 9, 2)
    maps = x[0].view(side, side, 9, 2)
    for h in range(9):
        dx, dy = h // 3 - 1, h % 3 - 1
        torch.testing.assert_close(y[1:-1, 1:-1, h], maps[1 + dy : side - 1 + dy, 1 + dx : side - 1 + dx, h], atol=1e-3, rtol=0)


@given(st.integers(1, 5), st.integers(1, 5))
def test_offsets_point_from_query_to_key(rows, columns):
    r = offsets(rows, columns)
    assert torch.equal(r[..., :2], -r[..., :2].transpose(0, 1))
    assert torch.equal(r[..., 2], r[..., :2].square().sum(-1))
    assert r[0, -1].tolist() == [columns - 1, rows - 1, (columns - 1) ** 2 + (rows - 1) ** 2]


def test_timms_network_and_ours_are_one():
    ours = convit(num_classes=5).eval()
    theirs = timm.create_model("convit_tiny", num_classes=5).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_the_start_and_the_random_one():
    start, random = convit(**SMALL), convit(**SMALL, init="random")
    for layer in layers(start)[:2]:
        assert torch.equal(layer.v.weight, torch.eye(8))
        assert layer.pos_proj.weight.tolist() == [[-1, -1, -1], [-1, 1, -1], [1, -1, -1], [1, 1, -1]], "4 heads lie at offsets of half a patch"
    for layer in layers(random)[:2]:
        assert layer.v.weight.abs().max() < 0.2
        assert layer.pos_proj.weight.abs().max() < 0.2
    assert gates(random).shape == (2, 4)
    assert float(gates(start).min()) == pytest.approx(0.7311, abs=1e-4)
    narrow = layers(convit(**SMALL, locality=3.0))[0].pos_proj.weight
    assert torch.equal(narrow, 3 * layers(start)[0].pos_proj.weight)


def test_attention_is_gated_and_sums_to_one():
    model = convit(**SMALL)
    layer = layers(model)[0]
    x = torch.randn(2, 25, 8)
    found = attention(layer, x)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 25))
    q, k = layer.qk(x).chunk(2, -1)
    content = (q[..., :2] @ k[..., :2].mT / 2**0.5).softmax(-1)  # head 0
    places = (offsets(5, 5) @ layer.pos_proj.weight[0]).softmax(-1)
    gate = gates(model)[0, 0]
    torch.testing.assert_close(found[:, 0], (1 - gate) * content + gate * places)
    ordinary = layers(model)[2]
    tokens = torch.randn(2, 26, 8)
    q, k, v = ordinary.qkv(tokens).chunk(3, -1)
    mixed = torch.cat([a @ part for a, part in zip(attention(ordinary, tokens).unbind(1), v.split(2, -1), strict=True)], -1)
    torch.testing.assert_close(ordinary(tokens), ordinary.proj(mixed))


def test_how_far_heads_look():
    model, x = convit(**SMALL).eval(), torch.randn(3, 3, 10, 10)
    found = nonlocality(model, x)
    assert found.shape == (3, 4)
    even = float(offsets(5, 5)[..., 2].sqrt().mean())  # a head that looks everywhere alike
    assert found[2].tolist() == pytest.approx([even] * 4, rel=0.02)
    assert float(found[:2].max()) < 0.9 * even
    for layer in layers(model)[:2]:
        torch.nn.init.constant_(layer.gating_param, 20.0)
        layer.pos_proj.weight.data *= 50
    # each head now looks alike at the patch itself, two beside it and the one between: 0.854 patches far, or 0.5 or 0 at the end of a row or column
    corner = (16 * (2 + 2**0.5) / 4 + 8 * 0.5) / 25
    assert nonlocality(model, x)[0].tolist() == pytest.approx([corner] * 4, abs=1e-3)
    assert not any(layer._forward_pre_hooks for layer in layers(model)), "no hook stays"


def test_images_need_not_be_square():
    model = convit(**{**SMALL, "img_size": (4, 10)}).eval()
    x = torch.randn(2, 3, 4, 10)
    assert model(x).shape == (2, 10)
    assert layers(model)[0].rel_indices.shape == (1, 10, 10, 3)
    assert layers(model)[0].rel_indices[0, 0, 5].tolist() == [0, 1, 1], "patch 5 of rows of 5 lies below patch 0"


def test_without_local_layers_it_is_a_vit_of_equal_size():
    def size(model):
        return sum(p.numel() for p in model.parameters())

    plain, ours = convit(**{**SMALL, "local_layers": 0}), convit(**SMALL)
    assert size(ours) - size(plain) == 2 * (3 * 4 + 4 + 4), "positions, their biases and gates of 4 heads in 2 layers"
    assert plain(torch.randn(1, 3, 10, 10)).shape == (1, 10)
    with pytest.raises(Mistake, match="no local blocks"):
        gates(plain)


def test_wrong_settings_are_refused():
    for wrong, said in (
        ({"img_size": (9, 10)}, "9x10 pixels is not made of whole patches of 2"),
        ({"img_size": (1, 1)}, "whole patches"),
        ({"heads": 2}, "square grid"),
        ({"dim": 10}, "multiple of their number"),
        ({"local_layers": 3}, "at least one ordinary block"),
        ({"init": "none"}, "init='none' must be"),
    ):
        with pytest.raises(Mistake, match=f"^convit: .*{said}"):
            convit(**{**SMALL, **wrong})
