"""Example forgetting by hand: the worked streams, ties, noise, agreement, and a run that is left alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from convince.checks.subject import bits, equal, tiny_images
from convince.data_quality.example_forgetting import (
    ForgettingTracker,
    misclassification_margin,
    noisy_label_check,
    prune_by_forgetting,
    random_prune,
    transfer,
)
from convince.errors import Mistake
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.parts import Card


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def tracked(*streams):
    """A tracker fed with equal-length streams of right (1) and wrong (0), one a sample."""
    tracker = ForgettingTracker(len(streams))
    for column in zip(*streams, strict=True):
        tracker.update(torch.arange(len(streams)), torch.tensor(column, dtype=torch.bool))
    return tracker


def test_worked_streams():
    t = tracked([0, 1, 1, 0, 1, 0, 0, 1], [0] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [1] * 8)
    assert t.forgotten.tolist() == [2, 0, 0, 0]
    assert t.learned_at.tolist() == [1, -1, 2, 0]
    assert t.scores().tolist() == [2, 8, 0, 0]
    assert t.never_learned.tolist() == [False, True, False, False]
    assert t.unforgettable.tolist() == [False, False, True, True]


def test_the_events_fall_at_the_fourth_and_sixth_presentation():
    t, counts = ForgettingTracker(1), []
    for right in [0, 1, 1, 0, 1, 0, 0, 1]:
        t.update(torch.tensor([0]), torch.tensor([bool(right)]))
        counts.append(int(t.forgotten))
    assert counts == [0, 0, 0, 1, 1, 2, 2, 2]


def test_a_sample_that_never_came_has_no_score():
    t = ForgettingTracker(2)
    t.update(torch.tensor([1]), torch.tensor([False]), torch.tensor([-0.5]))
    assert t.scores().isnan().tolist() == [True, False]
    assert t.mean_margin()[1] == -0.5
    with pytest.raises(Mistake, match="never presented"):
        prune_by_forgetting(t.scores(), 0.5, gen())
    with pytest.raises(Mistake, match=r"0\.\.1"):
        t.update(torch.tensor([2]), torch.tensor([True]))


@quick(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40), st.integers(1, 9))
def test_batches_count_as_single_presentations(stream, size):
    """Also where a batch holds a row twice: the counts are those of a plain loop."""
    t = ForgettingTracker(5)
    for at in range(0, len(stream), size):
        index, right = zip(*stream[at : at + size], strict=True)
        t.update(torch.tensor(index), torch.tensor(right))
    for row in range(5):
        rights = [right for i, right in stream if i == row]
        assert int(t.seen[row]) == len(rights)
        assert int(t.forgotten[row]) == sum(a and not b for a, b in itertools.pairwise(rights))
        assert int(t.learned_at[row]) == (rights.index(True) if True in rights else -1)


def test_margin_by_hand():
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 3.0, 1.0]])
    assert misclassification_margin(logits, torch.tensor([0, 2])).tolist() == [1.5, -2.0]


def test_pruning_keeps_the_most_forgotten():
    scores = torch.tensor([3.0, 0, 8, 0, 1, 0])
    assert prune_by_forgetting(scores, 0.5, gen()).tolist() == [0, 2, 4]
    assert prune_by_forgetting(scores, 0.5, gen(), keep="least-forgotten").tolist() == [1, 3, 5]
    assert prune_by_forgetting(scores, 0.0, gen()).tolist() == list(range(6))
    assert len(random_prune(10, 0.3, gen())) == 7
    for bad in (-0.1, 1.0):
        with pytest.raises(Mistake, match="fraction"):
            prune_by_forgetting(scores, bad, gen())


def test_ties_fall_at_random():
    kept = {tuple(prune_by_forgetting(torch.zeros(6), 0.5, gen(seed)).tolist()) for seed in range(20)}
    assert len(kept) > 5
    assert all(len(rows) == 3 for rows in kept)


@quick(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.floats(0, 0.95))
def test_no_dropped_score_is_above_a_kept_one(values, fraction):
    scores = torch.tensor(values).double()
    kept = prune_by_forgetting(scores, fraction, gen())
    dropped = scores[~torch.isin(torch.arange(len(scores)), kept)]
    assert len(kept) == max(len(scores) - round(fraction * len(scores)), 1)
    assert not len(dropped) or dropped.max() <= scores[kept].min()


def test_noise_and_transfer_by_hand():
    # noisy 5 and 2 against clean 0, 3, 2: pairs won 3 + 1 + half a tie = 4.5 of 6
    assert noisy_label_check(torch.tensor([0.0, 5, 3, 2, 2]), torch.tensor([0, 1, 0, 1, 0]).bool()) == pytest.approx(4.5 / 6)
    with pytest.raises(Mistake, match="noise"):
        noisy_label_check(torch.zeros(3), torch.zeros(3).bool())
    # ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    same = transfer(torch.tensor([0.0, 1, 2, 3]), torch.tensor([0.0, 2, 1, 3]))
    assert same.spearman == pytest.approx(0.8)
    assert same.overlap == 0.5


class Recount(Technique):
    """An independent count, read before the update."""

    def on_start(self, run):
        self.rows = []

    def on_grad(self, run):
        self.rows += list(zip(run.batch.index.tolist(), (run.out.logits.argmax(1) == run.batch.y.argmax(1)).tolist(), strict=True))


class Twice(Technique):
    """Two passes a step, as sharpness-aware training has them."""

    def around_grad(self, run, grad):
        grad()
        for p in run.model.parameters():
            p.grad = None
        grad()


def made(*parts, beside=(), **changes):
    chosen = settings(
        **{"model": "resnet:layers=(1,1),widths=(4,8)", "parts": parts, "batch": 8, "epochs": 3, "lr": 0.3, "precision": "fp32", "augment": "none", **changes}
    )
    run = prepare(chosen, tiny_images())
    run.team = Team([*run.team.seats, *(Seat(Card(part=f"z{i}", kind="technique", title="t"), {}, t) for i, t in enumerate(beside))])
    return run


def tracker_of(run):
    return next(s.technique for s in run.team.seats if s.name == "example-forgetting").tracker


def test_a_run_is_counted_and_left_alone():
    plain, recount = made(), Recount()
    fit(plain)
    run = made("example-forgetting", beside=[recount])
    fit(run)
    assert not equal(bits(plain.model), bits(run.model))
    naive = ForgettingTracker(48)
    for row, right in recount.rows:
        naive.update(torch.tensor([row]), torch.tensor([right]))
    found = tracker_of(run)
    for name in ("seen", "last", "forgotten", "learned_at"):
        assert torch.equal(getattr(found, name), getattr(naive, name)), name
    assert found.seen[run.data.split.train].tolist() == [3] * 32
    assert int(found.seen.sum()) == 96
    told = [row for row in run.record.rows if row["kind"] == "reading"]
    assert len(told) == 12
    assert {row["name"] for row in told} == {"unforgettable share", "never learned share", "forgetting events", "margin"}


def test_a_second_pass_in_a_step_is_not_counted():
    run = made("example-forgetting", beside=[Twice()], epochs=1)
    fit(run)
    assert int(tracker_of(run).seen.sum()) == 32


class Mix(Technique):
    """Gives half of the rows another label, as mixing parts do where the partner weighs most."""

    def on_batch(self, run):
        run.batch.y = torch.cat([run.batch.y[:4], run.batch.y[4:].roll(1, 1)])


def test_a_row_mixed_away_is_no_presentation():
    run = made("example-forgetting", beside=[Mix()], epochs=1)
    fit(run)
    assert int(tracker_of(run).seen.sum()) == 16


class Killed(Exception):
    pass


def test_resume_and_reload_keep_the_counts(tmp_path):
    whole = made("example-forgetting", checkpoint_seconds=0)
    fit(whole)

    def kill(done, total, text):
        if done == 6:
            raise Killed

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        fit(made("example-forgetting", checkpoint_seconds=0), path, kill)
    again = made("example-forgetting", checkpoint_seconds=0)
    fit(again, path)
    for name in ("seen", "last", "forgotten", "learned_at", "margin"):
        assert torch.equal(getattr(tracker_of(whole), name), getattr(tracker_of(again), name)), name

    write_config(tmp_path, whole.settings)
    write_model(tmp_path, whole)
    loaded = open_run(tmp_path)
    technique, kept = loaded.run.team.seats[0].technique, whole.team.seats[0].technique
    assert technique.readings(loaded.run) == kept.readings(whole)
    gallery = technique.gallery(loaded.run)
    assert gallery == kept.gallery(whole)
    assert len(gallery) == 32
    assert [score for _, score in gallery] == sorted((score for _, score in gallery), reverse=True)
    assert {row for row, _ in gallery} == set(whole.data.split.train.tolist())
