"""Grad-CAM on canvases of four digits: does the map find the digit that is asked about, and only that one?"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.explain.grad_cam import GradCam
from convince.explain.guided_backprop import GuidedBackprop
from convince.explain.localisation import energy_in_mask
from convince.explain.saliency import Saliency
from convince.fit import precision
from convince.fit.randomness import generator, preserved, seed_global
from convince.kinds import Explainer

SAYS = (
    "Grad-CAM puts its energy on the object of the class asked about, more than pixel gradients do; "
    "its maps of two classes in one image differ, those of guided backpropagation hardly do; and it depends on the weights."
)
SUPPORTED = (
    "Energy in the right quadrant, mean over seeds, at least 0.6 (chance 0.25), and at least 0.1 above saliency in every seed; correlation of the maps of two "
    "present classes below 0.5 on average, and that of guided backpropagation higher by at least 0.2 in every seed; energy with random weights at most 0.35."
)
CONTRADICTED = "Mean energy not above saliency's, or the mean correlation of Grad-CAM not below that of guided backpropagation."
BUDGET = (
    "mnist digits, four of different classes on a 56x56 canvas; 6,000 scenes x 6 epochs, conv 16-32-64-64 with binary cross-entropy, Adam at 0.002 "
    "on a one-cycle schedule; 100 test scenes x 2 present classes; "
    "4 seeds (the catalogue asks for 3); saliency, guided backpropagation and random weights as baselines. "
    "Maps that are all zero count as even (energy 0.25), and pairs with a constant map have no correlation and are left out."
)

SEEDS = 4


class QuadNet(nn.Module):
    """conv3x3 - ReLU four times, 2x2 max-pool after the first three (7x7x64 for 56 px), pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate([(1, 16), (16, 32), (32, 64), (64, 64)]):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True)] + ([nn.MaxPool2d(2)] if i < 3 else [])
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def quad_scenes(images: Tensor, labels: Tensor, count: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """(pixels [n 1 56 56] in [0, 1], classes [n 4] by quadrant: upper left, upper right, lower left, lower right).

    ``images`` uint8 [N 1 28 28]; the four classes of a scene differ.
    """
    classes = torch.rand(count, 10, generator=gen).argsort(1)[:, :4]
    rows = torch.empty_like(classes)
    for c in range(10):
        of_class = (labels == c).nonzero()[:, 0]
        at = classes == c
        rows[at] = of_class[torch.randint(len(of_class), (int(at.sum()),), generator=gen)]
    tiles = images[rows.flatten()].view(count, 2, 2, 28, 28)
    return tiles.permute(0, 1, 3, 2, 4).reshape(count, 1, 56, 56).float().div_(255), classes


def quadrant_masks(quadrant: Tensor) -> Tensor:
    """Bool [n 1 56 56], true in the numbered quadrant."""
    row, column = torch.arange(56) // 28, torch.arange(56) // 28
    return ((row[:, None] * 2 + column) == quadrant[:, None, None])[:, None]


def train(x: Tensor, classes: Tensor, epochs: int, seed: int) -> nn.Module:
    """Multi-label training: the house's loop trains single labels."""
    plan = precision.choose("auto", "image")
    with preserved():
        seed_global(seed, "quad net")
        net = plan.place(QuadNet())
    y = torch.zeros(len(x), 10).scatter_(1, classes, 1.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    gen = generator(seed, "quad order")
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=gen).split(64):
            with plan.autocast():
                scores = net(plan.pixels(x[rows]))
            loss = F.binary_cross_entropy_with_logits(scores.float(), y[rows].to(plan.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.cpu().eval()


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean Pearson correlation of paired maps; pairs with a constant map are left out (nan where all are)."""
    a, b = (m.flatten(1).double() - m.flatten(1).double().mean(1, keepdim=True) for m in (a, b))
    size = a.norm(dim=1) * b.norm(dim=1)
    live = size > 1e-12
    return float(((a * b).sum(1)[live] / size[live]).mean())


def localise(explainer: Explainer, net: nn.Module, x: Tensor, classes: Tensor, seed: int) -> dict[str, float]:
    """Energy in the quadrant of two present classes an image, and the correlation of their maps."""
    quadrants = torch.rand(len(x), 4, generator=generator(seed, "quadrants asked")).argsort(1)[:, :2]
    maps, energy = [], []
    for j in range(2):
        found = explainer(net, x, classes.gather(1, quadrants[:, j : j + 1])[:, 0]).map
        assert found is not None
        maps.append(found)
        energy.append(energy_in_mask(found, quadrant_masks(quadrants[:, j])))
    with torch.no_grad():
        recall = (net(x).topk(4, 1).indices[:, :, None] == classes[:, None]).any(1).double().mean()
    empty = torch.stack([m.flatten(1).amax(1) <= 0 for m in maps]).double().mean()
    return {"energy": float(torch.stack(energy).mean()), "correlation": correlation(*maps), "recall": float(recall), "empty_maps": float(empty)}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def job(seed: int = seed) -> dict[str, Any]:
            data = bench.data("mnist", train=400 if small else 12_000, test=200 if small else 4000, seed=seed)
            take = {part: (data.x.take(data.split[part]), data.y[data.split[part]]) for part in ("train", "test")}
            x, classes = quad_scenes(*take["train"], 64 if small else 6000, generator(seed, "quad train"))
            test = quad_scenes(*take["test"], 8 if small else 100, generator(seed, "quad test"))
            return {"net": train(x, classes, 1 if small else 6, seed), "test": test}

        def fresh(seed: int = seed) -> nn.Module:
            with preserved():
                seed_global(seed, "weights anew")
                return QuadNet().eval()

        def cell(explainer: Explainer, anew: bool = False, job: Any = job, fresh: Any = fresh, seed: int = seed) -> dict[str, float]:
            x, classes = job()["test"]
            return localise(explainer, fresh() if anew else job()["net"], x, classes, seed)

        for arm, explainer in (("grad-cam", GradCam()), ("saliency", Saliency()), ("guided-backprop", GuidedBackprop())):
            bench.arm(arm, seed, functools.partial(cell, explainer))
        bench.arm("random weights", seed, functools.partial(cell, GradCam(), True))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    energy = {arm: column(numbers, arm, "energy") for arm in numbers}
    alike = {arm: column(numbers, arm, "correlation") for arm in numbers}
    cam, plain, guided = energy["grad-cam"], energy["saliency"], alike["guided-backprop"]
    more = [a - b for a, b in zip(cam, plain, strict=True)]
    apart = [b - a for a, b in zip(alike["grad-cam"], guided, strict=True)]
    rules = {
        "mean energy at least 0.6": statistics.fmean(cam) >= 0.6,
        "0.1 above saliency in every seed": min(more) >= 0.1,
        "mean correlation below 0.5": statistics.fmean(alike["grad-cam"]) < 0.5,
        "guided backprop higher by 0.2 in every seed": min(apart) >= 0.2,
        "random weights at most 0.35": statistics.fmean(energy["random weights"]) <= 0.35,
    }
    comparisons = [
        paired("energy in the right quadrant, grad-cam minus saliency", cam, plain),
        paired("correlation between classes, grad-cam minus guided backprop", alike["grad-cam"], guided),
        paired("energy, grad-cam minus random weights", cam, energy["random weights"]),
        {"what": "rules", **rules},
    ]
    if all(rules.values()):
        return "supported", comparisons
    if statistics.fmean(more) <= 0 or statistics.fmean(apart) <= 0:
        return "contradicted", comparisons
    return "inconclusive", comparisons
