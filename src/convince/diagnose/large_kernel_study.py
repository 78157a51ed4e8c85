"""Large kernel study: what a few large depthwise kernels see, prefer and cost beside small ones at equal parameters, as one table."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.diagnose.receptive_field import effective_receptive_field, erf_area, make_cue_conflict, readable, shape_bias, silhouette
from convince.errors import Mistake
from convince.kinds import Study
from convince.parts import Card, spell
from convince.types import Budget

CARD = Card(
    part="large-kernel-study",
    kind="study",
    paper="large-kernel-study",
    title="Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal Representations",
    year=2024,
    url="https://arxiv.org/abs/2410.08049",
    departs=(
        "networks of all kernels have equal parameters, so those of small kernels are wider; the paper exchanges kernels in networks of one width",
        "one small network and one data set of images a call; the paper adds detection, segmentation, sound, video, points and series",
        "outlines are pixels above 0.1 on a dark ground, and surfaces patches of other images; the paper takes a published set of restyled photographs",
        "layer scales begin at 0.1, as the paper's 0.000001 is for far more steps",
    ),
    tiny={"kernels": (3, 5), "width": 4, "size": 8, "seeds": 1, "images": 20, "pairs": 20},
)


# -- networks of equal size --------------------------------------------------------------------------


def network(kernel: int, width: int, depths: Sequence[int] = (2, 2), stem: int = 2, dilated: bool = True) -> str:
    """The spec of a small UniRepLKNet all of whose blocks have this kernel; ``stem`` and ``dilated`` are the part's."""
    kernels = tuple((kernel,) for _ in depths)
    return spell("unireplknet", {"depths": tuple(depths), "width": width, "kernels": kernels, "stem": stem, "layer_scale": 0.1, "dilated": dilated})


def parameters(spec: str, num_classes: int = 10, in_chans: int = 1) -> int:
    """Parameters of a network by its spec, counted without making them."""
    from convince.backbones import builder

    with torch.device("meta"):
        return sum(p.numel() for p in builder(spec, num_classes=num_classes, in_chans=in_chans, size=(32, 32))().parameters())


def equal_width(kernel: int, like: str, depths: Sequence[int] = (2, 2), stem: int = 2, num_classes: int = 10, in_chans: int = 1) -> int:
    """The width at which :func:`network` with this kernel comes closest in parameters to the network ``like``."""
    wanted = parameters(like, num_classes, in_chans)

    def count(width: int) -> int:
        return parameters(network(kernel, width, depths, stem), num_classes, in_chans)

    above = bisect.bisect_left(range(2, 4096), wanted, key=count) + 2
    return min((max(above - 1, 2), above), key=lambda width: abs(count(width) - wanted))


