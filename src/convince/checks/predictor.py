"""Checks of predictors: a module with the answer's own inputs and scores."""

from __future__ import annotations

import torch

from convince.checks.answers import must_leave_as_found
from convince.checks.subject import Subject, bits, equal
from convince.fit.loop import fit


def check_scores_keep_their_shape(s: Subject) -> None:
    """Scores [n k], finite, one row an image, also for a single image."""
    x, _ = s.pixels()
    wrapped = s.make().wrap(s.answer()).eval()
    with torch.no_grad():
        scores = wrapped(x)
        assert scores.shape == (len(x), s.data.k), f"scores have shape {tuple(scores.shape)}"
        assert bool(torch.isfinite(scores).all()), "scores are not finite"
        torch.testing.assert_close(wrapped(x[:1]), scores[:1], rtol=1e-4, atol=1e-5)
        assert torch.equal(wrapped(x), scores), "two passes differ"


def check_wrapping_leaves_the_answer(s: Subject) -> None:
    """Wrapping and answering change nothing in the answer beneath."""
    must_leave_as_found(s, lambda answer, x, y: s.make().wrap(answer))


def check_training_is_untouched(s: Subject) -> None:
    """Switched on by ``--with``, the trained weights are the baseline's; only the answer differs."""
    run = s.run(s.spec)
    fit(run)
    differs = equal(bits(s.baseline.model), bits(run.model))
    assert not differs, f"a predictor changed the training: {differs}"
