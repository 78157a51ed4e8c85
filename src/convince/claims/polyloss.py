"""Claim of polyloss: shifting cross-entropy's first coefficient, chosen on validation, raises test accuracy."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from convince.claims import Bench, Numbers, column, paired

SAYS = "One number, the shift epsilon of cross-entropy's first coefficient, chosen on validation images, raises test accuracy; larger shifts raise confidence."
SUPPORTED = (
    "validation picks an epsilon other than 0, and on fresh seeds Poly-1 - cross-entropy is at least +0.2 points with its 95 % paired t interval above 0, "
    "and at least as large in the mean as the gain of cross-entropy with the learning rate times (1 + epsilon), and the mechanism holds: "
    "the mean test probability of the true class rises strictly with epsilon from -0.8 to 4."
)
CONTRADICTED = "validation picks epsilon = 0, or the interval of Poly-1 - cross-entropy on fresh seeds lies below 0."
BUDGET = (
    "fashion-mnist, 4,000 training, 2,000 validation and 4,000 test images, a 3-block CNN (16-32-64), SGD 0.1 cosine, batch 64, 4 epochs. "
    "Choice: epsilon in -0.8, 0, 1, 2, 4 on seeds 0 to 3, by mean validation accuracy. Confirmation: 8 fresh paired seeds, 3 arms: cross-entropy, "
    "Poly-1 at the chosen epsilon, cross-entropy with the learning rate times (1 + epsilon). "
    "Reduced against the catalogue: 4,000 of 8,000 training and 4,000 of 10,000 test images, 4 of 6 epochs; all seeds and arms stay."
)
GRID = (-0.8, 0.0, 1.0, 2.0, 4.0)


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, val, test, epochs = ("digits", 64, 32, 64, 1) if small else ("fashion-mnist", 4000, 2000, 4000, 4)
    first, fresh = (2, 2) if small else (4, 8)
    model = "small-cnn:widths=(4,8)" if small else "small-cnn"
    for seed in range(first):
        data = bench.data(name, train=train, val=val, test=test, seed=seed)
        how = {"model": model, "epochs": epochs, "batch": 64, "lr": 0.1, "seed": seed}
        for epsilon in GRID:
            bench.arm(choice(epsilon), seed, partial(cell, bench, data, how, epsilon))
    epsilon = chosen(bench.numbers)
    for seed in range(first, first + fresh):
        data = bench.data(name, train=train, val=val, test=test, seed=seed)
        how = {"model": model, "epochs": epochs, "batch": 64, "lr": 0.1, "seed": seed}
        bench.arm("cross-entropy", seed, partial(cell, bench, data, how, 0.0))
        bench.arm("poly1", seed, partial(cell, bench, data, how, epsilon))
        bench.arm("scaled rate", seed, partial(cell, bench, data, {**how, "lr": 0.1 * (1 + epsilon)}, 0.0))


def choice(epsilon: float) -> str:
    """The name of the arm that tries this epsilon."""
    return f"choice, epsilon {epsilon:g}"


def chosen(numbers: Numbers) -> float:
    """The epsilon with the highest mean validation accuracy; the one nearer 0 where two tie."""
    return max(GRID, key=lambda e: (mean(numbers, choice(e), "val_accuracy"), -abs(e)))


def cell(bench: Bench, data: Any, how: dict[str, Any], epsilon: float) -> dict[str, float]:
    """One training: accuracy on validation and test, and the mean test probability of the true class."""
    done = bench.train(data, parts=(f"poly1:epsilon={epsilon}",), **how)
    pt = done.test.probs.gather(1, done.test.y[:, None]).double().mean()
    val = done.run.evaluate("val").accuracy
    return {"accuracy": done.test.accuracy, "val_accuracy": val, "log_loss": done.test.log_loss, "pt": float(pt), "epsilon": epsilon}


def mean(numbers: Numbers, arm: str, metric: str) -> float:
    """One metric of one arm, mean over its seeds."""
    values = column(numbers, arm, metric)
    return sum(values) / len(values)


def judge(numbers: Numbers) -> tuple[str, list]:
    def gain(a: str, b: str, metric: str = "accuracy") -> Any:
        return paired(f"{metric}, {a} - {b}", column(numbers, a, metric), column(numbers, b, metric))

    epsilon = chosen(numbers)
    pts = [mean(numbers, choice(e), "pt") for e in GRID]
    rises = all(a < b for a, b in itertools.pairwise(pts))
    main, control = gain("poly1", "cross-entropy"), gain("poly1", "scaled rate")
    comparisons = [
        main,
        control,
        gain("scaled rate", "cross-entropy"),
        gain("poly1", "cross-entropy", "log_loss"),
        {"what": "epsilon that validation picked", "value": epsilon},
        *({"what": f"validation accuracy at epsilon {e:g}", "value": mean(numbers, choice(e), "val_accuracy")} for e in GRID),
        *({"what": f"mean test Pt at epsilon {e:g}", "value": pt} for e, pt in zip(GRID, pts, strict=True)),
        {"what": "mean test Pt rises strictly with epsilon (1 yes, 0 no)", "value": float(rises)},
        {"what": "smallest gain that these pairs show", "value": (main.high - main.low) / 2},
    ]
    if epsilon == 0 or main.high < 0:
        return "contradicted", comparisons
    if main.mean >= 0.002 and main.low > 0 and control.mean >= 0 and rises:
        return "supported", comparisons
    return "inconclusive", comparisons
