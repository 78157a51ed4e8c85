"""SeiT++: a classifier of stored tokens is nearly as good as one of pixels at a fraction of the bytes, and better after it learnt to tell hidden tokens."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data
from convince.fit.adapters import Optimizer
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.parts import Card
from convince.pretrain.seit_plus_plus import CARD, SeitPlusPlus, Trunk
from convince.pretrain.token_store import pack
from convince.types import Stage

SAYS = (
    "Images stored as tokens of a few per cent of their bytes are enough to train a classifier, and masked token modelling on unlabelled tokens makes "
    "it better with few labels."
)
SUPPORTED = (
    "With 500 labels: masked token modelling - tokens with labels alone is at least +2 points of test accuracy with the 95 % paired t interval above "
    "0, and masked token modelling - the same with targets shuffled across images is above 0 in the mean; the tokens and the codebook are at most 5 % "
    "of the pixels' bytes; tokens with labels alone have at least 85 % of the accuracy of the same transformer on pixels."
)
CONTRADICTED = "With 500 labels: the interval of masked token modelling - tokens with labels alone lies below 0."
BUDGET = (
    "cifar10, 1,500 images without labels; VQ-VAE of 256 codes of 16 numbers, 8x8 tokens an image, 3 epochs, once for each seed; transformer of width "
    "64, depth 2, one token a patch; 6 epochs of masked tokens in batches of 50; then 500 labels of the same images, 120 steps of batch 50 in every "
    "arm, AdamW at 2e-3, 1,000 test images; 4 paired seeds (images, labels, weights). Against the catalogue: 1,500 of 10,000 images, 500 of 1,000 "
    "labels, width 64 of 96, depth 2 of 4, 3 of 4 epochs of codes, 1,000 of 10,000 test images; the codes are learnt anew for each seed; the control "
    "with shuffled targets and the arms of crops and ColorAdapt (told, not gated) run on 2 of the 4 seeds."
)
RATE = 2e-3
ADAMW = Seat(
    Card(part="pixels-adamw", kind="optimizer", title="AdamW of the pixel arm"),
    {},
    Optimizer(torch.optim.AdamW, {"lr": RATE, "betas": (0.9, 0.95), "weight_decay": 0.05}),
)


@final
class Given(Technique):
    """SeiT++ with a tokeniser that is already learnt; ``shuffled`` takes a batch's targets from other images: the same passes, no relation."""

    rank = 0

    def __init__(self, inner: SeitPlusPlus, tokenizer: dict[str, Tensor], shuffled: bool = False) -> None:
        self.inner, self.tokenizer, self.shuffled = inner, tokenizer, shuffled

    def on_start(self, run: Run) -> None:
        self.inner.on_start(run)
        run.model.seit.tokenizer.load_state_dict(self.tokenizer)  # type: ignore[union-attr]

    def before(self, run: Run) -> list[Stage]:
        return self.inner.before(run)[1:]

    def on_batch(self, run: Run) -> None:
        self.inner.on_batch(run)
        if self.shuffled and "target" in run.batch.extra:
            run.batch.extra["target"] = run.batch.extra["target"].roll(1, 0)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        self.inner.around_grad(run, grad)

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return self.inner.optimizer(run, params)

    def stage(self, run: Run, i: int) -> Stage | None:
        return self.inner.stage(run, i)

    def answer(self, run: Run) -> nn.Module:
        return self.inner.answer(run)


