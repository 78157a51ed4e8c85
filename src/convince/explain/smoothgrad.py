"""SmoothGrad and VarGrad: gradients of many noisy copies of an image, as their mean, mean square or variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.passes import gradients
from convince.explain.saliency import saliency
from convince.fit.randomness import generator
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="smoothgrad",
    kind="explainer",
    title="SmoothGrad: removing noise by adding noise",
    year=2017,
    url="https://arxiv.org/abs/1706.03825",
    departs=("15 copies are the default, as in the studies that compare it; the paper's figures take 50",),
    tiny={"copies": 3},
)

AGGREGATES = ("mean", "square", "variance")


def spread(x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Each image's range, largest less least value, which the noise is a share of."""
    flat = x.flatten(1)
    return (flat.amax(1) - flat.amin(1)).view(-1, *[1] * (x.dim() - 1))


def moments(
    answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"], noise: Float[Tensor, "s ..."]
) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."]]:
    """Mean and mean square of dY/dx over ``x + noise_j``, the noise as a share of each image's range."""
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for away in noise:
        g = gradients(answer, x + spread(x) * away, target, "smoothgrad")
        first += g / len(noise)
        second += g.square() / len(noise)
    return first, second


def smoothgrad(
    answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"], noise: Float[Tensor, "s ..."], aggregate: str = "mean"
) -> Float[Tensor, "n ..."]:
    """The "mean" of :func:`moments` (SmoothGrad), the mean "square" (SmoothGrad-Squared) or the "variance" (VarGrad; Adebayo et al. 2018)."""
    first, second = moments(answer, x, target, noise)
    return first if aggregate == "mean" else second if aggregate == "square" else (second - first.square()).clamp_min(0)


@final
@dataclass
class Smoothgrad(Explainer):
    """The map is ``max_c |E|`` of :func:`smoothgrad` E, which stands in ``images["gradient"]``.

    ``sigma``: the noise, as a share of each image's range (0.15 in the paper); ``aggregate``: "mean", "square" or "variance" (VarGrad).
    """

    copies: int = 15
    sigma: float = 0.15
    aggregate: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copies < 1 or not self.sigma >= 0:
            raise Mistake(f"smoothgrad: copies={self.copies} must be at least 1, sigma={self.sigma} at least 0")
        if self.aggregate not in AGGREGATES:
            raise Mistake(f"smoothgrad: aggregate={self.aggregate!r} must be one of {', '.join(AGGREGATES)}")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "smoothgrad")
        noise = self.sigma * torch.randn(self.copies, *x.shape[1:], generator=generator("smoothgrad", self.seed)).to(x)
        found = smoothgrad(answer, x.detach(), target, noise, self.aggregate)
        return Explanation(saliency(found if found.dim() > 2 else found[:, None]), {"gradient": found})
