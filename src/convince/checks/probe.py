"""Checks of probes: finite named numbers, something to look at, answer and training left alone."""

from __future__ import annotations

import math

import torch

from convince.checks.answers import must_leave_as_found
from convince.checks.subject import Subject


def check_readings_are_named_numbers(s: Subject) -> None:
    """At least one reading; names differ, values are finite, and two calls agree."""
    x, y = s.pixels(24)
    found = s.make().probe(s.answer(), x, y)
    readings = found.readings
    assert readings, "the probe gives no reading"
    assert len({r.name for r in readings}) == len(readings), "two readings share a name"
    for r in readings:
        assert math.isfinite(r.value), f"{r.name} is {r.value}"
    assert found == s.make().probe(s.answer(), x, y), "two calls give different findings"


def check_there_is_something_to_look_at(s: Subject) -> None:
    """At least one figure, which the report can draw."""
    from convince.report.drawings import draw

    x, y = s.pixels(24)
    figures = s.make().probe(s.answer(), x, y).figures
    assert figures, "the probe gives no figure"
    for figure in figures:
        assert draw(figure).startswith("<svg"), f"{figure.title}: is not drawn"


def check_answer_is_left_as_found(s: Subject) -> None:
    """Mode, gradients, hooks, weights and images are as before."""
    must_leave_as_found(s, lambda answer, x, y: s.make().probe(answer, x, y))


def check_riding_leaves_training_alone(s: Subject) -> None:
    """Switched on by ``--with``, it measures and the weights are those of the run without it, bit for bit."""
    alone, ridden = s.baseline.model.state_dict(), s.trained.model.state_dict()
    for name, tensor in alone.items():
        assert torch.equal(tensor, ridden[name]), f"{name} differs when the probe rides along"
    assert any(row["kind"] == "reading" for row in s.trained.record.rows), "nothing was reported while training"
