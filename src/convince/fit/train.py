"""The main job: settings and data in, a trained answer (and, with a folder, a run on disk) out."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convince import parts
from convince.backbones import builder, usual_optimizer
from convince.data import Data
from convince.errors import Mistake
from convince.fit import folder as disk
from convince.fit import kernels, precision, processes
from convince.fit.adapters import is_off, seat
from convince.fit.answer import Scores
from convince.fit.loop import Progress, fit
from convince.fit.randomness import preserved
from convince.fit.record import Record
from convince.fit.run import Run
from convince.fit.settings import Settings
from convince.fit.technique import Team

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Trained:
    """A finished training: the answer, its scores on the test part, and what it cost."""

    settings: Settings
    data: Data
    run: Run
    answer: nn.Module
    test: Scores | None
    seconds: dict[str, float]
    peak_bytes: int
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None

    @property
    def weights_sha256(self) -> str:
        return disk.weights_sha256(self.answer)

    def summary(self) -> dict[str, Any]:
        """The JSON object of ``convince train --json``."""
        train = self.seconds["train"]
        return {
            "run": None if self.folder is None else str(self.folder),
            "model": self.settings.model,
            "parts": list(self.settings.parts),
            "test": None if self.test is None else self.test.summary(),
            "seconds": self.seconds,
            "samples_per_second": self.run.images / train if train else 0.0,
            "images": self.run.images,
            "peak_bytes": self.peak_bytes,
            "precision": self.run.plan.precision,
            "epochs": self.settings.epochs,
            "notes": self.notes,
            "skipped": [{"file": s.file, "reason": s.reason} for s in self.data.skipped],
            "duplicates": len(self.data.duplicates),
            "weights_sha256": self.weights_sha256,
        }


def resolve(settings: Settings, data: Data) -> tuple[Settings, list[str]]:
    """Fill in what was left to the data, and say in a sentence each why."""
    notes: list[str] = []
    changes: dict[str, Any] = {}
    n = len(data.split.train)
    image = data.preprocess.kind == "image"
    side = min(data.preprocess.size, default=0)
    if settings.model is None:
        changes["model"] = default_model(data.preprocess.kind, side, n)
        shape = f"{'x'.join(map(str, data.preprocess.size))} pixels" if image else "a table"
        notes.append(f"model {changes['model']}: for {shape} and {n} training samples")
    if settings.batch is None:
        changes["batch"] = 128 if n >= 4000 else 64 if n >= 500 else max(min(32, n // 4), 2)
        notes.append(f"batch {changes['batch']}: for {n} training samples")
    if settings.epochs is None and settings.steps is None and settings.minutes is None:
        seen = 24_000 if side <= 48 else 48_000
        changes["epochs"] = min(max(round(seen / max(n, 1)), 12), 40 if image else 100)
        notes.append(f"epochs {changes['epochs']}: about {seen:,} samples, at least 12 and at most {40 if image else 100} passes")
    batch = changes.get("batch") or settings.batch or 1
    if settings.steps is not None:
        changes["epochs"] = math.ceil(settings.steps / max(n // batch, 1))
    if settings.augment == "auto":
        kind = "none" if not image else "flip-crop" if data.preprocess.channels == 3 and side > 16 else "crop"
        changes["augment"] = kind
        if image:
            notes.append(f"augment {kind}: {'colour images are mirrored and shifted' if kind == 'flip-crop' else 'grey images are shifted, not mirrored'}")
    augment = changes.get("augment", settings.augment)
    model = str(changes.get("model", settings.model))
    named = [spec.split(":")[0] for spec in settings.parts]
    if (usual := usual_optimizer(model, settings.parts, settings.lr)) is not None:
        changes["parts"] = (*settings.parts, usual)
        notes.append(f"optimizer {usual}: what {model} is usually trained with; --lr or another optimizer replaces it")
    if augment != "none" and image and "flip-crop" not in named:
        changes["parts"] = (*changes.get("parts", settings.parts), "flip-crop" if augment == "flip-crop" else "flip-crop:flip=0.0")
    settings = settings.updated(**changes)
    if settings.kernels is None:
        settings = settings.updated(kernels=ways(settings, data))
        notes += [f"{kind} convolutions: {train} in training, {infer} in inference, measured here" for kind, (train, infer) in (settings.kernels or {}).items()]
    return settings, notes


def ways(settings: Settings, data: Data) -> dict[str, tuple[str, str]]:
    """How the network's depthwise and grouped convolutions are computed fastest here; all kinds where a part may bring some."""
    plan = precision.choose(settings.precision, data.preprocess.kind)
    if plan.device != "cpu" or settings.model is None:
        return {}
    cards = [parts.get(parts.parse(spec)[0]).card for spec in settings.parts]
    if any(card.kind == "layer" or card.swaps for card in cards):
        return kernels.choose(plan.precision, plan.channels_last)
    build = builder(settings.model, num_classes=data.k, in_chans=data.preprocess.channels, size=data.preprocess.size)
    with preserved(), torch.device("meta"):
        found = kernels.kinds_in(build())
    return kernels.choose(plan.precision, plan.channels_last, found)


