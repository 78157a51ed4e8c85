"""The report of a training: gathers the facts of a finished run and writes its page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convince.errors import Mistake
from convince.fit.answer import Scores
from convince.fit.precision import peak_flops
from convince.fit.train import Trained
from convince.report import write_report
from convince.report.facts import Facts
from convince.report.overlay import overlay
from convince.report.probes import keep, kept
from convince.types import Findings

PICTURES = 8


def write_run_report(result: Trained) -> Path:
    """Write ``report.html`` into the run's folder and return its path."""
    assert result.folder is not None
    return write_report(result.folder / "report.html", facts_of(result))


def facts_of(result: Trained) -> Facts:
    """Everything the page shows, as :class:`convince.report.facts.Facts`."""
    run, s = result.run, result.settings
    assert result.folder is not None
    seen = json.loads((result.folder / "environment.json").read_text(encoding="utf-8"))
    facts: Facts = {
        "run": str(result.folder),
        "model": s.model or "",
        "parts": list(s.parts),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seed": s.seed,
        "data": _data(result),  # type: ignore[typeddict-item]
        "history": _history(run.record.rows),  # type: ignore[typeddict-item]
        "readings": [{"name": r["name"], "value": r["value"], "unit": r["unit"], "epoch": r["epoch"]} for r in run.record.rows if r["kind"] == "reading"],
        "cost": _cost(result),  # type: ignore[typeddict-item]
        "galleries": _galleries(result),
        "probes": _probes(result),
        "environment": {k: v for k, v in seen.items() if not isinstance(v, dict) and k != "command"} | seen["versions"],
        "command": seen["command"],
        "config": s.to_yaml(),
        "weights_sha256": result.weights_sha256,
        "absent": {},
    }
    if result.test is not None:
        facts["test"] = {**result.test.summary(), "confusion": result.test.confusion(), "interval_method": "Wilson"}  # type: ignore[typeddict-item]
        facts["calibration"] = {"bins": _bins(result.test), "ece": result.test.ece, "log_loss": result.test.log_loss}  # type: ignore[typeddict-item]
        if run.data.preprocess.kind == "image":
            _pictures(result, result.test, facts)
        else:
            facts["absent"]["pictures"] = "This run learnt from a table of numbers; there are no pictures."
    return facts


def _data(result: Trained) -> dict[str, Any]:
    data = result.data
    p = data.preprocess
    counts = {
        part: torch.bincount(data.y[rows][data.y[rows] >= 0], minlength=data.k).tolist() for part in ("train", "val", "test") if len(rows := data.split[part])
    }
    facts: dict[str, Any] = {
        "origin": data.origin,
        "classes": list(data.classes),
        "counts": counts,
        "skipped": [{"file": s.file, "reason": s.reason} for s in data.skipped],
        "duplicates": [{"files": list(pair), "parts": ["train", "val or test"]} for pair in data.duplicates],
    }
    if p.kind == "image":
        facts["fitting"] = {"mode": p.fit, "size": list(p.size), "channels": p.channels, "mean": list(p.mean), "std": list(p.std)}
        rows = _one_of_each(data.y, data.split.train)
        facts["examples"] = [
            {"image": image, "label": data.classes[y] if y >= 0 else "unlabelled"}
            for image, y in zip(_pixels(data.x.take(rows)), data.y[rows].tolist(), strict=True)
        ]
    return facts


def _one_of_each(y: Tensor, rows: Tensor) -> Tensor:
    """The first row of each class in turn, at most PICTURES; then the second ones where there are few classes."""
    ranks = torch.zeros(len(rows), dtype=torch.int64)
    for c in y[rows].unique():
        inside = (y[rows] == c).nonzero()[:, 0]
        ranks[inside] = torch.arange(len(inside))
    return rows[ranks.argsort(stable=True)[:PICTURES]]


