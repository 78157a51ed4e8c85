"""Our networks beside timm's and torchvision's: images a second in training and inference, same size, format and layout, in one run.

Ours as a run places them (depthwise and grouped convolutions the measured way), the reference as a person would: channels_last and autocast.

python benchmarks/backbone_speed.py [--only NAME ...] [--rounds 3] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from results import write
from torch import nn

from convince.backbones import builder
from convince.fit import kernels, precision

# ours -> (library, its name, side, images a batch)
CASES = {
    "resnet18": ("torchvision", "resnet18", 224, 8),
    "resnet34": ("timm", "resnet34", 224, 8),
    "vgg11": ("torchvision", "vgg11", 224, 4),
    "vgg16-bn": ("timm", "vgg16_bn", 224, 2),
    "resnext50-32x4d": ("torchvision", "resnext50_32x4d", 224, 4),
    "mobilenetv2-100": ("torchvision", "mobilenet_v2", 224, 8),
    "convnext-tiny": ("torchvision", "convnext_tiny", 224, 4),
    "convnext-atto": ("timm", "convnext_atto", 224, 8),
    "inception-v4": ("timm", "inception_v4", 299, 2),
    "inception-resnet-v2-slim": ("timm", "inception_resnet_v2", 299, 2),
    "crossvit-9": ("timm", "crossvit_9_240", 240, 8),
    "convit-ti": ("timm", "convit_tiny", 224, 8),
    "halonet26t": ("timm", "halonet26t", 256, 4),
    "sequencer2d-s": ("timm", "sequencer2d_s", 224, 2),
    "nasnet-a-large": ("timm", "nasnetalarge", 331, 1),
    "resnet-rs50": ("timm", "resnetrs50", 160, 8),
}
SECONDS = 0.7  # of a measurement


def reference(library: str, name: str) -> nn.Module:
    if library == "timm":
        import timm

        return timm.create_model(name, num_classes=1000)
    import torchvision

    return torchvision.models.get_model(name, num_classes=1000)


def placed(model: nn.Module, form: str, ours: bool) -> tuple[nn.Module, precision.Plan]:
    plan = precision.choose(form)
    ways = kernels.choose(form, plan.channels_last, kernels.kinds_in(model)) if ours else {}
    plan = precision.choose(form, ways=ways)
    return plan.place(model), plan


def pace(model: nn.Module, plan: precision.Plan, x: torch.Tensor, train: bool) -> float:
    """Images a second, the median of calls for some time."""
    y = torch.zeros(len(x), dtype=torch.int64)

    def once() -> None:
        with plan.autocast(), torch.set_grad_enabled(train):
            scores = model(x)
        if train:
            torch.nn.functional.cross_entropy(scores.float(), y).backward()
            model.zero_grad(set_to_none=True)

    once()
    times, until = [], time.perf_counter() + SECONDS
    while len(times) < 2 or time.perf_counter() < until:
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    return len(x) / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    lines = [
        "| network | reference | px | train fp32 | train bf16 | infer fp32 | infer bf16 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (library, twin, side, batch) in CASES.items():
        if asked.only and name not in asked.only:
            continue
        cells, x = [], torch.rand(batch, 3, side, side)
        for train in (True, False):
            for form in ("fp32", "bf16"):
                torch.manual_seed(0)
                both = [placed(builder(name, num_classes=1000, in_chans=3, size=(side, side))(), form, True), placed(reference(library, twin), form, False)]
                rounds = []
                for _ in range(asked.rounds):  # in turn, so that a drift of the machine's speed meets both
                    mine, theirs = (pace(model.train(train), plan, plan.pixels(x), train) for model, plan in both)
                    rounds.append((mine, theirs))
                ratio = statistics.median(a / b for a, b in rounds)
                cells.append(f"{statistics.median(a for a, _ in rounds):.1f} ({ratio:.2f})")
        lines.append(f"| {name} | {library} {twin} | {side} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    lines += ["", f"Images a second, and in brackets the ratio to the reference: the median of {asked.rounds} rounds, ours and the reference in turn."]
    if asked.write:
        write("Networks beside timm's and torchvision's", "backbone_speed.py" + (f" --only {' '.join(asked.only)}" if asked.only else ""), lines)


if __name__ == "__main__":
    main()
