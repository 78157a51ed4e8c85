"""Claim of thresholdnet: sparse links in late blocks make a DenseNet quicker, and dense ones in early blocks make a HarDNet better."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch

from convince.backbones import builder
from convince.backbones.thresholdnet import activation_traffic
from convince.claims import Bench, Numbers, column, paired, said, together
from convince.fit.randomness import generator

TARGET = {"model": "thresholdnet-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "A. A net of harmonic blocks is much quicker than a dense one (paper: twice as quick). B. With dense blocks before a threshold and harmonic ones after it "
    "the net is no slower than the harmonic one (paper: 10 % quicker), and C. its error is lower (paper: by 10 %)."
)
SUPPORTED = (
    "A. latency harmonic / dense is at most 0.75; and B. latency threshold / harmonic is at most 1.0; and C. test error threshold - harmonic has its 95 % "
    "paired t interval below 0. Each part is reported by itself."
)
CONTRADICTED = "A. harmonic / dense is 1 or more; or B. threshold / harmonic is above 1.05; or C. the interval lies above 0."
BUDGET = (
    "Three nets at 32 px, stem 3x3 of 24 channels and stride 1, blocks of 4, 8, 8 layers, transitions to 64, 96, 128, max-pool after blocks 1 and 2, of "
    "361 to 365 thousand parameters: dense (thr=3, growth 15), harmonic (thr=0, growth 12), threshold (thr=1, growth 12). Latency: median of 100 interleaved "
    "forwards of 64 images, one thread, fp32, channels last. Error: threshold and harmonic on cifar10, 1,500 training and 2,000 test images, 6 epochs, batch "
    "100, Adam 0.001 with a cosine, no augmentation, 4 paired seeds. Reduced against the catalogue: 3,000 training and 5,000 test images, and the dense net, "
    "which is only timed, as no rule asks for its error."
)
NETS = {"dense": "growth=(15,15,15),thr=3", "harmonic": "growth=(12,12,12),thr=0", "threshold": "growth=(12,12,12),thr=1"}
TRAINED = ("harmonic", "threshold")
MODEL = "thresholdnet:layers=(4,8,8),transitions=(64,96,128),halve=(1,1),stem=(24,),"
ADAM = "adamw:lr=0.001,weight_decay=0.0"  # without decay AdamW is Adam


def latency(forwards: int, batch: int, side: int) -> dict[str, float]:
    """Median milliseconds of a forward pass of each net, taken in turns, and what its maps weigh."""
    x = torch.rand(batch, 3, side, side, generator=generator("latency")).contiguous(memory_format=torch.channels_last)
    nets = {}
    for name, options in NETS.items():
        nets[name] = builder(MODEL + options, num_classes=10, in_chans=3, size=(side, side))().eval().to(memory_format=torch.channels_last)
    seen: dict[str, list[float]] = {name: [] for name in nets}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(forwards + 2):  # the first two only warm up
            for name, net in nets.items():
                began = time.perf_counter()
                net(x)
                seen[name].append(1000 * (time.perf_counter() - began))
    torch.set_num_threads(threads)
    found = {name: statistics.median(times[2:]) for name, times in seen.items()}
    return found | {f"{name}, traffic [MB an image]": activation_traffic(net, x[:1]) / 1e6 for name, net in nets.items()}


def error(bench: Bench, data: Any, how: dict[str, Any]) -> dict[str, float]:
    """One training: the share of test images that are wrong."""
    run = bench.train(data, parts=(ADAM,), **how).run
    return {"error": 1 - run.evaluate("test").accuracy, "parameters": sum(p.numel() for p in run.model.parameters())}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 1, 2) if small else ("cifar10", 1500, 2000, 6, 4)
    bench.arm("latency [ms]", 0, partial(latency, 3, 4, 8) if small else partial(latency, 100, 64, 32))
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        for arm in TRAINED:
            how = {"model": MODEL + NETS[arm], "epochs": epochs, "batch": 32 if small else 100, "seed": seed}
            bench.arm(arm, seed, partial(error, bench, data, how))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    took = numbers["latency [ms]"]["0"]
    quicker, kept = took["harmonic"] / took["dense"], took["threshold"] / took["harmonic"]
    better = paired("test error, threshold - harmonic", column(numbers, "threshold", "error"), column(numbers, "harmonic", "error"))

    parts = {
        "A": said(quicker <= 0.75, quicker >= 1),
        "B": said(kept <= 1, kept > 1.05),
        "C": said(better.high < 0, better.low > 0),
    }
    facts: dict[str, float] = {"latency, harmonic / dense": quicker, "latency, threshold / harmonic": kept, **took}
    facts |= {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in TRAINED for metric in ("error", "parameters")}
    comparisons = [better, parts, facts]
    return together(parts.values()), comparisons
