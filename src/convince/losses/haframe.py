"""HAFrame: freeze the classifier to vectors whose cosines mirror a class tree, so that mistakes fall on nearby classes."""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake, nearest
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.layers.surgery import Behind
from convince.parts import Card
from convince.types import Batch, Out

CARD = Card(
    part="haframe",
    kind="technique",
    title="Inducing Neural Collapse to a Fixed Hierarchy-Aware Frame for Reducing Mistake Severity",
    paper="haframe",
    year=2023,
    url="https://arxiv.org/abs/2303.05689",
    claims=("objective",),
    mutes=("loss",),
    expects=("labels", "logits", "network"),
    departs=(
        "tree=None, the default, is a flat tree: all classes are equally far apart and the frame is a simplex (ETF); give a tree to gain from one",
        "alpha 0.4 and gamma 2 are the constants released for CIFAR-100; other sets had alpha 0.4 to 0.5 and gamma 1 to 5",
        "the network's own linear head is the map to k channels: after average pooling it equals the paper's 1x1 convolution before it; its bias stays "
        "under its name and the batch normalisation cancels it",
        "a mixed label takes the mixture of its classes' similarities as the target of its cosines; the paper has plain labels",
        "the period of the 'cosine' schedule is the stage; the release has it as an argument, and two schedules that multiply cosine and linear",
        "the scan for s_min bisects its 100 values instead of trying each: those that are positive semi-definite come first",
    ),
)

SCHEDULES = ("constant", "linear-decrease", "linear-increase", "cosine")
Tree = str | Sequence[Any] | Mapping[str, str | None] | None


# -- the class tree --------------------------------------------------------------------------------


def read_tree(tree: Tree, classes: Sequence[str]) -> list[int]:
    """The parent of each node, -1 for the root; nodes 0 to k-1 are ``classes`` in their order, inner nodes follow.

    ``tree``: None (flat), nested groups of class names as lists or as text "((cat,dog),(car,truck))", a map from each name to its
    parent's, or the path of a JSON file with either. Nodes above none of the classes are left out; several roots are joined.
    """
    names, k = [str(c) for c in classes], len(classes)
    if k < 2:
        raise Mistake(f"haframe: {k} class; a frame needs at least two")
    if isinstance(tree, str):
        tree = _from_text(tree)
    if tree is None:
        return [k] * k + [-1]
    up = _ups(tree) if isinstance(tree, Mapping) else _groups(tree)
    known: dict[Any, int] = {name: i for i, name in enumerate(names)}
    parents = [-1] * k
    for name in names:
        if name not in up:
            raise Mistake(f"haframe: the class {name!r} is not in the tree{nearest(name, [n for n in up if isinstance(n, str)])} Every class is a leaf once")
        walked, node = {name}, name
        while (above := up.get(node)) is not None:
            if above in walked:
                raise Mistake(f"haframe: the tree goes in a circle at {above!r}; every node has one parent, and the root none")
            if above not in known:
                known[above] = len(parents)
                parents.append(-1)
            if known[above] < k:
                raise Mistake(f"haframe: the class {above!r} stands above {node!r} in the tree; classes are leaves, so give that group a name of its own")
            parents[known[node]] = known[above]
            walked.add(above)
            node = above
    roots = [i for i, above in enumerate(parents) if above < 0]
    if len(roots) > 1:
        for i in roots:
            parents[i] = len(parents)
        parents.append(-1)
    return parents


