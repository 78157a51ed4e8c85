"""Claim of sequencer2d: LSTMs along rows and columns mix patches usefully, and the network keeps working on larger images."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from convince.backbones.sequencer2d import Sequencer2d, resolution_curve
from convince.claims import Bench, Numbers, column, padded, paired, said, together
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve

TARGET = {"model": "sequencer2d-mini", "data": "digits", "accuracy": 0.93}  # no convolutions but the patches', and 4 patches and then 1 of 8x8 pixels
SAYS = (
    "1. LSTMs along the rows and columns of patches make the same network more accurate than no mixing of patches, and no less accurate than one LSTM over "
    "all patches in a row. 2. Tested at twice its resolution without fine-tuning it loses less accuracy than a vision transformer."
)
SUPPORTED = (
    "1. Sequencer2D - no mixing, test accuracy, has its 95 % paired t interval above +1 point, and the interval of Sequencer2D - V-Sequencer does not lie "
    "below 0; and 2. (accuracy at 64 px - accuracy at 32 px), Sequencer2D - transformer, is at least +3 points in the mean with its interval above 0."
)
CONTRADICTED = "any of these three intervals lies below 0."
BUDGET = (
    "fashion-mnist padded with zeros from 28 to 32 px, 3,000 training and 2,000 test images; sequencer2d-mini (301,882 parameters), the same with identities "
    "for its LSTMs, v-sequencer-mini (299,296), and a transformer (303,352) of 4 blocks, width 78, 3 heads, patches of 4, no class token, learned "
    "positions that are interpolated; AdamW 0.002, weight decay 0.05, cosine, batch 128, 5 epochs, fp32, 4 paired seeds. For 2. the test images are enlarged "
    "to 48 and 64 px by bilinear interpolation, for all but V-Sequencer, of which the catalogue asks nothing there. Control: the network without mixing on the "
    "same curve. Reduced against the catalogue: 2,000 of 3,000 test images. A network that learns nothing loses nothing: accuracies at 32 px are reported."
)


def without_mixing(build: Callable[[], nn.Module]) -> nn.Module:
    """The network with an identity in the place of every mixer, so that patches meet in the downsampling and the mean alone."""
    model = build()
    assert isinstance(model, Sequencer2d)
    for block in model.blocks():
        block.rnn_tokens = nn.Identity()
    return model


def transformer(side: int, channels: int, k: int) -> nn.Module:
    """A vision transformer of as many parameters, whose positions are interpolated where an image is not of the side it is built for."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(side, 4, channels, k, global_pool="avg", embed_dim=78, depth=4, num_heads=3, class_token=False, dynamic_img_size=True)


def cell(data: Any, how: dict[str, Any], arm: str) -> dict[str, float]:
    """One training, and the accuracy at 1, 1.5 and 2 times the side (V-Sequencer: at 1)."""
    run = prepare(resolve(settings(augment="none", precision="fp32", **how), data)[0], data)
    side = data.preprocess.size[0]
    if arm == "no mixing":
        run.build = partial(without_mixing, run.build)
    if arm == "transformer":
        run.build = partial(transformer, side, data.preprocess.channels, data.k)
    fit(run)
    rows = data.split.test
    factors = (1.0,) if arm == "v-sequencer" else (1.0, 1.5, 2.0)
    curve = resolution_curve(run.answer, data.x.take(rows).float() / 255, data.y[rows], [int(side * factor) for factor in factors])
    found = {f"accuracy x{factor:g}": accuracy for factor, accuracy in zip(factors, curve.values(), strict=True)}
    if len(factors) > 1:
        found["change"] = found["accuracy x2"] - found["accuracy x1"]
    return {**found, "parameters": sum(p.numel() for p in run.model.parameters())}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, side, epochs, seeds = ("digits", 128, 64, 16, 1, 2) if small else ("fashion-mnist", 3000, 2000, 32, 5, 4)
    for seed in range(seeds):
        data = padded(bench.data(name, train=train, test=test, seed=seed), side)
        how = {"epochs": epochs, "batch": 128, "parts": ("adamw:lr=0.002,weight_decay=0.05",), "seed": seed}
        for arm in ("sequencer2d", "no mixing", "v-sequencer", "transformer"):
            model = "v-sequencer-mini" if arm == "v-sequencer" else "sequencer2d-mini"
            bench.arm(arm, seed, partial(cell, data, {**how, "model": model}, arm))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(other: str, metric: str) -> Any:
        return paired(f"{metric}, sequencer2d - {other}", column(numbers, "sequencer2d", metric), column(numbers, other, metric))

    mixing, order, larger = gain("no mixing", "accuracy x1"), gain("v-sequencer", "accuracy x1"), gain("transformer", "change")
    facts = {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in numbers for metric in numbers[arm]["0"]}
    rest = [gain("transformer", "accuracy x1"), gain("transformer", "accuracy x2"), gain("no mixing", "change")]
    verdict = together(
        [
            said(mixing.low > 0.01 and order.high >= 0, mixing.high < 0 or order.high < 0),
            said(larger.mean >= 0.03 and larger.low > 0, larger.high < 0),
        ]
    )
    return verdict, [mixing, order, larger, *rest, facts]
