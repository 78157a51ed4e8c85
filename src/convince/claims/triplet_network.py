"""Claim of the triplet network: comparing three images gives a better embedding than comparing two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convince.claims import Bench, Numbers, Paired, column, paired
from convince.data import Data
from convince.fit.adapters import Optimizer, seat
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team
from convince.fit.train import prepare
from convince.parts import Card
from convince.retrieval.triplet_network import neighbour_shares

SAYS = "The triplet network learns a better representation than its immediate competitor, the Siamese network (MNIST 99.54% against 97.9%)."
SUPPORTED = (
    "5-NN accuracy on the trained classes: triplet minus Siamese is at least 0.01 in the mean with the 95% paired t interval above 0, "
    "and triplet is above raw pixels and above the untrained network in the mean"
)
CONTRADICTED = "triplet minus Siamese is -0.005 or less in the mean, or triplet is at or below raw pixels in the mean"
BUDGET = (
    "fashion-mnist, classes 0 to 7: 3,000 train images (also the references), 2,000 test images; net 16-32-64-128 for 28 px; 16,384 triples against "
    "24,576 pairs (49,152 image passes each), Adam 1e-3 with cosine, batch 64; 5 paired seeds. Raw pixels and the untrained net as controls; "
    "10-way 5-NN with the two classes never trained (bag, ankle boot) is reported. Reduced against the catalogue: 8,000 train images, 40,000 triples, "
    "60,000 pairs, 5,000 references and test images, net 32-64-128-128, batch 128"
)
NET = "triplet-net:widths=(16,32,64,128)"
SEEN = 8  # classes 0 to 7 are trained on


def rows_of(data: Data, rows: Tensor) -> tuple[Tensor, Tensor]:
    return data.float_batch(data.x.take(rows)), data.y[rows]


@torch.no_grad()
def measured(embed: Callable[[Tensor], Tensor], data: Data) -> dict[str, float]:
    """5-NN accuracy among the trained classes, and of all ten with references of all ten."""
    (references, labels), (x, y) = rows_of(data, data.split.train), rows_of(data, data.split.test)
    a, b = (torch.cat([embed(part) for part in rows.split(500)]) for rows in (references, x))
    known, asked = labels < SEEN, y < SEEN
    seen = neighbour_shares(b[asked], a[known], labels[known], 5, data.k).argmax(1) == y[asked]
    every = neighbour_shares(b, a, labels, 5, data.k).argmax(1) == y
    return {"seen": float(seen.double().mean()), "ten_way": float(every.double().mean()), "unseen": float(every[~asked].double().mean())}


def trained(data: Data, part: str, epochs: int, batch: int, seed: int) -> dict[str, float]:
    """Train on the seen classes, measure on all."""
    rows = data.split.train
    run = prepare(settings(model=NET, epochs=epochs, batch=batch, seed=seed, augment="none"), data.subset(rows[data.y[rows] < SEEN]))
    adam = Seat(Card(part="adam", kind="optimizer", title="Adam"), {}, Optimizer(torch.optim.Adam, {"lr": 1e-3}))
    run.team = Team([seat(part), adam])
    fit(run)
    answer: Any = run.answer.eval()

    def embed(x: Tensor) -> Tensor:
        with run.plan.autocast():
            return answer.embed(run.plan.pixels(x)).cpu()

    return measured(embed, data)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    sizes = {"train": 150, "test": 100} if smoke else {"train": 3750, "test": 2500}
    batch, count, epochs, seeds = (16, 32, 1, 2) if smoke else (64, 4096, 4, 5)
    for seed in range(seeds):
        data = bench.data("fashion-mnist", seed=seed, **sizes)

        def run(part: str, epochs: int = epochs, data: Data = data, seed: int = seed) -> Callable[[], dict[str, float]]:
            return lambda: trained(data, part, epochs, batch, seed)

        bench.arm("triplet", seed, run(f"triplet-network:per_epoch={count}"))
        bench.arm("siamese", seed, run(f"siamese-network:per_epoch={count * 3 // 2}"))
        bench.arm("untrained", seed, run("triplet-network", epochs=0))
        bench.arm("pixels", seed, lambda data=data: measured(lambda x: x.flatten(1), data))  # type: ignore[misc]


def judge(numbers: Numbers) -> tuple[str, list[Paired]]:
    triplet = column(numbers, "triplet", "seen")
    siamese = paired("5-NN accuracy, trained classes: triplet minus Siamese", triplet, column(numbers, "siamese", "seen"))
    pixels = paired("5-NN accuracy, trained classes: triplet minus raw pixels", triplet, column(numbers, "pixels", "seen"))
    untrained = paired("5-NN accuracy, trained classes: triplet minus the untrained net", triplet, column(numbers, "untrained", "seen"))
    rows = [siamese, pixels, untrained]
    for other in ("siamese", "pixels"):
        what = f"5-NN accuracy of ten classes, two never trained: triplet minus {other}"
        rows.append(paired(what, column(numbers, "triplet", "ten_way"), column(numbers, other, "ten_way")))
    if siamese.mean <= -0.005 or pixels.mean <= 0:
        return "contradicted", rows
    if siamese.mean >= 0.01 and siamese.low > 0 and pixels.mean > 0 and untrained.mean > 0:
        return "supported", rows
    return "inconclusive", rows
