"""Claim of pyramidnet: widths that grow a little at every block beat widths that double, and no block matters unduly."""

from __future__ import annotations

import statistics
from typing import Any

from torch import nn

from convince.backbones.pyramidnet import Nothing, PyramidNet, lesion
from convince.claims import Bench, Numbers, Paired, column, paired
from convince.fit.answer import score
from convince.fit.run import Run

TARGET = {"model": "pyramidnet-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "1. At equal parameters a network whose width grows at every block is more accurate than one whose width doubles where the side halves. "
    "2. In it no single block matters unduly: deleting the first block of a later stage harms no more than deleting another."
)
SUPPORTED = (
    "1. pyramid - doubling, test accuracy, has its 95 % paired t interval above 0; and 2. the ratio (mean loss of accuracy when the first block of stage 2 or 3"
    " is deleted) / (mean loss over all other blocks) is smaller for the pyramid on at least 4 of 5 seeds."
)
CONTRADICTED = "1. the interval lies below 0; or 2. the pyramid's ratio is smaller on at most 1 of 5 seeds."
BUDGET = (
    "cifar10, 3,000 training and 5,000 test images at 32 px; pyramid of 20 layers, alpha 32, against the same unit, stem and head with widths 13, 27, 53 in "
    "three stages (parameters within 1 %); 8 epochs, batch 128, SGD 0.1 cosine, no augmentation, 5 paired seeds; the lesions use the trained networks of "
    "claim 1 and 1,000 test images. As in the catalogue, but that the baseline has the pyramid's own unit, so that widening alone differs, and the lesions' "
    "1,000 images. The control is a lesion of no block: accuracy as before."
)


def doubling(model: PyramidNet, stages: tuple[int, ...]) -> PyramidNet:
    """The pyramid's own units with one width a stage: what it is compared with."""
    from convince.backbones.pyramidnet import Unit

    c_in = model.conv1.out_channels
    for i, width in enumerate(stages):
        layer = getattr(model, f"layer{i + 1}")
        for j in range(len(layer)):
            layer[j] = Unit(c_in, width, 2 if j == 0 and i else 1, bottleneck=False)
            c_in = width
    model.norm, model.fc, model.num_features = nn.BatchNorm2d(c_in), nn.Linear(c_in, model.num_classes), c_in
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def lesions(run: Run, rows: int) -> dict[str, float]:
    """Loss of accuracy when each unit is deleted: the mean over first units of later stages, and over all others."""
    model = run.model
    assert isinstance(model, PyramidNet)
    index = run.data.split.test[:rows]
    whole = score(run.answer, run.data, index, run.plan).accuracy
    jumps: dict[str, float] = {}
    for unit in model.units():
        kept = lesion(model, unit)
        jumps[unit] = whole - score(run.answer, run.data, index, run.plan).accuracy
        model.get_submodule(unit).branch = kept
    again = score(run.answer, run.data, index, run.plan).accuracy
    firsts = [jumps[u] for u in jumps if u.endswith(".0") and not u.startswith("layer1")]
    others = [jumps[u] for u in jumps if u != "layer1.0" and not u.endswith(".0")] + [jumps["layer1.0"]]
    assert not any(isinstance(m, Nothing) for m in model.modules())
    return {"first": statistics.fmean(firsts), "other": statistics.fmean(others), "nothing": whole - again}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds, rows = ("digits", 64, 64, 1, 2, 32) if small else ("cifar10", 3000, 5000, 8, 5, 1000)

    def cell(arm: str, seed: int) -> dict[str, float]:
        from convince.fit.loop import fit
        from convince.fit.settings import settings
        from convince.fit.train import prepare, resolve

        data = bench.data(name, train=train, test=test, seed=seed)
        how = settings(model="pyramidnet20", epochs=epochs, batch=128 if not small else 32, lr=0.1, seed=seed, augment="none")
        run = prepare(resolve(how, data)[0], data)
        if arm == "doubling":
            build = run.build
            run.build = lambda: doubling(build(), (13, 27, 53))  # type: ignore[arg-type]
        fit(run)
        parameters = sum(p.numel() for p in run.model.parameters())
        return {"accuracy": run.evaluate("test").accuracy, "parameters": parameters, **lesions(run, rows)}

    for seed in range(seeds):
        for arm in ("doubling", "pyramid"):
            bench.arm(arm, seed, lambda arm=arm, seed=seed: cell(arm, seed))  # type: ignore[misc]


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    gain: Paired = paired("accuracy, pyramid - doubling", column(numbers, "pyramid", "accuracy"), column(numbers, "doubling", "accuracy"))

    def ratios(arm: str) -> list[float]:
        pairs = zip(column(numbers, arm, "first"), column(numbers, arm, "other"), strict=True)
        return [first / max(other, 1e-3) for first, other in pairs]

    wins = sum(a < b for a, b in zip(ratios("pyramid"), ratios("doubling"), strict=True))
    n = len(ratios("pyramid"))
    facts: dict[str, float] = {"pyramid's ratio is smaller on": wins, "of": n}
    facts |= {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in numbers for metric in ("accuracy", "parameters", "first", "other")}
    facts["largest change of accuracy when nothing is deleted"] = max(abs(v) for arm in numbers for v in column(numbers, arm, "nothing"))
    if gain.high < 0 or wins <= 1:
        return "contradicted", [gain, facts]
    if gain.low > 0 and wins >= 4:
        return "supported", [gain, facts]
    return "inconclusive", [gain, facts]
