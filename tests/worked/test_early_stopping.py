"""Early stopping by a scripted validation: when it stops, what it keeps, beside EMA, resume."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch

from convince.checks.subject import MODEL, bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.training import early_stopping
from convince.training.early_stopping import EarlyStopping, badness
from convince.types import Split


class Killed(Exception):
    pass


def ready(*parts, data=None, **changes):
    how = {"model": MODEL, "batch": 8, "epochs": 9, "lr": 0.05, "precision": "fp32", "schedule": "constant", "checkpoint_seconds": 0, "parts": parts, **changes}
    return prepare(make(**how), data or tiny_images(), drop_off=False)


def scripted(run, values, checkpoint=None, progress=None):
    """Fit with these numbers in place of the validation's, by epoch; returns the weights after each epoch."""
    ends = {}

    def tick(done, total, text):
        ends[run.epoch] = bits(run.model)
        if progress is not None:
            progress(done, total, text)

    with patch.object(early_stopping, "badness", lambda scores, metric: values[run.epoch]):
        fit(run, checkpoint, tick)
    return ends


def epochs(run):
    return sum(row["kind"] == "epoch" for row in run.record.rows)


def test_stops_after_patience_and_restores_the_best():
    """Best at epoch 2 (of 0, 1, ...); 3 and 4 are not better: patience 2 stops after epoch 4."""
    run = ready("early-stopping:patience=2")
    ends = scripted(run, [5, 4, 3, 3, 3.5, 1, 1, 1, 1])
    assert epochs(run) == 5
    assert not equal(bits(run.model), ends[2])
    assert {(r["name"], r["value"]) for r in run.record.rows if r["kind"] == "reading"} == {("best epoch", 3.0)}


def test_waiting_starts_anew_with_each_better_epoch():
    run = ready("early-stopping:patience=2")
    ends = scripted(run, [5, 6, 4, 5, 3, 4, 5, 0, 0])
    assert epochs(run) == 7
    assert not equal(bits(run.model), ends[4])


def test_min_delta():
    """Improvements of 0.1 do not count where 0.5 is asked for; the first epoch always does."""
    run = ready("early-stopping:patience=3,min_delta=0.5")
    ends = scripted(run, [5, 4.9, 4.8, 4.7, 1, 1, 1, 1, 1])
    assert epochs(run) == 4
    assert not equal(bits(run.model), ends[0])


def test_without_a_stop_the_best_still_ships():
    run = ready("early-stopping:patience=50", epochs=4)
    ends = scripted(run, [5, 1, 3, 2])
    assert epochs(run) == 4
    assert not equal(bits(run.model), ends[1])


def test_real_validation_scores_the_weights_that_ship():
    """With a high rate the loss goes up and down; the final validation is the best of all epochs, of either metric."""
    for metric, column, best in (("log_loss", "val_loss", min), ("accuracy", "val_accuracy", max)):
        run = ready(f"early-stopping:patience=50,metric={metric}", lr=0.3, epochs=8)
        fit(run)
        found = [row[column] for row in run.record.rows if row["kind"] == "epoch"]
        scores = run.evaluate("val")
        shipped = scores.log_loss if metric == "log_loss" else scores.accuracy
        assert shipped == pytest.approx(best(found), abs=1e-6)


def test_beside_ema_the_averaged_weights_are_kept():
    run = ready("early-stopping:patience=50", "ema:decay=0.9", epochs=4)
    kept = {}
    ema = next(s.technique for s in run.team.seats if s.name == "ema")

    def tick(done, total, text):
        kept[run.epoch] = {name: tensor.clone() for name, tensor in ema.average.items()}

    values = [5, 1, 3, 2]
    with patch.object(early_stopping, "badness", lambda scores, metric: values[run.epoch]):
        fit(run, None, tick)
    assert not equal(bits(run.model), kept[1])


@pytest.mark.parametrize("at", [2, 6, 12, 17])
def test_resume(tmp_path, at):
    """Killed in the first epoch, before, at and after the best epoch, the run stops at the same epoch with equal bits."""
    values = [5, 4, 3, 3, 3.5, 1, 1, 1, 1]
    whole = ready("early-stopping:patience=2")
    scripted(whole, values)

    def stop(done, total, text):
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        scripted(ready("early-stopping:patience=2"), values, tmp_path / "c", stop)
    again = ready("early-stopping:patience=2")
    scripted(again, values, tmp_path / "c")
    assert not equal(bits(whole.model), bits(again.model))
    assert again.steps_done == whole.steps_done == 20


def test_off_measures_and_restores_nothing():
    plain, run = ready(epochs=2), ready("early-stopping:patience=inf", epochs=2)
    fit(plain)
    fit(run)
    assert not equal(bits(plain.model), bits(run.model))
    assert all(row["kind"] == "epoch" for row in run.record.rows)


def test_badness():
    from convince.fit.answer import Scores

    s = Scores(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([0, 1]), torch.arange(2))
    assert badness(s, "accuracy") == 0.5
    assert badness(s, "log_loss") == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2, rel=1e-6)


def test_no_validation_part_is_refused():
    data = tiny_images()
    bare = type(data)(data.x, data.y, Split(data.split.train, data.split.val[:0], data.split.test), data.classes, data.preprocess)
    with pytest.raises(Mistake, match=r"validation part.*--val"):
        fit(ready("early-stopping", data=bare))
    fit(ready("early-stopping:patience=inf", data=bare, epochs=1))


@pytest.mark.parametrize(("options", "words"), [({"patience": 0}, "patience=0"), ({"metric": "f1"}, "metric='f1'"), ({"min_delta": -1.0}, "min_delta=-1.0")])
def test_bad_settings_are_named(options, words):
    with pytest.raises(Mistake, match=words):
        EarlyStopping(**options)
