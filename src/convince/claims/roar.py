"""Claim of roar: removing what plain gradients mark hurts retraining no more than removing random pixels; squared and variance ensembles do hurt."""

from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from typing import Any

from convince.claims import Bench, Numbers, column, paired, said

METHODS = ("random", "sobel", "gradient", "gradient squared", "integrated gradients", "smoothgrad", "smoothgrad squared", "vargrad")
FRACTIONS = (0.3, 0.6, 0.9)
COPIES, SIGMA, STEPS = 15, 0.15, 25
SAYS = (
    "Retrained on images without the pixels that a method ranks highest, networks lose no more accuracy for gradients and integrated gradients than for random "
    "pixels, and for SmoothGrad often less; only SmoothGrad-Squared and VarGrad remove more than chance does."
)
SUPPORTED = (
    "the accuracy after retraining less that of random removal, mean over the fractions 0.3, 0.6 and 0.9, is at most -3 points for smoothgrad squared and for "
    "vargrad in every seed, and for gradient and integrated gradients at least -3 points in the mean."
)
CONTRADICTED = "gradient or integrated gradients are at most -5 points in every seed, or smoothgrad squared and vargrad are not below 0 in the mean."
BUDGET = (
    "fashion-mnist, 1,500 training and 1,000 test images (the catalogue: 5,000 and 2,000; at those 13 of 75 cells took ten minutes), small-cnn of 8, 16 and"
    " 32 channels, 4 epochs, batches of 32, the house's SGD; 8 rankings, 3 fractions, 3 seeds: 72 trainings and 3 base networks; a seed's cells share the "
    "draw, the base network, initial weights and order. Every input number by its signed estimate for the predicted class, as in the paper's code; 15 noisy"
    " copies of 0.15, 25 steps. gradient squared: is it the squaring or the averaging? Control of the instrument: 8x8 noise with the label in 4 pixels; the"
    " ranking that knows them, and random, both at a twentieth removed."
)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    for seed in range(1 if smoke else 3):
        found: dict[str, Any] = {}
        for method in METHODS:
            for fraction in (0.5,) if smoke else FRACTIONS:
                bench.arm(f"{method} {fraction}", seed, partial(cell, bench, found, method, fraction, smoke, seed))
        bench.arm("planted evidence", seed, partial(planted, bench, smoke, seed))


def how(smoke: bool, seed: int) -> dict[str, Any]:
    return {"model": "small-cnn:widths=(8,16,32)", "epochs": 1 if smoke else 4, "batch": 32, "seed": seed}


def cell(bench: Bench, found: dict[str, Any], method: str, fraction: float, smoke: bool, seed: int) -> dict[str, float]:
    """Test accuracy after retraining; the base network and the rankings of a seed are made once, in its first cell."""
    from convince.explain.roar import damaged

    if not found:
        data = bench.data("digits" if smoke else "fashion-mnist", train=200 if smoke else 1500, test=100 if smoke else 1000, seed=seed)
        base = bench.train(data, **how(smoke, seed))
        assert base.test is not None
        found.update(data=data, orders=rankings(data, base.answer, seed), accuracy=base.test.accuracy)
    done = bench.train(damaged(found["data"], found["orders"][method], fraction), **how(smoke, seed))
    assert done.test is not None
    return {"accuracy": done.test.accuracy, "accuracy of the base network": found["accuracy"]}


def rankings(data: Any, answer: Any, seed: int) -> dict[str, Any]:
    """Each method's estimate for every number of every image."""
    import torch

    from convince.explain.integrated_gradients import integrated_gradients
    from convince.explain.passes import scores
    from convince.explain.roar import at_random, sobel
    from convince.explain.smoothgrad import moments
    from convince.fit.randomness import generator
    from convince.kinds import as_found

    pieces: dict[str, list[Any]] = {method: [] for method in METHODS if method != "random"}
    noise = SIGMA * torch.randn(COPIES, data.preprocess.channels, *data.preprocess.size, generator=generator(seed, "roar", "noise"))
    with as_found(answer):
        for p in answer.parameters():
            p.requires_grad_(False)
        for rows in torch.arange(len(data.y)).split(256):
            x = data.float_batch(data.x.take(rows))
            target = scores(answer, x).argmax(1)
            gradient, square = moments(answer, x, target, torch.zeros_like(noise[:1]))
            mean, mean_square = moments(answer, x, target, noise)
            pieces["gradient"].append(gradient)
            pieces["gradient squared"].append(square)
            pieces["smoothgrad"].append(mean)
            pieces["smoothgrad squared"].append(mean_square)
            pieces["vargrad"].append(mean_square - mean.square())
            pieces["integrated gradients"].append(integrated_gradients(answer, x, target, 0.0, STEPS))
            pieces["sobel"].append(sobel(x))
    return {"random": at_random(data, generator(seed, "roar", "random"))} | {name: torch.cat(found) for name, found in pieces.items()}


def planted(bench: Bench, smoke: bool, seed: int) -> dict[str, float]:
    """Noise with the label written in four known pixels: accuracy with nothing, the known pixels, and as many random ones removed."""
    import torch

    from convince.data import MemoryStore
    from convince.explain.roar import at_random, damaged
    from convince.fit.randomness import generator

    data = bench.data("digits", train=300 if smoke else 1200, test=100 if smoke else 500, seed=seed)
    x = torch.randint(0, 256, (len(data.y), 1, 8, 8), generator=generator(seed, "roar", "planted"))
    bits = (data.y[:, None] >> torch.arange(4)) & 1
    x[:, 0, 0, :4] = 255 * bits
    data = dataclasses.replace(data, x=MemoryStore(x.to(torch.uint8)))
    known = torch.zeros(len(data.y), 1, 8, 8)
    known[:, 0, 0, :4] = 1.0
    orders = {"nothing": None, "oracle": known, "random": at_random(data, generator(seed, "roar", "at random"))}
    found = {}
    for name, order in orders.items():
        done = bench.train(data if order is None else damaged(data, order, 4 / 64), **{**how(smoke, seed), "epochs": 2 if smoke else 8})
        assert done.test is not None
        found[name] = done.test.accuracy
    return found


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    fractions = [f for f in ("0.3", "0.6", "0.9", "0.5") if f"random {f}" in numbers]

    def mean(method: str) -> list[float]:
        cells = [column(numbers, f"{method} {f}", "accuracy") for f in fractions]
        return [statistics.fmean(values) for values in zip(*cells, strict=True)]

    random = mean("random")
    less = {m: paired(f"accuracy after retraining, mean over fractions: {m} - random", mean(m), random) for m in METHODS if m != "random"}
    by_seed = {m: [a - b for a, b in zip(mean(m), random, strict=True)] for m in METHODS}
    ensembles, plain = ("smoothgrad squared", "vargrad"), ("gradient", "integrated gradients")
    supported = all(max(by_seed[m]) <= -0.03 for m in ensembles) and all(less[m].mean >= -0.03 for m in plain)
    contradicted = any(max(by_seed[m]) <= -0.05 for m in plain) or all(less[m].mean >= 0 for m in ensembles)
    table = [{"what": f"accuracy at {f}", **{m: statistics.fmean(column(numbers, f"{m} {f}", "accuracy")) for m in METHODS}} for f in fractions]
    control = {"what": "planted evidence, accuracy", **{k: statistics.fmean(column(numbers, "planted evidence", k)) for k in ("nothing", "oracle", "random")}}
    order = ("smoothgrad squared", "vargrad", "gradient", "integrated gradients", "smoothgrad", "gradient squared", "sobel")
    return said(supported, contradicted), [*(less[m] for m in order), *table, control]
