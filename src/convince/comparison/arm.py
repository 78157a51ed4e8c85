"""What a comparison does with data and networks: open the data, survey an arm, train an arm. Plain JSON in and out.

It runs in the process that asks, in worker processes, or on other machines, with the same result: an arm's bits
depend on its job and on the number of threads, which the job says.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convince import parts
from convince.comparison import metrics
from convince.data import Data, load
from convince.data.split import in_shares
from convince.errors import Mistake
from convince.fit import kernels, precision
from convince.fit.answer import Answer, score
from convince.fit.folder import environment
from convince.fit.loop import start
from convince.fit.randomness import generator, preserved
from convince.fit.run import Run
from convince.fit.settings import Settings, settings
from convince.fit.survey import survey
from convince.fit.train import peak_bytes, prepare, resolve, train

Job = dict[str, Any]


class Desk:
    """Where jobs are done: the data as loaded, or as handed over in memory, once for all jobs."""

    def __init__(self, data: Data | None = None) -> None:
        self.given = data
        self._load = functools.lru_cache(maxsize=2)(read)

    def data(self, asked: Settings, samples: int | None) -> Data:
        """The split of the job's seed; at most ``samples`` training rows, drawn by classes with that seed."""
        if self.given is not None:
            data = self.given.resplit(asked.seed)
        else:
            data = self._load(asked.data, asked.size, asked.fit, asked.val, asked.test, asked.strict, asked.group, asked.workers).resplit(asked.seed)
        return data if samples is None or samples >= len(data.split.train) else data.subset(fewer(data, samples, asked.seed))

    def do(self, job: Job) -> dict[str, Any]:
        """Do one job; a Mistake comes back as ``{"mistake": ...}``, as does running out of memory."""
        torch.set_num_threads(job["threads"])
        work: Callable[..., dict[str, Any]] = {"open": self.open, "survey": self.survey, "train": self.train}[job["do"]]
        try:
            return work(settings(**job["settings"]), job.get("samples"), job)
        except Mistake as error:
            return {"mistake": str(error)}
        except MemoryError:
            return {"mistake": "not enough memory for this; use a smaller --batch, --size or --model"}

    def open(self, asked: Settings, samples: int | None, job: Job) -> dict[str, Any]:
        """What the data are, and the settings of the baseline with every open choice made."""
        data = self.data(asked, samples)
        chosen, notes = resolve(asked, data)
        if job.get("every_kernel") and asked.kernels is None and not torch.cuda.is_available():  # other networks have other convolutions
            plan = precision.choose(chosen.precision, data.preprocess.kind)
            chosen = chosen.updated(kernels=kernels.choose(plan.precision, plan.channels_last))
        return {
            "settings": chosen.model_dump(mode="json"),
            "notes": notes,
            "origin": data.origin,
            "digest": data.digest,
            "classes": list(data.classes),
            "size": list(data.preprocess.size),
            "kind": data.preprocess.kind,
            "rows": {part: len(data.split[part]) for part in ("train", "val", "test")},
            "labelled": int((data.y[data.split.train] >= 0).sum()),
            "test_is_fixed": data.given_split,
            "skipped": len(data.skipped),
            "environment": environment(),
        }

    def survey(self, asked: Settings, samples: int | None, job: Job) -> dict[str, Any]:
        """What a training will take, and hashes of its initial weights by name."""
        data = self.data(asked, samples)
        seen = survey(asked, data, job["steps"])
        out: dict[str, Any] = {
            "before": {"images": seen.images_of(seen.before), "seconds": seen.amount_of(seen.before), "stages": [c.name for c in seen.before]},
            "main": {"images": seen.images_of(seen.main), "seconds": seen.amount_of(seen.main)},
            "closing": seen.closing,
            "steps": asked.steps,
        }
        if job.get("operations"):
            counted = survey(asked, data, 3, operations=True)
            out["before"]["operations"], out["main"]["operations"] = counted.amount_of(counted.before), counted.amount_of(counted.main)
            out["weights"] = initial_weights(prepare(asked, data))
        return out

    def train(self, asked: Settings, samples: int | None, job: Job) -> dict[str, Any]:
        """Train one arm; every metric wanted, the cost, the curve; and what comes after, on the same answer."""
        data = self.data(asked, samples)
        forget_peak()
        began = time.monotonic()
        done = train(asked, data)
        if done.test is None:
            raise Mistake(f"{data.origin}: has no test part to compare on; give --test a share above 0")
        wanted = [metrics.metric(text) for text in job["metrics"]]
        out: dict[str, Any] = {
            "metrics": measured(wanted, done.answer, data, done.run, job.get("explainer")),
            "cost": {
                "seconds": done.seconds["train"],
                "evaluate": done.seconds["evaluate"],
                "images": done.run.images,
                "steps": done.run.steps_done + sum(child.steps_done for child in done.run.children),
                "peak_bytes": recent_peak(),
            },
            "curve": curve(done.run),
            "weights_sha256": done.weights_sha256,
            "after": {text: self._after(text, kind, wanted, done.answer, data, done.run) for text, kind in job.get("after", {}).items()},
        }
        out["cost"]["whole"] = time.monotonic() - began
        return out

    def _after(self, text: str, kind: str, wanted: list[metrics.Metric], answer: nn.Module, data: Data, run: Run) -> dict[str, Any]:
        """Metrics of a change that needs no training, on the baseline's answer, and what it cost; or why it cannot be tried."""
        try:
            return self._tried_after(text, kind, wanted, answer, data, run)
        except Mistake as error:
            return {"mistake": str(error)}

    def _tried_after(self, text: str, kind: str, wanted: list[metrics.Metric], answer: nn.Module, data: Data, run: Run) -> dict[str, Any]:
        from convince.comparison.change import split

        forget_peak()
        began = time.monotonic()
        if kind == "explain":
            found = measured(wanted, answer, data, run, text, only=metrics.OF_MAPS)
        else:
            changed = answer
            with preserved():
                for spec in split(text):
                    changed = after(spec, changed, data, run)
                found = measured(wanted, changed.eval(), data, run, None)
        return {"metrics": found, "cost": {"seconds": time.monotonic() - began, "images": 0, "steps": 0, "peak_bytes": recent_peak()}}


