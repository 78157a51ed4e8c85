"""Balanced mixture: search where a network should pool, by several super-networks that share the placements between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from convince import parts
from convince.backbones.pool_net import default_placement, placements
from convince.errors import Mistake
from convince.kinds import Search
from convince.parts import Card
from convince.search.balanced_supernets import NAME, halves
from convince.search.lab import LOOKED_AT, Lab
from convince.search.space import Space

CARD = Card(
    part="balanced-mixture",
    kind="search",
    paper="balanced-mixture-supernets",
    title="Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture",
    year=2023,
    url="https://arxiv.org/abs/2306.11982",
    needs=("optuna",),
    departs=(
        "the super-networks are trained for as many epochs as the budget allows, by balanced-supernets, whose departures hold here too; the paper: 100",
        "they are judged on training images that are held out, as in the paper; the validation part is left to the random search beside it",
    ),
    tiny={"trial_epochs": 1, "channels": (4, 4, 6), "poolings": 1, "sets": 2, "look": 8},
)


def rank_quality(scores: Sequence[float], truth: Sequence[float]) -> float:
    """Kendall's tau-b between super-network scores and the accuracies of networks trained alone, -1 to 1; 0 where either is constant."""
    from scipy.stats import kendalltau

    return float(kendalltau(scores, truth).statistic) if len(set(scores)) > 1 and len(set(truth)) > 1 else 0.0


@final
@dataclass
class BalancedMixture(Search):
    """Train ``sets`` super-networks of blocks of ``channels`` over all placements of ``poolings``; the placement that the best set does best with is found.

    ``held`` is the share of training images to judge on, ``look`` how many of them in the end. ``trial_epochs`` is for the random search beside it.
    ``notes`` tell the accuracy of every placement on its best set.
    """

    trial_epochs: int = 4
    channels: Sequence[int] = (16, 16, 16, 32, 32, 32, 64, 64, 64)
    poolings: int = 2
    sets: int = 4
    held: float = 0.5
    look: int = 1000
    found: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    network: ClassVar[str] = "pool-net"

    def __post_init__(self) -> None:
        if not 0 < self.poolings < len(self.channels):
            raise Mistake(f"balanced-mixture: poolings={self.poolings}: must be at least 1 and fewer than the {len(self.channels)} blocks")
        parts.make(NAME, epochs=1, sets=self.sets, held=self.held, look=self.look)

    def space(self, data: Any) -> Space:
        """All placements."""
        side = min(data.preprocess.size)
        if side < 2**self.poolings:
            raise Mistake(f"balanced-mixture: {self.poolings} poolings need at least {2**self.poolings} pixels a side, and these images have {side}")
        places = [list(pools) for pools in placements(len(self.channels), self.poolings)]
        return Space({"pools": places}, lambda genes: {"channels": list(self.channels), "pools": genes["pools"]})

    def find(self, lab: Lab) -> dict[str, Any]:
        """The super-networks, trained and judged within the budget, and the best placement."""
        places = [genes["pools"] for genes in self.space(lab.data).all()]
        index = lab.data.split.train
        kept, held = (len(rows) for rows in halves(index[lab.data.y[index] >= 0], self.held, lab.seed))
        judging = len(places) * self.sets * min(self.look, held) * LOOKED_AT
        epoch = kept * (1 + LOOKED_AT)  # a batch is looked at after each that is trained on
        epochs = int((lab.left - judging) / epoch + 1e-6)
        if epochs < 1:
            raise Mistake(
                f"balanced-mixture: {len(places)} placements on {self.sets} sets take {judging:,.0f} images to judge and {epoch:,.0f} an epoch, and"
                f" {lab.left:,.0f} are left; give a larger --budget, or a smaller look"
            )
        how = {"epochs": epochs, "sets": self.sets, "held": self.held, "look": self.look}
        model = parts.spell(self.network, {"channels": list(self.channels), "pools": list(default_placement(len(self.channels), self.poolings))})

        def work() -> list[list[float]]:
            name = "supernets-" + "-".join(map(str, (*self.channels, self.poolings, *how.values())))
            mixture: Any = lab.run(model, name=name, parts=(parts.spell(NAME, how),), pretrain_only=True).extra[NAME]
            return mixture.accuracies.double().tolist()

        seen = lab.keep([NAME, model, how], judging + epochs * epoch, work)
        best = [max(row) for row in seen]
        order = sorted(range(len(places)), key=lambda c: -best[c])
        self.found = {
            "supernet_epochs": epochs,
            "placements": [{"pools": places[c], "accuracy": best[c], "set": seen[c].index(best[c])} for c in order],
        }
        lab.say(f"{epochs} epochs of {self.sets} super-networks: poolings before {places[order[0]]} come to {best[order[0]]:.1%} on images held out")
        return {"channels": list(self.channels), "pools": places[order[0]]}

    def notes(self) -> dict[str, Any]:
        """The accuracy of every placement on held-out training images with its best set's weights, the best first."""
        return self.found
