"""The exact optimum of DeepMAD's design problem over a grid of choices, by an integer program."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from convince.backbones.deepmad import Stage
from convince.search.deepmad_entropy import BETA, log_width, shaped, stage_cost, uneven, weights
from convince.search.space import Genes, Space

if TYPE_CHECKING:
    from convince.search.deepmad_search import Problem


class Program:
    """``maximise c x`` under linear rows, built variable by variable."""

    def __init__(self) -> None:
        self.gain: list[float] = []
        self.whole: list[int] = []
        self.top: list[float] = []
        self.cells: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def variable(self, gain: float = 0.0, whole: bool = True, top: float = 1.0) -> int:
        """A new variable of 0 to ``top``; its number."""
        self.gain.append(gain)
        self.whole.append(int(whole))
        self.top.append(top)
        return len(self.gain) - 1

    def row(self, terms: dict[int, float], low: float = -math.inf, high: float = math.inf) -> None:
        """``low <= sum of factor * variable <= high``."""
        self.cells += [(len(self.low), at, factor) for at, factor in terms.items() if factor]
        self.low.append(low)
        self.high.append(high)

    def solve(self) -> np.ndarray | None:
        """The variables of the optimum, or None where no setting keeps all rows."""
        rows, columns, values = zip(*self.cells, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(self.low), len(self.gain))).tocsr()
        answer = milp(
            -np.array(self.gain),
            integrality=np.array(self.whole),
            bounds=Bounds(0, np.array(self.top)),
            constraints=LinearConstraint(matrix, np.array(self.low), np.array(self.high)),
            options={"mip_rel_gap": 1e-7},
        )
        return answer.x


def optimum(problem: Problem, space: Space) -> Genes | None:
    """The choices of ``space`` with the largest objective within all limits, or None where there are none.

    A stage with its input channels is one binary variable, and neighbours must agree. The depths of all stages together are one
    further choice, in which the penalty and the bound on rho (``S >= L (log L - log rho)``, S the sum of log-widths, L the
    convolutions) are linear. In the entropy S is multiplied by the log of the channels there: S is split into one share for each
    such number, of which only the chosen one may be above 0.
    """
    program, (_, *strides) = Program(), problem.strides
    side = math.ceil(problem.size / problem.strides[0])
    stem = {c: program.variable() for c in space.choices["stem"]}
    program.row(dict.fromkeys(stem.values(), 1.0), 1, 1)
    work = {at: 9.0 * problem.in_chans * c * side**2 for c, at in stem.items()}
    size = {at: (9.0 * problem.in_chans + 2) * c for c, at in stem.items()}
    width = [{at: math.log(9 * problem.in_chans) for at in stem.values()}]  # terms of S up to each stage's end, the stem being stage 0
    out: list[dict[int, set[int]]] = [{c: {at} for c, at in stem.items()}]  # variables of a stage by its channels out
    sides = [side]
    made: list[dict[tuple[int, Stage], int]] = []  # of each stage, by its channels in and its form
    for i, stride in enumerate(strides, 1):
        values = [space.choices[f"{what}{i}"] for what in ("blocks", "bottleneck", "out", "kernel")]
        rows = (Stage(blocks, bottleneck, c, kernel, stride) for blocks, bottleneck, c, kernel in itertools.product(*values))
        pairs = ((c_in, stage) for stage in rows for c_in in out[-1])
        mine = {(c_in, stage): program.variable() for c_in, stage in pairs if shaped(c_in, stage, problem.block, side)}
        for c_in, before in out[-1].items():
            program.row(dict.fromkeys(before, -1.0) | {at: 1.0 for (c, _), at in mine.items() if c == c_in}, 0, 0)
        for (c_in, stage), at in mine.items():
            work[at], size[at] = stage_cost(c_in, stage, problem.block, side)
        if made:  # the bottlenecks never narrow
            earlier = {at: -float(stage.bottleneck) for (_, stage), at in made[-1].items()}
            program.row({**earlier, **{at: float(stage.bottleneck) for (_, stage), at in mine.items()}}, low=0)
        width.append({**width[-1], **{at: log_width(c_in, stage, problem.block) for (c_in, stage), at in mine.items()}})
        out.append({c: {at for (_, stage), at in mine.items() if stage.out == c} for c in space.choices[f"out{i}"]})
        made.append(mine)
        side = math.ceil(side / stride)
        sides.append(side)
    for c, ends in out[-1].items():
        for at in ends:
            work[at], size[at] = work[at] + c * problem.classes, size[at] + (c + 1) * problem.classes
    program.row({at: w / problem.macs for at, w in work.items()}, high=1)
    program.row({at: n / problem.parameters for at, n in size.items()}, high=1)

    depths = [space.choices[f"blocks{i}"] for i in range(1, len(strides) + 1)]
    plans = {plan: program.variable(-BETA * uneven(plan, problem.block), whole=False) for plan in itertools.product(*depths)}
    for i, mine in enumerate(made):
        for blocks in depths[i]:
            chosen = {at: -1.0 for (_, stage), at in mine.items() if stage.blocks == blocks}
            program.row({**chosen, **{at: 1.0 for plan, at in plans.items() if plan[i] == blocks}}, 0, 0)
    resolutions = [i for i, stride in enumerate(strides) if stride == 2] + [len(strides)]  # the stages at whose end one ends
    for alpha, i in zip(weights(len(resolutions)), resolutions, strict=True):
        bound = {plans[plan]: -n * (math.log(n) - math.log(problem.rho)) for plan in plans for n in [1 + 3 * sum(plan[:i])]}
        program.row({**width[i], **bound}, low=0)
        top = (i + 1) * max(width[i].values())
        shares = {c: program.variable(alpha * (math.log(c) + 2 * math.log(sides[i])) / 2, whole=False, top=top) for c in out[i]}
        program.row({**width[i], **dict.fromkeys(shares.values(), -1.0)}, 0, 0)
        for c, at in shares.items():
            program.row({at: 1.0, **dict.fromkeys(out[i][c], -top)}, high=0)

    x = program.solve()
    if x is None:
        return None
    genes = {"stem": next(c for c, at in stem.items() if x[at] > 0.5)}
    for i, mine in enumerate(made, 1):
        stage = next(stage for (_, stage), at in mine.items() if x[at] > 0.5)
        genes |= {f"blocks{i}": stage.blocks, f"bottleneck{i}": stage.bottleneck, f"out{i}": stage.out, f"kernel{i}": stage.kernel}
    return {name: genes[name] for name in space.choices}
