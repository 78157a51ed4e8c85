"""Claim of balanced-mixture-supernets: several balanced weight sets rank the placements of poolings better than one."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from typing import Any

from convince import parts
from convince.backbones.pool_net import default_placement, placements
from convince.claims import Bench, Numbers, column, paired, pooled, said
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve
from convince.search.balanced_mixture import rank_quality
from convince.search.balanced_supernets import NAME, MixtureSuperNet

TARGET = {"model": "pool-net-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "Super-network scores of where a network pools agree better with the accuracies of networks that are trained alone when three weight sets share the "
    "placements between them in a balanced mixture than when one set serves them all, at equal steps of training."
)
SUPPORTED = (
    "the paired 95 % t interval of tau(3 sets) - tau(1 set) is above 0, where tau is Kendall's rank correlation with the test accuracy of networks trained "
    "alone; provided that those accuracies spread over more than 2 points and that their two seeds agree with tau of at least 0.5 (else inconclusive)."
)
CONTRADICTED = "that interval is below 0, under the same two provisions."
BUDGET = (
    "cifar10 pooled to 16 px, 6 blocks of 8, 8, 16, 16, 32, 32 channels, 2 poolings: 15 placements. The truth: each trained alone on 4,000 images for 4 "
    "epochs, batch 64, SGD 0.1 cosine, 2 seeds, mean accuracy on 5,000 test images. Super-networks: 6,000 images, a third of them held out, 12 epochs (the "
    "catalogue: 20), batch 64, SGD 0.1 cosine, 4 paired seeds, one set against three; a placement's score is the accuracy of its best set on 1,000 of the "
    "held-out images (the catalogue: 2,000). Control: three sets, drawn evenly throughout (temperature 0), 2 seeds, tells whether learning who trains what "
    "does it, or the best of three alone. Reported beside: the truth of the chosen placement less that of the usual one, which should be at least 0."
)
SETS = {"one set": (1, 100.0, 4), "balanced mixture": (3, 100.0, 4), "even mixture": (3, 0.0, 2)}  # sets, temperature in the end, seeds


class Bed:
    """What the arms share."""

    def __init__(self, bench: Bench) -> None:
        small = bench.scale == "smoke"
        self.bench, self.name, self.by = bench, *(("digits", 1) if small else ("cifar10", 2))
        self.channels, self.poolings = ([4, 4, 6], 1) if small else ([8, 8, 16, 16, 32, 32], 2)
        self.alone_rows, self.rows, self.test, self.look = (64, 96, 60, 32) if small else (4000, 6000, 5000, 1000)
        self.alone_epochs, self.epochs, self.batch = (1, 2, 16) if small else (4, 12, 64)

    def model(self, pools: Sequence[int]) -> str:
        return parts.spell("pool-net", {"channels": self.channels, "pools": list(pools)})

    def data(self, rows: int, seed: int) -> Any:
        return pooled(self.bench.data(self.name, train=rows, test=self.test, seed=seed), self.by)

    def alone(self, pools: Sequence[int], seed: int) -> dict[str, float]:
        """A placement trained alone."""
        how = {"epochs": self.alone_epochs, "batch": self.batch, "lr": 0.1, "seed": seed}
        return {"accuracy": self.bench.train(self.data(self.alone_rows, seed), model=self.model(pools), **how).test.accuracy}

    def shared(self, sets: int, last: float, seed: int) -> dict[str, float]:
        """The score of every placement by super-networks."""
        data = self.data(self.rows, seed)
        how = {"epochs": self.epochs, "sets": sets, "held": 1 / 3, "first": last / 100, "last": last, "look": self.look}
        usual = default_placement(len(self.channels), self.poolings)
        more: dict[str, Any] = {"augment": "none", "batch": self.batch, "lr": 0.1, "epochs": 1, "pretrain_only": True}
        chosen = settings(model=self.model(usual), seed=seed, parts=(parts.spell(NAME, how),), **more)
        run = prepare(resolve(chosen, data)[0], data)
        fit(run)
        mixture = run.extra[NAME]
        assert isinstance(mixture, MixtureSuperNet)
        return {said_as(pools): best for pools, best in zip(mixture.placements, mixture.accuracies.amax(1).tolist(), strict=True)}


def said_as(pools: Sequence[int]) -> str:
    """A placement as a name: ``3 5``."""
    return " ".join(map(str, pools))


def measure(bench: Bench) -> None:
    bed = Bed(bench)
    for seed in range(2):
        for pools in placements(len(bed.channels), bed.poolings):
            bench.arm(f"alone {said_as(pools)}", seed, functools.partial(bed.alone, pools, seed))
    for name, (sets, last, seeds) in SETS.items():
        for seed in range(seeds):
            bench.arm(name, seed, functools.partial(bed.shared, sets, last, seed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    places = [name.removeprefix("alone ") for name in numbers if name.startswith("alone ")]
    by_seed = [[column(numbers, f"alone {place}", "accuracy")[seed] for place in places] for seed in range(2)]
    truth = [statistics.fmean(both) for both in zip(*by_seed, strict=True)]
    spread, agree = max(truth) - min(truth), rank_quality(*by_seed)
    blocks, poolings = max(int(place.split()[-1]) for place in places), len(places[0].split())
    usual = truth[places.index(said_as(default_placement(blocks, poolings)))]
    tau, gain = {}, {}
    for name in SETS:
        scores = [[row[place] for place in places] for _, row in sorted(numbers[name].items(), key=lambda item: int(item[0]))]
        tau[name] = [rank_quality(row, truth) for row in scores]
        gain[name] = [truth[row.index(max(row))] - usual for row in scores]
    difference = paired("Kendall tau to the truth, balanced mixture of 3 sets - one set", tau["balanced mixture"], tau["one set"])
    few = len(tau["even mixture"])
    facts: dict[str, float] = {"truth: largest - smallest accuracy": spread, "truth: tau of its two seeds": agree, "truth: the usual placement": usual}
    facts |= {"truth: the best placement": max(truth)}
    facts |= {f"tau, {name}": statistics.fmean(values) for name, values in tau.items()}
    facts |= {f"truth of the chosen placement - the usual one, {name}": statistics.fmean(values) for name, values in gain.items()}
    comparisons: list[Any] = [
        difference,
        paired("Kendall tau to the truth, balanced mixture - even mixture", tau["balanced mixture"][:few], tau["even mixture"]),
        paired("truth of the chosen placement - the usual one, balanced mixture", gain["balanced mixture"], [0.0] * len(gain["balanced mixture"])),
        facts,
    ]
    told = spread > 0.02 and agree >= 0.5
    return said(told and difference.low > 0, told and difference.high < 0), comparisons
