"""Claim of xai-remote-sensing-eval: of ten methods Occlusion, Grad-CAM and Lime are the most reliable, and Grad-CAM is the quick one of the three."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from convince.claims import Bench, Numbers, column, paired, said

BEST = ("occlusion", "grad-cam", "lime")
OTHERS = ("saliency", "input-x-gradient", "integrated-gradients", "guided-backprop", "deconvnet", "deep-lift", "guided-grad-cam")
SEEDS = 3
SAYS = (
    "On networks that give several labels a picture, Occlusion, Grad-CAM and Lime explain most reliably of ten methods: what they mark is what the label's "
    "chance depends on, and their maps hardly change with small changes of the picture; Lime and Occlusion cost far more time than Grad-CAM."
)
SUPPORTED = (
    "(1) Occlusion, Grad-CAM and Lime each have a lower auc_morf than random maps on more pictures than not, sign test at .05 after Holm, in every seed; "
    "(2) their mean rank among the ten, over auc_morf and max_sensitivity, is better than that of the other seven in at least two thirds of the seeds; "
    "(3) Grad-CAM takes at most a fifth of the time of Lime, and of Occlusion. The networks reach a micro-F1 of 0.9 in every seed, or nothing is decided."
)
CONTRADICTED = "the three rank behind the other seven in all seeds, or any one of them fails (1) in all seeds."
BUDGET = (
    "scenes of 48 px with one to three mnist digits of 0 to 5 (20 px, middle of the picture) on soft noise; 5,000 training and 1,000 test scenes; the "
    "network of the grad-cam claim (four convolutions, three pools), binary cross-entropy, 8 epochs; 64 test scenes, every true label, the score before the "
    "sigmoid; patches of 8 px and single pixels in as many steps, filled with the training mean; Lime 200 samples on 8x8 cells, Occlusion 8 px by 4, "
    "integrated gradients 50 steps; max_sensitivity of 24 explanations, 10 changes of up to 0.02. 3 seeds. Controls: noise maps and a bell in the middle. "
    "auc_morf by patches favours coarse maps: the part of (1) by single pixels is reported beside, and is not judged. Seconds are processor seconds of one "
    "thread; flat is the share of maps of one value, whose max_sensitivity of 0 is no merit."
)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    for seed in range(1 if smoke else SEEDS):
        job = functools.cache(functools.partial(prepare, bench, smoke, seed))
        bench.arm("network", seed, functools.partial(network, job))
        for method in (*BEST, *OTHERS, "random", "centre"):
            bench.arm(method, seed, functools.partial(cell, job, method))


def prepare(bench: Bench, smoke: bool, seed: int) -> dict[str, Any]:
    """A trained network, the explained pictures with a row a label, and what random maps reach on them."""
    import torch
    from sklearn.metrics import f1_score
    from torch import nn

    from convince.claims.grad_cam import QuadNet
    from convince.explain.explain_benchmark import control_maps, label_chances, of_maps, scenes, ten_methods, train_labels
    from convince.fit.randomness import generator
    from convince.kinds import as_found

    data = bench.data("digits" if smoke else "mnist", train=300 if smoke else 12_000, test=150 if smoke else 4000, seed=seed)
    made = {}
    for split, count in (("train", 128 if smoke else 5000), ("test", 40 if smoke else 1000)):
        rows = data.split[split]
        images = data.x.take(rows)
        made[split] = scenes(images if smoke else images[:, :, 4:24, 4:24], data.y[rows], count, 6, generator(seed, "xai scenes", split))
    (x, y), (x_test, y_test) = made["train"], made["test"]

    def build() -> nn.Module:
        net = QuadNet()
        net.fc = nn.Linear(64, 6)
        return net

    answer = train_labels(build, x, y, 1 if smoke else 8, seed)
    predicted = torch.cat([label_chances(answer, part) for part in x_test.split(256)]) >= 0.5
    f1 = {f"{kind} F1": float(f1_score(y_test.numpy(), predicted.numpy(), average=kind, zero_division=0.0)) for kind in ("micro", "macro")}
    image, target = y_test[: 6 if smoke else 64].nonzero().unbind(1)
    fill = x.mean((0, 2, 3))[:, None, None]
    shown: dict[str, Any] = {"answer": answer, "x": x_test[image], "target": target, "fill": fill, "patch": 3 if smoke else 8}
    controls = control_maps(shown["x"], seed)
    with as_found(answer):
        known = {name: of_maps(found, **shown) for name, found in controls.items()}
    methods = ten_methods(float(fill.mean()), 16 if smoke else 200, 4 if smoke else 50)
    return {"f1": f1, "image": image, "again": 2 if smoke else 24, "shown": shown, "known": known, "methods": methods}


def network(job: Any) -> dict[str, float]:
    """How well the network itself does."""
    return job()["f1"]


def cell(job: Any, method: str) -> dict[str, float]:
    """Means of a method's metrics, and on how many pictures its auc_morf is below and above that of random maps."""
    from convince.explain.explain_benchmark import examine

    made = job()
    if method in made["known"]:
        values, seconds = made["known"][method], 0.0
    else:
        values, seconds = examine(made["methods"][method], again=made["again"], **made["shown"])
    found = {name: float(v.mean()) for name, v in values.items()} | {"seconds": seconds}
    for name in ("auc_morf", "auc_morf by pixels"):
        less = by_image(values[name], made["image"]) - by_image(made["known"]["random"][name], made["image"])
        found |= {f"{name}, below": float((less < 0).sum()), f"{name}, above": float((less > 0).sum())}
    return found


