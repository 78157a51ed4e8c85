"""PatternNet: finds small groups of filters that fire together at one place and tell one class from the others, and shows where."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.explain.layer import Layer, find_layer
from convince.explain.localisation import box_from_map
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.kinds import Probe, as_found
from convince.parts import Card
from convince.types import Bars, Findings, Plane, Reading

CARD = Card(
    part="patternnet",
    kind="probe",
    paper="patternnet",
    title="PatternNet: Visual Pattern Mining with Deep Neural Network",
    year=2017,
    url="https://arxiv.org/abs/1703.06339",
    expects=("images", "labels"),
    tiny={"patterns": 2, "steps": 20},
    departs=(
        "the order of layers, the thresholds and the loss are ours: what is kept of the paper is that a pattern is a few filters of the last map that "
        "fire together at one place, is frequent in its class and tells it from the others; no official code was found",
        "filters are measured by A / (A + q), q the 95 % quantile of a filter's map over all images, in place of a hard threshold, so that no two firings tie",
        "four patterns a class, and four filters a pattern; half of the images is mined and the other half measured",
        "a place is led back to the image by the share of the map's sides, and its box is where the enlarged score is at least 0.7 of its maximum",
    ),
)
SHARPNESS = 10.0  # of the sigmoid of a score


# -- maps ----------------------------------------------------------------------------------------------


def last_maps(answer: nn.Module, x: Float[Tensor, "n c h w"], layer: str | None = None, batch: int = 64) -> tuple[Float[Tensor, "n d i j"], Layer]:
    """The last spatial map of each image, or that of ``layer``, rectified, and which layer it is. The answer is left as found."""
    with as_found(answer):
        found = find_layer(answer, x, torch.zeros(len(x), dtype=torch.int64, device=x.device), layer, "patternnet")
        kept: list[Tensor] = []
        handle = answer.get_submodule(found.name).register_forward_hook(lambda module, args, output: kept.append(full(found.fold(output.detach())).relu()))
        try:
            with torch.no_grad():
                for part in x.split(batch):
                    answer(part)
        finally:
            handle.remove()
    maps = torch.cat(kept)
    if len(maps) != len(x):
        raise Mistake(f"patternnet: layer {found.name!r} saw {len(maps)} rows for {len(x)} images; name a layer that sees each image once")
    return maps, found


def quantiles(maps: Float[Tensor, "n d i j"], share: float = 0.05) -> Float[Tensor, " d"]:
    """The value of each filter that a ``share`` of all places of all images exceeds; its maximum, or 1, where that is 0."""
    flat = maps.transpose(0, 1).flatten(1)
    at = max(int(share * flat.shape[1]), 1)
    q, top = flat.topk(at, dim=1).values[:, -1], flat.amax(1)
    return torch.where(q > 0, q, torch.where(top > 0, top, 1.0))


def firing(maps: Float[Tensor, "n d i j"], q: Float[Tensor, " d"]) -> Float[Tensor, "n d i j"]:
    """``A / (A + q)``: above 0.5 where a filter fires, below 1, and never the same for two responses."""
    return maps / (maps + q[:, None, None])


# -- patterns ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Patterns:
    """p patterns of f filters each: their ``channels``, ``weights`` (sum 1), ``threshold`` of the score, ``classes``; and the filters' quantiles ``q``."""

    channels: Int[Tensor, "p f"]
    weights: Float[Tensor, "p f"]
    threshold: Float[Tensor, " p"]
    classes: Int[Tensor, " p"]
    q: Float[Tensor, " d"]

    def scores(self, maps: Float[Tensor, "n d i j"]) -> Float[Tensor, "n p i j"]:
        """``sum_c w_c A_c / (A_c + q_c)`` at every place, 0 to 1: near 1 only where all filters of the pattern fire."""
        dense = torch.zeros(len(self.channels), len(self.q), dtype=maps.dtype, device=maps.device).scatter_(1, self.channels, self.weights.to(maps.dtype))
        return F.conv2d(firing(maps, self.q), dense[:, :, None, None])

    def fire(self, maps: Float[Tensor, "n d i j"], batch: int = 256) -> tuple[Float[Tensor, "n p"], Int[Tensor, "n p"]]:
        """Each image's strongest score and its place, counted along rows."""
        found = [self.scores(part).flatten(2).max(2) for part in maps.split(batch)]
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])

    def indicators(self, score: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """``sigmoid(10 (score - threshold))``: above 0.5 the pattern is there."""
        return torch.sigmoid(SHARPNESS * (score - self.threshold))

    def localise(self, maps: Float[Tensor, "n d i j"], pattern: int, size: tuple[int, int], share: float = 0.7) -> Float[Tensor, "n 4"]:
        """The box (left, top, right, bottom) [pixels of images of ``size``] where a pattern's enlarged score is at least ``share`` of its maximum."""
        return box_from_map(F.interpolate(self.scores(maps)[:, pattern : pattern + 1], size=size, mode="bilinear", align_corners=False), share)


def centres(place: Int[Tensor, "*n"], plane: tuple[int, int], size: tuple[int, int]) -> Float[Tensor, "*n 2"]:
    """The middle (row, column) [pixels] of places of a map, by their share of its sides."""
    row, column = place // plane[1], place % plane[1]
    return torch.stack([(row + 0.5) * size[0] / plane[0], (column + 0.5) * size[1] / plane[1]], -1)


def evidence(indicators: Float[Tensor, "n p"], classes: Int[Tensor, " p"], k: int) -> Float[Tensor, "n k"]:
    """The mean indicator of each class's patterns: scores by which the patterns alone classify."""
    mine = F.one_hot(classes, k).to(indicators.dtype)
    return indicators @ (mine / mine.sum(0).clamp_min(1))


def pattern_loss(z: Float[Tensor, "n p"], own: Bool[Tensor, "n p"]) -> Float[Tensor, ""]:
    """Frequent: ``-log I`` of a pattern, mean over images of its class; telling: ``-log(1 - I)``, mean over the others (``I = sigmoid(z)``). Their mean."""
    inside = own.to(z.dtype)
    frequent = (inside * F.softplus(-z)).sum(0) / inside.sum(0).clamp_min(1)
    telling = ((1 - inside) * F.softplus(z)).sum(0) / (1 - inside).sum(0).clamp_min(1)
    return (frequent + telling).mean()


def mine_patterns(
    maps: Float[Tensor, "n d i j"], y: Int[Tensor, " n"], k: int, per_class: int, filters: int = 4, steps: int = 200, lr: float = 0.1, *, gen: Generator
) -> Patterns:
    """Learn ``per_class`` patterns for each class with samples: a 1x1 convolution of softplus weights, sigmoid, maximum over the plane, :func:`pattern_loss`.

    Weights start at how much more a filter fires in the class than elsewhere, and noise. Each of ``steps`` takes 128 images; after half of them
    each pattern keeps its ``filters`` strongest. Maps are those of :func:`last_maps`; ``gen`` draws the start and the order. Mistake: fewer than two classes.
    """
    present = torch.bincount(y, minlength=k) > 0
    if int(present.sum()) < 2:
        raise Mistake(f"patternnet: {int(present.sum())} class among {len(y)} images; patterns tell classes apart, so give images of at least two")
    classes = present.nonzero()[:, 0].repeat_interleave(per_class)
    q, filters = quantiles(maps), min(filters, maps.shape[1])
    best = torch.cat([firing(part, q).amax((2, 3)) for part in maps.split(256)])
    means = torch.stack([best[y == c].mean(0) - best[y != c].mean(0) for c in classes.tolist()])
    noise = torch.randn(means.shape, generator=gen, dtype=torch.float64).to(means)
    theta = (10 * means + noise).requires_grad_(True)
    threshold = torch.full((len(classes),), 0.5, dtype=theta.dtype, device=theta.device, requires_grad=True)
    keep = torch.ones_like(theta)
    optimizer = torch.optim.Adam([theta, threshold], lr=lr)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if step == steps // 2:
            keep = torch.zeros_like(keep).scatter_(1, theta.detach().topk(filters, 1).indices, 1.0)
        if len(order) < min(128, len(maps)):
            order = torch.randperm(len(maps), generator=gen)
        rows, order = order[:128], order[128:]
        weight = F.softplus(theta) * keep
        weight = weight / weight.sum(1, keepdim=True)
        score = F.conv2d(firing(maps[rows], q), weight[:, :, None, None]).amax((2, 3))
        loss = pattern_loss(SHARPNESS * (score - threshold), y[rows, None] == classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    channels = theta.detach().masked_fill(keep == 0, -torch.inf).topk(filters, 1).indices
    weight = F.softplus(theta.detach()).gather(1, channels)
    return Patterns(channels, weight / weight.sum(1, keepdim=True), threshold.detach(), classes, q)


# -- what patterns are worth ---------------------------------------------------------------------------


def strongest(score: Float[Tensor, " n"], top: int) -> Int[Tensor, " t"]:
    """The images in which a pattern fires most, strongest first; those to show."""
    return score.argsort(descending=True, stable=True)[:top]


def purity(score: Float[Tensor, " n"], own: Bool[Tensor, " n"], top: int = 10) -> float:
    """The share of the pattern's class among its ``top`` strongest firings, at most as many as the class has images: 9 of 10 are 0.9."""
    chosen = own[strongest(score, max(min(top, int(own.sum())), 1))]
    return float(chosen.double().mean())


def frequency(there: Bool[Tensor, " n"], own: Bool[Tensor, " n"]) -> float:
    """The share of the class's images in which the pattern fires: 30 of 100 are 0.3."""
    return float(there[own].double().mean())


def linear_accuracy(train: Float[Tensor, "n p"], y: Int[Tensor, " n"], test: Float[Tensor, "m p"], test_y: Int[Tensor, " m"]) -> float:
    """Accuracy of a logistic regression on the indicators: what the patterns know together."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged yet
        model = LogisticRegression(max_iter=300).fit(train.double().cpu().numpy(), y.cpu().numpy())
    return float(model.score(test.double().cpu().numpy(), test_y.cpu().numpy()))


def halves(y: Int[Tensor, " n"]) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Rows to mine and rows to measure: every other one of each class; a class of one sample is left out."""
    order = y.argsort(stable=True)
    counts = torch.bincount(y)
    first = counts.cumsum(0) - counts
    at = torch.arange(len(y), device=y.device) - first[y[order]]
    enough = counts[y[order]] > 1
    return order[enough & (at % 2 == 0)].sort().values, order[enough & (at % 2 == 1)].sort().values


@final
@dataclass
class PatternNet(Probe):
    """``patterns`` of ``filters`` filters for each class, mined from half of at most ``images`` images and measured on the other half.

    ``layer``: a module's name, None: the last one with a spatial output. To show where a pattern is: :func:`last_maps`, :func:`mine_patterns`,
    :meth:`Patterns.fire`, :meth:`Patterns.localise`.
    """

    patterns: int = 4
    filters: int = 4
    images: int = 512
    steps: int = 200
    layer: str | None = None

    def __post_init__(self) -> None:
        for name in ("patterns", "filters", "images", "steps"):
            if getattr(self, name) < 1:
                raise Mistake(f"patternnet: {name}={getattr(self, name)} must be at least 1")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        if x.dim() != 4 or not len(x):
            raise Mistake(f"patternnet finds patterns in images [n c h w], at least one, and the input has shape {tuple(x.shape)}")
        rows = torch.linspace(0, len(x) - 1, min(self.images, len(x))).long()
        x, y = x.detach()[rows], y[rows]
        mined, measured = halves(y)
        if not len(mined):
            raise Mistake(f"patternnet: no class has two of the {len(y)} images, one to mine and one to measure; give more images")
        maps, layer = last_maps(answer, x, self.layer)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            k = int(y.max()) + 1
            found = mine_patterns(maps[mined], y[mined], k, self.patterns, self.filters, self.steps, gen=generator("patternnet"))
        with torch.no_grad():
            score, _ = found.fire(maps)
            return self._findings(found, score, y, mined, measured, k, layer)

    def _findings(self, found: Patterns, score: Tensor, y: Tensor, mined: Tensor, measured: Tensor, k: int, layer: Layer) -> Findings:
        indicators = found.indicators(score)
        there, truth = indicators[measured] > 0.5, y[measured]
        own = truth[:, None] == found.classes
        each = range(len(found.classes))
        pure = [purity(score[measured, p], own[:, p]) for p in each]
        often = [frequency(there[:, p], own[:, p]) for p in each]
        names = sorted(set(found.classes.tolist()))
        best = {f"class {c}": max(pure[p] for p in each if int(found.classes[p]) == c) for c in names}
        table = torch.stack([there[truth == c].double().mean(0).unflatten(0, (len(names), -1)).mean(1) for c in names], 1)
        by_patterns = evidence(indicators[measured], found.classes, k).argmax(1) == truth
        readings = [
            Reading("purity of patterns", sum(pure) / len(pure), "share of the 10 strongest"),
            Reading("frequency of patterns", sum(often) / len(often), "share of the class"),
            Reading(
                "patterns with purity 0.9 and frequency 0.3", float(sum(a >= 0.9 and b >= 0.3 for a, b in zip(pure, often, strict=True))), f"of {len(pure)}"
            ),
            Reading("accuracy of the patterns alone", float(by_patterns.double().mean()), "share of images"),
            Reading(
                "accuracy of a linear classifier on the patterns", linear_accuracy(indicators[mined], y[mined], indicators[measured], truth), "share of images"
            ),
        ]
        figures: list[Any] = [
            Bars(f"Purity of the best pattern of each class ({layer.name})", "share of the strongest", best),
            Plane("How often patterns of a class (rows) fire in images of a class", "patterns of class", "images of class", table.tolist()),
        ]
        return Findings(readings, figures)