def _from_text(text: str) -> Any:
    """Nested lists from "((a,b),c)", or what a JSON file of that path holds."""
    if text.lstrip()[:1] in ("(", "["):
        words = (w.strip() for w in re.findall(r"[()\[\],]|[^()\[\],]+", text))
        inner = "".join("[" if w in "([" else "]" if w in ")]" else "," if w == "," else json.dumps(w.strip("'\"")) for w in words if w)
        try:
            return json.loads(inner.replace(",]", "]"))
        except ValueError:
            raise Mistake(f"haframe: tree={text!r}: write nested groups of class names, such as ((cat,dog),(car,truck))") from None
    try:
        return json.loads(Path(text).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(f"haframe: tree={text!r}: no file could be read there ({error.strerror}); give a JSON parent map, or groups ((cat,dog),car)") from None
    except ValueError as error:
        raise Mistake(f"haframe: tree={text!r}: not a JSON file ({error}); it holds a map from each class and group to its parent") from None


def _ups(tree: Mapping[str, Any]) -> dict[Any, Any]:
    """The map from each node to its parent, with its roots, whose parent is None."""
    return {above: None for above in tree.values() if above is not None} | {str(name): above for name, above in tree.items()}


def _groups(tree: Any) -> dict[Any, Any]:
    """The map of nested groups; a group is known by its place."""
    if not isinstance(tree, Sequence) or isinstance(tree, str):
        raise Mistake(f"haframe: tree={tree!r}: must be nested groups of class names, a map from name to parent, or the path of a JSON file")
    up: dict[Any, Any] = {(): None}

    def walk(group: Sequence[Any], place: tuple[int, ...]) -> None:
        for i, item in enumerate(group):
            inner = isinstance(item, Sequence) and not isinstance(item, str)
            node = (*place, i) if inner else str(item)
            if node in up:
                raise Mistake(f"haframe: the class {node!r} stands twice in the tree; every class is a leaf once")
            up[node] = place
            if inner:
                walk(item, (*place, i))

    walk(tree, ())
    return up


def hierarchy_distance(parents: Sequence[int], k: int) -> Float[Tensor, "k k"]:
    """The height of the lowest common ancestor of each two classes, 0 on the diagonal; an inner node is one above its highest child."""
    height, below = [0] * len(parents), [{i} if i < k else set() for i in range(len(parents))]
    for leaf in range(k):
        node, steps = leaf, 0
        while (node := parents[node]) >= 0:
            steps += 1
            height[node] = max(height[node], steps)
            below[node].add(leaf)
    distance = torch.zeros(k, k, dtype=torch.float64)
    for node in sorted(range(k, len(parents)), key=lambda n: -height[n]):  # lower nodes overwrite their pairs
        rows = torch.tensor(sorted(below[node]))
        distance[rows[:, None], rows] = height[node]
    return distance.fill_diagonal_(0)


# -- the frame -------------------------------------------------------------------------------------


def similarity_from_distance(distance: Float[Tensor, "k k"], gamma: float | None, s_min: float) -> Float[Tensor, "k k"]:
    """``S = (1 - s_min) exp(-gamma D / max D) + s_min``; ``gamma=None`` is the straight line ``1 - (1 - s_min) D / max D``."""
    d = distance / distance.max()
    return (1 - s_min) * torch.exp(-gamma * d) + s_min if gamma is not None else 1 - (1 - s_min) * d


def find_s_min(distance: Float[Tensor, "k k"], gamma: float | None, exact: bool = False) -> float:
    """The smallest of 100 values from ``-1/(k-1)`` to -1 whose S is positive semi-definite; ``exact`` bisects between them to the end.

    In the paper an eigenvalue counts as not negative above -1e-6. The values that qualify come first, since S is linear in s.
    """
    start = -1 / (len(distance) - 1)
    values = torch.linspace(0, 1, 100, dtype=torch.float64).mul(-1 - start).add(start).tolist()

    def fits(s: float, tolerance: float = 1e-6) -> bool:
        return float(torch.linalg.eigvalsh(similarity_from_distance(distance, gamma, s))[0]) > -tolerance

    good, bad = 0, len(values)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(values[middle]) else (good, middle)
    if not exact or bad == len(values):
        return values[good]
    low, high = values[good], values[bad]
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle, 1e-12) else (low, middle)
    return low


def haframe(similarity: Float[Tensor, "k k"], d: int, gen: Generator | None = None) -> Float[Tensor, "k d"]:
    """``W = (Q sqrt(L) V^T)^T`` with ``S = V L V^T`` and Q [d k] from the QR of a Gaussian draw, so ``W W^T = S``: unit rows, ``d >= k``."""
    k = len(similarity)
    if d < k:
        raise Mistake(f"haframe: {d} features for {k} classes; a frame needs at least as many features as classes")
    values, vectors = torch.linalg.eigh(similarity)
    q, _ = torch.linalg.qr(torch.randn(d, k, generator=gen, dtype=similarity.dtype))
    return vectors * values.clamp_min(0).sqrt() @ q.T


@final
class HAFrameHead(nn.Module):
    """Scores ``features @ W^T`` with a fixed frame W [k d] (a buffer) and no bias."""

    frame: Tensor

    def __init__(self, W: Float[Tensor, "k d"]) -> None:
        super().__init__()
        self.register_buffer("frame", W)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return features @ self.frame.T


