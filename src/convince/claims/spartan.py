"""Claim of spartan: its two mixers earn their place against themselves without dilation, without the turn, and against ConvNeXt's block."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from convince.backbones.spartan import CMixer, Spartan, SpartanBlock, conv_norm_act
from convince.claims import Bench, Numbers, Paired, column, paired, pooled
from convince.data import Data
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve

TARGET = {"model": "spartan-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "At equal parameters SpaRTAN's block is more accurate than ConvNeXt's, and both of its ideas help: the dilated path of the spatial mixer, and the complex "
    "numbers that turn the channel mixer's features."
)
SUPPORTED = (
    "Test accuracy of full - ConvNeXt has its 95 % paired t interval above 0, and full - undilated and full - unturned are positive in the mean, all arms "
    "within 3 % in parameters."
)
CONTRADICTED = "Any of the three intervals lies below 0."
BUDGET = (
    "cifar10 averaged to 16x16 px, 3,000 training and 3,000 test images; stem of step 1, stages of 16, 32, 64 channels, 1, 2, 1 blocks, expansions 4, 2, 2; "
    "5 epochs, AdamW 0.0025 cosine, weight decay 0.03, batch 128, no augmentation, stochastic depth 0.1, 4 paired seeds, 4 arms: full; undilated (both paths "
    "plain 3x3); unturned (complex numbers fixed at 1); the same stem, downsampling and head around timm's ConvNeXt blocks, widths 17, 34, 70 for equal "
    "parameters. All layer scales begin at 0.1, since the paper's 0.00001 does not move in so few steps. Against the catalogue: 3,000 of 5,000 test images."
)
NET = "spartan:dims=(16,32,64),depths=(1,2,1),expand=(4,2,2),stem=1,layer_scale=0.1"
CONVNEXT = (17, 34, 70)


def unturned(model: Spartan) -> Spartan:
    """Complex numbers at 1 + 0i that do not learn."""
    for module in model.modules():
        if isinstance(module, CMixer):
            with torch.no_grad():
                module.turn.copy_(torch.tensor([1.0, 0.0]).expand_as(module.turn))
            module.turn.requires_grad_(False)
    return model


def with_convnext(model: Spartan) -> Spartan:
    """ConvNeXt's blocks in place of SpaRTAN's, and their widths in the stem, between the stages and in the head."""
    from timm.models.convnext import ConvNeXtBlock

    entry = model.stem[0][0]  # type: ignore[index]
    assert isinstance(entry, nn.Conv2d)
    model.stem[1] = conv_norm_act(entry.out_channels, CONVNEXT[0], 3, padding=1)
    for i, (stage, width) in enumerate(zip(model.stages, CONVNEXT, strict=True)):
        assert isinstance(stage, nn.Sequential)
        for j, module in enumerate(stage):
            if isinstance(module, SpartanBlock):
                stage[j] = ConvNeXtBlock(width, drop_path=module.drop_path.rate, ls_init_value=0.1)
            else:
                stage[j] = conv_norm_act(CONVNEXT[i - 1], width, 2, nn.SiLU, stride=2)
    model.num_features, model.fc = CONVNEXT[-1], nn.Linear(CONVNEXT[-1], model.num_classes)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:  # ConvNeXt's own law, for its blocks and the head
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return model


ARMS = {"full": NET, "undilated": f"{NET},dilation=1", "unturned": NET, "convnext": NET}
CHANGES: dict[str, Callable[[Spartan], Spartan]] = {"unturned": unturned, "convnext": with_convnext}


def cell(data: Data, arm: str, epochs: int, batch: int, seed: int) -> dict[str, float]:
    """One training: test accuracy, and the parameters that learn."""
    how = settings(model=ARMS[arm], parts=("adamw:lr=0.0025,weight_decay=0.03",), epochs=epochs, batch=batch, seed=seed, augment="none")
    run = prepare(resolve(how, data)[0], data)
    if arm in CHANGES:
        build = run.build
        run.build = lambda: CHANGES[arm](build())  # type: ignore[arg-type]
    fit(run)
    return {"accuracy": run.evaluate("test").accuracy, "parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad)}


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, seeds, batch = ("digits", 64, 64, 1, 2, 16) if smoke else ("cifar10", 3000, 3000, 5, 4, 128)
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        data = data if smoke else pooled(data)
        for arm in ARMS:
            bench.arm(arm, seed, partial(cell, data, arm, epochs, batch, seed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(arm: str) -> Paired:
        return paired(f"accuracy, full - {arm}", column(numbers, "full", "accuracy"), column(numbers, arm, "accuracy"))

    convnext, undilated, unturned_ = gain("convnext"), gain("undilated"), gain("unturned")
    facts = {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in numbers for metric in ("accuracy", "parameters")}
    gap = max(abs(facts[f"{arm}: parameters"] / facts["full: parameters"] - 1) for arm in ARMS)
    comparisons = [convnext, undilated, unturned_, {**facts, "largest gap in parameters": gap}]
    if min(convnext.high, undilated.high, unturned_.high) < 0:
        return "contradicted", comparisons
    if convnext.low > 0 and undilated.mean > 0 and unturned_.mean > 0 and gap <= 0.03:
        return "supported", comparisons
    return "inconclusive", comparisons
