"""Claim of residual attention: naive masks fail as their modules stack, residual ones do not."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from convince.backbones.residual_attention_network import AttentionModule
from convince.claims import Bench, Numbers, column, paired, pooled, said
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare

TARGET = {"model": "residual-attention-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "Attention residual learning (1 + M) T (ARL) is more accurate than naive attention M T (NAL), and the more so the more modules are stacked: "
    "products of masks starve deep features."
)
SUPPORTED = "ARL - NAL with 3 modules a stage, test accuracy, has its 95 % paired t interval above 0, and it is larger in the mean than with 1 module a stage."
CONTRADICTED = "the interval of ARL - NAL with 3 modules a stage lies below 0."
BUDGET = (
    "cifar10 averaged to 16x16 pixels, 2,000 training and 5,000 test images; residual-attention-mini (16, 32, 64) with 1 and with 3 modules in each of "
    "3 stages (9 modules, trunk of 128 layers); 6 epochs, batch 64, SGD with Nesterov momentum 0.1 cosine, no augmentation, 4 paired seeds. Control, 2 seeds: "
    "the masks of the ARL network with 3 modules held at 0.5 (H = 1.5 T), which shows what a mask adds; not part of the rules. Reduced against the catalogue: "
    "2,000 of 3,000 images; its second claim, of label noise, is for longer runs and left out."
)
MODEL = "residual-attention-mini:modules=({m},{m},{m}),mode={mode}"


@final
class Level(nn.Module):
    """What stands in a mask branch: a score of 0 everywhere, whose sigmoid is 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def held(model: nn.Module) -> nn.Module:
    """The same network with every mask at 0.5."""
    for module in model.modules():
        if isinstance(module, AttentionModule):
            module.mask = Level()  # type: ignore[assignment]
    return model


def cell(data: Any, how: dict[str, Any], frozen: bool) -> dict[str, float]:
    """One training."""
    run = prepare(settings(**how, augment="none"), data)
    if frozen:
        build = run.build
        run.build = lambda: held(build())
    fit(run)
    return {"accuracy": run.evaluate("test").accuracy, "parameters": sum(p.numel() for p in run.model.parameters())}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds, batch = ("digits", 64, 64, 1, 2, 32) if small else ("cifar10", 2000, 5000, 6, 4, 64)
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        data = data if small else pooled(data)
        how = {"epochs": epochs, "batch": batch, "lr": 0.1, "seed": seed}
        for m in (1, 3):
            for mode in ("arl", "nal"):
                bench.arm(f"{mode}, {m}", seed, partial(cell, data, {**how, "model": MODEL.format(m=m, mode=mode)}, False))
        if seed < 2:
            bench.arm("held, 3", seed, partial(cell, data, {**how, "model": MODEL.format(m=3, mode="arl")}, True))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def accuracy(mode: str, m: int) -> list[float]:
        return column(numbers, f"{mode}, {m}", "accuracy")

    def gain(m: int) -> Any:
        return paired(f"accuracy, ARL - NAL, {m} a stage", accuracy("arl", m), accuracy("nal", m))

    deep, shallow, controls = gain(3), gain(1), accuracy("held", 3)
    facts = {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in numbers for metric in ("accuracy", "parameters")}
    facts["(ARL - NAL with 3 a stage) - (ARL - NAL with 1)"] = deep.mean - shallow.mean
    masks = paired("accuracy, ARL - its masks held at 0.5, 3 a stage", accuracy("arl", 3)[: len(controls)], controls)
    comparisons = [deep, shallow, masks, facts]
    return said(deep.low > 0 and deep.mean > shallow.mean, deep.high < 0), comparisons
