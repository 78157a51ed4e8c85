"""Deep Taylor decomposition on MNIST: does the score fall faster when its highest pixels are taken out than by squared gradients or by chance?"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said
from convince.explain.deep_taylor import deep_taylor, nonpositive_bias_
from convince.explain.passes import gradients, scores
from convince.fit import precision
from convince.fit.randomness import generator, preserved, seed_global

SAYS = "Heat maps of deep Taylor decomposition are conservative and positive, and mark the pixels that carry the score, unlike sensitivity analysis."
SUPPORTED = (
    "The area under the target's score, as the highest pixels are set to 0, is lower for deep Taylor than for squared gradients and than for a random order: "
    "both 95 % t intervals over seeds lie below 0. Besides, as identities, |sum R - f| / f below 1 % and least R at least -1e-6 of the largest in every seed."
)
CONTRADICTED = "Either interval lies above 0."
BUDGET = (
    "mnist, 10,000 training digits, 200 test digits that are rightly classified with a score above 0; 3 convolutions (16, 32, 64) with 2x2 sum pooling, "
    "a hidden layer of 128, biases kept at most 0; 4 epochs, Adam at 0.001, batch 64; 5 seeds. Steps of 1 % of the pixels up to 20 %, areas divided by the "
    "score of the whole image. Gradient times input is reported only."
)

SEEDS = 5
STEPS = 20  # of 1 % of the pixels each


class SumNet(nn.Module):
    """Three times conv3x3 - ReLU - 2x2 sum pooling, a hidden ReLU layer, ten scores; pixels [0, 1] as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 16), (16, 32), (32, 64)))
        self.hidden, self.fc = nn.Linear(64 * 9, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.avg_pool2d(F.relu(conv(x)), 2, divisor_override=1)
        return self.fc(F.relu(self.hidden(x.flatten(1))))


def train(x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """Plain training, biases clamped after each step: the house's loop has no such part."""
    plan = precision.choose("auto", "image")
    with preserved():
        seed_global(seed, "sum net")
        net = plan.place(SumNet())
    nonpositive_bias_(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    gen = generator(seed, "sum net order")
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=gen).split(64):
            with plan.autocast():
                out = net(plan.pixels(x[rows]))
            loss = F.cross_entropy(out.float(), y[rows].to(plan.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            nonpositive_bias_(net)
    return net.cpu().eval()


def area(net: nn.Module, x: Tensor, maps: Tensor, target: Tensor, steps: int = STEPS) -> Tensor:
    """Area under the target's score as the highest pixels are set to 0, by the trapezium rule, divided by the whole image's score; lower is better."""
    order = torch.argsort(maps.flatten(1), dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order)).view_as(maps)
    curve = []
    for step in range(steps + 1):
        kept = torch.where(rank < round(order.shape[1] * step / 100), 0.0, x)
        curve.append(scores(net, kept).gather(1, target[:, None])[:, 0])
    return torch.trapezoid(torch.stack(curve), dim=0) / steps / curve[0]


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def job(seed: int = seed) -> dict[str, Any]:
            data = bench.data("mnist", train=500 if small else 10_000, test=200 if small else 1000, seed=seed)
            take = {part: (data.x.take(data.split[part]).float().div(255), data.y[data.split[part]]) for part in ("train", "test")}
            net = train(*take["train"], 2 if small else 4, seed).requires_grad_(False)
            x, y = take["test"]
            found = scores(net, x)
            right = (found.argmax(1) == y) & (found.gather(1, y[:, None])[:, 0] > 0)
            chosen = right.nonzero()[: 20 if small else 200, 0]
            return {"net": net, "x": x[chosen], "y": y[chosen], "accuracy": float((found.argmax(1) == y).double().mean())}

        def cell(arm: str, job: Any = job, seed: int = seed) -> dict[str, float]:
            found = job()
            net, x, y = found["net"], found["x"], found["y"]
            numbers = {"accuracy": found["accuracy"], "images": float(len(x))}
            if arm == "deep taylor":
                r = deep_taylor(net, x, y)
                largest = r.pixels.flatten(1).amax(1).clamp_min(1e-12)
                maps = r.pixels
                numbers |= {"gap": float(r.gap.max()), "least": float((r.pixels.flatten(1).amin(1) / largest).min()), "dead": float(r.dead)}
            elif arm == "random":
                maps = torch.rand(x.shape, generator=generator(seed, "random order"))
            else:
                slope = gradients(net, x, y, "deep-taylor's claim")
                maps = slope**2 if arm == "squared gradient" else slope * x
            return {"area": float(area(net, x, maps, y).mean()), **numbers}

        for arm in ("deep taylor", "squared gradient", "random", "input x gradient"):
            bench.arm(arm, seed, functools.partial(cell, arm))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    areas = {arm: column(numbers, arm, "area") for arm in numbers}
    against = {arm: paired(f"area, deep taylor minus {arm}", areas["deep taylor"], areas[arm]) for arm in numbers if arm != "deep taylor"}
    judged = [against["squared gradient"], against["random"]]
    gap, least = max(column(numbers, "deep taylor", "gap")), min(column(numbers, "deep taylor", "least"))
    identities = {"largest |sum R - f| / f below 1 %": gap < 0.01, "least R at least -1e-6 of the largest": least >= -1e-6}
    verdict = said(all(c.high < 0 for c in judged) and all(identities.values()), any(c.low > 0 for c in judged))
    return verdict, [*against.values(), {"what": "identities", "gap": gap, "least": least, **identities}]
