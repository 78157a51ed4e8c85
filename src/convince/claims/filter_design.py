"""Claim of filter-design: what first filters look like, at one scale, decides how well a network learns behind them from few labels."""

from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from typing import Any

import torch

from convince.claims import Bench, Numbers, column, paired, said
from convince.data.split import in_shares
from convince.diagnose.filter_grid import three_convs
from convince.diagnose.filter_report import filter_report
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve

DESIGNED = ("gabor", "pca-patches", "kmeans")
ARMS = {scheme: f"filter-init:scheme={scheme},frozen=true" for scheme in ("kaiming", *DESIGNED, "orthogonal", "constant")}
ARMS["trained"] = "filter-init:scheme=kaiming"
SAYS = (
    "The choice of the first filters changes what a network learns and should not be an afterthought: behind frozen first filters of equal scale, a fixed "
    "bank (Gabor) or filters learnt from patches without labels (PCA, k-means) give higher accuracy than random ones, and filters that are all equal a lower "
    "one."
)
SUPPORTED = (
    "the one of gabor, pca-patches and kmeans with the highest mean validation accuracy gains at least 1 point of test accuracy over kaiming with its 95 % "
    "paired t interval above 0, and constant is at least 5 points below kaiming in the mean."
)
CONTRADICTED = "that interval lies below 0, or constant is less than 1 point below kaiming."
BUDGET = (
    "fashion-mnist at 28 px, three convolutions (16 filters of 5x5, then 32 and 64 of 3x3), the first frozen; 500 labelled images in the classes' shares and "
    "5,000 more whose labels are taken away, of which 5,500 the patch schemes see 5,000; 500 validation and 10,000 test images; 20 epochs, batch 32, SGD 0.05 "
    "cosine, no augmentation, 6 paired seeds with the same split and the same weights behind the first layer; all schemes scaled to Kaiming's variance. "
    "References: a trained first layer that begins as kaiming, orthogonal filters, and equal filters as the negative control. Stored beside accuracy: "
    "filter-report's mean absolute cosine. As in the catalogue; its long check (5,000 labels) is scale 'paper', with 4 epochs."
)


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, labelled, more, val, test, epochs, seeds = ("digits", 64, 64, 32, 64, 1, 2) if small else ("fashion-mnist", 500, 5000, 500, 10_000, 20, 6)
    if bench.scale == "paper":
        labelled, epochs = 5000, 4
    for seed in range(seeds):
        data = few(bench.data(name, train=labelled + more, val=val, test=test, seed=seed), labelled)
        for arm, part in ARMS.items():
            bench.arm(arm, seed, partial(cell, data, part, epochs, seed))


def few(data: Any, labelled: int) -> Any:
    """The same data with the labels of all but ``labelled`` training images, in the classes' shares, taken away."""
    y = data.y.clone()
    y[data.split.train] = -1
    kept = in_shares(data.split.train, data.y, labelled)
    y[kept] = data.y[kept]
    return dataclasses.replace(data, y=y)


def cell(data: Any, part: str, epochs: int, seed: int) -> dict[str, float]:
    """One training: accuracies, and how alike the first filters are at its end."""
    how = settings(model="small-cnn", parts=(part,), epochs=epochs, batch=32, lr=0.05, seed=seed, augment="none")
    run = prepare(resolve(how, data)[0], data)
    run.build = partial(three_convs, data.k, data.preprocess.channels)
    fit(run)
    first = run.model.get_submodule("conv1").weight
    assert isinstance(first, torch.Tensor)
    return {"accuracy": run.evaluate("test").accuracy, "val": run.evaluate("val").accuracy, "cosine": filter_report(first).cosine}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    chosen = max(DESIGNED, key=lambda scheme: statistics.fmean(column(numbers, scheme, "val")))

    def gain(a: str, b: str) -> Any:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    main, control = gain(chosen, "kaiming"), gain("constant", "kaiming")
    rest = [gain(arm, "kaiming") for arm in ARMS if arm not in (chosen, "constant", "kaiming")]
    facts = {f"{arm}: mean {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in ARMS for metric in ("accuracy", "val", "cosine")}
    supported = main.mean >= 0.01 and main.low > 0 and control.mean <= -0.05
    return said(supported, main.high < 0 or control.mean > -0.01), [main, control, *rest, facts]
