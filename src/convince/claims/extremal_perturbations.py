"""Extremal perturbations on canvases of four digits: does the best mask of a given area lie on the digit asked about, and is the area kept?"""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said, together
from convince.claims.grad_cam import QuadNet, quad_scenes, quadrant_masks, train
from convince.explain.blur import gaussian_blur
from convince.explain.extremal_perturbations import extremal_perturbation, perturb, perturbation_pyramid
from convince.explain.localisation import energy_in_mask
from convince.explain.passes import gradients, scores
from convince.explain.saliency import saliency
from convince.fit.randomness import generator, preserved, seed_global

SAYS = (
    "1. A search for the smooth mask of a given area that keeps a class score highest ends on the object of that class, keeps its probability, and has the "
    "area asked for. 2. Nothing needs tuning between areas: with more area more of the probability is kept."
)
SUPPORTED = (
    "1. Share of the mask in the right quadrant, mean over seeds, at least 0.6 (chance 0.25), and above that of saliency in every seed; kept probability at "
    "least 0.3 above random masks in the mean; area within 10 % of the request on at least 90 % of the images. 2. The mean kept probability rises at each "
    "step of the areas 0.05, 0.1, 0.2, 0.4."
)
CONTRADICTED = (
    "1. The mean share is not above that on networks with random weights, or the mean kept probability is less than 0.05 above random masks. "
    "2. The mean kept probability at area 0.4 is not above that at 0.05."
)
BUDGET = (
    "mnist digits, four of different classes on a 56x56 canvas; 6,000 scenes x 6 epochs, conv 16-32-64-64 with binary cross-entropy (networks of the grad-cam "
    "row); 60 test scenes, one present class each, 3 seeds. Preserve, blur, area 0.15 of the image, step 2, sigma 5, 300 iterations, no mirror images. "
    "Baselines: 10 random regions an image, the top 15 % of saliency, both as binary regions blurred by 2.5 px as the mask's kernel falls off; the same search "
    "on a network with random weights (on half of the scenes, for time). "
    "The second claim on 15 of the scenes, 4 areas each (the catalogue does not say how many)."
)

SEEDS, AREA, AREAS = 3, 0.15, (0.05, 0.1, 0.2, 0.4)
SOFT = 2.5  # px; the kernel of sigma 5 is exp(-2 (d/5 - 1/2)^2): flat to 2.5 px, then a Gaussian of deviation 2.5


def search(net: nn.Module, x: Tensor, target: Tensor, area: Tensor | float, iterations: int) -> Tensor:
    """The masks of the claim's settings."""
    return extremal_perturbation(net, x, target, area, iterations=iterations, step=2, sigma=5.0, jitter=False, area_of="image")[0]


def region(values: Tensor) -> Tensor:
    """The top 15 % of each plane, as soft at its edges as a mask of the search."""
    rank = values.flatten(1).argsort(1, descending=True).argsort(1).view_as(values)
    return gaussian_blur((rank < round(AREA * rank[0].numel())).to(values.dtype), SOFT)