def by_image(values: Any, image: Any) -> Any:
    """The mean over the labels of each picture."""
    import torch

    n = int(image.max()) + 1
    total = torch.zeros(n, dtype=torch.float64).index_add(0, image, values.double())
    return total / torch.bincount(image, minlength=n).clamp_min(1)


def told_apart(numbers: Numbers, metric: str) -> dict[str, list[bool]]:
    """For each of the three and each seed: is it better than random maps, by a sign test at .05, Holm's correction over the three?"""
    from scipy.stats import binomtest

    from convince.comparison.statistics import holm

    passed: dict[str, list[bool]] = {method: [] for method in BEST}
    for i in range(len(numbers["random"])):
        counts = {m: [int(column(numbers, m, f"{metric}, {side}")[i]) for side in ("below", "above")] for m in BEST}
        p = {m: float(binomtest(a, a + b, alternative="greater").pvalue) if a + b else 1.0 for m, (a, b) in counts.items()}
        for method, adjusted in zip(BEST, holm([p[m] for m in BEST]), strict=True):
            passed[method].append(adjusted < 0.05)
    return passed


def ranks(numbers: Numbers) -> tuple[list[float], list[float]]:
    """Mean rank, 1 to 10, of the three and of the seven, by seed: over auc_morf and max_sensitivity."""
    from scipy.stats import rankdata

    methods = (*BEST, *OTHERS)
    ours, theirs = [], []
    for i in range(len(numbers["random"])):
        found = [rankdata([column(numbers, m, metric)[i] for m in methods]) for metric in ("auc_morf", "max_sensitivity")]
        mean = [float(a + b) / 2 for a, b in zip(*found, strict=True)]
        ours.append(statistics.fmean(mean[: len(BEST)]))
        theirs.append(statistics.fmean(mean[len(BEST) :]))
    return ours, theirs


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    f1 = column(numbers, "network", "micro F1")
    better, by_pixels = told_apart(numbers, "auc_morf"), told_apart(numbers, "auc_morf by pixels")
    ours, theirs = ranks(numbers)
    ahead = [a < b for a, b in zip(ours, theirs, strict=True)]
    seconds = {m: statistics.fmean(column(numbers, m, "seconds")) for m in (*BEST, *OTHERS)}
    slower = {m: seconds[m] / max(seconds["grad-cam"], 1e-9) for m in ("lime", "occlusion")}
    supported = all(map(all, better.values())) and 3 * sum(ahead) >= 2 * len(ahead) and min(slower.values()) >= 5
    contradicted = all(a > b for a, b in zip(ours, theirs, strict=True)) or any(not any(found) for found in better.values())
    facts = {
        "micro-F1 of the networks, least": min(f1),
        "(1) seeds in which it beats random maps": {m: sum(found) for m, found in better.items()},
        "(1) by single pixels": {m: sum(found) for m, found in by_pixels.items()},
        "(2) seeds in which the three rank ahead": sum(ahead),
        "(3) times the seconds of grad-cam": slower,
    }
    metrics = ("auc_morf", "auc_morf by pixels", "max_sensitivity", "file_size", "flat", "seconds")
    table = [
        {"method": m, **{metric: statistics.fmean(column(numbers, m, metric)) for metric in metrics if metric in numbers[m]["0"]}}
        for m in (*BEST, *OTHERS, "random", "centre")
    ]
    random = column(numbers, "random", "auc_morf")
    less = [paired(f"auc_morf, {m} - random", column(numbers, m, "auc_morf"), random) for m in BEST]
    verdict = said(supported, contradicted) if min(f1) >= 0.9 else "inconclusive"
    return verdict, [paired("mean rank, the three - the other seven", ours, theirs), *less, facts, *table]
