"""Claim of eca-net: nearly free channel attention raises accuracy, no less than squeeze-and-excitation."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.layers import eca
from convince.parts import Card

SAYS = "ECA gates (9 parameters in a ResNet-8) raise test accuracy, and no less than SE gates (2,828 parameters) do."
SUPPORTED = "ECA - none is at least +0.3 points with its 95 % paired t interval above 0, and ECA - SE is at least -0.3 points in the mean."
CONTRADICTED = "the interval of ECA - none lies below 0."
BUDGET = (
    "cifar10, 2,000 training and 5,000 test images, ResNet-8 (16-32-64), flip and crop, SGD 0.1 cosine, batch 64, 6 epochs, "
    "4 paired seeds, 5 arms: none, ECA, SE with r=4, ECA with k=1, fixed random gates. "
    "Reduced against the catalogue (4,000 images, 10,000 test images, batch 128, 12 epochs) to about 150 s; batch 64 keeps the number of steps. "
    "The expected effect is small: an interval around 0 is likely, and its width says what could have been seen."
)

ARMS: dict[str, str | None] = {"none": None, "eca": "eca", "se": "se:r=4", "eca-k1": "eca:k=1"}


@final
class FixedGate(nn.Module):
    """Channels times ``sigmoid`` of fixed random numbers: what a gate does that learns nothing."""

    gate: Tensor

    def __init__(self, channels: int, gen: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("gate", torch.randn(channels, generator=gen).sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate[:, None, None]


@final
class RandomGates(Technique):
    """The control: gates where ECA has them, drawn once and never learned."""

    def on_start(self, run: Run) -> None:
        gen = generator(run.seed, "random-gates")
        eca.gate(run.model, "gate", lambda end: FixedGate(end.channels, gen))


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 1, 2) if small else ("cifar10", 2000, 5000, 6, 4)
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        how = {"model": "resnet8", "epochs": epochs, "batch": 64, "lr": 0.1, "seed": seed}
        for arm, part in ARMS.items():
            bench.arm(arm, seed, partial(plain, bench, data, how, ("flip-crop", part) if part else ("flip-crop",)))
        bench.arm("random", seed, partial(control, data, how))


def plain(bench: Bench, data: Any, how: dict[str, Any], parts: tuple[str, ...]) -> dict[str, float]:
    """One training with these parts."""
    return scores(bench.train(data, parts=parts, **how).run)


def control(data: Any, how: dict[str, Any]) -> dict[str, float]:
    """The same training with fixed random gates, which are no part anyone would want."""
    ready, _ = resolve(settings(**how, parts=("flip-crop",), augment="none"), data)
    run = prepare(ready, data)
    seat = Seat(Card(part="random-gates", kind="technique", title="control"), {}, RandomGates())
    run.team = Team([*run.team.seats, seat])
    fit(run)
    return scores(run)


def scores(run: Run) -> dict[str, float]:
    """Test accuracy and log loss, and how many parameters learn."""
    test = run.evaluate("test")
    return {"accuracy": test.accuracy, "log_loss": test.log_loss, "parameters": sum(p.numel() for p in run.model.parameters())}


def judge(numbers: Numbers) -> tuple[str, list]:
    def gain(a: str, b: str) -> Any:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    main, against = gain("eca", "none"), gain("eca", "se")
    rest = [gain("eca", "eca-k1"), gain("eca", "random"), gain("se", "none"), gain("random", "none")]
    detectable = {"what": "smallest ECA - none that these pairs show", "value": (main.high - main.low) / 2}
    comparisons = [main, against, *rest, detectable]
    if main.high < 0:
        return "contradicted", comparisons
    if main.mean >= 0.003 and main.low > 0 and against.mean >= -0.003:
        return "supported", comparisons
    return "inconclusive", comparisons
