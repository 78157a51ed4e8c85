"""The plan of a comparison: every arm's settings, the number of pairs, when to look, and how the machine is used.

All of it is fixed before the first arm is trained and kept in ``plan.json``; a comparison that is started again
reads it there. Both arms get the same budget: images through the network unless another unit is asked for.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from convince import parts
from convince.backbones import usual_optimizer
from convince.comparison import statistics
from convince.comparison.change import Change, kind_of, with_parts
from convince.comparison.hands import Hands, Here, Job, Workers
from convince.errors import Mistake
from convince.types import Budget

UNITS = ("images", "epochs", "steps", "seconds")
STEPS = (3, 6)  # of every stage, in a survey: fewest and most
PATIENCE = 4.0  # seconds that a survey's steps may take, if the fewest allow it
FEW_EPOCHS = 6  # with fewer, a run on smaller pictures tells more
MOST_PAIRS = 16  # that are planned without being asked for
BASELINE = Change("baseline", "train", ())


@dataclass
class Arm:
    """What one arm trains: its settings without the seed, what that should take, and how it differs from the baseline."""

    settings: dict[str, Any]
    seconds: float
    images: float
    operations: float | None = None
    share: float | None = None
    note: str = ""


@dataclass
class Plan:
    """See the file's first line. ``threads`` of each of ``workers`` processes (0: this process)."""

    facts: dict[str, Any]
    budget: dict[str, Any]
    baseline: Arm
    arms: dict[str, Arm]
    refused: list[dict[str, str]]
    seed: int
    pairs: int
    looks: list[int]
    workers: int
    threads: int
    samples: int | None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Plan:
        arms = {text: Arm(**arm) for text, arm in found["arms"].items()}
        return cls(**{**found, "baseline": Arm(**found["baseline"]), "arms": arms})


