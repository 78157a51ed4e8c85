"""GB-CNN and GB-DNN: the worked Newton step, sizes from the release, rounds, interruption, reloading, refusals."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.backbones.gb_trunk import GbTrunk
from convince.data import load
from convince.ensemble.gb_cnn import GbCnn, GrownHead, newton_step, residual, share
from convince.errors import Mistake
from convince.fit.adapters import Objective, seat
from convince.fit.answer import logits_of
from convince.fit.folder import open_run, weights_sha256
from convince.fit.loop import fit, start
from convince.fit.settings import settings as make_settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, train
from convince.parts import Card
from convince.types import Split, Stage


def few(data, train=64, other=32):
    split = Split(data.split.train[:train], data.split.val[:other], data.split.test[:other])
    return dataclasses.replace(data, split=split)


@pytest.fixture(scope="module")
def digits():
    return few(load("digits", seed=0))


@pytest.fixture(scope="module")
def table():
    from sklearn.datasets import load_wine

    return load(*load_wine(return_X_y=True), seed=0)


TRUNK = "gb-trunk:widths=(4,4,8)"


def wanted(**changes):
    return make_settings(**{"model": TRUNK, "parts": ("gb-cnn:rounds=2,units=4",), "augment": "none", "epochs": 4, "batch": 16, **changes})


# -- numbers ---------------------------------------------------------------------------------------


def test_worked_example():
    y, scores = torch.eye(2).double(), torch.zeros(2, 2).double()
    f = torch.tensor([[1.0, -1.0], [-0.5, 0.5]]).double()
    r = residual(y, scores)
    assert r.tolist() == [[0.5, -0.5], [-0.5, 0.5]]
    assert float((f * r).sum()) == 1.5
    assert float((f.square() * 0.25).sum()) == 0.625
    assert newton_step(f, y, scores, eta=0.1) == pytest.approx(0.24, abs=1e-15)
    assert newton_step(torch.zeros(2, 2), y, scores, eta=0.1) == 0.0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_the_residual_is_minus_the_gradient_of_the_cross_entropy(seed, k):
    gen = torch.Generator().manual_seed(seed)
    scores = torch.randn(6, k, generator=gen, dtype=torch.float64, requires_grad=True)
    y = F.one_hot(torch.randint(k, (6,), generator=gen), k).double()
    (gradient,) = torch.autograd.grad(F.cross_entropy(scores, y, reduction="sum"), scores)
    assert torch.allclose(residual(y, scores), -gradient, atol=1e-14)
    assert torch.allclose(residual(y, scores).sum(1), torch.zeros(6).double(), atol=1e-14)
    f = torch.randn(6, k, generator=gen, dtype=torch.float64)
    slope = -float((f * gradient).sum())
    assert newton_step(f, y, scores.detach(), 0.1) * slope > 0  # the step goes down the cross-entropy
    assert newton_step(f, y, scores.detach(), 0.2) == pytest.approx(2 * newton_step(f, y, scores.detach(), 0.1))
    assert newton_step(3 * f, y, scores.detach(), 0.1) == pytest.approx(newton_step(f, y, scores.detach(), 0.1) / 3)


def test_the_trunk_has_the_papers_size():
    trunk = GbTrunk(num_classes=10, in_chans=1, img_size=(28, 28))
    weights = sum(p.numel() for n, p in trunk.named_parameters() if not n.startswith("fc"))
    statistics = sum(b.numel() for n, b in trunk.named_buffers() if "running" in n)
    assert weights + statistics == 288_224
    assert trunk.num_features == 1_152
    x = torch.rand(2, 1, 28, 28)
    assert trunk.forward_features(x).shape == (2, 128, 3, 3)
    assert trunk.forward_head(trunk.forward_features(x), pre_logits=True).shape == (2, 1_152)
    assert [m.p for m in trunk.modules() if isinstance(m, nn.Dropout)] == pytest.approx([0.2, 0.3, 0.4])
    trunk.reset_classifier(3)
    assert trunk(x).shape == (2, 3)
    with pytest.raises(Mistake, match="too few"):
        GbTrunk(img_size=(4, 4))


def test_the_first_net_has_the_papers_head():
    trunk = GbTrunk(num_classes=10, in_chans=1)
    GbCnn.rebuild(trunk, units=20)
    norm, dense, output = 2 * 1152, 1152 * 20 + 20, 20 * 10 + 10
    assert sum(p.numel() for p in trunk.fc.parameters()) == norm + dense + output
    GbCnn.rebuild(trunk, units=20)
    assert sum(p.numel() for p in trunk.fc.parameters()) == norm + dense + output + 20 * 20 + 20


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 50), st.integers(1, 9))
def test_shares_add_up(whole, rounds):
    shares = [share(whole, i, rounds) for i in range(rounds)]
    if whole >= rounds:
        assert sum(shares) == whole
        assert max(shares) - min(shares) <= 1
    assert min(shares) == (whole > 0) if whole < rounds else min(shares) >= 1


# -- rounds ----------------------------------------------------------------------------------------


class Spy(Technique):
    """Keeps copies of the weights as each round begins, and after each step."""

    rank = 90

    def __init__(self):
        self.begun, self.stepped = [], []

    def on_stage(self, run):
        self.begun.append({n: t.clone() for n, t in run.model.state_dict().items()})

    def on_step(self, run):
        self.stepped.append((run.stage_number, {n: t.clone() for n, t in run.model.state_dict().items()}))


def spied(run):
    spy = Spy()
    run.team = Team([*run.team.seats, Seat(Card(part="spy", kind="technique", title="spy"), {}, spy)], gives=("images", "labels", "logits", "table"))
    return spy


def test_rounds_copy_grow_and_freeze(digits):
    run = prepare(wanted(parts=("gb-cnn:rounds=3,units=4",), epochs=3, precision="fp32"), digits)
    spy = spied(run)
    fit(run)
    ends = [[w for stage, w in spy.stepped if stage == i][-1] for i in range(3)]
    for t in (1, 2):
        for name, weight in ends[t - 1].items():
            assert torch.equal(spy.begun[t][name], weight), name  # an exact copy of the net before
        assert f"fc.dense.{t}.weight" in spy.begun[t]
        assert f"fc.dense.{t}.weight" not in spy.begun[t - 1]
        for name, weight in spy.begun[t].items():
            if name.startswith("fc.dense"):
                assert torch.equal(ends[t][name], weight) == (not name.startswith(f"fc.dense.{t}")), name
        for name in ("features.0.weight", "fc.before.weight", "fc.weight"):
            assert not torch.equal(ends[t][name], spy.begun[t][name])
    assert [edit["spec"] for edit in run.edits] == [{"units": 4}] * 3


def test_the_answer_is_the_sum_that_was_kept(digits):
    result = train(wanted(parts=("gb-cnn:rounds=3,units=4",), precision="fp64", epochs=9, lr=0.01), digits)
    answer, run = result.answer, result.run
    rho = [row["value"] for row in run.record.rows if row.get("name") == "rho"]
    losses = [row["value"] for row in run.record.rows if row.get("name") == "boosted_train_log_loss"]
    assert answer.rho.tolist() == rho
    x = run.plan.pixels(digits.x.take(digits.split.train))
    with torch.no_grad():
        by_hand = sum(r * net(run.normalise(x)) for r, net in zip(rho, answer.nets, strict=True))
    assert torch.allclose(answer(x).detach(), by_hand, atol=1e-12)
    assert run.evaluate("train").log_loss == pytest.approx(losses[-1], abs=1e-9)
    assert losses[0] < torch.tensor(10.0).log()
    assert losses == sorted(losses, reverse=True)  # each round brings the training cross-entropy down
    y = digits.y[digits.split.train]
    stages = [float(F.cross_entropy(scores, y)) for scores in answer.staged(x).detach()]
    assert stages == pytest.approx(losses, abs=1e-9)


def test_early_stopping_waits_for_patience_epochs(digits):
    run = prepare(wanted(parts=("gb-cnn:patience=2",)), digits)
    boosting = run.team.owner("stage")
    run.stage = Stage("round 1", 9, owner=boosting)
    stopped = []
    for mean in (1.0, 0.5, 0.6, 0.4, 0.4, 0.41):
        boosting.sofar.error = torch.tensor([mean * 64, 64.0])
        boosting.on_epoch(run)
        stopped.append(run.stopped)
    assert stopped == [False] * 5 + [True]


def test_epochs_and_steps_are_shared_by_the_rounds(digits):
    run = prepare(wanted(epochs=5), digits)
    start(run)
    boosting = run.team.owner("stage")
    assert [boosting.stage(run, i).epochs for i in (0, 1)] == [2, 3]
    assert boosting.stage(run, 2) is None
    assert boosting.stage(run, 0).schedule == "constant"
    run = prepare(wanted(parts=("gb-cnn:inner_epochs=7",), steps=9), digits)
    start(run)
    boosting = run.team.owner("stage")
    assert [(s.epochs, s.steps) for s in (boosting.stage(run, 0), boosting.stage(run, 1))] == [(7, 4), (7, 5)]
    assert type(boosting.optimizer(run, list(run.model.named_parameters()))) is torch.optim.Adam
    assert boosting.optimizer(run, list(run.model.named_parameters())).defaults["lr"] == 1e-3


# -- interruption and reloading --------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_after(steps):
    count = iter(range(1, 10_000))

    def progress(done, total, text):
        if next(count) == steps:
            raise Killed

    return progress


def interrupted(wish, data, tmp_path, steps):
    """The run that was killed after so many steps and taken up by a new process' objects."""
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        fit(prepare(wish, data), path, killed_after(steps))
    run = prepare(wish, data)
    fit(run, path)
    return run


