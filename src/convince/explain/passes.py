"""Passes of an answer for explainers: scores, chances and gradients of many rows, a bounded number at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full

ROWS = 64  # in one pass without gradients; 32 with, so that a ResNet-18 at 224 px stays below 1.5 GB


@torch.no_grad()
def scores(answer: nn.Module, x: Float[Tensor, "m ..."], rows: int = ROWS) -> Float[Tensor, "m k"]:
    """Scores of many rows, without gradients."""
    return torch.cat([full(answer(part)) for part in x.split(rows)])


def chances(answer: nn.Module, found: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """What perturbation methods watch: the softmax of class scores; the scores themselves of an answer with ``logits = False`` (a similarity, a regression)."""
    return found.softmax(1) if getattr(answer, "logits", True) else found


def gradients(answer: nn.Module, x: Float[Tensor, "m ..."], target: Int[Tensor, " m"], who: str, rows: int = ROWS // 2) -> Float[Tensor, "m ..."]:
    """dY/dx of each row's own target score, in fp32. The answer must be in eval mode."""
    found = []
    for pixels, wanted in zip(x.split(rows), target.split(rows), strict=True):
        part = pixels.detach().requires_grad_(True)
        out = answer(part)
        must_reach(out, who)
        (gradient,) = torch.autograd.grad(out.gather(1, wanted[:, None]).sum(), part)
        found.append(full(gradient))
    return torch.cat(found)


def must_reach(scores: Tensor, who: str) -> None:
    """Refuse scores that no gradient reaches."""
    if not scores.requires_grad:
        raise Mistake(f"{who} needs gradients, and none reaches the scores of this answer; use a part that only asks for scores, such as rise")
