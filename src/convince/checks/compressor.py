"""Checks of compressors: smaller, rebuilt from JSON alone, the original left alone."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch

from convince.checks.answers import must_leave_as_found
from convince.checks.subject import Subject


def _bytes(model: Any) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def check_result_is_smaller(s: Subject) -> None:
    """The compressed network takes fewer bytes and gives finite scores."""
    answer = copy.deepcopy(s.answer())
    before = _bytes(answer.model)
    x, _ = s.pixels(24)
    made = s.make()
    made.apply(answer.model, made.plan(s.answer(), x))
    assert _bytes(answer.model) < before, f"{before} bytes became {_bytes(answer.model)}"
    with torch.no_grad():
        assert bool(torch.isfinite(answer.eval()(x)).all()), "scores are not finite"


def check_structure_is_json(s: Subject) -> None:
    """The cut's spec survives JSON, and ``rebuild`` with it takes the compressed weights by name."""
    x, _ = s.pixels(24)
    made = s.make()
    cut = made.plan(s.answer(), x)
    a: Any = copy.deepcopy(s.answer())
    b: Any = copy.deepcopy(s.answer())
    made.apply(a.model, cut)
    type(made).rebuild(b.model, **json.loads(json.dumps(cut.spec)))
    b.model.load_state_dict(a.model.state_dict())
    with torch.no_grad():
        assert torch.equal(a.eval()(x), b.eval()(x)), "rebuilt from JSON, the network gives other scores"


def check_original_is_left_alone(s: Subject) -> None:
    """Planning changes nothing in the answer."""
    must_leave_as_found(s, lambda answer, x, y: s.make().plan(answer, x))
