"""Claim of gradient-noise: noise that fades lets a very deep, badly started net train with plain SGD, and does no harm to a well-started one."""

from __future__ import annotations

import itertools
import math
import statistics
from functools import partial
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.errors import Mistake
from convince.fit import adapters
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.state import named
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.optim.gradient_noise import GradientNoise, variance
from convince.parts import Card

SAYS = "Gaussian noise that fades, added to gradients, lets a 20-layer net with a poor start train with plain SGD, and costs a well-started net nothing."
SUPPORTED = (
    "With the simple start, annealed - no noise (eta and all else chosen on other seeds) is at least +5 points of mean test accuracy with the exact sign-flip "
    "test's p below 0.05, or the share of runs above 90 % is at least 20 points higher; with He's start the mean difference is at least -0.5 points; "
    "and annealed noise is at least as good in the mean as fixed noise of the same mean variance."
)
CONTRADICTED = "with the simple start the 95 % paired t interval of annealed - no noise lies below 0."
BUDGET = (
    "mnist, 10,000 training, 1,000 validation and 2,000 test images, 784-50x20-10 ReLU net (88,210 parameters), plain SGD without momentum or decay, constant "
    "rate, batch 128, 6 epochs, fp32. Rate: best of 0.1, 0.03, 0.01 without noise (simple start, mean validation accuracy of 3 seeds), the same in all arms. "
    "Eta: best of 0.01, 0.3, 1 on seeds 0 to 3 (validation). Test: seeds 4 to 11, 6 arms: simple start with no, annealed, fixed (same mean variance) "
    "noise and noise whose sign is fixed for each weight; He's start with no noise and annealed 0.3. Reduced against the catalogue: 2,000 of "
    "10,000 test images; the etas not chosen are not run on the test seeds; the sign-flip test stands for its interval."
)
RATES, ETAS = (0.1, 0.03, 0.01), (0.01, 0.3, 1.0)


@final
class DeepMLP(nn.Module):
    """``depth`` hidden layers of ``width`` with ReLU on flattened images; biases start at 0.

    ``start``: "simple" draws all weights from N(0, 0.1^2), "he" from N(0, 2 / inputs), "zero" draws none.
    """

    def __init__(self, inputs: int, k: int = 10, depth: int = 20, width: int = 50, start: Literal["simple", "he", "zero"] = "simple") -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, k))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
                if start == "zero":
                    nn.init.zeros_(layer.weight)
                else:
                    nn.init.normal_(layer.weight, std=0.1 if start == "simple" else math.sqrt(2 / layer.in_features))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.layers(x.flatten(1))


