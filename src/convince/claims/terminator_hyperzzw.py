"""Claim of terminator-hyperzzw: kernels made by slow nets and multiplied by the input carry the network; it learns fast; its features have mean zero."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from convince.backbones.terminator import GlobalKernel, GroupStandardise, HyperZZWLocal, SlowNet, Terminator
from convince.claims import Bench, Numbers, column, paired, pooled, said, together
from convince.data import Data
from convince.fit.adapters import seat
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.parts import Card

TARGET = {"model": "terminator-mini", "data": "digits", "accuracy": 0.95}  # trained by sign steps of up to three times the rate, as in the paper
SAYS = (
    "1. Kernels that slow nets generate from coordinates, multiplied by the activations, serve the network better than kernels that are free weights and "
    "do not depend on the input. 2. The network learns faster than a ResNet of as many parameters. 3. Its features before the activation have mean zero."
)
SUPPORTED = (
    "1. generated - free, mean of the test accuracies after epochs 1, 3 and 5, has its 95 % paired t interval above 0; 2. it is ahead of the ResNet after "
    "epoch 1 and after epoch 3 on every seed of that arm; 3. |mean| / standard deviation over test images and positions is below 0.1 for every channel of "
    "both blocks (the mean over seeds of the largest). All three."
)
CONTRADICTED = "1. the interval lies below 0; or 2. it is behind the ResNet after epoch 1 and after epoch 3 on every seed; or 3. the ratio is 0.5 or more."
BUDGET = (
    "mnist at 14x14 by 2x2 means, 2,000 training and 2,000 test images, 2 blocks (1 to 16 to 32 channels), slow feedback 1 and norm penalty 5e-5 in both arms "
    "of claim 1, AdamW 0.001 cosine, batch 64, 5 epochs, float32, no augmentation, 5 paired seeds. Free kernels begin as the slow nets' first kernels, and "
    "the global one is applied as it is (W = K). The ResNet has 3 stages of one block, its widths are chosen for equal parameters (within 5 %), and the same "
    "schedule; 3 seeds. Control, reported: no slow feedback, 3 seeds. Against the catalogue: 2,000 of 3,000 training and of 5,000 test images, for the clock."
)
CURVE = Card(part="curve", kind="technique", title="test accuracy after some epochs")
EPOCHS = (1, 3, 5)
NET = "terminator:channels=(16,32)"
RESNET = "resnet:layers=(1,1,1),widths=(19,38,76)"
ADAM = "adamw:lr=0.001"


@final
class FreeKernel(nn.Module):
    """A global kernel of free weights, applied as it is: ``W = K``."""

    def __init__(self, made: GlobalKernel) -> None:
        super().__init__()
        self.weight = nn.Parameter(made.kernel().detach().clone())

    def kernel(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand_as(x)


@final
class FreeLocal(nn.Module):
    """A local kernel of free weights, which looks at no input."""

    def __init__(self, made: HyperZZWLocal) -> None:
        super().__init__()
        slow = made.slow.eval()
        assert isinstance(slow, SlowNet)
        self.weight = nn.Parameter(slow(torch.zeros(1, slow.channels, *slow.size)).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


def freed(build: Callable[[], nn.Module]) -> nn.Module:
    """The same network with free kernels in the place of generated ones."""
    model = build()
    assert isinstance(model, Terminator)
    for block in model.blocks:
        block.branch.kernel = FreeKernel(block.branch.kernel)  # type: ignore[union-attr, arg-type]
        for local in block.branch.local:  # type: ignore[union-attr]
            local.slow = FreeLocal(local)
    return model


@final
class Curve(Technique):
    """Notes the test accuracy after the epochs of :data:`EPOCHS`."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_epoch(self, run: Run) -> None:
        if run.epoch + 1 in EPOCHS:
            self.found[run.epoch + 1] = run.evaluate("test").accuracy


@torch.no_grad()
def off_centre(run: Run, rows: Tensor) -> list[float]:
    """The largest |mean| / standard deviation of a channel of each block, before the activation, over these rows and all positions, in eval mode."""
    model = run.model.eval()
    assert isinstance(model, Terminator)
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, i, out: seen.append(out)) for m in model.modules() if isinstance(m, GroupStandardise)]
    model(run.normalise(run.plan.pixels(run.data.x.take(rows))))
    for hook in hooks:
        hook.remove()
    return [float((out.mean((0, 2, 3)).abs() / out.std((0, 2, 3)).clamp_min(1e-12)).max()) for out in seen]


def cell(data: Data, arm: str, how: dict[str, Any]) -> dict[str, float]:
    """One training: accuracy after epochs 1, 3 and 5, parameters, and how far the features' means lie from zero."""
    parts = (ADAM,) if arm in ("resnet", "no feedback") else (ADAM, "slow-feedback")
    run = prepare(resolve(settings(model=RESNET if arm == "resnet" else NET, parts=parts, **how), data)[0], data)
    curve = Curve()
    run.team = Team([*(seat(spec) for spec in run.settings.parts), Seat(CURVE, {}, curve)])
    if arm == "free":
        run.build = partial(freed, run.build)
    fit(run)
    last = max(curve.found)
    numbers = {f"epoch {e}": curve.found.get(e, curve.found[last]) for e in EPOCHS}
    found = {**numbers, "mean": statistics.fmean(numbers.values()), "parameters": sum(p.numel() for p in run.model.parameters())}
    if arm != "resnet":
        found |= {f"off centre {i + 1}": value for i, value in enumerate(off_centre(run, data.split.test[:1000]))}
    return found


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds, fewer = ("digits", 64, 48, 1, 2, 1) if small else ("mnist", 2000, 2000, 5, 5, 3)
    how = {"epochs": epochs, "batch": 32 if small else 64, "precision": "fp32", "augment": "none"}
    for seed in range(seeds):
        drawn = bench.data(name, train=train, test=test, seed=seed)
        data = drawn if small else pooled(drawn)
        for arm in ("generated", "free", *(("resnet", "no feedback") if seed < fewer else ())):
            bench.arm(arm, seed, partial(cell, data, arm, {**how, "seed": seed}))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    gain = paired("mean accuracy after epochs 1, 3, 5, generated - free", column(numbers, "generated", "mean"), column(numbers, "free", "mean"))
    few = len(numbers["resnet"])

    def ahead(epoch: int, other: str) -> list[float]:
        pairs = zip(column(numbers, "generated", f"epoch {epoch}")[:few], column(numbers, other, f"epoch {epoch}"), strict=True)
        return [a - b for a, b in pairs]

    first, third = ahead(1, "resnet"), ahead(3, "resnet")
    off = max(statistics.fmean(column(numbers, "generated", f"off centre {i}")) for i in (1, 2))
    comparisons: list[Any] = [gain]
    for epoch in EPOCHS:
        comparisons.append(paired(f"accuracy after epoch {epoch}, terminator - resnet", ahead(epoch, "resnet"), [0.0] * few))
        comparisons.append(paired(f"accuracy after epoch {epoch}, slow feedback - none", ahead(epoch, "no feedback"), [0.0] * few))
    facts: dict[str, float] = {"largest |mean| / sd of a channel": off}
    facts |= {f"parameters, {arm}": statistics.fmean(column(numbers, arm, "parameters")) for arm in numbers}
    parts = {
        "1. generated kernels": said(gain.low > 0, gain.high < 0),
        "2. fast learning": said(min(first) > 0 and min(third) > 0, max(first) < 0 and max(third) < 0),
        "3. mean zero": said(off < 0.1, off >= 0.5),
    }
    return together(parts.values()), [*comparisons, facts, parts]
