"""RotNet: learns features without labels by telling which of four rotations an image was given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.augment.flip_crop import flip_crop
from convince.errors import Mistake, nearest
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.fit.weights import build_by_name
from convince.kinds import as_found
from convince.parts import Card
from convince.types import Batch, Out, Stage

CARD = Card(
    part="rotnet",
    kind="technique",
    paper="rotnet",
    title="Unsupervised Representation Learning by Predicting Image Rotations",
    year=2018,
    url="https://arxiv.org/abs/1803.07728",
    departs=(
        "the pretext stage follows the run's learning rate, schedule and optimiser; the paper drops 0.1 by five at epochs 30, 60 and 80 of 100"
        " (released code: 60, 120, 160 of 200)",
        "the whole network goes on from the rotation features in the main stage; the paper's frozen probes are functions of this file",
        "no help where a class looks the same after a rotation, or where the camera itself turns",
    ),
    strength="epochs",
    off=0,
    tiny={"epochs": 1},
    expects=("images", "network"),
    idle=("extra.rotnet",),
)
MEASURED = 512  # images on which the rotation accuracy is read after each epoch


def rotate4(x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "4*n c h w"], Int[Tensor, " 4*n"]]:
    """Each image at 0, 90, 180 and 270 degrees counter-clockwise, in four rows next to each other, and targets 0 to 3.

    Exact: rows and columns change places, nothing is interpolated. Raises Mistake unless images are square.
    """
    if x.dim() != 4 or x.shape[2] != x.shape[3]:
        raise Mistake(f"rotnet turns square images [n c h h]; these are {tuple(x.shape)}; use --size with --fit crop")
    turned = torch.stack([torch.rot90(x, turns, (2, 3)) for turns in range(4)], 1)
    return turned.flatten(0, 1), torch.arange(4, device=x.device).repeat(len(x))


@final
@dataclass
class RotNet(Technique):
    """``epochs`` of :func:`rotate4` on all training images, labelled or not, come before the main training.

    A step holds four rows for each of the batch's images, which are first shifted by up to ``pad`` (a share
    of the side) and mirrored with probability ``flip``. ``epochs=0`` is off.
    """

    epochs: int = 100
    pad: float = 0.125
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise Mistake(f"epochs={self.epochs}: the pretext needs at least 0 epochs (0 is off)")
        if not 0 <= self.pad < 1 or not 0 <= self.flip <= 1:
            raise Mistake(f"pad={self.pad}, flip={self.flip}: pad is a share of the side, 0 to below 1; flip a probability, 0 to 1")

    def on_start(self, run: Run) -> None:
        if self.epochs == 0:
            return
        run.require("forward_features")
        size = run.data.preprocess.size
        if len(set(size)) != 1:
            raise Mistake(f"rotnet turns square images, and these are {'x'.join(map(str, size))} pixels; use --size with --fit crop")
        width = getattr(run.model, "head_hidden_size", None) or run.model.num_features  # timm: some heads widen the features
        run.extra["rotnet"] = nn.Linear(int(width), 4)  # type: ignore[arg-type]

    def before(self, run: Run) -> list[Stage]:
        if self.epochs == 0:
            return []
        names = run.body() | {f"extra.rotnet.{name}" for name, _ in run.extra["rotnet"].named_parameters()}
        return [Stage("rotnet", self.epochs, objective=self.rotation_loss, trainable=names.__contains__, guests=False)]

    def on_batch(self, run: Run) -> None:
        if run.stage.name == "rotnet":
            batch = run.batch
            x, turns = rotate4(flip_crop(batch.x, self.pad, self.flip, run.gen("rotnet")))
            extra = {name: value.repeat_interleave(4, 0) for name, value in batch.extra.items()}
            run.batch = Batch(x, F.one_hot(turns, 4).to(x.dtype), batch.index.repeat_interleave(4), None, extra, group=4)

    def rotation_loss(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """Cross-entropy over the four rotations, mean over all rows; ``run.out`` holds the rotation scores afterwards (eq. 2, 3)."""
        run.out = Out(rotation_scores(run, out), out.features)
        return F.cross_entropy(run.out.logits, batch.y)  # type: ignore[arg-type]

    def on_epoch(self, run: Run) -> None:
        if run.stage.name == "rotnet":
            held = len(run.data.split.val) > 0
            rows = run.data.split.val if held else run.data.split.train
            name = "rotation accuracy" if held else "rotation accuracy (training images)"
            run.report(name, rotation_accuracy(run, rows[:MEASURED]), "share of rotated images")


def rotation_scores(run: Run, out: Out) -> Float[Tensor, "n 4"]:
    """Scores of the rotations from a pass of the network."""
    with run.plan.autocast():
        return full(run.extra["rotnet"](run.model.forward_head(out.features, pre_logits=True)))  # type: ignore[operator]


def rotation_accuracy(run: Run, rows: Int[Tensor, " m"]) -> float:
    """Share of the four rotations of these images that are told right, in eval mode (chance 0.25)."""
    right = 0
    with run.aside():
        for x in run.data.x.batches(rows.split(64)):
            turned, turns = rotate4(run.plan.pixels(x))
            right += int((rotation_scores(run, run.forward(turned)).argmax(1) == turns).sum())
    return right / max(4 * len(rows), 1)


# -- probes: what frozen features are good for -----------------------------------------------------


def frozen_features(answer: nn.Module, layer: str, x: Float[Tensor, "n c h w"], batch: int = 256) -> Float[Tensor, "n d i j"]:
    """What the module ``layer`` (as ``answer.named_modules()`` names it) gives for [0, 1] pixels ``x``; the answer is left as found."""
    modules = dict(answer.named_modules())
    if layer not in modules:
        raise Mistake(f"layer={layer!r}: the answer has no module of that name{nearest(layer, list(modules))}")
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        found.append(full(output.detach()))

    with as_found(answer), torch.no_grad():
        modules[layer].register_forward_hook(keep)
        for part in x.split(batch):
            answer(part)
    return torch.cat(found)


def linear_head(shape: Sequence[int], k: int) -> nn.Module:
    """Batch normalisation without weights, then one linear layer on all features of shape [d i j]."""
    return nn.Sequential(nn.BatchNorm2d(shape[0], affine=False), nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], k))


def nonlinear_head(shape: Sequence[int], k: int) -> nn.Module:
    """Features [d i j] -> 200 -> 200 -> k with BN and ReLU after the first two: the paper's non-linear classifier."""
    first = nn.Linear(shape[0] * shape[1] * shape[2], 200, bias=False)
    second = nn.Linear(200, 200, bias=False)
    return nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(200), nn.ReLU(), second, nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, k))


