"""Claim of cnn-filter-db: trained 3x3 kernels differ from random ones, and differ more from layer to layer than from data set to data set."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convince.claims import Bench, Numbers, Paired, column, paired, said, together
from convince.diagnose.filter_shift import Kernels, chance, entropy_threshold, extract_filters, filter_shift, variance_entropy, verdict
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve
from convince.fit.weights import build_by_name

SAYS = (
    "1. Kernels of trained layers are less diverse than random ones. 2. Trained networks of one task have alike kernels, far from untrained ones. 3. Kernels "
    "drift more with depth than with the data a network was trained on."
)
SUPPORTED = (
    "1. in every seed and on both sets, entropy over its random threshold at conv2 is below 1 after training, and below the untrained network's by at least "
    "0.02; 2. for every pair of seeds and both sets, the drift between two trained networks is at most half of that between a trained and an untrained one; "
    "and 3. for every seed, the drift between conv2 and conv4 of one network is larger than that between the networks of the two sets at one depth."
)
CONTRADICTED = "2. does not hold; or 3. the 95 % paired t interval of depth - data lies below 0."
BUDGET = (
    "mnist and fashion-mnist at 28 px, 6,000 training and 2,000 test images, 5 epochs, batch 64, SGD 0.05 cosine, no augmentation, 3 seeds; four 3x3 "
    "convolutions of 16, 32, 64 and 64 channels with BN, ReLU and a 2x2 maximum after each; on fashion-mnist also labels shuffled (15 epochs, 3 seeds) and 4 "
    "times the width (2 seeds), which are told, not judged. Networks that are compared have different seeds, since equal ones begin with equal kernels. "
    "Against the catalogue: the drift with depth is between conv2 and conv4, not the first layer and the last, and all drifts of 3 are between 512 kernels, "
    "since conv1 has 16 and drift grows where kernels are few; the drift of the same kernels shuffled is told beside them, and so is the catalogue's own. "
    "The drift between the sets is the mean of that at conv2 and at conv4. The wide networks are on one set."
)
SETS = ("mnist", "fashion-mnist")
KERNELS = 512  # of conv2, the fewest


def four_convs(num_classes: int, in_chans: int, times: int = 1) -> nn.Sequential:
    """Four convolutions of 16, 32, 64, 64 channels, ``times`` as many; BN, ReLU and a maximum after each; a linear layer on the mean."""
    net, c_in = nn.Sequential(), in_chans
    for i, width in enumerate((16, 32, 64, 64), 1):
        net.add_module(f"conv{i}", nn.Conv2d(c_in, width * times, 3, padding=1, bias=False))
        net.add_module(f"bn{i}", nn.BatchNorm2d(width * times))
        net.add_module(f"act{i}", nn.ReLU())
        net.add_module(f"pool{i}", nn.MaxPool2d(2, ceil_mode=True))
        c_in = width * times
    for name, module in (("mean", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(c_in, num_classes))):
        net.add_module(name, module)
    return net


def shuffled(data: Any, seed: int) -> Any:
    """The same data with the labels of the training images in random order."""
    y, rows = data.y.clone(), data.split.train
    y[rows] = y[rows][torch.randperm(len(rows), generator=generator(seed, "shuffled labels"))]
    return dataclasses.replace(data, y=y)


class Nets:
    """Kernels and accuracy of the trained networks, each trained once in a run of the claim."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.smoke = bench, bench.scale == "smoke"
        self.seeds = 2 if self.smoke else 3
        self.trained = functools.cache(self._trained)

    def _trained(self, arm: str, seed: int) -> tuple[list[Kernels], float]:
        """``arm``: a data set's name, or "random labels" or "wide", both on fashion-mnist."""
        name = arm if arm in SETS else SETS[1]
        train, test, epochs = (64, 64, 1) if self.smoke else (6000, 2000, 15 if arm == "random labels" else 5)
        data = self.bench.data("digits" if self.smoke else name, train=train, test=test, seed=seed)
        data = shuffled(data, seed) if arm == "random labels" else data
        how = settings(model="small-cnn", epochs=epochs, batch=64, lr=0.05, seed=seed, augment="none")
        run = prepare(resolve(how, data)[0], data)
        run.build = partial(four_convs, data.k, data.preprocess.channels, 4 if arm == "wide" else 1)
        fit(run)
        return extract_filters(run.model), run.evaluate("test").accuracy

    def untrained(self, arm: str, seed: int) -> list[Kernels]:
        """The same network as it begins."""
        return extract_filters(build_by_name(partial(four_convs, 10, 1, 4 if arm == "wide" else 1), seed))

    def diversity(self, arm: str, seed: int) -> dict[str, float]:
        """Entropy over the threshold by layer after training, at conv2 before it; the share of layers that are sparse or like random ones."""
        layers, accuracy = self.trained(arm, seed)
        found = {f"{layer.name}: H/T": variance_entropy(layer.weight) / entropy_threshold(len(layer.weight)) for layer in layers}
        before = self.untrained(arm, seed)[1].weight
        degenerate = statistics.fmean(verdict(layer.weight) in ("sparse", "random") for layer in layers)
        return {**found, "untrained conv2: H/T": variance_entropy(before) / entropy_threshold(len(before)), "degenerate": degenerate, "accuracy": accuracy}

    def pair(self, name: str, one: int, two: int) -> dict[str, float]:
        """Drift of all kernels between two trained networks of a set, and between one and the other as it began."""
        a, b, fresh = (everything(layers) for layers in (self.trained(name, one)[0], self.trained(name, two)[0], self.untrained(name, two)))
        return {"trained": filter_shift(a, b), "untrained": filter_shift(a, fresh), "chance": chance(a, b, generator(one, two, "chance"))}

    def depth_and_data(self, seed: int) -> dict[str, float]:
        """Drift between conv2 and conv4 of one network, mean of both sets; drift between the sets, mean of both depths; what chance gives."""
        nets = {name: self.trained(name, (seed + at) % self.seeds)[0] for at, name in enumerate(SETS)}  # other seeds: equal ones begin alike
        few = {(name, i): some(layers[i].weight, seed, f"{name} {i}") for name, layers in nets.items() for i in (1, 3)}
        depth = [filter_shift(few[name, 1], few[name, 3]) for name in SETS]
        data = [filter_shift(few[SETS[0], i], few[SETS[1], i]) for i in (1, 3)]
        null = [chance(few[SETS[0], i], few[SETS[1], i], generator(seed, i, "chance")) for i in (1, 3)]
        ends = [filter_shift(layers[0].weight, layers[3].weight) for layers in nets.values()]
        values = {"depth": depth, "data": data, "chance": null, "conv1 to conv4, all kernels": ends}
        shuffled_labels = filter_shift(everything(nets[SETS[1]]), everything(self.trained("random labels", seed)[0]))
        return {**{k: statistics.fmean(v) for k, v in values.items()}, "labels to shuffled labels": shuffled_labels}


