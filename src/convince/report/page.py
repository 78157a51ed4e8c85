"""Page: turn facts into what the template prints, every number already in words and every figure drawn."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convince.errors import Mistake
from convince.report import figures, units
from convince.report.facts import SECTIONS, finite, tidy
from convince.report.pictures import Shown, shown
from convince.report.probes import probes
from convince.report.reckon import confused_pairs, matrix, per_class, wilson

if TYPE_CHECKING:
    from jinja2 import Template

HERE = Path(__file__).resolve().parent
TONES = {"train": "b", "val": "a", "test": "c"}  # one colour for each part, in bars and curves alike
PARTS = {"train": "training", "val": "validation", "test": "test"}
FEW = 16  # up to this many classes a table shows them all at once
NAMES = {
    "data": "What came in",
    "training": "Learning curves",
    "test": "Test accuracy",
    "calibration": "Calibration",
    "pictures": "Pictures",
    "cost": "Cost",
    "samples": "Sample by sample",
    "probes": "What probes found",
    "repeat": "To repeat it",
}


def render(facts: Mapping[str, Any]) -> str:
    """The whole page as text; :func:`convince.report.write_report` puts it in a file."""
    return fill("template.html", view(facts))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template with these values, the report's style and its script."""
    from markupsafe import Markup

    script = (HERE / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (HERE / "style.css").read_text(encoding="utf-8")
    return _template(template).render(values, style=Markup(style), script=Markup(script), script_hash=digest)


@cache
def _template(name: str) -> Template:
    """A template, compiled once."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    tools = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    tools.filters.update(svg=Markup, percent=units.percent, count=units.count, number=units.number, decimal=units.decimal)
    tools.globals.update(finite=finite, bar=figures.bar_row, interval_bar=figures.interval_bar, shown=_shown)
    return tools.get_template(name)


def view(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template names: the headline, and one mapping or None for each section."""
    f = tidy(facts)
    test = _test_numbers(f)
    makers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "data": _data,
        "training": _training,
        "test": partial(_test, test=test),
        "calibration": partial(_calibration, test=test),
        "pictures": _pictures,
        "cost": _cost,
        "samples": _samples,
        "probes": probes,
        "repeat": _repeat,
    }
    made = {name: make(f) for name, make in makers.items()}
    reasons = {**SECTIONS, **f.get("absent", {})}
    return {
        "f": f,
        "head": _head(f, test),
        "sections": [(name, NAMES[name], made[name], reasons[name]) for name in NAMES],
        "unproven": f.get("absent", {}),
    }


def classes_of(f: dict[str, Any], k: int | None = None) -> list[str]:
    """The class names; numbers stand in where ``k`` classes have no names."""
    names = f.get("data", {}).get("classes") or []
    return [str(name) for name in names] or [str(i) for i in range(k or 0)]


def _shown(image: Any) -> Shown:
    return shown(image)


# ---- headline


def _test_numbers(f: dict[str, Any]) -> dict[str, Any]:
    """Test facts with what follows from them: n and accuracy from the confusion matrix, and an interval."""
    test = dict(f.get("test", {}))
    counts = None
    if test.get("confusion") is not None and len(test["confusion"]):
        counts = matrix(test["confusion"], len(classes_of(f)) or None)
        test.setdefault("n", int(counts.sum()))
        if counts.sum():
            test.setdefault("accuracy", float(np.trace(counts) / counts.sum()))
    test["counts"] = counts
    accuracy, n = test.get("accuracy"), test.get("n")
    method = test.get("interval_method", "")
    if finite(accuracy) and n and not test.get("accuracy_interval"):
        test["accuracy_interval"], method = list(wilson(accuracy * n, n)), "Wilson"
    test["interval_method"] = method
    return test