@final
class Pixels(nn.Module):
    """The transformer on patches of 4x4 pixels."""

    def __init__(self, channels: int, side: int, k: int, width: int, depth: int) -> None:
        super().__init__()
        self.trunk = Trunk(channels, (side, side), k, 4, width, depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, pool, test, seeds, labels, steps = ("digits", 60, 40, 2, 20, 2) if smoke else ("cifar10", 1500, 1000, 4, 500, 120)
    codes = 16 if smoke else 256
    size = {"codes": codes, "dim": 4, "width": 8, "depth": 1, "down": 2} if smoke else {"codes": codes, "width": 64, "depth": 2}
    token_epochs, epochs = (1, 1) if smoke else (3, 6)

    @functools.cache
    def drawn(seed: int) -> Data:
        """All images; labels only for the first of them."""
        data = bench.data(name, train=pool, test=test, seed=seed)
        y = data.y.clone()
        y[data.split.train[labels:]] = -1
        return dataclasses.replace(data, y=y)

    def run_of(seed: int, seats: list[Seat], steps: int) -> Run:
        chosen = settings(model="resnet8", epochs=steps, steps=steps or None, batch=min(50, labels), augment="none", precision="fp32", seed=seed)
        run = prepare(chosen, drawn(seed))
        run.team = Team(seats)
        return run

    @functools.cache
    def tokenizer(seed: int) -> Run:
        run = run_of(seed, [Seat(CARD, {}, SeitPlusPlus(0, token_epochs, lr=RATE, **size))], 0)  # type: ignore[arg-type]
        fit(run)
        return run

    def codes_of(seed: int) -> dict[str, float]:
        run, data = tokenizer(seed), drawn(seed)
        net: Any = run.model.seit
        with run.aside():
            tokens = net.tokens(run.normalise(run.plan.pixels(data.x.take(data.split.train))))
        pixels = data.x.take(data.split.train[:1]).numel()
        book = net.tokenizer.book.codes.numel() * 4 / len(tokens)  # the codebook in fp32, shared by the images
        grid = tokens[0].numel()
        zipped = len(pack(tokens, codes)) / len(tokens)
        used = float(len(tokens.unique()))
        return {"bytes": grid + book, "pixel_bytes": pixels, "share": (grid + book) / pixels, "gzip_share": (zipped + book) / pixels, "codes": used}

    def tokens(seed: int, epochs: int, adapt: str | None = None, shuffled: bool = False) -> dict[str, float]:
        state = tokenizer(seed).model.seit.tokenizer.state_dict()  # type: ignore[union-attr]
        inner = SeitPlusPlus(epochs, 1, adapt=adapt, lr=RATE, **size)
        run = run_of(seed, [Seat(CARD, {}, Given(inner, state, shuffled))], steps)
        fit(run)
        losses = [row["loss"] for row in run.record.rows if row["kind"] == "epoch" and row["stage"] == "masked tokens"]
        return {"accuracy": run.evaluate("test").accuracy, **({"told": losses[-1]} if losses else {})}

    def pixels(seed: int) -> dict[str, float]:
        run = run_of(seed, [ADAMW], steps)
        channels, side, k = run.data.preprocess.channels, min(run.data.preprocess.size), run.data.k
        run.build = lambda: Pixels(channels, side, k, size["width"], size["depth"])
        fit(run)
        return {"accuracy": run.evaluate("test").accuracy}

    for seed in range(seeds):
        bench.arm("codes", seed, lambda seed=seed: codes_of(seed))  # type: ignore[misc]
        bench.arm("pixels", seed, lambda seed=seed: pixels(seed))  # type: ignore[misc]
        bench.arm("tokens", seed, lambda seed=seed: tokens(seed, 0))  # type: ignore[misc]
        bench.arm("masked tokens", seed, lambda seed=seed: tokens(seed, epochs))  # type: ignore[misc]
        if seed < 2:
            bench.arm("shuffled targets", seed, lambda seed=seed: tokens(seed, epochs, shuffled=True))  # type: ignore[misc]
            bench.arm("crop", seed, lambda seed=seed: tokens(seed, 0, "crop"))  # type: ignore[misc]
            bench.arm("color+crop", seed, lambda seed=seed: tokens(seed, 0, "color+crop"))  # type: ignore[misc]
        drawn.cache_clear()
        tokenizer.cache_clear()


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str) -> list[float]:
        return [100 * value for value in column(numbers, arm, "accuracy")]

    unit = "[points of accuracy]"
    masked = paired(f"masked token modelling - tokens with labels alone, 500 labels {unit}", points("masked tokens"), points("tokens"))
    shuffled = points("shuffled targets")
    control = paired(f"masked token modelling - targets shuffled across images {unit}", points("masked tokens")[: len(shuffled)], shuffled)
    pixels = paired(f"tokens - pixels, labels alone {unit}", points("tokens"), points("pixels"))
    color = paired(f"ColorAdapt and crop - crop, labels alone {unit}", points("color+crop"), points("crop"))
    share = statistics.fmean(column(numbers, "codes", "share"))
    kept = statistics.fmean(points("tokens")) / statistics.fmean(points("pixels"))
    facts = {"bytes of tokens and codebook, share of the pixels'": share, "after gzip": statistics.fmean(column(numbers, "codes", "gzip_share"))}
    facts |= {"accuracy of tokens, share of the pixels'": kept, "codes in use": statistics.fmean(column(numbers, "codes", "codes"))}
    facts |= {f"loss of hidden tokens, {arm} [nats]": statistics.fmean(column(numbers, arm, "told")) for arm in ("masked tokens", "shuffled targets")}
    comparisons = [masked, control, pixels, color, facts]
    if masked.high < 0:
        return "contradicted", comparisons
    holds = masked.mean >= 2 and masked.low > 0 and control.mean > 0 and share <= 0.05 and kept >= 0.85
    return "supported" if holds else "inconclusive", comparisons
