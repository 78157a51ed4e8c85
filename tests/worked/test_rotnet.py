"""RotNet by hand: the four rotations, the size of its network, a stage without labels or guests, and the probes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.backbones import builder
from convince.backbones.nin import NIN
from convince.checks.subject import bits, equal, tiny_images
from convince.data import MemoryStore, Preprocess
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.parts import Card
from convince.pretrain.rotnet import (
    accuracy_of,
    conv_head,
    fit_head,
    frozen_features,
    linear_head,
    nonlinear_head,
    rotate4,
    semi_supervised_curve,
)


def count(module):
    return sum(p.numel() for p in module.parameters())


# -- rotations -------------------------------------------------------------------------------------


def test_rotations_by_hand():
    x, turns = rotate4(torch.tensor([[[[1.0, 2], [3, 4]]]]))
    assert turns.tolist() == [0, 1, 2, 3]
    assert x[:, 0].tolist() == [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]


def test_a_quarter_is_transpose_then_flip_up_down():
    x = torch.rand(3, 2, 5, 5)
    assert torch.equal(rotate4(x)[0][1::4], x.transpose(2, 3).flip(2))


@quick(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_copies_stand_together_and_turn_back(n, c, side):
    x = torch.rand(n, c, side, side)
    turned, turns = rotate4(x)
    assert turned.shape == (4 * n, c, side, side)
    assert turns.tolist() == [0, 1, 2, 3] * n
    for i, (image, k) in enumerate(zip(turned, turns.tolist(), strict=True)):
        assert torch.equal(torch.rot90(image, -k, (1, 2)), x[i // 4])


def test_only_squares_turn():
    with pytest.raises(Mistake, match="square"):
        rotate4(torch.rand(1, 1, 3, 4))
    data = tiny_images()
    wide = dataclasses.replace(data, x=MemoryStore(data.x.tensor[:, :, :6]), preprocess=Preprocess("image", 1, (6, 8), "letterbox", (0.3,), (0.2,)))
    with pytest.raises(Mistake, match="6x8"):
        fit(made("rotnet:epochs=1", data=wide))
    for options in ({"epochs": -1}, {"pad": 1.0}, {"flip": 2.0}):
        with pytest.raises(Mistake, match=next(iter(options))):
            parts.make("rotnet", **options)


# -- the network -----------------------------------------------------------------------------------


def test_parameters_of_the_paper():
    net = NIN(num_classes=4)
    assert count(net) == 1_411_140
    assert [count(getattr(net, f"block{i}")) for i in range(1, 5)] == [61_376, 535_680, 406_656, 406_656]
    assert not any(m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d))


def test_maps_of_the_paper():
    net, shapes = NIN(num_classes=4).eval(), []
    x = torch.rand(1, 3, 32, 32)
    for i in range(1, 5):
        x = getattr(net, f"block{i}")(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(96, 16, 16), (192, 8, 8), (192, 8, 8), (192, 8, 8)]


def test_variants():
    assert count(builder("nin3", num_classes=10, in_chans=3, size=(32, 32))()) == 1_411_140 - 406_656 + 6 * 193
    assert builder("nin-mini", num_classes=10, in_chans=1, size=(28, 28))().num_features == 24
    with pytest.raises(Mistake, match="width=4"):
        NIN(width=4)


# -- the stage -------------------------------------------------------------------------------------


def made(*specs, data=None, beside=(), **changes):
    chosen = {"model": "nin:width=8,blocks=2", "parts": specs, "batch": 8, "epochs": 1, "lr": 0.05, "precision": "fp32", "augment": "none"}
    run = prepare(settings(**{**chosen, **changes}), data or tiny_images(), drop_off=False)
    run.team = Team([*run.team.seats, *(Seat(Card(part=f"z{i}", kind="technique", title="t"), {}, t) for i, t in enumerate(beside))])
    return run


class Guest(Technique):
    def on_start(self, run):
        self.stages = []

    def on_batch(self, run):
        self.stages.append(run.stage.name)


def test_the_stage_has_four_rows_an_image_and_no_guests():
    guest, seen = Guest(), []
    run = made("rotnet:epochs=2,pad=0.0,flip=0.0", beside=[guest])

    def watch(*_):
        if run.stage.name == "rotnet":
            seen.append((tuple(run.batch.x.shape), run.batch.y.argmax(1).tolist(), run.batch.group, tuple(run.out.logits.shape)))
            x = run.plan.pixels(run.data.x.take(run.batch.index[::4]))
            assert torch.equal(run.batch.x, rotate4(x)[0])

    fit(run, None, watch)
    assert seen == [((32, 1, 8, 8), [0, 1, 2, 3] * 8, 4, (32, 4))] * 8
    assert guest.stages == ["train"] * 4
    assert run.images >= 8 * 32 + 4 * 8
    told = [row for row in run.record.rows if row["kind"] == "reading"]
    assert [row["name"] for row in told] == ["rotation accuracy"] * 2
    assert all(0 <= row["value"] <= 1 for row in told)


def test_labels_are_not_looked_at():
    """Unlabelled and wrongly labelled rows give the bits of the labelled ones, and all rows are seen."""
    data, rows = tiny_images(), set()
    whole = made("rotnet:epochs=1", epochs=0)
    fit(whole)
    for y in (torch.where(torch.isin(torch.arange(48), data.split.train), -1, data.y), (data.y + 1) % 3):
        run = made("rotnet:epochs=1", epochs=0, data=dataclasses.replace(data, y=y))
        fit(run, None, lambda *_, run=run: rows.update(run.batch.index.tolist()))
        assert not equal(bits(whole.model), bits(run.model))
    assert rows == set(data.split.train.tolist())
    start = made(epochs=0)
    fit(start)
    moved = {n for n, p in whole.model.named_parameters() if not torch.equal(p, dict(start.model.named_parameters())[n])}
    assert moved == {n for n, _ in whole.model.named_parameters()} - {"fc.weight", "fc.bias"}


def test_rotation_is_learnt_where_there_is_an_up():
    """A bright bar at the top of every image tells all four rotations apart; bars at mirrored heights tell two."""
    data = tiny_images()
    x = torch.randint(0, 90, (48, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    x[:, :, :2] += 120
    upright = dataclasses.replace(data, x=MemoryStore(x.to(torch.uint8)))
    accuracy = []
    for source in (upright, data):
        run = made("rotnet:epochs=12,pad=0.0,flip=0.0", epochs=0, data=source)
        fit(run)
        accuracy.append([row["value"] for row in run.record.rows if row["kind"] == "reading"][-1])
    assert accuracy[0] > 0.95
    assert accuracy[1] < 0.7


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 6, 10])
def test_resume_inside_the_pretext(tmp_path, at):
    whole = made("rotnet:epochs=2", checkpoint_seconds=0)
    fit(whole)
    path, steps = tmp_path / "checkpoint.safetensors", []

    def kill(*_):
        steps.append(1)
        if len(steps) == at:
            raise Killed

    with pytest.raises(Killed):
        fit(made("rotnet:epochs=2", checkpoint_seconds=0), path, kill)
    again = made("rotnet:epochs=2", checkpoint_seconds=0)
    fit(again, path)
    assert not equal(bits(whole.model), bits(again.model))
    assert not equal(bits(whole.extra), bits(again.extra))
    assert whole.record.rows[-len(again.record.rows) :] == again.record.rows


# -- probes ----------------------------------------------------------------------------------------


def test_heads_of_the_paper():
    assert count(nonlinear_head((192, 8, 8), 10)) == 12_288 * 200 + 200 * 200 + 4 * 200 + 200 * 10 + 10
    assert count(linear_head((192, 8, 8), 10)) == 12_288 * 10 + 10
    assert count(conv_head((192, 8, 8), 10)) == 406_656 + 1_930


def test_frozen_features_leave_the_answer_alone():
    run = made(epochs=0)
    fit(run)
    answer = run.answer.train()
    x = torch.rand(5, 1, 8, 8)
    kept, state = bits(answer), torch.get_rng_state()
    found = frozen_features(answer, "model.block2", x, batch=2)
    assert found.shape == (5, 8, 2, 2)
    assert not equal(kept, bits(answer))
    assert answer.training
    assert not any(m._forward_hooks for m in answer.modules())
    with pytest.raises(Mistake, match="did you mean"):
        frozen_features(answer, "model.block3", x)
    y = torch.arange(5) % 2
    fit_head(linear_head, found, y, 2, epochs=2, batch=2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("head", [linear_head, nonlinear_head, conv_head])
def test_heads_learn_what_can_be_learnt(head):
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.rand(60, 3, 2, 2, generator=gen) + 2 * nn.functional.one_hot(y, 3)[:, :, None, None]
    curve = semi_supervised_curve(head, (x[:30], y[:30]), (x[30:], y[30:]), 3, (2, 10), epochs=20, milestones=(15,), batch=10, lr=0.05)
    assert list(curve) == [2, 10]
    assert curve[10] > 0.9
    first = fit_head(head, x, y, 3, epochs=1, batch=20)
    assert not equal(bits(first), bits(fit_head(head, x, y, 3, epochs=1, batch=20)))
    assert not first.training
    assert 0 <= accuracy_of(first, x, y) <= 1