UNBROKEN = wanted(parts=("gb-cnn:rounds=3,units=4",), epochs=3, checkpoint_seconds=0)


@pytest.fixture(scope="module")
def whole(digits):
    run = prepare(UNBROKEN, digits)
    fit(run)
    return run


@pytest.mark.parametrize("steps", [2, 4, 6, 9])  # inside and at the end of rounds of 4 steps
def test_resumes_with_equal_bits(digits, whole, tmp_path, steps):
    again = interrupted(UNBROKEN, digits, tmp_path, steps)
    assert weights_sha256(again.answer) == weights_sha256(whole.answer)
    assert len(again.answer.nets) == 3
    assert again.record.rows
    assert again.record.rows == whole.record.rows[-len(again.record.rows) :]  # without a folder, what came before is not kept


@pytest.mark.parametrize("model", [TRUNK, "resnet:layers=(1,1),widths=(4,8)"])
def test_reloads_to_equal_logits(digits, tmp_path, model):
    result = train(wanted(model=model), digits, folder=tmp_path)
    x = digits.x.take(digits.split.test)
    logits = logits_of(result.answer, x, result.run.plan)
    loaded = open_run(tmp_path)
    assert torch.equal(loaded.logits(x), logits)
    assert weights_sha256(loaded.answer) == result.weights_sha256
    assert not torch.equal(logits_of(loaded.answer.nets[0], x, loaded.plan), logits)  # the parts file holds other nets


