"""The loop's promises: hooks in order, still and aside move nothing, slots have one owner, edits replay, resize goes on."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from convince.checks.subject import bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.loop import factor, fit
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.parts import Card
from convince.types import Stage

MODEL = "resnet:layers=(1,1),widths=(4,8)"


def run_with(*techniques, cards=None, **changes):
    """A run with these technique objects seated by hand."""
    chosen = settings(**{"model": MODEL, "batch": 8, "epochs": 2, "lr": 0.05, "precision": "fp32", "augment": "none", "checkpoint_seconds": 0, **changes})
    run = prepare(chosen, tiny_images())
    seats = [Seat((cards or {}).get(type(t).__name__) or Card(part=type(t).__name__.lower(), kind="technique", title="for a test"), {}, t) for t in techniques]
    run.team = Team(seats, gives=("images", "labels", "logits"))
    return run


class Diary(Technique):
    def __init__(self):
        self.lines = []

    def on_start(self, run):
        self.lines.append("on_start")

    def on_stage(self, run):
        self.lines.append("on_stage")

    def on_batch(self, run):
        self.lines.append("on_batch")

    def around_grad(self, run, grad):
        self.lines.append("around_grad(")
        grad()
        self.lines.append(")")

    def on_loss(self, run):
        self.lines.append("on_loss")

    def on_grad(self, run):
        self.lines.append("on_grad")

    def on_step(self, run):
        self.lines.append("on_step")

    def on_epoch(self, run):
        self.lines.append("on_epoch")

    def on_end(self, run):
        self.lines.append("on_end")


def test_hooks_run_in_the_order_of_the_docstring():
    diary = Diary()
    fit(run_with(diary, epochs=1, steps=2))
    step = ["on_batch", "around_grad(", "on_loss", ")", "on_grad", "on_step"]
    assert diary.lines == ["on_start", "on_stage", *step, *step, "on_epoch", "on_end"]


class LooksAside(Technique):
    def on_batch(self, run):
        with run.aside():
            run.forward(run.batch.x)
            torch.rand(3)
        assert run.model.training

    def around_grad(self, run, grad):
        grad()
        with run.still():
            run.forward(run.batch.x).logits.sum()
            torch.rand(3)


@pytest.mark.parametrize("model", [MODEL, "small-cnn:widths=(4,8)"])
def test_further_passes_through_aside_and_still_move_no_bit(model):
    plain, looking = run_with(model=model), run_with(LooksAside(), model=model)
    fit(plain)
    fit(looking)
    assert not equal(bits(plain.model), bits(looking.model))


def test_a_further_pass_without_still_does_move_the_buffers():
    class Careless(Technique):
        def on_batch(self, run):
            run.forward(run.batch.x)

    plain, careless = run_with(), run_with(Careless())
    fit(plain)
    fit(careless)
    assert "num_batches_tracked" in equal(bits(plain.model), bits(careless.model)) or "running" in equal(bits(plain.model), bits(careless.model))


class Taps(Technique):
    def on_start(self, run):
        self.layer = run.tap("layer1")
        self.shapes = []

    def on_loss(self, run):
        kept = self.layer()
        with run.aside():
            run.forward(run.batch.x[:2])
        assert self.layer() is kept, "a pass aside overwrote the tap"
        assert kept.requires_grad
        self.shapes.append(tuple(kept.shape))


def test_tap_gives_the_features_of_the_pass():
    taps = Taps()
    fit(run_with(taps, epochs=1))
    assert taps.shapes == [(8, 4, 8, 8)] * 4


class OwnsA(Technique):
    def objective(self, run, out, batch):
        return out.logits.square().mean()


class OwnsB(Technique):
    def objective(self, run, out, batch):
        return out.logits.abs().mean()


class Mutes(Technique):
    pass


def test_two_owners_of_a_slot_are_refused_by_name():
    with pytest.raises(Mistake, match=r"'ownsa' and 'ownsb' both own the objective"):
        run_with(OwnsA(), OwnsB())


def test_a_muted_slot_is_refused_by_name():
    cards = {"Mutes": Card(part="mutes", kind="technique", title="t", mutes=("objective",))}
    with pytest.raises(Mistake, match=r"'mutes' mutes its objective, so 'ownsa' would do nothing"):
        run_with(OwnsA(), Mutes(), cards=cards)


def test_what_the_data_lacks_is_refused():
    with pytest.raises(Mistake, match="expects annotators"):
        run_with(Mutes(), cards={"Mutes": Card(part="mutes", kind="technique", title="t", expects=("annotators",))})


def test_twice_the_same_part_is_refused():
    with pytest.raises(Mistake, match="switched on twice"):
        run_with(OwnsA(), OwnsA())


class Pretrains(Technique):
    """A stage before, for itself alone, with an extra head."""

    def on_start(self, run):
        run.extra["pre"] = nn.Linear(8, 2)

    def before(self, run):
        return [Stage("pre", 1, guests=False, objective=self.guess)]

    def guess(self, run, out, batch):
        return run.extra["pre"](out.features.mean((2, 3))).square().mean()


def test_a_stage_before_keeps_guests_quiet_and_does_not_ship_its_head():
    diary, pre = Diary(), Pretrains()
    run = run_with(pre, diary, epochs=1)
    fit(run)
    assert diary.lines.count("on_step") == 4, "guests ran in a stage that is not theirs"
    assert not any("pre" in name for name in run.answer.state_dict())
    plain = run_with(epochs=1)
    fit(plain)
    assert equal(bits(plain.model), bits(run.model)), "the stage before changed nothing"


class Stops(Technique):
    def on_epoch(self, run):
        if run.epoch == 1:
            run.stop()


def test_stop_ends_after_the_epoch():
    run = run_with(Stops(), epochs=5)
    fit(run)
    assert run.steps_done == 8


class Grows(Technique):
    def on_stage(self, run):
        run.edit("grows", width=3)

    @staticmethod
    def rebuild(model, width):
        model.grown = nn.Linear(width, width)


def test_edits_are_stored_as_json(monkeypatch):
    import convince.fit.run

    monkeypatch.setattr(convince.fit.run, "rebuilder", lambda part: Grows.rebuild)
    run = run_with(Grows(), epochs=1)
    fit(run)
    assert json.loads(json.dumps(run.edits)) == [{"part": "grows", "spec": {"width": 3}}]
    assert run.model.grown.weight.shape == (3, 3)


def test_an_edit_that_renames_is_refused(monkeypatch):
    import convince.fit.run

    def rename(model):
        model.layer1[0].bn2 = nn.Sequential(model.layer1[0].bn2, nn.Identity())

    monkeypatch.setattr(convince.fit.run, "rebuilder", lambda part: rename)
    run = run_with()
    run.model = run.build()
    with pytest.raises(Mistake, match=r"renamed or removed 'layer1.0.bn2.bias'"):
        run.edit("sloppy")


def test_two_edits_of_one_module_are_refused(monkeypatch):
    import convince.fit.run

    monkeypatch.setattr(convince.fit.run, "rebuilder", lambda part: lambda model: model.layer1[0].bn2.add_module(part, nn.Identity()))
    run = run_with()
    run.model = run.build()
    run.edit("one")
    with pytest.raises(Mistake, match=r"'one' and 'two' both edit the module 'layer1.0.bn2'"):
        run.edit("two")


class Prunes(Technique):
    """Cuts half the channels inside the first block after the first epoch."""

    def on_epoch(self, run):
        if run.epoch == 0:
            keep = [0, 2]
            names = ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
            cut = {f"layer1.0.{name}": (0, keep) for name in names} | {"layer1.0.conv2.weight": (1, keep)}
            run.resize("prunes", cut)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_resize_while_training_moves_the_new_weights_and_resumes(optimizer, tmp_path):
    class Opt(Technique):
        def optimizer(self, run, params):
            extra = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
            return optimizer([p for _, p in params], lr=0.01, **extra)

    whole = run_with(Prunes(), Opt())
    fit(whole)
    assert whole.model.layer1[0].conv1.weight.shape == (2, 4, 3, 3)
    start = run_with(Prunes(), Opt(), epochs=1)
    fit(start)
    assert not torch.equal(start.model.layer1[0].conv1.weight, whole.model.layer1[0].conv1.weight), "the cut weights no longer move"

    path, steps = tmp_path / "c.safetensors", []

    def kill(done, total, text):
        steps.append(done)
        if len(steps) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(run_with(Prunes(), Opt()), path, kill)
    again = run_with(Prunes(), Opt())
    fit(again, path)
    assert not equal(bits(whole.model), bits(again.model))


def test_the_schedule_by_hand():
    assert factor("constant", 0.0, 0.7) == 1.0
    assert factor("cosine", 0.0, 0.5) == pytest.approx(0.5)
    assert factor("cosine", 0.0, 1.0) == pytest.approx(0.0, abs=1e-12)
    assert factor("cosine", 0.2, 0.6) == pytest.approx(0.5)
    assert 0 < factor("cosine", 0.2, 0.0) < factor("cosine", 0.2, 0.1) < 1


def test_a_loss_that_explodes_is_named():
    class Explodes(Technique):
        def on_loss(self, run):
            run.loss = run.loss * float("nan")

    with pytest.raises(Mistake, match="the loss is nan after epoch 1"):
        fit(run_with(Explodes()))


def test_unlabelled_rows_rest_in_plain_training():
    data = tiny_images()
    y = data.y.clone()
    y[data.split.train[:16]] = -1
    run = prepare(settings(model=MODEL, batch=8, epochs=1, augment="none", precision="fp32"), dataclasses.replace(data, y=y))
    fit(run)
    assert run.steps_done == 2


def test_images_are_counted():
    run = run_with(LooksAside(), epochs=1)
    fit(run)
    assert run.images == 64, "32 images of training and 32 of the further pass, none of those aside"


def test_metrics_of_an_epoch_are_written(tmp_path):
    from convince.fit.record import Record

    run = run_with(epochs=2)
    run.record = Record(tmp_path)
    fit(run)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[1]["steps"] == 8
    assert 0 <= rows[1]["val_accuracy"] <= 1
    assert rows[1]["loss"] < 3


def test_pythons_random_state_is_put_back():
    """In a process of its own: the checker of shapes in these tests draws from Python's random state itself."""
    import subprocess
    import sys

    code = """
import random
from convince.checks.subject import tiny_images
from convince.fit.settings import settings
from convince.fit.train import train
random.seed(1); before = random.getstate()
train(settings(model="small-cnn:widths=(4,8)", batch=8, epochs=1), tiny_images())
assert random.getstate() == before, "Python's random state moved"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
