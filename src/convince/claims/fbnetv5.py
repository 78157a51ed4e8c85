"""Claim of fbnetv5: one search for three tasks comes as far as three searches, with a third of the looks."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from convince import parts
from convince.backbones.lane_net import macs, whole
from convince.claims import Bench, Numbers, column, paired, said
from convince.data import Data, MemoryStore, Preprocess
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve
from convince.search.fbnetv5_search import MultiTaskSearch, estimate, log_odds, reward, score
from convince.search.lane_sampling import TASKS, cell_of, places, task_losses, topology
from convince.types import Split

TARGET = {"model": "lane-net-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "One search that shares every network it looks at between three tasks, by importance ratios, finds as good a network for each of them as a search for each "
    "task of its own does with three times as many looks."
)
SUPPORTED = (
    "on all seeds shared >= 0.98 x separate and shared is above the mean of all masks that keep the limit by more than their standard deviation; and, the "
    "control, without the ratio the search is worse in the mean for at least one task. Provided that on every seed the best mask explains at least 5 % of the "
    "nats of each task (else inconclusive: there is nothing to find)."
)
CONTRADICTED = "shared < 0.95 x separate on all seeds, under the same provision."
BUDGET = (
    "pictures of 32 px made here, one of 5 shapes on a textured ground, with class, centre on a 7x7 grid and mask; 3,000 training images, 256 validation "
    "images to look at (the catalogue: of 1,000). Lane-net of 3 lanes (8, 16, 24 channels) and 2 columns: 12 choices, 4,096 masks; trained by lane-sampling "
    "for 6 epochs (the catalogue: 4), batch 32, SGD 0.1 cosine, one super-network for each of 3 seeds. Limit: half of the whole network's multiply-adds, "
    "penalty 1. All masks are looked at once for every seed (the catalogue: for one), so that each search is repeated 10 times with other draws and its mean "
    "is taken: shared 300 masks; separate 300 for each task, and 100 for each beside it; without the ratio 300; the best of 300 random masks for each task. "
    "The number of a mask for a task: the nats that it explains, the loss of one who knows only how often each answer comes plus the reward, as a share of "
    "those of the best mask that keeps the limit; for each task the returned mask keeps it too. A search's number is the mean over the tasks."
)
LEAST = 0.05  # of the nats of a task that the best mask must explain


# -- pictures ------------------------------------------------------------------------------------------


def scenes(count: int, side: int, gen: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Grey pictures [n 1 h w] uint8, the shape's number [n], and its mask [n h w]: disc, square, triangle, cross or ring."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=gen)

    y = torch.randint(5, (count,), generator=gen)
    radius, angle = uniform(0.16, 0.26, 1, 1) * side, uniform(-0.3, 0.3, 1, 1)
    down, right = (radius + uniform(0, 1, 1, 1) * (side - 2 * radius) for _ in range(2))
    rows, columns = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    v, u = (rows - down) / radius, (columns - right) / radius
    u, v = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
    from_middle, a, b = (u * u + v * v).sqrt(), u.abs(), v.abs()
    cross = torch.minimum(torch.maximum(a / 0.3, b), torch.maximum(a, b / 0.3)) < 1
    shapes = [from_middle < 1, torch.maximum(a, b) < 0.8, (v < 0.5) & (a < 0.58 * (v + 1)), cross, (from_middle - 0.75).abs() < 0.25]
    mask = torch.stack(shapes, 1)[torch.arange(count), y]
    blotches = F.interpolate(uniform(0.1, 0.6, 1, side // 4, side // 4), size=(side, side), mode="bilinear")[:, 0]
    x = torch.where(mask, uniform(0.55, 0.9, 1, 1).expand_as(blotches), blotches) + uniform(-0.12, 0.12, side, side)
    return (x.clamp(0, 1) * 255).to(torch.uint8)[:, None], y, mask


def pictures(side: int, train: int, val: int, seed: int) -> Data:
    """Scenes as data with masks of their own."""
    x, y, mask = scenes(train + val, side, generator(seed, "fbnetv5 scenes"))
    pixels = x[:train].float() / 255
    plain = Preprocess("image", 1, (side, side), "letterbox", (float(pixels.mean()),), (float(pixels.std()),))
    rows = torch.arange(train + val)
    split = Split(rows[:train], rows[train:], rows[:0])
    return Data(MemoryStore(x), y, split, ("disc", "square", "triangle", "cross", "ring"), plain, extra={"mask": mask}, origin="scenes")


def knowing_nothing(y: Tensor, mask: Tensor, grid: int) -> list[float]:
    """The losses, in nats, of one who knows only how often each class, each cell and a pixel of the shape comes."""

    def entropy(counts: Tensor) -> float:
        share = counts.double() / counts.sum()
        return float(-(share * share.clamp_min(1e-12).log()).sum())

    inside = mask.sum()
    return [entropy(y.bincount()), entropy(cell_of(mask, grid).bincount()), entropy(torch.stack((inside, mask.numel() - inside)))]


# -- one seed ------------------------------------------------------------------------------------------


class Bed:
    """One seed's super-network, every mask looked at, and the searches in that table."""

    def __init__(self, bench: Bench, seed: int) -> None:
        small = bench.scale == "smoke"
        self.seed, self.repeats, self.samples = seed, *((2, 30) if small else (10, 300))
        self.side, self.train, self.val, self.epochs, self.batch, self.grid = (16, 64, 32, 2, 16, 4) if small else (32, 3000, 256, 6, 32, 7)
        self.widths, self.columns, self.expansion, self.limit = ((4, 6) if small else (8, 16, 24)), 2, 2, 0.5
        self.names = places(len(self.widths), self.columns)
        self.masks = [tuple(bits) for bits in itertools.product((0, 1), repeat=len(self.names))]
        self.at = {bits: i for i, bits in enumerate(self.masks)}

    def part(self, bits: Sequence[int]) -> Any:
        """The network of a mask."""
        return topology({name for name, on in zip(self.names, bits, strict=True) if on}, len(self.widths), self.columns)

    def supernet(self) -> Any:
        """Trained."""
        data = pictures(self.side, self.train, self.val, self.seed)
        full = whole(len(self.widths), self.columns)
        model = {"widths": list(self.widths), "blocks": list(full.blocks), "fusions": list(full.fusions), "expansion": self.expansion}
        how: dict[str, Any] = {"parts": (f"lane-sampling:grid={self.grid}",), "epochs": self.epochs, "batch": self.batch, "lr": 0.1, "augment": "none"}
        chosen = settings(model=parts.spell("lane-net", model), seed=self.seed, **how)
        run = prepare(resolve(chosen, data)[0], data)
        fit(run)
        return run

    @functools.cached_property
    def table(self) -> tuple[Tensor, list[bool], Tensor]:
        """Rewards [mask, task], whether a mask keeps the limit, and the nats [mask, task] that it explains."""
        run = self.supernet()
        found: dict[Any, list[float]] = {}
        every = [self.part(bits) for bits in self.masks]
        for part in every:
            if part not in found:
                found[part] = task_losses(run, part, run.data.split.val)
        counts = {part: macs(part, self.widths, self.expansion, (self.side, self.side), 5, 1) for part in found}
        target = self.limit * max(counts.values())
        rewards = torch.tensor([[reward(loss, counts[part], target, 1.0) for loss in found[part]] for part in every], dtype=torch.float64)
        rows = run.data.split.train
        nothing = torch.tensor(knowing_nothing(run.data.y[rows], run.data.extra["mask"][rows], self.grid), dtype=torch.float64)
        return rewards, [counts[part] <= target for part in every], nothing + rewards

    def shares(self, chosen: Sequence[int]) -> list[float]:
        """What a mask for each task explains, as a share of the best one's."""
        rewards, fits, nats = self.table
        best = nats[torch.tensor(fits)].amax(0).maximum(LEAST * (nats - rewards)[0])  # where nothing is found, the verdict is open anyway
        return [float(nats[i, task] / best[task]) for task, i in enumerate(chosen)]

    def search(self, tasks: Sequence[int], samples: int, clip: float, gen: Generator) -> list[int]:
        """The mask that a search for these tasks together returns for each of them."""
        rewards, fits, _ = self.table
        odds, seen = MultiTaskSearch(len(tasks), len(self.names), clip=clip), list[tuple[int, ...]]()
        for _ in range(samples):
            task, mask = odds.draw(gen)
            seen.append(tuple(mask.long().tolist()))
            odds.tell(task, mask, rewards[self.at[seen[-1]], list(tasks)].tolist())
        chosen = [odds.best(task, seen, lambda bits: fits[self.at[tuple(bits)]]) for task in range(len(tasks))]
        return [self.at[tuple(bits)] if bits is not None else 0 for bits in chosen]  # mask 0, all off, keeps every limit