def test_augmentation_composes_and_moves_the_bits(digits):
    alone = train(wanted(), digits).weights_sha256
    assert train(wanted(parts=("gb-cnn:rounds=2,units=4", "flip-crop")), digits).weights_sha256 != alone
    assert train(wanted(), digits).weights_sha256 == alone


# -- tables ----------------------------------------------------------------------------------------


def test_gb_dnn_carries_only_the_dense_layers(table, tmp_path):
    wish = wanted(model="mlp:hidden=(5,)", parts=("gb-dnn:rounds=3,units=4",), epochs=6)
    run = prepare(wish, table)
    spy = spied(run)
    fit(run)
    whole = [key for key, _ in run.model.named_children()]
    assert whole == ["hidden", "fc"]
    assert [type(m).__name__ for m in run.model.fc.after] == ["BatchNorm1d", "Dropout"]
    ends = [[w for stage, w in spy.stepped if stage == i][-1] for i in range(3)]
    for t in (1, 2):
        for name in ("hidden.0.weight", "fc.weight", "fc.after.0.weight", "fc.after.0.running_mean"):
            assert not torch.equal(spy.begun[t][name], ends[t - 1][name]), name
        assert not torch.equal(spy.begun[t]["hidden.0.weight"], spy.begun[t - 1]["hidden.0.weight"])
        for j in range(t):
            assert torch.equal(ends[t][f"fc.dense.{j}.weight"], ends[t - 1][f"fc.dense.{j}.weight"])
    again = interrupted(wish.updated(checkpoint_seconds=0.0), table, tmp_path, steps=20)
    assert weights_sha256(again.answer) == weights_sha256(run.answer)