def look(net: nn.Module, x: Tensor, target: Tensor, quadrant: Tensor, masks: Tensor) -> dict[str, float]:
    """Share of the mask in the quadrant asked about, probability kept, and how well the area is met."""
    found = scores(net, perturb(perturbation_pyramid(x), masks)).gather(1, target[:, None])
    area = masks.mean((1, 2, 3))
    return {
        "share": float(energy_in_mask(masks, quadrant_masks(quadrant)).mean()),
        "kept": float(found.sigmoid().mean()),
        "area": float(area.mean()),
        "area met": float(((area - AREA).abs() <= 0.1 * AREA).double().mean()),
    }


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    iterations, count, few = (20, 4, 2) if small else (300, 60, 15)
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def job(seed: int = seed) -> dict[str, Any]:
            data = bench.data("mnist", train=400 if small else 12_000, test=200 if small else 4000, seed=seed)
            take = {part: (data.x.take(data.split[part]), data.y[data.split[part]]) for part in ("train", "test")}
            x, classes = quad_scenes(*take["train"], 64 if small else 6000, generator(seed, "quad train"))
            test, present = quad_scenes(*take["test"], count, generator(seed, "quad test"))
            net = train(x, classes, 1 if small else 6, seed).requires_grad_(False)
            quadrant = torch.randint(4, (count,), generator=generator(seed, "quadrant asked"))
            return {"net": net, "x": test, "quadrant": quadrant, "target": present.gather(1, quadrant[:, None])[:, 0]}

        def extremal(job: Any = job) -> dict[str, float]:
            j = job()
            return look(*_asked(j), search(j["net"], j["x"], j["target"], AREA, iterations)) | {
                "whole": float(scores(j["net"], j["x"]).gather(1, j["target"][:, None]).sigmoid().mean())
            }

        def plain(job: Any = job) -> dict[str, float]:
            j = job()
            return look(*_asked(j), region(saliency(gradients(j["net"], j["x"], j["target"], "saliency"))))

        def chance(job: Any = job, seed: int = seed) -> dict[str, float]:
            j, gen = job(), generator(seed, "random regions")
            rows = [look(*_asked(j), region(gaussian_blur(torch.rand(j["x"].shape, generator=gen), 5.0))) for _ in range(10)]
            return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}

        def anew(job: Any = job, seed: int = seed) -> dict[str, float]:
            j = {key: value[: count // 2] for key, value in job().items() if key != "net"}
            with preserved():
                seed_global(seed, "weights anew")
                net = QuadNet().eval().requires_grad_(False)
            return look(net, j["x"], j["target"], j["quadrant"], search(net, j["x"], j["target"], AREA, iterations))

        def sweep(job: Any = job) -> dict[str, float]:
            j = job()
            x, target = j["x"][:few].repeat(len(AREAS), 1, 1, 1), j["target"][:few].repeat(len(AREAS))
            masks = search(j["net"], x, target, torch.tensor(AREAS).repeat_interleave(few), iterations)
            kept = scores(j["net"], perturb(perturbation_pyramid(x), masks)).gather(1, target[:, None]).sigmoid().view(len(AREAS), few)
            return {f"kept at {area}": float(kept[i].mean()) for i, area in enumerate(AREAS)}

        for arm, cell in (("extremal", extremal), ("saliency", plain), ("random regions", chance), ("random weights", anew), ("areas", sweep)):
            bench.arm(arm, seed, cell)


def _asked(j: dict[str, Any]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    return j["net"], j["x"], j["target"], j["quadrant"]


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    share = {arm: column(numbers, arm, "share") for arm in numbers if arm != "areas"}
    kept = {arm: column(numbers, arm, "kept") for arm in share}
    mean = statistics.fmean
    met = mean(column(numbers, "extremal", "area met"))
    gain = mean(kept["extremal"]) - mean(kept["random regions"])
    rules = {
        "mean share at least 0.6": mean(share["extremal"]) >= 0.6,
        "above saliency in every seed": all(a > b for a, b in zip(share["extremal"], share["saliency"], strict=True)),
        "kept probability 0.3 above random regions": gain >= 0.3,
        "area met on 90 % of images": met >= 0.9,
    }
    rise = [mean(column(numbers, "areas", f"kept at {area}")) for area in AREAS]
    place = said(all(rules.values()), mean(share["extremal"]) <= mean(share["random weights"]) or gain < 0.05)
    tuning = said(all(a < b for a, b in itertools.pairwise(rise)), rise[-1] <= rise[0])
    comparisons = [
        paired("share in the right quadrant, extremal minus saliency", share["extremal"], share["saliency"]),
        paired("share, extremal minus the search on random weights", share["extremal"], share["random weights"]),
        paired("kept probability, extremal minus random regions", kept["extremal"], kept["random regions"]),
        paired("kept probability, extremal minus saliency", kept["extremal"], kept["saliency"]),
        {"what": "rules", **rules},
        {"what": "1. the mask finds the object", "verdict": place, "share of images whose area is met": met},
        {"what": "2. more area keeps more", "verdict": tuning, **{f"kept at {area}": value for area, value in zip(AREAS, rise, strict=True)}},
    ]
    return together([place, tuning]), comparisons