def conv_head(shape: Sequence[int], k: int) -> nn.Module:
    """One more network-in-network block of as many channels, pooled, then linear: the paper's convolutional classifier."""
    from convince.backbones.nin import unit

    d = shape[0]
    return nn.Sequential(unit(d, d, 3), unit(d, d, 1), unit(d, d, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d, k))


def fit_head(
    build: Callable[[Sequence[int], int], nn.Module],
    x: Float[Tensor, "n d i j"],
    y: Int[Tensor, " n"],
    k: int,
    *,
    epochs: int = 100,
    milestones: Sequence[int] = (35, 70, 85),
    batch: int = 128,
    lr: float = 0.1,
    seed: int = 0,
) -> nn.Module:
    """Train ``build(shape, k)`` on frozen features; returns it in eval mode. Global random state is left alone.

    SGD, Nesterov momentum 0.9, weight decay 5e-4, ``lr`` times 0.2 at each milestone [epoch]: the paper's
    (35, 70, 85 of 100) for the conv block, (20, 40, 45 of 50) for the non-linear one. A shorter last batch is dropped.
    """
    head = build_by_name(lambda: build(x.shape[1:], k), seed).to(x)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batch = min(batch, len(x))
    head.train()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.2 ** sum(epoch >= mark for mark in milestones)
        order = torch.randperm(len(x), generator=generator(seed, "probe", epoch)).to(x.device)
        for rows in order[: len(x) // batch * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(full(head(x[rows])), y[rows]).backward()
            optimizer.step()
    return head.eval()


@torch.no_grad()
def accuracy_of(head: nn.Module, x: Float[Tensor, "n d i j"], y: Int[Tensor, " n"], batch: int = 512) -> float:
    """Share of right answers of a head on frozen features, 0 to 1."""
    right = sum(int((head(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch), y.split(batch), strict=True))
    return right / max(len(y), 1)


def semi_supervised_curve(
    build: Callable[[Sequence[int], int], nn.Module],
    train: tuple[Tensor, Int[Tensor, " n"]],
    test: tuple[Tensor, Int[Tensor, " m"]],
    k: int,
    sizes: Sequence[int],
    **settings: int | float | Sequence[int],
) -> dict[int, float]:
    """Test accuracy of a head on frozen features for the first ``sizes`` labels of each class in ``train`` (fig. 4)."""
    x, y = train
    curve = {}
    for size in sizes:
        rows = torch.cat([(y == c).nonzero()[:size, 0] for c in range(k)])
        head = fit_head(build, x[rows], y[rows], k, **copy.copy(settings))  # type: ignore[arg-type]
        curve[size] = accuracy_of(head, *test)
    return curve
