"""Measuring: a size's counts, speed and memory in a process of its own, and its accuracy under one common budget. Kept cell by cell."""

from __future__ import annotations

import fnmatch
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convince import parts
from convince.models.table import SETS, read_store, source

BUDGET: dict[str, Any] = {
    "images": 10_000,
    "tested": 2_000,
    "epochs": 1,
    "batch": 32,
    "parts": ["adamw:lr=0.002,weight_decay=0.05"],
    "schedule": "cosine",
    "augment": "auto",
    "seeds": [0, 1, 2],
}
SECONDS = 0.3  # that a speed is measured for, at least
LIMIT = 100  # seconds that one size's speed may take in all
Say = Callable[[str], None]


def measure(path: Path, only: tuple[str, ...] = (), say: Say = print, accuracy: bool = True, speed: bool = True) -> dict[str, Any]:
    """Measure what the table at ``path`` lacks or has of older files, cell by cell; an interrupted measurement goes on.

    One seed after the other, so that a table that is not whole yet has fewer seeds of every network, not fewer networks.
    """
    from convince.fit.folder import environment
    from convince.fit.state import write_atomic

    store = read_store(path)
    facts = environment()
    store |= {"budget": BUDGET, "machine": {k: facts[k] for k in ("processor", "threads", "amx", "avx512_bf16", "versions")}, "date": time.strftime("%Y-%m-%d")}

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(store, indent=1, sort_keys=True) + "\n")

    sizes = [size for size in every_size() if not only or any(fnmatch.fnmatchcase(size[0], p) for p in only)]
    for name, part in sizes:
        kept = store["rows"].get(name, {})
        if kept.get("source") != source(part) or kept.get("budget") != BUDGET:
            store["rows"][name] = kept = {"source": source(part), "budget": BUDGET}
        if speed and "speed" not in kept and "failed" not in kept:
            kept |= in_its_own_process(name)
            if "failed" in kept:  # too slow or too large to run, but not to count
                kept |= counted(name)
            save()
            say(f"{name}: {json.dumps({k: v for k, v in kept.items() if k not in ('source', 'budget')})}")
    cells = [(name, kind, seed) for seed in BUDGET["seeds"] for kind in SETS for name, part in sizes if name in part.card.small]
    for name, kind, seed in cells if accuracy else ():
        found = store["rows"][name].setdefault("accuracy", {}).setdefault(kind, {})
        if str(seed) not in found:
            found[str(seed)] = trained(name, kind, seed)
            save()
            say(f"{name} on {kind}, seed {seed}: {found[str(seed)]:.4f}")
    return store


def every_size() -> list[tuple[str, parts.Part]]:
    """Every size of every network for images, and its part."""
    known = {part.name: part for part in parts.find() if isinstance(part, parts.Part) and part.card.kind == "backbone" and not part.own}
    from convince.models.table import rows

    return [(row.name, known[row.part]) for row in rows({"rows": {}}) if row.part in known]


def trained(name: str, kind: str, seed: int) -> float:
    """Test accuracy of one training under the common budget."""
    from convince.claims import draw
    from convince.fit.settings import settings
    from convince.fit.train import train

    data = draw(kind, BUDGET["images"], 0, BUDGET["tested"], seed)
    how = {key: BUDGET[key] for key in ("epochs", "batch", "schedule", "augment")}
    done = train(settings(model=name, parts=tuple(BUDGET["parts"]), seed=seed, **how), data)
    assert done.test is not None
    return done.test.accuracy


def in_its_own_process(name: str) -> dict[str, Any]:
    """Counts, speed and memory of a size, measured in a fresh process; or why they could not be."""
    try:
        done = subprocess.run([sys.executable, "-m", "convince.models.measure", name], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {LIMIT} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"failed": "out of memory" if done.returncode == -9 else last[:200]}
    return json.loads(done.stdout)


def counted(name: str) -> dict[str, Any]:
    """The side [pixels], the classes, parameters and multiply-adds of a size, on the meta device."""
    from convince.backbones import input_size, part_of
    from convince.models.counting import count_named

    part = part_of(name)
    assert part is not None, f"{name} is no size of a part"
    size, classes = input_size(name), part.card.published.get(name, {}).get("classes", 10)
    counts = count_named(name, num_classes=classes, size=size)
    return {"size": size[0], "classes": classes, "parameters": counts.parameters, "macs": counts.macs}


def speed(name: str) -> dict[str, Any]:
    """Images a second in training and inference, in fp32 and bf16, in the layout and ways that a run uses; the memory of a step."""
    import torch

    from convince.backbones import builder
    from convince.fit import kernels, precision

    facts = counted(name)
    classes, size, macs = facts["classes"], (facts["size"], facts["size"]), facts["macs"]
    batch = 32 if macs < 0.2e9 else 8 if macs < 2.5e9 else 4 if macs < 8e9 else 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out: dict[str, Any] = {**facts, "batch": batch, "speed": {}}
    formats = ["fp32", *(["bf16"] if precision.choose("auto").precision == "bf16" else [])]
    for form in formats:
        torch.manual_seed(0)
        model = builder(name, num_classes=classes, in_chans=3, size=size)()
        plan = precision.choose(form)
        plan = precision.choose(form, ways=kernels.choose(form, plan.channels_last, kernels.kinds_in(model)) if plan.device == "cpu" else {})
        model = plan.place(model)
        x = plan.pixels(torch.rand(batch, 3, *size))
        y = torch.zeros(batch, dtype=torch.int64, device=x.device)

        def step(model: Any = model, plan: Any = plan, x: Any = x, y: Any = y) -> None:
            with plan.autocast():
                scores = model(x)
            torch.nn.functional.cross_entropy(scores.float(), y).backward()
            model.zero_grad(set_to_none=True)

        def look(model: Any = model, plan: Any = plan, x: Any = x) -> None:
            with torch.no_grad(), plan.autocast():
                model(x)

        out["speed"][form] = {"train": batch / seconds(step, model.train())}
        if form == "fp32":
            out["bytes"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        out["speed"][form]["infer"] = batch / seconds(look, model.eval())
    return out


def seconds(work: Callable[[], None], model: Any) -> float:
    """The median seconds of a call, after one that is not counted."""
    work()
    until = time.perf_counter() + SECONDS
    times: list[float] = []
    while not times or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    print(json.dumps(speed(sys.argv[1])))