@final
class PointResidual(nn.Module):
    """``x + PReLU(BN(Linear(PReLU(BN(Linear(x))))))`` on vectors [n k]; one slope a channel."""

    def __init__(self, k: int) -> None:
        super().__init__()
        half = (nn.Linear(k, k, bias=False), nn.BatchNorm1d(k), nn.PReLU(k))
        self.inner = nn.Sequential(*half, nn.Linear(k, k, bias=False), nn.BatchNorm1d(k), nn.PReLU(k))

    def forward(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return x + self.inner(x)


class Transformation(nn.Sequential):
    """Batch normalisation and two :class:`PointResidual` on k channels; before it comes the map from the features to k."""

    def __init__(self, k: int) -> None:
        super().__init__(nn.BatchNorm1d(k), PointResidual(k), PointResidual(k))


# -- training and measuring ------------------------------------------------------------------------


def haf_loss(features: Float[Tensor, "n d"], y: Float[Tensor, "n k"], frame: Float[Tensor, "k d"], alpha: float, beta: float) -> Float[Tensor, " n"]:
    """Each row's ``beta CE(f W^T, y) + alpha sum_c (cos(f, w_c) - S[y, c])^2`` with ``S = W W^T``; logits use the raw features."""
    cosines = F.normalize(features) @ F.normalize(frame).T
    gap = (cosines - y @ (frame @ frame.T)).square().sum(1) * y.sum(1)  # a row without label costs nothing
    return beta * F.cross_entropy(features @ frame.T, y, reduction="none") + alpha * gap


def mixing(schedule: str, alpha: float, at: float) -> tuple[float, float]:
    """(alpha, beta) at the share ``at`` 0 to 1 of the stage. "constant": beta = 1 - alpha, and 1 where alpha is above 1; the others ignore ``alpha``."""
    if schedule == "constant":
        return alpha, 1 - alpha if alpha <= 1 else 1.0
    alpha = {"linear-decrease": 1 - at, "linear-increase": at, "cosine": 0.5 * (1 - math.cos(2 * math.pi * at))}[schedule]
    return alpha, 1 - alpha


def mistake_severity(predicted: Int[Tensor, " n"], y: Int[Tensor, " n"], distance: Float[Tensor, "k k"]) -> float:
    """Mean height of the lowest common ancestor over wrong answers [levels of the tree]; nan where none is wrong."""
    wrong = predicted != y
    return float(distance[y[wrong], predicted[wrong]].mean()) if bool(wrong.any()) else math.nan


def hierarchical_distance_at(scores: Float[Tensor, "n k"], y: Int[Tensor, " n"], distance: Float[Tensor, "k k"], top: int) -> float:
    """Mean height over all rows and the ``top`` highest scores of each, right ones counting 0 [levels of the tree]."""
    return float(distance[y[:, None], scores.topk(top, 1).indices].mean())


def frame_alignment(features: Float[Tensor, "n d"], y: Int[Tensor, " n"], frame: Float[Tensor, "k d"]) -> float:
    """Mean cosine between each class's mean feature and its vector of the frame; 1 is collapse onto the frame. Classes without rows are left out."""
    found = [F.cosine_similarity(features[y == c].mean(0), frame[c], dim=0) for c in y.unique().tolist()]
    return float(torch.stack(found).mean())


@final
@dataclass
class HAFrame(Technique):
    """Put a transformation and a fixed :func:`haframe` behind the network's linear head, and train with :func:`haf_loss`.

    ``tree``: see :func:`read_tree`, e.g. ``--with "haframe:tree=((cat,dog),(car,truck))"`` or ``tree=tree.json``; ``gamma``: how fast
    similarity falls with distance (None: straight); ``alpha`` and ``schedule``: see :func:`mixing`; ``exact``: see :func:`find_s_min`.
    Reports the mistake severity on validation rows after each epoch. Works on any network with a linear head.
    """

    tree: Tree = None
    alpha: float = 0.4
    gamma: float | None = 2.0
    schedule: str = "constant"
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise Mistake(f"haframe: alpha={self.alpha}: must be at least 0; 0.4 is usual, and above 1 cross-entropy keeps its full weight")
        if self.gamma is not None and not 0 < self.gamma < math.inf:
            raise Mistake(f"haframe: gamma={self.gamma}: must be positive (1 to 5 are usual), or None for a straight line")
        if self.schedule not in SCHEDULES:
            raise Mistake(f"haframe: schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}")

    def on_start(self, run: Run) -> None:
        parents = read_tree(self.tree, run.data.classes)
        self.distance = hierarchy_distance(parents, run.k)
        run.edit("haframe", parents=parents, gamma=self.gamma, exact=self.exact)
        name, _ = linear_head(run.model)
        self.features = run.tap(f"{name}.haframe.transformation")
        self.head = run.model.get_submodule(f"{name}.haframe.frame")

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        assert batch.y is not None
        alpha, beta = mixing(self.schedule, self.alpha, run.epoch / max(run.stage.epochs, 1))
        losses = haf_loss(full(self.features()), batch.y, self.head.frame, alpha, beta)  # type: ignore[arg-type]
        return losses.mean() if batch.weight is None else (losses * batch.weight).mean()

    def on_epoch(self, run: Run) -> None:
        if len(run.data.split.val):
            scores = run.evaluate("val")
            severity = mistake_severity(scores.predicted, scores.y, self.distance)
            if math.isfinite(severity):
                run.report("mistake severity, val", severity, "levels")

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Add the child ``haframe`` to the network's linear head, and a hook that hands the head's output to it.

        ``spec``: ``parents`` as :func:`read_tree` gives them, ``gamma`` (2) and ``exact`` (False).
        """
        _, head = linear_head(model)
        k = head.out_features
        distance, gamma = hierarchy_distance(spec["parents"], k), spec.get("gamma", 2.0)
        frame = haframe(similarity_from_distance(distance, gamma, find_s_min(distance, gamma, spec.get("exact", False))), k)
        child = nn.Sequential(OrderedDict(transformation=Transformation(k), frame=HAFrameHead(frame)))
        head.add_module("haframe", child.to(device=head.weight.device, dtype=head.weight.dtype))
        head.register_forward_hook(Behind("haframe"))


def linear_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The network's last layer and its name; a Mistake where that is no linear layer."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise Mistake(
            f"haframe: {type(model).__name__} has no linear head (get_classifier() gives {type(head).__name__}); choose another --model, e.g. resnet20"
        )
    return next(name for name, m in model.named_modules() if m is head), head
