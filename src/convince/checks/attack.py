"""Checks of attacks: in the ball, in [0, 1], repeatable, and they do fool."""

from __future__ import annotations

import torch

from convince.checks.answers import must_leave_as_found, must_survive_exception
from convince.checks.subject import Subject


def check_pixels_stay_valid(s: Subject) -> None:
    """Changed images have the same shape, are finite and lie in [0, 1]."""
    x, y = s.pixels()
    changed = s.make()(s.answer(), x, y)
    assert changed.shape == x.shape, f"shape {tuple(x.shape)} became {tuple(changed.shape)}"
    assert bool(torch.isfinite(changed).all()), "pixels are not finite"
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1, "pixels leave [0, 1]"


def check_attack_stays_in_its_ball(s: Subject) -> None:
    """With eps no image moves farther than that in the norm asked for, and eps=0 moves nothing."""
    x, y = s.pixels()
    for norm, order in (("2", 2.0), ("inf", float("inf"))):
        for eps in (0.0, 0.05, 0.4):
            moved = (s.make()(s.answer(), x, y, eps=eps, norm=norm) - x).flatten(1).norm(order, dim=1)
            assert float(moved.max()) <= eps + 1e-5, f"norm {norm}: moved {float(moved.max()):.4f}, eps is {eps}"


def check_attack_repeats(s: Subject) -> None:
    """Two calls give equal pixels, and the global random state stays."""
    x, y = s.pixels()
    state = torch.get_rng_state()
    assert torch.equal(s.make()(s.answer(), x, y), s.make()(s.answer(), x, y)), "two calls give different pixels"
    assert torch.equal(state, torch.get_rng_state()), "the global random state moved"


def check_attack_fools(s: Subject) -> None:
    """On images that are answered rightly, a wide ball flips at least one answer."""
    x, y = s.pixels(24)
    right = s.answer()(x).argmax(1) == y
    assert int(right.sum()) >= 4, "the tiny answer is right too seldom to be attacked"
    changed = s.make()(s.answer(), x[right], y[right], eps=0.5, norm="inf")
    assert bool((s.answer()(changed).argmax(1) != y[right]).any()), "no answer was flipped within eps=0.5"


def check_answer_is_left_as_found(s: Subject) -> None:
    """Mode, gradients, hooks, weights and images are as before."""
    must_leave_as_found(s, lambda answer, x, y: s.make()(answer, x, y))


def check_answer_is_left_as_found_after_an_exception(s: Subject) -> None:
    """The same where the answer itself fails half-way."""
    must_survive_exception(s, lambda answer, x, y: s.make()(answer, x, y))