def read(source: str, size: int | None, fit: str, val: float, test: float, strict: bool, group: str | None, workers: int) -> Data:
    """The data, before the split of a seed."""
    return load(source, size=size, fit=fit, val=val, test=test, seed=0, strict=strict, group=group, workers=workers)


def fewer(data: Data, count: int, seed: int) -> Tensor:
    """``count`` training rows in the classes' own shares, drawn by the seed."""
    rows = data.split.train[torch.randperm(len(data.split.train), generator=generator(seed, "fewer"))]
    return in_shares(rows, data.y, count)


def measured(
    wanted: list[metrics.Metric], answer: nn.Module, data: Data, run: Run, explainer: str | None, only: tuple[str, ...] | None = None
) -> dict[str, float]:
    """All metrics of the scores, and those wanted besides."""
    rows = data.split.test
    rows = rows[data.y[rows] >= 0]
    out: dict[str, float] = {}
    if only is None:
        scores = score(answer, data, rows, run.plan)
        out = {name: of(scores) for name, of in metrics.OF_SCORES.items()}
    for m in wanted:
        name = parts.parse(m.name)[0]
        if name in metrics.OF_MAPS:
            out[m.name] = metrics.of_maps(m, explainer, answer, data, rows, run.plan, run.seed)
        elif only is None and name not in metrics.OF_SCORES:
            out[m.name] = metrics.of_answer(m, answer, data, rows, run.plan)
    return out


def after(spec: str, answer: nn.Module, data: Data, run: Run) -> nn.Module:
    """A predictor wrapped around a copy of the answer, or the answer compressed; calibrated on training images."""
    name, options = parts.parse(spec)
    made = parts.make(name, **options)
    answer = copy.deepcopy(answer)
    if parts.get(name).card.kind == "predictor":
        return made.wrap(answer)
    if not isinstance(answer, Answer):
        raise Mistake(f"{spec}: compresses one network, and the baseline's answer is a {type(answer).__name__}; leave out the part that makes it")
    rows = data.split.train[torch.randperm(len(data.split.train), generator=generator(run.seed, "calibration"))][:1024]
    x = run.plan.pixels(data.x.take(rows))
    made.apply(answer.model, made.plan(answer.eval(), x, None))
    run.plan.place(answer)
    return answer


def initial_weights(run: Run) -> dict[str, list[Any]]:
    """Size and hash of every parameter before the first step, by name; edits of parts included."""
    with preserved():
        start(run)
    found = {}
    for name, p in run.model.named_parameters():
        digest = hashlib.sha256(p.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        found[name] = [p.numel(), digest]
    return found


def curve(run: Run) -> list[list[float | None]]:
    """[images so far, training loss, validation accuracy] of every epoch of the main stages."""
    main = {c.name for c in run.ledger if c.main}
    rows = [r for r in run.record.rows if r["kind"] == "epoch" and r["stage"] in main]
    return [[r["images"], r["loss"], r.get("val_accuracy")] for r in rows]


def forget_peak() -> None:
    """Let the peak of memory begin anew (Linux; elsewhere it stays that of the process)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def recent_peak() -> int:
    """The largest memory held since :func:`forget_peak`, in bytes."""
    with suppress(OSError, StopIteration, ValueError):
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM"))
    return peak_bytes()
