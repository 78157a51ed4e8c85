"""Shallow parallel study: a grid of residual stacks, each trained deep and shallow from the same weights, as one table."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any, final

from convince.data import Data
from convince.errors import Mistake
from convince.kinds import Study
from convince.parts import Card
from convince.types import Budget

CARD = Card(
    part="shallow-parallel-study",
    kind="study",
    paper="shallow-parallel",
    title="Make Deep Networks Shallow Again",
    year=2023,
    url="https://arxiv.org/abs/2309.08414",
    departs=(
        "a grid of a few levels, chosen by its fields; the paper trains 6,912 networks on MNIST and CIFAR-10",
        "both layouts begin from the same weights and see the same batches, so that a pair differs in its layout alone",
        "the loss on the test part stands for the paper's validation loss",
    ),
    tiny={"layers": (1, 2), "filters": (4,), "kernels": (3,), "seeds": 1},
)
LAYOUTS = ("sequential", "parallel")


def determination(samples: int, outputs: int, parameters: int) -> float:
    """``Q = K M / P``: equations (samples times outputs) a parameter; above 1 the task is overdetermined."""
    return samples * outputs / parameters


def agreement(deep: list[float], shallow: list[float]) -> dict[str, float]:
    """How alike paired losses are: median and mean of ``log(shallow / deep)``, median of its size, share of pairs within 5 %, rank correlation."""
    from scipy.stats import spearmanr

    d = [math.log(b / a) for a, b in zip(deep, shallow, strict=True)]
    found = {"median d": statistics.median(d), "mean d": statistics.fmean(d), "median |d|": statistics.median(map(abs, d))}
    found["within 5 %"] = sum(abs(b / a - 1) <= 0.05 for a, b in zip(deep, shallow, strict=True)) / len(d)
    if len(set(deep)) > 1 and len(set(shallow)) > 1:
        found["rank correlation"] = float(spearmanr(deep, shallow).statistic)
    return found


def train_stack(data: Data, mode: str, n: int, filters: int, kernel: int, **how: Any) -> dict[str, float]:
    """One training of a stack: loss and accuracy on the training and the test part, and Q. ``how`` are settings of the run."""
    from convince.fit.settings import settings
    from convince.fit.train import train

    model = f"residual-stack:n={n},filters={filters},kernel={kernel},mode={mode}"
    run = train(settings(**{"model": model, "augment": "none", **how}), data).run
    if not len(data.split.test):
        raise Mistake(f"shallow-parallel-study: {data.origin} has no test part to measure on")
    trained, tested = run.evaluate("train"), run.evaluate("test")
    found = {"train loss": trained.log_loss, "loss": tested.log_loss, "train accuracy": trained.accuracy, "accuracy": tested.accuracy}
    return {**found, "Q": determination(len(data.split.train), data.k, sum(p.numel() for p in run.model.parameters()))}


@final
@dataclass
class ShallowParallelStudy(Study):
    """Trains each stack of the grid ``layers`` x ``filters`` x ``kernels`` deep and shallow, ``seeds`` times, and prints their losses side by side.

    ``data``: a built-in set, folder or table; its test part is used as it is. ``lr`` is AdamW's.
    """

    data: str = "digits"
    layers: tuple[int, ...] = (1, 2, 4, 8)
    filters: tuple[int, ...] = (8, 16)
    kernels: tuple[int, ...] = (3, 5)
    seeds: int = 1
    batch: int = 64
    lr: float = 1e-3

    def run(self, budget: Budget) -> dict[str, Any]:
        """The table: one row a stack, means over seeds, and :meth:`agreement` of all. ``budget`` is that of one training (images, steps or epochs)."""
        from convince.data import load

        if not (self.layers and self.filters and self.kernels) or self.seeds < 1:
            raise Mistake("shallow-parallel-study: layers, filters and kernels need a value each, and seeds is at least 1")
        data = load(self.data, val=0.0, seed=0)
        length = self._length(budget, len(data.split.train))
        how = {"batch": self.batch, "parts": (f"adamw:lr={self.lr}",), **length}
        table = []
        for n, filters, kernel in itertools.product(self.layers, self.filters, self.kernels):
            row: dict[str, Any] = {"layers": n, "filters": filters, "kernel": kernel}
            for mode in LAYOUTS:
                runs = [train_stack(data, mode, n, filters, kernel, seed=seed, **how) for seed in range(self.seeds)]
                row |= {f"{mode} {name}": statistics.fmean(run[name] for run in runs) for name in ("train loss", "loss", "accuracy")}
                row["Q"] = runs[0]["Q"]
            row["d"] = math.log(row["parallel loss"] / row["sequential loss"])
            table.append(row)
        alike = {
            what: agreement([row[f"sequential {name}"] for row in table], [row[f"parallel {name}"] for row in table])
            for what, name in (("validation", "loss"), ("training", "train loss"))
        }
        print(self._page(table, alike))
        return {**asdict(self), "budget": asdict(budget), "table": table, "agreement": alike}

    def _length(self, budget: Budget, rows: int) -> dict[str, int]:
        per = {"steps": 1.0, "images": 1 / self.batch, "epochs": float(max(rows // self.batch, 1))}.get(budget.unit)
        if per is None:
            raise Mistake(f"shallow-parallel-study: a budget in {budget.unit} does not fit; give images, steps or epochs of one training")
        return {"steps": max(round(budget.value * per), 1)}

    def _page(self, table: list[dict[str, Any]], alike: dict[str, dict[str, float]]) -> str:
        lines = [f"{self.data}, {self.seeds} seed(s): loss on the test part, deep and shallow"]
        lines.append(f"{'layers':>6}{'filters':>8}{'kernel':>7}{'Q':>8}{'deep':>9}{'shallow':>9}{'d':>8}")
        for row in table:
            sides = f"{row['sequential loss']:>9.4f}{row['parallel loss']:>9.4f}{row['d']:>+8.3f}"
            lines.append(f"{row['layers']:>6}{row['filters']:>8}{row['kernel']:>7}{row['Q']:>8.2f}" + sides)
        lines += [f"{what}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()) for what, found in alike.items()]
        return "\n".join(lines)
