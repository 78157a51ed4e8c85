"""Two processes against one: the same global batch, 50 steps, CutMix on; how far the weights drift apart.

    python benchmarks/processes.py [--write]

A network without batch statistics in fp32 and fp64, where only the order of additions differs, and one with
BatchNorm, whose statistics are those of each process's half of the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from results import write
from safetensors.torch import load_file

CASES = [
    ("handwriting-cnn:channels=(16,32),hidden=32,dropout=0.0", "no batch statistics", "fp32"),
    ("handwriting-cnn:channels=(16,32),hidden=32,dropout=0.0", "no batch statistics", "fp64"),
    ("resnet8", "BatchNorm", "fp32"),
]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(out: Path, processes: int, model: str, precision: str) -> dict:
    start = [sys.executable, "-m"] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    words = ["convince", "train", "digits", "--model", model, "--steps", "50", "--batch", "64", "--with", "cutmix", "--lr", "0.05"]
    done = subprocess.run([*start, *words, "--precision", precision, "--out", str(out), "--json"], capture_output=True, text=True, env=ENV)
    if done.returncode:
        raise SystemExit(f"{processes} processes failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--write", action="store_true")
    asked = ask.parse_args()
    lines = ["| network | format | largest difference of a weight / largest weight | test samples counted, one and two |", "| --- | --- | ---: | --- |"]
    with tempfile.TemporaryDirectory() as root:
        for i, (model, what, precision) in enumerate(CASES):
            one, two = (run(Path(root) / f"{i}-{n}", n, model, precision) for n in (1, 2))
            a, b = (load_file(Path(root) / f"{i}-{n}" / "model.safetensors") for n in (1, 2))
            names = [name for name in a if a[name].is_floating_point()]
            worst = max(float((a[name].double() - b[name].double()).abs().max()) for name in names)
            largest = max(float(a[name].abs().max()) for name in names)
            lines.append(f"| {what} (`{model}`) | {precision} | {worst / largest:.1e} | {one['test']['n']}, {two['test']['n']} |")
            print(lines[-1], flush=True)
    if asked.write:
        write("Two processes against one", "processes.py --write", ["50 steps of 64 digits, CutMix, learning rate 0.05, gloo.", "", *lines])


if __name__ == "__main__":
    main()
