"""ScheduledDropPath by hand: the probability by cell and step, what cells see during training, what other networks are told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convince.backbones.nasnet import Cell
from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.training.scheduled_drop_path import ScheduledDropPath, cells_of, probability

MODEL = "nasnet:cells=1,filters=2"


def test_worked_probabilities():
    assert probability(0.4, 2, 5, 0.5) == pytest.approx(0.12)  # 0.4 * 3/5 * 1/2
    assert probability(0.4, 19, 20, 1.0) == 0.4
    assert probability(0.4, 19, 20, 0.0) == 0
    assert probability(0.3, 0, 20, 7.0) == pytest.approx(0.015), "beyond its end the schedule stays"


@given(st.floats(0, 0.99), st.integers(1, 30), st.floats(0, 1), st.floats(0, 1))
def test_later_cells_and_steps_drop_at_least_as_much(p, cells, early, late):
    early, late = sorted((early, late))
    row = [probability(p, cell, cells, early) for cell in range(cells)]
    assert row == sorted(row)
    assert all(a <= probability(p, cell, cells, late) <= p + 1e-12 for cell, a in enumerate(row))


def run(*parts, **other):
    return prepare(settings(model=MODEL, parts=parts, batch=8, epochs=2, precision="fp32", augment="none", kernels={}, **other), tiny_images())


@pytest.mark.parametrize(("schedule", "expected"), [("linear", [0.4 * step / 8 for step in range(8)]), ("fixed", [0.4] * 8)])
def test_what_the_cells_see_in_training(monkeypatch, schedule, expected):
    seen = []
    kept = Cell.forward

    def look(cell, x, before):
        if cell.training:
            seen.append(cell.drop_path)
        return kept(cell, x, before)

    monkeypatch.setattr(Cell, "forward", look)
    made = run(f"scheduled-drop-path:p=0.4,schedule={schedule}")
    fit(made)
    cells = cells_of(made.model)
    assert len(cells) == 5
    assert seen[4::5] == pytest.approx(expected), "the last cell"
    assert seen[0::5] == pytest.approx([p / 5 for p in expected]), "the first of five"
    assert {cell.drop_path for cell in cells} == {0.0}, "nothing stays behind"


def test_nothing_stays_behind_after_an_exception():
    made = run("scheduled-drop-path")
    made.model = made.build()

    def fail():
        assert all(cell.drop_path > 0 for cell in cells_of(made.model))
        raise RuntimeError("in the middle of a step")

    with pytest.raises(RuntimeError, match="in the middle"):
        ScheduledDropPath(schedule="fixed").around_grad(made, fail)
    assert {cell.drop_path for cell in cells_of(made.model)} == {0.0}


def test_other_networks_and_wrong_settings_are_refused():
    other = prepare(settings(model="resnet20", parts=("scheduled-drop-path",), batch=8, epochs=1, kernels={}), tiny_images())
    with pytest.raises(Mistake, match="scheduled-drop-path: ResNet has no cells whose paths could be dropped; use --model nasnet-mini"):
        fit(other)
    with pytest.raises(Mistake, match=r"p=1\.0: a probability from 0"):
        ScheduledDropPath(p=1.0)
    with pytest.raises(Mistake, match="must be 'linear' or 'fixed'"):
        ScheduledDropPath(schedule="cosine")
