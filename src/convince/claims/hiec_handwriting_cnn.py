"""Claim of hiec-handwriting-cnn: five convolutional layers carry over to unseen writers better than two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from convince.claims import Bench, Numbers, column, paired
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve
from convince.recipes.image.hiec import as_data, write_style, written
from convince.types import Split

SAYS = "On writers not seen in training, a CNN with five convolutional layers is more accurate than the same code with two, and both than an MLP."
SUPPORTED = (
    "accuracy on unseen writers, five blocks - two blocks: at least +0.5 point in the mean with the 95 % paired t interval above 0; "
    "and the MLP (control) is below both by at least 2 points in the mean."
)
CONTRADICTED = "the interval of five blocks - two blocks lies below +0.5 point."
BUDGET = (
    "mnist strokes rewritten in drawn writer styles (slant, aspect, stroke, rotation, wobble), preprocessed to 32 px; 25 writers x 160 training images, "
    "10 other writers x 150 test images; five blocks (32, 64, 128, 256, 256), two blocks (32, 64; pools of 4), MLP 1024-512-512; all with SGD 0.05 "
    "cosine, batch 64, batch normalisation in the CNNs, 5 epochs, 5 paired seeds. Leak: five blocks once more, all 35 writers split at random into "
    "parts of the same sizes. Reduced against the catalogue: 5 of 6 epochs, 150 of 200 test images a writer."
)

FIVE = "handwriting-cnn:norm=True"
TWO = "handwriting-cnn:channels=(32,64),pool=4,norm=True"


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    writers, each, unseen, per, epochs, seeds = (4, 16, 2, 16, 1, 2) if small else (25, 160, 10, 150, 5, 5)
    for seed in range(seeds):
        made: dict[str, Any] = {}

        def sets(seed: int = seed, made: dict[str, Any] = made) -> dict[str, Any]:
            if not made:  # drawn when the first cell that is not stored asks for it
                made.update(styled(bench, writers, each, unseen, per, seed))
            return made

        how = {"batch": 64, "lr": 0.05, "epochs": epochs, "seed": seed, "augment": "none"}
        bench.arm("five", seed, partial(cell, sets, "writer", {**how, "model": FIVE}))
        bench.arm("two", seed, partial(cell, sets, "writer", {**how, "model": TWO}))
        bench.arm("mlp", seed, partial(cell, sets, "writer", {**how, "model": FIVE}, mlp))
        bench.arm("five, random split", seed, partial(cell, sets, "random", {**how, "model": FIVE}))


def styled(bench: Bench, writers: int, each: int, unseen: int, per: int, seed: int) -> dict[str, Any]:
    """Digits in writers' hands: split by writer, and at random into parts of the same sizes."""
    train, test = writers * each, unseen * per
    source = bench.data("digits" if bench.scale == "smoke" else "mnist", train=train, test=test, seed=seed)
    rows = torch.cat([source.split.train, source.split.test])
    pages = F.interpolate(source.x.take(rows).float() / 255, size=(56, 56), mode="bilinear")
    pages = F.pad(pages, (12, 12, 12, 12))  # room to lean and to grow
    gen = generator(seed, "writers")
    styles = {i: write_style(gen) for i in range(writers + unseen)}
    who = torch.cat([torch.arange(writers).repeat_interleave(each), torch.arange(writers, writers + unseen).repeat_interleave(per)])
    x, y, none = written(pages, who, styles, gen), source.y[rows], torch.empty(0, dtype=torch.int64)
    mixed = torch.randperm(train + test, generator=gen)
    splits = {
        "writer": Split(torch.arange(train), none, torch.arange(train, train + test)),
        "random": Split(mixed[:train].sort().values, none, mixed[train:].sort().values),
    }
    return {name: as_data(x, y, who, split, source.classes, f"mnist by {name}") for name, split in splits.items()}


def cell(sets: Callable[[], dict[str, Any]], split: str, how: dict[str, Any], build: Callable[[int], nn.Module] | None = None) -> dict[str, float]:
    """One training and its accuracy on the test writers (or the random test rows)."""
    data = sets()[split]
    run = prepare(resolve(settings(**how), data)[0], data)
    if build is not None:
        run.build = partial(build, data.k)
    fit(run)
    return {"accuracy": run.evaluate("test").accuracy, "parameters": sum(p.numel() for p in run.model.parameters())}


def mlp(k: int) -> nn.Module:
    """The control that knows no neighbourhood: 1024-512-512."""
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, k))


def judge(numbers: Numbers) -> tuple[str, list]:
    def gain(a: str, b: str) -> Any:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    main, controls, leak = gain("five", "two"), [gain("five", "mlp"), gain("two", "mlp")], gain("five, random split", "five")
    seen = "supported" if leak.low > 0 else "contradicted" if leak.high < 0 else "not decided"
    comparisons = [main, *controls, leak, {"what": "leak: a random split promises more than unseen writers keep", "value": seen}]
    if main.high < 0.005:
        return "contradicted", comparisons
    if main.mean >= 0.005 and main.low > 0 and all(control.mean >= 0.02 for control in controls):
        return "supported", comparisons
    return "inconclusive", comparisons
