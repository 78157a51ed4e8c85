"""Claim of patternnet: groups of filters that fire together find the parts that tell classes, better than single filters and faster than patches."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said

SIDE, PART, CELL = 48, 8, 12  # pixels of an image, of a part, and of a cell that holds at most one
CLASSES, OWN, COMMON = 6, 2, 4
EACH, FILTERS, TOP = 4, 4, 20  # patterns a class, filters a pattern, strongest firings whose class is looked at
PATCH, STRIDE = 16, 4
UNITS = ("patterns", "single filters", "random groups", "patches")
SAYS = (
    "Small groups of filters of a trained network that fire together at one place are pure in their class and frequent in it, lie on the parts that tell the "
    "class more often than the best single filters, and are found about ten times faster than clusters of patches."
)
SUPPORTED = (
    "share of firings in the class whose place lies inside a part that only this class has: patterns at least 0.70 in the mean, and at least 10 points above "
    "single filters in every seed; purity of patterns at least 0.9 at a frequency of at least 0.3, in the mean; and mining at least 5 times faster than "
    "patches with k-means in the mean, at no lower purity."
)
CONTRADICTED = "the share inside parts is not above that of single filters in the mean."
BUDGET = (
    "drawn images of 48x48, 4,000 for training and 1,000 for tests: 6 classes with 2 parts of 8x8 of their own, each there in 70 % of the class's images (one "
    "at least), among 4 parts that every image has, one part at most in each of 16 cells, noise up to 0.3. conv 3x3 - batch norm - ReLU of 16-32-64-64, two "
    "max-pools (a map of 12x12), mean, linear; 6 epochs, Adam 0.002, one cycle, batches of 64; 3 seeds (parts, images, weights). 4 units a class: patterns "
    "of 4 filters; the 4 filters with most mutual information about the class; 4 random groups of 4 filters; the 4 purest of 96 k-means clusters of patches "
    "of 16 pixels at steps of 4, by the network's mean features. All fire above the value that separates their class best (Youden) on training images. "
    "Purity: the class's share of the 20 strongest firings. Seconds are the processor's own, of maps and mining, or of patches and clusters. Told beside it: "
    "a linear classifier on the scores of the patterns, and the network. As in the catalogue; the loss of the mining is the part's own. That a network of this "
    "kind learns these drawings was tried on seed 100."
)


# -- drawings ------------------------------------------------------------------------------------------


class Scenes(NamedTuple):
    """Pixels [n 1 48 48], classes, the upper left corners [n 2 2] (row, column) of each image's own parts, and which of these are there [n 2]."""

    x: Tensor
    y: Tensor
    corner: Tensor
    there: Tensor


def glyphs(count: int, gen: Generator) -> Tensor:
    """Parts [count 8 8]: 4x4 drawings of half black, half white cells of two pixels, any two of which differ in at least 6 cells."""
    found: list[Tensor] = []
    while len(found) < count:
        cells = (torch.rand(16, generator=gen).argsort() < 8).float()
        if all(int((cells != other).sum()) >= 6 for other in found):
            found.append(cells)
    return torch.stack(found).view(-1, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)


