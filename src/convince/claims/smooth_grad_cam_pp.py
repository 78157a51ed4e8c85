"""Smooth Grad-CAM++ on canvases that hold one digit twice: does the map cover both, more than Grad-CAM's does?"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.claims.grad_cam import QuadNet, quadrant_masks
from convince.explain.grad_cam import GradCam
from convince.explain.localisation import energy_in_mask
from convince.explain.metrics import entropy
from convince.explain.smooth_grad_cam_pp import SmoothGradCamPp
from convince.explain.smoothgrad import spread
from convince.fit import precision
from convince.fit.randomness import generator, preserved, seed_global

SAYS = (
    "Where an image holds two objects of a class, the map of Smooth Grad-CAM++ covers the weaker one better than Grad-CAM's does, "
    "and it is sharper than those of Grad-CAM and Grad-CAM++."
)
SUPPORTED = (
    "Share of the map's energy in the weaker of the two target quadrants, Smooth Grad-CAM++ minus Grad-CAM: mean of the paired seed differences at least 0.02 "
    "with the 95 % t interval above 0; and energy in both target quadrants, mean over seeds, not below Grad-CAM++'s by more than 0.02."
)
CONTRADICTED = "The 95 % t interval of the difference in the weaker quadrant lies below 0."
BUDGET = (
    "mnist digits on 56x56 canvases: two different images of the target digit and two distractors of other digits, a quadrant each; 6,000 scenes x 6 epochs of "
    "the same mixture, binary cross-entropy; 100 test scenes; 5 seeds; 25 copies, sigma 0.15, the same layer for all. The network is conv 16-32-64-64 with "
    "two fully connected layers as VGG-16 has them (flatten - 128 - 10): behind the catalogue's global average pooling the gradients of the last maps are the "
    "same for every picture, so that noise could change nothing. Controls: Grad-CAM averaged over the same 25 noisy copies, and Grad-CAM++. The paper shows "
    "pictures only; sharpness (entropy of the map) is reported and not part of the rules. A map that is all zero counts as even (0.25 a quadrant)."
)

SEEDS = 5
COPIES, SIGMA = 25, 0.15
Loss = Callable[[Tensor, Tensor], Tensor]


def canvases(images: Tensor, labels: Tensor, classes: Tensor, gen: torch.Generator) -> Tensor:
    """Pixels [n 1 56 56] in [0, 1]: a digit of class ``classes[i, q]`` in quadrant q (upper left, upper right, lower left, lower right).

    ``images`` uint8 [N 1 28 28] with at least four of each class: digits of one class on a canvas are different images.
    """
    rows = torch.empty_like(classes)
    base = torch.randint(len(images), (len(classes), 1), generator=gen)
    for c in range(10):
        of_class = (labels == c).nonzero()[:, 0]
        places = (base + torch.arange(4) * (len(of_class) // 4)) % len(of_class)
        rows = torch.where(classes == c, of_class[places], rows)
    tiles = images[rows.flatten()].view(len(classes), 2, 2, 28, 28)
    return tiles.permute(0, 1, 3, 2, 4).reshape(len(classes), 1, 56, 56).float().div_(255)


def repeated(count: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """(classes [n 4] of the quadrants, quadrants [n 2] of the class that stands twice)."""
    drawn = torch.rand(count, 10, generator=gen).argsort(1)[:, :3]
    order = torch.rand(count, 4, generator=gen).argsort(1)  # the first two places in this order hold the target
    classes = torch.empty(count, 4, dtype=torch.int64).scatter_(1, order, drawn[:, [0, 0, 1, 2]])
    return classes, order[:, :2]


def taught(make: Callable[[], nn.Module], x: Tensor, y: Tensor, loss: Loss, epochs: int, seed: int) -> nn.Module:
    """Adam at 0.002 on a one-cycle schedule, 64 at once; weights by the seed."""
    plan = precision.choose("auto", "image")
    with preserved():
        seed_global(seed, "scene net")
        net = plan.place(make())
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(x) // 64))
    gen = generator(seed, "scene order")
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=gen).split(64):
            with plan.autocast():
                scores = net(plan.pixels(x[rows]))
            optimizer.zero_grad()
            loss(scores.float(), y[rows].to(plan.device)).backward()
            optimizer.step()
            schedule.step()
    return net.cpu().eval()


def present(classes: Tensor) -> Tensor:
    """Targets [n 10] of multi-label training: 1 for each class on the canvas."""
    return torch.zeros(len(classes), 10).scatter_(1, classes, 1.0)


def vgg_like() -> nn.Module:
    """conv 16-32-64-64 as in the grad-cam claim, and two fully connected layers."""
    return nn.Sequential(QuadNet().features, nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10))


def noisy_grad_cam(net: nn.Module, x: Tensor, target: Tensor, seed: int) -> Tensor:
    """The mean of the Grad-CAM maps of the copies that Smooth Grad-CAM++ sees with this seed."""
    noise = SIGMA * torch.randn(COPIES, *x.shape[1:], generator=generator("smooth-grad-cam-pp", seed))
    maps = [GradCam()(net, x + spread(x) * some, target).map for some in noise]
    return torch.stack([m for m in maps if m is not None]).mean(0)


def coverage(found: Tensor, quadrants: Tensor) -> dict[str, float]:
    """Energy in the weaker and in both target quadrants, and sharpness."""
    each = torch.stack([energy_in_mask(found, quadrant_masks(quadrants[:, j])) for j in range(2)])
    return {
        "weaker": float(each.amin(0).mean()),
        "both": float(each.sum(0).mean()),
        "entropy": float(entropy(found).mean()),
        "empty_maps": float((found.flatten(1).amax(1) <= 0).double().mean()),
    }


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def job(seed: int = seed) -> dict[str, Any]:
            data = bench.data("mnist", train=400 if small else 12_000, test=200 if small else 4000, seed=seed)
            x, classes, quadrants = {}, {}, {}
            for part, count in (("train", 64 if small else 6000), ("test", 8 if small else 100)):
                gen = generator(seed, "repeated", part)
                classes[part], quadrants[part] = repeated(count, gen)
                x[part] = canvases(data.x.take(data.split[part]), data.y[data.split[part]], classes[part], gen)
            net = taught(vgg_like, x["train"], present(classes["train"]), F.binary_cross_entropy_with_logits, 1 if small else 6, seed)
            target = classes["test"].gather(1, quadrants["test"][:, :1])[:, 0]
            with torch.no_grad():
                found = float((net(x["test"]).gather(1, target[:, None]) > 0).double().mean())
            return {"net": net, "x": x["test"], "target": target, "quadrants": quadrants["test"], "found": found}

        def cell(explain: Callable[..., Tensor], job: Any = job) -> dict[str, float]:
            j = job()
            return {**coverage(explain(j["net"], j["x"], j["target"]), j["quadrants"]), "recall": j["found"]}

        def by(explainer: Any) -> Callable[..., Tensor]:
            return lambda net, x, target: explainer(net, x, target).map

        bench.arm("grad-cam", seed, functools.partial(cell, by(GradCam())))
        bench.arm("grad-cam++", seed, functools.partial(cell, by(SmoothGradCamPp(sigma=0.0))))
        bench.arm("smooth-grad-cam-pp", seed, functools.partial(cell, by(SmoothGradCamPp(COPIES, SIGMA, seed=seed))))
        bench.arm("noisy grad-cam", seed, functools.partial(cell, functools.partial(noisy_grad_cam, seed=seed)))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    weaker, both, spread_of = ({arm: column(numbers, arm, metric) for arm in numbers} for metric in ("weaker", "both", "entropy"))
    ours = "smooth-grad-cam-pp"
    more = paired("energy in the weaker target quadrant, smooth-grad-cam-pp minus grad-cam", weaker[ours], weaker["grad-cam"])
    kept = statistics.fmean(both[ours]) - statistics.fmean(both["grad-cam++"])
    rules = {"mean difference at least 0.02": more.mean >= 0.02, "interval above 0": more.low > 0, "both quadrants not below grad-cam++ by 0.02": kept >= -0.02}
    comparisons = [
        more,
        paired("energy in the weaker target quadrant, smooth-grad-cam-pp minus grad-cam++", weaker[ours], weaker["grad-cam++"]),
        paired("energy in the weaker target quadrant, smooth-grad-cam-pp minus noisy grad-cam", weaker[ours], weaker["noisy grad-cam"]),
        paired("energy in both target quadrants, smooth-grad-cam-pp minus grad-cam++", both[ours], both["grad-cam++"]),
        paired("entropy [nats], smooth-grad-cam-pp minus grad-cam", spread_of[ours], spread_of["grad-cam"]),
        paired("entropy [nats], smooth-grad-cam-pp minus grad-cam++", spread_of[ours], spread_of["grad-cam++"]),
        {"what": "rules", **rules},
    ]
    if all(rules.values()):
        return "supported", comparisons
    return "contradicted" if more.high < 0 else "inconclusive", comparisons
