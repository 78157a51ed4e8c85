"""Metrics: what a comparison can be about, each with its unit and the direction that is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convince import parts
from convince.errors import Mistake, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convince.data import Data
    from convince.fit.answer import Scores
    from convince.fit.precision import Plan


@dataclass(frozen=True)
class Metric:
    """A number of an answer: its name as typed, its unit, and whether more is better."""

    name: str
    unit: str  # "share" (0 to 1), "nats", "bytes", "ms"
    higher: bool
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def sign(self) -> int:
        """+1 where more is better, else -1."""
        return 1 if self.higher else -1

    @property
    def margin(self) -> float:
        """The smallest default margin, in the metric's own unit: half a point for shares, nothing for what is counted."""
        return {"share": 0.005, "nats": 0.01}.get(self.unit, 0.0)


KNOWN = {
    "accuracy": Metric("accuracy", "share", True),
    "error": Metric("error", "share", False),
    "log-loss": Metric("log-loss", "nats", False),
    "ece": Metric("ece", "share", False),
    "f1": Metric("f1", "share", True),
    "auroc": Metric("auroc", "share", True),
    "robust-accuracy": Metric("robust-accuracy", "share", True, {"attack": "fgsm", "eps": 8 / 255, "norm": "inf", "images": 256}),
    "bytes": Metric("bytes", "bytes", False),
    "milliseconds": Metric("milliseconds", "ms", False, {"images": 64}),
    "insertion-auc": Metric("insertion-auc", "share", True, {"images": 64}),
    "deletion-auc": Metric("deletion-auc", "share", False, {"images": 64}),
}
OF_MAPS = ("insertion-auc", "deletion-auc")
OF_SCORES: dict[str, Callable[[Scores], float]] = {
    "accuracy": lambda s: s.accuracy,
    "error": lambda s: 1 - s.accuracy,
    "log-loss": lambda s: s.log_loss,
    "ece": lambda s: s.ece,
    "f1": lambda s: f1(s),
    "auroc": lambda s: auroc(s),
}


def metric(text: str) -> Metric:
    """``"accuracy"``, ``"robust-accuracy:attack=pgd,eps=4/255"`` -> :class:`Metric`; a wrong name or option is a Mistake."""
    name, options = parts.parse(text)
    if name not in KNOWN:
        raise Mistake(f"--metric {name}: no such metric{nearest(name, list(KNOWN))} Metrics: {', '.join(KNOWN)}")
    found = KNOWN[name]
    for key in options:
        if key not in found.options:
            have = ", ".join(found.options) or "none"
            raise Mistake(f"--metric {name}: no option {key!r}{nearest(key, list(found.options))} Options: {have}")
    return Metric(text, found.unit, found.higher, {**found.options, **options})


def f1(scores: Scores) -> float:
    """F1 of each class that is in the test part, unweighted mean (0 to 1)."""
    from convince.report.reckon import per_class

    rows = [row["f1"] for row in per_class(scores.confusion()) if row["n"]]
    return sum(row or 0.0 for row in rows) / max(len(rows), 1)


def auroc(scores: Scores) -> float:
    """Area under the ROC curve of each class against the others, unweighted mean; 0.5 where the test part has one class."""
    from sklearn.metrics import roc_auc_score

    y, probs = scores.y.numpy(), scores.probs.double().numpy()
    held = [c for c in range(probs.shape[1]) if 0 < (y == c).sum() < len(y)]
    return sum(float(roc_auc_score(y == c, probs[:, c])) for c in held) / len(held) if held else 0.5


def of_answer(wanted: Metric, answer: nn.Module, data: Data, rows: Tensor, plan: Plan) -> float:
    """A metric that asks the answer anew: bytes, milliseconds an image, or the accuracy under attack."""
    import torch

    name = parts.parse(wanted.name)[0]
    if name == "bytes":
        from convince.compress.quantisers import bytes_of

        return float(bytes_of(answer))
    x = plan.pixels(data.x.take(rows[: int(wanted.options["images"])]))
    if name == "milliseconds":
        from convince.compress.measuring import seconds

        return 1000 * seconds([answer], x, plan)[0]
    y = data.y[rows[: len(x)]].to(x.device)
    attack = parts.make(wanted.options["attack"])
    right = 0
    for part, true in zip(x.split(64), y.split(64), strict=True):
        changed = attack(answer, part, true, eps=wanted.options["eps"], norm=str(wanted.options["norm"]))
        with torch.no_grad():
            right += int(((answer(part).argmax(1) == true) & (answer(changed).argmax(1) == true)).sum())
    return right / max(len(x), 1)


def of_maps(wanted: Metric, explainer: str | None, answer: nn.Module, data: Data, rows: Tensor, plan: Plan, seed: int) -> float:
    """Faithfulness of an explainer's maps on test images; None explains by random maps."""
    import torch

    from convince.explain import faithfulness
    from convince.fit.randomness import generator

    measure = {"insertion-auc": faithfulness.insertion, "deletion-auc": faithfulness.deletion}[parts.parse(wanted.name)[0]]
    x = plan.pixels(data.x.take(rows[: int(wanted.options["images"])]))
    with torch.no_grad():
        target = answer(x).argmax(1)
    if explainer is None:
        maps = torch.rand(len(x), 1, *x.shape[2:], generator=generator(seed, "random maps")).to(x)
    else:
        name, options = parts.parse(explainer)
        found = parts.make(name, **options)(answer, x, target).map
        if found is None:
            raise Mistake(f"{explainer} gives no map, which {wanted.name} is measured on; compare another explainer")
        maps = torch.nn.functional.interpolate(found, x.shape[2:], mode="bilinear") if found.shape[2:] != x.shape[2:] else found
    return float(measure(answer, x, maps, target).double().mean())
