"""Prototype loss: keeps the codes of a prototype network readable, and its prototypes among the training images; then tells which cases it decides by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.backbones.prototype_net import PrototypeNet, squared_distances
from convince.errors import Mistake
from convince.fit.loop import soft_cross_entropy
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Bars, Batch, Figure, Out, Plane, Reading

CARD = Card(
    part="prototype-loss",
    kind="technique",
    paper="prototype-case-based",
    title="Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network that Explains Its Predictions",
    year=2017,
    url="https://arxiv.org/abs/1710.04806",
    claims=("objective",),
    mutes=("selfie",),  # which hands the network patches, and a prototype network takes images of one size
    expects=("images", "labels", "logits", "network"),
    host="prototype-net:widths=(4,4),prototypes=3",
    departs=(
        "no elastic deformation of its own, which the paper has in every batch; add simard-distortion for it",
        "the batch, the epochs and the augmentation are the run's; the paper has 250 images and 1,500 epochs",
        "images are rebuilt as they are after augmentation, pixels from 0 to 1",
    ),
)


# -- the error -----------------------------------------------------------------------------------------


def reconstruction(x: Float[Tensor, "n c h w"], rebuilt: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """``R``: the sum of squared differences over an image's pixels, mean over images."""
    return (rebuilt - x).square().flatten(1).sum(1).mean()