@final
class Bias(Technique):
    """The control: noise of the annealed size whose sign is drawn once for each weight."""

    rank = 20

    def __init__(self, eta: float) -> None:
        self.eta = eta

    def on_grad(self, run: Run) -> None:
        sigma, sign, gen = math.sqrt(variance(run.stage_steps, self.eta)), generator(run.seed, "signs"), run.gen("bias")
        for _, p in named(run):
            if p.grad is not None:
                way = torch.randint(0, 2, p.shape, generator=sign).to(p) * 2 - 1
                p.grad += sigma * way * torch.randn(p.shape, generator=gen).to(p).abs()


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, val, test, epochs = ("digits", 64, 32, 64, 1) if small else ("mnist", 10_000, 1000, 2000, 6)
    tries, choice, last = (1, 1, 3) if small else (3, 4, 12)
    batch = 32 if small else 128
    data = {seed: bench.data(name, train=train, val=val, test=test, seed=seed) for seed in range(last)}
    steps = epochs * (train // batch)

    def arm(title: str, seed: int, start: str, noise: Technique | None, lr: float) -> None:
        how = {"model": "small-cnn", "epochs": epochs, "batch": batch, "lr": lr, "schedule": "constant", "seed": seed}
        bench.arm(title, seed, partial(cell, data[seed], how, start, noise))

    for lr in RATES:
        for seed in range(tries):
            arm(f"rate {lr:g}", seed, "simple", None, lr)
    lr = best(bench.numbers, "rate", RATES)
    for seed in range(choice):
        for eta in ETAS:
            arm(f"eta {eta:g}", seed, "simple", GradientNoise(eta=eta), lr)
    eta = best(bench.numbers, "eta", ETAS)
    level = statistics.fmean(variance(t, eta) for t in range(steps))
    for seed in range(choice, last):
        arm("none", seed, "simple", None, lr)
        arm("annealed", seed, "simple", GradientNoise(eta=eta), lr)
        arm("fixed", seed, "simple", GradientNoise(eta=level, anneal="fixed"), lr)
        arm("signs fixed", seed, "simple", Bias(eta), lr)
        arm("he, none", seed, "he", None, lr)
        arm("he, annealed", seed, "he", GradientNoise(eta=0.3), lr)


def best(numbers: Numbers, what: str, values: tuple[float, ...]) -> float:
    """The value whose runs have the highest mean validation accuracy; the first where two tie."""
    return max(values, key=lambda value: statistics.fmean(column(numbers, f"{what} {value:g}", "val_accuracy")))


def cell(data: Any, how: dict[str, Any], start: str, noise: Technique | None) -> dict[str, float]:
    """One training with plain SGD; a run whose loss is no longer finite answers by chance."""
    run = prepare(resolve(settings(augment="none", precision="fp32", warmup=0.0, **how), data)[0], data)
    inputs = data.preprocess.channels * math.prod(data.preprocess.size)
    run.build = lambda: DeepMLP(inputs, data.k, start=start)  # type: ignore[arg-type]
    seats = [Seat(Card(part="plain-sgd", kind="optimizer", title="SGD"), {}, adapters.Optimizer(torch.optim.SGD, {}))]
    if noise is not None:
        seats.append(Seat(Card(part="noise", kind="technique", title="Noise"), {}, noise))
    run.team = Team([*run.team.seats, *seats])
    try:
        fit(run)
    except Mistake as refusal:
        if "the loss is" not in str(refusal):  # the loop refuses to go on with a loss that is not finite
            raise
        return {"accuracy": 1 / data.k, "val_accuracy": 1 / data.k, "finite": 0.0}
    return {"accuracy": run.evaluate("test").accuracy, "val_accuracy": run.evaluate("val").accuracy, "finite": 1.0}


def flips(d: list[float]) -> float:
    """The exact two-sided p of the sign-flip test: the share of all sign patterns whose mean is as far from 0 as this one's."""
    seen = abs(sum(d)) * (1 - 1e-12)
    return statistics.fmean(abs(sum(s * v for s, v in zip(signs, d, strict=True))) >= seen for signs in itertools.product((1, -1), repeat=len(d)))


def judge(numbers: Numbers) -> tuple[str, list]:
    def gain(a: str, b: str) -> Any:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    def good(arm: str) -> float:
        return statistics.fmean(value > 0.9 for value in column(numbers, arm, "accuracy"))

    main, he, fixed, bias = gain("annealed", "none"), gain("he, annealed", "he, none"), gain("annealed", "fixed"), gain("annealed", "signs fixed")
    p = flips([a - b for a, b in zip(column(numbers, "annealed", "accuracy"), column(numbers, "none", "accuracy"), strict=True)])
    share = good("annealed") - good("none")
    comparisons = [
        main,
        {"what": "exact sign-flip p of annealed - none", "value": p},
        {"what": "share of runs above 90 %, annealed - none", "value": share},
        he,
        fixed,
        bias,
        {"what": "chosen rate", "value": best(numbers, "rate", RATES)},
        {"what": "chosen eta", "value": best(numbers, "eta", ETAS)},
        *(
            {"what": f"mean accuracy, {arm}", "value": statistics.fmean(column(numbers, arm, "accuracy"))}
            for arm in ("none", "annealed", "fixed", "signs fixed")
        ),
    ]
    if main.high < 0:
        return "contradicted", comparisons
    helps = (main.mean >= 0.05 and p < 0.05) or share >= 0.2
    return ("supported" if helps and he.mean >= -0.005 and fixed.mean >= 0 else "inconclusive"), comparisons
