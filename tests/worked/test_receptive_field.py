"""Receptive field by hand: squares that hold a share, gradients of the middle of a map, silhouettes and patches, decisions by shape or texture."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.diagnose.receptive_field import (
    ReceptiveField,
    effective_receptive_field,
    erf_area,
    last_map,
    make_cue_conflict,
    readable,
    shape_bias,
    silhouette,
)
from convince.errors import Mistake
from convince.fit.answer import Answer, Normalise
from convince.layers.head import maps


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class Convs(nn.Module):
    """A chain of convs whose last map is named; all weights 1."""

    def __init__(self, *convs: nn.Conv2d) -> None:
        super().__init__()
        self.body = nn.Sequential(*convs)
        self.feature_info = maps(("body", 1, 1))
        for conv in convs:
            nn.init.ones_(conv.weight)

    def forward(self, x):
        return self.body(x).flatten(1)


# -- squares -----------------------------------------------------------------------------------------


def test_worked_squares():
    even = torch.ones(9, 9)
    assert erf_area(even, 9 / 81) == (3.0, pytest.approx(1 / 3), pytest.approx(1 / 9))
    assert erf_area(even, 25 / 81).side == pytest.approx(5)
    assert erf_area(even, 17 / 81).side == pytest.approx(4)  # half way from 9 to 25
    assert erf_area(even, 1.0) == (9.0, 1.0, 1.0)
    spot = torch.zeros(8, 8)
    spot[4, 4] = 1  # the middle pixel is that of row 8 // 2
    assert erf_area(spot, 0.99).side <= 1
    rim = torch.zeros(8, 8)
    rim[0, 0] = 1
    assert erf_area(rim, 0.5).side == pytest.approx(7.5)  # from 7 to the whole 8
    assert erf_area(torch.ones(3, 9), 1.0) == (9.0, 1.0, 1.0)
    with pytest.raises(Mistake, match="above 0 and at most 1"):
        erf_area(even, 0.0)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_more_share_needs_more_area_and_scale_does_not_matter(h, w, seed):
    scores = torch.rand(h, w, generator=gen(seed)) + 1e-3
    areas = [erf_area(scores, share) for share in (0.2, 0.3, 0.5, 0.99, 1.0)]
    assert all(a.side <= b.side + 1e-9 and a.area_ratio <= b.area_ratio + 1e-9 for a, b in itertools.pairwise(areas))
    assert areas[-1].area_ratio == pytest.approx(1)
    assert erf_area(7 * scores, 0.5).side == pytest.approx(areas[2].side, rel=1e-4)


def test_readable_scores():
    assert readable(torch.tensor([[0.0, 9.0, 99.0]])).tolist() == [[0.0, 0.5, 1.0]]
    with pytest.raises(Mistake, match="depends on no pixel"):
        readable(torch.zeros(2, 2))


# -- the field ---------------------------------------------------------------------------------------


def test_a_kernel_sees_its_own_size_and_two_of_them_more():
    x = torch.rand(3, 1, 11, 11, generator=gen())
    one = effective_receptive_field(Convs(nn.Conv2d(1, 1, 5, padding=2, bias=False)), x)
    expected = torch.zeros(11, 11)
    expected[3:8, 3:8] = 1
    assert torch.equal(one, expected)
    two = effective_receptive_field(Convs(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 3, padding=1, bias=False)), x)
    ramp = torch.tensor([1.0, 2, 3, 2, 1])
    expected[3:8, 3:8] = ramp[:, None] * ramp
    torch.testing.assert_close(two, expected)
    assert erf_area(two, 0.5).side < erf_area(one, 0.5).side, "two small kernels reach as far and look nearer"


def test_only_rectified_features_and_positive_gradients_count():
    model, x = Convs(nn.Conv2d(1, 1, 3, padding=1, bias=False)), torch.ones(1, 1, 5, 5)
    model.body[0].weight.data[0, 0, 0] = -0.5
    seen = effective_receptive_field(model, x)
    assert seen[1].tolist() == [0, 0, 0, 0, 0], "a pixel that lowers the feature does not contribute"
    assert seen[2, 1:4].tolist() == [1, 1, 1]
    model.body[0].weight.data.neg_()
    assert not effective_receptive_field(model, x).any(), "a feature below zero is silent"


def test_batches_and_channels_add_up_and_the_answer_is_left_alone():
    net = builder("resnet:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=2, size=(8, 8))().train()
    answer, x = Answer(Normalise((0.5, 0.5), (0.25, 0.25)), net), torch.rand(5, 2, 8, 8, generator=gen())
    before = {name: t.clone() for name, t in answer.state_dict().items()}
    whole = effective_receptive_field(answer, x)
    torch.testing.assert_close(effective_receptive_field(answer, x, batch=2), whole)
    each = torch.stack([effective_receptive_field(answer, row[None]) for row in x])
    torch.testing.assert_close(each.mean(0), whole)
    assert answer.training
    assert all(torch.equal(before[name], t) for name, t in answer.state_dict().items())
    assert not any(m._forward_hooks for m in answer.modules())
    assert all(p.grad is None for p in answer.parameters())
    assert last_map(answer)[1]["module"] == net.feature_info[-1]["module"]


def test_token_networks_have_a_field_too():
    class Tokens(nn.Module):
        """A class token, then one token a patch of 4x4 pixels."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Conv2d(1, 6, 4, 4, bias=False), nn.Identity()
            self.feature_info = maps(("blocks", 6, 4))
            nn.init.ones_(self.embed.weight)

        def forward(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            return self.blocks(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))[:, 0]

    expected = torch.zeros(16, 16)
    expected[8:12, 8:12] = 6  # the patch in the middle, six channels
    assert torch.equal(effective_receptive_field(Tokens(), torch.rand(2, 1, 16, 16, generator=gen())), expected)