def told(rows: list[list[float]], looks: float) -> dict[str, float]:
    """The shares of several searches in the mean."""
    each = {task: statistics.fmean(values) for task, values in zip(TASKS, zip(*rows, strict=True), strict=True)}
    return {"share": statistics.fmean(each.values()), **each, "looks": looks}


def shared(bed: Bed, clip: float = 10.0) -> dict[str, float]:
    """One search for all tasks."""
    gens = [generator(bed.seed, "fbnetv5 shared", i) for i in range(bed.repeats)]
    return told([bed.shares(bed.search(range(3), bed.samples, clip, gen)) for gen in gens], bed.samples)


def separate(bed: Bed, samples: int) -> dict[str, float]:
    """A search for each task."""
    gens = [generator(bed.seed, "fbnetv5 separate", samples, i) for i in range(bed.repeats)]
    return told([bed.shares([bed.search([task], samples, 10.0, gen)[0] for task in range(3)]) for gen in gens], 3 * samples)


def random(bed: Bed) -> dict[str, float]:
    """For each task the best of random masks that keep the limit; and all that keep it, in the mean over tasks."""
    rewards, fits, _ = bed.table
    able = torch.tensor(fits).nonzero()[:, 0]
    rows = []
    for i in range(bed.repeats):
        drawn = able[torch.randint(len(able), (bed.samples,), generator=generator(bed.seed, "fbnetv5 random", i))]
        rows.append(bed.shares([int(drawn[rewards[drawn, task].argmax()]) for task in range(3)]))
    every = [statistics.fmean(bed.shares([i] * 3)) for i in able.tolist()]
    return {**told(rows, bed.samples), "all: mean": statistics.fmean(every), "all: standard deviation": statistics.stdev(every), "all: masks": len(every)}