def _head(f: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    model = f.get("model") or "The network"
    accuracy, interval = test.get("accuracy"), test.get("accuracy_interval")
    lede: list[str] | None = None
    if finite(accuracy):
        n = f" of {units.count(test['n'])} test images" if test.get("n") else " of the test images"
        tail = f" (95{units.GAP}% interval {_between(interval)})" if interval else ""
        lede = [f"{model} answers ", units.percent(accuracy), f"{n} correctly{tail}."]
    date = units.date(f["date"]) if f.get("date") else ""
    return {"lede": lede, "plain": f"{model} was trained; it was not tested.", "date": date, "keys": _keys(f, test)}


def _between(interval: Any) -> str:
    return f"{units.percent(interval[0], False)} to {units.percent(interval[1], False)}" if interval else ""


def _keys(f: dict[str, Any], test: dict[str, Any]) -> list[dict[str, str]]:
    """At most six key figures: accuracy, losses, time, speed, size."""
    cost, calibration = f.get("cost", {}), f.get("calibration", {})
    seconds = cost.get("seconds", {})
    ece = test.get("ece", calibration.get("ece"))
    loss = test.get("log_loss", calibration.get("log_loss"))
    speed = cost.get("samples_per_second")
    macs = cost.get("macs")
    size = units.short(cost["macs"]) + " multiply-adds" if macs else ""
    candidates: list[tuple[str, Any, Callable[[Any], str], str]] = [
        ("Test accuracy", test.get("accuracy"), units.percent, _between(test.get("accuracy_interval"))),
        ("Log loss", loss, units.decimal, "nats an image"),
        ("Calibration error", ece, units.percent, "ECE"),
        ("Training", seconds.get("train", seconds.get("total")), units.duration, _epochs(f)),
        ("Speed", speed, lambda v: units.count(v) if v >= 100 else units.number(v), "images a second"),
        ("Parameters", cost.get("parameters"), units.short, size),
        ("Peak memory", cost.get("peak_bytes"), units.size, ""),
        ("Whole run", seconds.get("total"), units.duration, ""),
    ]
    kept = [(name, write(value), note) for name, value, write, note in candidates if value is not None]
    return [{"name": n, "value": v, "note": note} for n, v, note in kept[:6]]


def _epochs(f: dict[str, Any]) -> str:
    n = len(f.get("history", []))
    return "" if not n else f"{units.count(n)} epoch{'s' if n != 1 else ''}"


# ---- what came in


def _data(f: dict[str, Any]) -> dict[str, Any] | None:
    data = f.get("data")
    if not data:
        return None
    counts = data.get("counts", {})
    names = classes_of(f, max((len(v) for v in counts.values()), default=0))
    for part, values in counts.items():
        if len(values) != len(names):
            raise Mistake(f"data.counts[{part!r}] must have one number for each of {len(names)} classes, {len(values)}")
    return {
        "origin": data.get("origin"),
        "names": names,
        "few": len(names) <= FEW,
        "tones": TONES,
        "counts": [(part, PARTS.get(part, part), values) for part, values in counts.items()],
        "totals": [(PARTS.get(part, part), units.count(sum(values))) for part, values in counts.items()],
        "most": {part: max(values, default=0) or 1 for part, values in counts.items()},
        "charts": [
            (name, figures.columns(values, names, title=f"{name} images", tone=TONES.get(part, "d")))
            for part, name, values in ((p, PARTS.get(p, p), v) for p, v in counts.items())
        ],
        "fitting": _fitting(data.get("fitting", {})),
        "skipped": _skipped(data.get("skipped")),
        "duplicates": _duplicates(data),
        "note": data.get("duplicates_note"),
        "examples": data.get("examples", []),
    }


def _fitting(fitting: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if fitting.get("mode"):
        rows.append(("fitted by", str(fitting["mode"])))
    if fitting.get("size") is not None:
        size = fitting["size"]
        high, wide = size if isinstance(size, list) else (size, size)
        rows.append(("to", f"{wide} × {high}{units.GAP}px"))
    if fitting.get("channels"):
        c = fitting["channels"]
        rows.append(("channels", {1: "1 (grey)", 3: "3 (red, green, blue)"}.get(c, str(c))))
    for key, name in (("mean", "mean"), ("std", "standard deviation")):
        if fitting.get(key) is not None:
            values = fitting[key] if isinstance(fitting[key], list) else [fitting[key]]
            rows.append((name, ", ".join(units.decimal(v) for v in values)))
    return rows


def _skipped(skipped: list[Any] | None) -> dict[str, Any] | None:
    if skipped is None:
        return None
    groups: dict[str, list[str]] = {}
    for row in skipped:
        groups.setdefault(row.get("reason") or "no reason given", []).append(row.get("file") or "?")
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return {"n": len(skipped), "groups": ordered}


def _duplicates(data: dict[str, Any]) -> dict[str, Any] | None:
    found = data.get("duplicates")
    if found is None:
        return None
    if isinstance(found, int):
        return {"n": found, "rows": []}
    rows = [(row.get("files", []), [PARTS.get(p, p) for p in row.get("parts", [])]) for row in found]
    return {"n": len(found), "rows": rows}


# ---- learning curves


def _training(f: dict[str, Any]) -> dict[str, Any] | None:
    history = f.get("history") or []
    readings = _readings(f.get("readings") or [])
    if not history and not readings:
        return None
    charts = []
    if history:
        loss = _series(history, "loss")
        charts.append(("Loss, nats", _loss_chart(loss, history)))
        accuracy = _series(history, "accuracy")
        if accuracy:
            charts.append(("Accuracy", _accuracy_chart(accuracy, history)))
        rates = [(row["epoch"], row.get("lr")) for row in history]
        if any(finite(r) for _, r in rates):
            line = figures.Series("rate", [e for e, _ in rates], [r for _, r in rates], "c")
            options: dict[str, Any] = {"title": "Learning rate", "height": 150, "y_range": _rate_range(rates)}
            charts.append(("Learning rate", figures.line_chart([line], marks=_stages(history), **options)))
    best = _best(history)
    return {
        "charts": charts,
        "readings": readings,
        "best": best,
        "broken": _broken(history),
        "stages": _stages(history),
    }


def _series(history: list[Any], what: str) -> list[figures.Series]:
    out = []
    for part, name, tone in (("train", "training", "b"), ("val", "validation", "a")):
        key = f"{part}_{what}"
        if any(row.get(key) is not None for row in history):
            out.append(figures.Series(name, [r["epoch"] for r in history], [r.get(key) for r in history], tone))
    return out


def _loss_chart(series: list[figures.Series], history: list[Any]) -> str:
    values = [y for s in series for y in s.y if y is not None and finite(y)]
    log = bool(values) and min(values) > 0 and max(values) / min(values) > 30
    best = _best(history)
    dot = (best["epoch"], best["loss"]) if best else None
    low = None if log or not values or min(values) < 0 else (0.0, max(values) * 1.05 or 1.0)
    title = "Loss in nats, logarithmic scale," if log else "Loss in nats"
    return figures.line_chart(series, title=title, y_range=low, log=log, marks=_stages(history), dot=dot)


def _accuracy_chart(series: list[figures.Series], history: list[Any]) -> str:
    values = [y for s in series for y in s.y if y is not None and finite(y)]
    low = max(0.0, np.floor(min(values, default=0) * 10) / 10)
    return figures.line_chart(series, title="Accuracy", y_range=(min(low, 0.9), 1.0), as_percent=True, marks=_stages(history))


def _rate_range(rates: list[Any]) -> tuple[float, float]:
    return 0.0, max((r for _, r in rates if finite(r)), default=1) * 1.08 or 1.0


def _stages(history: list[Any]) -> list[tuple[float, str]]:
    """Where the stage changes: (epoch of the first row of the new stage, its name); none for a single stage."""
    names = [row.get("stage") for row in history]
    marks = [(history[i]["epoch"], str(name)) for i, name in enumerate(names) if name and (i == 0 or name != names[i - 1])]
    return marks if len(marks) > 1 else []


def _best(history: list[Any]) -> dict[str, Any] | None:
    known = [(row["val_loss"], row["epoch"]) for row in history if finite(row.get("val_loss"))]
    if not known:
        return None
    loss, epoch = min(known)
    return {"loss": loss, "epoch": epoch, "last": epoch == known[-1][1], "words": units.decimal(loss)}


def _broken(history: list[Any]) -> list[str]:
    """The first epoch of every curve that is NaN or infinite, in words."""
    out = []
    for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
        bad = [row["epoch"] for row in history if row.get(key) is not None and not finite(row[key])]
        if bad:
            part, what = key.split("_")
            out.append(f"{PARTS[part]} {what} is not a finite number in {len(bad)} of {len(history)} epochs")
    return out


def _readings(readings: list[Any]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for r in readings:
        groups.setdefault((r.get("part", ""), r.get("name", ""), r.get("unit", "")), []).append(r.get("value"))
    return [
        {"part": part, "name": name, "unit": unit, "value": units.number(values[-1]), "line": figures.spark(values)}
        for (part, name, unit), values in groups.items()
    ]


# ---- test


def _test(f: dict[str, Any], test: dict[str, Any]) -> dict[str, Any] | None:
    counts = test["counts"]
    if not finite(test.get("accuracy")) and counts is None:
        return None
    out: dict[str, Any] = {"strip": _strip(f, test), "method": test["interval_method"], "rows": [], "pairs": []}
    if counts is None or not counts.sum():
        return out
    names = classes_of(f, len(counts))
    out["heat"] = figures.heat_map(counts, names)
    out["k"] = len(counts)
    scores = per_class(counts)
    for name, row in zip(names, scores, strict=True):
        other = row["taken_for"]
        row["name"], row["other"] = name, (names[other[0]], other[1]) if other else None
    out["rows"] = scores
    sums = counts.sum(axis=1)
    out["pairs"] = [(names[i], names[j], n, n / sums[i]) for i, j, n in confused_pairs(counts)]
    out["commonest"] = float(sums.max() / sums.sum())
    out["wrong"] = int(counts.sum() - np.trace(counts))
    out["n"] = int(counts.sum())
    out["macro"] = _mean([row["f1"] for row in scores])
    out["balanced"] = _mean([row["recall"] for row in scores])
    return out


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _strip(f: dict[str, Any], test: dict[str, Any]) -> str:
    """Accuracy of test, last validation and last training on one axis, against always naming the commonest class."""
    rows = []
    if finite(test.get("accuracy")):
        low, high = test.get("accuracy_interval") or (None, None)
        note = f"{units.percent(test['accuracy'])} ({_between((low, high))})" if low is not None else ""
        rows.append(figures.Strip("test", test["accuracy"], low, high, note))
    history = f.get("history") or [{}]
    counts = f.get("data", {}).get("counts", {})
    value, n = history[-1].get("val_accuracy"), sum(counts.get("val", []))
    if finite(value):
        low, high = wilson(value * n, n) if n else (None, None)
        note = f"{units.percent(value)} ({_between((low, high))})" if n else ""
        rows.append(figures.Strip("validation, last epoch", value, low, high, note))
    if finite(history[-1].get("train_accuracy")):
        rows.append(figures.Strip("training, last epoch", history[-1]["train_accuracy"], None, None))
    reference = None
    if test["counts"] is not None and test["counts"].sum():
        share = float(test["counts"].sum(axis=1).max() / test["counts"].sum())
        reference = (share, "always the commonest class")
    return figures.forest(rows, reference=reference) if rows else ""


# ---- calibration, pictures, cost, samples, repeat


def _calibration(f: dict[str, Any], test: dict[str, Any]) -> dict[str, Any] | None:
    facts = f.get("calibration") or {}
    bins = [b for b in facts.get("bins", []) if b.get("n")]
    ece, loss = facts.get("ece", test.get("ece")), facts.get("log_loss", test.get("log_loss"))
    if not bins and not finite(ece):
        return None
    out: dict[str, Any] = {"ece": ece, "log_loss": loss, "method": facts.get("method"), "bins": bins, "figure": ""}
    n = sum(b["n"] for b in bins)
    if n:
        claim = sum(b["n"] * b["confidence"] for b in bins) / n
        right = sum(b["n"] * b["accuracy"] for b in bins) / n
        points = f"{abs(100 * (claim - right)):.1f}{units.GAP}points"
        way = "too sure of itself" if claim > right else "too unsure of itself"
        out["figure"] = figures.reliability(bins)
        out["words"] = f"On average the network claims {units.percent(claim)} and is right in {units.percent(right)}: " + (
            "just as sure as it should be." if abs(claim - right) < 0.0005 else f"{points} {way}."
        )
        out["n"] = n
    return out


def _pictures(f: dict[str, Any]) -> dict[str, Any] | None:
    groups = []
    for key, title, words in (
        ("mistakes", "The most confident mistakes", "Where it was wrong and surest. Look for wrong labels first."),
        ("hits", "The most typical hits", "What it takes each class to be."),
    ):
        if f.get(key):
            groups.append((title, words, key, f[key]))
    if not groups:
        return None
    explained = any(p.get("overlay") is not None for _, _, _, ps in groups for p in ps)
    return {"groups": groups, "method": f.get("explanation", "") if explained else "", "explained": explained}


def _cost(f: dict[str, Any]) -> list[tuple[str, str, str]] | None:
    cost = f.get("cost")
    if not cost:
        return None
    seconds = cost.get("seconds", {})
    rest = seconds.get("total", 0) - seconds.get("train", 0) - seconds.get("evaluate", 0)
    rows: list[tuple[str, Any, Callable[[Any], str], str]] = [
        ("Whole run", seconds.get("total"), units.duration, "from start to report"),
        ("Training", seconds.get("train"), units.duration, ""),
        ("Evaluation", seconds.get("evaluate"), units.duration, ""),
        ("Training speed", cost.get("samples_per_second"), units.number, "images a second"),
        ("Through the network", cost.get("images"), units.count, "images, all epochs"),
        ("Peak memory", cost.get("peak_bytes"), units.size, ""),
        ("Arithmetic", cost.get("peak_share"), units.percent, "of the processor's measured peak"),
        ("Measured peak", cost.get("peak_flops"), units.rate, "dense matrix product"),
        ("Parameters", cost.get("parameters"), units.count, ""),
        ("Multiply-adds", cost.get("macs"), units.count, "an image"),
        ("Precision", cost.get("precision"), str, ""),
        ("Memory layout", cost.get("layout"), str, ""),
    ]
    if len(seconds) == 3 and rest > 0.05 * seconds["total"]:
        rows.insert(3, ("The rest", rest, units.duration, "reading, explaining, writing"))
    return [(name, write(value), note) for name, value, write, note in rows if value is not None] or None


def _samples(f: dict[str, Any]) -> dict[str, Any] | None:
    galleries, tables = f.get("galleries") or [], []
    for table in f.get("tables") or []:
        heads: dict[str, None] = {}
        for row in table.get("rows", []):
            heads.update(dict.fromkeys(row))
        tables.append({**table, "heads": list(heads), "rows": table.get("rows", [])})
    return {"galleries": galleries, "tables": tables} if galleries or tables else None


def _repeat(f: dict[str, Any]) -> dict[str, Any] | None:
    config = f.get("config")
    if config is not None and not isinstance(config, str):
        import yaml

        config = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    out = {
        "environment": list(f.get("environment", {}).items()),
        "command": f.get("command"),
        "config": config,
        "sha": f.get("weights_sha256"),
    }
    return out if any(out.values()) else None