@dataclass
class Asked:
    """What a person asked a comparison for, before anything is chosen."""

    settings: dict[str, Any]  # of the baseline
    changes: list[Change]
    baseline: tuple[str, ...]
    explainer: str | None
    metric: str
    pairs: int | None
    margin: float | None
    budget: Budget | None
    minutes: float | None
    early: bool
    race: bool
    samples: int | None
    workers: int | None
    alpha: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Planner:
    """Surveys the arms and settles the plan. ``began`` is when the person's minutes began."""

    def __init__(self, asked: Asked, hands: Hands, began: float) -> None:
        self.asked, self.hands, self.began = asked, hands, began
        self.threads = 1
        self.steps = STEPS[1]
        self.notes: list[str] = []
        self.refused: list[dict[str, str]] = []

    def plan(self) -> Plan:
        asked = self.asked
        facts = self._open(asked.settings)
        workers = self._use_machine(facts)
        facts = self._smaller_pictures(facts)
        seen = self._survey_all(facts, [BASELINE, *asked.changes])
        base = self._arm(facts, BASELINE, seen, None, 1.0)
        arms = self._arms(facts, seen, base, 1.0)
        pairs, share = self._pairs(base, arms)
        if share < 1:
            self.refused.clear()
            base = self._arm(facts, BASELINE, seen, None, share)
            arms = self._arms(facts, seen, base, share)
            self.notes.append(f"each run gets {share:.0%} of its usual length, so that all fit in {asked.minutes:g} minutes")
        unit = asked.budget.unit if asked.budget else "images"
        budget = {"unit": unit, "value": asked.budget.value * share if asked.budget else base.images}
        budget |= {"images": base.images, "steps": base.settings["steps"], "epochs": base.settings["epochs"], "seconds": base.seconds}
        looks = statistics.looks(pairs, asked.early or asked.race)
        facts["notes"] = [*facts["notes"], *self.notes]
        seed = int(asked.settings.get("seed") or 0)
        return Plan(facts, budget, base, arms, self.refused, seed, pairs, list(looks.pairs), workers, self.threads, asked.samples)

    def _arms(self, facts: dict[str, Any], seen: dict[str, dict[str, Any]], base: Arm, share: float) -> dict[str, Arm]:
        """The arm of every change that can be tried; others are refused with their reason."""
        arms: dict[str, Arm] = {}
        for change in self.asked.changes:
            try:
                arms[change.text] = self._arm(facts, change, seen, base, share)
            except (Mistake, RuntimeError) as reason:
                if not self.asked.race:  # asked for by name: a mistake; in a race it is left out
                    raise
                self.refused.append({"change": change.text, "reason": str(reason).strip().splitlines()[-1]})
        if not arms:
            raise Mistake("nothing is left to compare: " + "; ".join(f"{row['change']}: {row['reason']}" for row in self.refused))
        return arms

    # -- the data and the machine --------------------------------------------------------------------

    def digest(self, settings: dict[str, Any]) -> str:
        """The hash of the data as they are now."""
        return str(self._one({"do": "open", "settings": settings})["digest"])

    def _open(self, settings: dict[str, Any]) -> dict[str, Any]:
        others = any(change.model is not None or any(kind_of(spec) == "layer" for spec in change.specs) for change in self.asked.changes)
        facts = self._one({"do": "open", "settings": settings, "every_kernel": others})
        if not facts["rows"]["test"]:
            raise Mistake(f"{facts['origin']}: has no test part to compare on; give --test a share above 0")
        return facts

    def _use_machine(self, facts: dict[str, Any]) -> int:
        """Several processes of one thread, or one of several threads: what trains the baseline faster here."""
        asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # a person may hold threads back
        cores = min(processors(), int(asked)) if asked.isdigit() and int(asked) else processors()
        if isinstance(self.hands, Here):
            self.threads = self.hands.threads
            return 0
        if not isinstance(self.hands, Workers):
            return self.hands.count
        if facts["environment"].get("cuda") or cores == 1 == self.hands.count:
            self.threads = cores
            self.hands.keep(1)  # an accelerator is not shared by halves
            return 1
        if self.asked.workers is not None:
            self.threads = max(1, cores // self.asked.workers)
            return self.asked.workers
        job: Job = {"do": "survey", "settings": self._settings(facts, (), None)}
        first = self._many([{**job, "steps": 2, "threads": 1}] * self.hands.count)  # pays what only the first run of a process pays
        step = int(facts["settings"]["batch"]) / max(min(pace(row) for row in first), 1e-9)  # seconds
        self.steps = min(max(math.ceil(PATIENCE / step), STEPS[0]), STEPS[1])
        job["steps"] = 2 * self.steps if self.steps == STEPS[1] else self.steps
        together = self._many([{**job, "threads": 1}] * self.hands.count)
        alone = self._many([{**job, "threads": cores}])
        many, one = (sum(pace(row) for row in rows) for rows in (together, alone))
        if many >= one:
            self.notes.append(f"{self.hands.count} processes of one thread: {many:.0f} images/s, measured, against {one:.0f} in one of {cores} threads")
            return self.hands.count
        self.threads = cores
        self.notes.append(f"one process of {cores} threads: {one:.0f} images/s, measured, against {many:.0f} in {self.hands.count} of one thread")
        self.hands.keep(1)
        return 1

    def _smaller_pictures(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Halve the side of pictures, where nothing was said about it and the minutes allow only a few passes."""
        asked = self.asked
        if asked.minutes is None or asked.settings.get("size") or asked.budget or facts["kind"] != "image":
            return facts
        while min(facts["size"]) > 32:
            base = self._arm(facts, BASELINE, self._survey_all(facts, [BASELINE]), None, 1.0)
            arms = 1 + sum(change.kind == "train" for change in asked.changes)
            runs = arms * (asked.pairs or statistics.fewest_pairs(asked.alpha))
            spared = asked.minutes * 60 * self.hands.count / runs / max(base.seconds, 1e-9)  # of a whole run, for each
            if spared * float(facts["settings"]["epochs"] or 1) >= FEW_EPOCHS:
                break
            side = min(facts["size"]) // 2
            model = facts["settings"]["model"] if asked.settings.get("model") else None
            facts = self._open({**asked.settings, "size": side, "model": model})
            self.notes.append(f"pictures of {side} px: at {2 * side} px these minutes would allow fewer than {FEW_EPOCHS} passes; --size keeps another")
        return facts

    # -- one arm ---------------------------------------------------------------------------------------

    def _settings(self, facts: dict[str, Any], specs: tuple[str, ...], model: str | None) -> dict[str, Any]:
        """The baseline's settings with these parts, at the length that the budget names or the baseline has by itself."""
        base, asked = facts["settings"], self.asked.budget
        length: dict[str, Any] = {"steps": max(int(base["epochs"] or 0), 1) * per_epoch(facts), "epochs": max(int(base["epochs"] or 0), 1)}
        if asked is not None and asked.unit == "epochs":
            length = {"epochs": max(1, round(asked.value)), "steps": None}
        elif asked is not None and asked.unit == "steps":
            length = {"steps": max(1, round(asked.value)), "epochs": math.ceil(asked.value / per_epoch(facts))}
        together = with_parts(tuple(base["parts"]), specs)
        usual = None if model is None else usual_optimizer(model, together, base["lr"])
        return {**base, "parts": (*together, usual) if usual else together, "model": model or base["model"], "minutes": None, **length}

    def _survey_all(self, facts: dict[str, Any], changes: list[Change]) -> dict[str, dict[str, Any]]:
        """A survey of every change that is trained, side by side; mistakes stay in the results."""
        trained = [change for change in changes if change.kind == "train"]
        jobs = [self._survey(facts, change.specs, change.model) | {"of": change.text} for change in trained]
        found: dict[str, dict[str, Any]] = {}
        self.hands.run(jobs, lambda job, result: found.__setitem__(job["of"], result))
        return found

    def _survey(self, facts: dict[str, Any], specs: tuple[str, ...], model: str | None) -> Job:
        made = self._settings(facts, specs, model)
        return {"do": "survey", "settings": made, "steps": self.steps, "operations": True, "threads": self.threads, "samples": self.asked.samples}

    def _arm(self, facts: dict[str, Any], change: Change, seen: dict[str, dict[str, Any]], base: Arm | None, share: float) -> Arm:
        """Settings that spend the budget (times ``share``), from the change's survey; the baseline's where nothing is trained."""
        if change.kind != "train":
            assert base is not None
            return Arm(base.settings, 0.0, 0.0, 0.0, 1.0)
        if base is not None and change.model is None and with_parts(tuple(base.settings["parts"]), change.specs) == tuple(base.settings["parts"]):
            raise Mistake(f"{change.text!r} stands in the baseline already")
        survey, specs, note = usable(seen[change.text]), change.specs, ""
        made = self._settings(facts, specs, change.model)
        asked, length = self.asked.budget, 1.0
        unit = asked.unit if asked is not None else "images"
        if unit in ("images", "seconds"):
            whole = survey["before"][unit] + survey["main"][unit]
            goal = asked.value * share if asked is not None else whole * share
            if base is not None and unit == "images":
                goal = base.images
            if base is not None and survey["before"][unit] > goal / 2:
                specs, note = shorter(change, survey, goal, unit)
                survey = self._one(self._survey(facts, specs, change.model))
                made = self._settings(facts, specs, change.model)
            steps = int(made["steps"])
            found = int((goal - survey["before"][unit]) / max(survey["main"][unit] / steps, 1e-9) + 1e-6)
            if found < 1:
                raise Mistake(f"{change.text}: a budget of {goal:g} {unit} is less than one step takes; give more")
            length = found / steps
        elif share < 1:
            length = share
        if length != 1.0:
            steps = max(1, round((made["steps"] or int(made["epochs"]) * per_epoch(facts)) * length))
            made = {**made, "steps": steps, "epochs": math.ceil(steps / per_epoch(facts))}
        if change.model is not None and (added := set(made["parts"]) - set(with_parts(tuple(facts["settings"]["parts"]), specs))):
            note = f"{', '.join(added)}: what {change.model} is usually trained with; {change.text}+OPTIMIZER names another"
        return self._described(made, survey, length, base, note)

    def _described(self, made: dict[str, Any], survey: dict[str, Any], length: float, base: Arm | None, note: str) -> Arm:
        def total(what: str) -> float:
            return survey["before"][what] + survey["main"][what] * length

        same = None
        if base is None:
            self._base_weights = survey["weights"]
        else:
            weights = survey["weights"]
            count = sum(n for n, _ in weights.values())
            same = sum(n for name, (n, digest) in weights.items() if self._base_weights.get(name) == [n, digest]) / max(count, 1)
        return Arm(made, total("seconds") + survey["closing"] * (int(made["epochs"] or 1) + 3), total("images"), total("operations"), same, note)

    # -- pairs and minutes -----------------------------------------------------------------------------

    def _pairs(self, base: Arm, arms: dict[str, Arm]) -> tuple[int, float]:
        """How many pairs, and the share of the budget each run gets, so that all fits in the minutes."""
        asked = self.asked
        if asked.minutes is None:
            return asked.pairs or 8, 1.0
        left = (asked.minutes * 60 - (time.monotonic() - self.began)) * 0.9  # the rest: uneven ends, the report
        pair = (base.seconds + sum(arm.seconds for arm in arms.values())) / max(self.hands.count if self.threads == 1 else 1, 1)
        affordable = left / pair
        if asked.pairs is not None:
            pairs = asked.pairs
        elif asked.budget is not None or affordable >= 8:
            pairs = min(int(affordable), MOST_PAIRS)
        else:
            pairs = statistics.fewest_pairs(asked.alpha)
        share = min(affordable / max(pairs, 1), 1.0)
        if pairs < 2 or share < 0.01:
            need = 6 * pair * 0.1 / 60
            raise Mistake(f"--minutes {asked.minutes:g}: one pair of runs takes about {pair:.0f} s; give at least {need:.0f} minutes, fewer changes, or --size")
        return pairs, share

    # -- jobs ------------------------------------------------------------------------------------------

    def _one(self, job: Job) -> dict[str, Any]:
        return self._many([job])[0]

    def _many(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """The results of these jobs; the first mistake or defect is raised."""
        found: list[dict[str, Any]] = []
        self.hands.run([{"threads": self.threads, "samples": self.asked.samples, **job} for job in jobs], lambda _job, result: found.append(result))
        return [usable(result) for result in found]


def usable(result: dict[str, Any]) -> dict[str, Any]:
    """The result of a job, or its mistake or defect raised."""
    if "mistake" in result:
        raise Mistake(result["mistake"])
    if "defect" in result:
        raise RuntimeError(result["defect"])
    return result


def shorter(change: Change, survey: dict[str, Any], goal: float, unit: str) -> tuple[tuple[str, ...], str]:
    """Fewer epochs for a pretext that would eat more than half of the budget; refused where the person chose them."""
    for at, spec in enumerate(change.specs):
        name, options = parts.parse(spec)
        known = parts.get(name).options()
        if "epochs" in known and "epochs" not in options and isinstance(known["epochs"].default, int):
            default = known["epochs"].default
            fewer = int(default * goal / 2 / survey["before"][unit])
            if fewer >= 1:
                spelt = parts.spell(name, {**options, "epochs": fewer})
                return (*change.specs[:at], spelt, *change.specs[at + 1 :]), f"{name}: {fewer} epochs in place of {default}, half of the budget"
    names = ", ".join(survey["before"]["stages"]) or "its members"
    raise Mistake(f"{change.text}: {names} take {survey['before'][unit]:,.0f} of {goal:,.0f} {unit}; give a larger --budget, or fewer epochs to them")


def per_epoch(facts: dict[str, Any]) -> int:
    """Steps of a plain epoch."""
    return max(int(facts["labelled"]) // int(facts["settings"]["batch"]), 1)


def pace(survey: dict[str, Any]) -> float:
    """Images a second of the main stages."""
    return survey["main"]["images"] / max(survey["main"]["seconds"], 1e-9)


def processors() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