def near_an_example(distances: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """``R1``: the squared distance of each prototype to the nearest code of the batch, mean over prototypes."""
    return distances.amin(0).mean()


def near_a_prototype(distances: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """``R2``: the squared distance of each code to the nearest prototype, mean over the batch."""
    return distances.amin(1).mean()


# -- the cases -----------------------------------------------------------------------------------------


class Cases(NamedTuple):
    """What each of m prototypes stands for among labelled codes.

    ``nearest`` [m]: position of the code nearest to it, at squared ``distance`` [m]; ``used`` [m]: codes to which it is the nearest prototype;
    ``purity`` [m]: the share of their most frequent class, 0 where there are none.
    """

    nearest: Int[Tensor, " m"]
    distance: Float[Tensor, " m"]
    used: Int[Tensor, " m"]
    purity: Float[Tensor, " m"]


def cases(codes: Float[Tensor, "n q"], y: Int[Tensor, " n"], prototypes: Float[Tensor, "m q"]) -> Cases:
    """Read :class:`Cases` off the codes of labelled images."""
    d = torch.cat([squared_distances(part, prototypes) for part in codes.split(256)])
    distance, nearest = d.min(0)
    counts = torch.zeros(len(prototypes), int(y.max()) + 1, dtype=torch.int64, device=y.device)
    counts.index_put_((d.argmin(1), y), torch.ones_like(y), accumulate=True)
    used = counts.sum(1)
    return Cases(nearest, distance, used, counts.amax(1) / used.clamp_min(1))


def supports(weight: Float[Tensor, "k m"]) -> Int[Tensor, " m"]:
    """The class that each prototype speaks for when it is near: its lowest weight, since scores are weights times distances."""
    return weight.argmin(0)


@torch.no_grad()
def prototype_images(net: PrototypeNet) -> Float[Tensor, "m c h w"]:
    """What the network's prototypes look like, pixels from 0 to 1."""
    return net.decode(net.prototypes)


@torch.no_grad()
def case_table(net: PrototypeNet, x: Float[Tensor, "n c h w"]) -> list[list[dict[str, float]]]:
    """Why each image was answered as it was: a row a prototype, nearest first, of the network's whole reasoning.

    ``x`` are normalised images. A row has the ``prototype``'s number, its squared ``distance``, its ``weight`` for the answered class, and ``adds``: what
    it adds to that class's score above the mean of all classes. These sum to the score above the mean score.
    """
    distances = net.pool(net.forward_features(x))
    weight = weights(net)
    above = weight - weight.mean(0)
    found = []
    for d, c in zip(distances, net.fc(distances).argmax(1).tolist(), strict=True):
        order = d.argsort(stable=True).tolist()
        found.append([{"prototype": j, "distance": float(d[j]), "weight": float(weight[c, j]), "adds": float(above[c, j] * d[j])} for j in order])
    return found


# -- the technique -------------------------------------------------------------------------------------


@final
@dataclass
class PrototypeLoss(Technique):
    """``E = CE + lam R + lam1 R1 + lam2 R2`` for ``--model prototype-net`` (section 3.2); pictures: the training image nearest to each prototype.

    ``lam``: rebuild the image; ``lam1``: each prototype near an example; ``lam2``: each example near a prototype. Reports how the prototypes are used.
    """

    lam: float = 0.05
    lam1: float = 0.05
    lam2: float = 0.05

    def __post_init__(self) -> None:
        for name in ("lam", "lam1", "lam2"):
            if not 0 <= getattr(self, name) < math.inf:
                raise Mistake(f"prototype-loss: {name}={getattr(self, name)} must be at least 0; 0.05 is the paper's for all three")

    def on_start(self, run: Run) -> None:
        network(run.model)
        self._kept: dict[str, Tensor] = {}

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        net = network(run.model)
        assert out.features is not None
        distances = net.pool(out.features)
        with run.plan.autocast():
            rebuilt = full(net.decode(out.features.flatten(1)))
        error = self.lam * reconstruction(batch.x, rebuilt) + self.lam1 * near_an_example(distances) + self.lam2 * near_a_prototype(distances)
        return soft_cross_entropy(run, out, batch) + error

    def on_end(self, run: Run) -> None:
        """Look at all labelled training images once."""
        net, data = network(run.model), run.data
        rows = data.split.train[data.y[data.split.train] >= 0]
        with run.aside():
            codes = torch.cat([full(run.forward(run.plan.pixels(x)).features.flatten(1)) for x in data.x.batches(rows.split(256))])  # type: ignore[union-attr]
            found = cases(codes, data.y[rows].to(codes.device), net.prototypes)
        self._kept = {**found._asdict(), "nearest": rows[found.nearest.cpu()], "weight": weights(net).clone()}
        for reading in self.readings(run):
            run.report(reading.name, reading.value, reading.unit)

    def readings(self, run: Run) -> list[Reading]:
        """How the prototypes lie among the training images."""
        kept = self._seen()
        used = kept["used"] > 0
        return [
            Reading("prototypes in use", float(used.sum()), f"of {len(used)}"),
            Reading("purity of prototypes in use", float(kept["purity"][used].double().mean()), "share of one class"),
            Reading("classes that have a prototype", float(len(supports(kept["weight"]).unique())), f"of {len(kept['weight'])}"),
            Reading("distance of prototypes to the nearest image", float(kept["distance"].double().mean()), "squared, of codes"),
        ]

    def figures(self, run: Run) -> list[Figure]:
        """Use of each prototype, and the weights W."""
        kept = self._seen()
        used = {f"prototype {j}": float(n) for j, n in enumerate(kept["used"].tolist())}
        return [
            Bars("Training images nearest to each prototype", "images", used),
            Plane("Weights: the lowest of a column marks the class that the prototype supports", "class", "prototype", kept["weight"].double().tolist()),
        ]

    def gallery(self, run: Run) -> list[tuple[int, float]]:
        """(row of the pool, squared distance) of the training image nearest to each prototype, in the prototypes' order."""
        kept = self._seen()
        return list(zip(kept["nearest"].tolist(), kept["distance"].double().tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        return dict(getattr(self, "_kept", {}))

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self._kept = dict(state)

    def _seen(self) -> dict[str, Tensor]:
        if not getattr(self, "_kept", None):
            raise Mistake("prototype-loss looks at the prototypes when training ends; finish the run first")
        return self._kept


def weights(net: PrototypeNet) -> Float[Tensor, "k m"]:
    """W of a network that has not lost its linear head."""
    if not isinstance(net.fc, nn.Linear):
        raise Mistake("prototype-loss: the network has no classes (num_classes=0); build it with some")
    return net.fc.weight.detach()


def network(model: nn.Module) -> PrototypeNet:
    """The run's network, or a Mistake where it is no prototype network."""
    if not isinstance(model, PrototypeNet):
        raise Mistake(f"prototype-loss is for networks with prototypes and a decoder, and {type(model).__name__} has none; use --model prototype-net")
    return model
