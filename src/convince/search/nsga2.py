"""NSGA-II: a population that moves towards all good compromises of several objectives at once, over whole numbers; and the hypervolume of a front.

Objectives are minimised. After Deb, Pratap, Agarwal and Meyarivan (2002), https://doi.org/10.1109/4235.996017.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator

Points = Float[np.ndarray, "n m"]
Genomes = Int[np.ndarray, "n g"]


def dominates(points: Points) -> Bool[np.ndarray, "n n"]:
    """``[i, j]``: point i is nowhere worse than point j, and somewhere better."""
    a, b = points[:, None], points[None]
    return np.logical_and((a <= b).all(2), (a < b).any(2))


def fronts(points: Points) -> list[list[int]]:
    """Rows in fronts: the first are dominated by none, the next only by rows of the first, and so on (fast non-dominated sort)."""
    beats = dominates(points)
    above = beats.sum(0)  # how many dominate each row
    found, left = [], np.ones(len(points), dtype=bool)
    while left.any():
        now = np.flatnonzero(left & (above == 0))
        found.append([int(i) for i in now])
        left[now] = False
        above = above - beats[now].sum(0)
    return found


def crowding(points: Points) -> Float[np.ndarray, " n"]:
    """Crowding distance within one front: the sides of the box between a point's neighbours, each as a share of the range; ends are infinite."""
    distance = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0 and len(order) > 2:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance


def ranking(points: Points) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The front of each row (0 is best) and its crowding distance there."""
    rank, distance = np.zeros(len(points), dtype=int), np.zeros(len(points))
    for at, rows in enumerate(fronts(points)):
        rank[rows], distance[rows] = at, crowding(points[rows])
    return rank, distance


def best(points: Points, count: int) -> Int[np.ndarray, " k"]:
    """The ``count`` rows that survive: by front, then the least crowded."""
    rank, distance = ranking(points)
    return np.lexsort((-distance, rank))[:count]


def sbx(a: Float[np.ndarray, "n g"], b: Float[np.ndarray, "n g"], u: Float[np.ndarray, "n g"], eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Simulated binary crossover of real genes by ``u`` in [0, 1): ``((1 + beta) a + (1 - beta) b) / 2`` and the same with a, b exchanged."""
    beta = np.where(u <= 0.5, 2 * u, 1 / (2 * (1 - u))) ** (1 / (eta + 1))
    return ((1 + beta) * a + (1 - beta) * b) / 2, ((1 - beta) * a + (1 + beta) * b) / 2


def polynomial(u: Float[np.ndarray, "n g"], eta: float) -> Float[np.ndarray, "n g"]:
    """The step of polynomial mutation in [-1, 1], a share of a gene's range, by ``u`` in [0, 1): small steps are likely, the more so the larger ``eta``."""
    down = (2 * u) ** (1 / (eta + 1)) - 1
    up = 1 - np.maximum(2 * (1 - u), 0) ** (1 / (eta + 1))
    return np.where(u < 0.5, down, up)


def children(parents: Genomes, most: Int[np.ndarray, " g"], gen: Generator, *, crossover: float, crossover_eta: float, mutation_eta: float) -> Genomes:
    """One child a parent: neighbours are crossed with probability ``crossover``, a gene is mutated with probability 1 / genes; then rounded.

    Gene i lies in 0 to ``most[i]``; half a step is added at both ends, so that rounding does not favour the middle.
    """
    n, genes = parents.shape

    def uniform(*shape: int) -> np.ndarray:
        return torch.rand(shape, generator=gen, dtype=torch.float64).numpy()

    a, b = parents.astype(float), np.roll(parents, 1, axis=0).astype(float)
    crossed, other = sbx(a, b, uniform(n, genes), crossover_eta)
    crossed = np.where(uniform(n, genes) < 0.5, crossed, other)  # which child a gene comes from
    real = np.where(uniform(n, 1) < crossover, crossed, a)
    step = polynomial(uniform(n, genes), mutation_eta) * (most + 1)
    real = real + np.where(uniform(n, genes) < 1 / genes, step, 0)
    return np.clip(np.rint(real), 0, most).astype(int)


def nsga2(
    evaluate: Callable[[Genomes], Points],
    most: Sequence[int],
    first: Genomes,
    evaluations: int,
    gen: Generator,
    *,
    crossover: float = 0.9,
    crossover_eta: float = 15.0,
    mutation_eta: float = 3.0,
) -> Genomes:
    """The population after ``evaluations`` calls' worth of rows: ``first``, then as many children a generation, fewer in the last.

    ``evaluate`` gives the objectives [n m] of genomes [n g] with genes 0 to ``most[i]``. Parents are the winners of tournaments of two, by
    front and then by crowding; parents and children compete for their places, a genome that is there already does not.
    """
    limit, pool = np.asarray(most), np.asarray(first)
    points, spent, idle = evaluate(pool), len(pool), 0
    while spent < evaluations and idle < 20:
        rank, distance = ranking(points)
        pairs = torch.randint(len(pool), (len(first), 2), generator=gen).numpy()
        wins = np.lexsort((-distance, rank)).argsort()[pairs]  # the place in the order of survival
        parents = pool[pairs[np.arange(len(pairs)), wins.argmin(1)]]
        made = children(parents, limit, gen, crossover=crossover, crossover_eta=crossover_eta, mutation_eta=mutation_eta)
        known = {tuple(row) for row in pool}
        fresh = list(dict.fromkeys(row for row in map(tuple, made) if row not in known))[: evaluations - spent]
        idle = 0 if fresh else idle + 1  # a small space runs out of new genomes
        if not fresh:
            continue
        rows = np.array(fresh, dtype=int)
        spent += len(rows)
        pool, points = np.concatenate([pool, rows]), np.concatenate([points, evaluate(rows)])
        kept = best(points, len(first))
        pool, points = pool[kept], points[kept]
    return pool


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area that two minimised objectives dominate up to ``reference``; points beyond it count nothing."""
    area, edge = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < edge:
            area += (reference[0] - x) * (edge - y)
            edge = y
    return area
