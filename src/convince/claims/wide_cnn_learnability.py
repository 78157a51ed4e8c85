"""Claim of wide-cnn-learnability: a deep local kernel learns a target at the rate of the patches that it depends on, a fully connected one does not."""

from __future__ import annotations

import itertools
import math
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convince.claims import Bench, Numbers, column, paired, said
from convince.diagnose.wide_cnn_learnability import (
    fit_exponent,
    fully_connected_ntk,
    gaussian_target,
    kernel_spectrum,
    learning_curve,
    patch_spheres,
    tree_kernels,
)
from convince.fit.randomness import generator

PATCHES, SIZES = 8, (2, 2, 2, 2)
SCALES = (2, 4, 8, 16)  # numbers in the largest patch of the teacher: 2 is one circle
APART = (0, 4, 2, 6, 1, 5, 3, 7)  # an order of the circles in which no two neighbours stay in one pair or four
SAYS = (
    "Deep convolutional kernels adapt to the spatial scale of the target: the error falls as n^(-1/d_eff) with the effective dimension d_eff of the largest "
    "patch that the target depends on. Targets of all inputs have the slow rate of the whole dimension, and a fully connected kernel has no such advantage."
)
SUPPORTED = (
    "the deep kernel's mean exponent beta falls at each step of s = 2, 4, 8, 16 by more than the two standard errors together and lies within 0.12 of 1/d_eff "
    "= 2/s for s = 4, 8 and 16; the mean ratio of errors deep / fully connected at the largest n rises at each step of s, from at most 0.5 at s = 2 to at "
    "least 0.7 at s = 16; and at s = 4 the error of the deep kernel with its circles out of order lies above the ordered one's (95 % paired t interval)."
)
CONTRADICTED = "the mean beta does not fall from s = 2 to s = 16, or the ratio of errors at s = 16 is less than 0.1 above that at s = 2."
BUDGET = (
    "8 points on circles (d = 16); n = 64, 128 ... 2,048 training and 800 test points, float64, no noise, ridge 0.000000001; teachers: Gaussian processes with "
    "the tangent kernel of filters 2, 2-2, 2-2-2 and 2-2-2-2; students: deep 2-2-2-2, fully connected with 4 hidden layers, and deep with the circles in a "
    "fixed order that parts all neighbours. 8 draws of points and targets; all teachers and students of a draw share its points, and the students its "
    "targets. Errors over the target's mean square, beta by least squares of the logs over all n. Told, not judged: the rate at s = 2, where 1/d_eff = 1 is "
    "not reached at such n; the disordered kernel at other s; the decay of the deep Gram matrix's eigenvalues. As in the catalogue, with its optional 2,048."
)


def measure(bench: Bench) -> None:
    counts, test, draws = ([16, 32, 64], 40, 2) if bench.scale == "smoke" else ([64 * 2**i for i in range(6)], 800, 8)
    for seed in range(draws):
        bench.arm("draw", seed, partial(draw, counts, test, seed))


def draw(counts: list[int], test: int, seed: int) -> dict[str, float]:
    """Errors of all students on all teachers' targets at one draw of points, their exponents, and the decay of the deep kernel's eigenvalues."""
    x = patch_spheres(counts[-1] + test, PATCHES, 2, generator(seed, "wide-cnn-learnability", "points"))
    teachers = tree_kernels(x, x, SIZES)
    y = torch.cat([gaussian_target(k, generator(seed, "wide-cnn-learnability", "target", s)) for s, k in zip(SCALES, teachers, strict=True)], 1)
    mixed = x.unflatten(1, (PATCHES, 2))[:, APART].flatten(1)
    students = {"deep": teachers[-1], "dense": fully_connected_ntk(x, x, len(SIZES)), "mixed": tree_kernels(mixed, mixed, SIZES)[-1]}
    numbers: dict[str, float] = {}
    for name, kernel in students.items():
        for i, s in enumerate(SCALES):
            curve = learning_curve(kernel, y[:, i : i + 1], counts, test, 1e-9)
            numbers |= {f"{name}, s={s}: error at {n}": error for n, error in curve}
            numbers[f"{name}, s={s}: beta"] = fit_exponent(curve)
    return {**numbers, "decay of eigenvalues": decay(kernel_spectrum(students["deep"][: counts[-1], : counts[-1]]))}


def decay(eigenvalues: Tensor) -> float:
    """The exponent by which eigenvalues fall with their rank, from rank 10 to a tenth of all, which a finite sample still gets right."""
    ranks = range(10, max(len(eigenvalues) // 10, 12))
    return fit_exponent([(rank, float(eigenvalues[rank - 1])) for rank in ranks])


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    most = max(int(name.rsplit(" ", 1)[1]) for name in next(iter(numbers["draw"].values())) if ": error at " in name)

    def values(metric: str) -> list[float]:
        return column(numbers, "draw", metric)

    def errors(student: str, s: int) -> list[float]:
        return values(f"{student}, s={s}: error at {most}")

    beta = {s: statistics.fmean(values(f"deep, s={s}: beta")) for s in SCALES}
    spread = {s: statistics.stdev(values(f"deep, s={s}: beta")) / math.sqrt(len(values(f"deep, s={s}: beta"))) for s in SCALES}
    ratio = {s: statistics.fmean(a / b for a, b in zip(errors("deep", s), errors("dense", s), strict=True)) for s in SCALES}
    steps = list(itertools.pairwise(SCALES))
    falls = all(beta[a] - beta[b] > spread[a] + spread[b] for a, b in steps)
    rates = all(abs(beta[s] - 2 / s) <= 0.12 for s in SCALES[1:])
    rises = all(ratio[a] < ratio[b] for a, b in steps) and ratio[2] <= 0.5 and ratio[16] >= 0.7
    order = {s: paired(f"error at n = {most}, s={s}: circles out of order - in order", errors("mixed", s), errors("deep", s)) for s in SCALES}
    supported = falls and rates and rises and order[4].low > 0
    contradicted = beta[16] >= beta[2] or ratio[16] - ratio[2] < 0.1
    facts = [
        {"what": f"s = {s}", "beta, deep": beta[s], "standard error": spread[s], "1/d_eff": 2 / s, "beta, fully connected":
         statistics.fmean(values(f"dense, s={s}: beta")), f"error at {most}, deep": statistics.fmean(errors("deep", s)),
         f"error at {most}, fully connected": statistics.fmean(errors("dense", s)), "deep / fully connected": ratio[s]}
        for s in SCALES
    ]  # fmt: skip
    told = {"what": "eigenvalues of the deep kernel fall as rank to the power of minus", "value": statistics.fmean(values("decay of eigenvalues"))}
    return said(supported, contradicted), [order[4], *(order[s] for s in SCALES if s != 4), *facts, told]
