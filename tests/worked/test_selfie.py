"""Selfie by hand: the loss of a hole, which patch goes where, what trains, and what a net without positions cannot do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.checks.subject import bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit, start
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.pretrain.selfie import AttentionPool, Head, cut, front_of, patch_of, selfie_loss, selfie_scores


def made(*specs, data=None, **changes):
    chosen = {"model": "resnet:layers=(1,1),widths=(4,8)", "parts": specs, "batch": 8, "epochs": 1, "lr": 0.05, "precision": "fp32", "augment": "none"}
    return prepare(settings(**{**chosen, **changes}), data or tiny_images(), drop_off=False)


# -- scores and loss -------------------------------------------------------------------------------


def test_the_worked_example():
    """u + pos = (1, 0), codes (2,0), (0,1), (1,1), (-1,0), the first right: log((e^2 + 1 + e + 1/e) / e^2) = 0.44018970."""
    codes = torch.tensor([[[2.0, 0], [0, 1], [1, 1], [-1, 0]]])
    scores = selfie_scores(torch.tensor([[0.25, 0.5]]), torch.tensor([[[0.75, -0.5]]]).expand(1, 4, 2), codes)
    assert scores[0, 0].tolist() == [2, 0, 1, -1]
    own = torch.full((1, 4, 4), -1e4)
    own[:, torch.arange(4), torch.arange(4)] = 0
    own[0, 0] = scores[0, 0]
    assert 4 * float(selfie_loss(own)) == pytest.approx(0.44018970, abs=1e-6)


@quick(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(2, 12))
def test_equal_scores_cost_the_log_of_the_holes(n, m):
    assert float(selfie_loss(torch.zeros(n, m, m))) == pytest.approx(torch.tensor(float(m)).log().item(), abs=1e-6)


@quick(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_patches_stand_row_by_row(n, rows, columns, p):
    x = torch.rand(n, 2, rows * p, columns * p)
    found = cut(x, p)
    assert found.shape == (n * rows * columns, 2, p, p)
    for i in range(n):
        for r in range(rows):
            for c in range(columns):
                assert torch.equal(found[(i * rows + r) * columns + c], x[i, :, r * p : (r + 1) * p, c * p : (c + 1) * p])


def test_a_position_is_a_row_plus_a_column():
    head = Head(4, 4, (2, 3), 1, 1)
    assert torch.equal(head.positions()[4], head.rows[1, 0] + head.columns[0, 1])
    assert isinstance(head.project, nn.Identity)
    assert isinstance(Head(4, 8, (2, 3), 1, 1).project, nn.Linear)


def test_parameters_of_the_papers_pooling():
    """Three layers of width d, 1024 in the paper: each 4 d^2 + 4 d of attention, 8 d^2 + 5 d of the two linear layers, 4 d of the norms; and the query."""
    d = 32
    pool = AttentionPool(d, 3, 4)
    assert sum(p.numel() for p in pool.parameters()) == 3 * (12 * d * d + 13 * d) + d


def test_hidden_patches_do_not_reach_the_summary():
    """Changing a hidden patch changes its own column of the scores and no other."""
    head, pooled, order = Head(4, 4, (2, 2), 1, 2).eval(), torch.rand(1, 4, 4), torch.tensor([[2, 0, 3, 1]])
    other = pooled.clone()
    other[0, 0] += 1  # place 0 is the second of the order: hidden, column 1
    a, b = head(pooled, order, 2), head(other, order, 2)
    assert a.shape == (1, 2, 2)
    assert torch.equal(a[:, :, 0], b[:, :, 0])
    assert not torch.allclose(a[:, :, 1], b[:, :, 1])
    other[0, 3] += 1  # a seen one changes all
    assert not torch.allclose(head(other, order, 2)[:, :, 0], a[:, :, 0])


def test_seen_patches_have_places():
    """Two seen patches that change places change the summary: positions are added before pooling."""
    head, pooled, order = Head(4, 4, (2, 2), 1, 2).eval(), torch.rand(1, 4, 4), torch.tensor([[2, 0, 3, 1]])
    assert not torch.allclose(head(pooled, order, 2), head(pooled[:, [0, 3, 2, 1]], order, 2), atol=1e-7)
    with torch.no_grad():
        head.rows.zero_()
        head.columns.zero_()
    scores = head(pooled, order, 2)
    assert torch.allclose(scores, head(pooled[:, [0, 3, 2, 1]], order, 2), atol=1e-6)
    assert torch.allclose(scores[:, 0], scores[:, 1]), "without positions all holes get the same answer: chance"


# -- the stage -------------------------------------------------------------------------------------


def test_patches_by_image_size():
    assert [patch_of((s, s), None) for s in (32, 28, 224, 64, 128, 8, 25)] == [8, 7, 32, 16, 32, 2, 5]
    assert patch_of((32, 64), None) == 8
    for size, patch in [((29, 29), None), ((32, 32), 5), ((32, 32), 32), ((32, 32), 0)]:
        with pytest.raises(Mistake, match="29x29 pixels.*--size 32" if patch is None else f"patch={patch}"):
            patch_of(size, patch)


def test_what_cannot_work_is_said():
    for options in ({"epochs": -1}, {"masked": 1.0}, {"layers": 0}):
        with pytest.raises(Mistake, match=next(iter(options))):
            parts.make("selfie", **options)
    with pytest.raises(Mistake, match="heads=3"):
        fit(made("selfie:epochs=1,heads=3"))
    with pytest.raises(Mistake, match="two or more"):
        fit(made("selfie:epochs=1", model="resnet:layers=(1,),widths=(4,)"))


@pytest.mark.parametrize(("masked", "side", "holes"), [(0.25, 8, 4), (0.25, 112, 12), (0.01, 8, 2), (0.99, 8, 15)])
def test_a_quarter_is_hidden(masked, side, holes):
    """4 of 16 and 12 of 49 patches; at least two, and one is seen."""
    run = made(f"selfie:epochs=1,masked={masked}", data=tiny_images(side))
    start(run)
    assert run.team.seats[0].technique.holes(run) == holes


def test_the_last_stage_rests():
    """The head and the last stage keep their weights and their buffers; the first stages move; nothing of the part stays."""
    whole, begun = made("selfie:epochs=1", epochs=0), made(epochs=0)
    fit(whole)
    fit(begun)
    old = begun.model.state_dict()
    moved = {n for n, t in whole.model.state_dict().items() if not torch.equal(t, old[n])}
    assert moved == {n for n in old if n.startswith(("conv1", "bn1", "layer1"))}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in whole.model.modules())
    assert whole.images == 32
    told = [row for row in whole.record.rows if row["kind"] == "reading"]
    assert [row["unit"] for row in told] == ["share of holes; chance 1/4"]


def test_a_pass_that_ends_early_is_the_front_of_the_whole_pass():
    run = made("selfie:epochs=1", epochs=0)
    fit(run)
    run.model.eval()
    x = torch.rand(3, 1, 8, 8)
    net = run.model
    expected = net.layer1(net.relu(net.bn1(net.conv1(run.normalise(x)))))
    assert torch.equal(front_of(run, x), expected)


def test_labels_are_not_looked_at():
    data = tiny_images()
    runs = [made("selfie:epochs=1", epochs=0, data=d) for d in (data, dataclasses.replace(data, y=(data.y + 1) % 3))]
    for run in runs:
        fit(run)
    assert not equal(bits(runs[0].model), bits(runs[1].model))


class Killed(Exception):
    pass


def test_resume_and_reload(tmp_path):
    whole, steps = made("selfie:epochs=2", checkpoint_seconds=0), []
    fit(whole)

    def kill(*_):
        steps.append(1)
        if len(steps) == 6:
            raise Killed

    with pytest.raises(Killed):
        fit(made("selfie:epochs=2", checkpoint_seconds=0), tmp_path / "c", kill)
    again = made("selfie:epochs=2", checkpoint_seconds=0)
    fit(again, tmp_path / "c")
    assert not equal(bits(whole.model), bits(again.model))
    assert not equal(bits(whole.extra), bits(again.extra))
    write_config(tmp_path, whole.settings)
    write_model(tmp_path, whole)
    assert not equal(bits(open_run(tmp_path).run.model), bits(whole.model))


def test_off_is_the_baseline():
    runs = [made(*spec) for spec in ((), ("selfie:epochs=0",))]
    for run in runs:
        fit(run)
    assert not equal(bits(runs[0].answer), bits(runs[1].answer))
