"""Kill -9 and resume; two processes against one; workers: the same bits, or as near as floats allow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def convince(*words, **more):
    done = subprocess.run([sys.executable, "-m", "convince", *words], capture_output=True, text=True, env=ENV, timeout=240, **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TRAIN = ["train", "digits", "--model", "small-cnn:widths=(4,8)", "--epochs", "2", "--checkpoint-seconds", "0", "--seed", "1", "--json"]


def test_killed_and_resumed_gives_the_same_bits(tmp_path):
    whole = convince(*TRAIN, "--out", str(tmp_path / "whole"))["weights_sha256"]
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "convince", *TRAIN, "--out", str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    until = time.monotonic() + 60
    while not (run / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "structure.json").exists(), "the run had ended before it was killed"
    assert convince("train", "--resume", str(run), "--json")["weights_sha256"] == whole
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows == expected, "metrics of the resumed run differ"


def torchrun(out: Path, processes: int, *words: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m", "convince"]
    command += ["train", "digits", "--out", str(out), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_two_processes_agree_with_one(tmp_path, precision):
    """Fifty steps with CutMix on the same global batch; a network without batch statistics."""
    words = ["--model", "handwriting-cnn:channels=(8,16),hidden=16,dropout=0.0", "--steps", "50", "--batch", "33", "--with", "cutmix"]
    words += ["--precision", precision, "--lr", "0.05"]
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = convince("train", "digits", "--out", str(one), "--json", *words), torchrun(two, 2, *words)
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    largest = max(float(t.abs().max()) for t in a.values())
    worst = max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
    limit = 1e-5 * largest if precision == "fp32" else 1e-9 * largest
    assert worst <= limit, f"{worst} after 50 steps; the largest weight is {largest}"
    assert first["test"]["n"] == second["test"]["n"] == 359, "a test sample was lost or counted twice (359 is odd)"
    assert first["images"] == second["images"]


def test_workers_do_not_change_the_bits(tmp_path):
    from PIL import Image

    gen = torch.Generator().manual_seed(0)
    for name in ("left", "right"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = torch.randint(0, 255, (20, 24, 3), generator=gen, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")
    code = """
import json, sys
from convince.data import load
from convince.fit.settings import settings
from convince.fit.train import train
data = load(sys.argv[1], size=16, workers=int(sys.argv[2]), memory_bytes=0, disk_bytes=0)
result = train(settings(model="small-cnn:widths=(4,8)", epochs=2, batch=4), data)
print(json.dumps([type(data.x).__name__, result.weights_sha256]))
"""
    found = []
    for workers in (0, 1, 2):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "photos"), str(workers)], capture_output=True, text=True, env=ENV, timeout=120)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert {kind for kind, _ in found} == {"StreamStore"}
    assert len({bits for _, bits in found}) == 1
