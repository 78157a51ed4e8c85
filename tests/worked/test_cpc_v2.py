"""CPC v2 by hand: the grid of patches, what a context can see, the loss of a guess, and which patch is the right one."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.backbones.resnet import ResNet
from convince.checks.subject import bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit, start
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.pretrain.cpc_v2 import Block, Direction, by_patch, info_nce, patchify, recolour, warped_patches


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def made(*specs, data=None, **changes):
    chosen = {"model": "resnet:layers=(1,1),widths=(4,8)", "parts": specs, "batch": 8, "epochs": 1, "lr": 0.05, "precision": "fp32", "augment": "none"}
    return prepare(settings(**{**chosen, **changes}), data or tiny_images(), drop_off=False)


# -- patches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "size", "stride", "grid"), [(260, 80, 36, 6), (256, 64, 32, 7), (28, 8, 4, 6)])
def test_the_grids_of_the_papers(side, size, stride, grid):
    x = torch.rand(1, 1, side, side)
    found = patchify(x, size, stride)
    assert found.shape == (1, grid, grid, 1, size, size)
    assert torch.equal(found[0, 1, 2, 0], x[0, 0, stride : stride + size, 2 * stride : 2 * stride + size])


@quick(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4))
def test_a_warp_of_no_strength_is_the_patch(n, size, stride):
    x = torch.rand(n, 2, size + 2 * stride, size + 3 * stride)
    assert torch.allclose(warped_patches(x, size, stride, 0.0, gen()), patchify(x, size, stride), atol=1e-5)


def test_each_patch_is_warped_by_itself():
    x = torch.rand(1, 1, 8, 1).expand(2, 1, 8, 8).contiguous()  # equal columns: a patch's own warp alone tells neighbours apart
    a = warped_patches(x, 4, 2, 1.0, gen())
    assert torch.equal(a, warped_patches(x, 4, 2, 1.0, gen()))
    assert not torch.allclose(a[0, 0, 0], a[0, 0, 1], atol=1e-3)
    assert not torch.allclose(a[0], a[1], atol=1e-3)
    assert a.min() >= 0
    assert a.max() <= 1 + 1e-6


def test_colours_are_dropped_in_half_of_the_patches():
    x = torch.rand(4000, 3, 2, 2)
    fill = torch.tensor([2.0, 3.0, 4.0])
    lost = (recolour(x, 1.0, fill, gen()) == fill.view(1, 3, 1, 1)).all((2, 3)).sum(1)
    assert (lost > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (lost == 2).sum() == pytest.approx(int((lost == 1).sum()), rel=0.15)
    assert (lost < 3).all()
    grey = recolour(torch.rand(50, 1, 2, 2), 1.0, fill[:1], gen())
    assert (grey < 1.5).all()


# -- context and loss ------------------------------------------------------------------------------


@quick(max_examples=10, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4))
def test_a_context_sees_no_row_below(row, column):
    """Changing a patch of row i changes no context above row i, and the one in its place."""
    torch.manual_seed(0)
    context = nn.Sequential(*(Block(6, 4) for _ in range(5)))
    z = torch.rand(1, 6, 5, 5)
    other = z.clone()
    other[:, :, row, column] += 1
    a, b = context(z), context(other)
    assert torch.equal(a[:, :, :row], b[:, :, :row])
    assert not torch.equal(a[:, :, row, column], b[:, :, row, column])


def test_parameters_of_the_papers_block():
    """4096 -> 256 (1x1), 1x3, 2x1, 256 -> 4096: 4096*256+256 + 3*256^2+256 + 2*256^2+256 + 256*4096+4096; here at a 16th."""
    count = sum(p.numel() for p in Block(256, 16).parameters())
    assert count == 256 * 16 + 16 + 3 * 16**2 + 16 + 2 * 16**2 + 16 + 16 * 256 + 256


def test_the_worked_example():
    """Positive 2, negatives 0, 0, 1: log(e^2 + 1 + 1 + e) - 2 = 0.49381171; equal scores cost the log of their number."""
    assert float(info_nce(torch.tensor([[2.0, 0, 0, 1]]), torch.tensor([0]))) == pytest.approx(0.49381171, abs=1e-6)
    assert float(info_nce(torch.zeros(3, 72), torch.tensor([0, 5, 71]))) == pytest.approx(math.log(72), abs=1e-5)


def test_the_right_patch_lies_k_rows_below():
    net = Direction(4, 4, (2, 3))
    (two, at2), (three, at3) = net(torch.rand(2, 4, 5, 3))
    assert two.shape == (2 * 3 * 3, 30)
    assert three.shape == (2 * 2 * 3, 30)
    assert at2.tolist() == [*range(6, 15), *range(21, 30)]
    assert at3.tolist() == [*range(9, 15), *range(24, 30)]


def test_a_patch_is_normalised_by_itself():
    """A patch's code does not depend on its neighbours in the batch, and nothing stays behind."""
    net, x = ResNet(3, 1, (1, 1), (4, 8)), torch.rand(6, 1, 8, 8)
    with by_patch(net):
        assert torch.allclose(net.forward_features(x)[:2], net.forward_features(x[:2]), atol=1e-6)
    assert not torch.allclose(net.forward_features(x)[:2], net.forward_features(x[:2]), atol=1e-3)
    assert not any(m._forward_hooks for m in net.modules())