def supernet(bed: Bed) -> dict[str, float]:
    """What there is to find: the nats of each task that the best mask and the whole network explain, as a share of all."""
    rewards, fits, nats = bed.table
    nothing, best = (nats - rewards)[0], nats[torch.tensor(fits)].amax(0)
    found = {f"explained by the best, {task}": float(best[t] / nothing[t]) for t, task in enumerate(TASKS)}
    return found | {"networks": len({bed.part(bits) for bits in bed.masks})}


def estimator(draws: int = 20_000) -> dict[str, float]:
    """On 4 choices, 16 masks enumerated and rewards drawn: the estimate's mean less the true gradient, in standard errors; the clipped one's bias."""
    gen = generator("fbnetv5 estimator")
    logits, rewards = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((3, 4), (16, 3)))
    masks = torch.tensor(list(itertools.product((0, 1), repeat=4)), dtype=torch.float64)
    odds = torch.stack([log_odds(logits, mask).exp() for mask in masks])  # [mask, task]
    truth = sum(odds[i][:, None] * rewards[i][:, None] * score(logits, mask) for i, mask in enumerate(masks))
    worst, bias, size = 0.0, 0.0, float(torch.as_tensor(truth).abs().max())
    for source in range(3):
        drawn = torch.multinomial(odds[:, source], draws, replacement=True, generator=gen)
        for clip in (None, 10.0):
            each = torch.stack([estimate(logits, logits[source], mask, rewards[i], clip) for i, mask in enumerate(masks)])
            if clip is None:
                error = each[drawn].std(0) / math.sqrt(draws)
                worst = max(worst, float(((each[drawn].mean(0) - truth).abs() / error).max()))
            else:
                bias = max(bias, float(((odds[:, source, None, None] * each).sum(0) - truth).abs().max()))
    return {"standard errors": worst, "bias, clipped": bias, "largest gradient": size}


def measure(bench: Bench) -> None:
    bench.arm("estimator", 0, estimator)
    for seed in range(2 if bench.scale == "smoke" else 3):
        bed = Bed(bench, seed)
        bench.arm("super-network", seed, functools.partial(supernet, bed))
        bench.arm("shared", seed, functools.partial(shared, bed))
        bench.arm("shared, no ratio", seed, functools.partial(shared, bed, 1.0))
        bench.arm("separate", seed, functools.partial(separate, bed, bed.samples))
        bench.arm("separate, a third of the looks", seed, functools.partial(separate, bed, bed.samples // 3))
        bench.arm("random", seed, functools.partial(random, bed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    one, three, plain = (column(numbers, name, "share") for name in ("shared", "separate", "shared, no ratio"))
    mean, deviation = (column(numbers, "random", f"all: {word}") for word in ("mean", "standard deviation"))
    as_good = sum(a >= 0.98 * b for a, b in zip(one, three, strict=True))
    worse = sum(a < 0.95 * b for a, b in zip(one, three, strict=True))
    above = sum(a > m + d for a, m, d in zip(one, mean, deviation, strict=True))
    lost = {task: statistics.fmean(column(numbers, "shared", task)) - statistics.fmean(column(numbers, "shared, no ratio", task)) for task in TASKS}
    least = min(min(column(numbers, "super-network", f"explained by the best, {task}")) for task in TASKS)
    arms = ("shared", "shared, no ratio", "separate", "separate, a third of the looks", "random")
    facts: dict[str, float] = {f"share, {name}, {what}": statistics.fmean(column(numbers, name, what)) for name in arms for what in ("share", *TASKS)}
    facts |= {
        f"share, all masks within the limit, {word}": statistics.fmean(column(numbers, "random", f"all: {word}")) for word in ("mean", "standard deviation")
    }
    facts |= {f"without the ratio, {task} loses": value for task, value in lost.items()}
    facts |= {
        "least that a best mask explains": least,
        "shared is at least 0.98 x separate on": as_good,
        "shared is above all masks' mean + deviation on": above,
    }
    facts |= {"of seeds": len(one), **{f"estimator, {name}": value for name, value in numbers["estimator"]["0"].items()}}
    others = {"separate": three, "shared, no ratio": plain}
    others |= {name: column(numbers, name, "share") for name in ("separate, a third of the looks", "random")}
    comparisons: list[Any] = [*(paired(f"share of the best, shared - {name}", one, values) for name, values in others.items()), facts]
    fair, seeds = least >= LEAST, len(one)
    return said(fair and as_good == above == seeds and max(lost.values()) > 0, fair and worse == seeds), comparisons
