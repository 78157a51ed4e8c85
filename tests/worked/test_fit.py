"""FIT by hand: rounds, groups, pairs of tokens, what flows between groups, the causal form, cross-attention against torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from convince.backbones.fit import Cross, Fit, Pairs, Plane, attention_pairs, earlier, group_patches, rounds, shifted
from convince.errors import Mistake

SMALL = {"layers": "(1)1(1)", "patch": 2, "side": 2, "latents": 2, "dim_data": 8, "dim_latent": 16, "heads_data": 2, "heads_latent": 4}


def test_rounds_by_hand():
    assert rounds("(2)4(2)4(1)") == [(2, 4), (2, 4), (1, 0)]
    assert rounds("(0)3") == [(0, 3)]
    for wrong in ("2", "(2)(2)", "(2)4(2)x", "(0)", ""):
        with pytest.raises(Mistake, match="must be rounds"):
            rounds(wrong)


def test_pairs_of_the_worked_example():
    """4,096 tokens in groups of 16 with one latent each: 65,536 local and 65,536 global pairs where full attention has 16,777,216."""
    assert attention_pairs(4096, 16, 1) == Pairs(65_536, 65_536, 16_777_216)


@given(st.integers(2, 24), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_groups_of_the_cube_root_balance_the_two_costs(n, latents):
    """With L = n^3 tokens in groups of n, both costs are L^(4/3), the global one times m^2."""
    found = attention_pairs(n**3, n, latents)
    assert found.local == n**4
    assert found.across == latents**2 * n**4


def test_groups_are_squares_of_neighbours():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    tokens = group_patches(image, 1, 2)
    assert tokens.flatten(2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    assert group_patches(image, 2, 1)[0, 1].tolist() == [[2, 3, 6, 7]], "a patch's values in reading order"


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_a_plane_puts_tokens_back_where_they_were(rows, columns, side, channels):
    x = torch.randn(2, channels, rows * side, columns * side)
    assert torch.equal(Plane(rows, side)(group_patches(x, 1, side)), x)


def test_masks_and_shift_by_hand():
    assert earlier(2, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert shifted(torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]])).flatten().tolist() == [0, 1, 2]


def test_cross_attention_is_torchs():
    torch.manual_seed(0)
    cross = Cross(8, 8, 2)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([cross.q.weight, cross.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([cross.q.bias, cross.kv.bias]))
        theirs.out_proj.load_state_dict(cross.proj.state_dict())
        x, y = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
        q, kv = cross.norm(x).flatten(0, 1), cross.norm_other(y).flatten(0, 1)
        torch.testing.assert_close(cross(x, y), x + theirs(q, kv, kv)[0].view_as(x), rtol=1e-5, atol=1e-5)
    assert Cross(8, 16, 2).q.out_features == Cross(16, 8, 2).q.out_features == 8, "as wide as the narrower of the two"


def test_one_group_of_local_layers_is_timms_transformer():
    torch.manual_seed(0)
    theirs = VisionTransformer(8, 2, 3, 5, "avg", 8, 2, 2, class_token=False, fc_norm=False).eval()
    ours = Fit(5, img_size=(8, 8), layers="(2)", patch=2, side=4, dim_data=8, heads_data=2).eval()
    ours.stem[1] = nn.Identity()  # FIT normalises its tokens once more
    with torch.no_grad():
        ours.stem[0].weight.copy_(theirs.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1))
        ours.stem[0].bias.copy_(theirs.patch_embed.proj.bias)
        ours.place.copy_(theirs.pos_embed[0])
    ours.rounds[0].local.load_state_dict(theirs.blocks.state_dict())
    ours.norm.load_state_dict(theirs.norm.state_dict())
    ours.fc.load_state_dict(theirs.head.state_dict())
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def influence(model: Fit) -> torch.Tensor:
    """Whether a value in group i moves a data token of group j: [i j]."""
    tokens = torch.randn(1, 4, 4, 12, requires_grad=True)
    data, _ = model.encode(tokens)
    rows = [torch.autograd.grad(data[0, j].square().sum(), tokens, retain_graph=True)[0][0].abs().sum((1, 2)) > 0 for j in range(4)]
    return torch.stack(rows, 1)


def test_groups_meet_through_read_and_write_alone():
    torch.manual_seed(0)
    model = Fit(img_size=(8, 8), **SMALL)
    assert bool(influence(model).all())
    model.rounds[0].write = None
    assert torch.equal(influence(model), torch.eye(4, dtype=torch.bool))
    model = Fit(img_size=(8, 8), **SMALL)
    model.rounds[0].read = None
    assert torch.equal(influence(model), torch.eye(4, dtype=torch.bool))


def test_a_causal_network_does_not_see_what_comes_later():
    torch.manual_seed(0)
    model = Fit(img_size=(8, 8), causal=True, **{**SMALL, "layers": "(1)1(1)1(1)"}).eval()
    assert torch.equal(influence(model), torch.ones(4, 4, dtype=torch.bool).triu())
    tokens = torch.randn(1, 4, 4, 12)
    later = tokens.clone()
    later[0, 1, 2:] += 1  # the second half of the second group, and all behind it
    later[0, 2:] += 1
    with torch.no_grad():
        (data, latents), (data2, latents2) = model.encode(tokens), model.encode(later)
    assert torch.equal(data[0, 0], data2[0, 0])
    assert torch.equal(latents[0, 0], latents2[0, 0])
    assert torch.equal(data[0, 1, :2], data2[0, 1, :2]), "inside a group, tokens see those before them"
    assert not torch.allclose(data[0, 1, 2:], data2[0, 1, 2:])


@pytest.mark.parametrize(("layers", "shape"), [("(1)1(1)", (2, 8, 8, 8)), ("(1)1", (2, 16, 2, 16)), ("(0)2(0)1", (2, 16, 2, 16)), ("(1)", (2, 8, 8, 8))])
def test_the_last_layers_say_who_answers(layers, shape):
    model = Fit(num_classes=3, img_size=(14, 15), **{**SMALL, "layers": layers})
    x = torch.randn(2, 3, 14, 15)  # padded to 16x16: 4x4 groups of 2x2 tokens of 2x2 px
    assert model.forward_features(x).shape == shape
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="multiples of their heads"):
        Fit(dim_data=10, heads_data=3)
    with pytest.raises(Mistake, match="fit: was built for images of"):
        Fit(img_size=(8, 8), **SMALL)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(Mistake, match="each must be at least 1"):
        Fit(side=0)
