"""Checks of explainers: maps of the right shape, an answer left as found, targets that matter."""

from __future__ import annotations

import torch

from convince.checks import Nothing
from convince.checks.answers import must_leave_as_found, must_survive_exception
from convince.checks.subject import Subject
from convince.errors import Mistake


def check_map_fits_the_image(s: Subject) -> None:
    """One finite map an image, [n 1 h w]."""
    x, _ = s.pixels()
    found = s.make()(s.answer(), x)
    if found.map is None:
        raise Nothing("the explainer gives no map")
    assert found.map.shape == (len(x), 1, *x.shape[2:]), f"the map has shape {tuple(found.map.shape)} for images {tuple(x.shape)}"
    assert bool(torch.isfinite(found.map).all()), "the map is not finite"


def check_target_matters(s: Subject) -> None:
    """Two classes of one image get different maps; or, where the card has ``idle=("target",)``, the same one."""
    x, _ = s.pixels()
    a, b = (s.make()(s.answer(), x, target).map for target in (0, 1))
    if a is None or b is None:
        raise Nothing("the explainer gives no map")
    if "target" in s.card.idle:
        assert torch.equal(a, b), "the card says that the target is idle, and the map depends on the class"
        return
    assert not torch.equal(a, b), "the map does not depend on the class"


def check_weights_matter(s: Subject) -> None:
    """A trained and an untrained network get different maps."""
    x, _ = s.pixels()
    a, b = s.make()(s.answer(), x, 0).map, s.make()(s.linear(), x, 0).map
    if a is None or b is None:
        raise Nothing("the explainer gives no map")
    assert not torch.allclose(a, b), "the map does not depend on the weights"


def check_wrong_target_is_named(s: Subject) -> None:
    """A class that does not exist is refused with its number."""
    x, _ = s.pixels(2)
    try:
        s.make()(s.answer(), x, 17)
    except Mistake as mistake:
        assert "17" in str(mistake), f"the error does not name the class: {mistake}"
        return
    raise AssertionError("a class that does not exist was explained")


def check_answer_is_left_as_found(s: Subject) -> None:
    """Mode, gradients, ``requires_grad``, hooks and weights are as before, and so are the images."""
    must_leave_as_found(s, lambda answer, x, y: s.make()(answer, x, 0))


def check_answer_is_left_as_found_after_an_exception(s: Subject) -> None:
    """The same where the answer itself fails half-way."""
    must_survive_exception(s, lambda answer, x, y: s.make()(answer, x, 0))
