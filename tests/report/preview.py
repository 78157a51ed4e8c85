"""Preview: facts of a small real run on digits; ``python tests/report/preview.py OUT`` writes them as pages."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def digits_facts(epochs: int = 14, seed: int = 0) -> dict[str, Any]:
    """Train a small perceptron on digits and return the facts of that run."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    from convince.report.overlay import overlay
    from convince.report.reckon import reliability_bins

    start = time.perf_counter()
    pixels, y = load_digits(return_X_y=True)
    x = pixels / 16
    order = np.random.default_rng(seed).permutation(len(x))
    part = {"test": order[:360], "val": order[360:540], "train": order[540:]}
    net = MLPClassifier((32,), learning_rate_init=0.004, batch_size=64, random_state=seed)
    history = []
    for epoch in range(1, epochs + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net.partial_fit(x[part["train"]], y[part["train"]], classes=np.arange(10))
        row: dict[str, Any] = {"epoch": epoch, "lr": 0.004, "stage": "warm-up" if epoch < 3 else "main"}
        for name in ("train", "val"):
            p = net.predict_proba(x[part[name]])
            row[f"{name}_loss"] = float(-np.log(p[np.arange(len(p)), y[part[name]]] + 1e-12).mean())
            row[f"{name}_accuracy"] = float((p.argmax(1) == y[part[name]]).mean())
        history.append(row)
    train_seconds = time.perf_counter() - start
    rows, given = part["test"], y[part["test"]]
    p = net.predict_proba(x[rows])
    answer, sure = p.argmax(1), p.max(1)
    right = answer == given
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (given, answer), 1)
    images = (x * 255).round().astype(np.uint8).reshape(-1, 8, 8)

    def picture(i: int) -> dict[str, Any]:
        relevance = (x[rows[i]] * (net.coefs_[0] @ net.coefs_[1])[:, answer[i]]).reshape(8, 8).clip(0)
        return {
            "image": images[rows[i]],
            "overlay": overlay(images[rows[i]], relevance),
            "file": f"digits/{rows[i]:04d}.png",
            "given": str(given[i]),
            "answer": str(answer[i]),
            "probability": float(sure[i]),
            "given_probability": float(p[i, given[i]]),
        }

    wrong = [i for i in np.argsort(-sure) if not right[i]][:8]
    typical = [int(np.flatnonzero(right & (given == c))[sure[right & (given == c)].argmax()]) for c in range(10)]
    calibration = reliability_bins(sure, right)
    log_loss = float(-np.log(p[np.arange(len(p)), given]).mean())
    n_parameters = sum(w.size for w in [*net.coefs_, *net.intercepts_])
    return {
        "run": "digits-mlp-seed0",
        "model": "mlp32",
        "parts": ["cutmix", "poly1:epsilon=1", "forgetting"],
        "date": "2026-11-20T18:59:00",
        "seed": seed,
        "data": {
            "origin": "digits (1,797 scanned digits, scikit-learn)",
            "classes": [str(i) for i in range(10)],
            "counts": {name: np.bincount(y[part[name]], minlength=10).tolist() for name in ("train", "val", "test")},
            "fitting": {"mode": "as is", "size": 8, "channels": 1, "mean": [0.305], "std": [0.376]},
            "skipped": [
                {"file": "scans/0031.tiff", "reason": "truncated: 212 of 640 bytes"},
                {"file": "scans/notes.txt", "reason": "not an image"},
                {"file": "scans/Thumbs.db", "reason": "not an image"},
            ],
            "duplicates": [{"files": ["digits/0412.png", "digits/1203.png"], "parts": ["train", "test"]}],
            "duplicates_note": "They were taken out of the test.",
            "examples": [{"image": images[np.flatnonzero(y == c)[0]], "label": str(c)} for c in range(10)],
        },
        "history": history,
        "readings": [
            *({"part": "cutmix", "name": "mixed area", "value": 0.3 + 0.01 * (e % 4), "unit": "share", "epoch": e}
              for e in range(epochs)),
            {"part": "forgetting", "name": "examples never learnt", "value": 11, "unit": "images"},
            {"part": "poly1", "name": "extra loss", "value": 0.041273, "unit": "nats"},
        ],
        "test": {
            "n": 360,
            "accuracy": float(right.mean()),
            "log_loss": log_loss,
            "ece": calibration["ece"],
            "confusion": confusion,
        },
        "calibration": {**calibration, "log_loss": log_loss},
        "mistakes": [picture(i) for i in wrong],
        "hits": [picture(i) for i in typical],
        "explanation": "weight times pixel",
        "cost": {
            "seconds": {"total": train_seconds + 1.1, "train": train_seconds, "evaluate": 0.021},
            "samples_per_second": 1257 * epochs / train_seconds,
            "images": 1257 * epochs,
            "peak_bytes": 412_300_000,
            "peak_share": 0.114,
            "peak_flops": 2.2e12,
            "parameters": n_parameters,
            "macs": sum(w.size for w in net.coefs_),
            "precision": "fp32",
            "layout": "contiguous",
        },
        "galleries": [
            {
                "part": "forgetting",
                "title": "Most forgotten examples",
                "caption": "Training images that went from right to wrong most often.",
                "items": [
                    {"image": images[i], "label": f"given {y[i]}", "value": v, "unit": "times"}
                    for i, v in zip(part["train"][:8], (9, 8, 8, 7, 6, 6, 5, 5), strict=True)
                ],
            }
        ],
        "probes": [
            {
                "part": "filter-report",
                "title": "On filter design in deep convolutional neural network",
                "readings": [{"name": "conv1: mean length", "value": 0.91, "unit": ""}, {"name": "conv1: dead", "value": 0.0, "unit": "share of filters"}],
                "figures": [
                    {"kind": "curves", "title": "Filters by depth", "x": "convolution", "y": "share", "series": {"dead": [[1, 0.0], [2, 0.1]]}},
                    {"kind": "bars", "title": "Shares", "unit": "", "values": {"dead": 0.1, "twins": 0.3}},
                    {"kind": "plane", "title": "A map", "rows": "rows", "columns": "columns", "values": [[0.0, 1.0], [2.0, 3.0]]},
                ],
            }
        ],
        "tables": [
            {
                "part": "forgetting",
                "title": "Forgetting by class",
                "rows": [{"class": str(c), "events": 40 - 3 * c, "per image": 0.31 / (c + 1)} for c in range(5)],
            }
        ],
        "environment": {
            "convince": "0.1.0", "torch": "2.9.1", "python": sys.version.split()[0],
            "processor": "x86-64 with AVX-512 and AMX", "threads": 2,
        },
        "command": "convince train digits --model mlp32 --with cutmix --with poly1:epsilon=1 --epochs 14 --seed 0",
        "config": {"model": "mlp32", "parts": ["cutmix", "poly1:epsilon=1"], "epochs": epochs, "batch": 64, "seed": 0},
        "weights_sha256": "9f2c4b0d1e6a7f8855c3d2a1b0e9f8d7c6b5a49382716f5e4d3c2b1a09f8e7d6",
    }  # fmt: skip


