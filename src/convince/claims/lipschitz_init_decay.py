"""Claim of lipschitz-init-decay: AOL and SLL lose their signal with depth from the first pass on, at a rate that widths alone decide, and it hurts."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said, together
from convince.diagnose.lipschitz_init_decay import decay_rate, depth_profile, mean_square
from convince.fit.randomness import generator
from convince.layers.one_lipschitz import AOLLinear, MaxMin, SLLLinear, aol_weight, draw_, predicted_aol_variance, predicted_sll_gain

WIDTHS, TRAINED = (32, 128, 512), 64
KINDS, DRAWN = ("aol", "sll"), ("normal", "uniform", "laplace")
ARMS = ((3, "normal"), (12, "normal"), (3, "orthogonal"), (12, "orthogonal"))
SAYS = (
    "The variance of AOL's weights depends on the sizes of the layer alone, not on that of the raw weights nor on their distribution; the output of AOL and "
    "SLL networks goes to zero with depth from the first pass on; and this hurts the training of deep ones."
)
SUPPORTED = (
    "1. the mean square of the entries of W D over 10 draws is within 3 % of predicted_aol_variance at widths 128 and 512 for all three distributions, and "
    "scaling a draw by 0.1 or 10 changes W D by at most 0.00001 of its size. 2. The log of the mean square, averaged over draws, is linear in depth with R^2 > "
    "0.99 and falls, for AOL and SLL at every width and distribution, SLL's rate nearer 1; AOL with orthogonal weights and plain orthogonal layers keep it "
    "within 10 % over 20 layers. 3. In every seed the training accuracy of 12 normal layers is at least 10 points below that of 3 normal ones and of 12 "
    "orthogonal ones."
)
CONTRADICTED = (
    "1. the formula is off by more than 10 % at width 128 or 512 for some distribution; or 2. AOL or SLL keeps more than half of the mean square over 20 "
    "layers at some width and distribution; or 3. the 95 % paired t interval of orthogonal minus normal at 12 layers does not lie above 0."
)
BUDGET = (
    "1 and 2. Square layers of width 32, 128 and 512, 20 in a row, biases 0, no activation between them (SLL has its ReLU inside), float64, 1,024 inputs of "
    "N(0, 1), raw weights normal, uniform and Laplace of variance 1; 10 draws. Stored too: the gradient's rate, and AOL with a ReLU behind each layer (normal, "
    "told, not judged). 3. digits (8x8, pixels 0 to 1), 1,437 training images, AOL layers of width 64 with MaxMin between them, the last to 10 scores times "
    "10; Adam 0.001, 20 epochs, batch 64, 5 paired seeds with equal orders; normal weights have the deviation 1/8 of the orthogonal ones' entries, since "
    "Adam's steps weigh more on small weights. Told, not judged: 11 SLL layers of 64 and an AOL head. As in the catalogue, where the deviation is open."
)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    widths, depth, inputs, draws, seeds, epochs = ((16, 32), 8, 64, 2, 2, 2) if smoke else (WIDTHS, 20, 1024, 10, 5, 20)
    for width, draw in itertools.product(widths, range(draws)):
        for kind, law in itertools.product(KINDS, DRAWN):
            bench.arm(f"{kind}, {law}, {width}", draw, partial(first_pass, kind, law, width, depth, inputs, draw))
        bench.arm(f"aol relu, normal, {width}", draw, partial(first_pass, "aol relu", "normal", width, depth, inputs, draw))
        for kind in ("aol", "linear"):
            bench.arm(f"{kind}, orthogonal, {width}", draw, partial(first_pass, kind, "orthogonal", width, depth, inputs, draw))
    data = bench.data("digits", train=200 if smoke else 1437)
    x, y = data.float_batch(data.x.take(data.split.train)).flatten(1), data.y[data.split.train]
    for seed in range(seeds):
        for layers, law in ARMS:
            bench.arm(f"train {layers} {law}", seed, partial(train, x, y, layers, law, epochs, seed))
        bench.arm("train 12 sll", seed, partial(train, x, y, 12, "sll", epochs, seed))


def drawn(layer: Any, law: str, gen: torch.Generator, sigma: float = 1.0) -> nn.Module:
    """The layer in float64 with its weight drawn and its bias 0."""
    layer = layer.double()
    draw_(layer.weight, law, gen, sigma)
    nn.init.zeros_(layer.bias)
    return layer


def first_pass(kind: str, law: str, width: int, depth: int, inputs: int, draw: int) -> dict[str, float]:
    """One draw of a deep stack: the mean square at each depth, rates, and for AOL the variance of W D and its change under a scale."""
    gen = generator(draw, "lipschitz-init-decay", law, width)
    make: dict[str, Callable[[], nn.Module]] = {
        "aol": lambda: drawn(AOLLinear(width, width), law, gen),
        "aol relu": lambda: nn.Sequential(drawn(AOLLinear(width, width), law, gen), nn.ReLU()),
        "sll": lambda: drawn(SLLLinear(width, width), law, gen),
        "linear": lambda: drawn(nn.Linear(width, width), law, gen),
    }
    x = torch.randn(inputs, width, generator=generator(draw, "lipschitz-init-decay", "inputs"), dtype=torch.float64)
    found = depth_profile(make[kind], depth, x, generator(draw, "lipschitz-init-decay", "gradient"))
    numbers = {f"signal {i:02}": value for i, value in enumerate(found.signal)}
    numbers |= {"rate": decay_rate(found.signal), "gradient rate": decay_rate(found.gradient[::-1])}
    if kind == "aol":
        w = torch.empty(width, width, dtype=torch.float64)
        draw_(w, law, gen)
        rescaled = aol_weight(w)
        moved = max(float((aol_weight(s * w) - rescaled).norm() / rescaled.norm()) for s in (0.1, 10.0))
        numbers |= {"variance": mean_square(rescaled), "change under scale": moved}
    return numbers


def network(features: int, layers: int, law: str, gen: torch.Generator) -> nn.Sequential:
    """``layers`` AOL layers with MaxMin between them ("sll": SLL blocks and an AOL head), the last to 10 scores."""
    net = nn.Sequential()
    for i in range(layers):
        last = i == layers - 1
        if law == "sll" and not last:
            net.append(drawn(SLLLinear(features, features), "normal", gen, features**-0.5))
            continue
        weights = "orthogonal" if law == "orthogonal" else "normal"
        net.append(drawn(AOLLinear(features, 10 if last else features), weights, gen, 1.0 if weights == "orthogonal" else features**-0.5))
        if not last:
            net.append(MaxMin())
    return net.float()


def train(x: Tensor, y: Tensor, layers: int, law: str, epochs: int, seed: int) -> dict[str, float]:
    """Training accuracy at the end, and the mean square of the scores before and after."""
    net = network(x.shape[1], layers, law, generator(seed, "lipschitz-init-decay", "weights", law))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    order = generator(seed, "lipschitz-init-decay", "order")
    with torch.no_grad():
        before = mean_square(net(x))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(10 * net(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        scores = net(x)
    return {"accuracy": float((scores.argmax(1) == y).double().mean()), "before": before, "after": mean_square(scores)}


def mean_logs(numbers: Numbers, arm: str) -> list[float]:
    """The log of the mean square by depth, averaged over draws."""
    names = sorted(name for name in next(iter(numbers[arm].values())) if name.startswith("signal"))
    return [statistics.fmean(map(math.log, column(numbers, arm, name))) for name in names]


def line(numbers: Numbers, arm: str) -> tuple[float, float, float]:
    """Rate a layer, R^2 of a line through :func:`mean_logs`, and the share of the signal that is left at the end."""
    logs = mean_logs(numbers, arm)
    fit = statistics.correlation(range(len(logs)), logs)
    return math.exp((logs[-1] - logs[0]) / (len(logs) - 1)), fit * fit, math.exp(logs[-1] - logs[0])


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    widths = sorted({int(arm.split(", ")[2]) for arm in numbers if ", " in arm})
    comparisons: list[Any] = []
    off: list[float] = []
    moved: list[float] = []
    decays, kept = True, False
    for width, law in itertools.product(widths, DRAWN):
        arm = f"aol, {law}, {width}"
        ratio = statistics.fmean(column(numbers, arm, "variance")) / predicted_aol_variance(width, width)
        off += [abs(ratio - 1)] * (width >= 128)
        moved.append(max(column(numbers, arm, "change under scale")))
        (aol, aol_fit, aol_left), (sll, sll_fit, sll_left) = (line(numbers, f"{kind}, {law}, {width}") for kind in KINDS)
        decays = decays and min(aol_fit, sll_fit) > 0.99 and aol < sll < 1
        kept = kept or max(aol_left, sll_left) > 0.5
        comparisons.append({
            "what": f"{law}, width {width}", "variance over predicted": ratio, "aol rate": aol, "aol R^2": aol_fit, "sll rate": sll, "sll R^2": sll_fit,
            "aol rate, predicted": width * predicted_aol_variance(width, width), "sll rate, predicted": predicted_sll_gain(width, width),
            "aol gradient rate": statistics.fmean(column(numbers, arm, "gradient rate")),
        })  # fmt: skip
    straight = {f"{kind}, width {w}": mean_logs(numbers, f"{kind}, orthogonal, {w}") for w in widths for kind in ("aol", "linear")}
    left = {arm: math.exp(logs[-1] - logs[0]) for arm, logs in straight.items()}
    comparisons.append({"what": "share of the mean square left, orthogonal weights", **left})
    comparisons.append({"what": "rate of AOL with ReLU, normal", **{f"width {w}": line(numbers, f"aol relu, normal, {w}")[0] for w in widths}})
    comparisons.append({"what": "largest change of W D under a scale of 0.1 or 10, share", "value": max(moved)})
    formula = said(bool(off) and max(off) <= 0.03 and max(moved) <= 1e-5, bool(off) and max(off) > 0.10)
    controls = all(abs(share - 1) <= 0.10 for share in left.values())
    accuracy = {arm: column(numbers, arm, "accuracy") for arm in (*(f"train {n} {law}" for n, law in ARMS), "train 12 sll")}
    deep = accuracy["train 12 normal"]
    better = [paired(f"training accuracy, {arm} - 12 normal", accuracy[f"train {arm}"], deep) for arm in ("12 orthogonal", "3 normal", "12 sll")]
    hurt = all(min(a, b) - d >= 0.10 for a, b, d in zip(accuracy["train 12 orthogonal"], accuracy["train 3 normal"], deep, strict=True))
    facts = {f"{arm}: mean training accuracy": statistics.fmean(values) for arm, values in accuracy.items()}
    verdict = together([formula, said(decays and controls, kept), said(hurt, not better[0].low > 0)])
    return verdict, [better[0], *better[1:], facts, *comparisons]
