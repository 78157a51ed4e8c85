"""Claim of large-kernel-study: larger kernels see wider and lean more to shape, and one block serves sound and series as well."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import statistics
import wave
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.backbones import builder
from convince.claims import Bench, Numbers, column, paired
from convince.data import Data, MemoryStore, Preprocess
from convince.diagnose.large_kernel_study import cue_conflicts, equal_width, looks, network
from convince.diagnose.receptive_field import shape_bias
from convince.errors import Mistake
from convince.fit.answer import Answer
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve
from convince.fit.weights import build_by_name
from convince.layers.map_layouts import to_map_audio, to_map_series
from convince.types import Split

SAYS = (
    "1. At equal parameters larger kernels give larger effective receptive fields. 2. They lean more to shape than to texture. 3. The same network serves "
    "sound and time series, where only the layout and the number of input channels change."
)
SUPPORTED = (
    "1. r, the side of the centred square that holds half of the contribution as a share of the image's, obeys r(13) > r(7) > r(3) in the mean, "
    "r(13) / r(3) >= 1.3, and the 95 % paired t interval of log r(13) - log r(3) lies above 0; 2. shape bias of K=13 minus that of K=3 has its interval above "
    "0; and 3. on spoken digits and on SyntheticControl the K=13 network beats the majority class by at least 30 points."
)
CONTRADICTED = (
    "the interval of 1 lies below 0, or that of 2 does, or 3 fails on both sets. Part 2 is not judged where either network answers by either cue in less than "
    "30 % of the images. Accuracy by kernel is told, not judged."
)
BUDGET = (
    "1 and 2. fashion-mnist padded to 32 px, 2,000 training and 1,000 test images; a conv3x3 of stride 2, 2 stages of 2 blocks (16x16 and 8x8 maps), K = 13 "
    "with 24 channels, K = 3 and 7 widened to equal parameters (within 5 %), 5 epochs, AdamW 0.002 cosine, batch 64, 4 paired seeds; r on 200 test images "
    "from the log scores, as the paper (without the log told beside it), and of the untrained networks (what geometry alone gives); 500 cue conflicts of "
    "test images: pixels above 0.1 of one class filled with 8x8 patches of another. 3. One seed: spoken-digits, 2,700 training and 300 test recordings as "
    "32 frames x 32 log-mel bins, 4 epochs; SyntheticControl, 300 and 300 series, 17 numbers a step by a learned embedding, folded to 32x32, 15 epochs. "
    "Against the catalogue: 2,000 of 3,000 training and 1,000 of 5,000 test images, batch 64 of 128, since depthwise convolutions train slowly on a "
    "processor; layer scales begin at 0.1, since 0.000001 does not move in so few steps. r is the ratio of sides; the paper's is its square."
)
KERNELS = (3, 7, 13)


# -- images: receptive field and shape bias ----------------------------------------------------------


def padded(data: Data, side: int) -> Data:
    """The images in the middle of black ones of ``side`` pixels."""
    x = data.x.take(torch.arange(len(data.x)))
    gap = side - x.shape[2]
    x = F.pad(x, (gap // 2, gap - gap // 2) * 2)
    return dataclasses.replace(data, x=MemoryStore(x), preprocess=dataclasses.replace(data.preprocess, size=(side, side)))


def images(bench: Bench, data: Data, spec: str, epochs: int, seed: int, batch: int, rows: int, pairs: int) -> dict[str, float]:
    """One training, and what its network sees and prefers; what it saw before training."""
    done = bench.train(data, model=spec, parts=("adamw:lr=0.002,weight_decay=0.05",), epochs=epochs, batch=batch, seed=seed)
    assert done.test is not None
    test = data.split.test
    x, y = data.float_batch(data.x.take(test)), data.y[test]
    fresh = build_by_name(builder(spec, num_classes=data.k, in_chans=1, size=data.preprocess.size), seed)
    before = looks(Answer(done.run.normalise, fresh), x[:rows])
    bias = shape_bias(done.answer, *cue_conflicts(x, y, pairs, generator(seed, "cue conflicts")))
    numbers = {"accuracy": done.test.accuracy, **looks(done.answer, x[:rows]), **{f"untrained {name}": v for name, v in before.items()}}
    return {**numbers, "shape_bias": bias.bias, "by_shape": bias.shape, "by_texture": bias.texture, "parameters": sum(p.numel() for p in fresh.parameters())}


# -- other inputs: layouts ---------------------------------------------------------------------------


def log_mel(sound: Tensor, rate: int, frames: int, bins: int) -> Tensor:
    """Log-mel energies [frames bins] of one second, padded or cut, with Hann windows of two hops; each recording's peak is 0 dB, its floor -80 dB."""
    sound = F.pad(sound, (0, max(rate - len(sound), 0)))[:rate]
    hop = math.ceil(rate / frames)
    power = torch.stft(sound, 512, hop, 2 * hop, torch.hann_window(2 * hop), return_complex=True).abs().square()[:, :frames]
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bins + 2) / 2595) - 1)
    hz = torch.linspace(0, rate / 2, power.shape[0])
    rising, falling = (hz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None], (edges[2:, None] - hz) / (edges[2:] - edges[1:-1])[:, None]
    energy = torch.minimum(rising, falling).clamp_min(0) @ power
    decibel = 10 * (energy / energy.max().clamp_min(1e-12)).clamp_min(1e-8).log10()
    return decibel.T


