"""L2-SVM: train a network's linear head as a one-versus-rest support vector machine, with squared hinge loss and a weight penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Batch, Out

CARD = Card(
    part="l2svm",
    kind="technique",
    title="An Architecture Combining Convolutional Neural Network (CNN) and Support Vector Machine (SVM) for Image Classification",
    paper="cnn-svm",
    year=2017,
    url="https://arxiv.org/abs/1712.03541",
    claims=("objective",),
    mutes=("loss",),
    expects=("labels", "logits"),
    departs=(
        "form='released' is the default: means where the paper's eq. writes sums, which shrinks the head's weights far less; form='paper' is the equation",
        "the class with the highest score is the answer; the released accuracy takes the sign first, so that ties go to low classes",
        "a mixed label y_k counts as class k with weight y_k and as the rest with what is left; for plain labels this is the paper's t in {-1, +1}",
        "scores are margins: their softmax, which log_loss and ece are measured on, is no calibrated probability; temperature() finds the scale",
    ),
)

FORMS = ("released", "paper")


def squared_hinge(scores: Float[Tensor, "n k"], y: Float[Tensor, "n k"], hinge: str = "l2") -> Float[Tensor, "n k"]:
    """``max(0, 1 - t s)^2`` of each score, ``t = +1`` at the true class and ``-1`` elsewhere; ``hinge="l1"`` without the square.

    Rows of ``y`` are class weights: ``y_k max(0, 1 - s_k)^2 + (sum(y) - y_k) max(0, 1 + s_k)^2``. A row without label is 0.
    """
    power = 2 if hinge == "l2" else 1
    rest = y.sum(1, keepdim=True) - y
    return y * (1 - scores).clamp_min(0) ** power + rest * (1 + scores).clamp_min(0) ** power


def l2svm_loss(scores: Float[Tensor, "n k"], y: Float[Tensor, "n k"], C: float = 1.0, reduction: str = "mean", hinge: str = "l2") -> Tensor:
    """``C`` times :func:`squared_hinge`: its mean over rows and classes ("mean"), its sum, or [n k] ("none"). The penalty is :func:`penalty`."""
    losses = C * squared_hinge(scores, y, hinge)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def penalty(weight: Tensor, form: str = "released") -> Tensor:
    """What belongs beside the hinge: ``mean(W^2)`` with its mean ("released"), ``||W||^2 / 2`` with its sum ("paper"). The bias is left out."""
    return weight.square().mean() if form == "released" else weight.square().sum() / 2


def temperature(scores: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> float:
    """The T whose ``softmax(scores / T)`` has the least log-loss on held-out rows with class numbers ``y``; 0.001 to 1000."""
    z = scores.detach().double()
    found = minimize_scalar(lambda log10: float(F.cross_entropy(z / 10**log10, y)), bounds=(-3, 3), method="bounded", options={"xatol": 1e-6})
    return float(10**found.x)


@final
class SVMHead(nn.Linear):
    """A linear head with its own objective: ``head(features)`` are scores [n k], ``head.objective(scores, y)`` is hinge and penalty in one ``form``."""

    def __init__(self, in_features: int, n_classes: int, C: float = 1.0, form: Literal["released", "paper"] = "released") -> None:
        super().__init__(in_features, n_classes)
        _check(C, form, "l2")
        self.C, self.form = C, form

    def penalty(self) -> Tensor:
        """:func:`penalty` of the weights."""
        return penalty(self.weight, self.form)

    def objective(self, scores: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Tensor:
        """Penalty plus ``C`` times hinge, both as means ("released") or both as sums ("paper")."""
        return self.penalty() + l2svm_loss(scores, y, self.C, "mean" if self.form == "released" else "sum")


@final
@dataclass
class L2SVM(Technique):
    """Train the network's head as an SVM: ``penalty(W) + C hinge``, ``W`` the head's weights, in place of cross-entropy.

    ``C`` weighs the hinge against the penalty; ``form``: "released" takes the means of both, "paper" half the squared norm
    and the sum over the batch (a much larger loss: lower ``--lr``, or set C below 1); ``hinge`` "l2" or "l1". The answer's scores
    are margins: compare accuracies, not log-losses, or scale them by :func:`temperature` first.
    """

    C: float = 1.0
    form: str = "released"
    hinge: str = "l2"

    def __post_init__(self) -> None:
        _check(self.C, self.form, self.hinge)

    def on_start(self, run: Run) -> None:
        head_weight(run.model, str(run.settings.model))

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        assert out.logits is not None
        assert batch.y is not None
        losses = l2svm_loss(out.logits, batch.y, self.C, "none", self.hinge)
        rows = losses.mean(1) if self.form == "released" else losses.sum(1) * len(losses) / run.share  # the mean over rows below undoes the factor
        data = rows.mean() if batch.weight is None else (rows * batch.weight).mean()
        return penalty(head_weight(run.model), self.form) + data


def head_weight(model: nn.Module, name: str = "") -> Tensor:
    """The weights of the network's last layer, found by ``get_classifier``; a Mistake where there is none."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise Mistake(
            f"l2svm: the network {name!r} has no single linear head to penalise (get_classifier() with a weight); choose another --model, e.g. resnet20"
        )
    return weight


def _check(C: float, form: str, hinge: str) -> None:
    if not 0 < C < torch.inf:
        raise Mistake(f"l2svm: C={C}: must be a positive number; 1 is the paper's, more weighs errors higher")
    if form not in FORMS:
        raise Mistake(f"l2svm: form={form!r}: must be 'released' (means) or 'paper' (sums)")
    if hinge not in ("l1", "l2"):
        raise Mistake(f"l2svm: hinge={hinge!r}: must be 'l2' (squared, the paper's) or 'l1'")