def test_gb_dnn_reloads_to_equal_logits(table, tmp_path):
    result = train(wanted(model="mlp:hidden=(5,)", parts=("gb-dnn:rounds=2,units=4",)), table, folder=tmp_path)
    x = table.x.take(table.split.test)
    assert torch.equal(open_run(tmp_path).logits(x), logits_of(result.answer, x, result.run.plan))


def test_gb_dnn_is_for_tables(digits):
    with pytest.raises(Mistake, match="'gb-dnn' expects table"):
        prepare(wanted(parts=("gb-dnn",)), digits)


# -- refusals --------------------------------------------------------------------------------------


def stranger(name, kind="technique", technique=None, **card):
    return Seat(Card(part=name, kind=kind, title=name, **card), {}, technique or Technique())


def test_refuses_in_words_what_it_would_silence():
    boosting = seat("gb-cnn")
    with pytest.raises(Mistake, match="'gb-cnn' and 'poly1' both own the objective"):
        Team([boosting, stranger("poly1", "loss", Objective(nn.CrossEntropyLoss()))])
    with pytest.raises(Mistake, match="'gb-cnn' mutes the labels it expects, so 'cutmix' would do nothing"):
        Team([boosting, stranger("cutmix", expects=("images", "labels"))])
    with pytest.raises(Mistake, match="'gb-cnn' mutes the logits it expects, so 'distiller' would do nothing"):
        Team([boosting, stranger("distiller", expects=("logits",))])
    with pytest.raises(Mistake, match=r"'gb-cnn' and 'gb-dnn' both own the"):
        Team([boosting, seat("gb-dnn")], gives=("images", "labels", "logits", "table"))
    Team([boosting, seat("flip-crop")])


def test_the_cards_say_what_the_parts_own():
    for name in ("gb-cnn", "gb-dnn"):
        made = seat(name)
        assert set(made.claims) == set(made.card.claims)
        assert parts.get(name).card.paper == "gb-cnn"


@pytest.mark.parametrize("option", ["rounds=0", "units=0", "eta=0", "patience=0", "inner_epochs=0"])
def test_wrong_values_are_named(option):
    with pytest.raises(Mistake, match=option.replace("=", "=")):
        seat(f"gb-cnn:{option}")


def test_a_network_without_a_linear_head_is_refused(digits):
    run = prepare(wanted(), digits)

    def headless():
        trunk = GbTrunk(num_classes=10, img_size=(8, 8), widths=(4,))
        trunk.reset_classifier(0)
        return trunk

    run.build = headless
    with pytest.raises(Mistake, match="linear head"):
        fit(run)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 6))
def test_the_grown_head_keeps_the_names_of_the_head(rounds, units):
    head = GrownHead(7, units, 3, nn.Identity(), nn.Identity())
    for _ in range(rounds):
        head.grow()
    assert {"weight", "bias"} <= dict(head.named_parameters()).keys()
    assert [layer.in_features for layer in head.dense] == [7] + [units] * (rounds - 1)
    assert head(torch.zeros(2, 7)).shape == (2, 3)
