"""Claim of slab: LayerNorm traded little by little for a batch norm that folds away keeps accuracy, where plain batch norm does not, and is faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said, together
from convince.errors import Diverged
from convince.fit.loop import fit
from convince.fit.randomness import generator, preserved
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.layers.slab import SimplifiedLinearAttention, fold_repbn, set_lam, slabify
from convince.layers.surgery import find, swap
from convince.parts import Card

SAYS = (
    "1. A vision transformer trained with progressive re-parameterised batch norm (PRepBN), with softmax or simplified linear attention (SLA), is about as "
    "accurate as with LayerNorm, and more so than with batch norm from the start. 2. Folded, it gives the same scores. 3. Folded, it is faster than with "
    "LayerNorm. 4. The time of SLA grows in step with the tokens, that of softmax attention faster."
)
SUPPORTED = (
    "1. test accuracy: PRepBN - LN is at least -1 point in the mean with the lower end of its 95 % paired t interval above -2; PRepBN - BN is at least +1 "
    "point with its interval above 0, or BN fails (its loss is not finite, or its accuracy below 15 %) in half of the seeds; and PRepBN with SLA - LN is at "
    "least -1.5 points in the mean; 2. no logit moves by more than 1e-4 when networks are folded; 3. the folded network takes at most 97 % of the time of "
    "the one with LayerNorm; and 4. with 1,024 tokens for 256 SLA takes at most 5 times as long, softmax attention at least 8 times."
)
CONTRADICTED = (
    "1. the interval of PRepBN - BN lies below 0, or that of PRepBN - LN below -1 point; 2. a logit moves by more than 1e-4; 3. the folded network is slower; "
    "or 4. the factor of SLA is not below that of softmax attention."
)
BUDGET = (
    "1. and 2. cifar10, 4,000 training and 10,000 test images, no augmentation; timm's vision transformer of width 64, depth 4, 4 heads, patches of 8 px (16 "
    "tokens), mean of normalised tokens; AdamW 0.001, weight decay 0.05, cosine after one epoch of warm-up, batch 64, 8 epochs (496 steps), fp32, 4 paired "
    "seeds; LayerNorm's share falls to 0 over the first 70 % of the steps; control: batch norm in the place of every LayerNorm from step 0; folding is tried "
    "on 256 test images. 3. untrained networks of width 96, depth 6, patches of 4 px (64 tokens), batch 64, fp32: median of 20 passes each, turn and turn "
    "about. 4. one layer of width 96 and 4 heads, batch 8, fp32, median of 20 passes. Against the catalogue, for time: the trained network has width 64, "
    "depth 4 and patches of 8 px for 96, 6 and 4 px."
)
ARMS: dict[str, tuple[str, ...]] = {"ln": (), "bn": (), "prepbn": ("slab:attn=false",), "prepbn+sla": ("slab",)}


def vit(side: int, channels: int, classes: int, patch: int, dim: int, depth: int, heads: int = 4) -> nn.Module:
    """timm's vision transformer without class token, its last norm before the mean over tokens, as in the released network."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=side,
        patch_size=patch,
        in_chans=channels,
        num_classes=classes,
        global_pool="avg",
        class_token=False,
        fc_norm=False,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
    )