def _history(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keep = {"loss": "train_loss", "train_accuracy": "train_accuracy", "val_loss": "val_loss", "val_accuracy": "val_accuracy", "lr": "lr", "stage": "stage"}
    epochs = [row for row in rows if row["kind"] == "epoch"]
    return [{"epoch": i + 1, **{new: row[old] for old, new in keep.items() if old in row}} for i, row in enumerate(epochs)]


def _cost(result: Trained) -> dict[str, Any]:
    run, p = result.run, result.data.preprocess
    macs = macs_of(result.answer, run.plan.pixels(torch.zeros(1, p.channels, *p.size, dtype=torch.uint8 if p.size else torch.float32)))
    speed = run.images / result.seconds["train"] if result.seconds["train"] else 0.0
    peak = peak_flops(run.plan.precision)
    return {
        "seconds": result.seconds,
        "samples_per_second": speed,
        "images": run.images,
        "peak_bytes": result.peak_bytes,
        "parameters": sum(q.numel() for q in result.answer.parameters()),
        "macs": macs,
        "precision": run.plan.precision,
        "layout": "channels_last" if run.plan.channels_last else "contiguous",
        "peak_flops": peak,
        "peak_share": 3 * 2 * macs * speed / peak,  # backward costs about twice the forward pass
    }


def macs_of(answer: torch.nn.Module, x: Tensor) -> int:
    """Multiply-adds of one pass, as torch's counter sees them (convolutions and matrix products)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        answer(x)
    return counter.get_total_flops() // 2


def _bins(test: Scores, count: int = 15) -> list[dict[str, float]]:
    return [{"low": i / count, "high": (i + 1) / count, "n": n, "confidence": c, "accuracy": a} for i, (n, c, a) in enumerate(test.bins(count))]


def _pictures(result: Trained, test: Scores, facts: Facts) -> None:
    """The most confident mistakes and, for each class in turn, the most certain hits, with Grad-CAM beside them."""
    confidence = test.probs.max(1).values
    wrong = (~test.correct).nonzero()[:, 0]
    mistakes = wrong[confidence[wrong].argsort(descending=True)][:PICTURES]
    right = test.correct.nonzero()[:, 0]
    right = right[confidence[right].argsort(descending=True)]
    firsts = {int(test.y[i]): int(i) for i in reversed(right.tolist())}
    hits = torch.tensor(sorted(firsts.values(), key=lambda i: -float(confidence[i]))[:PICTURES], dtype=torch.int64)
    chosen = torch.cat([mistakes, hits])
    if not len(chosen):
        return
    maps, reason = _maps(result, test.index[chosen], test.predicted[chosen])
    if maps is None:
        facts["absent"]["pictures"] = reason
    else:
        facts["explanation"] = "Grad-CAM"
    items = []
    for at, (i, image) in enumerate(zip(chosen.tolist(), _pixels(result.data.x.take(test.index[chosen])), strict=True)):
        item: dict[str, Any] = {
            "image": image,
            "file": result.data.name(int(test.index[i])),
            "given": result.data.classes[int(test.y[i])],
            "answer": result.data.classes[int(test.predicted[i])],
            "probability": float(confidence[i]),
            "given_probability": float(test.probs[i, test.y[i]]),
        }
        if maps is not None:
            item["overlay"] = overlay(image, maps[at])
        items.append(item)
    facts["mistakes"], facts["hits"] = items[: len(mistakes)], items[len(mistakes) :]  # type: ignore[typeddict-item]


def _maps(result: Trained, rows: Tensor, target: Tensor) -> tuple[np.ndarray | None, str]:
    from convince import parts

    try:
        x = result.run.plan.pixels(result.data.x.take(rows))
        explained = parts.make("grad-cam")(result.answer, x, target.to(x.device))
    except Mistake as error:
        return None, f"Grad-CAM cannot explain this run: {error}"
    assert explained.map is not None
    return explained.map[:, 0].detach().float().cpu().numpy(), ""


def _galleries(result: Trained) -> list[Any]:
    """Pictures that parts chose among the samples: their ``gallery(run)`` gives (row of the pool, number), first ones first."""
    found = []
    for seat in result.run.team.seats:
        if hasattr(seat.technique, "gallery") and result.data.preprocess.kind == "image":
            rows = seat.technique.gallery(result.run)[:PICTURES]
            if rows:
                images = _pixels(result.data.x.take(torch.tensor([row for row, _ in rows])))
                items = [
                    {"image": image, "label": f"{result.data.name(row)} ({result.data.classes[int(result.data.y[row])]})", "value": value}
                    for image, (row, value) in zip(images, rows, strict=True)
                ]
                found.append(
                    {"part": seat.name, "title": seat.card.title, "caption": (type(seat.technique).__doc__ or "").strip().splitlines()[0], "items": items}
                )
    return found


def _probes(result: Trained) -> list[Any]:
    """What probes that rode along found last, what techniques that measure drew, and what was kept in the folder by ``convince probe``."""
    assert result.folder is not None
    for seat in result.run.team.seats:
        part: Any = seat.technique
        found = Findings(part.readings(result.run), part.figures(result.run)) if hasattr(part, "figures") else getattr(part, "found", None)
        if isinstance(found, Findings):
            keep(result.folder, seat.name, seat.card.title, found)
    return kept(result.folder)


def _pixels(x: Tensor) -> list[np.ndarray]:
    """uint8 [n c h w] -> a list of [h w c]."""
    return [np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()) for image in x]
