"""Layer-wise relevance propagation: the score is shared out backwards, layer by layer, by rules that a person names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, final

from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.relevance import Relevance, Rules, named, relevance
from convince.kinds import Explainer
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="lrp",
    kind="explainer",
    title="On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation",
    year=2015,
    url="https://doi.org/10.1371/journal.pone.0130140",
    gradient="surrogate",
    departs=(
        "batch norms are folded into the layer before them, and the sum of two branches is shared out like a layer's; the paper's networks have neither",
        "normalised pixels keep the relevance of the network's input whole, the shift of the normalisation takes no share",
        "the rule may differ by kind of layer, with zB or w^2 at the pixels, as in later work of the same authors",
    ),
)

RULES = ("epsilon", "z", "z+", "alpha-beta")


def lrp(answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"], rules: Rules, low: float = 0.0, high: float = 1.0) -> Relevance:
    """Relevance of each pixel for its target's score, from the score itself backwards. The answer must be in eval mode.

    Sums to the score less what biases (epsilon, z, alpha-beta) and ``epsilon`` take. Raises Mistake for functions that have no rule (attention, gates).
    """
    return relevance(answer, x, target, rules, "lrp", low=low, high=high)


@final
@dataclass
class Lrp(Explainer):
    """The map is the relevance summed over channels, signed; ``images["relevance"]`` has it by channel.

    ``rule``: "epsilon", "z" (epsilon of 1e-9), "z+" or "alpha-beta" (``beta = alpha - 1``); ``conv`` and ``linear`` replace it for that kind of
    layer, ``first`` ("zB" for pixels between ``low`` and ``high``, or "w2") for layers that read the pixels. Positive relevance speaks for the class.
    """

    fast = False

    rule: str = "epsilon"
    conv: str | None = None
    linear: str | None = None
    first: str | None = None
    epsilon: float = 0.01
    alpha: float = 2.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        named(RULES, self.rule, "lrp: rule")
        for kind in ("conv", "linear"):
            if getattr(self, kind) is not None:
                named(RULES, getattr(self, kind), f"lrp: {kind}")
        if self.first is not None:
            named(("zB", "w2"), self.first, "lrp: first")
        if not self.epsilon >= 0:
            raise Mistake(f"lrp: epsilon={self.epsilon} must be at least 0; 1e-6 to 0.1 are usual")
        if not self.alpha >= 1:
            raise Mistake(f"lrp: alpha={self.alpha} must be at least 1 (1 leaves contributions below 0 out, 2 is usual); beta is alpha - 1")
        if not self.low < self.high:
            raise Mistake(f"lrp: low={self.low} must be below high={self.high}, the range of the input")

    @property
    def rules(self) -> Rules:
        conv, linear = (cast(Any, getattr(self, kind) or self.rule) for kind in ("conv", "linear"))
        return Rules(conv, linear, cast(Any, self.first), self.epsilon, self.alpha, self.alpha - 1)

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        found = lrp(answer, x, target, self.rules, self.low, self.high)
        shown = found.pixels if x.dim() > 2 else found.pixels[:, None]
        return Explanation(shown.sum(1, keepdim=True), {"relevance": found.pixels}, found.table())
