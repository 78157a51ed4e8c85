"""Claim of prototype-case-based: deciding by a few prototypes costs little accuracy, and two terms of the error make them readable."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said
from convince.layers.head import Headed, maps

TARGET = {"model": "prototype-net-mini", "data": "digits", "accuracy": 0.95}
ARMS = {"all terms": ("prototype-loss",), "without R1 and R2": ("prototype-loss:lam1=0.0,lam2=0.0",), "no prototypes": ()}
ADAM = "adamw:lr=0.002,weight_decay=0.0"
SAYS = (
    "A network that decides by distances to 15 prototypes alone is about as accurate as the same encoder with a linear head, and the terms R1 and R2, which "
    "keep prototypes near training images and images near prototypes, are what makes them readable."
)
SUPPORTED = (
    "test accuracy: all terms - no prototypes is at least -2 points in the mean; and the share of readable prototypes with all terms is at least 80 %, and at "
    "least 30 points above that without R1 and R2, in every seed."
)
CONTRADICTED = (
    "all terms - no prototypes is below -5 points in the mean, or the readable share is less than 10 points above that without R1 and R2 in the mean."
)
BUDGET = (
    "mnist, 6,000 training and 2,000 test images, no deformation; prototype-net, 15 prototypes, codes of 40, 25 epochs, batches of 100, Adam 0.002 at a "
    "constant rate, torch's initial law; 3 paired seeds (draw, encoder weights, order). A prototype is readable where a small-cnn, trained on 4,000 other "
    "images for 4 epochs, gives its decoded image a probability of at least 0.9. Controls of that measure, on the network with all terms: decoded codes of "
    "500 test images (90 % expected), and of codes drawn evenly between 0 and the largest value of each coordinate. Told beside it: classes among the "
    "readable ones, and the squared distance of prototypes to the nearest training code. As in the catalogue."
)
READABLE = 0.9


class Twin(Headed):
    """The same encoder with a linear head on its code."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.encoder, self.num_features, self.num_classes, self.in_chans = net.encoder, net.prototypes.shape[1], net.num_classes, net.in_chans
        self.fc = nn.Linear(self.num_features, self.num_classes)
        self.feature_info = maps()

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return self.encoder(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n q"]:
        return features.flatten(1)


def twin(build: Callable[[], nn.Module]) -> nn.Module:
    return Twin(build())


def share_readable(reader: nn.Module, images: Tensor) -> tuple[float, int]:
    """The share of images that the reader is sure of, and how many classes it sees among these."""
    with torch.no_grad():
        probability, label = reader(images).softmax(1).max(1)
    sure = probability >= READABLE
    return float(sure.double().mean()), len(label[sure].unique())


def trained(data: Any, arm: str, smoke: bool, seed: int) -> Any:
    """The finished run of an arm."""
    from convince.fit.loop import fit
    from convince.fit.settings import settings
    from convince.fit.train import prepare, resolve

    how = settings(
        model="prototype-net", parts=(*ARMS[arm], ADAM), epochs=2 if smoke else 25, batch=20 if smoke else 100, schedule="constant", seed=seed, augment="none"
    )
    run = prepare(resolve(how, data)[0], data)
    if arm == "no prototypes":
        run.build = functools.partial(twin, run.build)
    fit(run)
    return run


def cell(material: Callable[[], tuple[Any, Any]], arm: str, smoke: bool, seed: int) -> dict[str, float]:
    from convince.explain.prototype_loss import prototype_images
    from convince.fit.answer import score
    from convince.fit.precision import full
    from convince.fit.randomness import generator

    data, reader = material()
    run = trained(data, arm, smoke, seed)
    found = {"accuracy": score(run.answer, data, data.split.test, run.plan).accuracy}
    if arm == "no prototypes":
        return found
    net = run.model.eval()
    readable, classes = share_readable(reader, prototype_images(net).float())
    technique = next(seat.technique for seat in run.team.seats if seat.name == "prototype-loss")
    distance = next(r.value for r in technique.readings(run) if r.name.startswith("distance"))
    found |= {"readable": readable, "classes": classes, "distance": distance}
    if arm == "all terms":
        rows = data.split.test[:500]
        with run.aside():
            codes = full(run.forward(run.plan.pixels(data.x.take(rows))).features.flatten(1))
            random = torch.rand(codes.shape, generator=generator(seed, "random codes")).to(codes) * codes.amax(0)
            found |= {f"readable, {name}": share_readable(reader, net.decode(z).float())[0] for name, z in (("test codes", codes), ("random codes", random))}
    return found


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    for seed in range(2 if smoke else 3):

        @functools.cache
        def material(seed: int = seed) -> tuple[Any, Any]:
            """The arms' images, and the reader trained on others."""
            from convince.types import Split

            train, val, test = (60, 40, 40) if smoke else (6000, 4000, 2000)
            whole = bench.data("digits" if smoke else "mnist", train=train, val=val, test=test, seed=seed)
            none = whole.split.val[:0]
            others = dataclasses.replace(whole, split=Split(whole.split.val, none, none))
            reader = bench.train(others, model="small-cnn", epochs=1 if smoke else 4, batch=20 if smoke else 64, seed=seed).answer
            return dataclasses.replace(whole, split=Split(whole.split.train, none, whole.split.test)), reader.eval()

        for arm in ARMS:
            bench.arm(arm, seed, functools.partial(cell, material, arm, smoke, seed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    accuracy = {arm: column(numbers, arm, "accuracy") for arm in ARMS}
    readable, without = column(numbers, "all terms", "readable"), column(numbers, "without R1 and R2", "readable")
    lost = statistics.fmean(accuracy["all terms"]) - statistics.fmean(accuracy["no prototypes"])
    more = [a - b for a, b in zip(readable, without, strict=True)]
    rules = {
        "at most 2 points below no prototypes": lost >= -0.02,
        "80 % readable in every seed": min(readable) >= 0.8,
        "30 points above without R1 and R2 in every seed": min(more) >= 0.3,
    }
    comparisons = [
        paired("accuracy, all terms minus no prototypes", accuracy["all terms"], accuracy["no prototypes"]),
        paired("accuracy, all terms minus without R1 and R2", accuracy["all terms"], accuracy["without R1 and R2"]),
        paired("readable prototypes, all terms minus without R1 and R2", readable, without),
        {
            "what": "control of the readability measure: decoded codes of test images, of random codes",
            "test codes": statistics.fmean(column(numbers, "all terms", "readable, test codes")),
            "random codes": statistics.fmean(column(numbers, "all terms", "readable, random codes")),
        },
        {"what": "rules", **rules},
    ]
    return said(all(rules.values()), lost < -0.05 or statistics.fmean(more) < 0.1), comparisons