def everything(layers: list[Kernels]) -> Tensor:
    """The kernels of all layers together."""
    return torch.cat([layer.weight for layer in layers])


def some(kernels: Tensor, seed: int, who: str) -> Tensor:
    """At most :data:`KERNELS` of a layer's."""
    return kernels[torch.randperm(len(kernels), generator=generator(seed, who))[:KERNELS]]


def measure(bench: Bench) -> None:
    nets = Nets(bench)
    for seed in range(nets.seeds):
        for arm in (*SETS, "random labels", "wide"):
            if arm != "wide" or seed < 2:
                bench.arm(arm, seed, partial(nets.diversity, arm, seed))
        bench.arm("drift", seed, partial(nets.depth_and_data, seed))
    for name in SETS:
        for at, (one, two) in enumerate(itertools.combinations(range(nets.seeds), 2)):
            bench.arm(f"pairs, {name}", at, partial(nets.pair, name, one, two))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    after = [value for name in SETS for value in column(numbers, name, "conv2: H/T")]
    fell = [b - a for name in SETS for a, b in zip(column(numbers, name, "conv2: H/T"), column(numbers, name, "untrained conv2: H/T"), strict=True)]
    first = max(after) < 1 and min(fell) >= 0.02
    ratios = [row["trained"] / row["untrained"] for name in SETS for row in numbers[f"pairs, {name}"].values()]
    gap: Paired = paired("drift, depth - data [nat]", column(numbers, "drift", "depth"), column(numbers, "drift", "data"))
    deeper = all(row["depth"] > row["data"] for row in numbers["drift"].values())
    verdicts = {
        "1. less diverse": said(first, False),
        "2. trained alike": said(max(ratios) <= 0.5, max(ratios) > 0.5),
        "3. depth over data": said(deeper, gap.high < 0),
    }
    facts = {"largest H/T, trained conv2": max(after), "least fall from the untrained": min(fell), "largest drift, trained over untrained": max(ratios)}
    means = {f"{arm}: {m}": statistics.fmean(column(numbers, arm, m)) for arm in numbers for m in next(iter(numbers[arm].values()))}
    return together(verdicts.values()), [gap, facts, means, {"what": "parts", **verdicts}]
