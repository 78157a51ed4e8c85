"""Claim of crossvit: two transformers on two scales gain when they exchange through one class token each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from timm.models.crossvit import MultiScaleBlock
from torch import Tensor, nn

from convince.backbones.crossvit import CrossVit, OtherFusion
from convince.claims import Bench, Numbers, Paired, column, padded, paired
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve
from convince.models.counting import count

TARGET = {"model": "crossvit-mini", "data": "digits", "accuracy": 0.93}  # no convolutions, and 4 and 1 patches of 8x8 pixels
SAYS = "Two branches that exchange by cross-attention of their class tokens are more accurate than the same two apart, whose scores are averaged."
SUPPORTED = (
    "cross - apart is at least +0.3 points of test accuracy in the mean with its 95 % paired t interval above 0, and the control (keys and values of another "
    "image) keeps less than half of that gain in the mean."
)
CONTRADICTED = "the interval of cross - apart lies below 0."
BUDGET = (
    "fashion-mnist padded to 32 px, 2,000 training and 3,000 test images, crossvit-mini (patches 4 and 8, widths 48 and 96); apart has widths 54 and 108, "
    "which gives equal parameters (+0.3 %). AdamW 0.001, weight decay 0.05, cosine after a quarter of warm-up, batch 64, 6 epochs (186 steps), fp32, 4 "
    "paired seeds, 3 arms: apart, cross, and the control. Each branch alone and all-attention once, with multiply-adds. Against the catalogue: 2,000 of 3,000 "
    "training images, 3,000 test images, 6 of 8 epochs; batch 64 for 128 keeps its 184 steps; the control's rule is added to the verdict."
)
WIDER = "dims=(54,108),fusion=none"


@final
class Silent(nn.Module):
    """Stands where a branch's last normalisation was: the head hears nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def alone(model: CrossVit, branch: int) -> CrossVit:
    """A network whose branches are apart, answering by one of them; of the other its patch embedding is left, which nothing reads."""
    model.norm[1 - branch] = Silent()
    for block in model.blocks:
        assert isinstance(block, OtherFusion)
        block.blocks[1 - branch] = nn.Identity()
    return model


def astray(model: CrossVit) -> CrossVit:
    """The control: in every cross-attention the class token meets the patch tokens of the image before it in the batch."""

    def other(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.cat((inputs[0][:, :1], inputs[0][:, 1:].roll(1, 0)), 1),)

    for block in model.blocks:
        assert isinstance(block, MultiScaleBlock)
        for fusion in block.fusion:
            fusion.register_forward_pre_hook(other)
    return model


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 1, 2) if small else ("fashion-mnist", 2000, 3000, 6, 4)
    arms: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "apart": (WIDER, lambda model: model),
        "cross": ("fusion=cross", lambda model: model),
        "cross, another image": ("fusion=cross", astray),
    }
    once: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "small patches alone": ("fusion=none", partial(alone, branch=0)),
        "large patches alone": ("fusion=none", partial(alone, branch=1)),
        "all-attention": ("fusion=all", lambda model: model),
    }
    for seed in range(seeds):
        data = padded(bench.data(name, train=train, test=test, seed=seed), 8 if small else 32)
        for arm, (options, change) in {**arms, **(once if seed == 0 else {})}.items():
            bench.arm(arm, seed, partial(cell, data, seed, epochs, options, change))


def cell(data: Any, seed: int, epochs: int, options: str, change: Callable[[Any], Any]) -> dict[str, float]:
    """One training; accuracy, and the network's parameters and multiply-adds."""
    how = settings(
        model=f"crossvit-mini:{options}",
        parts=("adamw:lr=0.001,weight_decay=0.05",),
        epochs=epochs,
        batch=64,
        warmup=0.25,
        precision="fp32",
        augment="none",
        seed=seed,
    )
    run = prepare(resolve(how, data)[0], data)
    build = run.build
    run.build = lambda: change(build())
    fit(run)
    counts = count(run.model, data.preprocess.size, data.preprocess.channels)
    return {"accuracy": run.evaluate("test").accuracy, "parameters": counts.parameters, "macs": counts.macs}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    apart = column(numbers, "apart", "accuracy")
    gain: Paired = paired("accuracy, cross - apart", column(numbers, "cross", "accuracy"), apart)
    control = paired("accuracy, cross with another image - apart (control)", column(numbers, "cross, another image", "accuracy"), apart)
    facts: dict[str, float] = {}
    for arm in ("apart", "cross", "small patches alone", "large patches alone", "all-attention"):
        facts |= {f"{arm}, seed 0: {metric}": column(numbers, arm, metric)[0] for metric in ("accuracy", "parameters", "macs")}
    comparisons = [gain, control, facts]
    if gain.high < 0:
        return "contradicted", comparisons
    if gain.mean >= 0.003 and gain.low > 0 and control.mean < gain.mean / 2:
        return "supported", comparisons
    return "inconclusive", comparisons
