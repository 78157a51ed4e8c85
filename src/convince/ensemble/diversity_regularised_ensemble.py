"""DiversityRegularisedEnsemble: members trained together, pushed to disagree or to agree by a term of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.ensemble.deep_ensemble import MeanAnswer, mean_scores, network_of
from convince.ensemble.gb_cnn import rebuilt
from convince.errors import Mistake, nearest
from convince.fit.answer import Answer
from convince.fit.precision import full
from convince.fit.randomness import key
from convince.fit.run import Run, rebuilder
from convince.fit.technique import Technique
from convince.fit.weights import build_by_name, edit_by_name
from convince.parts import Card
from convince.types import Batch, Out

CARD = Card(
    part="diversity-regularised-ensemble",
    kind="technique",
    paper="diversity-pathologies",
    title="Pathologies of Predictive Diversity in Deep Ensembles",
    year=2023,
    url="https://arxiv.org/abs/2302.00704",
    departs=(
        "the loss is the sum over members, not their mean, so that each member has the learning rate of a network trained alone",
        "one_vs_all is the mean divergence KL of each member from the mean of the others; the paper's exact form was not at hand",
        "the default strength is a mild encouragement; the paper sweeps it from discouragement to encouragement (the study diversity-pathologies does)",
        "terms that other parts add to the loss, and what they prune or pretrain, reach this run's own network only",
    ),
    claims=("objective", "answer"),
    mutes=("loss",),
    expects=("labels",),
    strength="members",
    off=1,
    tiny={"members": 2, "gamma": 0.5},
)


def log_probs(logits: Float[Tensor, "m n k"]) -> tuple[Float[Tensor, "m n k"], Float[Tensor, "n k"]]:
    """``log p_i`` of each member and ``log pbar`` of the mean probability."""
    return logits.log_softmax(-1), mean_scores(logits).log_softmax(-1)


def variance(logits: Float[Tensor, "m n k"], y: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """``(1/M) sum_i |p_i - pbar|^2`` of each row; ``y`` is not used."""
    p = logits.softmax(-1)
    return (p - p.mean(0)).square().sum(-1).mean(0)


def jensen_gap(logits: Float[Tensor, "m n k"], y: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """``(1/M) sum_i CE(p_i, y) - CE(pbar, y)`` [nats] of each row: what averaging probabilities gains."""
    each, mean = log_probs(logits)
    return (y * (mean - each.mean(0))).sum(-1)


def jsd_uniform(logits: Float[Tensor, "m n k"], y: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """``H(pbar) - (1/M) sum_i H(p_i)`` [nats] of each row, the Jensen-Shannon divergence; ``y`` is not used."""
    each, mean = log_probs(logits)
    return (each.exp() * each).sum(-1).mean(0) - (mean.exp() * mean).sum(-1)


def one_vs_all(logits: Float[Tensor, "m n k"], y: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """``(1/M) sum_i KL(p_i || mean of the other p_j)`` [nats] of each row; ``y`` is not used. 0 for a single member."""
    m = len(logits)
    if m == 1:
        return torch.zeros_like(logits[0, :, 0])
    each = logits.log_softmax(-1)
    others = torch.stack([mean_scores(torch.cat([logits[:i], logits[i + 1 :]])) for i in range(m)])
    return (each.exp() * (each - others)).sum(-1).mean(0)


DIVERSITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "variance": variance,
    "jensen_gap": jensen_gap,
    "jsd_uniform": jsd_uniform,
    "one_vs_all": one_vs_all,
}


def joint_ensemble_loss(logits: Float[Tensor, "m n k"], y: Float[Tensor, "n k"], gamma: float, diversity: str = "jensen_gap") -> Float[Tensor, " n"]:
    """``(1/M) sum_i CE(p_i, y) - gamma D`` of each row (eq. 3); ``gamma > 0`` encourages diversity, ``< 0`` discourages it.

    With the Jensen gap and ``gamma = 1`` it is the cross-entropy of the mean probability. Raises Mistake for an unknown ``diversity``.
    """
    losses = torch.stack([F.cross_entropy(each, y, reduction="none") for each in logits]).mean(0)
    return losses - gamma * DIVERSITIES[check_diversity(diversity)](logits, y) if gamma else losses


def check_diversity(name: str) -> str:
    """Return ``name``, or raise a Mistake that names the four known."""
    if name not in DIVERSITIES:
        raise Mistake(f"diversity={name!r} is not known{nearest(str(name), list(DIVERSITIES))} Choose one of {', '.join(DIVERSITIES)}")
    return name


@final
@dataclass
class DiversityRegularisedEnsemble(Technique):
    """This network and ``members - 1`` more of its kind on the same batches, with the loss ``M *`` :func:`joint_ensemble_loss`.

    The answer is the mean of their probabilities. ``gamma=0`` trains them independently; ``members=1`` is off.
    """

    members: int = 4
    gamma: float = 0.1
    diversity: str = "jensen_gap"
    rank = 95  # the members are copies of the network as other parts have edited it

    def __post_init__(self) -> None:
        if self.members < 1:
            raise Mistake(f"diversity-regularised-ensemble: members={self.members}: at least 1 network (1 is off); 4 is the paper's")
        check_diversity(self.diversity)
        self.nets: list[nn.Module] = []
        self.edits = 0

    def on_start(self, run: Run) -> None:
        self.nets, self.edits = [], len(run.edits)
        for i in range(1, self.members):
            seed = key(run.seed, "diversity-regularised-ensemble", i)
            net = build_by_name(run.build, seed)
            for edit in run.edits:
                edit_by_name(net, lambda model, edit=edit: rebuilder(edit["part"])(model, **edit["spec"]), seed)  # type: ignore[misc]
            self.nets.append(run.plan.place(net))
        if self.nets:
            run.extra["members"] = nn.ModuleList(self.nets)

    def each(self, run: Run, out: Out, x: Tensor) -> Float[Tensor, "m n k"]:
        """Scores of all members for the batch's pixels; those of this network are taken from THE pass."""
        scores = [out.logits]
        for net in self.nets:
            run.images += round(len(x) / run.share)
            with run.plan.autocast():
                scores.append(full(net(run.normalise(x))))
        return torch.stack(scores)  # type: ignore[arg-type]

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        assert out.logits is not None
        assert batch.y is not None
        if not self.nets:
            losses = F.cross_entropy(out.logits, batch.y, reduction="none")
        else:
            losses = self.members * joint_ensemble_loss(self.each(run, out, batch.x), batch.y, self.gamma, self.diversity)
        return losses.mean() if batch.weight is None else (losses * batch.weight).mean()

    def on_end(self, run: Run) -> None:
        if self.nets:
            run.processes.average_buffers(run.extra["members"])

    def answer(self, run: Run) -> nn.Module:
        return MeanAnswer([network_of(run), *(Answer(run.normalise, net) for net in self.nets)]) if self.nets else network_of(run)

    def state(self) -> dict[str, Any]:
        return {"edits": self.edits, "nets": [dict(net.state_dict()) for net in self.nets]} if self.nets else {}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        """A run under way has its members from ``run.extra``; a loaded one builds them."""
        if state and not self.nets:
            self.edits = state["edits"]
            self.nets = [rebuilt(run, self.edits, weights) for weights in state["nets"]]
