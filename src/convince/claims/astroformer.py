"""Claim of astroformer: with few images one late stage of attention does better than two, and no worse than none."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from convince.claims import Bench, Numbers, column, paired

TARGET = {"model": "astroformer-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "Of hybrids of four stages and equal parameters, one whose last stage alone attends (CCCT) is more accurate on few images than one with two attending "
    "stages (CCTT, CoAtNet's layout), and not less accurate than one without attention (CCCC)."
)
SUPPORTED = "CCCT - CCTT, test accuracy, has its 95 % paired t interval above 0, and the interval of CCCT - CCCC does not lie below 0."
CONTRADICTED = "the interval of CCCT - CCTT lies below 0."
BUDGET = (
    "cifar10 at 32 px, 1,500 training and 2,000 test images, mirrored and shifted by up to 4 px, mixup 0.8; stages of 1, 2, 2, 1 blocks, stem of stride 1 and "
    "16 channels, widths 16-32-64-96 (CCCT), 16-24-64-96 (CCTT) and 16-32-64-104 (CCCC), which makes parameters equal within 2 %; AdamW 1e-3, weight decay "
    "0.05, cosine after 1 epoch of warm-up, batch 64, 8 epochs, fp32 (bf16 is slower at this size), 4 paired seeds. Control: CCCT without the table of "
    "relative positions. Reduced against the catalogue by the clock: widths 32-64-96-128, 2,000 and 5,000 images, 10 epochs, and the question whether the "
    "order of CCTT and CCCT changes with 8,000 images (2 seeds, 4 epochs, reported only) are --scale paper."
)
DIMS = {
    "small": {"CCCT": (16, 32, 64, 96), "CCTT": (16, 24, 64, 96), "CCCC": (16, 32, 64, 104)},
    "paper": {"CCCT": (32, 64, 96, 128), "CCTT": (32, 56, 96, 128), "CCCC": (32, 64, 96, 144)},
    "smoke": {"CCCT": (8, 8, 8, 32), "CCTT": (8, 8, 32, 32), "CCCC": (8, 8, 8, 32)},
}


def measure(bench: Bench) -> None:
    name, train, test, epochs, seeds = {
        "smoke": ("digits", 64, 64, 1, 2),
        "small": ("cifar10", 1500, 2000, 8, 4),
        "paper": ("cifar10", 2000, 5000, 10, 4),
    }[bench.scale]
    dims = DIMS[bench.scale]
    models = {stages: f"astroformer-mini:stages={stages},dims={widths},stem={widths[0]}".replace(" ", "") for stages, widths in dims.items()}
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        for arm, model in {**models, "no positions": models["CCCT"] + ",positions=false"}.items():
            bench.arm(arm, seed, partial(cell, bench, data, model, epochs, seed))
    if bench.scale != "small":
        more = (96, 64, 1) if bench.scale == "smoke" else (8000, 5000, 4)
        for seed in range(2):
            data = bench.data(name, train=more[0], test=more[1], seed=seed)
            for arm in ("CCCT", "CCTT"):
                bench.arm(f"{arm}, more images", seed, partial(cell, bench, data, models[arm], more[2], seed))


def cell(bench: Bench, data: Any, model: str, epochs: int, seed: int) -> dict[str, float]:
    """Test accuracy and parameters of one training."""
    parts = ("adamw:lr=0.001,weight_decay=0.05", "mixup:alpha=0.8", "flip-crop")
    run = bench.train(data, model=model, parts=parts, epochs=epochs, batch=64, seed=seed, precision="fp32", warmup=1 / epochs if epochs > 1 else 0.0).run
    return {"accuracy": run.evaluate("test").accuracy, "parameters": sum(p.numel() for p in run.model.parameters())}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(a: str, b: str) -> Any:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    late, convs = gain("CCCT", "CCTT"), gain("CCCT", "CCCC")
    comparisons = [late, convs, gain("CCCT", "no positions")]
    if "CCCT, more images" in numbers:
        comparisons.append(gain("CCCT, more images", "CCTT, more images"))
    comparisons.append({f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in numbers for metric in ("accuracy", "parameters")})
    if late.high < 0:
        return "contradicted", comparisons
    if late.low > 0 and convs.high >= 0:
        return "supported", comparisons
    return "inconclusive", comparisons