@final
class Tokens(nn.Module):
    """Batch norm over the last axis, statistics over rows and tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.bn(x.reshape(-1, x.shape[-1])).view(x.shape)


@final
@dataclass
class Control(Technique):
    """Batch norm in the place of every LayerNorm."""

    def on_start(self, run: Run) -> None:
        norms = find(run.model, types=(nn.LayerNorm,))
        assert norms, "the network has no LayerNorm to change"
        swap(run.model, norms, lambda name, norm: Tokens(norm.normalized_shape[0]))  # type: ignore[index, arg-type]


def cell(arm: str, data: Any, how: dict[str, Any], size: dict[str, int]) -> dict[str, float]:
    """One training: test accuracy, whether it failed, and by how much folding moves a logit."""
    parts = ("adamw:lr=0.001,weight_decay=0.05", *ARMS[arm])
    run = prepare(resolve(settings(model="conv-stem-vit", parts=parts, augment="none", precision="fp32", **how), data)[0], data)
    run.build = partial(vit, data.preprocess.size[0], data.preprocess.channels, data.k, **size)
    if arm == "bn":
        run.team = Team([*run.team.seats, Seat(Card(part="norms", kind="technique", title="control"), {}, Control())])
    try:
        fit(run)
    except Diverged:
        return {"accuracy": 1 / data.k, "failed": 1.0}
    accuracy = run.evaluate("test").accuracy
    row = {"accuracy": accuracy, "failed": float(accuracy < 0.15)}
    if ARMS[arm]:
        model = run.model.eval()
        with torch.no_grad():
            x = run.normalise(run.plan.pixels(data.x.take(data.split.test[:256])))
            row["moved"] = float((fold_repbn(model, x[:8])(x) - model(x)).abs().max())
    return row


def turns(calls: dict[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Median seconds of each call, turn and turn about; the first two turns warm up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for at in range(times + 2):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if at >= 2:
                    taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def latency(times: int, batch: int) -> dict[str, float]:
    """Seconds of a pass with LayerNorm, with RepBN as trained, and folded."""
    x = torch.randn(batch, 3, 32, 32, generator=generator("slab", "latency"))
    with preserved():
        torch.manual_seed(0)
        plain, rep = vit(32, 3, 10, 4, 96, 6).eval(), vit(32, 3, 10, 4, 96, 6)
    slabify(rep, attn=False)
    set_lam(rep, 0)
    with torch.no_grad():
        rep.train()(x)  # statistics other than 0 and 1
    folded = fold_repbn(rep.eval(), x[:8])
    found = turns({name: partial(net, x) for name, net in (("ln", plain), ("repbn", rep), ("folded", folded))}, times)
    return {**found, "ratio": found["folded"] / found["ln"]}


def scaling(times: int) -> dict[str, float]:
    """Seconds of a pass of each attention with 256 and with 1,024 tokens, and their factors."""
    from timm.layers import Attention

    calls: dict[str, Callable[[], Any]] = {}
    with preserved():
        torch.manual_seed(0)
        for side in (16, 32):
            x = torch.randn(8, side * side, 96)
            calls[f"sla {side * side}"] = partial(SimplifiedLinearAttention(96, 4, (side, side)).eval(), x)
            calls[f"softmax {side * side}"] = partial(Attention(96, 4, qkv_bias=True).eval(), x)
    found = turns(calls, times)
    return {**found, **{f"{kind} factor": found[f"{kind} 1024"] / found[f"{kind} 256"] for kind in ("sla", "softmax")}}


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, seeds, times = ("digits", 128, 64, 2, 2, 2) if smoke else ("cifar10", 4000, 10000, 8, 4, 20)
    size = {"patch": 2, "dim": 16, "depth": 2} if smoke else {"patch": 8, "dim": 64, "depth": 4}
    bench.arm("latency", 0, partial(latency, times, 4 if smoke else 64))
    bench.arm("scaling", 0, partial(scaling, times))
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        for arm in ARMS:
            bench.arm(arm, seed, partial(cell, arm, data, {"epochs": epochs, "batch": 32 if smoke else 64, "warmup": 1 / 8, "seed": seed}, size))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(a: str, b: str) -> Any:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    kept, won, linear, plain = gain("prepbn", "ln"), gain("prepbn", "bn"), gain("prepbn+sla", "ln"), gain("bn", "ln")
    failures = column(numbers, "bn", "failed")
    broken = 2 * sum(failures) >= len(failures)
    moved = max(row.get("moved", float("inf")) for arm in ARMS if ARMS[arm] for row in numbers[arm].values())  # a run that failed has nothing to fold
    speed, factors = numbers["latency"]["0"], numbers["scaling"]["0"]
    better = won.mean >= 0.01 and won.low > 0
    parts = {
        "1. accuracy is kept": said(
            kept.mean >= -0.01 and kept.low > -0.02 and (better or broken) and linear.mean >= -0.015,
            won.high < 0 or kept.high < -0.01,
        ),
        "2. folding is exact": said(moved <= 1e-4, 1e-4 < moved < float("inf")),
        "3. folded is faster": said(speed["ratio"] <= 0.97, speed["ratio"] > 1),
        "4. SLA is linear": said(factors["sla factor"] <= 5 and factors["softmax factor"] >= 8, factors["sla factor"] >= factors["softmax factor"]),
    }
    facts = {f"accuracy, {arm}": statistics.fmean(column(numbers, arm, "accuracy")) for arm in ARMS}
    facts |= {"seeds in which BN fails": sum(failures), "folded over LN, seconds": speed["ratio"]}
    facts |= {"most that a logit moves": moved} if moved < float("inf") else {}
    facts |= {f"1,024 over 256 tokens, seconds, {kind}": factors[f"{kind} factor"] for kind in ("sla", "softmax")}
    facts |= {"SLA over softmax at 1,024 tokens, seconds": factors["sla 1024"] / factors["softmax 1024"]}
    return together(parts.values()), [kept, won, linear, plain, facts, parts]
