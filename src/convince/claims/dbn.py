"""Claim of deep belief nets: layers learnt without labels help a network that then has few of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from typing import Any, final

import torch
from torch import Tensor

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.parts import Card
from convince.pretrain.dbn import inputs, machines, stack_of

SAYS = "Layers learnt one at a time by restricted Boltzmann machines from unlabelled digits make a good start for a classifier with few labels."
SUPPORTED = (
    "with 200 labels pre-trained - random initial weights is at least +2 points of accuracy with the 95% paired t interval above 0, pre-trained - permuted is "
    "above 0 in the mean, the reconstruction error of the first machine falls in each of the first 5 epochs of every run, and the mean AUROC of -F(v) "
    "for digits against the same digits with shuffled pixels is above 0.95"
)
CONTRADICTED = "with 200 labels the interval of pre-trained - random lies below 0"
BUDGET = (
    "mnist, 4,000 images without labels of which 200 (or 1,000) have one, 3,000 test images, sigmoid network 784-256-256-10; CD-1, 6 epochs a layer, batch 50; "
    "then 400 (800) steps of SGD with Nesterov momentum and a cosine. The rate is the best of 0.03, 0.1, 0.3 on 500 validation images, seed 100, 200 labels, "
    "for each of the two arms. 6 paired seeds of images, labels and weights. Control: the pre-trained weights with the entries of each hidden unit in random "
    "order. Reduced against the catalogue: 10,000 images, 8 epochs, batch 100, 50 epochs of Adam, 8 seeds"
)
RATES = (0.03, 0.1, 0.3)


@final
class Permute(Technique):
    """After pre-training, the incoming weights of each hidden unit in random order: their scale without their features."""

    def on_stage(self, run: Run) -> None:
        if run.stage.name != "train":
            return
        gen = generator(run.seed, "permute")
        with torch.no_grad():
            for _, layer in stack_of(run.model):
                order = torch.rand(layer.weight.shape, generator=gen).argsort(1).to(layer.weight.device)
                layer.weight.copy_(layer.weight.gather(1, order))


def auroc(high: Tensor, low: Tensor) -> float:
    """The probability that a number of ``high`` is above one of ``low``."""
    return float((high[:, None] > low[None]).double().mean() + (high[:, None] == low[None]).double().mean() / 2)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, pool, test, val, epochs, seeds = ("digits", 160, 40, 20, 5, 2) if smoke else ("mnist", 4000, 3000, 500, 6, 6)
    sizes = {200: 20, 1000: 60} if smoke else {200: 200, 1000: 1000}
    length = {200: 5, 1000: 5} if smoke else {200: 400, 1000: 800}
    batch = 10 if smoke else 50

    def few(data: Data, count: int) -> Data:
        """The same images, ``count`` of them with their labels."""
        rows = data.split.train
        kept = torch.cat([rows[data.y[rows] == c][: count // data.k] for c in range(data.k)])
        y = data.y.clone()
        y[rows] = -1
        y[kept] = data.y[kept]
        return dataclasses.replace(data, y=y)

    def trained(data: Data, pre: bool, size: int, lr: float, seed: int, *also: Technique) -> Run:
        chosen = {"model": "sigmoid-mlp:hidden=(256,256)", "batch": batch, "lr": lr, "augment": "none", "precision": "fp32", "weight_decay": 0.0}
        part = (f"dbn:epochs={epochs}",) if pre else ()
        run = prepare(settings(**chosen, parts=part, steps=length[size], epochs=1, seed=seed), few(data, sizes[size]))
        card = Card(part="permute", kind="technique", title="weights in random order")
        run.team = Team([*run.team.seats, *(Seat(card, {}, technique) for technique in also)])
        fit(run)
        return run

    def rate(pre: bool) -> float:
        data = bench.data(name, train=pool, val=val, test=0, seed=100)
        label = "pretrained" if pre else "random"
        found = {
            lr: bench.arm(f"{label} validation, lr {lr}", 100, lambda lr=lr: {"accuracy": trained(data, pre, 200, lr, 100).evaluate("val").accuracy})  # type: ignore[misc]
            for lr in RATES
        }
        return max(RATES, key=lambda lr: found[lr]["accuracy"])

    def pretrained(data: Data, seed: int, lr: float) -> dict[str, float]:
        run = trained(data, True, 200, lr, seed)
        errors = [row["value"] for row in run.record.rows if row.get("name") == "reconstruction error 1"]
        x = run.plan.pixels(data.x.take(data.split.test[:1000])).flatten(1)
        order = torch.rand(x.shape, generator=generator(seed, "shuffled")).argsort(1)
        with torch.no_grad():
            energies = [-machines(run)[0].free_energy(inputs(run, each, 0)) for each in (x, x.gather(1, order))]
        falls = all(b < a for a, b in itertools.pairwise(errors[:5]))
        return {"accuracy": run.evaluate("test").accuracy, "falls": float(falls), "auroc": auroc(*energies), "reconstruction": errors[-1]}

    def plain(data: Data, seed: int, lr: float, pre: bool, size: int, *also: Technique) -> dict[str, float]:
        return {"accuracy": trained(data, pre, size, lr, seed, *also).evaluate("test").accuracy}

    best = {pre: rate(pre) for pre in (True, False)}
    for seed in range(seeds):
        data = bench.data(name, train=pool, test=test, seed=seed)
        bench.arm("pretrained 200", seed, functools.partial(pretrained, data, seed, best[True]))
        bench.arm("permuted 200", seed, functools.partial(plain, data, seed, best[True], True, 200, Permute()))
        bench.arm("random 200", seed, functools.partial(plain, data, seed, best[False], False, 200))
        bench.arm("pretrained 1000", seed, functools.partial(plain, data, seed, best[True], True, 1000))
        bench.arm("random 1000", seed, functools.partial(plain, data, seed, best[False], False, 1000))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str) -> list[float]:
        return [100 * value for value in column(numbers, arm, "accuracy")]

    unit = "[points of accuracy]"
    gain = paired(f"pre-trained - random, 200 labels {unit}", points("pretrained 200"), points("random 200"))
    features = paired(f"pre-trained - permuted, 200 labels {unit}", points("pretrained 200"), points("permuted 200"))
    more = paired(f"pre-trained - random, 1,000 labels {unit}", points("pretrained 1000"), points("random 1000"))
    falls = min(column(numbers, "pretrained 200", "falls"))
    ranked = statistics.fmean(column(numbers, "pretrained 200", "auroc"))
    facts = {"reconstruction error falls in every run": falls, "AUROC of -F(v), digits against shuffled digits": ranked}
    comparisons = [gain, features, more, facts]
    if gain.high < 0:
        return "contradicted", comparisons
    holds = gain.mean >= 2 and gain.low > 0 and features.mean > 0 and falls == 1 and ranked > 0.95
    return "supported" if holds else "inconclusive", comparisons
