"""A survey: a few steps of every stage, to know what a training will take before it starts.

``--minutes`` becomes steps by it, and a comparison gives both arms the same number of images. Bits are
promised for steps, not for seconds, so what is found is written to the config before step 0.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

from convince.data import Data
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import Settings
from convince.fit.train import prepare
from convince.types import Split, StageCost

FEW = 256  # validation rows of a survey


@dataclass(frozen=True)
class Survey:
    """What the stages of a training will take: those ``before`` the main ones, and the ``main`` ones.

    A stage's marks are seconds, or operations where those were counted; ``closing`` are the seconds at the end of an epoch.
    """

    run: Run
    before: list[StageCost]
    main: list[StageCost]
    closing: float
    began: float

    def images_of(self, stages: list[StageCost]) -> float:
        """Rows through the network in training, as planned."""
        return sum(stage.planned * stage.images / max(stage.steps, 1) for stage in stages)

    def amount_of(self, stages: list[StageCost]) -> float:
        """Seconds of training (or operations), as planned."""
        return sum(stage.planned * each(stage.marks, self.began) for stage in stages)


def survey(settings: Settings, data: Data, steps: int = 12, *, operations: bool = False) -> Survey:
    """Do ``steps`` of every stage of a training that is then thrown away; the one that follows starts anew.

    The validation part is cut to 256 rows, and what the end of an epoch takes is reckoned up to the whole of it. With
    ``operations`` the floating-point operations of forward and backward passes are counted instead of seconds (convolutions
    and matrix products, as torch's counter sees them).
    """
    split = data.split
    few = split.val[:0] if operations else split.val[:FEW]
    run = prepare(settings, dataclasses.replace(data, split=Split(split.train, few, split.test)))
    run.most_steps = steps
    began = time.monotonic()
    if operations:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            run.meter = counter.get_total_flops
            fit(run)
        began = 0.0
    else:
        fit(run)
    last = max((stage.marks[-1] for stage in run.ledger if stage.marks), default=began)
    closing = 0.0 if operations else max(time.monotonic() - last, 0.0) * max(len(split.val) / max(len(few), 1), 1)
    return Survey(run, [c for c in run.ledger if not c.main], [c for c in run.ledger if c.main], closing, began)


def each(marks: list[float], began: float) -> float:
    """What a step adds to the meter, the first third of the steps left out."""
    counted = marks[len(marks) // 3 :]
    if len(counted) > 1:
        return (counted[-1] - counted[0]) / (len(counted) - 1)
    return marks[-1] - began if marks else 0.0


def pilot(settings: Settings, data: Data, steps: int = 12) -> tuple[Settings, str]:
    """Turn minutes into steps of the main stages. Stages before them keep their epochs; what they will take is counted off."""
    assert settings.minutes is not None
    assert settings.batch is not None
    budget = settings.minutes * 60 * 0.92  # the rest: loading, evaluation, the report
    per_epoch = max(len(data.split.train) // settings.batch, 1)
    seen = survey(settings.updated(minutes=None, epochs=1), data, steps)
    before = seen.amount_of(seen.before)
    one = max(each(stage.marks, seen.began) for stage in seen.main)
    main = max(one, seen.amount_of(seen.main) / per_epoch)  # members train too, each as long
    found = int((budget - before) / (main + seen.closing / per_epoch))
    if found < 1:
        names = ", ".join(stage.name for stage in seen.before)
        part = f"the stages before ({names}) take {before / 60:.1f} minutes" if names else f"one step takes {main:.1f} s"
        raise Mistake(f"--minutes {settings.minutes:g}: {part} here; give more minutes, fewer epochs to those stages, or a smaller --model or --size")
    epochs = math.ceil(found / per_epoch)
    note = f"{settings.minutes:g} minutes: {found} steps ({epochs} epochs), from a pilot at {main * 1000:.0f} ms a step"
    return settings.updated(minutes=None, steps=found, epochs=epochs), note
