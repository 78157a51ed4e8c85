"""Training speed side by side, in one run: Convince, a plain fp32 loop, and the best bf16 loop we can write by hand.

    CONVINCE_DATA=... python benchmarks/train_speed.py [--rounds 3] [--write]

Same network (weights from our ResNet class in all three), data, batch and plain SGD; no augmentation. Each contender
is a process of its own, rounds are interleaved, the median of rounds is printed. Settings: TrashNet photographs at
128 px with resnet18 (batch 32), Fashion-MNIST with resnet20 (batch 128). ``--write`` puts the table into RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from results import write

STEPS = {"trashnet": 14, "fashion-mnist": 60}
WARM = 4
BATCH = {"trashnet": 32, "fashion-mnist": 128}
SHAPE = {"trashnet": (3, 128, 6, "resnet18"), "fashion-mnist": (1, 28, 10, "resnet20")}
CONTENDERS = ("plain fp32 DataLoader", "hand-written bf16", "convince")


def root() -> Path:
    folder = os.environ.get("CONVINCE_DATA")
    if not folder:
        raise SystemExit("set CONVINCE_DATA to the folder of data sets (docs/data.md)")
    return Path(folder)


def source(setting: str) -> str:
    return str(root() / "trashnet" / "images") if setting == "trashnet" else setting


def network(setting: str):
    from convince.backbones import builder

    channels, side, k, name = SHAPE[setting]
    return builder(name, num_classes=k, in_chans=channels, size=(side, side))()


def clock(step: Callable[[object], None], batches: Iterator[object], setting: str, began: float) -> dict[str, float]:
    """Images a second over the steps after the warm ones, and seconds until the first batch was there."""
    first = marks = None
    for i, batch in enumerate(batches):
        if first is None:
            first = time.perf_counter() - began
        step(batch)
        if i + 1 == WARM:
            marks = time.perf_counter()
        if i + 1 == WARM + STEPS[setting]:
            break
    assert marks is not None and first is not None
    return {"images_per_second": STEPS[setting] * BATCH[setting] / (time.perf_counter() - marks), "first_batch_seconds": first}


def plain(setting: str) -> dict[str, float]:
    """What a tutorial has: torchvision data set, DataLoader with two workers, fp32, unfused SGD."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset
    from torchvision import datasets, transforms

    began = time.perf_counter()
    _, side, _, _ = SHAPE[setting]
    if setting == "trashnet":
        steps = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
        data = datasets.ImageFolder(source(setting), transforms.Compose(steps))
    else:
        from convince.data import load

        found = load(setting)
        x = (found.x.take(found.split.train).float() / 255 - 0.286) / 0.353
        data = TensorDataset(x, found.y[found.split.train])
    loader = DataLoader(data, batch_size=BATCH[setting], shuffle=True, num_workers=2, drop_last=True)
    net = network(setting).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step(batch):
        x, y = batch
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    def forever():
        while True:
            yield from loader

    return clock(step, forever(), setting, began)


def by_hand(setting: str) -> dict[str, float]:
    """bf16 autocast, channels_last, uint8 data in one tensor, fused SGD."""
    import torch
    import torch.nn.functional as F

    from convince.data import load

    began = time.perf_counter()
    found = load(source(setting), size=SHAPE[setting][1])
    x, y = found.x.take(found.split.train), found.y[found.split.train]
    net = network(setting).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)

    def batches():
        while True:
            for rows in torch.randperm(len(x)).split(BATCH[setting]):
                if len(rows) == BATCH[setting]:
                    yield x[rows].contiguous(memory_format=torch.channels_last).float().div_(255).sub_(0.5).div_(0.25), y[rows]

    def step(batch):
        pixels, labels = batch
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            scores = net(pixels)
        F.cross_entropy(scores.float(), labels).backward()
        optimizer.step()

    return clock(step, batches(), setting, began)


def ours(setting: str) -> dict[str, float]:
    """``convince train`` as it is, less the report."""
    from convince.data import load
    from convince.fit.loop import fit
    from convince.fit.settings import settings
    from convince.fit.train import prepare

    began = time.perf_counter()
    data = load(source(setting), size=SHAPE[setting][1], val=0.0)
    steps = WARM + STEPS[setting]
    chosen = settings(model=SHAPE[setting][3], batch=BATCH[setting], epochs=20, steps=steps, lr=0.05, augment="none")
    run = prepare(chosen, data)
    marks: list[float] = []
    fit(run, None, lambda done, total, text: marks.append(time.perf_counter()))
    speed = STEPS[setting] * BATCH[setting] / (marks[-1] - marks[WARM - 1])
    # the first mark stands after the first step; a step is subtracted so that all three mean the batch itself
    first = marks[0] - began - (marks[WARM - 1] - marks[0]) / (WARM - 1)
    return {"images_per_second": speed, "first_batch_seconds": first}


def one(contender: str, setting: str) -> None:
    import torch._dynamo  # noqa: F401  what any optimiser imports at its first step; torchvision does so before the clock starts
    import torchvision  # noqa: F401

    import convince.fit.train  # noqa: F401

    found = dict(zip(CONTENDERS, (plain, by_hand, ours), strict=True))[contender](setting)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({**found, "peak_bytes": peak}))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--write", action="store_true")
    ask.add_argument("--one", nargs=2, metavar=("CONTENDER", "SETTING"), help=argparse.SUPPRESS)
    asked = ask.parse_args()
    if asked.one:
        return one(*asked.one)
    lines = []
    for setting in STEPS:
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(asked.rounds):
            for name in CONTENDERS:
                done = subprocess.run([sys.executable, __file__, "--one", name, setting], capture_output=True, text=True, check=True)
                rows[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
        median = {n: {k: statistics.median(r[k] for r in found) for k in found[0]} for n, found in rows.items()}
        base = median[CONTENDERS[0]]["images_per_second"]
        lines += [f"### {setting}, {SHAPE[setting][3]} at {SHAPE[setting][1]} px, batch {BATCH[setting]}", ""]
        lines += ["| | images/s | ratio to plain | first batch, s | peak memory, MB |", "| --- | ---: | ---: | ---: | ---: |"]
        for name, m in median.items():
            cells = [
                f"{m['images_per_second']:.0f}",
                f"{m['images_per_second'] / base:.2f}",
                f"{m['first_batch_seconds']:.1f}",
                f"{m['peak_bytes'] / 2**20:.0f}",
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
        print("\n".join(lines[-6:]), flush=True)
    if asked.write:
        write("Training speed", f"train_speed.py --rounds {asked.rounds} --write", [f"Median of {asked.rounds} rounds.", "", *lines])


if __name__ == "__main__":
    main()
