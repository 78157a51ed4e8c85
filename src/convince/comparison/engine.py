"""The engine: trains the arms of a plan pair by pair, keeps each as it finishes, looks at the pairs, and stops where it may."""

from __future__ import annotations

import hashlib
import json
import math
import statistics as plain
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convince import __version__, parts
from convince.comparison import metrics
from convince.comparison import statistics as stats
from convince.comparison.change import Change, change, with_parts
from convince.comparison.evidence import POINTS, Evidence, Finding, clock, digits
from convince.comparison.hands import Cluster, Hands, Here, Job, Workers
from convince.comparison.judge import Judge
from convince.comparison.plan import Asked, Plan, Planner, processors
from convince.errors import Mistake
from convince.types import Budget

BASE = "baseline"
MOST_WORKERS = 8  # unless more are asked for: each holds torch and the data
RELATED = 0.5  # correlation of the two arms of a pair that is supposed before any change has been trained
Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]


def compare(
    data: Any,
    change: str | Sequence[str],
    *,
    seeds: int | None = None,
    margin: float | None = None,
    budget: Budget | None = None,
    minutes: float | None = None,
    metric: str | None = None,
    baseline: Sequence[str] = (),
    stop_early: bool = False,
    race: bool = False,
    samples: int | None = None,
    alpha: float = 0.05,
    folder: str | Path | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    say: Say | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Evidence:
    """Try changes against a baseline on the same data, seed by seed, and say what the differences show.

    ``data``: what :func:`convince.load` reads by name (a folder, a table, a built-in set), or a loaded
    :class:`~convince.data.Data`. ``change``: parts as ``--with`` has them, ``"a+b"`` for both together; each of several is
    compared with the baseline. ``seeds``: pairs of runs (8, or what the minutes allow); each varies split, initial
    weights and order together. ``margin``: differences inside it are as good as none, in the metric's own unit
    (None: the larger of half a point and what the pairs can detect). ``budget``: of each run, equal for both arms
    (None: as many images through the network as the baseline's usual training). ``minutes``: for the whole comparison.
    ``metric``: see :mod:`convince.comparison.metrics` ("accuracy", for explainers "insertion-auc"). ``baseline``: parts
    that both arms have; an explainer is what others are compared with. ``stop_early``: look at about half and three quarters of the
    pairs, and stop where the verdict stands, the error rate kept; ``race`` also drops changes that cannot be
    the best any more. ``samples``: at most this many training samples. ``alpha``: the error rate. ``folder``: where arms are kept as they
    finish; the same comparison started again repeats none. ``workers``: processes (None: measured; 0: this process).
    ``cluster``: a Ray address. ``settings``: of both arms, as :class:`convince.fit.settings.Settings`
    (model, epochs, batch, size ...). Raises Mistake for what cannot be compared, before the first run.
    """
    texts = [change] if isinstance(change, str) else list(change)
    named = isinstance(data, str | Path)
    mine = settings | ({"data": str(data)} if named else {})
    asked = ask(texts, seeds, margin, budget, minutes, metric, tuple(baseline), stop_early, race, samples, workers, alpha, mine)
    hands = choose_hands(data if not named else None, workers, cluster)
    try:
        return Comparison(asked, hands, None if folder is None else Path(folder), say or (lambda line: None), progress).run()
    finally:
        hands.close()


def ask(
    texts: list[str],
    seeds: int | None,
    margin: float | None,
    budget: Budget | None,
    minutes: float | None,
    metric: str | None,
    baseline: tuple[str, ...],
    early: bool,
    race: bool,
    samples: int | None,
    workers: int | None,
    alpha: float,
    settings: dict[str, Any],
) -> Asked:
    """Check what was asked for, with nothing loaded; a Mistake names what cannot be."""
    if not texts:
        raise Mistake("name at least one change: --with cutmix, or --all ROOM")
    changes = list({text: change(text) for text in texts}.values())
    kinds = {c.kind for c in changes}
    if "explain" in kinds and len(kinds) > 1:
        other = next(c.text for c in changes if c.kind != "explain")
        raise Mistake(f"{changes[0].text!r} and {other!r} are not measured by one metric: explainers are compared with explainers; ask for them apart")
    for name, value, least in (("seeds", seeds, 2), ("samples", samples, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise Mistake(f"--{name} {value}: must be at least {least}" + ("; one pair has no interval" if name == "seeds" else ""))
    for name, number in (("margin", margin), ("minutes", minutes)):
        if number is not None and not 0 < number < math.inf:
            raise Mistake(f"--{name} {number:g}: must be above 0")
    if not 0 < alpha < 0.5:
        raise Mistake(f"alpha={alpha:g}: must lie between 0 and 0.5; 0.05 is usual")
    if budget is not None and (budget.unit not in ("images", "epochs", "steps", "seconds") or not budget.value > 0):
        raise Mistake(f"--budget {budget.unit}={budget.value:g}: must be above 0, of images, epochs, steps or seconds")
    maps = kinds == {"explain"}
    wanted = metrics.metric(metric or ("insertion-auc" if maps else "accuracy"))
    if maps != (parts.parse(wanted.name)[0] in metrics.OF_MAPS):
        have = ", ".join(metrics.OF_MAPS) if maps else ", ".join(set(metrics.KNOWN) - set(metrics.OF_MAPS))
        raise Mistake(f"--metric {wanted.name}: {'explainers are' if maps else 'these changes are not'} compared by {have}")
    explainer, shared = None, baseline
    if maps and baseline:
        from convince.comparison.change import kind_of

        explainers = [spec for spec in baseline if kind_of(spec) == "explainer"]
        if len(explainers) > 1:
            raise Mistake(f"--baseline: {' and '.join(explainers)} are two explainers; name one")
        explainer = explainers[0] if explainers else None
        shared = tuple(spec for spec in baseline if spec != explainer)
    mine = {**settings, "parts": with_parts(tuple(settings.get("parts", ())), shared)}
    if mine.get("minutes") is not None:
        raise Mistake("minutes count the whole comparison; give each run its length by budget")
    return Asked(mine, changes, baseline, explainer, wanted.name, seeds, margin, budget, minutes, early, race, samples, workers, alpha)


def choose_hands(data: Any, workers: int | None, cluster: str | None) -> Hands:
    """Worker processes for data that have a name; this process for what is in memory, or where it is asked for."""
    if cluster is not None:
        if data is not None:
            raise Mistake("a cluster loads the data by name; give a folder or file that every machine can read")
        return Cluster(cluster, 1)
    if data is not None or workers == 0:
        return Here(data)
    return Workers(workers or min(processors(), MOST_WORKERS))


class Comparison:
    """One comparison on its way: the plan, the arms done so far, and the findings."""

    def __init__(self, asked: Asked, hands: Hands, folder: Path | None, say: Say, progress: Progress | None) -> None:
        self.asked, self.hands, self.folder, self.say, self.progress = asked, hands, folder, say, progress
        self.metric = metrics.metric(asked.metric)
        self.began = time.monotonic()
        self.done: dict[tuple[str, int], dict[str, Any]] = {}  # (arm, seed) -> result
        self.failed: set[str] = set()
        self.spent = 0.0  # seconds of all arms of this session

    # -- the way through -------------------------------------------------------------------------------

    def run(self) -> Evidence:
        self.plan = self._plan()
        self.changes = [c for c in self.asked.changes if c.text in self.plan.arms]
        self.trained = [c for c in self.changes if c.kind == "train"]
        self._say_before()
        until = math.inf if self.asked.minutes is None else self.began + self.asked.minutes * 60 - 5
        first = self.plan.looks[0]
        self._train([BASE], range(first), until)
        texts, given = [c.text for c in self.changes], self.asked.margin is not None
        self.judge = Judge(texts, self.plan.looks, self.asked.alpha, self._margin(), self.asked.race, settles=given)
        before = 0
        for look, n in enumerate(self.plan.looks):
            self._train([BASE, *self._racing()], range(before, n), until)
            before = n
            last = look == len(self.plan.looks) - 1 or time.monotonic() + self._pair_seconds() > until
            self._look(last)
            if last or not (self._racing() or any(c.kind != "train" for c in self.changes if c.text not in self.judge.out)):
                break
        return self._evidence()

    def _plan(self) -> Plan:
        """The plan: from the folder where this comparison was begun, else made now and kept there."""
        path = None if self.folder is None else self.folder / "plan.json"
        asked = json.loads(json.dumps(self.asked.to_json()))
        planner = Planner(self.asked, self.hands, self.began)
        if path is not None and path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                before, plan = kept["asked"], Plan.from_json(kept["plan"])
            except (ValueError, KeyError, TypeError) as error:
                raise Mistake(f"{path}: no plan of a comparison can be read there ({error}); begin anew with --fresh, or choose another --out") from error
            if before != asked:
                raise Mistake(f"{self.folder}: holds another comparison; choose another --out, or remove it")
            if planner.digest(plan.facts["settings"]) != plan.facts["digest"]:
                raise Mistake(f"{plan.facts['origin']}: has changed since {self.folder} was begun; begin anew with --fresh, or choose another --out")
            self.say(f"going on with {self.folder}: the plan and what is done stand")
            if isinstance(self.hands, Workers) and plan.workers:
                self.hands.keep(min(plan.workers, self.hands.count))
            return plan
        plan = planner.plan()
        if path is not None:
            write(path, {"asked": asked, "plan": plan.to_json()})
        return plan

    def _say_before(self) -> None:
        """What is going to happen, and what these pairs cannot decide, before the first run."""
        plan, rows = self.plan, self.plan.facts["rows"]
        for note in plan.facts["notes"]:
            self.say(note)
        runs = (1 + len(self.trained)) * plan.pairs
        seconds = plan.pairs * (plan.baseline.seconds + sum(plan.arms[c.text].seconds for c in self.trained)) / max(plan.workers, 1)
        about = f"about {clock(seconds)}"
        self.say(f"{plan.pairs} pairs, {runs} runs of {plan.baseline.images:,.0f} images, tested on {rows['test']:,} samples each: {about}")
        fewest = stats.fewest_pairs(self.asked.alpha)
        if plan.pairs < fewest:
            self.say(
                f"{plan.pairs} pairs: a permutation test cannot reach p = {self.asked.alpha:g} with fewer than {fewest}, "
                "so only the paired t-test, which supposes that differences are normal, can decide"
            )
        for text, arm in plan.arms.items():
            if arm.note:
                self.say(arm.note)
            if arm.share is not None and arm.share < 0.999:
                self.say(f"{text}: {arm.share:.0%} of its initial weights are the baseline's")
        for row in plan.refused:
            self.say(f"left out: {row['change']}: {row['reason']}")

    def _margin(self) -> float:
        """The margin as given, or the larger of half a point and what the pairs can detect by the baseline's own spread.

        Fixed before any change has been trained.
        """
        sign, name = self.metric, self.asked.metric
        values = [row["metrics"][name] for row in self._rows(BASE).values()]
        spread = plain.stdev(values) if len(values) > 1 else 0.0
        alpha = self.asked.alpha / max(len(self.changes), 1)
        found = stats.detectable(spread * math.sqrt(2 * (1 - RELATED)), self.plan.pairs, alpha)
        scale, word = POINTS[sign.unit]
        size = f"{found * scale:.{digits(found * scale)}f} {word}" if math.isfinite(found) else "nothing"
        if self.asked.margin is not None:
            self.say(f"the baseline's spread suggests that {self.plan.pairs} pairs can detect {size} of {name}")
            return self.asked.margin
        margin = max(sign.margin, found if math.isfinite(found) else 0.0)
        self.say(
            f"margin {margin * scale:.{digits(margin * scale)}f} {word}, before any change is trained: the larger of "
            f"{sign.margin * scale:g} and what {self.plan.pairs} pairs can detect by the baseline's spread ({size})"
        )
        return margin

    # -- arms ------------------------------------------------------------------------------------------

    def _job(self, arm: str, at: int) -> Job:
        """The job of one arm with one seed; its key is all that its result depends on."""
        made = self.plan.baseline if arm == BASE else self.plan.arms[arm]
        further = [] if parts.parse(self.asked.metric)[0] in metrics.OF_SCORES else [self.asked.metric]
        job: Job = {
            "do": "train",
            "settings": {**made.settings, "seed": self.plan.seed + at},
            "samples": self.plan.samples,
            "threads": self.plan.threads,
            "metrics": further,
        }
        if arm == BASE:
            job["after"] = {c.text: c.kind for c in self.changes if c.kind != "train"}
            job["explainer"] = self.asked.explainer
        specs = [*job["settings"]["parts"], *job.get("after", ())]
        key = [__version__, self.plan.facts["digest"], job, [source(spec) for spec in specs]]
        job["key"] = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        return job | {"arm": arm, "at": at, "estimate": made.seconds}

    def _train(self, arms: list[str], seeds: range, until: float) -> None:
        """Train these arms with these seeds, less those that are done or kept; seed by seed, so that pairs finish."""
        jobs = [self._job(arm, at) for at in seeds for arm in arms if (arm, at) not in self.done]
        waiting = []
        for job in jobs:
            kept = self._kept(job["key"])
            if kept is None:
                waiting.append(job)
            else:
                self._take(job, kept)
        total, finished = len(waiting), 0
        if total and self.progress is not None:
            self.progress(0, total, "training arms")

        def done(job: Job, result: dict[str, Any]) -> None:
            nonlocal finished
            finished += 1
            self.spent += result.get("cost", {}).get("whole", 0.0)
            if self.folder is not None and "metrics" in result:
                write(self.folder / "arms" / f"{job['key']}.json", {"arm": job["arm"], "seed": job["settings"]["seed"], **result})
            self._take(job, result)
            if self.progress is not None:
                self.progress(finished, total, f"{job['arm']}, seed {job['settings']['seed']}")

        self.hands.run(waiting, done, until)

    def _kept(self, key: str) -> dict[str, Any] | None:
        """A finished arm from the folder; a file that was cut short is made anew."""
        if self.folder is None:
            return None
        try:
            found = json.loads((self.folder / "arms" / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "metrics" in found else None

    def _take(self, job: Job, result: dict[str, Any]) -> None:
        arm = job["arm"]
        if "mistake" in result or "defect" in result:
            reason = result.get("mistake") or result["defect"].strip().splitlines()[-1]
            if arm == BASE:
                raise Mistake(f"the baseline cannot be trained: {reason}") if "mistake" in result else RuntimeError(result["defect"])
            self._fail(arm, job, reason)
            return
        self.done[arm, job["at"]] = result
        for text, found in result.get("after", {}).items():
            if "mistake" in found:
                self._fail(text, job, found["mistake"])
            else:
                self.done[text, job["at"]] = found

    def _fail(self, text: str, job: Job, reason: str) -> None:
        """A change that cannot be trained or tried with some seed leaves, once, with its reason."""
        if text not in self.failed:
            self.failed.add(text)
            self.plan.refused.append({"change": text, "reason": f"seed {job['settings']['seed']}: {reason}"})
            self.say(f"{text}: failed with seed {job['settings']['seed']}: {reason}")

    def _rows(self, arm: str) -> dict[int, dict[str, Any]]:
        return {at: row for (name, at), row in sorted(self.done.items(), key=lambda item: item[0][1]) if name == arm}

    def _racing(self) -> list[str]:
        """Changes that still need runs."""
        return [c.text for c in self.trained if c.text not in self.judge.out and c.text not in self.failed]

    def _pair_seconds(self) -> float:
        """Seconds that one more seed of all arms still in takes."""
        arms = [self.plan.baseline, *(self.plan.arms[text] for text in self._racing())]
        return sum(arm.seconds for arm in arms) / max(self.plan.workers, 1)

    # -- looking ---------------------------------------------------------------------------------------

    def _differences(self, text: str, name: str | None = None) -> tuple[list[int], list[float]]:
        """Seeds that both arms have finished, and change minus baseline on each, in the metric's own unit."""
        name = name or self.asked.metric
        base, mine = self._rows(BASE), self._rows(text)
        both = [at for at in base if at in mine and name in mine[at]["metrics"] and name in base[at]["metrics"]]
        return both, [mine[at]["metrics"][name] - base[at]["metrics"][name] for at in both]

    def _look(self, last: bool) -> None:
        """Hand the pairs so far to the judge; say who leaves."""
        turned = {c.text: [self.metric.sign * d for d in self._differences(c.text)[1]] for c in self.changes}
        for text, why in self.judge.look(turned, last=last).items():
            self.say(f"{text}: {why}")

    # -- what was found --------------------------------------------------------------------------------

    def _evidence(self) -> Evidence:
        corrected = self.judge.corrected()
        findings = [self._finding(c, corrected[c.text]) for c in self.changes if c.text in corrected and c.text not in self.failed]
        findings.sort(key=lambda f: -f.difference * self.metric.sign)
        told = {row["change"] for row in self.plan.refused} | {f.change for f in findings}
        late = [{"change": c.text, "reason": "the time ended before its second pair"} for c in self.changes if c.text not in told]
        if not findings:
            raise Mistake("; ".join(f"{row['change']}: {row['reason']}" for row in [*self.plan.refused, *late]))
        base = with_parts(tuple(self.plan.baseline.settings["parts"]), ())
        name = " with ".join([str(self.plan.baseline.settings["model"]), *([" + ".join(base)] if base else [])])
        wall = time.monotonic() - self.began
        hands = max(self.plan.workers, 1)
        facts = self.plan.facts
        return Evidence(
            baseline=self.asked.explainer or ("random maps" if self.metric.name.split(":")[0] in metrics.OF_MAPS else name),
            metric=self.asked.metric,
            unit=self.metric.unit,
            budget=self.plan.budget,
            changes=findings,
            refused=[*self.plan.refused, *late],
            alpha=self.asked.alpha,
            looks=self.plan.looks,
            data={key: facts[key] for key in ("origin", "digest", "classes", "size", "rows", "test_is_fixed", "skipped")} | {"samples": self.plan.samples},
            settings=self.plan.baseline.settings,
            notes=facts["notes"],
            seconds=wall,
            overhead=max(0.0, 1 - self.spent / (wall * hands)) if wall else 0.0,
            environment=facts["environment"] | {"threads": self.plan.threads, "workers": self.plan.workers},
            folder=self.folder,
        )

    def _finding(self, c: Change, p_corrected: float) -> Finding:
        found, margin = self.judge.found[c.text], self.judge.margin
        at, d = self._differences(c.text)
        at, d = at[: found.n], d[: found.n]  # a run that ended after the last look does not count
        base, mine, name = self._rows(BASE), self._rows(c.text), self.asked.metric
        level, sign = self.judge.level(c.text), self.metric.sign
        low, high = sorted(sign * bound for bound in found.interval(level))
        arm = self.plan.arms[c.text]
        return Finding(
            change=c.text,
            kind=c.kind,
            n=found.n,
            baseline_mean=plain.fmean(base[i]["metrics"][name] for i in at),
            change_mean=plain.fmean(mine[i]["metrics"][name] for i in at),
            difference=plain.fmean(d),
            interval=(low, high),
            sd=found.sd,
            p=found.p,
            p_flip=found.p_flip,
            p_corrected=p_corrected,
            inside=stats.within(found, margin),
            detectable=stats.detectable(found.sd, found.n, self.asked.alpha / len(self.changes)),
            margin=margin,
            verdict=self.judge.verdict(c.text),
            higher_is_better=self.metric.higher,
            cost={"baseline": cost([base[i] for i in at], self.plan.baseline.operations), "change": cost([mine[i] for i in at], arm.operations)},
            seeds=[self.plan.seed + i for i in at],
            differences=d,
            metrics={m: self._beside(c.text, m) for m in mine[at[0]]["metrics"] if m in base[at[0]]["metrics"]},
            curves={"baseline": [base[i]["curve"] for i in at], "change": [mine[i]["curve"] for i in at]} if c.kind == "train" else {},
            share=arm.share if c.kind == "train" else None,
            note=arm.note,
            out=self.judge.out.get(c.text, ""),
        )

    def _beside(self, text: str, name: str) -> dict[str, float]:
        """Another metric of the same runs: means, and the difference with its plain 95 % interval."""
        at, d = self._differences(text, name)
        base, mine = self._rows(BASE), self._rows(text)
        low, high = stats.paired(d).interval()
        return {
            "baseline": plain.fmean(base[i]["metrics"][name] for i in at),
            "change": plain.fmean(mine[i]["metrics"][name] for i in at),
            "difference": plain.fmean(d),
            "low": low,
            "high": high,
        }


def cost(rows: list[dict[str, Any]], operations: float | None) -> dict[str, float | None]:
    """Mean cost of a run: seconds of training, images and operations through the network, steps, peak memory [bytes]."""
    names = ("seconds", "images", "steps", "peak_bytes")
    return {name: plain.fmean(row["cost"][name] for row in rows) for name in names} | {"operations": operations}


def source(spec: str) -> str:
    """A hash of a part's file, so that an arm is not taken for that of a part that has changed since."""
    if spec.startswith("timm/"):
        return spec
    name, _ = parts.parse(spec.split("+")[0])
    return hashlib.sha256(parts.get(name).path.read_bytes()).hexdigest()[:16]


def write(path: Path, value: dict[str, Any]) -> None:
    """JSON to a file, whole or not at all."""
    from convince.data.cache import replacing

    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
