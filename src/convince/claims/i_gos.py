"""I-GOS on garments: do masks found along integrated gradients remove a class sooner, and in fewer passes, than the plain search and Grad-CAM?"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said, together
from convince.explain.grad_cam import GradCam
from convince.explain.i_gos import baseline_of, deletion, enlarge, i_gos, insertion, mask_opt_plain
from convince.explain.integrated_gradients import integrated_gradients
from convince.explain.passes import scores
from convince.fit import precision
from convince.fit.randomness import generator, preserved, seed_global

SAYS = (
    "1. Deleting pixels in the order of an I-GOS mask destroys the class score sooner than the order of a plain mask search with as many passes, or of "
    "Grad-CAM, and inserting them restores it as well. 2. The path makes descent faster: I-GOS needs at most half the passes for what the plain search reaches."
)
SUPPORTED = (
    "1. Deletion area of I-GOS below the plain search's and below Grad-CAM's in each of 3 seeds (Wilcoxon over images, p < 0.05 after Holm over the six "
    "tests); mean insertion area at least Grad-CAM's - 0.02; the random map has the largest mean deletion area. "
    "2. In every seed the mean objective F of I-GOS after 140 of its 300 passes is at most the plain search's after 300."
)
CONTRADICTED = (
    "1. The plain search has the lower mean deletion area in all seeds. 2. In every seed the mean F of I-GOS after all 300 passes is above the plain search's."
)
BUDGET = (
    "fashion-mnist at 28 px, conv 16-32-64-64 with ReLU and two 2x2 pools (7x7 last map), 20,000 training images x 4 epochs, Adam at 0.002 on a one-cycle "
    "schedule; 100 correctly classified test images a seed, 3 seeds. Masks of 14x14; I-GOS 15 iterations x 20 path steps, plain search 300 steps, counted in "
    "passes forward and back (the plain search may also look forward 20 times as often in its line searches). Areas in 2 % steps, filled with the blurred "
    "image, as a share of the score at the start. l1 is one of 1, 0.3, 0.1, 0.03 and tv is 20 l1, the same for both searches: the pair with the lowest "
    "deletion area, mean of both, on 20 images of a fourth network (seed 100). Integrated gradients start from the same blurred image."
)

SEEDS, CHOICE, PENALTIES = 3, 100, (1.0, 0.3, 0.1, 0.03)
METHODS = ("i-gos", "plain search", "grad-cam", "integrated gradients", "random")
PASSES = tuple(range(0, 301, 20))
HALF = 140  # the last of these that is at most half of 300


class Net(nn.Module):
    """conv3x3 - ReLU four times, 2x2 max-pool after the first two (7x7x64 for 28 px), pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate([(1, 16), (16, 32), (32, 64), (64, 64)]):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()] + ([nn.MaxPool2d(2)] if i < 2 else [])
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def train(x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """Plain training of :class:`Net`; ``x`` uint8."""
    plan = precision.choose("auto", "image")
    with preserved():
        seed_global(seed, "i-gos net")
        net = plan.place(Net())
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(x) // 64))
    gen = generator(seed, "i-gos order")
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=gen).split(64):
            with plan.autocast():
                found = net(plan.pixels(x[rows]))
            loss = F.cross_entropy(found.float(), y[rows].to(plan.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.cpu().eval().requires_grad_(False)


class Job:
    """A trained network and test images that it classifies correctly; what each method finds on them, once."""

    def __init__(self, bench: Bench, seed: int, count: int) -> None:
        small = bench.scale == "smoke"
        data = bench.data("digits" if small else "fashion-mnist", train=400 if small else 20_000, test=100 if small else 500, seed=seed)
        self.seed, self.shorter = seed, 5 if small else 1
        rows = data.split.train
        self.net = train(data.x.take(rows), data.y[rows], 3 if small else 4, seed)
        x, y = data.x.take(data.split.test).float() / 255, data.y[data.split.test]
        found = scores(self.net, x).argmax(1)
        right = (found == y).nonzero()[:count, 0]
        self.accuracy, self.x, self.target = float((found == y).double().mean()), x[right], y[right]
        self.blurred = baseline_of(self.x)
        self.found: dict[tuple[str, float], dict[str, Tensor]] = {}

    def heat(self, method: str, l1: float) -> tuple[Tensor, Tensor | None]:
        """The map of a method, and F after ``PASSES`` passes where it is a search."""
        x, target = self.x, self.target
        how: dict[str, Any] = {"size": 14, "l1": l1, "tv": 20 * l1}
        if method == "i-gos":
            mask, values = i_gos(self.net, x, target, ig_steps=20 // self.shorter, seed=self.seed, **how)
            return 1 - enlarge(mask, (x.shape[2], x.shape[3])), values
        if method == "plain search":
            mask, values = mask_opt_plain(self.net, x, target, iterations=300 // self.shorter, **how)
            return 1 - enlarge(mask, (x.shape[2], x.shape[3])), values[:, :: 20 // self.shorter]
        if method == "random":
            drawn = torch.rand(len(x), 1, 14, 14, generator=generator(self.seed, "random map"))
            return enlarge(drawn, (x.shape[2], x.shape[3])), None
        if method == "grad-cam":
            found = GradCam()(self.net, x, target).map
            assert found is not None
            return found, None
        return integrated_gradients(self.net, x, target, self.blurred).sum(1, keepdim=True), None

    def curves(self, method: str, l1: float) -> dict[str, Tensor]:
        """Deletion, insertion and, of a search, F; a value an image."""
        if (method, l1) not in self.found:
            heat, values = self.heat(method, l1)
            rest = (self.net, self.x, heat, self.target, self.blurred)
            self.found[method, l1] = {"deletion": deletion(*rest), "insertion": insertion(*rest)}
            if values is not None:
                self.found[method, l1] |= {f"F after {passes}": values[:, i] for i, passes in enumerate(PASSES)}
        return self.found[method, l1]

    def means(self, method: str, l1: float) -> dict[str, float]:
        return {key: float(value.mean()) for key, value in self.curves(method, l1).items()}

    def tests(self, l1: float) -> dict[str, float]:
        """One-sided Wilcoxon tests over images: is the deletion area of I-GOS below the other's?"""
        from scipy.stats import wilcoxon

        own, p = self.curves("i-gos", l1)["deletion"], {}
        for other in ("plain search", "grad-cam"):
            away = (own - self.curves(other, l1)["deletion"]).double().numpy()
            p[f"p, {other}"] = float(wilcoxon(away, alternative="less").pvalue) if away.any() else 1.0
        return p

    def facts(self, l1: float) -> dict[str, float]:
        """How good the network is, how many images there are, how much of the score the blurred images have, and the l1 taken."""
        left, whole = (scores(self.net, x).softmax(1).gather(1, self.target[:, None]) for x in (self.blurred, self.x))
        return {"accuracy": self.accuracy, "images": len(self.x), "score left when blurred": float((left / whole).mean()), "l1": l1}


def chosen(numbers: Numbers) -> float:
    """The l1 with the lowest deletion area on the fourth network's images, mean of both searches."""
    both = {l1: statistics.fmean(column(numbers, f"{method}, l1 {l1}", "deletion")[0] for method in METHODS[:2]) for l1 in PENALTIES}
    return min(PENALTIES, key=lambda l1: both[l1])


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    fourth = functools.cache(lambda: Job(bench, CHOICE, 4 if small else 20))
    for l1 in PENALTIES:
        for method in METHODS[:2]:
            bench.arm(f"{method}, l1 {l1}", CHOICE, lambda method=method, l1=l1: fourth().means(method, l1))  # type: ignore[misc]
    l1 = chosen(bench.numbers)
    for seed in range(2 if small else SEEDS):
        job = functools.cache(lambda seed=seed: Job(bench, seed, 8 if small else 100))
        for method in METHODS:
            bench.arm(method, seed, lambda job=job, method=method: job().means(method, l1))  # type: ignore[misc]
        bench.arm("tests", seed, lambda job=job: job().tests(l1))  # type: ignore[misc]
        bench.arm("facts", seed, lambda job=job: job().facts(l1))  # type: ignore[misc]


def holm(p: list[float], level: float = 0.05) -> bool:
    """Are all hypotheses rejected by Holm's procedure?"""
    return all(value < level / (len(p) - i) for i, value in enumerate(sorted(p)))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    out = {method: column(numbers, method, "deletion") for method in METHODS}
    into = {method: column(numbers, method, "insertion") for method in METHODS}
    p = column(numbers, "tests", "p, plain search") + column(numbers, "tests", "p, grad-cam")
    mean = {method: statistics.fmean(values) for method, values in out.items()}
    half, whole, plain = (column(numbers, m, f"F after {passes}") for m, passes in (("i-gos", HALF), ("i-gos", 300), ("plain search", 300)))
    rules = {
        "below the plain search and Grad-CAM in every seed, after Holm": holm(p),
        "insertion at least Grad-CAM's - 0.02": statistics.fmean(into["i-gos"]) >= statistics.fmean(into["grad-cam"]) - 0.02,
        "the random map is the worst": all(mean["random"] > mean[method] for method in METHODS if method != "random"),
    }
    better = said(all(rules.values()), all(a > b for a, b in zip(out["i-gos"], out["plain search"], strict=True)))
    faster = said(all(a <= b for a, b in zip(half, plain, strict=True)), all(a > b for a, b in zip(whole, plain, strict=True)))
    comparisons = [
        *(paired(f"deletion area, i-gos minus {method} (low is good)", out["i-gos"], out[method]) for method in METHODS[1:]),
        *(paired(f"insertion area, i-gos minus {method} (high is good)", into["i-gos"], into[method]) for method in METHODS[1:]),
        paired("F, i-gos after 140 passes minus plain search after 300", half, plain),
        paired("F, i-gos after 300 passes minus plain search after 300", whole, plain),
        {"what": "rules", **rules},
        {"what": "1. destroys the score sooner", "verdict": better, "largest p": max(p)},
        {"what": "2. descends faster", "verdict": faster},
        {
            "what": "F by passes, mean over seeds",
            **{f"{m}, {k}": statistics.fmean(column(numbers, m, f"F after {k}")) for m in METHODS[:2] for k in (0, 60, 140, 300)},
        },
    ]
    return together([better, faster]), comparisons
