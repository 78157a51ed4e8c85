"""Claim: 8-bit CNNs keep their accuracy with per-channel weights; per-tensor weights fail; training helps at 4 bits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from convince.claims import Bench, Numbers, column, paired

SAYS = (
    "After training, 8-bit weights with one scale a channel and 8-bit activations are within 2 % of float; one scale a tensor collapses networks"
    " whose channels differ in range; at 4 bits, training with simulated quantisation recovers much of what is lost."
)
SUPPORTED = (
    "On both nets W8A8 with affine weights per channel is on average within 1 point of float; on the rescaled separable net weight-only 8 bits per channel"
    " is within 1 point of float and per tensor at least 5 points below per channel; QAT recovers at least half of what W4A8 loses after training,"
    " on each net where that is at least 1 point (which must be so on one net at least)."
)
CONTRADICTED = (
    "W8A8 per channel loses more than 2 points on a net, or per tensor is within 1 point of per channel on the rescaled net,"
    " or QAT at 4 bits is no better than quantisation after training on a net where that loses at least 1 point."
)
BUDGET = (
    "cifar10, 2,000 training and 1,500 test images, resnet8 and separable-cnn (stem 32, widths 64-64-128-128-128), 5 float epochs, batch 128;"
    " everything in fp32, ranges from 1,024 training images; QAT 2 epochs at lr 0.01 from the float weights; 4 seeds. Reduced from the"
    " catalogue: 8,000 training and 2,000 test images, 6 epochs in bf16 (depthwise convolutions train faster in fp32 here), 5 seeds."
)
NETS = {"resnet8": "resnet8", "separable": "separable-cnn"}
FACTOR = 30.0


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    for seed in range(2 if smoke else 4):
        for arm, model in NETS.items():
            bench.arm(arm, seed, lambda model=model, seed=seed: cell(bench, model, seed, smoke))  # type: ignore[misc]


def cell(bench: Bench, model: str, seed: int, smoke: bool) -> dict[str, float]:
    """All ways of quantising one trained network: test accuracies, 0 to 1."""
    from convince.compress.int8 import network, quantise
    from convince.fit import precision
    from convince.fit.answer import score

    train, test, epochs = (96, 48, 1) if smoke else (2000, 1500, 5)
    data = bench.data("cifar10", train=train, test=test, seed=seed)
    trained = bench.train(data, model=model, epochs=epochs, batch=32 if smoke else 128, lr=0.1, precision="fp32", seed=seed)
    plan, answer = precision.choose("fp32"), trained.answer
    x = plan.pixels(data.x.take(data.split.train[: 64 if smoke else 1024]))

    def accuracy(a: nn.Module) -> float:
        return score(a, data, data.split.test, plan).accuracy

    row = {
        "float": accuracy(answer),
        "w8a8": accuracy(quantise(answer, x, scheme="affine")),
        "ptq4": accuracy(quantise(answer, x, w_bits=4)),
        "qat4": accuracy(quantise(finetune(trained, data, epochs=1 if smoke else 2), x, w_bits=4)),
    }
    if model == "separable-cnn":
        other = copy.deepcopy(answer)
        rescale(network(other), seed)
        row["rescaled"] = accuracy(other)
        for granularity in ("channel", "tensor"):
            row[granularity] = accuracy(quantise(other, x, a_bits=0, granularity=granularity))
    return row


def finetune(trained: Any, data: Any, epochs: int) -> nn.Module:
    """The answer after ``epochs`` of QAT with 4-bit weights, from the trained weights."""
    from convince.fit.loop import fit
    from convince.fit.train import prepare

    settings = trained.settings.updated(parts=("qat:w_bits=4,start_after=0.0",), epochs=epochs, lr=0.01)
    run = prepare(settings, data)
    run.build = lambda: copy.deepcopy(trained.run.model)
    fit(run)
    return run.answer.eval()


@torch.no_grad()
def rescale(model: Any, seed: int) -> None:
    """Same function, other ranges: in each block half of the channels are divided by 30 after the pointwise convolution and multiplied after."""
    from convince.fit.randomness import generator

    gen = generator(seed, "rescale")
    for block in model.blocks:
        norm, depthwise = block[1], block[3]
        half = torch.randperm(len(norm.weight), generator=gen)[: len(norm.weight) // 2]
        norm.weight[half] /= FACTOR
        norm.bias[half] /= FACTOR
        depthwise.weight[half] *= FACTOR


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    comparisons = []

    def mean(arm: str, change: str, baseline: str) -> float:
        row = paired(f"{arm}: {change} - {baseline}", column(numbers, arm, change), column(numbers, arm, baseline))
        comparisons.append(row)
        return row.mean

    eight = [mean(arm, "w8a8", "float") for arm in NETS]
    channel, tensor = mean("separable", "channel", "rescaled"), mean("separable", "tensor", "channel")
    four = [(mean(arm, "ptq4", "float"), mean(arm, "qat4", "ptq4")) for arm in NETS]
    counted = [(loss, gain) for loss, gain in four if loss <= -0.01]
    if min(eight) < -0.02 or tensor > -0.01 or any(gain <= 0 for _, gain in counted):
        return "contradicted", comparisons
    if min(eight) >= -0.01 and channel >= -0.01 and tensor <= -0.05 and counted and all(gain >= -loss / 2 for loss, gain in counted):
        return "supported", comparisons
    return "inconclusive", comparisons
