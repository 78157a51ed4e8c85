"""What a comparison takes, and how much of it is not training: one change on digits with 8 pairs, and on 10,000 pictures of Fashion-MNIST with 6.

CONVINCE_DATA=... python benchmarks/compare_speed.py [--only digits] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from results import write

CASES = {
    "digits": ("digits", "--with", "cutmix", "--seeds", "8"),
    "fashion-mnist": ("fashion-mnist", "--with", "poly1", "--seeds", "6", "--epochs", "5", "--samples", "10000", "--model", "resnet20"),
}


def run(words: tuple[str, ...]) -> tuple[float, dict]:
    """Seconds of the whole process, and its evidence."""
    with tempfile.TemporaryDirectory() as place:
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "convince", "compare", *words, "--json"], cwd=place, capture_output=True, text=True, check=True)
        return time.monotonic() - began, json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    lines = ["| Command | whole process | a baseline run | beside the runs | workers x threads |", "|---|---|---|---|---|"]
    for name, words in CASES.items():
        if asked.only in (None, name):
            seconds, found = run(words)
            e, cost = found["environment"], found["changes"][0]["cost"]["baseline"]
            how = f"{max(e['workers'], 1)} x {e['threads']}"
            lines.append(f"| `convince compare {' '.join(words)}` | {seconds:.0f} s | {cost['seconds']:.1f} s | {found['overhead']:.1%} | {how} |")
            print(lines[-1], flush=True)
    lines += ["", "Beside the runs: the share of all processes' time, from start to verdict, in which no arm was trained or tested."]
    if asked.write:
        write("Comparisons", "compare_speed.py" + (f" --only {asked.only}" if asked.only else ""), lines)


if __name__ == "__main__":
    os.environ.pop("OMP_NUM_THREADS", None)
    main()