def folder(name: str) -> Path:
    """A set's folder below $CONVINCE_DATA."""
    root = os.environ.get("CONVINCE_DATA")
    if not root or not Path(root, name).is_dir():
        raise Mistake(f"{name}: set the environment variable CONVINCE_DATA to a folder that holds the subfolder {name!r}")
    return Path(root, name)


def spoken_digits() -> tuple[Tensor, Tensor, int]:
    """Spectrograms [3000 1 32 32] of recordings, labels, and how many come first as training rows (the maintainers' split)."""
    where = folder("spoken-digits")
    lines = [line.split(",") for line in (where / "labels.csv").read_text(encoding="utf-8").splitlines()]
    at = {name: i for i, name in enumerate(lines[0])}
    rows = sorted(lines[1:], key=lambda row: row[at["split"]] != "train")
    maps = []
    with zipfile.ZipFile(where / "recordings.zip") as pack:
        for row in rows:
            with wave.open(io.BytesIO(pack.read(row[at["file"]]))) as sound:
                heard = torch.from_numpy(np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32))
                maps.append(log_mel(heard / 2**15, sound.getframerate(), 32, 32))
    y = torch.tensor([int(row[at["digit"]]) for row in rows])
    return to_map_audio(torch.stack(maps)), y, sum(row[at["split"]] == "train" for row in rows)


def synthetic_control() -> tuple[Tensor, Tensor, int]:
    """Series [600 1 60 1] as rows of steps, labels, and how many come first as training rows."""
    with np.load(folder("ucr") / "SyntheticControl.npz") as z:
        x = torch.from_numpy(np.concatenate([z["train_x"], z["test_x"]])).float()
        return x.transpose(1, 2)[:, None], torch.from_numpy(np.concatenate([z["train_y"], z["test_y"]])).long(), len(z["train_y"])


def digits_as(bench: Bench, series: bool) -> tuple[Tensor, Tensor, int]:
    """For a smoke run: images of 8x8 as spectrograms, or as series of 64 steps."""
    data = bench.data("digits", train=64, test=32)
    x, y = data.x.take(torch.cat([data.split.train, data.split.test])).float() / 255, data.y[torch.cat([data.split.train, data.split.test])]
    return (x.reshape(len(x), 1, 64, 1) if series else x), y, len(data.split.train)


@final
class Folded(nn.Module):
    """A network of images behind a learned embedding of each step (a circular convolution of 3 steps) and :func:`to_map_series`."""

    def __init__(self, net: nn.Module, numbers: int, width: int = 17) -> None:
        super().__init__()
        self.embed = nn.Conv1d(numbers, width, 3, padding=1, padding_mode="circular", bias=False)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(to_map_series(x[:, 0], lambda steps: self.embed(steps.transpose(1, 2)).transpose(1, 2)))


