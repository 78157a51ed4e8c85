"""Deep Taylor decomposition: the score of a ReLU network goes back by Taylor expansions at chosen roots; relevance is positive and its sum is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.relevance import Relevance, Rules, named, relevance
from convince.kinds import Explainer
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="deep-taylor",
    kind="explainer",
    paper="deep-taylor",
    title="Explaining NonLinear Classification Decisions with Deep Taylor Decomposition",
    year=2017,
    url="https://doi.org/10.1016/j.patcog.2016.11.008",
    gradient="surrogate",
    departs=(
        "a hidden value below 0 (no ReLU behind it) counts with its negative weights, and is put down to what lowered it; the paper's are never below 0",
        "batch norms are folded into the layer before them, and a sum of branches is shared out by z+; the paper's networks have neither",
        "the relevance model is the training-free one; the paper's trained min-max model is not built",
    ),
)


def deep_taylor(
    answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"], input_rule: str = "zB", low: float = 0.0, high: float = 1.0
) -> Relevance:
    """``max(0, score)`` of each row's target, decomposed to the pixels: z+ inside, zB (pixels in ``[low, high]``) or w^2 at the input.

    Rows whose score is not above 0 get no relevance: there is nothing to decompose. The answer must be in eval mode and its units ReLUs.
    """
    return relevance(answer, x, target, Rules("z+", "z+", cast(Any, input_rule), only_relu=True), "deep-taylor", low=low, high=high, positive=True)


@torch.no_grad()
def nonpositive_bias_(model: nn.Module) -> None:
    """Clamp the biases of convolutions and linear layers to at most 0 in place; call it after each optimiser step.

    Then a root point exists for each unit, and an image of zeros has score 0 or less. Refuses batch norms, whose folded shift it would not bound.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise Mistake(f"deep-taylor: {name} is a batch norm, whose shift is a bias of either sign; keep biases at most 0 in a network without one")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is not None:
            module.bias.clamp_(max=0)


@final
@dataclass
class DeepTaylor(Explainer):
    """The map is the relevance summed over channels, never negative; ``images["relevance"]`` has it by channel.

    ``input_rule``: "zB" for pixels between ``low`` and ``high``, "w2" where any value can come. The table has the mean of ``|sum R - f| / f``
    ("conservation gap") and how many units had relevance and no positive input to give it to ("dead units"): what they held is lost.
    """

    fast = False

    input_rule: str = "zB"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        named(("zB", "w2"), self.input_rule, "deep-taylor: input_rule")
        if not self.low < self.high:
            raise Mistake(f"deep-taylor: low={self.low} must be below high={self.high}, the range of the input")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        found = deep_taylor(answer, x, target, self.input_rule, self.low, self.high)
        shown = found.pixels if x.dim() > 2 else found.pixels[:, None]
        return Explanation(shown.sum(1, keepdim=True), {"relevance": found.pixels}, {**found.table(), "least relevance": float(found.pixels.min())})
