"""Claim of spp-net: a pyramid in place of the flattened map costs no accuracy, sizes taken in turn teach other sizes, regions come from one map."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.backbones.plain_cnn import PlainCNN
from convince.claims import Bench, Numbers, column, paired, said, together
from convince.data import Data, MemoryStore
from convince.fit.answer import logits_of
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve
from convince.layers.spp import region_seconds, repool
from convince.training.multi_size import resized
from convince.types import Split

SAYS = (
    "1. Spatial pyramid pooling in place of the flattened last map loses no accuracy at the size of training. 2. Training at two sizes in turn makes the "
    "pyramid's network more accurate at a third, unseen size. 3. Features of many boxes of an image come far faster from one map than from cut-out boxes."
)
SUPPORTED = (
    "1. pyramid minus flattened map at 36 px is at least 0 in the mean and its 95 % paired t interval lies above -0.5 points; 2. pyramid with two sizes minus "
    "pyramid with one, tested at 44 px, is at least +1 point with its interval above 0; and 3. 200 boxes are at least 5 times as fast from one map."
)
CONTRADICTED = "the interval of 1 lies below -0.5 points, or that of 2 below 0, or 3 is less than 5 times."
BUDGET = (
    "fashion-mnist, each image enlarged or shrunk to 20 to 36 px and put at a random place of a black canvas of 36, 5,000 training and 5,000 test images, "
    "4 convolutions (16, 32, 64, 64; stride 2 twice) without batch norm, 8 epochs, AdamW 0.002 cosine, batch 64, 4 paired seeds. Arms: the 9x9 map "
    "flattened, pyramid (4, 2, 1), the same with two sizes in turn (36 and 28 px, as many images). Controls: global max-pooling (pyramid (1,)) and a "
    "flattened map of 15 channels with as many parameters as the pyramid's (within 3 %). Tested at 28, 36 and 44 px, the whole canvas resized; flattened "
    "maps at 36 alone. 3: 200 boxes of 32 to 112 px of one 224 px image of noise through the untrained trunk, each crop at its own size, median of 5. "
    "As in the catalogue, nothing reduced."
)
SIDE, SEEN, OTHER = 36, 28, 44  # pixels
WIDTHS = (16, 32, 64)


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 128, 64, 2, 2) if small else ("fashion-mnist", 5000, 5000, 8, 4)
    network = f"plain-cnn:layers=(1,1,2),widths={(4, 8, 8) if small else WIDTHS},init=he".replace(" ", "")
    pyramid, sizes = "spp:levels=(4,2,1)", f"multi-size:scales=(1.0,{SEEN / SIDE!r})"
    for seed in range(seeds):
        data = pasted(bench.data(name, train=train, test=test, seed=seed), seed)
        how = {"model": network, "epochs": epochs, "batch": 64, "seed": seed}
        optimizer = "adamw:lr=0.002,weight_decay=0.05"
        bench.arm("flatten", seed, partial(cell, data, how, (optimizer,), 0))
        bench.arm("flatten, parameters of the pyramid", seed, partial(cell, data, how, (optimizer,), 15))
        bench.arm("global max", seed, partial(cell, data, how, (optimizer, "spp:levels=(1,)"), None))
        bench.arm("pyramid", seed, partial(cell, data, how, (optimizer, pyramid), None))
        bench.arm("pyramid, two sizes", seed, partial(cell, data, how, (optimizer, pyramid, sizes), None))
    bench.arm("boxes", 0, partial(boxes, *((5, 64, 2) if small else (200, 224, 5))))


def pasted(data: Data, seed: int) -> Data:
    """Each image of the split at a random size of 20 to 36 px at a random place of a black canvas of 36 px."""
    gen = generator(seed, "pasted")
    rows = torch.cat([data.split.train, data.split.val, data.split.test])
    x = data.x.take(rows).float()
    side = torch.randint(20, SIDE + 1, (len(rows),), generator=gen)
    place = torch.rand(len(rows), 2, generator=gen)
    canvas = torch.zeros(len(rows), x.shape[1], SIDE, SIDE, dtype=torch.uint8)
    for n in side.unique().tolist():
        which = (side == n).nonzero()[:, 0]
        made = F.interpolate(x[which], size=(n, n), mode="bilinear", align_corners=False, antialias=True).round().clamp(0, 255).to(torch.uint8)
        corners = (place[which] * (SIDE - n + 1)).long().tolist()
        for i, (top, left), image in zip(which.tolist(), corners, made, strict=True):
            canvas[i, :, top : top + n, left : left + n] = image
    a, b = len(data.split.train), len(data.split.train) + len(data.split.val)
    at = torch.arange(len(rows))
    preprocess = dataclasses.replace(data.preprocess, size=(SIDE, SIDE))
    return dataclasses.replace(data, x=MemoryStore(canvas), y=data.y[rows], split=Split(at[:a], at[a:b], at[b:]), preprocess=preprocess)


def cell(data: Data, how: dict[str, Any], parts: tuple[str, ...], channels: int | None) -> dict[str, float]:
    """One training; accuracy at the three sizes, or at 36 px alone where the map is flattened: ``channels`` None is no, 0 is all of them."""
    ready, _ = resolve(settings(**how, parts=parts, augment="none"), data)
    run = prepare(ready, data)
    if channels is not None:
        run.build = partial(flattened, run.build, channels)
    fit(run)
    numbers = {f"accuracy at {side}": accuracy(run, side) for side in ((SIDE,) if channels is not None else (SEEN, SIDE, OTHER))}
    return {**numbers, "parameters": float(sum(p.numel() for p in run.model.parameters()))}


def flattened(build: Any, channels: int) -> nn.Module:
    """The network with its last map flattened, after a 1x1 convolution to fewer ``channels`` (0: none)."""
    net = build()
    assert isinstance(net, PlainCNN)
    positions = (-(-SIDE // 4)) ** 2
    thin = nn.Conv2d(net.num_features, channels, 1) if channels else nn.Identity()
    repool(net, nn.Sequential(thin, nn.Flatten()), (channels or net.num_features) * positions, "flat")
    return net


def accuracy(run: Run, side: int) -> float:
    """Test accuracy with the whole canvas resized to ``side`` pixels."""
    rows = run.data.split.test
    x = resized(run.data.float_batch(run.data.x.take(rows)), (side, side))
    answer = run.answer.eval()
    return float((logits_of(answer, x, run.plan).argmax(1) == run.data.y[rows]).double().mean())


def boxes(count: int, side: int, repeats: int) -> dict[str, float]:
    """Seconds for the pyramids of ``count`` boxes of one image, both ways."""
    gen = generator("boxes")
    trunk = PlainCNN(10, 1, layers=(1, 1, 2), widths=WIDTHS, init="he").eval().forward_features
    extent = torch.randint(side // 7, side // 2 + 1, (count, 2), generator=gen)
    corner = (torch.rand(count, 2, generator=gen) * (side - extent + 1)).long()
    image: Tensor = torch.rand(1, side, side, generator=gen)
    shared, cropped = region_seconds(trunk, image, torch.cat([corner, corner + extent], 1).float(), 4, (4, 2, 1), repeats)
    return {"seconds, one map": shared, "seconds, crops": cropped, "times": cropped / shared}


def judge(numbers: Numbers) -> tuple[str, list]:
    def gain(a: str, b: str, side: int) -> Any:
        metric = f"accuracy at {side}"
        return paired(f"{metric} px, {a} - {b}", column(numbers, a, metric), column(numbers, b, metric))

    head, sizes = gain("pyramid", "flatten", SIDE), gain("pyramid, two sizes", "pyramid", OTHER)
    times = column(numbers, "boxes", "times")[0]
    first = said(head.mean >= 0 and head.low > -0.005, head.high < -0.005)
    second = said(sizes.mean >= 0.01 and sizes.low > 0, sizes.high < 0)
    comparisons = [
        head,
        sizes,
        {"what": "200 boxes, times as fast from one map as from crops", "value": times},
        gain("pyramid", "flatten, parameters of the pyramid", SIDE),
        gain("pyramid", "global max", SIDE),
        gain("pyramid", "global max", OTHER),
        gain("pyramid, two sizes", "pyramid", SIDE),
        gain("pyramid, two sizes", "pyramid", SEEN),
    ]
    return together([first, second, said(times >= 5, times < 5)]), comparisons
