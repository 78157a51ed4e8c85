"""DiversityPathologies: does pushing members to disagree help? A sweep of the diversity term over weak and strong networks."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict, dataclass
from typing import Any, final

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from convince.ensemble.diversity_regularised_ensemble import DIVERSITIES, check_diversity
from convince.errors import Mistake
from convince.kinds import Study
from convince.parts import Card, spell
from convince.types import Budget

CARD = Card(
    part="diversity-pathologies",
    kind="study",
    paper="diversity-pathologies",
    title="Pathologies of Predictive Diversity in Deep Ensembles",
    year=2023,
    url="https://arxiv.org/abs/2302.00704",
    departs=(
        "two small networks and one data set by default; the paper trains ResNet 8 and 18 and VGG 11 and more on CIFAR and TinyImageNet",
        "bagging, label noise and mixed architectures are left to other parts; only the four terms of the loss are swept",
    ),
    tiny={"gammas": (0.0, 1.0), "members": 2, "seeds": 1},
)


def ensemble_report(probs: Float[Tensor, "m n k"], y: Int[Tensor, " n"]) -> dict[str, float]:
    """Quality and diversity of members' probabilities together, means over rows.

    ``member_nll``, ``ensemble_nll`` [nats], ``member_error``, ``ensemble_error`` (shares), each diversity of
    :data:`DIVERSITIES`, and ``disagreement``: share of rows on which two members differ, mean over pairs.
    ``ensemble_nll = member_nll - jensen_gap`` exactly.
    """
    logits = probs.double().clamp_min(1e-30).log()
    target = F.one_hot(y, probs.shape[2]).to(logits)
    mean = probs.double().mean(0)
    guesses = probs.argmax(2)
    pairs = [float((a != b).double().mean()) for a, b in itertools.combinations(guesses, 2)]
    nll = -(logits * target).sum(2)
    return {
        "member_nll": float(nll.mean()),
        "ensemble_nll": float(-(mean.clamp_min(1e-30).log() * target).sum(1).mean()),
        "member_error": float((guesses != y).double().mean()),
        "ensemble_error": float((mean.argmax(1) != y).double().mean()),
        **{name: float(diversity(logits, target).mean()) for name, diversity in DIVERSITIES.items()},
        "disagreement": statistics.fmean(pairs) if pairs else 0.0,
    }


@final
@dataclass
class DiversityPathologies(Study):
    """Trains ensembles at every ``gamma`` for each of ``models`` and prints errors and diversity.

    ``data``: a built-in set, folder or table whose test part is used as it is; ``models``: a weak network first, a strong one last.
    """

    data: str = "digits"
    models: tuple[str, ...] = ("small-cnn:widths=(4,8)", "small-cnn:widths=(32,64)")
    gammas: tuple[float, ...] = (-0.5, -0.1, 0.0, 0.1, 0.5, 1.0)
    diversity: str = "jensen_gap"
    members: int = 4
    seeds: int = 2
    batch: int = 32
    lr: float = 0.05

    def __post_init__(self) -> None:
        check_diversity(self.diversity)
        if self.members < 2:
            raise Mistake(f"diversity-pathologies: members={self.members}: an ensemble needs at least 2 networks")

    def run(self, budget: Budget) -> dict[str, Any]:
        """The table: one row a model and gamma, means over seeds. ``budget`` is that of one training (images of one member, steps or epochs)."""
        from convince.data import load
        from convince.ensemble.mcdnn import column_probs
        from convince.fit.settings import settings
        from convince.fit.train import train

        if budget.unit not in ("images", "steps", "epochs"):
            raise Mistake(f"diversity-pathologies: a budget in {budget.unit} does not fit; give images, steps or epochs of one training")
        length = {"epochs": max(round(budget.value), 1)} if budget.unit == "epochs" else {"steps": max(round(budget.value), 1)}
        if budget.unit == "images":
            length = {"steps": max(round(budget.value / self.batch), 1)}
        table = []
        for model, gamma in itertools.product(self.models, self.gammas):
            found = []
            for seed in range(self.seeds):
                data = load(self.data, val=0.0, seed=seed)
                part = spell("diversity-regularised-ensemble", {"members": self.members, "gamma": gamma, "diversity": self.diversity})
                fixed = {"model": model, "augment": "none", "batch": self.batch, "lr": self.lr, "seed": seed}
                found.append(ensemble_report(*column_probs(train(settings(parts=(part,), **fixed, **length), data).run, "test")))
            table.append({"model": model, "gamma": gamma, **{name: statistics.fmean(row[name] for row in found) for name in found[0]}, "n": self.seeds})
        print(self._page(table))
        return {**asdict(self), "models": list(self.models), "gammas": list(self.gammas), "budget": asdict(budget), "table": table}

    def _page(self, table: list[dict[str, Any]]) -> str:
        lines = [f"{self.members} members, diversity {self.diversity}, {self.data}, {self.seeds} seed(s); error [%], NLL and diversity [nats]"]
        lines.append(f"{'model':<28}{'gamma':>7}{'member':>9}{'ensemble':>10}{'NLL':>8}{self.diversity:>13}{'disagree':>10}")
        for row in table:
            errors = f"{100 * row['member_error']:>9.2f}{100 * row['ensemble_error']:>10.2f}{row['ensemble_nll']:>8.3f}"
            lines.append(f"{row['model']:<28}{row['gamma']:>7g}{errors}{row[self.diversity]:>13.4f}{100 * row['disagreement']:>9.1f}%")
        return "\n".join(lines)
