"""Every network of the catalogue trained by `convince train DATA --model NAME`, beside the accuracy that its claim aims at.

python benchmarks/targets.py [--only PAPER ...] [--write]
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time

from results import write

from convince.claims import known

SHARE = 0.9  # of the target that has to be reached


def targets() -> dict[str, dict]:
    """Paper -> its claim's TARGET."""
    found = {paper: getattr(importlib.import_module("convince.claims." + paper.replace("-", "_")), "TARGET", None) for paper in known()}
    return {paper: target for paper, target in found.items() if target is not None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    lines = ["| paper | command | accuracy | target | share | s |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    missed = []
    for paper, target in targets().items():
        if asked.only and paper not in asked.only:
            continue
        words = ["train", target["data"], "--model", target["model"]]
        with tempfile.TemporaryDirectory() as place:
            began = time.monotonic()
            line = [sys.executable, "-m", "convince", *words, "--json", "--out", "run"]
            done = json.loads(subprocess.run(line, cwd=place, capture_output=True, text=True, check=True).stdout)
        accuracy = done["test"]["accuracy"]
        share = accuracy / target["accuracy"]
        if share < SHARE:
            missed.append(paper)
        lines.append(f"| {paper} | `convince {' '.join(words)}` | {accuracy:.4f} | {target['accuracy']:.2f} | {share:.2f} | {time.monotonic() - began:.0f} |")
        print(lines[-1], flush=True)
    lines += ["", f"Below {SHARE} of its target: {', '.join(missed) or 'none'}."]
    if asked.write:
        write("Networks and their targets", "targets.py", lines)


if __name__ == "__main__":
    main()
