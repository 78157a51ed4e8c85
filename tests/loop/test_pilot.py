"""Minutes become steps by a pilot, which does a few steps of every stage and no more."""

import pytest

from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.fit.settings import settings
from convince.fit.survey import pilot

HOW = {"model": "small-cnn:widths=(4,8)", "batch": 8, "augment": "none", "precision": "fp32"}


def test_minutes_become_steps_and_more_minutes_more_steps():
    one, note = pilot(settings(**HOW, minutes=0.02), tiny_images())
    two, _ = pilot(settings(**HOW, minutes=0.5), tiny_images())
    assert one.minutes is None
    assert one.steps >= 1
    assert one.epochs == -(-one.steps // 4)
    assert two.steps > one.steps
    assert "pilot" in note


def test_a_long_stage_before_is_timed_not_run(monkeypatch):
    """A pretext of 100,000 epochs would take hours; the pilot refuses it in a moment, and names it."""
    with pytest.raises(Mistake, match=r"the stages before \(rotnet\) take .* minutes"):
        pilot(settings(**HOW, minutes=0.5, parts=("rotnet:epochs=100000",)), tiny_images())
