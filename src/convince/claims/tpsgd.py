"""tpSGD: layers that follow their own random projections of the label come near backpropagation in shallow networks, with one layer's memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.training.tpsgd import peak_saved

SAYS = "Without backpropagation, by local random projections of the label, shallow networks learn within 5 points of it and hold the activations of one layer."
SUPPORTED = (
    "tpSGD - backpropagation is at least -5 points of test accuracy on the MLP and on the CNN, with the lower end of the 95 % paired t interval above "
    "-7 on both; tpSGD - last layer only is at least +1 point with the interval above 0 on at least one of the two; and the peak of stored "
    "activations is at most 60 % of backpropagation's on an MLP of 6 hidden layers."
)
CONTRADICTED = (
    "The upper end of tpSGD - backpropagation lies below -5 points on both networks, or the interval of tpSGD - last layer only lies below 0 on both: "
    "then it does nothing that random features do not."
)
BUDGET = (
    "mnist, 3,000 training, 500 validation and 2,000 test images; MLP 784-256-256-10 and CNN of two 5x5 convolutions (8 and 16 channels, max-pools) "
    "and a dense layer of 64, tanh; 5 epochs, batch 64, SGD with momentum, cosine; 4 paired seeds, also of the draw (1 to 4: seed 0 "
    "was seen while the part was written). Learning rate of each arm: the best of 0.01, 0.03 and 0.1 after 2 epochs on the validation images of seed "
    "0. RNN of 64 units (rows as steps): backpropagation, tpSGD and last "
    "layer only, reported. Gap to backpropagation at 2, 4 and 8 hidden layers of 128 units: seeds 1 and 2, reported. Against the catalogue: 3,000 of "
    "10,000 training and 2,000 of 10,000 test images, 4 of 5 seeds, half the RNN's width, the search at one seed and over 2 epochs."
)
ARMS = {"bp": (), "tpsgd": ("tpsgd",), "drtp": ("tpsgd:drtp=True",), "last layer": ("tpsgd:scale=0.0",)}
RATES = (0.01, 0.03, 0.1)


@final
class Plain(nn.Module):
    """A body and a linear head."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


@final
class Rows(nn.Module):
    """The last state of a recurrent layer that reads an image row by row."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(side, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, 0])[0][:, -1]


def mlp(side: int, widths: list[int]) -> nn.Module:
    sizes = [side * side, *widths]
    return Plain(nn.Sequential(nn.Flatten(), *(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh()))), widths[-1])


def cnn(side: int) -> nn.Module:
    blocks = (m for a, b in ((1, 8), (8, 16)) for m in (nn.Conv2d(a, b, 5, padding=2), nn.Tanh(), nn.MaxPool2d(2)))
    return Plain(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(16 * (side // 4) ** 2, 64), nn.Tanh()), 64)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, val, test, epochs, seeds, side = ("digits", 64, 32, 32, 1, 2, 8) if smoke else ("mnist", 3000, 500, 2000, 5, 4, 28)
    networks: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
        "mlp": (lambda: mlp(side, [256, 256]), tuple(ARMS)),
        "cnn": (lambda: cnn(side), tuple(ARMS)),
        "rnn": (lambda: Plain(Rows(side, 64), 64), ("bp", "tpsgd", "last layer")),
    }

    def trained(data: Data, build: Callable[[], nn.Module], arm: str, lr: float, seed: int, **length: int) -> Run:
        chosen = settings(model="small-cnn", parts=ARMS[arm], batch=64, lr=lr, seed=seed, augment="none", precision="fp32", **{"epochs": epochs, **length})
        run = prepare(chosen, data, drop_off=False)
        run.build = build
        fit(run)
        return run

    def searched(build: Callable[[], nn.Module], arm: str) -> dict[str, float]:
        data = bench.data(name, train=train, val=val, test=test, seed=0)
        return {"rate": max(RATES, key=lambda lr: trained(data, build, arm, lr, 0, epochs=min(epochs, 2)).evaluate("val").accuracy)}

    for net, (build, arms) in networks.items():
        rates = {arm: bench.arm(f"{net} {arm} rate", 0, lambda b=build, a=arm: searched(b, a))["rate"] for arm in arms}  # type: ignore[misc]
        for seed in range(1, seeds + 1):
            data = bench.data(name, train=train, val=val, test=test, seed=seed)
            for arm in arms:

                def cell(
                    build: Callable[[], nn.Module] = build, data: Data = data, arm: str = arm, lr: float = rates[arm], seed: int = seed
                ) -> dict[str, float]:
                    return {"accuracy": trained(data, build, arm, lr, seed).evaluate("test").accuracy}

                bench.arm(f"{net} {arm}", seed, cell)

    for depth, seed in itertools.product((2, 4, 8), (1, 2)):
        data = bench.data(name, train=train, val=val, test=test, seed=seed)
        for arm in ("bp", "tpsgd"):
            rate = bench.numbers[f"mlp {arm} rate"]["0"]["rate"]

            def deep(data: Data = data, arm: str = arm, depth: int = depth, rate: float = rate, seed: int = seed) -> dict[str, float]:
                return {"accuracy": trained(data, lambda: mlp(side, [128] * depth), arm, rate, seed).evaluate("test").accuracy}

            bench.arm(f"depth {depth} {arm}", seed, deep)

    def memory(arm: str) -> dict[str, float]:
        data = bench.data(name, train=64, val=0, test=32, seed=0)
        weights = mlp(side, [256] * 6)
        return {"bytes": float(peak_saved(lambda: trained(data, lambda: weights, arm, 0.01, 0, steps=1), weights))}

    for arm in ("bp", "tpsgd"):
        bench.arm(f"memory {arm}", 0, lambda arm=arm: memory(arm))  # type: ignore[misc]


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def difference(a: str, b: str) -> Any:
        points = [[100 * value for value in column(numbers, arm, "accuracy")] for arm in (a, b)]
        return paired(f"{a} - {b} [points of accuracy]", *points)

    near = [difference(f"{net} tpsgd", f"{net} bp") for net in ("mlp", "cnn")]
    learns = [difference(f"{net} tpsgd", f"{net} last layer") for net in ("mlp", "cnn")]
    told = [difference(f"{net} drtp", f"{net} bp") for net in ("mlp", "cnn")]
    told += [difference("rnn tpsgd", "rnn bp"), difference("rnn tpsgd", "rnn last layer")]
    told += [difference(f"depth {depth} tpsgd", f"depth {depth} bp") for depth in (2, 4, 8)]
    share = column(numbers, "memory tpsgd", "bytes")[0] / column(numbers, "memory bp", "bytes")[0]
    comparisons = [*near, *learns, *told, {"peak of stored activations, MLP of 6 hidden layers [share of backpropagation's]": share}]
    if all(c.high < -5 for c in near) or all(c.high < 0 for c in learns):
        return "contradicted", comparisons
    holds = all(c.mean >= -5 and c.low > -7 for c in near) and any(c.mean >= 1 and c.low > 0 for c in learns) and share <= 0.6
    return "supported" if holds else "inconclusive", comparisons
