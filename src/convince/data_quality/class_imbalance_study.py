"""Class imbalance study: how unequal class sizes harm a network, and which cure works, as one table."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from convince.errors import Mistake
from convince.kinds import Study
from convince.parts import Card
from convince.types import Budget

CARD = Card(
    part="class-imbalance-study",
    kind="study",
    paper="class-imbalance-study",
    title="A systematic study of the class imbalance problem in convolutional neural networks",
    year=2018,
    url="https://arxiv.org/abs/1710.05381",
    departs=(
        "one small network and one data set a call; the paper uses LeNet-5, All-CNN and ResNet-10 on MNIST, CIFAR-10 and ImageNet",
        "every method gets the same number of steps; the paper trains each to the end of its own schedule",
        "cost-sensitive and focal are rows that the paper does not measure",
    ),
    tiny={"rhos": (5.0,), "seeds": 1, "methods": ("none", "threshold")},
)

METHODS = {
    "none": (),
    "oversample": ("oversampling",),
    "undersample": ("undersampling",),
    "two-phase over": ("two-phase",),
    "two-phase under": ("two-phase:pre=under",),
    "threshold": ("prior-thresholding",),
    "oversample + threshold": ("oversampling", "prior-thresholding"),
    "undersample + threshold": ("undersampling", "prior-thresholding"),
    "cost-sensitive": ("cost-sensitive",),
    "focal": ("focal-loss",),
}


class Imbalance(NamedTuple):
    """``rho``: the largest class over the smallest; ``mu``: the share of classes below the middle of the two sizes."""

    rho: float
    mu: float


def measure_imbalance(y: Int[Tensor, " n"]) -> Imbalance:
    """The imbalance of labels ``y`` (-1 is left out), among the classes that have a sample."""
    counts = torch.bincount(y[y >= 0])
    counts = counts[counts > 0].double()
    if not len(counts):
        raise Mistake("y: holds no label")
    low, high = float(counts.min()), float(counts.max())
    return Imbalance(high / low, float((counts < (low + high) / 2).double().mean()))


def class_sizes(kind: str, rho: float, mu: float, majority: int, k: int) -> list[int]:
    """Sizes of ``k`` classes, the small ones first.

    "step": ``round(mu * k)`` classes of ``majority / rho``, the others of ``majority``. "linear": from
    ``majority / rho`` to ``majority`` in equal steps, whatever ``mu``. At least one sample a class.
    """
    if kind not in ("step", "linear"):
        raise Mistake(f"kind={kind!r}: must be 'step' or 'linear'")
    if not rho >= 1 or not 0 <= mu <= 1:
        raise Mistake(f"rho={rho}, mu={mu}: rho (largest over smallest class) is at least 1, mu (share of small classes) lies in 0 to 1")
    if kind == "step":
        small = round(mu * k)
        return [max(round(majority / rho), 1)] * small + [majority] * (k - small)
    low = majority / rho
    return [max(round(low + (majority - low) * i / max(k - 1, 1)), 1) for i in range(k)]


def make_imbalance(y: Int[Tensor, " n"], kind: str, rho: float, mu: float, gen: Generator, majority: int | None = None) -> Int[Tensor, " m"]:
    """Positions, ascending, of a random part of ``y`` with :func:`class_sizes`; which classes are small is random too.

    ``majority``: size of the large classes; None takes that of the smallest class of ``y``.
    """
    counts = torch.bincount(y[y >= 0])
    if not len(counts) or bool((counts == 0).any()):
        raise Mistake("y: every class needs a sample before the classes are made unequal")
    majority = int(counts.min()) if majority is None else majority
    sizes = class_sizes(kind, rho, mu, majority, len(counts))
    kept = []
    for c, size in zip(torch.randperm(len(counts), generator=gen).tolist(), sizes, strict=True):
        own = (y == c).nonzero()[:, 0]
        if size > len(own):
            raise Mistake(f"majority={majority}: class {c} has only {len(own)} samples")
        kept.append(own[torch.randperm(len(own), generator=gen)[:size]])
    return torch.cat(kept).sort().values


def multiclass_auc(probs: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> float:
    """Mean over classes of the area under the one-versus-rest ROC curve; classes without a test sample are left out."""
    from sklearn.metrics import roc_auc_score

    present = [c for c in range(probs.shape[1]) if 0 < int((y == c).sum()) < len(y)]
    if not present:
        raise Mistake("y: at least two classes are needed for a ROC curve")
    return statistics.fmean(float(roc_auc_score((y == c).numpy(), probs[:, c].numpy())) for c in present)


def balanced_accuracy(predicted: Int[Tensor, " n"], y: Int[Tensor, " n"]) -> float:
    """Mean over classes of the share of their samples that are answered right, 0 to 1."""
    return statistics.fmean(float((predicted[y == c] == c).double().mean()) for c in y.unique().tolist())


@final
@dataclass
class ClassImbalanceStudy(Study):
    """Trains every method on the same imbalanced sets and prints AUC and accuracy, by ``rho``.

    ``kind``: "step" or "linear". ``data``: a built-in set, folder or table; its test part is used as it is. ``methods``: names of
    :data:`METHODS`, None for all. Which classes are small varies with the seed.
    """

    data: str = "digits"
    model: str = "small-cnn:widths=(16,32)"
    kind: str = "step"
    rhos: tuple[float, ...] = (10.0, 50.0)
    mu: float = 0.5
    seeds: int = 2
    methods: tuple[str, ...] | None = None
    batch: int = 32
    lr: float = 0.05

    def run(self, budget: Budget) -> dict[str, Any]:
        """The table: one row a method and rho, means over seeds. ``budget`` is that of one training (images, steps or epochs)."""
        from convince.data import load
        from convince.fit.randomness import generator
        from convince.fit.settings import settings
        from convince.fit.train import train

        methods = tuple(METHODS) if self.methods is None else self.methods
        for name in methods:
            if name not in METHODS:
                raise Mistake(f"methods: {name!r} is none of {', '.join(METHODS)}")
        whole = load(self.data, val=0.0, seed=0)
        rows = whole.split.train[whole.y[whole.split.train] >= 0]
        table = []
        for rho in self.rhos:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
            for seed in range(self.seeds):
                kept = make_imbalance(whole.y[rows], self.kind, rho, self.mu, generator(seed, "class-imbalance-study", self.kind))
                data = whole.subset(rows[kept])
                per_epoch = max(len(kept) // self.batch, 1)
                steps = self._steps(budget, per_epoch)
                for name in methods:
                    length = same_steps(steps, data.y[data.split.train], METHODS[name], self.batch)
                    fixed = {"model": self.model, "augment": "none", "batch": self.batch, "lr": self.lr, "seed": seed}
                    scores = train(settings(parts=METHODS[name], **fixed, **length), data).test
                    if scores is None:
                        raise Mistake(f"{self.data}: has no test part to measure on")
                    found[name].append({"auc": multiclass_auc(scores.probs, scores.y), "accuracy": balanced_accuracy(scores.predicted, scores.y)})
            for name in methods:
                means = {metric: statistics.fmean(row[metric] for row in found[name]) for metric in ("auc", "accuracy")}
                table.append({"method": name, "rho": rho, **means, "n": self.seeds})
        print(self._page(table))
        return {**asdict(self), "methods": list(methods), "budget": asdict(budget), "table": table}

    def _steps(self, budget: Budget, per_epoch: int) -> int:
        per = {"steps": 1.0, "images": 1 / self.batch, "epochs": float(per_epoch)}.get(budget.unit)
        if per is None:
            raise Mistake(f"a budget in {budget.unit} does not fit this study; give images, steps or epochs of one training")
        return max(round(budget.value * per), 1)

    def _page(self, table: list[dict[str, Any]]) -> str:
        lines = [f"{self.kind} imbalance, mu {self.mu:g}: {self.data}, {self.model}, {self.seeds} seed(s)"]
        lines.append(f"{'method':<24}" + "".join(f"  rho {rho:>3g}: AUC  acc.%" for rho in self.rhos))
        for name in dict.fromkeys(row["method"] for row in table):
            cells = [row for row in table if row["method"] == name]
            lines.append(f"{name:<24}" + "".join(f"  {row['auc']:>12.4f}  {100 * row['accuracy']:>5.1f}" for row in cells))
        return "\n".join(lines)


def same_steps(steps: int, y: Int[Tensor, " n"], parts: tuple[str, ...], batch: int) -> dict[str, int]:
    """Settings under which a training on labels ``y`` makes this many steps, also where undersampling shortens its epochs.

    Undersampled epochs are counted whole, so there the number is rounded up to full epochs.
    """
    if "undersampling" not in parts:
        return {"steps": steps}
    counts = torch.bincount(y[y >= 0])
    rows = int(counts[counts > 0].min()) * int((counts > 0).sum())
    return {"epochs": -(-steps // max(rows // batch, 1))}