def dense_vs_stack(channels: int, kernel: int) -> tuple[nn.Module, nn.Module]:
    """Two ways to see ``kernel`` pixels wide: one depthwise convolution, and ``(kernel - 1) / 2`` of 3x3 one after another, without anything between."""
    if kernel < 3 or kernel % 2 == 0:
        raise Mistake(f"dense_vs_stack: kernel={kernel} must be odd and at least 3")

    def depthwise(k: int) -> nn.Conv2d:
        return nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, bias=False)

    return depthwise(kernel), nn.Sequential(*(depthwise(3) for _ in range((kernel - 1) // 2)))


# -- measuring ---------------------------------------------------------------------------------------


def cue_conflicts(
    x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], count: int, gen: Generator, patch: int = 8
) -> tuple[Float[Tensor, "m c h w"], Int[Tensor, " m"], Int[Tensor, " m"]]:
    """``count`` images with the outline of one image and the surface of one of another class; and the classes of both."""
    if len(y.unique()) < 2:
        raise Mistake("cue_conflicts: images of at least two classes are needed")
    a, b = torch.randint(len(y), (2, count), generator=gen)
    while bool((same := y[a] == y[b]).any()):
        b[same] = torch.randint(len(y), (int(same.sum()),), generator=gen)
    return make_cue_conflict(silhouette(x[a]), x[b], gen, min(patch, *x.shape[2:])), y[a], y[b]


def looks(answer: nn.Module, x: Float[Tensor, "n c h w"]) -> dict[str, float]:
    """Side (share of the image's) of the square that holds half of the contribution: ``erf`` of the log scores, as the paper, ``erf_plain`` without the log."""
    scores = effective_receptive_field(answer, x)
    return {"erf": erf_area(readable(scores), 0.5).side_ratio, "erf_plain": erf_area(scores, 0.5).side_ratio}


@torch.no_grad()
def throughput(model: nn.Module, size: Sequence[int], in_chans: int = 3, batch: int = 64, seconds: float = 0.5) -> float:
    """Images a second in eval mode on this machine, fp32, random pixels of ``size`` (rows, columns): the fastest batch counts. The mode is put back."""
    device = next((p.device for p in model.parameters()), None)
    x, modes = torch.rand(batch, in_chans, *size, device=device), [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        model(x)
        best, until = float("inf"), time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < until:
            began = time.perf_counter()
            model(x)
            best = min(best, time.perf_counter() - began)
    finally:
        for module, training in modes:
            module.training = training
    return batch / best


@final
@dataclass
class LargeKernelStudy(Study):
    """Trains one network a kernel at equal parameters and prints what each sees, prefers and costs.

    ``width`` is that of the largest kernel's network. ``data``: a built-in set, folder or table of images, brought to ``size`` pixels; its test part
    is measured: ``images`` of it for the receptive field, ``pairs`` cue conflicts for the shape bias.
    """

    data: str = "digits"
    kernels: tuple[int, ...] = (3, 7, 13)
    depths: tuple[int, ...] = (2, 2)
    width: int = 24
    size: int = 32
    seeds: int = 2
    batch: int = 128
    lr: float = 0.002
    images: int = 200
    pairs: int = 500

    def __post_init__(self) -> None:
        if not self.kernels or self.seeds < 1 or min(self.images, self.pairs) < 1:
            raise Mistake(f"large-kernel-study: kernels={self.kernels}, seeds={self.seeds}, images={self.images}, pairs={self.pairs}: at least one of each")

    def run(self, budget: Budget) -> dict[str, Any]:
        """The table: one row a kernel, means over seeds. ``budget`` is that of one training (images, steps or epochs)."""
        from convince.backbones import builder
        from convince.backbones.unireplknet import merge_reparam
        from convince.data import load
        from convince.fit.answer import Answer
        from convince.fit.randomness import generator
        from convince.fit.settings import settings
        from convince.fit.train import train
        from convince.fit.weights import build_by_name
        from convince.models.counting import count

        data = load(self.data, size=self.size, val=0.0, seed=0)
        if data.preprocess.kind != "image" or not len(data.split.test):
            raise Mistake(f"large-kernel-study: {self.data} must be images with a test part")
        rows = data.split.test[data.y[data.split.test] >= 0]
        x, y = data.float_batch(data.x.take(rows)), data.y[rows]
        size, channels = data.preprocess.size, data.preprocess.channels
        largest = network(max(self.kernels), self.width, self.depths)
        optimizer = spell("adamw", {"lr": self.lr, "weight_decay": 0.05})
        steps = self._steps(budget, max(len(data.split.train) // self.batch, 1))
        table = []
        for kernel in self.kernels:
            width = self.width if kernel == max(self.kernels) else equal_width(kernel, largest, self.depths, num_classes=data.k, in_chans=channels)
            spec, found, merged = network(kernel, width, self.depths), [], nn.Module()
            for seed in range(self.seeds):
                how = settings(model=spec, parts=(optimizer,), augment="none", batch=self.batch, steps=steps, seed=seed)
                done = train(how, data)
                assert done.test is not None
                fresh = build_by_name(builder(spec, num_classes=data.k, in_chans=channels, size=size), seed)
                before = looks(Answer(done.run.normalise, fresh), x[: self.images])
                conflict, shape, texture = cue_conflicts(x, y, self.pairs, generator(seed, "large-kernel-study"))
                bias = shape_bias(done.answer, conflict, shape, texture)
                merged = merge_reparam(done.run.model)
                found.append({"accuracy": done.test.accuracy, **looks(done.answer, x[: self.images]), "erf_untrained": before["erf"], "shape_bias": bias.bias})
            cost = count(merged, size, channels)
            means = {name: statistics.fmean(row[name] for row in found) for name in found[0]}
            speed = throughput(merged, size, channels, seconds=0.2)
            table.append(
                {"kernel": kernel, "width": width, "parameters": parameters(spec, data.k, channels), "merged_parameters": cost.parameters, "macs": cost.macs}
                | {**means, "images_per_second": speed, "n": self.seeds}
            )
        print(self._page(table))
        return {**asdict(self), "kernels": list(self.kernels), "depths": list(self.depths), "budget": asdict(budget), "table": table}

    def _steps(self, budget: Budget, per_epoch: int) -> int:
        per = {"steps": 1.0, "images": 1 / self.batch, "epochs": float(per_epoch)}.get(budget.unit)
        if per is None:
            raise Mistake(f"large-kernel-study: a budget in {budget.unit} does not fit; give images, steps or epochs of one training")
        return max(round(budget.value * per), 1)

    def _page(self, table: list[dict[str, Any]]) -> str:
        lines = [f"large kernels: {self.data} at {self.size} px, {self.seeds} seed(s); side of half the contribution as a share of the image's"]
        lines.append(f"{'kernel':>6} {'width':>6} {'parameters':>11} {'accuracy %':>11} {'side':>6} {'untrained':>10} {'shape bias':>11} {'images/s':>9}")
        for r in table:
            lines.append(
                f"{r['kernel']:>6} {r['width']:>6} {r['parameters']:>11,} {100 * r['accuracy']:>11.1f} {r['erf']:>6.2f} {r['erf_untrained']:>10.2f} "
                f"{r['shape_bias']:>11.2f} {r['images_per_second']:>9.0f}"
            )
        return "\n".join(lines)
