"""Linear interpreters: does a classifier's class still win when every bias is left out of its scores?"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.explain.linear_scope import LinearInterpreter
from convince.fit import precision
from convince.fit.randomness import generator, preserved, seed_global

SAYS = "Classifiers lean heavily on their biases: with the gates of an image frozen, leaving the biases out changes the class of many images."
SUPPORTED = (
    "The class changes when the residual r is left out on at least 10 % of the test images, mean over seeds, with the lower end of the 95 % t interval above "
    "5 %; and on no image at all in the network without biases and batch norm (control)."
)
CONTRADICTED = "The upper end of that interval is below 5 %."
BUDGET = (
    "mnist, 6,000 images x 3 epochs, 1,000 test images, 5 seeds; pixels are not normalised, so that the mean is no bias. conv 16-32-64 with batch norm and "
    "biases, max-pooling, a linear layer on the 7x7 map; control: the same without biases and batch norm; a third arm is trained on inverted digits and is "
    "only reported, as are the share of the bias in the winning score and the share of positive votes inside the digit. Both networks must reach a mean test "
    "accuracy of 0.95, else the claim is not decided (the catalogue has no such rule). Interpreted in float64."
)

SEEDS = 5


def network(biases: bool) -> nn.Module:
    """Three convolutions; ``biases=False`` leaves out theirs, the head's and the batch norms."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(1, 16), (16, 32), (32, 64)]):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=biases), *([nn.BatchNorm2d(b)] if biases else []), nn.ReLU(), *([nn.MaxPool2d(2)] if i < 2 else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 49, 10, bias=biases))


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """Adam at 0.002 on a one-cycle schedule, batches of 64; pixels as they are."""
    plan = precision.choose("auto", "image")
    net = plan.place(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(x) // 64))
    gen = generator(seed, "linear-scope order")
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=gen).split(64):
            with plan.autocast():
                scores = net(plan.pixels(x[rows]))
            loss = F.cross_entropy(scores.float(), y[rows].to(plan.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.cpu().double().eval().requires_grad_(False)


def interpret(net: nn.Module, x: Tensor, y: Tensor, ink: Tensor) -> dict[str, float]:
    """What the frozen map says of each image; ``ink`` bool [n 1 h w]."""
    kept, shares, inside, right = [], [], [], []
    for pixels, labels, inner in zip(x.double().split(100), y.split(100), ink.split(100), strict=True):
        scope = LinearInterpreter(net, pixels)
        winner = scope.scores.argmax(1)
        votes = (scope.row(winner) * pixels).clamp_min(0).flatten(1)
        kept.append(scope.linear.argmax(1) == winner)
        shares.append(scope.bias_share().gather(1, winner[:, None])[:, 0])
        inside.append((votes * inner.flatten(1)).sum(1) / votes.sum(1).clamp_min(1e-12))
        right.append(winner == labels)
    mean = {name: float(torch.cat(values).double().mean()) for name, values in (("kept", kept), ("bias_share", shares), ("votes_inside", inside))}
    accuracy = float(torch.cat(right).double().mean())
    return {"changed": 1 - mean.pop("kept"), **mean, "ink": float(ink.double().mean()), "accuracy": accuracy}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def parts(seed: int = seed) -> dict[str, tuple[Tensor, Tensor]]:
            data = bench.data("digits" if small else "mnist", train=200 if small else 6000, test=50 if small else 1000, seed=seed)
            found = {}
            for part in ("train", "test"):
                pixels = data.x.take(data.split[part]).float() / 255
                found[part] = (pixels if pixels.shape[-1] == 28 else F.interpolate(pixels, 28), data.y[data.split[part]])
            return found

        def cell(biases: bool, inverted: bool = False, parts: Any = parts, seed: int = seed) -> dict[str, float]:
            (x, y), (test, labels) = parts()["train"], parts()["test"]
            with preserved():
                seed_global(seed, "linear-scope net")
                net = network(biases)
            net = train(net, 1 - x if inverted else x, y, 1 if small else 3, seed)
            return interpret(net, 1 - test if inverted else test, labels, test > 0.1)

        bench.arm("biases", seed, functools.partial(cell, True))
        bench.arm("no biases", seed, functools.partial(cell, False))
        bench.arm("biases, inverted digits", seed, functools.partial(cell, True, True))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    changed, control = column(numbers, "biases", "changed"), column(numbers, "no biases", "changed")
    found = paired("share of images whose class changes without biases", changed, [0.0] * len(changed))
    learnt = min(statistics.fmean(column(numbers, arm, "accuracy")) for arm in ("biases", "no biases")) >= 0.95
    rules = {
        "both networks reach 0.95": learnt,
        "mean at least 0.1": found.mean >= 0.1,
        "lower end above 0.05": found.low > 0.05,
        "no image changes in the control": max(control) == 0,
    }
    comparisons = [
        found,
        paired("the same, less the control's", changed, control),
        paired(
            "share of the bias in the winning score, less the control's", column(numbers, "biases", "bias_share"), column(numbers, "no biases", "bias_share")
        ),
        paired(
            "inverted digits: positive votes inside the digit, less its share of the area",
            column(numbers, "biases, inverted digits", "votes_inside"),
            column(numbers, "biases, inverted digits", "ink"),
        ),
        {"what": "rules", **rules},
    ]
    if all(rules.values()):
        return "supported", comparisons
    return ("contradicted" if learnt and found.high < 0.05 else "inconclusive"), comparisons
