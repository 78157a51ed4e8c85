"""Claim of cutmix: pasted boxes with mixed labels lower the test error and help where objects are occluded."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from convince.augment.cutmix import cutmix
from convince.claims import Bench, Numbers, column, paired
from convince.fit.answer import logits_of
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.kinds import as_found
from convince.parts import Card

SAYS = "CutMix lowers the test error of a net that overfits, and makes it far better than the baseline and Mixup where a part of the image is occluded."
SUPPORTED = (
    "Error CutMix - baseline has its 95 % paired t interval below 0, and accuracy on occluded images is at least 2 points higher in the mean with the interval "
    "above 0, both for CutMix - baseline and for CutMix - Mixup."
)
CONTRADICTED = "the interval of error CutMix - baseline lies above 0, or that of occluded accuracy CutMix - baseline lies below 0."
BUDGET = (
    "fashion-mnist, 600 training and 1,500 test images, ResNet-8 (16-32-64), flip and crop in every arm, SGD 0.1 cosine, batch 50, 30 epochs, 4 paired seeds, "
    "5 arms: baseline, CutMix (prob 0.5, as on CIFAR), Cutout (half side), Mixup (alpha 1), and the control: CutMix's pixels (prob 0.5) with the label "
    "of the target alone. Reduced against the catalogue: 600 of 2,000 training images (the 30 epochs and the overfitting stay) and 1,500 of 10,000 test "
    "images; FGSM on 400. "
    "Occluded: a random square of half the side holds another test image's pixels. FGSM (8/255) is reported and decides nothing."
)
ARMS = {"baseline": (), "cutmix": ("cutmix:prob=0.5",), "cutout": ("cutout",), "mixup": ("mixup",)}


@final
class PixelsAlone(Technique):
    """The control: CutMix's pixels, and the label of the image that was pasted into."""

    rank = 55

    def on_batch(self, run: Run) -> None:
        if run.batch.y is not None:
            run.batch.x, _ = cutmix(run.batch.x, run.batch.y, run.gen("cutmix"), prob=0.5)


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 60, 60, 1, 2) if small else ("fashion-mnist", 600, 1500, 30, 4)
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        how = {"model": "resnet8", "epochs": epochs, "batch": 50, "lr": 0.1, "seed": seed}
        for arm, parts in ARMS.items():
            bench.arm(arm, seed, partial(cell, data, {**how, "parts": ("flip-crop", *parts)}))
        bench.arm("target's label", seed, partial(cell, data, {**how, "parts": ("flip-crop",)}, PixelsAlone()))


def cell(data: Any, how: dict[str, Any], control: Technique | None = None) -> dict[str, float]:
    """Train, then test error, accuracy on occluded images and under FGSM."""
    run = prepare(resolve(settings(augment="none", **how), data)[0], data)
    if control is not None:
        run.team = Team([*run.team.seats, Seat(Card(part="pixels-alone", kind="technique", title="control"), {}, control)])
    fit(run)
    test = run.evaluate("test")
    rows = data.split.test
    x, y = run.plan.pixels(data.x.take(rows)), data.y[rows]
    hidden = logits_of(run.answer.eval(), occlude(x, generator(run.seed, "occlude")), run.plan)
    few = slice(0, 400)
    attacked = logits_of(run.answer.eval(), fgsm(run, x[few], y[few].to(x.device), 8 / 255), run.plan)
    return {
        "error": 1 - test.accuracy,
        "log_loss": test.log_loss,
        "train_accuracy": run.evaluate("train").accuracy,
        "occluded": float((hidden.argmax(1) == y).double().mean()),
        "fgsm": float((attacked.argmax(1) == y[few]).double().mean()),
    }


def occlude(x: Tensor, gen: torch.Generator) -> Tensor:
    """A random square of half the side of each image filled with the pixels of the image before it."""
    h, w = x.shape[2:]
    side = min(h, w) // 2
    out, other = x.clone(), x.roll(1, 0)
    for i in range(len(x)):
        r, c = (int(torch.randint(0, n - side + 1, (), generator=gen)) for n in (h, w))
        out[i, :, r : r + side, c : c + side] = other[i, :, r : r + side, c : c + side]
    return out


def fgsm(run: Run, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """One step of size ``eps`` [pixel value, 0 to 1] along the sign of the loss's gradient."""
    answer = run.answer
    with as_found(answer):
        x = x.detach().clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(answer(x), y, reduction="sum"), x)
    return (x + eps * slope.sign()).clamp(0, 1).detach()


def judge(numbers: Numbers) -> tuple[str, list]:
    def gain(metric: str, a: str, b: str) -> Any:
        return paired(f"{metric}, {a} - {b}", column(numbers, a, metric), column(numbers, b, metric))

    error = gain("error", "cutmix", "baseline")
    occluded, against = gain("occluded", "cutmix", "baseline"), gain("occluded", "cutmix", "mixup")
    rest = [gain("error", "cutmix", arm) for arm in ("cutout", "mixup", "target's label")]
    rest += [gain("occluded", "cutmix", arm) for arm in ("cutout", "target's label")]
    rest += [gain("fgsm", "cutmix", "baseline")]
    detectable = {"what": "smallest error difference that these pairs show", "value": (error.high - error.low) / 2}
    comparisons = [error, occluded, against, *rest, detectable]
    if error.low > 0 or occluded.high < 0:
        return "contradicted", comparisons
    helps = all(d.low > 0 and d.mean >= 0.02 for d in (occluded, against))
    return ("supported" if error.high < 0 and helps else "inconclusive"), comparisons