def default_model(kind: str, side: int, n: int) -> str:
    """A small network that suits the input: by its kind, its shorter side in pixels, and the number of samples."""
    if kind != "image":
        return "mlp"
    if side > 48:
        return "resnet18-slim"
    return "resnet8" if n < 300 else "resnet20"


def prepare(settings: Settings, data: Data, *, record: Record | None = None, drop_off: bool = True) -> Run:
    """A run that has not started: parts seated, network and plan chosen. Conflicts are refused here."""
    if settings.model is None or settings.batch is None:
        raise ValueError("settings must be resolved before a run is prepared")
    if not len(data.split.train):
        raise Mistake(f"{data.origin}: no training samples are left after splitting; give more data or a smaller --val and --test")
    seats = [seat(spec) for spec in settings.parts]
    gives = ["logits", "network", "images" if data.preprocess.kind == "image" else "table"]
    if bool((data.y >= 0).any()):
        gives.append("labels")
    gives += list(data.extra)
    team = Team([made for made in seats if not (drop_off and is_off(made))], gives=tuple(gives))
    plan = precision.choose(settings.precision, data.preprocess.kind, settings.kernels)
    build = builder(settings.model, num_classes=data.k, in_chans=data.preprocess.channels, size=data.preprocess.size)
    run = Run(settings, data, team, build, plan, processes.world(), record)
    run.child = lambda spec: prepare(settings.updated(**{"parts": (), **spec.settings}), data, drop_off=drop_off)
    return run


def train(settings: Settings, data: Data, *, folder: Path | None = None, progress: Progress | None = None, began: float | None = None) -> Trained:
    """Train, score on the test part, and with ``folder`` write the run; goes on from a checkpoint there.

    ``settings`` may leave choices open; what was chosen is in the result's ``notes``. Global random
    state and the inputs are left as found.
    """
    began = time.monotonic() if began is None else began
    settings, notes = resolve(settings, data)
    if settings.minutes is not None and settings.steps is None:
        from convince.fit.survey import pilot

        settings, note = pilot(settings, data)
        notes.append(note)
    world = processes.world()
    if folder is not None and world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_config(folder, settings)
    run = prepare(settings, data, record=Record(folder if world.rank == 0 else None))
    notes.append(f"precision {run.plan.precision}: {run.plan.reason}")
    checkpoint = None if folder is None else folder / CHECKPOINT
    start = time.monotonic()
    fit(run, checkpoint, progress)
    trained = time.monotonic()
    if settings.start is not None:
        notes.append(f"started with {run.started_with:.0%} of its numbers from {settings.start}")
    test = run.evaluate("test") if len(data.split.test) and not settings.pretrain_only else None
    answer = run.answer.eval()
    seconds = {"total": time.monotonic() - began, "train": trained - start, "evaluate": time.monotonic() - trained}
    result = Trained(settings, data, run, answer, test, seconds, peak_bytes(), notes, folder)
    if folder is not None and world.rank == 0:
        disk.write_model(folder, run)
    return result


def peak_bytes() -> int:
    """The largest memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
