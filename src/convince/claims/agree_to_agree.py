"""Claim of agree-to-agree: networks trained apart learn the same images first, within an architecture and across, and this needs real labels."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.backbones.small_cnn import SmallCNN
from convince.claims import Bench, Numbers, column, said
from convince.diagnose.learning_order import (
    accessibility,
    agreement,
    at_equal_accuracy,
    bimodality,
    half_learned,
    independent,
    order_correlation,
    reliability,
    tp_agreement,
)
from convince.fit.randomness import generator, key, preserved

SAYS = (
    "Networks of one architecture, trained from different initial weights and in different orders of the samples, learn images in nearly the same order, so "
    "that at any time they are right on the same ones; networks of another architecture share much of this order; other learners need not, and without real "
    "labels there is none."
)
SUPPORTED = (
    "in every split, on test images: the order of two collections of CNNs correlates by r(A, A2) >= 0.85 and that of CNNs and MLPs by r(A, B) >= 0.5; the "
    "bimodality of A where half is right is at least twice its permutation null; r(A, AdaBoost) < r(A, B); and with shuffled labels |r| < 0.3 between two "
    "halves of a collection."
)
CONTRADICTED = "in the mean over splits r(A, A2) < 0.5, or in any split the bimodality is not above its null."
BUDGET = (
    "fashion-mnist, 3,000 training and 1,500 test images, 3 draws of them. Collections of 4: A and A2 (CNN 16-32-64), B (MLP 784-256-10); SGD 0.01 without "
    "momentum, batch 32, constant rate, 10 epochs, correctness on the test images stored each half epoch (20 looks). Controls: AdaBoost of 200 stumps on the "
    "same images at 14x14 (20 looks at every tenth round; the catalogue has 28x28, which takes four times as long), and, on the first draw, 4 CNNs with "
    "labels shuffled over the training images and over the test images, read as 2 + 2. Told beside it: 2 CNNs with another shuffle of the training labels, "
    "since networks that share one shuffle may agree through its chance frequencies; correlations at equal mean accuracy; the reliability of A by "
    "halves; the agreement of labels. As in the catalogue otherwise."
)


def mlp(side: int, k: int) -> nn.Module:
    """One hidden layer of 256."""
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 256), nn.ReLU(), nn.Linear(256, k))


def trained(build: Callable[[], nn.Module], x: Tensor, y: Tensor, test: Tensor, epochs: int, seed: int, batch: int = 32) -> Tensor:
    """The labels [e n] that one network gives to the test images after each half epoch."""
    with preserved():
        torch.manual_seed(seed)
        net = build().to(memory_format=torch.channels_last)  # half the time on a processor
        x, test = (part.contiguous(memory_format=torch.channels_last) for part in (x, test))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        looks, steps = [], len(x) // batch
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=generator(seed, "order", epoch)).split(batch)[:steps]
            net.train()
            for step, rows in enumerate(order, 1):
                loss = F.cross_entropy(net(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step in (steps // 2, steps):
                    net.eval()
                    with torch.no_grad():
                        looks.append(torch.cat([net(part).argmax(1) for part in test.split(500)]))
                    net.train()
    return torch.stack(looks)


def boosted(x: Tensor, y: Tensor, test: Tensor, rounds: int, looks: int) -> Tensor:
    """The labels [e n] that AdaBoost of stumps gives at equally spaced rounds."""
    from sklearn.ensemble import AdaBoostClassifier
    from sklearn.tree import DecisionTreeClassifier

    model = AdaBoostClassifier(DecisionTreeClassifier(max_depth=1), n_estimators=rounds, random_state=0)
    model.fit(F.avg_pool2d(x, 2).flatten(1).numpy(), y.numpy())
    staged = [torch.from_numpy(labels) for labels in model.staged_predict(F.avg_pool2d(test, 2).flatten(1).numpy())]
    every = max(len(staged) // looks, 1)
    return torch.stack(staged[every - 1 :: every])


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, rounds, splits = ("digits", 128, 64, 2, 20, 2) if smoke else ("fashion-mnist", 3000, 1500, 10, 200, 3)
    for split in range(splits):
        one_split(bench, bench.data(name, train=train, test=test, seed=split), split, epochs, rounds)


def one_split(bench: Bench, data: Any, split: int, epochs: int, rounds: int, nets: int = 4) -> None:
    """All arms on one draw of images; the shuffled labels on the first draw only."""
    x, test = pixels(data, "train"), pixels(data, "test")
    y, truth = data.y[data.split.train], data.y[data.split.test]
    networks = {"cnn": lambda: SmallCNN(data.k, 1), "mlp": lambda: mlp(x.shape[-1], data.k)}

    def shuffled(labels: Tensor, *who: object) -> Tensor:
        return labels[torch.randperm(len(labels), generator=generator("agree-to-agree", split, *who))]

    @functools.cache
    def collection(who: str, net: str = "cnn", count: int = nets, shuffle: int | None = None) -> Tensor:
        """Labels [m e n] of ``count`` networks; ``shuffle`` deals the training labels anew."""
        given = y if shuffle is None else shuffled(y, shuffle)
        return torch.stack([trained(networks[net], x, given, test, epochs, key(split, "agree-to-agree", who, i) % 2**31) for i in range(count)])

    def same() -> dict[str, float]:
        a = collection("a")
        right = a == truth
        tp = tp_agreement(right)
        at = half_learned(tp)
        null = independent(right[:, at], generator("agree-to-agree", "null"))
        found = {"r": correlated(a, collection("a2"), truth), "bimodality": bimodality(tp[at]), "null": null, "p": float(tp[at].mean())}
        return {**found, "accuracy": float(tp[-1].mean()), "reliability": reliability(right), "agreement": float(agreement(a)[-1].mean())}

    def control() -> dict[str, float]:
        dealt = shuffled(truth, "test")
        one, another = collection("shuffled", shuffle=0), collection("another", count=2, shuffle=1)
        found = {"r": correlated(one[:2], one[2:], dealt), "r_another_shuffle": correlated(one[:2], another, dealt)}
        return {**found, "accuracy": float((one[:, -1] == dealt).double().mean())}

    bench.arm("A and A2", split, same)
    bench.arm("A and B", split, lambda: beside(collection("a"), collection("b", "mlp"), truth))
    bench.arm("A and AdaBoost", split, lambda: beside(collection("a"), boosted(x, y, test, rounds, 2 * epochs)[None], truth))
    if split == 0:
        bench.arm("shuffled labels", split, control)


def pixels(data: Any, part: str) -> Tensor:
    """Images of a part, with the training part's mean 0 and deviation 1."""
    mean, std = data.preprocess.mean[0], data.preprocess.std[0]
    return (data.float_batch(data.x.take(data.split[part])) - mean) / std


