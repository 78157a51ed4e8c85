"""Triplet and Siamese networks: worked losses, who is drawn, neighbours against scikit-learn, interruption, refusals."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones.triplet_net import TripletNet
from convince.data import load
from convince.errors import Mistake
from convince.fit.adapters import Objective, seat
from convince.fit.answer import logits_of
from convince.fit.folder import open_run, weights_sha256
from convince.fit.loop import fit
from convince.fit.settings import settings as make_settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, train
from convince.kinds import Attack
from convince.parts import Card
from convince.retrieval.siamese_network import pairs
from convince.retrieval.triplet_network import (
    contrastive_loss,
    distance,
    neighbour_shares,
    triplet_margin_loss,
    triplet_softmax_loss,
    triplets,
)
from convince.types import Split


@pytest.fixture(scope="module")
def digits():
    data = load("digits", seed=0)
    return dataclasses.replace(data, split=Split(data.split.train[:64], data.split.val[:32], data.split.test[:32]))


def wanted(**changes):
    base = {"model": "resnet:layers=(1,1),widths=(4,8)", "parts": ("triplet-network:per_epoch=32",), "augment": "none", "epochs": 2, "batch": 8}
    return make_settings(**{**base, **changes})


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# -- losses ----------------------------------------------------------------------------------------


def on_a_line(*places):
    return [torch.tensor([[float(place)]], dtype=torch.float64) for place in places]


def test_worked_losses():
    assert float(triplet_softmax_loss(*on_a_line(0, 1, 2))) == pytest.approx(0.0723295, abs=1e-7)  # d+ = 1, d- = 2
    assert math.sqrt(float(triplet_softmax_loss(*on_a_line(0, 1, 2)))) == pytest.approx(0.268941, abs=1e-6)
    assert float(triplet_softmax_loss(*on_a_line(0, 3, -3))) == pytest.approx(0.25, abs=1e-9)
    assert float(triplet_margin_loss(*on_a_line(0, 1, 2), margin=1.5)) == pytest.approx(0.5, abs=1e-9)
    assert float(triplet_margin_loss(*on_a_line(0, 1, 2), margin=0.5)) == 0
    d = torch.tensor([0.5, 0.25, 2.0])
    assert contrastive_loss(d, torch.tensor([1.0, 0.0, 0.0])).tolist() == pytest.approx([0.25, 0.5625, 0.0])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.floats(-5, 5))
def test_the_loss_depends_on_differences_only_and_lies_in_0_1(seed, shift):
    a, p, n = torch.randn(3, 5, 4, generator=gen(seed), dtype=torch.float64)
    loss = triplet_softmax_loss(a, p, n)
    assert torch.allclose(triplet_softmax_loss(a + shift, p + shift, n + shift), loss, atol=1e-9)
    assert bool(((loss > 0) & (loss < 1)).all())
    soft = torch.stack([distance(a, p), distance(a, n)], 1).softmax(1)
    both = (soft - torch.tensor([0.0, 1.0]).double()).square().mean(1)  # the paper's form: both entries against (0, 1)
    assert torch.allclose(loss, both, atol=1e-12)


def test_the_gradient_is_exact_and_finite_where_anchor_and_positive_meet():
    a, p, n = (t.requires_grad_() for t in torch.randn(3, 4, 3, generator=gen(), dtype=torch.float64))
    assert torch.autograd.gradcheck(triplet_softmax_loss, (a, p, n))
    same = torch.ones(2, 3, requires_grad=True)
    triplet_softmax_loss(same, same * 1, torch.zeros(2, 3)).sum().backward()
    assert bool(torch.isfinite(same.grad).all())


# -- who is drawn ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 4), min_size=3, max_size=40), st.integers(0, 1000))
def test_triples_and_pairs_obey_the_classes(labels, seed):
    y = torch.tensor(labels)
    counts = torch.bincount(y)
    if int((counts > 0).sum()) < 2 or int(counts.max()) < 2:
        with pytest.raises(Mistake, match="two classes"):
            triplets(y, 5, gen(seed))
        return
    a, p, n = triplets(y, 50, gen(seed)).unbind(1)
    assert bool((a != p).all())
    assert torch.equal(y[a], y[p])
    assert bool((y[a] != y[n]).all())
    first, second = pairs(y, 51, gen(seed)).unbind(1)
    assert bool((first != second).all())
    assert torch.equal(y[first] == y[second], torch.arange(51) % 2 == 0)


def test_every_allowed_partner_is_equally_likely():
    y = torch.tensor([0, 1, 0, 1, 0, 2])
    drawn = triplets(y, 24_000, gen())
    a, p, n = drawn.unbind(1)
    assert torch.bincount(a, minlength=6)[5] == 0  # alone in its class: never an anchor
    of_0 = p[a == 0]
    assert {int(i) for i in of_0.unique()} == {2, 4}
    assert float((of_0 == 2).double().mean()) == pytest.approx(0.5, abs=0.03)
    others = torch.bincount(n[y[a] == 1], minlength=6).double()
    assert (others / others.sum()).tolist() == pytest.approx([0.25, 0, 0.25, 0, 0.25, 0.25], abs=0.03)
    assert torch.equal(drawn, triplets(y, 24_000, gen()))


# -- the net and the answer ------------------------------------------------------------------------


def test_the_net_has_the_papers_size():
    net = TripletNet(num_classes=0, in_chans=3)
    assert sum(p.numel() for p in net.parameters()) == 505_088
    sides, x, macs = [32], torch.zeros(1, 3, 32, 32), 0
    for layer in net.features:
        before, x = x, layer(x)
        if isinstance(layer, nn.Conv2d):
            macs += layer.weight.numel() * x.shape[-1] ** 2
        if x.shape != before.shape:
            sides.append(x.shape[-1])
    assert sides == [32, 28, 14, 12, 6, 4, 2, 1]
    assert macs == 19_234_816 or round(macs / 1e6, 2) == 19.23
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    assert net.features[0].padding == (0, 0)
    grey = TripletNet(in_chans=1, img_size=(28, 28), last_relu=False)
    assert grey.features[0].padding == (2, 2)
    assert grey(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert TripletNet(in_chans=1, img_size=(40, 48), num_classes=0)(torch.zeros(2, 1, 40, 48)).shape == (2, 128)
    with pytest.raises(Mistake, match="four numbers"):
        TripletNet(widths=(4, 8))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 500), st.integers(1, 7))
def test_neighbours_agree_with_scikit_learn(seed, neighbours):
    from sklearn.neighbors import KNeighborsClassifier

    g = gen(seed)
    x, references = torch.randn(8, 3, generator=g, dtype=torch.float64), torch.randn(20, 3, generator=g, dtype=torch.float64)
    labels = torch.cat([torch.arange(4), torch.randint(4, (16,), generator=g)])
    shares = neighbour_shares(x, references, labels, neighbours, 4)
    oracle = KNeighborsClassifier(neighbours).fit(references.numpy(), labels.numpy())
    assert torch.allclose(shares.sum(1), torch.ones(8).double())
    votes = shares * (neighbours + 1) - 1 / 4
    assert torch.allclose(votes / neighbours, torch.from_numpy(oracle.predict_proba(x.numpy())), atol=1e-9)
    assert shares.argmax(1).tolist() == oracle.predict(x.numpy()).tolist()


def test_fewer_references_than_neighbours():
    shares = neighbour_shares(torch.zeros(1, 2), torch.ones(2, 2), torch.tensor([0, 2]), 5, 3)
    assert shares.tolist()[0] == pytest.approx([4 / 9, 1 / 9, 4 / 9])


# -- training --------------------------------------------------------------------------------------


class Watch(Technique):
    """Looks at each batch, and at the answer in the middle of training."""

    def __init__(self, ask=False):
        self.seen, self.ask, self.answers = [], ask, []

    def on_batch(self, run):
        self.seen.append((run.batch.group, run.data.y[run.batch.index].view(-1, run.batch.group), len(run.batch.x)))

    def on_step(self, run):
        if self.ask:
            self.answers.append(run.evaluate("val").accuracy)


def watched(run, ask=False):
    watch = Watch(ask)
    run.team = Team([*run.team.seats, Seat(Card(part="watch", kind="technique", title="watch"), {}, watch)])
    return watch


def test_batches_hold_whole_triples(digits):
    run = prepare(wanted(), digits)
    watch = watched(run)
    fit(run)
    assert len(watch.seen) == 2 * 4  # 32 triples in batches of 8, two epochs
    for group, y, rows in watch.seen:
        assert group == 3
        assert rows == 24
        assert torch.equal(y[:, 0], y[:, 1])
        assert bool((y[:, 0] != y[:, 2]).all())
    assert not torch.equal(watch.seen[0][1], watch.seen[4][1])  # drawn anew each epoch


def test_the_objective_is_the_loss_of_the_embeddings(digits):
    run = prepare(wanted(precision="fp64", epochs=1, batch=32), digits)
    watched(run)
    fit(run)
    e = run.model.forward_head(run.out.features, pre_logits=True).detach()
    assert float(run.loss.detach()) == pytest.approx(float(triplet_softmax_loss(e[0::3], e[1::3], e[2::3]).mean()), abs=1e-12)
    assert run.loss.dtype == torch.float64


def test_asking_for_the_answer_in_training_changes_nothing(digits):
    asked, alone = prepare(wanted(), digits), prepare(wanted(), digits)
    watch = watched(asked, ask=True)
    fit(asked)
    fit(alone)
    assert len(watch.answers) == 8
    assert weights_sha256(asked.answer) == weights_sha256(alone.answer)


def test_it_learns_a_better_embedding_than_none(digits):
    whole = load("digits", seed=0)
    wish = wanted(model="small-cnn:widths=(8,16)", parts=("triplet-network",), epochs=0, batch=32, lr=0.05)
    untrained = train(wish, whole).test.accuracy
    trained = train(wish.updated(epochs=3), whole).test.accuracy
    assert trained > untrained
    assert trained > 0.8


def test_the_head_is_idle(digits):
    run = prepare(wanted(), digits)
    fit(run)
    without = {n for n, p in run.model.named_parameters() if p.grad is None}
    assert without == {"fc.weight", "fc.bias"}


class Killed(Exception):
    pass


def killed_after(steps):
    count = iter(range(1, 1000))

    def progress(done, total, text):
        if next(count) == steps:
            raise Killed

    return progress


@pytest.mark.parametrize("part", ["triplet-network:per_epoch=32", "siamese-network:per_epoch=32"])
@pytest.mark.parametrize("steps", [2, 4])
def test_resumes_with_equal_bits(digits, tmp_path, part, steps):
    wish = wanted(parts=(part,), checkpoint_seconds=0, model="triplet-net:widths=(4,4,4,4)")
    whole = prepare(wish, digits)
    fit(whole)
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        fit(prepare(wish, digits), path, killed_after(steps))
    again = prepare(wish, digits)
    fit(again, path)
    assert weights_sha256(again.answer) == weights_sha256(whole.answer)
    assert again.record.rows == whole.record.rows[-len(again.record.rows) :]  # without a folder, what came before is not kept


@pytest.mark.parametrize("part", ["triplet-network:per_epoch=32,neighbours=3", "siamese-network:per_epoch=32"])
def test_reloads_to_equal_logits(digits, tmp_path, part):
    result = train(wanted(parts=(part,)), digits, folder=tmp_path)
    x = digits.x.take(digits.split.test)
    loaded = open_run(tmp_path)
    assert torch.equal(loaded.logits(x), logits_of(result.answer, x, result.run.plan))
    assert loaded.answer.references.shape == (64, 8)
    assert weights_sha256(loaded.answer) == result.weights_sha256


def test_the_answer_says_that_it_has_no_gradient(digits):
    class Nudge(Attack):
        def perturb(self, answer, x, y, *, eps, norm):
            return x

    answer = train(wanted(epochs=1), digits).answer
    with pytest.raises(Mistake, match=r"needs gradients, and the answer of this run \(Neighbours\) has none"):
        Nudge()(answer, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    scores = answer(torch.rand(2, 1, 8, 8))
    assert torch.allclose(scores.exp().sum(1), torch.ones(2), atol=1e-5)


# -- refusals --------------------------------------------------------------------------------------


def stranger(name, kind="technique", technique=None, **card):
    return Seat(Card(part=name, kind=kind, title=name, **card), {}, technique or Technique())


@pytest.mark.parametrize("name", ["triplet-network", "siamese-network"])
def test_refuses_in_words_what_it_would_silence(name):
    mine = seat(name)
    with pytest.raises(Mistake, match="both own the objective"):
        Team([mine, stranger("poly1", "loss", Objective(nn.CrossEntropyLoss()))])
    with pytest.raises(Mistake, match=f"'{name}' mutes the labels it expects, so 'cutmix' would do nothing"):
        Team([mine, stranger("cutmix", expects=("images", "labels"))])
    with pytest.raises(Mistake, match="would do nothing beside it"):
        Team([mine, stranger("distiller", expects=("logits",))])
    Team([mine, seat("flip-crop")])
    assert set(mine.claims) == set(mine.card.claims)


def test_triplet_and_siamese_and_boosting_are_one_at_a_time():
    with pytest.raises(Mistake, match="both own the"):
        Team([seat("triplet-network"), seat("siamese-network")])
    with pytest.raises(Mistake, match="both own the"):
        Team([seat("triplet-network"), seat("gb-cnn")])


@pytest.mark.parametrize("option", ["per_epoch=0", "neighbours=0"])
def test_wrong_values_are_named(option):
    with pytest.raises(Mistake, match=option):
        seat(f"triplet-network:{option}")
