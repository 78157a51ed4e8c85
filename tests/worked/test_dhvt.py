"""DHVT by hand: head tokens and their merging, the gate of the class token, parity with timm's block, the patch embedding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block as VitBlock
from torch import nn

from convince.backbones.dhvt import Affine, Block, Daff, Dhvt, HiMhsa, Sope, head_means, merge
from convince.errors import Mistake


def test_head_means_by_hand():
    x = torch.tensor([[[1.0, 2, 3, 4], [3, 4, 5, 6]]])
    assert head_means(x, 2).tolist() == [[[2, 3], [4, 5]]], "each head has its own channels, averaged over both tokens"


def test_merge_by_hand():
    x = torch.tensor([[[1.0], [5], [7], [10], [20]]])
    assert merge(x, 2).flatten().tolist() == [16, 5, 7], "the mean of the two head tokens, 15, goes to the class token"


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_merging_changes_the_class_token_alone(heads, patches, n):
    x = torch.randn(n, 1 + patches + heads, 5)
    out = merge(x, heads)
    assert torch.equal(out[:, 1:], x[:, 1 : 1 + patches])
    torch.testing.assert_close(out[:, 0] - x[:, 0], x[:, 1 + patches :].mean(1))


def test_a_block_without_its_pieces_is_timms():
    """Head tokens off, an MLP in place of DAFF, weights copied: timm's ViT block."""
    torch.manual_seed(0)
    theirs = VitBlock(16, 4, qkv_bias=True, norm_layer=lambda d, **kw: nn.LayerNorm(d, eps=1e-6)).eval()
    ours = Block(16, 4, 64, 0.0, without=("head-tokens",)).eval()
    for name in ("norm1", "norm2"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    ours.attn.load_state_dict(theirs.attn.state_dict())

    class Mlp(nn.Module):
        def forward(self, x, plane):
            return theirs.mlp(x)

    ours.ffn = Mlp()
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, (2, 3)), theirs(x), rtol=1e-5, atol=1e-5)


def test_head_tokens_are_keys_of_every_token():
    """Attention with head tokens equals plain attention over tokens and head tokens, merged; the tokens come of eq. 7 and 8 by hand."""
    torch.manual_seed(0)
    with_heads, plain = HiMhsa(8, 2), HiMhsa(8, 2, head_tokens=False)
    nn.init.normal_(with_heads.head_embed)
    plain.load_state_dict(with_heads.state_dict(), strict=False)
    x = torch.randn(2, 5, 8)
    made = []
    for head in range(2):
        mean = x[:, :, 4 * head : 4 * head + 4].mean(1)
        parts = with_heads.head_proj(mean).split(4, 1)  # one part a head, each normalised by itself
        made.append(torch.cat([nn.functional.gelu(with_heads.head_norm(part)) for part in parts], 1) + with_heads.head_embed[:, head])
    with torch.no_grad():
        torch.testing.assert_close(with_heads(x), merge(plain(torch.cat([x, torch.stack(made, 1)], 1)), 2))


def test_the_gate_multiplies_the_class_token_and_has_no_sigmoid():
    torch.manual_seed(0)
    daff = Daff(4, 8).eval()
    x = torch.randn(2, 7, 4)
    with torch.no_grad():
        y = daff(x, (2, 3))
        torch.testing.assert_close(y[:, 0] / x[:, 0], daff.gate(y[:, 1:].mean(1)), rtol=1e-4, atol=1e-5)
        daff.gate[2].bias.fill_(5.0)
        daff.gate[2].weight.zero_()
        torch.testing.assert_close(daff(x, (2, 3))[:, 0], 5 * x[:, 0])
        assert torch.equal(Daff(4, 8, gate=False).eval()(x, (2, 3))[:, 0], x[:, 0])


def test_without_the_depthwise_convolution_patches_do_not_see_their_neighbours():
    torch.manual_seed(0)
    a = torch.randn(1, 10, 4)
    b = a.clone()
    b[0, 1] += 1  # the first patch of a plane of 3x3
    for depthwise, reached in ((True, [0, 1, 3, 4]), (False, [0])):
        daff = Daff(4, 8, depthwise=depthwise, gate=False).eval()
        with torch.no_grad():
            moved = (daff(a, (3, 3)) - daff(b, (3, 3)))[0, 1:].abs().sum(1) > 1e-6
        assert moved.nonzero().flatten().tolist() == reached, depthwise


@pytest.mark.parametrize(
    ("patch", "order"), [(2, "a conv bn gelu a"), (4, "a conv bn gelu conv bn a"), (16, "a conv bn gelu conv bn gelu conv bn gelu conv bn a")]
)
def test_the_order_of_the_patch_embedding(patch, order):
    names = {Affine: "a", nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.GELU: "gelu"}
    sope = Sope(3, 16, patch)
    assert " ".join(names[type(m)] for m in sope.proj) == order
    assert sope(torch.zeros(2, 3, 32, 64)).shape == (2, 16, 32 // patch, 64 // patch)


def test_no_position_is_stored_so_any_size_goes_through():
    model = Dhvt(dim=8, depth=2, heads=2).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == model(torch.zeros(1, 3, 28, 61)).shape == (1, 10)
        assert model.forward_features(torch.zeros(1, 3, 28, 61)).shape == (1, 1 + 7 * 16, 8)


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="patch=8: must be 2, 4 or 16"):
        Dhvt(patch=8)
    with pytest.raises(Mistake, match="dim must be a multiple of the heads"):
        Dhvt(dim=10, heads=4)
    with pytest.raises(Mistake, match="did you mean 'head-tokens'"):
        Dhvt(without=("headtokens",))