def draw(parts: Tensor, n: int, gen: Generator) -> Scenes:
    """Images of the classes in turn; ``parts`` are those of each class, then the common ones."""
    y = torch.arange(n) % CLASSES
    there = torch.rand(n, OWN, generator=gen) < 0.7
    there[torch.arange(n), torch.randint(OWN, (n,), generator=gen)] |= ~there.any(1)
    canvas = 0.3 * torch.rand(n, SIDE * SIDE, generator=gen)
    cells = torch.rand(n, (SIDE // CELL) ** 2, generator=gen).argsort(1)[:, : OWN + COMMON]
    corner = torch.stack([cells // (SIDE // CELL), cells % (SIDE // CELL)], 2) * CELL
    corner = corner + torch.randint(CELL - PART + 1, corner.shape, generator=gen)
    bright = 0.7 + 0.3 * torch.rand(n, OWN + COMMON, generator=gen)
    inner = torch.arange(PART)
    for slot in range(OWN + COMMON):
        which = OWN * y + slot if slot < OWN else torch.full((n,), OWN * CLASSES + slot - OWN)
        at = (corner[:, slot, 0, None, None] + inner[:, None]) * SIDE + corner[:, slot, 1, None, None] + inner
        drawn = canvas.scatter(1, at.flatten(1), (parts[which] * bright[:, slot, None, None]).flatten(1))
        canvas = torch.where(there[:, slot, None], drawn, canvas) if slot < OWN else drawn
    return Scenes(canvas.view(n, 1, SIDE, SIDE), y, corner[:, :OWN], there)


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(1, 16), (16, 32), (32, 64), (64, 64)]):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()] + ([nn.MaxPool2d(2)] if i < 2 else [])
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def train(scenes: Scenes, epochs: int, seed: int) -> nn.Sequential:
    from convince.fit import precision
    from convince.fit.randomness import generator, preserved, seed_global

    plan, gen = precision.choose("auto", "image"), generator(seed, "patternnet order")
    with preserved():
        seed_global(seed, "patternnet weights")
        net = network()
    plan.place(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(scenes.y) // 64))
    for _ in range(epochs):
        for rows in torch.randperm(len(scenes.y), generator=gen).split(64):
            with plan.autocast():
                scores = net(plan.pixels(scenes.x[rows]))
            optimizer.zero_grad()
            F.cross_entropy(scores.float(), scenes.y[rows].to(scores.device)).backward()
            optimizer.step()
            schedule.step()
    return net.cpu().eval()


# -- units ---------------------------------------------------------------------------------------------


class Units(NamedTuple):
    """24 units: each one's class, its scores and places (row, column) [pixels] on training and test images, and the seconds it took to find them."""

    classes: Tensor
    train: Tensor
    test: Tensor
    place: Tensor
    seconds: float


def youden(score: Tensor, own: Tensor) -> tuple[float, float]:
    """The value that separates the class best: largest share above it in the class less that outside; and the mutual information [nats] of being above."""
    order = score.argsort(descending=True)
    inside = own[order].double()
    hits, alarms = inside.cumsum(0), (1 - inside).cumsum(0)
    best = int((hits / hits[-1] - alarms / alarms[-1]).argmax())
    n = len(score)
    table = torch.stack([hits[best], alarms[best], hits[-1] - hits[best], alarms[-1] - alarms[best]]).view(2, 2) / n
    expected = table.sum(0, keepdim=True) * table.sum(1, keepdim=True)
    return float(score[order[best]]), float(torch.special.xlogy(table, table / expected.clamp_min(1e-300)).sum())


def of_filters(how: str, maps: Tensor, y: Tensor, tests: Tensor, gen: Generator, before: float) -> Units:
    """Units that are groups of filters: mined, the best single ones, or random ones; ``before``: seconds that the training maps took."""
    from convince.explain.patternnet import Patterns, centres, firing, mine_patterns, quantiles

    began, classes = time.process_time(), torch.arange(CLASSES).repeat_interleave(EACH)
    if how == "patterns":
        found = mine_patterns(maps, y, CLASSES, EACH, FILTERS, gen=gen)
    elif how == "random groups":
        channels = torch.rand(len(classes), maps.shape[1], generator=gen).argsort(1)[:, :FILTERS]
        found = Patterns(channels, torch.full(channels.shape, 1 / FILTERS), torch.full((len(classes),), 0.5), classes, quantiles(maps))
    else:
        q = quantiles(maps)
        best = torch.cat([firing(part, q).amax((2, 3)) for part in maps.split(256)])
        told = torch.tensor([[youden(best[:, f], y == c)[1] for f in range(best.shape[1])] for c in range(CLASSES)])
        channels = told.topk(EACH, 1).indices.view(-1, 1)
        found = Patterns(channels, torch.ones(channels.shape), torch.full((len(classes),), 0.5), classes, q)
    seconds = before + time.process_time() - began
    score, place = found.fire(tests)
    plane = (tests.shape[2], tests.shape[3])
    return Units(found.classes, found.fire(maps)[0], score, centres(place, plane, (SIDE, SIDE)), seconds)


@torch.no_grad()
def patch_features(net: nn.Sequential, x: Tensor) -> Tensor:
    """The network's mean features [n p 64] of each image's patches."""
    rows = []
    for part in x.split(20):
        patches = part.unfold(2, PATCH, STRIDE).unfold(3, PATCH, STRIDE)  # n 1 r c 16 16
        rows.append(net[0](patches.reshape(-1, 1, PATCH, PATCH)).mean((2, 3)).unflatten(0, (len(part), -1)))
    return torch.cat(rows)


def of_patches(net: nn.Sequential, scenes: Scenes, tests: Scenes, clusters: int, seed: int) -> Units:
    """Units that are clusters of patches: the purest of each class, firing by nearness."""
    from sklearn.cluster import KMeans

    began = time.process_time()
    features = patch_features(net, scenes.x)
    n, p, _ = features.shape
    found = KMeans(clusters, n_init=1, max_iter=50, random_state=seed).fit(features.flatten(0, 1).numpy())
    counts = torch.zeros(clusters, CLASSES).index_put_(
        (torch.from_numpy(found.labels_).long(), scenes.y.repeat_interleave(p)), torch.ones(n * p), accumulate=True
    )
    purest = (counts / counts.sum(1, keepdim=True).clamp_min(1) * (counts.sum(1, keepdim=True) >= min(n, 100))).topk(EACH, 0).indices.T.flatten()
    seconds = time.process_time() - began
    middle = torch.from_numpy(found.cluster_centers_[purest.numpy()]).float()
    scores = [torch.cat([-torch.cdist(part, middle.expand(len(part), -1, -1)) for part in f.split(100)]) for f in (features, patch_features(net, tests.x))]
    best = scores[1].max(1)
    across = (SIDE - PATCH) // STRIDE + 1
    place = torch.stack([best.indices // across, best.indices % across], 2) * STRIDE + PATCH / 2
    return Units(torch.arange(CLASSES).repeat_interleave(EACH), scores[0].amax(1), best.values, place, seconds)


def worth(units: Units, scenes: Scenes, tests: Scenes) -> dict[str, float]:
    """Purity, frequency and the share of firings inside a part of the class; means over units."""
    from convince.explain.patternnet import purity

    pure, often, inside = [], [], []
    for u, c in enumerate(units.classes.tolist()):
        own = tests.y == c
        fires = units.test[:, u] >= youden(units.train[:, u], scenes.y == c)[0]
        offset = units.place[:, u, None] - tests.corner  # n 2 2
        hit = (((offset >= 0) & (offset < PART)).all(2) & tests.there).any(1)
        pure.append(purity(units.test[:, u], own, TOP))
        often.append(float(fires[own].double().mean()))
        inside.append(float(hit[fires & own].double().mean()) if bool((fires & own).any()) else 0.0)
    return {"purity": statistics.fmean(pure), "frequency": statistics.fmean(often), "inside": statistics.fmean(inside), "seconds": units.seconds}


# -- the claim -----------------------------------------------------------------------------------------


def cell(material: Callable[[], dict[str, Any]], how: str, clusters: int, seed: int) -> dict[str, float]:
    from convince.explain.patternnet import linear_accuracy
    from convince.fit.randomness import generator

    m = material()
    scenes, tests, net = m["train"], m["test"], m["net"]
    if how == "patches":
        return worth(of_patches(net, scenes, tests, clusters, seed), scenes, tests)
    units = of_filters(how, m["maps"], scenes.y, m["test maps"], generator(seed, how), m["seconds"])
    found = worth(units, scenes, tests)
    if how == "patterns":
        with torch.no_grad():
            right = torch.cat([net(part).argmax(1) for part in tests.x.split(250)]) == tests.y
        found |= {"linear accuracy": linear_accuracy(units.train, scenes.y, units.test, tests.y), "network accuracy": float(right.double().mean())}
    return found


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    for seed in range(2 if smoke else 3):

        @functools.cache
        def material(seed: int = seed) -> dict[str, Any]:
            from convince.explain.patternnet import last_maps
            from convince.fit.randomness import generator

            gen = generator(seed, "patternnet images")
            parts = glyphs(OWN * CLASSES + COMMON, gen)
            scenes, tests = (draw(parts, n, gen) for n in ((120, 60) if smoke else (4000, 1000)))
            net = train(scenes, 1 if smoke else 6, seed)
            began = time.process_time()
            maps, _ = last_maps(net, scenes.x)
            seconds = time.process_time() - began
            return {"train": scenes, "test": tests, "net": net, "maps": maps, "test maps": last_maps(net, tests.x)[0], "seconds": seconds}

        for how in UNITS:
            bench.arm(how, seed, functools.partial(cell, material, how, 24 if smoke else 96, seed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    inside = {how: column(numbers, how, "inside") for how in UNITS}
    pure = {how: statistics.fmean(column(numbers, how, "purity")) for how in UNITS}
    often = statistics.fmean(column(numbers, "patterns", "frequency"))
    more = [a - b for a, b in zip(inside["patterns"], inside["single filters"], strict=True)]
    faster = statistics.fmean(b / a for a, b in zip(column(numbers, "patterns", "seconds"), column(numbers, "patches", "seconds"), strict=True))
    rules = {
        "0.70 inside parts": statistics.fmean(inside["patterns"]) >= 0.7,
        "10 points above single filters in every seed": min(more) >= 0.1,
        "purity 0.9 at frequency 0.3": pure["patterns"] >= 0.9 and often >= 0.3,
        "5 times faster than patches at no lower purity": faster >= 5 and pure["patterns"] >= pure["patches"],
    }
    comparisons = [
        *(paired(f"firings inside parts, patterns minus {how}", inside["patterns"], inside[how]) for how in UNITS[1:]),
        paired(
            "linear classifier on patterns minus the network", column(numbers, "patterns", "linear accuracy"), column(numbers, "patterns", "network accuracy")
        ),
        {"what": "means over seeds", "times faster": faster, "frequency": often, **{f"purity, {how}": value for how, value in pure.items()}},
        {"what": "rules", **rules},
    ]
    return said(all(rules.values()), statistics.fmean(more) <= 0), comparisons
