"""Claim of ibn-net: instance normalisation for half of the channels of shallow blocks keeps accuracy where images change their style."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from convince.claims import Bench, Numbers, Paired, column, paired
from convince.data import MemoryStore
from convince.fit.answer import score
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.layers.ibn_net import IbnNet, appearance_divergence
from convince.layers.surgery import swap
from convince.parts import Card

SAYS = (
    "A ResNet with IBN-a, trained on unaltered images, is more accurate than one with batch normalisation where the images' style changes, and no less "
    "accurate on unaltered ones."
)
SUPPORTED = (
    "accuracy under shifts, IBN-a - BN, is at least +3 points in the mean with its 95 % paired t interval above 0; and on unaltered images at least -0.5 "
    "points in the mean with its lower end above -1.5."
)
CONTRADICTED = "the interval under shifts lies below 0, or on unaltered images its upper end is below -0.5 points."
BUDGET = (
    "fashion-mnist tripled to RGB at 28 px, 3,000 training and 3,000 test images, ResNet-8 (16-32-64), 6 epochs on unaltered images, batch 64, SGD 0.1 "
    "cosine, no augmentation, 5 paired seeds; accuracy under shifts is the mean over four fixed ones: inverted contrast, brightness + 0.3, a random 3x3 "
    "mixing of channels (entries uniform on [0, 2/3], a colour cast for grey images), Gaussian blur of sigma 1. Arms: BN; IBN-a in stages 1 and 2; IBN-b; "
    "controls: all norms instance norms; IBN-a with layer norm (one group) in place of its instance norm. Reduced against the catalogue (6,000 training, "
    "10,000 test images) for time. Reported with the paper's signs: IBN-b against IBN-a, all-IN on unaltered images, appearance divergence (500 test "
    "images; logarithms averaged over shifts and seeds, since a channel that is silent in one style makes it very large)."
)
ARMS = ("bn", "ibn-a", "ibn-b", "all-in", "half-ln")


# -- shifts of style, of pixels in [0, 1] ----------------------------------------------------------


def inverted(x: Tensor) -> Tensor:
    return 1 - x


def brighter(x: Tensor) -> Tensor:
    return (x + 0.3).clamp(0, 1)


def mixed(x: Tensor) -> Tensor:
    """Each channel a random sum of all three, the same for every image and seed."""
    matrix = torch.rand(3, 3, generator=generator("ibn-net", "mixing")) * (2 / 3)
    return torch.einsum("dc,nchw->ndhw", matrix.to(x), x).clamp(0, 1)


def blurred(x: Tensor) -> Tensor:
    """A Gaussian of sigma 1 pixel, 7 taps a side, mirrored at the edges."""
    taps = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    weight = kernel.to(x).expand(x.shape[1], 1, 7, 7)
    return functional.conv2d(functional.pad(x, (3, 3, 3, 3), mode="reflect"), weight, groups=x.shape[1])


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {"inverted": inverted, "brighter": brighter, "mixed": mixed, "blurred": blurred}


@final
class Shifted(nn.Module):
    """An answer that sees its images in another style."""

    def __init__(self, shift: Callable[[Tensor], Tensor], answer: nn.Module) -> None:
        super().__init__()
        self.shift, self.answer = shift, answer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = self.shift(x)
        return self.answer(x)


# -- controls --------------------------------------------------------------------------------------


@final
@dataclass
class Control(Technique):
    """Norms that are no part anyone would want: "all-in", or "half-ln" in a network that has IBN-a already."""

    form: str
    rank = 70  # after the layer is in

    def on_start(self, run: Run) -> None:
        if self.form == "all-in":
            norms = [(n, m) for n, m in run.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
            swap(run.model, norms, lambda name, norm: nn.InstanceNorm2d(norm.num_features, affine=True))  # type: ignore[arg-type]
            return
        places = [(f"{n}.IN", m.IN) for n, m in run.model.named_modules() if isinstance(m, IbnNet)]
        assert places, "the network has no IBN-a to change"
        swap(run.model, places, lambda name, norm: nn.GroupNorm(1, norm.num_features))  # type: ignore[arg-type]


def rgb(data: Any) -> Any:
    """Grey images with their channel three times."""
    p = data.preprocess
    x = data.x.take(torch.arange(len(data.y))).expand(-1, 3, -1, -1).contiguous()
    return dataclasses.replace(data, x=MemoryStore(x), preprocess=dataclasses.replace(p, channels=3, mean=p.mean * 3, std=p.std * 3))


def cell(arm: str, data: Any, how: dict[str, Any], rows: int) -> dict[str, float]:
    """Accuracy on unaltered images and under each shift; appearance divergence of the first and last stage."""
    parts = {"ibn-a": ("ibn-net",), "ibn-b": ("ibn-net:variant=b",), "half-ln": ("ibn-net",)}.get(arm, ())
    run = prepare(resolve(settings(model="resnet8", parts=parts, augment="none", lr=0.1, **how), data)[0], data)
    if arm in ("all-in", "half-ln"):
        run.team = Team([*run.team.seats, Seat(Card(part="norms", kind="technique", title="control"), {}, Control(arm))])
    fit(run)
    found = {"accuracy": run.evaluate("test").accuracy}
    for name, shift in SHIFTS.items():
        found[name] = score(Shifted(shift, run.answer), data, data.split.test, run.plan).accuracy
    found["shifted"] = statistics.fmean(found[name] for name in SHIFTS)
    x = run.plan.pixels(data.x.take(data.split.test[:rows]))
    with run.aside():
        apart = [appearance_divergence(run.model, run.normalise(x), run.normalise(shift(x))) for shift in SHIFTS.values()]
    for stage in ("layer1", "layer3"):
        found[f"log10 divergence {stage}"] = statistics.fmean(math.log10(row[stage]) for row in apart)
    return found


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds, rows = ("digits", 64, 64, 1, 2, 32) if small else ("fashion-mnist", 3000, 3000, 6, 5, 500)
    for seed in range(seeds):
        data = rgb(bench.data(name, train=train, test=test, seed=seed))
        for arm in ARMS:
            bench.arm(arm, seed, partial(cell, arm, data, {"epochs": epochs, "batch": 32 if small else 64, "seed": seed}, rows))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(a: str, b: str, metric: str, words: str) -> Paired:
        return paired(f"accuracy {words}, {a} - {b}", column(numbers, a, metric), column(numbers, b, metric))

    shifted = {arm: gain(arm, "bn", "shifted", "under shifts") for arm in ARMS[1:]}
    within = {arm: gain(arm, "bn", "accuracy", "on unaltered images") for arm in ARMS[1:]}
    rest = [gain("ibn-b", "ibn-a", "shifted", "under shifts"), gain("ibn-b", "ibn-a", "accuracy", "on unaltered images")]
    rest += [gain("ibn-a", "half-ln", "shifted", "under shifts")]
    facts = {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in ARMS for metric in ("accuracy", "shifted", *SHIFTS)}
    for stage in ("layer1", "layer3"):
        apart = {arm: statistics.fmean(column(numbers, arm, f"log10 divergence {stage}")) for arm in ("bn", "ibn-a")}
        facts[f"appearance divergence of {stage}, ibn-a / bn"] = 10 ** (apart["ibn-a"] - apart["bn"])
    comparisons = [shifted["ibn-a"], within["ibn-a"], *rest, *(table[arm] for arm in ARMS[2:] for table in (shifted, within)), facts]
    main, own = shifted["ibn-a"], within["ibn-a"]
    if main.high < 0 or own.high < -0.005:
        return "contradicted", comparisons
    if main.mean >= 0.03 and main.low > 0 and own.mean >= -0.005 and own.low > -0.015:
        return "supported", comparisons
    return "inconclusive", comparisons