def correlated(a: Tensor, b: Tensor, truth: Tensor) -> float:
    """Correlation of the accessibilities of two collections; 0 where one never tells two images apart."""
    r = order_correlation(accessibility(tp_agreement(a == truth)), accessibility(tp_agreement(b == truth)))
    return 0.0 if math.isnan(r) else r


def beside(a: Tensor, b: Tensor, truth: Tensor) -> dict[str, float]:
    """Another learner's order beside that of ``a``: as it is, and with looks matched by mean accuracy."""
    tp, other = tp_agreement(a == truth), tp_agreement(b == truth)
    matched = order_correlation(accessibility(tp), accessibility(other[at_equal_accuracy(tp, other)]))
    return {"r": correlated(a, b, truth), "r_equal_accuracy": 0.0 if math.isnan(matched) else matched, "accuracy": float(other[-1].mean())}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    same, other, boost = (column(numbers, arm, "r") for arm in ("A and A2", "A and B", "A and AdaBoost"))
    index, null = column(numbers, "A and A2", "bimodality"), column(numbers, "A and A2", "null")
    control = numbers["shuffled labels"]["0"]["r"]
    rules = {
        "what": "rules, by split",
        "r(A, A2)": same,
        "r(A, B)": other,
        "r(A, AdaBoost)": boost,
        "bimodality of A / null": [a / b for a, b in zip(index, null, strict=True)],
        "r with shuffled labels": control,
    }
    means = {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in numbers for metric in next(iter(numbers[arm].values()))}
    supported = min(same) >= 0.85 and min(other) >= 0.5 and all(a >= 2 * b for a, b in zip(index, null, strict=True))
    supported = supported and all(a < b for a, b in zip(boost, other, strict=True)) and abs(control) < 0.3
    contradicted = statistics.fmean(same) < 0.5 or any(a <= b for a, b in zip(index, null, strict=True))
    return said(supported, contradicted), [rules, means]
