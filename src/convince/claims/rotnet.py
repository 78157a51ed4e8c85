"""RotNet: features learnt from rotations alone are better than random ones, and than a network taught by few labels."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.pretrain.rotnet import CARD, RotNet, accuracy_of, conv_head, fit_head, frozen_features, linear_head, rotation_accuracy
from convince.types import Stage

SAYS = (
    "A network that learnt to tell four rotations of unlabelled images has features from which few labels suffice: better than random features, "
    "and than learning from those labels alone."
)
SUPPORTED = (
    "With 200 labels: the linear probe on frozen block-2 features of RotNet - that on the random frozen network is at least +5 points of test "
    "accuracy with the 95 % paired t interval above 0, and the conv-block probe on RotNet - the whole network taught by the labels alone is above "
    "0 with its interval; the rotation accuracy on unseen images is above 50 % (chance 25 %); and with shuffled rotation targets it is 20 to 30 "
    "%, and the linear probe at most 1 point above the random frozen network."
)
CONTRADICTED = "With 200 labels the interval of RotNet - random frozen (linear probe), or of RotNet (conv-block probe) - labels alone, lies below 0."
BUDGET = (
    "cifar10, 3,000 images without labels, network in network of 4 blocks with 24 channels, 5 epochs of 4 copies (60,000 passes); then 200 and "
    "1,000 labels of the same images and 2,000 test images; 4 paired seeds. Probes: batch 50, 200 and 300 steps, also for the network that learns "
    "from the labels alone (cosine schedule there, three drops in the probes). The random network's batch statistics are those of the images. "
    "Control: rotation targets shuffled within the batch. Against the catalogue: 3,000 of 5,000 images, 5 of 6 epochs, the control on 2 of the 4 "
    "seeds, and one random rotation an image (report only) is left out; of blocks 1 to 4 the linear probe with 200 labels is reported."
)
SIZES = {200: 50, 1000: 15}  # labels -> epochs of a probe, at batch 50


@final
class Shuffled(Technique):
    """RotNet with the targets of each batch in random order: the same passes, nothing to learn."""

    def __init__(self, inner: RotNet) -> None:
        self.inner = inner

    def on_start(self, run: Run) -> None:
        self.inner.on_start(run)

    def before(self, run: Run) -> list[Stage]:
        return self.inner.before(run)

    def on_batch(self, run: Run) -> None:
        self.inner.on_batch(run)
        if run.stage.name == "rotnet":
            assert run.batch.y is not None
            run.batch.y = run.batch.y[torch.randperm(len(run.batch.y), generator=run.gen("shuffled")).to(run.batch.y.device)]


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, pool, test, epochs, seeds = ("digits", 160, 40, 1, 2) if smoke else ("cifar10", 3000, 2000, 5, 4)
    model = "nin:width=8" if smoke else "nin-mini"
    sizes = {20: 2, 40: 1} if smoke else SIZES
    labels = dict(zip(sizes, SIZES, strict=True))  # what a size is called in the numbers

    @functools.cache
    def drawn(seed: int) -> tuple[Data, dict[int, Tensor]]:
        data = bench.data(name, train=pool, test=test, seed=seed)
        rows = data.split.train
        return data, {size: torch.cat([rows[data.y[rows] == c][: size // data.k] for c in range(data.k)]) for size in sizes}

    def pretext(seed: int, technique: Technique) -> Run:
        data, _ = drawn(seed)
        run = prepare(settings(model=model, epochs=0, batch=32, lr=0.05, augment="none", seed=seed), data)
        run.team = Team([Seat(CARD, {}, technique)])
        fit(run)
        return run

    def random(seed: int) -> Run:
        """Random weights, with the batch statistics of an epoch of images: a rate too small to move anything else."""
        data, _ = drawn(seed)
        return bench.train(data, model=model, epochs=1, batch=32, lr=1e-12, weight_decay=0.0, seed=seed).run

    def probed(run: Run, seed: int, blocks: bool = False) -> dict[str, float]:
        data, few = drawn(seed)
        y = data.y[data.split.test]

        def frozen(block: int, rows: Tensor) -> Tensor:
            with run.plan.autocast():
                return frozen_features(run.answer, f"model.block{block}", run.plan.pixels(data.x.take(rows)))

        def head(build: Callable[..., nn.Module], x: Tensor, size: int, unseen: Tensor, lr: float) -> float:
            length = sizes[size]
            marks = [round(length * at) for at in (0.35, 0.7, 0.85)]
            made = fit_head(build, x, data.y[few[size]], data.k, epochs=length, milestones=marks, batch=50, lr=lr, seed=seed)
            return accuracy_of(made, unseen, y)

        found = {}
        unseen = frozen(2, data.split.test)
        for size, label in labels.items():
            x = frozen(2, few[size])
            found[f"linear_{label}"] = head(linear_head, x, size, unseen, 0.01)
            found[f"conv_{label}"] = head(conv_head, x, size, unseen, 0.1)
        size, label = next(iter(labels.items()))
        for block in (1, 2, 3, 4) if blocks else ():
            found[f"block{block}_{label}"] = head(linear_head, frozen(block, few[size]), size, frozen(block, data.split.test), 0.01)
        return found

    def rotated(seed: int, technique: Technique, blocks: bool = False) -> dict[str, float]:
        run = pretext(seed, technique)
        return {"rotation": rotation_accuracy(run, run.data.split.test[:1000]), **probed(run, seed, blocks)}

    def scratch(seed: int) -> dict[str, float]:
        data, few = drawn(seed)
        found = {}
        for size, label in labels.items():
            steps = sizes[size] * max(size // 50, 1)
            found[f"accuracy_{label}"] = bench.train(data.subset(few[size]), model=model, steps=steps, batch=min(50, size), lr=0.1, seed=seed).test.accuracy
        return found

    for seed in range(seeds):
        bench.arm("rotnet", seed, lambda seed=seed: rotated(seed, RotNet(epochs), blocks=True))  # type: ignore[misc]
        bench.arm("random frozen", seed, lambda seed=seed: probed(random(seed), seed))  # type: ignore[misc]
        bench.arm("labels alone", seed, lambda seed=seed: scratch(seed))  # type: ignore[misc]
        if seed < 2:
            bench.arm("shuffled targets", seed, lambda seed=seed: rotated(seed, Shuffled(RotNet(epochs))))  # type: ignore[misc]
        drawn.cache_clear()


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str, metric: str) -> list[float]:
        return [100 * value for value in column(numbers, arm, metric)]

    unit = "[points of accuracy]"
    frozen = paired(f"rotnet - random frozen, linear probe, 200 labels {unit}", points("rotnet", "linear_200"), points("random frozen", "linear_200"))
    alone = paired(f"rotnet, conv-block probe - labels alone, 200 labels {unit}", points("rotnet", "conv_200"), points("labels alone", "accuracy_200"))
    control = points("shuffled targets", "linear_200")
    shuffled = paired(f"shuffled targets - random frozen, linear probe, 200 labels {unit}", control, points("random frozen", "linear_200")[: len(control)])
    told = [
        paired(f"rotnet - random frozen, conv-block probe, 200 labels {unit}", points("rotnet", "conv_200"), points("random frozen", "conv_200")),
        paired(f"rotnet - random frozen, linear probe, 1,000 labels {unit}", points("rotnet", "linear_1000"), points("random frozen", "linear_1000")),
        paired(f"rotnet, conv-block probe - labels alone, 1,000 labels {unit}", points("rotnet", "conv_1000"), points("labels alone", "accuracy_1000")),
    ]
    facts = {f"linear probe of block {i}, 200 labels {unit}": statistics.fmean(points("rotnet", f"block{i}_200")) for i in (1, 2, 3, 4)}
    turned, guessed = (statistics.fmean(points(arm, "rotation")) for arm in ("rotnet", "shuffled targets"))
    facts |= {"rotation accuracy [points]": turned, "rotation accuracy, shuffled targets [points]": guessed}
    comparisons = [frozen, alone, shuffled, *told, facts]
    if frozen.high < 0 or alone.high < 0:
        return "contradicted", comparisons
    holds = frozen.mean >= 5 and frozen.low > 0 and alone.low > 0 and turned > 50 and 20 <= guessed <= 30 and shuffled.mean <= 1
    return "supported" if holds else "inconclusive", comparisons
