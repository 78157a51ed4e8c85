"""Claim of haframe: a fixed frame shaped by a class tree makes mistakes less severe at equal accuracy, and it takes the right tree."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any, final

import torch
from torch import nn

from convince.claims import Bench, Numbers, column, paired
from convince.fit.answer import logits_of
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.fit.weights import edit_by_name
from convince.layers.surgery import Behind
from convince.losses.haframe import CARD, HAFrame, Transformation, Tree, hierarchical_distance_at, hierarchy_distance, linear_head, mistake_severity, read_tree

SAYS = "With a frame whose cosines mirror the class tree, wrong answers lie nearer to the truth in the tree than with a learned head, at the same accuracy."
SUPPORTED = (
    "mistake severity (mean height of the lowest common ancestor over wrong test answers) of HAFrame / learned head with cross-entropy is at most 0.95 in the "
    "means with the 95 % paired t interval of the difference below 0, HAFrame's mean severity lies below that of the frame without a tree and of the frame "
    "with shuffled leaves, and its accuracy is at least cross-entropy's - 0.5 points in the mean with the lower end above -1.5."
)
CONTRADICTED = "the interval of the severity's difference, HAFrame - cross-entropy, lies above 0, or the shuffled tree is at most as severe as the right one."
BUDGET = (
    "cifar10, 3,000 training and 3,000 test images, the tree animals (pets, hoofed, wild) and vehicles (road, other) with heights 1 to 3, a 3-block CNN "
    "(16-32-64) with the transformation layer in every arm, SGD 0.1 cosine, batch 64, 10 epochs, 4 paired seeds. Arms: learned linear head and "
    "cross-entropy; HAFrame (alpha 0.4, gamma 2); the same with a flat tree (a simplex); the same with the tree's leaves shuffled by seed, scored on the "
    "right tree. Reduced against the catalogue: the CNN in place of ResNet-8, 3,000 of 5,000 training and 3,000 of 10,000 test images, 10 of 12 epochs."
)
CIFAR = "(((cat,dog),(deer,horse),(bird,frog)),((automobile,truck),(airplane,ship)))"
DIGITS = "(((0,6),(1,7),(2,3)),((4,9),(5,8)))"  # for the smoke test
ARMS = ("learned head", "haframe", "flat tree", "shuffled tree")


@final
class LearnedHead(Technique):
    """The baseline: the transformation layer with HAFrame's own initial weights, a linear layer that learns in place of the frame, cross-entropy."""

    def on_start(self, run: Run) -> None:
        edit_by_name(run.model, partial(self.install, k=run.k), run.seed)

    @staticmethod
    def install(model: nn.Module, k: int) -> None:
        _, head = linear_head(model)
        child = nn.Sequential(OrderedDict(transformation=Transformation(k), frame=nn.Linear(k, k, bias=False)))
        head.add_module("haframe", child.to(head.weight))
        head.register_forward_hook(Behind("haframe"))


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 1, 2) if small else ("cifar10", 3000, 3000, 10, 4)
    text = DIGITS if small else CIFAR
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        how = {"model": "small-cnn:widths=(4,8)" if small else "small-cnn", "epochs": epochs, "batch": 16 if small else 64, "lr": 0.1, "seed": seed}
        parents = read_tree(text, data.classes)
        trees: dict[str, Tree] = {"haframe": text, "flat tree": None, "shuffled tree": shuffled(text, data.classes, seed)}
        for arm in ARMS:
            technique = HAFrame(tree=trees[arm]) if arm in trees else LearnedHead()
            bench.arm(arm, seed, partial(cell, data, how, technique, hierarchy_distance(parents, data.k)))


def shuffled(text: str, classes: tuple[str, ...], seed: int) -> dict[str, str | None]:
    """The same tree with its leaves in random order, as a map from name to parent."""
    parents = read_tree(text, classes)
    order = torch.randperm(len(classes), generator=generator(seed, "shuffled tree")).tolist()
    names = [*(classes[i] for i in order), *(f"group {i}" for i in range(len(classes), len(parents)))]
    return {names[i]: None if above < 0 else names[above] for i, above in enumerate(parents)}


def cell(data: Any, how: dict[str, Any], technique: Technique, distance: torch.Tensor) -> dict[str, float]:
    """One training: accuracy [per cent], mistake severity and mean height over the top answer and the top five, on the right tree [levels]."""
    run = prepare(settings(augment="none", **how), data)
    run.team = Team([Seat(CARD, {}, technique)])
    fit(run)
    rows = data.split.test
    z, y = logits_of(run.answer.eval(), data.x.take(rows), run.plan), data.y[rows]
    return {
        "accuracy": 100 * float((z.argmax(1) == y).double().mean()),
        "severity": mistake_severity(z.argmax(1), y, distance),
        "distance_1": hierarchical_distance_at(z, y, distance, 1),
        "distance_5": hierarchical_distance_at(z, y, distance, 5),
    }


def judge(numbers: Numbers) -> tuple[str, list]:
    def against(arm: str, baseline: str, metric: str = "severity") -> Any:
        return paired(f"{metric}, {arm} - {baseline}", column(numbers, arm, metric), column(numbers, baseline, metric))

    means = {arm: sum(column(numbers, arm, "severity")) / len(numbers[arm]) for arm in ARMS}
    main, accuracy = against("haframe", "learned head"), against("haframe", "learned head", "accuracy")
    comparisons = [
        main,
        accuracy,
        against("haframe", "flat tree"),
        against("haframe", "shuffled tree"),
        against("haframe", "learned head", "distance_1"),
        against("haframe", "learned head", "distance_5"),
        against("haframe", "flat tree", "accuracy"),
        {"what": "severity, haframe / learned head", "value": means["haframe"] / means["learned head"]},
        *({"what": f"severity of {arm} [levels]", "value": value} for arm, value in means.items()),
    ]
    if main.low > 0 or means["shuffled tree"] <= means["haframe"]:
        return "contradicted", comparisons
    below = means["haframe"] < min(means["flat tree"], means["shuffled tree"])
    if means["haframe"] <= 0.95 * means["learned head"] and main.high < 0 and below and accuracy.mean >= -0.5 and accuracy.low > -1.5:
        return "supported", comparisons
    return "inconclusive", comparisons