def layout(made: tuple[Tensor, Tensor, int], spec: str, epochs: int, batch: int, fold: bool) -> dict[str, float]:
    """One training on maps that are no images; test accuracy beside the share of the largest class."""
    x, y, train = made
    k, rows, none = int(y.max()) + 1, torch.arange(len(y)), torch.empty(0, dtype=torch.int64)
    preprocess = Preprocess("image", 1, (x.shape[2], x.shape[3]), "letterbox", (float(x[:train].mean()),), (float(x[:train].std()),))
    data = Data(MemoryStore(x), y, Split(rows[:train], none, rows[train:]), tuple(map(str, range(k))), preprocess, origin="maps")
    how = settings(model=spec, parts=("adamw:lr=0.002,weight_decay=0.05",), epochs=epochs, batch=batch, seed=0, augment="none")
    run = prepare(resolve(how, data)[0], data)
    if fold:
        build = run.build
        run.build = lambda: Folded(build(), x.shape[3])
    fit(run)
    majority = float(torch.bincount(y[train:]).max()) / len(y[train:])
    return {"accuracy": run.evaluate("test").accuracy, "majority": majority}


# -- the claim ---------------------------------------------------------------------------------------


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, seeds, batch, width = ("digits", 64, 64, 1, 2, 16, 6) if smoke else ("fashion-mnist", 2000, 1000, 5, 4, 64, 24)
    rows, pairs, side = (16, 32, 16) if smoke else (200, 500, 32)
    largest = network(13, width)
    specs = {k: largest if k == 13 else network(k, equal_width(k, largest)) for k in KERNELS}
    for seed in range(seeds):
        data = padded(bench.data(name, train=train, test=test, seed=seed), side)
        for k, spec in specs.items():
            bench.arm(f"K={k}", seed, partial(images, bench, data, spec, epochs, seed, batch, rows, pairs))
    bench.arm("sound", 0, lambda: layout(digits_as(bench, False) if smoke else spoken_digits(), largest, 1 if smoke else 4, batch, fold=False))
    bench.arm("series", 0, lambda: layout(digits_as(bench, True) if smoke else synthetic_control(), largest, 1 if smoke else 15, batch // 2, fold=True))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def logs(arm: str, metric: str) -> list[float]:
        return [math.log(value) for value in column(numbers, arm, metric)]

    wider = paired("log side, K=13 - K=3", logs("K=13", "erf"), logs("K=3", "erf"))
    comparisons: list[Any] = [wider]
    for metric, what in (("untrained erf", "untrained (what geometry gives)"), ("erf_plain", "trained, scores without the log")):
        comparisons.append(paired(f"log side, K=13 - K=3, {what}", logs("K=13", metric), logs("K=3", metric)))
    shape = paired("shape bias, K=13 - K=3", column(numbers, "K=13", "shape_bias"), column(numbers, "K=3", "shape_bias"))
    accuracy = [paired(f"accuracy, K=13 - K={k}", column(numbers, "K=13", "accuracy"), column(numbers, f"K={k}", "accuracy")) for k in (3, 7)]
    means = {f"{arm}: {m}": statistics.fmean(column(numbers, arm, m)) for arm in numbers for m in next(iter(numbers[arm].values()))}
    sides = [means[f"K={k}: erf"] for k in KERNELS]
    either = min(means[f"K={k}: by_shape"] + means[f"K={k}: by_texture"] for k in (3, 13))
    ahead = [means[f"{arm}: accuracy"] - means[f"{arm}: majority"] for arm in ("sound", "series")]
    sizes = max(abs(means[f"K={k}: parameters"] / means["K=13: parameters"] - 1) for k in KERNELS)
    rules = {"what": "rules", "r(13) / r(3)": sides[2] / sides[0], "answered by either cue, the lesser of K=3 and K=13": either}
    rules |= {"sound ahead of the majority by": ahead[0], "series ahead of the majority by": ahead[1], "largest gap in parameters": sizes}
    comparisons += [shape, *accuracy, means, rules]
    judged = either >= 0.3
    if wider.high < 0 or (judged and shape.high < 0) or max(ahead) < 0.3:
        return "contradicted", comparisons
    sees = sides[0] < sides[1] < sides[2] and sides[2] >= 1.3 * sides[0] and wider.low > 0 and sizes <= 0.05
    holds = sees and judged and shape.low > 0 and min(ahead) >= 0.3
    return ("supported" if holds else "inconclusive"), comparisons