def test_what_has_no_field_is_refused():
    with pytest.raises(Mistake, match="names its feature maps"):
        effective_receptive_field(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(1, 1, 2, 2))
    with pytest.raises(Mistake, match=r"at least one, and the input has shape \(0, 1, 4, 4\)"):
        effective_receptive_field(Convs(nn.Conv2d(1, 1, 3)), torch.rand(0, 1, 4, 4))


def test_the_probe_reads_area_and_side():
    answer = Convs(nn.Conv2d(1, 1, 5, padding=2, bias=False))
    readings = ReceptiveField(shares=(9 / 25, 1.0)).probe(answer, torch.rand(2, 1, 10, 10, generator=gen()), torch.zeros(2, dtype=torch.int64)).readings
    assert [(round(r.value, 4), r.unit) for r in readings] == [(0.09, "share of the image"), (3.0, "pixels"), (0.25, "share of the image"), (5.0, "pixels")]
    with pytest.raises(Mistake, match="must be different numbers above 0"):
        ReceptiveField(shares=(0.5, 0.5))


# -- shape against texture ---------------------------------------------------------------------------


def test_a_conflict_has_one_outline_and_another_surface():
    shape = torch.zeros(1, 1, 12, 12)
    shape[:, :, 2:7, 3:11] = 0.9
    texture = torch.zeros(1, 2, 12, 12)
    texture[:, 0, :6], texture[:, 1, :6] = 0.5, 0.25
    made = make_cue_conflict(silhouette(shape), texture, gen(), patch=4)
    assert made.shape == (1, 2, 12, 12)
    inside = silhouette(shape)[0]
    assert made[0, 0][inside].unique().tolist() == [0.5], "patches are drawn where the texture is bright"
    assert made[0, 1][inside].unique().tolist() == [0.25]
    assert not made[0, :, ~inside].any()
    assert torch.equal(made, make_cue_conflict(silhouette(shape), texture, gen(), patch=4))
    with pytest.raises(Mistake, match="patch=13 must be from 1 to the shorter side of the texture images, 12"):
        make_cue_conflict(silhouette(shape), texture, gen(), patch=13)


def test_patches_are_pieces_of_the_texture():
    texture = torch.rand(2, 1, 9, 9, generator=gen())
    made = make_cue_conflict(torch.ones(2, 8, 7, dtype=torch.bool), texture, gen(1), patch=4)
    for i in range(2):
        pieces = texture[i, 0].unfold(0, 4, 1).unfold(1, 4, 1).reshape(-1, 4, 4)
        for piece in (made[i, 0, :4, :4], made[i, 0, 4:, :4]):
            assert any(torch.equal(piece, p) for p in pieces)


def test_worked_shape_bias():
    class Says(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(x[:, 0, 0, 0].long(), 4).float()

    x = torch.tensor([0.0, 0, 0, 1, 3, 3]).view(-1, 1, 1, 1)
    shape, texture = torch.tensor([0, 0, 0, 0, 0, 0]), torch.tensor([1, 1, 1, 1, 1, 1])
    found = shape_bias(Says(), x, shape, texture)
    assert found == (0.75, 0.5, pytest.approx(1 / 6))  # three by shape, one by texture, two by neither
    assert shape_bias(Says(), x[4:], shape[4:], texture[4:]) == (0.5, 0.0, 0.0)
    with pytest.raises(Mistake, match="two different classes"):
        shape_bias(Says(), x, shape, shape)
