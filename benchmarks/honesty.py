"""Is the comparison honest? Simulated and real comparisons of identical arms, planted effects, and their reverse.

python benchmarks/honesty.py [--simulations 10000] [--real 60] [--write]

The simulated ones hand normal differences to the judge that every comparison uses. The real ones train networks on
digits, in pairs that share the split and differ in nothing but the seed of weights and order.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections import Counter

import numpy as np
from results import write

from convince.comparison import statistics as stats
from convince.comparison.judge import Judge

ALPHA = 0.05


def play(rng: np.random.Generator, effects: list[float], pairs: int, *, early: bool, race: bool = False, margin: float = 0.0) -> list[str]:
    """One comparison of simulated changes: differences are normal, mean ``effects``, spread 1; changes share half of it."""
    shared = rng.standard_normal(pairs) * math.sqrt(0.5)  # the baseline's own luck stands in every difference
    d = {f"change {i}": effect + shared + rng.standard_normal(pairs) * math.sqrt(0.5) for i, effect in enumerate(effects)}
    judge = Judge(list(d), stats.looks(pairs, early or race).pairs, ALPHA, margin, race)
    counted = dict.fromkeys(d, 0)
    for look, n in enumerate(judge.looks):
        last = look == len(judge.looks) - 1
        for text in d:
            if text not in judge.out:
                counted[text] = n
        judge.look({text: d[text][: counted[text]] for text in d}, last=last)
        if len(judge.out) == len(d):
            break
    return [judge.verdict(text) for text in d]


def simulated(count: int) -> list[str]:
    rng = np.random.default_rng(2026)
    table = ["| Comparison | pairs | runs | better | worse | equivalent | not decided | any false win |", "|---|---|---|---|---|---|---|---|"]

    def row(name: str, effects: list[float], pairs: int, **how: bool) -> None:
        margin = stats.detectable(1.0, pairs, ALPHA / len(effects))
        tally: Counter[str] = Counter()
        wins = 0
        for _ in range(count):
            verdicts = play(rng, effects, pairs, margin=margin, **how)
            tally.update(verdicts)
            wins += any(v in ("better", "worse") for v, effect in zip(verdicts, effects, strict=True) if effect == 0)
        total = sum(tally.values())
        shares = " | ".join(f"{tally[v] / total:.1%}" for v in stats.VERDICTS)
        false = f"{wins / count:.2%}" if 0 in effects else ""
        table.append(f"| {name} | {pairs} | {count:,} | {shares} | {false} |")
        print(table[-1], flush=True)

    for pairs in (6, 8, 12):
        row("A/A, one change", [0.0], pairs, early=False)
    row("A/A, one change, stopping early", [0.0], 8, early=True)
    row("A/A, ten changes", [0.0] * 10, 8, early=False)
    row("A/A, ten changes, stopping early", [0.0] * 10, 8, early=True)
    row("A/A, ten changes, a race", [0.0] * 10, 8, early=True, race=True)
    effect = stats.detectable(1.0, 8)
    row("planted: what 8 pairs detect with 80 %", [effect], 8, early=False)
    row("the same, reversed", [-effect], 8, early=False)
    row("the same, stopping early", [effect], 8, early=True)
    row("planted in one of ten, nine without", [effect] + [0.0] * 9, 8, early=False)
    return table


def real(count: int, pairs: int = 6) -> list[str]:
    """Comparisons of identical arms on digits: split shared by the pair, weights and order by nobody."""
    from convince.data import load
    from convince.fit.settings import settings
    from convince.fit.train import train

    data = load("digits", seed=0)
    how = {"model": "small-cnn:widths=(8,16,32)", "epochs": 2, "batch": 32, "augment": "none", "precision": "fp32"}
    tally: Counter[str] = Counter()
    began = time.monotonic()
    for comparison in range(count):
        d = []
        for pair in range(pairs):
            split = data.resplit(1000 * comparison + pair)
            arms = [train(settings(**how, seed=2 * (1000 * comparison + pair) + arm), dataclasses.replace(split)).test for arm in (0, 1)]
            d.append(arms[1].accuracy - arms[0].accuracy)
        judge = Judge(["itself"], (pairs,), ALPHA, 0.005)
        judge.look({"itself": d}, last=True)
        tally[judge.verdict("itself")] += 1
        print(f"{comparison + 1}/{count}: {np.mean(d):+.4f}, {judge.verdict('itself')}, {time.monotonic() - began:.0f} s", flush=True)
    wins = tally["better"] + tally["worse"]
    return [
        f"{count} real A/A comparisons on digits ({pairs} pairs each, {count * pairs * 2:,} trainings of {how['model']}, {how['epochs']} epochs): "
        + ", ".join(f"{tally[v]} {v}" for v in stats.VERDICTS)
        + f"; {wins} called better or worse, at most 7 allowed."
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--real", type=int, default=60)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    lines = simulated(asked.simulations)
    lines += ["", "The margin is what the pairs detect with 80 % power. " + "Shares of verdicts count single changes, the last column whole comparisons.", ""]
    if asked.real:
        lines += real(asked.real)
    if asked.write:
        write("Honesty of comparisons", f"honesty.py --simulations {asked.simulations} --real {asked.real}", lines)


if __name__ == "__main__":
    main()
