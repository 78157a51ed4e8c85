"""Claim of vit-resnas: skips in the spatial reduction help, and a super-network learns to rank better from several sub-networks a batch."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

from convince import parts
from convince.claims import Bench, Numbers, column, padded, paired, said, together
from convince.fit.answer import Answer, score
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve
from convince.search.multi_arch_sampling import Elastic, Genes

TARGET = {"model": "vit-resnas-mini", "data": "digits", "accuracy": 0.95}  # its patches leave 2x2 tokens of a digit of 8 px, and then one
SAYS = (
    "1. A multi-stage vision transformer whose spatial reductions have a skip connection is more accurate than one without, of equal parameters and initial "
    "weights. 2. A super-network that trains several sub-networks a batch ranks sub-networks better than one that trains a single one a batch, in equal steps."
)
SUPPORTED = (
    "1. the 95 % paired t interval of test accuracy, with - without skips, lies above 0; and 2. Kendall's tau of the sub-networks' accuracies in the "
    "super-network against those of networks trained alone is higher with 4 groups a batch than with 1 on every seed, and at least 0.3 in the mean."
)
CONTRADICTED = "1. that interval lies below 0; or 2. tau is lower with 4 groups than with 1 on every seed."
BUDGET = (
    "fashion-mnist padded to 32 px, 3,000 training images; widths 32, 64, 128, 2 blocks each, heads of 16 channels, patches of 4 px by one convolution "
    "(8x8, 4x4, 2x2 tokens), drop-path 0; AdamW 1e-3, weight decay 0.05, cosine, batch 128, fp32. 1: MLP ratio 4, 6 epochs, 3,000 test images, 4 paired "
    "seeds. 2: MLP ratio 3; 36 sub-networks (widths times 1, 0.75 or 0.5; hidden units too; second block left out in the last 0 to 3 stages); super-network "
    "5 epochs, the first of them the largest network alone (the warm-up), its choices drawn layer by layer, 3 paired seeds on one draw of images; looked at on "
    "1,000 held-out images; 12 of the 36, in which each setting is as frequent as any other, are trained alone once, 3 epochs each, and judged on the 3,000 "
    "test images. Control: tau of the number of parameters, reported; a super-network that does not beat it is not worth its cost."
)
ADAMW = "adamw:lr=0.001,weight_decay=0.05"


def network(small: bool, ratio: int) -> dict[str, Any]:
    """The options of the (largest) network."""
    widths, e = ((4, 8), 2) if small else ((32, 64, 128), 16)
    rows = {"heads": [[d // e] * 2 for d in widths], "hidden": [[ratio * d] * 2 for d in widths]}
    return {"widths": list(widths), **rows, "head_dims": [e] * len(widths), "patch": 2 if small else 4, "stem": "patch", "stem_width": 1, "drop_path": 0.0}


def elastic(small: bool) -> Elastic:
    """The space of the second claim."""
    return Elastic(network(small, 3), widths=(1.0, 0.75, 0.5), heads=1.0, hidden=0.5, hidden_steps=3)


def grid(space: Elastic) -> list[tuple[Genes, bool]]:
    """Sub-networks of one width share, one share of hidden units and a depth, and whether each is among those trained alone."""
    stages, choices, found = len(space.largest["widths"]), space.choices, []
    for w in range(3):
        for m in range(3):
            for out in range(stages + 1):
                genes = {name: values[w if name.startswith("width") else m if name.startswith("hidden") else 0] for name, values in choices.items()}
                genes |= {f"block{i}.2": 0 for i in range(stages - out + 1, stages + 1)}
                found.append((genes, (w + m + out) % 3 == 0))
    return found


def trained(data: Any, seed: int, epochs: int, options: dict[str, Any], *more: str) -> Run:
    """One training."""
    how = {"parts": (ADAMW, *more), "epochs": epochs, "batch": min(128, len(data.split.train) // 2), "precision": "fp32", "augment": "none"}
    run = prepare(resolve(settings(model=parts.spell("vit-resnas", options), seed=seed, **how), data)[0], data)
    fit(run)
    return run


def alone(data: Any, seed: int, epochs: int, options: dict[str, Any]) -> dict[str, float]:
    """Test accuracy of one network, and its parameters."""
    run = trained(data, seed, epochs, options)
    return {"accuracy": run.evaluate("test").accuracy, "parameters": sum(p.numel() for p in run.model.parameters())}


def ranked(data: Any, seed: int, epochs: int, space: Elastic, groups: int) -> dict[str, float]:
    """Accuracies of all sub-networks on the held-out images, with the weights of one super-network, by their place in :func:`grid`."""
    spec = {"groups": groups, "widths": list(space.widths), "heads": space.heads, "hidden": space.hidden, "hidden_steps": space.hidden_steps}
    run = trained(data, seed, epochs, dict(space.largest), parts.spell("multi-arch-sampling", spec))
    found = {}
    for i, (genes, _) in enumerate(grid(space)):
        answer = Answer(run.normalise, space.sub_network(run.model, genes)).eval()  # type: ignore[arg-type]
        found[str(i)] = score(answer, data, data.split.val, run.plan).accuracy
    return found


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, val, test, side = ("digits", 64, 40, 40, 8) if small else ("fashion-mnist", 3000, 1000, 3000, 32)
    for seed in range(2 if small else 4):
        data = padded(bench.data(name, train=train, test=test, seed=seed), side)
        for arm, skip in (("without skip", False), ("with skip", True)):
            bench.arm(arm, seed, partial(alone, data, seed, 1 if small else 6, {**network(small, 4), "skip": skip}))
    space, data = elastic(small), padded(bench.data(name, train=train, val=val, test=test, seed=0), side)
    for i, (genes, chosen) in enumerate(grid(space)):
        if chosen:
            bench.arm("alone", i, partial(alone, data, 0, 1 if small else 3, space.options(genes)))
    for seed in range(2 if small else 3):
        for groups in (1, 4):
            bench.arm(f"{groups} a batch", seed, partial(ranked, data, seed, 2 if small else 5, space, groups))


def tau(a: list[float], b: list[float]) -> float:
    """Kendall's rank correlation; 0 where one of them is constant."""
    from scipy.stats import kendalltau

    found = float(kendalltau(a, b).statistic)
    return 0.0 if math.isnan(found) else found


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    skip = paired("accuracy, with skip - without skip", column(numbers, "with skip", "accuracy"), column(numbers, "without skip", "accuracy"))
    nets = sorted(numbers["alone"], key=int)
    truth = column(numbers, "alone", "accuracy")

    def taus(arm: str) -> list[float]:
        return [tau([numbers[arm][seed][net] for net in nets], truth) for seed in sorted(numbers[arm], key=int)]

    one, four, count = taus("1 a batch"), taus("4 a batch"), tau(column(numbers, "alone", "parameters"), truth)
    gains = [b - a for a, b in zip(one, four, strict=True)]
    mean = statistics.fmean(four)
    facts: dict[str, float] = {f"{arm}: accuracy": statistics.fmean(column(numbers, arm, "accuracy")) for arm in ("with skip", "without skip", "alone")}
    facts |= {f"{arm}: tau, seed {seed}": value for arm, row in (("1 a batch", one), ("4 a batch", four)) for seed, value in enumerate(row)}
    for arm in ("1 a batch", "4 a batch"):
        facts[f"{arm}: accuracy of all sub-networks"] = statistics.fmean(value for row in numbers[arm].values() for value in row.values())
    facts |= {"tau of the number of parameters (control)": count, "4 a batch beats the number of parameters (1: yes)": float(mean > count)}
    facts |= {"networks trained alone": len(nets), "their accuracies, highest - lowest": max(truth) - min(truth)}
    verdicts = (said(skip.low > 0, skip.high < 0), said(min(gains) > 0 and mean >= 0.3, max(gains) < 0))
    return together(verdicts), [skip, paired("Kendall's tau, 4 a batch - 1 a batch", four, one), facts]
