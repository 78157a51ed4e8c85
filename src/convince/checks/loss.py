"""Checks of losses: reductions agree, gradients are right, inputs stay."""

from __future__ import annotations

import torch

from convince.checks import Nothing
from convince.checks.subject import Subject
from convince.fit.randomness import generator


def _inputs(n: int = 6, k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    gen = generator("loss inputs")
    logits = torch.randn(n, k, generator=gen, dtype=torch.float64)
    return logits, torch.softmax(torch.randn(n, k, generator=gen, dtype=torch.float64), 1)


def check_reductions_agree(s: Subject) -> None:
    """``none`` gives one number a row; ``mean`` and ``sum`` are its mean and sum."""
    logits, y = _inputs()
    rows = s.make(reduction="none")(logits, y)
    assert rows.shape == (6,), f"reduction='none' gives shape {tuple(rows.shape)}, not one number a row"
    torch.testing.assert_close(s.make(reduction="mean")(logits, y), rows.mean())
    torch.testing.assert_close(s.make(reduction="sum")(logits, y), rows.sum())


def check_gradient_is_right(s: Subject) -> None:
    """The gradient agrees with finite differences in float64."""
    if s.card.gradient != "exact":
        raise Nothing("the card declares a surrogate gradient")
    logits, y = _inputs()
    loss = s.make(reduction="none")
    assert torch.autograd.gradcheck(lambda z: loss(z, y), logits.requires_grad_(True)), "the gradient is wrong"


def check_loss_leaves_its_inputs(s: Subject) -> None:
    """Scores and labels are as before."""
    logits, y = _inputs()
    kept = logits.clone(), y.clone()
    s.make()(logits, y)
    assert torch.equal(logits, kept[0]), "the scores were changed"
    assert torch.equal(y, kept[1]), "the labels were changed"


def check_right_answers_cost_less(s: Subject) -> None:
    """A confident right answer costs less than a confident wrong one."""
    y = torch.eye(3, dtype=torch.float64)
    loss = s.make(reduction="mean")
    assert float(loss(8 * y, y)) < float(loss(-8 * y, y)), "a right answer costs as much as a wrong one"
