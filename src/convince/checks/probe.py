"""Checks of probes: finite named numbers, the answer left as found."""

from __future__ import annotations

import math

from convince.checks.answers import must_leave_as_found
from convince.checks.subject import Subject


def check_readings_are_named_numbers(s: Subject) -> None:
    """At least one reading; names differ, values are finite, and two calls agree."""
    x, y = s.pixels(24)
    readings = s.make().probe(s.answer(), x, y)
    assert readings, "the probe gives no reading"
    assert len({r.name for r in readings}) == len(readings), "two readings share a name"
    for r in readings:
        assert math.isfinite(r.value), f"{r.name} is {r.value}"
    assert readings == s.make().probe(s.answer(), x, y), "two calls give different readings"


def check_answer_is_left_as_found(s: Subject) -> None:
    """Mode, gradients, hooks, weights and images are as before."""
    must_leave_as_found(s, lambda answer, x, y: s.make().probe(answer, x, y))
