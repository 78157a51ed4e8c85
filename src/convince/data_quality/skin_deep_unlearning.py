"""Skin Deep Unlearning: the encoder learns the classes while a head that looks for a known nuisance in its features is made to fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.state import load_optimizer, optimizer_state
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="skin-deep-unlearning",
    kind="technique",
    paper="skin-deep-unlearning",
    title="Skin Deep Unlearning: Artefact and Instrument Debiasing in the Context of Melanoma Classification",
    year=2022,
    url="https://arxiv.org/abs/2109.09818",
    claims=("update",),
    mutes=("gradient",),
    expects=("nuisance", "network"),
    tiny={"aux_lr": 0.05, "confusion_lr": 0.05},
    departs=(
        "the run's optimiser moves encoder and head; the release uses SGD with momentum 0.9 and a rate of 3e-4 on a pretrained network",
        "confusion is towards equal probabilities; the release draws the targets anew from U(0, 1), as target='random' does",
        "without reversal (tabe) the second phase moves the auxiliary head alone; in the release it moves the encoder too, as faithful=True does",
        "the second pass moves no batch statistics; in the release both passes do",
        "the dropout of 0.5 before the head is left to the network",
    ),
)

METHODS = ("lntl", "tabe", "clgr")


# -- the terms -------------------------------------------------------------------------------------


@final
class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * grad, None


def grad_reverse(x: Tensor, scale: float = 0.1) -> Tensor:
    """``x`` itself; on the way back the gradient times ``-scale``."""
    return _Reverse.apply(x, scale)


def negative_entropy(scores: Float[Tensor, "n b"]) -> Tensor:
    """``mean_i sum_k p_ik ln p_ik``, p = softmax(scores): lowest, ``-ln b``, where all probabilities are equal (LNTL)."""
    return (scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()


def confusion_loss(scores: Float[Tensor, "n b"], target: Float[Tensor, "n b"] | None = None) -> Tensor:
    """``-mean_i sum_k u_ik ln p_ik``; ``u = 1 / b`` unless a target is given (TABE)."""
    logs = scores.log_softmax(1)
    return -(logs / scores.shape[1] if target is None else logs * target).sum(1).mean()


def inverse_frequency(b: Int[Tensor, " N"], kinds: int) -> Float[Tensor, " b"]:
    """Weights of the nuisance's values: one over how often each occurs, divided by their sum (-1 is not counted; what never occurs weighs 0)."""
    counts = torch.bincount(b[b >= 0], minlength=kinds).to(torch.get_default_dtype())
    rare = torch.where(counts > 0, 1 / counts.clamp_min(1), 0.0)
    return rare / rare.sum().clamp_min(1e-12)


