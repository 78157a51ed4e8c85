"""Claim of attentive-cutmix: pasting the cells that a trained network looks at helps, and helps more than pasting cells at random places."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, final

import torch

from convince.augment.attentive_cutmix import most_attended, paste
from convince.claims import Bench, Numbers, column, paired
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.parts import Card

SAYS = "Attentive CutMix raises test accuracy over flips and crops, and the attention has a part in it: cells at random places do less."
SUPPORTED = (
    "Test accuracy attentive - baseline is at least +0.5 points in the mean with its 95 % paired t interval above 0, "
    "and attentive - random cells is above 0 in the mean."
)
CONTRADICTED = "the upper end of the interval of attentive - random cells lies below 0 (attention harms), or that of attentive - baseline does."
BUDGET = (
    "cifar10, 800 training and 2,000 test images, a residual net of three blocks (8-16-32), flip and crop in every arm, SGD 0.1 cosine, batch 50, 20 epochs, "
    "4 paired seeds, grid 8, 8 patches (share 0.125). Arms: baseline; attentive, its extractor the same net trained 5 epochs first on the same images "
    "(charged to the arm, as are its looks); control: as many cells at random places. Reduced against the catalogue: 800 of 4,000 training and 2,000 of 10,000 "
    "test images, half the width of the net; CutMix and least-attended cells are left to the long check. If attentive and random cells lie within 0.5 points, "
    "the area does the work and not the attention; the evidence says so."
)
MODEL = "resnet:layers=(1,1,1),widths=(8,16,32)"


@final
class RandomCells(Technique):
    """The control: as many cells, drawn at random for each image."""

    rank = 55

    def __init__(self, grid: int, n_patches: int) -> None:
        self.grid, self.n_patches = grid, n_patches

    def on_batch(self, run: Run) -> None:
        x, y, gen = run.batch.x, run.batch.y, run.gen("random cells")
        assert y is not None
        partner = torch.randperm(len(x), generator=gen)
        cells = most_attended(torch.rand(len(x), self.grid, self.grid, generator=gen), self.n_patches)
        run.batch.x, run.batch.y = paste(x, y, cells.to(x.device), partner.to(x.device))


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds, grid = ("digits", 60, 60, 2, 2, 4) if small else ("cifar10", 800, 2000, 20, 4, 8)
    patches = 2 if small else 8
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        how = {"model": MODEL, "epochs": epochs, "batch": 20 if small else 50, "lr": 0.1, "seed": seed}
        bench.arm("baseline", seed, partial(cell, data, how))
        bench.arm("attentive", seed, partial(cell, data, how, f"attentive-cutmix:grid={grid},n_patches={patches}"))
        bench.arm("random cells", seed, partial(cell, data, how, control=RandomCells(grid, patches)))


def cell(data: Any, how: dict[str, Any], part: str | None = None, control: Technique | None = None) -> dict[str, float]:
    """One training: accuracy on test and training images, and all images through networks."""
    run = prepare(resolve(settings(augment="none", parts=("flip-crop", *([part] if part else [])), **how), data)[0], data)
    if control is not None:
        run.team = Team([*run.team.seats, Seat(Card(part="random-cells", kind="technique", title="control"), {}, control)])
    fit(run)
    test = run.evaluate("test")
    found = {"accuracy": test.accuracy, "log_loss": test.log_loss, "train_accuracy": run.evaluate("train").accuracy, "images": float(run.images)}
    return found | ({"extractor_accuracy": run.children[0].evaluate("test").accuracy} if run.children else {})


def judge(numbers: Numbers) -> tuple[str, list]:
    def gain(a: str, b: str) -> Any:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    main, control = gain("attentive", "baseline"), gain("attentive", "random cells")
    equivalent = control.low >= -0.005 and control.high <= 0.005
    costs = {arm: statistics.fmean(column(numbers, arm, "images")) for arm in ("baseline", "attentive")}
    comparisons = [
        main,
        control,
        gain("random cells", "baseline"),
        {"what": "attentive and random cells are equivalent within 0.5 points: the area does the work", "value": equivalent},
        {"what": "images through networks, attentive / baseline", "value": costs["attentive"] / costs["baseline"]},
        {"what": "test accuracy of the extractor", "value": statistics.fmean(column(numbers, "attentive", "extractor_accuracy"))},
        {"what": "smallest accuracy difference that these pairs show", "value": (main.high - main.low) / 2},
    ]
    if control.high < 0 or main.high < 0:
        return "contradicted", comparisons
    return ("supported" if main.mean >= 0.005 and main.low > 0 and control.mean > 0 else "inconclusive"), comparisons
