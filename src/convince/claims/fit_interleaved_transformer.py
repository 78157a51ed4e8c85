"""Claim of fit-interleaved-transformer: few latents carry between groups of tokens what windows cannot, and attention stays cheap on long sequences."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from convince.backbones.fit import Fit, Round
from convince.claims import Bench, Numbers, column, paired
from convince.data import Data, MemoryStore, Preprocess
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.types import Split

TARGET = {"model": "fit-mini", "data": "digits", "accuracy": 0.93}  # 2x2 tokens of a digit of 8 px, and no convolution
SAYS = (
    "1. Where the answer lies in the relation of two places, groups of tokens that exchange a few latents find it, as full attention does, and windows "
    "without latents do not. 2. The attention of a long sequence costs far less than its length squared."
)
SUPPORTED = (
    "1. FIT - windows only, test accuracy, has its 95 % paired t interval above +5 points, and the interval of FIT - full attention does not lie below -3 "
    "points; and 2. the multiply-adds of attention grow with length to the power of at most 1.45, where those of full attention grow with at least 1.9."
)
CONTRADICTED = (
    "1. the interval of FIT - windows only lies below +1 point; or 2. FIT's exponent is above 1.45. If full attention stays below 40 % in the mean, the task "
    "is not learned and the verdict is inconclusive."
)
BUDGET = (
    "canvases of 32x32 px with two mnist digits 0 to 4, scaled to 14 px, in different quarters, label (a + b) mod 5: 20,000 for training of training digits, "
    "2,000 for test of test digits; patches of 8 px, 16 tokens in 4 groups of 4, 1 latent a group, width 48, 3 heads; FIT (1)1(1) against windows (3) and "
    "full attention (3), MLPs widened to equal parameters within 5 %; AdamW 1e-3, weight decay 0.05, cosine, batch 64, 5 epochs, fp32, 3 paired seeds. "
    "Control: FIT whose latents stay at their table (no read). Scaling: forward passes at 256, 1,024 and 4,096 tokens, groups of 4, 16 and 16 (the cube root "
    "to a power of 4), 4 latents a group: multiply-adds of attention (gated), the largest tensor where scores are stored, and seconds (both reported). "
    "Against the catalogue: canvases of 64 px, 64 tokens in groups of 16, 4 latents a group and (2)2(2) are reduced by the clock; 20,000 canvases seen 5 "
    "times instead of 5,000 seen 6 times, in batches of 64 instead of 128."
)
WIDTHS = "dim_data=48,dim_latent=48,heads_data=3,heads_latent=3,latents=1,patch=8"
ARMS = {
    "fit": f"fit:layers='(1)1(1)',side=2,{WIDTHS}",
    "windows": f"fit:layers='(3)',side=2,mlp_ratio=5.34,{WIDTHS}",
    "full": f"fit:layers='(3)',side=4,mlp_ratio=5.34,{WIDTHS}",
    "no read": f"fit:layers='(1)1(1)',side=2,{WIDTHS}",
}


def canvases(data: Data, rows: Tensor, count: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [count 1 32 32] and labels: two digits below 5, scaled to 14 px, anywhere in two different quarters."""
    rows = rows[data.y[rows] < 5]
    picked = rows[torch.randint(len(rows), (count, 2), generator=gen)]
    quarters = torch.rand(count, 4, generator=gen).argsort(1)[:, :2]
    shift = torch.randint(3, (count, 2, 2), generator=gen)
    digits = nn.functional.interpolate(data.x.take(picked.flatten()).float(), (14, 14), mode="bilinear", antialias=True).round().clamp(0, 255)
    out = torch.zeros(count, 1, 32, 32, dtype=torch.uint8)
    for i, digit in enumerate(digits.to(torch.uint8)):
        at, which = divmod(i, 2)
        quarter = int(quarters[at, which])
        r, c = 16 * (quarter // 2) + int(shift[at, which, 0]), 16 * (quarter % 2) + int(shift[at, which, 1])
        out[at, :, r : r + 14, c : c + 14] = digit
    return out, data.y[picked].sum(1) % 5


def drawn(bench: Bench, name: str, train: int, test: int, seed: int) -> Data:
    """A set of canvases, its training part of training digits and its test part of test digits."""
    digits = bench.data(name, train=8 * train, seed=seed)
    parts = [canvases(digits, digits.split[part], n, generator(seed, "canvases", part)) for part, n in (("train", train), ("test", test))]
    x, y = (torch.cat(both) for both in zip(*parts, strict=True))
    rows, seen = torch.arange(train + test), x[:train].float() / 255
    preprocess = Preprocess("image", 1, (32, 32), "letterbox", (float(seen.mean()),), (float(seen.std()),))
    return Data(MemoryStore(x), y, Split(rows[:train], rows[:0], rows[train:]), tuple("01234"), preprocess, origin="canvases")


def cell(data: Data, arm: str, epochs: int, seed: int) -> dict[str, float]:
    """Test accuracy and parameters of one training."""
    parts = ("adamw:lr=0.001,weight_decay=0.05",)
    run = prepare(settings(model=ARMS[arm], parts=parts, epochs=epochs, batch=64, seed=seed, augment="none", precision="fp32"), data)
    if arm == "no read":
        run.build = partial(unread, run.build)
    fit(run)
    return {"accuracy": run.evaluate("test").accuracy, "parameters": sum(p.numel() for p in run.model.parameters())}


def unread(build: Callable[[], nn.Module]) -> nn.Module:
    """The network with latents that stay at their table: they read nothing and do not attend."""
    model = build()
    assert isinstance(model, Fit)
    for each in model.rounds:
        assert isinstance(each, Round)
        each.read, each.across = None, nn.ModuleList()
    return model


@final
class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@torch.no_grad()
def costs(arm: str, tokens: int) -> dict[str, float]:
    """Of one forward pass of one grey image of that many tokens (patches of 1 px): multiply-adds of attention, the largest tensor, seconds."""
    edge = math.isqrt(tokens)
    group = 4 ** round(math.log(tokens ** (1 / 3), 4))
    layers, side = ("(1)1(1)", math.isqrt(group)) if arm == "fit" else ("(3)", edge)

    def build() -> nn.Module:
        return Fit(5, 1, (edge, edge), layers, 1, side, 4, 48, 48, 3, 3).eval()

    with torch.device("meta"):
        model, x = build(), torch.empty(1, 1, edge, edge)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(x)
        with Largest() as largest, sdpa_kernel(SDPBackend.MATH):
            model(x)
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if "bmm" in str(op)) // 2  # of scores and of values; linear layers are addmm
    model, x = build(), torch.zeros(1, 1, edge, edge)
    seconds = math.inf
    for _ in range(4):
        began = time.perf_counter()
        model(x)
        seconds = min(seconds, time.perf_counter() - began)
    return {"macs": products, "largest_bytes": largest.bytes, "seconds": seconds}


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 96, 64, 1, 2) if smoke else ("mnist", 20_000, 2000, 5, 3)
    for seed in range(seeds):
        data = drawn(bench, name, train, test, seed)
        for arm in ARMS:
            bench.arm(arm, seed, partial(cell, data, arm, epochs, seed))
    for arm in ("fit", "full"):
        for tokens in (256, 1024, 4096):
            bench.arm(f"{arm}, {tokens} tokens", 0, partial(costs, arm, tokens))


def exponent(numbers: Numbers, arm: str, metric: str) -> float:
    """The slope of log cost over log length, by least squares."""
    points = [(math.log(tokens), math.log(numbers[f"{arm}, {tokens} tokens"]["0"][metric])) for tokens in (256, 1024, 4096)]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(a: str, b: str) -> Any:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    windows, full = gain("fit", "windows"), gain("fit", "full")
    grows = {arm: {metric: exponent(numbers, arm, metric) for metric in ("macs", "largest_bytes", "seconds")} for arm in ("fit", "full")}
    facts = {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in ARMS for metric in ("accuracy", "parameters")}
    powers = {f"exponent of {metric}, {arm}": value for arm, row in grows.items() for metric, value in row.items()}
    comparisons = [windows, full, gain("fit", "no read"), powers, facts]
    if statistics.fmean(column(numbers, "full", "accuracy")) < 0.4:
        return "inconclusive", comparisons
    if windows.high < 0.01 or grows["fit"]["macs"] > 1.45:
        return "contradicted", comparisons
    if windows.low > 0.05 and full.high >= -0.03 and grows["full"]["macs"] >= 1.9:
        return "supported", comparisons
    return "inconclusive", comparisons
