"""Claim of nc-perturbation: tied features have less spread within classes, the central path shrinks it, and so do depth and weight decay in networks."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, draw, paired, said, together
from convince.diagnose.nc_perturbation import CONVERGED, central_path, depth_profile, one_hot, optimal_weights, tethered_features
from convince.diagnose.neural_collapse_linear import nc1, nc1_ratio
from convince.fit.randomness import generator, preserved, seed_global

BETAS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
DECAYS = (1e-5, 5e-4)
WIDTH, LAYERS = 256, 6
SAYS = (
    "a. Features that are optimised but tied to given ones spread less within their classes than those, the less the looser the tie. b. Along the central path "
    "(gradient flow on features with the best last layer) nc1 falls strictly. c. In trained networks the spread falls from layer to layer, and more "
    "regularisation brings the last features nearer to collapse."
)
SUPPORTED = (
    "a. in every seed nc1 and nc1_ratio of the minimiser are below those of H0 for each of five beta, and rise with beta in all four steps; b. in every seed "
    "nc1 falls in at least 99 % of the steps; and c. in every seed and at both weight decays the rank correlation of nc1_ratio with depth is at most -0.9, "
    "the mean paired difference of log nc1_ratio of the last hidden layer, weight decay 0.0005 less 0.00001, is below 0 with its 95 % t interval, and "
    "before training the mean of log(last / first layer) is less than a tenth of the trained fall, or a rise."
)
CONTRADICTED = (
    "a. for some beta and seed nc1 of a converged minimiser is above that of H0; b. in some seed nc1 at the end of the path is above that at its start; or "
    "c. the interval of the paired difference lies above 0."
)
BUDGET = (
    "mnist, 200 training images a class, drawn by seed, 5 seeds. a. H0: the last hidden layer but one (128 features, behind ReLU) of a network of two "
    "convolutions (16 and 32 filters of 3x3, means of 2x2) and linear layers of 128, 64 and 10, trained with cross-entropy by SGD 0.05 cosine, momentum "
    "0.9, batches of 64, 8 epochs; scaled to unit mean square; lam_w = lam_h = 0.05; beta 0.001 to 10; a minimiser whose relative gradient is above 1e-8 "
    "decides nothing. b. the same H0, lam_w = lam_h = 0.01, 400 Euler steps of 0.2, shortened where they would be unstable. Told: the same with a fixed "
    "random last layer as long as the best one, which need not fall. c. a network of 6 linear layers, 256 wide, ReLU, cross-entropy, SGD 0.05 cosine, "
    "momentum 0.9, batches of 64, 60 epochs, weight decay 0.00001 or 0.0005; nc1_ratio of the 5 hidden layers on the training images. As in the "
    "catalogue; networks, optimiser and the rule for the untrained network are ours."
)


def measure(bench: Bench) -> None:
    name, each, epochs, long, steps, seeds = ("digits", 10, 2, 3, 10, 2) if bench.scale == "smoke" else ("mnist", 200, 8, 60, 400, 5)
    for seed in range(seeds):
        bench.arm("tied", seed, partial(tied, name, each, epochs, seed))
        for control in (False, True):
            bench.arm("path, fixed random last layer" if control else "path", seed, partial(flow, name, each, epochs, seed, steps, control))
        for decay in DECAYS:
            bench.arm(f"weight decay {decay:g}", seed, partial(practice, name, each, long, seed, decay))


def images(name: str, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """``each`` training images a class, [0, 1], and their classes."""
    data = draw(name, 10**9, 0, 0, 0)
    pool = data.split.train[torch.randperm(len(data.split.train), generator=generator(seed, "nc-perturbation", name))]
    rows = torch.cat([pool[data.y[pool] == c][:each] for c in range(10)])
    return data.float_batch(data.x.take(rows)), data.y[rows]


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, decay: float) -> None:
    """Cross-entropy by SGD 0.05 cosine, momentum 0.9, batches of 64; shuffled from the global state."""
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * math.ceil(len(x) / 64))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()


# -- a and b: the model on features of a network -------------------------------------------------------


@functools.lru_cache(maxsize=1)
def features(name: str, each: int, epochs: int, seed: int) -> tuple[Tensor, Tensor]:
    """H0 [N 128] of the trained network, unit mean square, in float64; and the classes."""
    x, y = images(name, each, seed)
    with preserved():
        seed_global(seed, "nc-perturbation", "features")
        maps = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
        body = nn.Sequential(*maps, nn.Linear(32 * (x.shape[2] // 4) * (x.shape[3] // 4), 128), nn.ReLU())
        train(nn.Sequential(body, nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)), x, y, epochs, 0.0)
    with torch.no_grad():
        h = body(x).double()
    return h / h.square().mean().sqrt(), y


def tied(name: str, each: int, epochs: int, seed: int) -> dict[str, float]:
    """nc1 and nc1_ratio of H0 and of the minimisers."""
    h0, y = features(name, each, epochs, seed)
    numbers = {"nc1, H0": nc1(h0, y), "ratio, H0": nc1_ratio(h0, y)}
    for beta in BETAS:
        found = tethered_features(h0, y, 0.05, 0.05, beta)
        numbers |= {f"nc1, beta {beta:g}": nc1(found.h, y), f"ratio, beta {beta:g}": nc1_ratio(found.h, y), f"gradient, beta {beta:g}": found.residual}
    return numbers


def flow(name: str, each: int, epochs: int, seed: int, steps: int, control: bool) -> dict[str, float]:
    """Share of steps in which each metric falls, and both ends of the path."""
    h0, y = features(name, each, epochs, seed)
    best = optimal_weights(h0, one_hot(y), 0.01)
    other = torch.randn(best.shape, generator=generator(seed, "nc-perturbation", "fixed"), dtype=torch.float64)
    path = central_path(h0, y, 0.01, 0.01, steps=steps, step=0.2, frozen=other * best.norm() / other.norm() if control else None)
    numbers = {"time": path.time[-1]}
    for metric, values in (("nc1", path.nc1), ("ratio", path.ratio)):
        falls = [b < a for a, b in itertools.pairwise(values)]
        numbers |= {f"{metric}, share of steps that fall": statistics.fmean(falls), f"{metric}, start": values[0], f"{metric}, end": values[-1]}
    return numbers


# -- c: networks -----------------------------------------------------------------------------------


def practice(name: str, each: int, epochs: int, seed: int, decay: float) -> dict[str, float]:
    """nc1_ratio behind each hidden layer before and after training, its rank correlation with depth, and errors left."""
    from scipy.stats import spearmanr

    x, y = images(name, each, seed)
    x = x.flatten(1)
    with preserved():
        seed_global(seed, "nc-perturbation", "depth")
        sizes = [x.shape[1], *[WIDTH] * (LAYERS - 1)]
        net = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())), nn.Linear(WIDTH, 10))
        before = list(depth_profile(net, x, y).values())
        train(net, x, y, epochs, decay)
    after = list(depth_profile(net, x, y).values())
    with torch.no_grad():
        numbers = {"errors": float((net(x).argmax(1) != y).double().mean())}
    for when, values in (("before", before), ("after", after)):
        numbers |= {f"ratio, layer {i}, {when}": v for i, v in enumerate(values, 1)}
        numbers[f"rank correlation, {when}"] = float(spearmanr(range(len(values)), values).statistic)
        numbers[f"log last over first, {when}"] = math.log(values[-1] / values[0])
    return {**numbers, "log of the last": math.log(after[-1])}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    seeds = list(numbers["tied"].values())
    chains = [[row[f"{m}, {at}"] for at in (*(f"beta {b:g}" for b in BETAS), "H0")] for row in seeds for m in ("nc1", "ratio")]
    rising = all(a < b for chain in chains for a, b in itertools.pairwise(chain))
    converged = all(row[f"gradient, beta {b:g}"] < CONVERGED for row in seeds for b in BETAS)
    above = any(row[f"nc1, beta {b:g}"] > row["nc1, H0"] for row in seeds for b in BETAS if row[f"gradient, beta {b:g}"] < CONVERGED)
    verdicts = [said(rising and converged, above)]

    shares = column(numbers, "path", "nc1, share of steps that fall")
    ends = [b / a for a, b in zip(column(numbers, "path", "nc1, start"), column(numbers, "path", "nc1, end"), strict=True)]
    verdicts.append(said(min(shares) >= 0.99, max(ends) > 1))

    weak, strong = (f"weight decay {d:g}" for d in DECAYS)
    nearer = paired(f"log nc1_ratio of the last hidden layer, {strong} - {weak}", *(column(numbers, arm, "log of the last") for arm in (strong, weak)))
    ranks = [v for arm in (weak, strong) for v in column(numbers, arm, "rank correlation, after")]
    trained, untrained = (
        statistics.fmean(v for arm in (weak, strong) for v in column(numbers, arm, f"log last over first, {when}")) for when in ("after", "before")
    )
    verdicts.append(said(max(ranks) <= -0.9 and nearer.high < 0 and trained < 0 and untrained > trained / 10, nearer.low > 0))

    def mean(arm: str, metric: str) -> float:
        return statistics.fmean(column(numbers, arm, metric))

    control = "path, fixed random last layer"
    facts: list[Any] = [
        {
            "what": f"a. {m}: H0, then beta from {BETAS[0]:g} to {BETAS[-1]:g}",
            "value": [mean("tied", f"{m}, {at}") for at in ("H0", *(f"beta {b:g}" for b in BETAS))],
        }
        for m in ("nc1", "ratio")
    ]
    facts.append({"what": "a. rises with beta in every seed", "value": rising, "converged": converged})
    for arm in ("path", control):
        facts.append({"what": f"b. {arm}", **{name: mean(arm, name) for name in numbers[arm]["0"]}})
    facts.append({"what": "b. least share of steps in which nc1 falls", "value": min(shares), "largest end over start": max(ends)})
    for arm in (weak, strong):
        for when in ("before", "after"):
            facts.append(
                {"what": f"c. {arm}: nc1_ratio by layer, {when} training", "value": [mean(arm, f"ratio, layer {i}, {when}") for i in range(1, LAYERS)]}
            )
        facts.append({"what": f"c. {arm}: errors on the training images", "value": mean(arm, "errors")})
    facts.append({"what": "c. largest rank correlation with depth", "value": max(ranks), "log last over first": trained, "before training": untrained})
    return together(verdicts), [nearer, *facts]