def bias_probe(train: Float[Tensor, "n d"], b: Int[Tensor, " n"], test: Float[Tensor, "m d"], b_test: Int[Tensor, " m"]) -> float:
    """How much of a nuisance frozen features give away: the accuracy, 0 to 1, of a fresh logistic regression on unseen rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train.double().cpu().numpy(), b.cpu().numpy())
    return float(model.score(test.double().cpu().numpy(), b_test.cpu().numpy()))


# -- the technique ---------------------------------------------------------------------------------


@final
class Heads(nn.ModuleList):
    """An auxiliary head for each nuisance, and the weights of its values."""

    def __init__(self, width: int, values: list[int], hidden: int) -> None:
        plain = [nn.Linear(width, b) if hidden == 0 else nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, b)) for b in values]
        super().__init__(plain)
        for i, b in enumerate(values):
            self.register_buffer(f"weight{i}", torch.ones(b))


@final
@dataclass
class SkinDeepUnlearning(Technique):
    """Two phases a step on ``data.extra["nuisance"]`` [N] or [N q] (whole numbers, -1: not known).

    Phase 1 trains encoder and head on the objective plus ``weight`` times :func:`negative_entropy` ("lntl") or
    :func:`confusion_loss` ("tabe", "clgr") of the auxiliary head; in the latter two a second optimiser moves the
    encoder once more. Phase 2 trains the auxiliary head to find the nuisance; with "lntl" and "clgr" the encoder
    learns the reverse of its gradient, times ``reversal``. ``method`` may name one method for each of q nuisances:
    "clgr+lntl". None stands for the paper's value: weight 0.01 (lntl) or 0.03, aux_lr 3e-4 (lntl) or 3e-3.
    ``hidden=0`` is a linear head.
    """

    method: str = "lntl"
    weight: float | None = None
    reversal: float = 0.1
    hidden: int = 128
    aux_lr: float | None = None
    confusion_lr: float | None = None
    target: str = "uniform"
    faithful: bool = False

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise Mistake(f"method={self.method!r}: must be one of {', '.join(METHODS)}, or several joined by '+', one a nuisance")
        for name in ("weight", "aux_lr", "confusion_lr"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise Mistake(f"{name}={value}: must be at least 0, or None for the paper's")
        if not self.reversal >= 0 or self.hidden < 0:
            raise Mistake(f"reversal={self.reversal}, hidden={self.hidden}: both must be at least 0 (the paper's are 0.1 and 128)")
        if self.target not in ("uniform", "random"):
            raise Mistake(f"target={self.target!r}: must be 'uniform' or 'random'")
        self._heads: Heads | None = None
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._names: dict[nn.Parameter, str] = {}
        self._kept: dict[str, Any] = {}

    @property
    def methods(self) -> list[str]:
        """One a nuisance."""
        return str(self.method).split("+")

    def on_start(self, run: Run) -> None:
        run.require("forward_features")
        b = nuisances(run.data.extra["nuisance"])
        if len(b) != len(run.data.y) or len(self.methods) not in (1, b.shape[1]):
            raise Mistake(f"nuisance: needs a row a sample and a method a column; it has shape {tuple(b.shape)}, and method={self.method!r}")
        rows = run.data.split.train
        values = [int(column.max()) + 1 for column in b.T]
        if min(values) < 2 or int(b.min()) < -1:
            raise Mistake(f"nuisance: each column needs the values 0, 1, ... (-1: not known), at least two of them; they span {b.min()}..{b.max()}")
        width = int(getattr(run.model, "head_hidden_size", None) or run.model.num_features)  # type: ignore[arg-type]
        heads = Heads(width, values, self.hidden)
        for i, kinds in enumerate(values):
            setattr(heads, f"weight{i}", inverse_frequency(b[rows, i], kinds))
        run.extra["unlearn"] = self._heads = heads
        self._optimizers, self._kept = {}, {}

    def on_loss(self, run: Run) -> None:
        """Phase 1: the term of each nuisance."""
        for i, (method, scores) in enumerate(self._scores(run, run.out.features, detach=False)):
            if method == "lntl":
                run.loss = run.loss + (0.01 if self.weight is None else self.weight) * negative_entropy(scores)
            else:
                target = torch.rand(scores.shape, generator=run.gen("unlearn", i)).to(scores) if self.target == "random" else None
                run.loss = run.loss + (0.03 if self.weight is None else self.weight) * confusion_loss(scores, target)

    def update(self, run: Run) -> None:
        """The step of phase 1, then phase 2: the loss of the auxiliary heads and their step."""
        assert run.optimizer is not None
        heads: Heads = run.extra["unlearn"]  # type: ignore[assignment]
        own = self._own(run)
        first = [(p, p.grad) for p in run.model.parameters()]
        for p in heads.parameters():
            p.grad = None  # phase 1 moves encoder and head alone
        run.optimizer.step()
        if "confusion" in own:
            own["confusion"].step()
        for p, _ in first:
            p.grad = None
        with run.still():
            out = run.forward(run.batch.x)
            b = nuisances(run.batch.extra["nuisance"])
            losses = [
                F.cross_entropy(scores, b[:, i], weight=getattr(heads, f"weight{i}").to(scores), ignore_index=-1)
                for i, (_, scores) in enumerate(self._scores(run, out.features, detach=True))
                if bool((b[:, i] >= 0).any())
            ]
        if any(loss.requires_grad for loss in losses):  # a stage may freeze encoder and heads
            sum(losses, torch.zeros((), device=b.device)).backward()
            run.processes.average([*run.model.parameters(), *heads.parameters()], run.share)
            kept = [(p, p.grad) for p in heads.parameters()]
            own["aux"].step()
            for p in heads.parameters():
                p.grad = None
            if any(p.grad is not None for p, _ in first):
                run.optimizer.step()
            for p, grad in kept:
                p.grad = grad
        for p, grad in first:
            p.grad = grad

    def _scores(self, run: Run, features: Tensor | None, *, detach: bool) -> list[tuple[str, Tensor]]:
        """Method and scores of each nuisance; in phase 2 the features are reversed, detached, or (faithful) as they are."""
        heads: Heads = run.extra["unlearn"]  # type: ignore[assignment]
        methods = self.methods * (len(heads) if len(self.methods) == 1 else 1)
        with run.plan.autocast():
            x = run.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
            rows = []
            for method, head in zip(methods, heads, strict=True):
                seen = x
                if detach:
                    seen = grad_reverse(x, self.reversal) if method != "tabe" else x if self.faithful else x.detach()
                rows.append((method, full(head(seen))))
        return rows

    def _own(self, run: Run) -> dict[str, torch.optim.Optimizer]:
        """The auxiliary optimiser and (tabe, clgr) the confusion optimiser of the encoder; their rates follow the run's schedule."""
        heads: Heads = run.extra["unlearn"]  # type: ignore[assignment]
        lntl = set(self.methods) == {"lntl"}
        if not self._optimizers:
            rates = {"aux": (3e-4 if lntl else 3e-3) if self.aux_lr is None else self.aux_lr}
            params = {"aux": [(f"aux.{n}", p) for n, p in heads.named_parameters()]}
            if not lntl:
                two = len(heads) > 1
                rates["confusion"] = (3e-4 if two else 3e-3) if self.confusion_lr is None else self.confusion_lr
                top = {id(p) for p in run.model.get_classifier().parameters()} if hasattr(run.model, "get_classifier") else set()  # type: ignore[operator]
                params["confusion"] = [(n, p) for n, p in run.model.named_parameters() if id(p) not in top]
            for name, rate in rates.items():
                made: torch.optim.Optimizer = torch.optim.SGD([p for _, p in params[name]], lr=rate, momentum=0.9)
                self._names |= {p: n for n, p in params[name]}
                if name in self._kept:
                    load_optimizer(made, self._names, self._kept[name])
                made.param_groups[0]["initial_lr"] = rate
                self._optimizers[name] = made
        assert run.optimizer is not None
        group = run.optimizer.param_groups[0]
        for made in self._optimizers.values():
            made.param_groups[0]["lr"] = made.param_groups[0]["initial_lr"] * (group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0)
        return self._optimizers

    def state(self) -> dict[str, Any]:
        return {name: optimizer_state(made, self._names) for name, made in self._optimizers.items()} or self._kept

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self._optimizers, self._kept = {}, state


def nuisances(b: Int[Tensor, " N"] | Int[Tensor, "N q"]) -> Int[Tensor, "N q"]:
    """Nuisance labels, one column each."""
    if b.is_floating_point() or b.dim() not in (1, 2):
        raise Mistake(f"nuisance: must be whole numbers [N] or [N q], -1 where not known; it is {b.dtype} of shape {tuple(b.shape)}")
    return b[:, None] if b.dim() == 1 else b