def hard_facts(k: int = 100, skipped: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Facts that try the page: many classes, hostile and right-to-left names, NaN losses, large photographs."""
    gen = np.random.default_rng(seed)
    names = [f"class {i:03d}" for i in range(k)]
    hostile = ["<script>alert(1)</script>", "שלום עולם", "Ünïcödé 犬", "a\u202egpj.exe", 'quote" onload="x', "x" * 90]
    names[: min(len(hostile), k)] = hostile[:k]
    confusion = np.diag(gen.integers(20, 60, k))
    for _ in range(8 * k):
        confusion[gen.integers(k), gen.integers(k)] += gen.integers(1, 5)
    confusion[:, k - 1] *= k == 1  # a class that is never answered
    photo = (np.indices((480, 640)).sum(0) % 256).astype(np.uint8)
    tall = np.stack([photo.T, photo.T // 2, 255 - photo.T], -1)
    reasons = ["truncated", "not an image", "<img src=x onerror=alert(2)>", "1 bit a pixel"]
    bad = float("nan")
    return {
        "run": "hard </title><script>alert(3)</script>",
        "model": "resnet20",
        "parts": [],
        "data": {
            "origin": "/data/фото/<b>x</b>",
            "classes": names,
            "counts": {name: gen.integers(5, 500, k).tolist() for name in ("train", "val", "test")},
            "fitting": {"mode": "letterbox", "size": [224, 320], "channels": 3, "mean": [0.485, 0.456, 0.406],
                        "std": [0.229, 0.224, 0.225]},
            "skipped": [{"file": f"dir/файл {i}\udcff.jpg", "reason": reasons[i % 4]} for i in range(skipped)],
            "duplicates": 0,
        },
        "history": [
            {"epoch": e, "train_loss": 90 * 0.8**e if e < 15 else bad, "val_loss": 100 * 0.84**e if e != 9 else bad,
             "train_accuracy": 1 - 0.9 * 0.9**e, "val_accuracy": 1 - 0.95 * 0.92**e,
             "lr": 0.1 * (0.5 + 0.5 * np.cos(e / 30 * np.pi)), "stage": "rotation pretraining" if e < 8 else "labels"}
            for e in range(1, 31)
        ],
        "test": {"confusion": confusion, "log_loss": bad},
        "mistakes": [{"image": tall, "overlay": tall, "file": "dir/" + "long-name-" * 12 + "<i>.jpg", "given": names[0],
                      "answer": names[1 % k], "probability": 0.999},
                     {"image": photo, "file": "b.jpg", "given": names[-1], "answer": names[2 % k]}],
        "cost": {"seconds": {"total": 5025.4, "train": 4411, "evaluate": 12}, "parameters": 272474, "macs": 40551000,
                 "samples_per_second": 3412.7},
        "absent": {"calibration": "This answer gives scores, not probabilities."},
    }  # fmt: skip


if __name__ == "__main__":
    from convince.report import write_report

    out = Path(sys.argv[1])
    print(write_report(out / "report.html", digits_facts()))
    print(write_report(out / "report-hard.html", hard_facts()))
    two = hard_facts(2, 0)
    print(write_report(out / "report-two.html", two))
    print(write_report(out / "report-bare.html", {"run": "bare"}))
