"""Kill a training with SIGKILL at random moments, resume it, and compare its weights with an undisturbed run.

    python benchmarks/kill.py [--kills 50] [--seed 0] [--write]

Each trial starts a training of digits with CutMix, an EMA of weights and forgetting counts, kills it once or twice
at a random moment (reading, training or writing), resumes it, and compares weights_sha256. Prints one line a trial;
exit code 1 if any trial differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import write

TRAIN = ["train", "digits", "--model", "small-cnn:widths=(8,16)", "--epochs", "6", "--checkpoint-seconds", "0.2", "--seed", "3"]
TRAIN += ["--with", "cutmix", "--with", "ema", "--with", "example-forgetting", "--json"]


def convince(*words: str) -> list[str]:
    return [sys.executable, "-m", "convince", *words]


def finish(command: list[str]) -> tuple[str, float]:
    """Run to the end; the hash of the weights and the seconds."""
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout)["weights_sha256"], time.monotonic() - start


def trial(folder: Path, draw: random.Random, seconds: float) -> tuple[str, list[float]]:
    """Start, kill once or twice at random moments, resume to the end; the hash and the moments."""
    run, moments = folder / "run", []
    command = convince(*TRAIN, "--out", str(run))
    for _ in range(draw.choice((1, 1, 2))):
        moment = draw.uniform(0.25, 1.0) * seconds
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            moments.append(moment)
        if (run / "structure.json").exists() and not (run / "checkpoint.safetensors").exists():
            return json.loads((run / "structure.json").read_text())["weights_sha256"], moments  # killed after its end
        if (run / "config.yaml").exists():
            command = convince("train", "--resume", str(run), "--json")
        if process.returncode == 0:
            return json.loads((run / "structure.json").read_text())["weights_sha256"], moments
    return finish(command)[0], moments


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--kills", type=int, default=50)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--write", action="store_true", help="put the result into RESULTS.md")
    asked = ask.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as root:
        whole, seconds = finish(convince(*TRAIN, "--out", f"{root}/whole"))
        again, _ = finish(convince(*TRAIN, "--out", f"{root}/again"))
        print(f"undisturbed {whole[:16]} in {seconds:.1f} s; repeated {again[:16]}")
        wrong, kills, number = int(whole != again), 0, 0
        while kills < asked.kills:
            number += 1
            folder = Path(root) / str(number)
            folder.mkdir()
            found, moments = trial(folder, draw, seconds)
            kills += len(moments)
            wrong += found != whole
            print(
                f"trial {number}: killed at {', '.join(f'{m:.1f} s' for m in moments) or 'never'}: {'same bits' if found == whole else 'DIFFERENT'}", flush=True
            )
    sentence = f"{kills} kills with SIGKILL in {number} runs, each resumed to its end: {wrong} ended with other weights than the undisturbed run."
    print(sentence)
    if asked.write:
        write("Kill and resume", f"kill.py --kills {asked.kills} --seed {asked.seed} --write", [sentence, f"An undisturbed run takes {seconds:.1f} s."])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
