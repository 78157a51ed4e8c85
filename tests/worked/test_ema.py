"""EMA by hand: the recursion, the warm-up, what validation sees, what ships, resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convince.checks.subject import MODEL, bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.training.ema import Ema, follow, warmed
from convince.types import Stage


class Killed(Exception):
    pass


def ready(*parts, **changes):
    how = {"model": MODEL, "batch": 8, "epochs": 2, "lr": 0.05, "precision": "fp32", "checkpoint_seconds": 0, "parts": parts, **changes}
    return prepare(make(**how), tiny_images(), drop_off=False)


def test_recursion_by_hand():
    """0.9 * 1 + 0.1 * 3 = 1.2; then 0.9 * 1.2 + 0.1 * 3 = 1.38; counts and new or reshaped tensors are copied, those gone dropped."""
    average = {"w": torch.tensor([1.0], dtype=torch.float64), "n": torch.tensor(4), "old": torch.zeros(1), "cut": torch.zeros(3)}
    live = {"w": torch.tensor([3.0], dtype=torch.float64), "n": torch.tensor(7), "new": torch.ones(2), "cut": torch.ones(2)}
    follow(average, live, 0.9)
    assert float(average["w"]) == pytest.approx(1.2, abs=1e-15)
    follow(average, live, 0.9)
    assert float(average["w"]) == pytest.approx(1.38, abs=1e-15)
    assert int(average["n"]) == 7
    assert average["new"].tolist() == [1, 1]
    assert average["cut"].tolist() == [1, 1]
    assert "old" not in average
    average["new"] += 1
    assert live["new"].tolist() == [1, 1]  # a copy


def test_warm_up():
    """t = 0, 1, 2: 1/10, 2/11, 3/12; 0.999 is reached at t = 8990."""
    assert [warmed(0.999, t) for t in range(3)] == [1 / 10, 2 / 11, 3 / 12]
    assert warmed(0.999, 8988) < 0.999
    assert warmed(0.999, 8990) == 0.999
    assert warmed(0.0, 50) == 0.0


def test_run_ends_with_the_average_of_its_own_trajectory():
    """The recursion over the plain run's weights (which EMA does not disturb) gives the network that ships."""
    plain, path = ready(), []
    fit(plain, None, lambda *_: path.append(bits(plain.model)))
    run = ready("ema:decay=0.7")
    start = {}
    inner = run.team.seats[0].technique.on_stage
    run.team.seats[0].technique.on_stage = lambda r: (start.update(bits(r.model)), inner(r))
    fit(run)
    for name, value in start.items():
        for t, weights in enumerate(path):
            d = min(0.7, (1 + t) / (10 + t))
            value = d * value + (1 - d) * weights[name] if value.is_floating_point() else weights[name]
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_validation_sees_the_average_and_training_does_not():
    run = ready("ema:decay=0.9")
    checked = []

    def look(done, total, text):
        made = run.team.seats[0].technique
        inside, live = run.answer.state_dict(), run.model.state_dict()
        assert all(torch.equal(inside[f"model.{name}"], kept) for name, kept in made.average.items())
        checked.append(torch.equal(inside["model.conv1.weight"], live["conv1.weight"]))
        found = run.evaluate("val").probs
        run._scores.clear()
        with run.aside():
            assert not torch.equal(found, run.model(run.normalise(run.plan.pixels(run.data.x.take(run.data.split.val.sort().values)))).softmax(1))

    fit(run, None, look)
    assert checked == [False] * 8
    last = run.record.rows[-1]
    assert last["val_accuracy"] == run.evaluate("val").accuracy
    assert last["val_loss"] == pytest.approx(run.evaluate("val").log_loss, abs=1e-6)  # what was validated is what ships


def test_answer_does_not_hold_the_living_weights():
    """Training on does not change an answer that was taken before, and the answer can be wrapped and copied."""
    run = ready("ema")
    taken = []
    fit(run, None, lambda done, *_: taken.append((run.answer, bits(run.answer))) if done == 3 else None)
    assert not equal(bits(taken[0][0]), taken[0][1])
    assert run.answer.model is run.model  # at the end nothing is wrapped


@pytest.mark.parametrize("at", [2, 4, 7])
def test_resume(tmp_path, at):
    whole = ready("ema")
    fit(whole)

    def stop(done, total, text):
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        fit(ready("ema"), tmp_path / "c", stop)
    again = ready("ema")
    fit(again, tmp_path / "c")
    assert not equal(bits(whole.model), bits(again.model))
    assert whole.record.rows[-1] == again.record.rows[-1]


def test_reload(tmp_path):
    run = ready("ema", val=0.2)
    fit(run)
    write_config(tmp_path, run.settings)
    write_model(tmp_path, run)
    x = run.data.x.take(torch.arange(10))
    with torch.no_grad():
        expected = run.answer.eval()(run.plan.pixels(x))
    assert torch.equal(open_run(tmp_path).logits(x), expected)


def test_off_is_off():
    plain, run = ready(), ready("ema:decay=0.0")
    fit(plain)
    fit(run)
    assert not equal(bits(plain.answer), bits(run.answer))


def test_a_later_stage_without_guests_keeps_its_own_weights():
    """The average of an earlier stage does not overwrite what a stage of its owner's alone trained."""
    run = ready("ema")
    made = Ema()
    made.on_start(run)
    run.model = nn.Linear(2, 1)
    made.run, run.stage_number = run, 0
    made.on_stage(run)
    run.stage, run.stage_number = Stage("owner's", 1, guests=False), 1
    answer = nn.Sequential(run.model)
    assert made.wrap(answer) is answer
    with torch.no_grad():
        run.model.weight.fill_(5.0)
    run.stage, run.stage_number = Stage("end", 0), 2
    made.on_end(run)
    assert run.model.weight.tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("value", [1.0, -0.5])
def test_bad_decay_is_named(value):
    with pytest.raises(Mistake, match=f"decay={value}"):
        Ema(decay=value)
