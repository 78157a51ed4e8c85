"""Checks of studies: they run at a tiny budget and say what they found."""

from __future__ import annotations

import json

from convince.checks.subject import Subject
from convince.types import Budget


def check_study_runs_at_a_tiny_budget(s: Subject) -> None:
    """``run`` with a budget of one epoch returns JSON with at least one number."""
    found = s.make().run(Budget(1.0, "epochs"))
    text = json.dumps(found)
    assert any(letter.isdigit() for letter in text), "the study returns no number"