# -- the stage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "cutting"), [(28, (8, 4, 6, 6)), (32, (8, 4, 7, 7)), (64, (18, 9, 6, 6)), (224, (64, 32, 6, 6)), (8, (2, 1, 7, 7))])
def test_cutting_by_image_size(side, cutting):
    run = made("cpc-v2:epochs=1", data=tiny_images(side))
    assert run.team.seats[0].technique.cutting(run) == cutting


def test_what_cannot_work_is_said():
    for options in ({"epochs": -1}, {"directions": 5}, {"steps_to_ignore": 3}, {"strength": 3.0}):
        with pytest.raises(Mistake, match=next(iter(options))):
            parts.make("cpc-v2", **options)
    with pytest.raises(Mistake, match="2x2 patches"):
        fit(made("cpc-v2:epochs=1,patch=4,stride=4"))


def test_at_the_start_the_loss_is_the_log_of_all_patches():
    run, seen = made("cpc-v2:epochs=1", epochs=0), []
    fit(run, None, lambda *_: seen.append((run.loss.item(), tuple(run.batch.x.shape), run.batch.group)))
    assert seen[0][0] == pytest.approx(math.log(8 * 49), abs=0.05)
    assert seen[0][1:] == ((8 * 49, 1, 2, 2), 49)
    assert run.images == 4 * round(8 * 49 * 4 / 64)


def test_the_head_rests_and_labels_are_not_looked_at():
    data = tiny_images()
    sets = (data, dataclasses.replace(data, y=(data.y + 1) % 3))
    runs = [made("cpc-v2:epochs=1,directions=2", epochs=0, data=d) for d in sets]
    for run in runs:
        fit(run)
    assert not equal(bits(runs[0].model), bits(runs[1].model))
    begun = made()
    start(begun)
    old = dict(begun.model.named_parameters())
    assert {n for n, p in runs[0].model.named_parameters() if torch.equal(p, old[n])} == {"fc.weight", "fc.bias"}


class Killed(Exception):
    pass


def test_resume(tmp_path):
    spec, steps = "cpc-v2:epochs=2,directions=1", []
    whole = made(spec, checkpoint_seconds=0, epochs=0)
    fit(whole)

    def kill(*_):
        steps.append(1)
        if len(steps) == 6:
            raise Killed

    with pytest.raises(Killed):
        fit(made(spec, checkpoint_seconds=0, epochs=0), tmp_path / "c", kill)
    again = made(spec, checkpoint_seconds=0, epochs=0)
    fit(again, tmp_path / "c")
    assert not equal(bits(whole.model), bits(again.model))
    assert not equal(bits(whole.extra), bits(again.extra))
