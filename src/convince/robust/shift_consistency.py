"""Shift consistency: how often a one-pixel shift of the camera changes an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.kinds import Probe, as_found
from convince.parts import Card
from convince.robust.rics import cyclic_shift, realistic_shift, takes, zero_pad_shift
from convince.types import Bars, Findings, Reading

CARD = Card(
    part="shift-consistency",
    kind="probe",
    paper="rics",
    title="Lost in Translation: Modern Neural Networks Still Struggle With Small Realistic Image Transformations",
    year=2024,
    url="https://arxiv.org/abs/2404.07153",
    expects=("images", "labels"),
    departs=(
        "both frames are crops of the image given, 2 x pixels smaller than it, since no larger picture is at hand; "
        "a network that refuses the size gets them enlarged",
        "a representation has changed where its cosine similarity is below 0.9; this bound is ours",
        "all eight neighbours are tried for both figures: single shifts are their mean, the attack is the worst of them",
    ),
)


def neighbours(pixels: int = 1) -> tuple[tuple[int, int], ...]:
    """The eight shifts (down, right) by ``pixels``."""
    return tuple((a, b) for a in (-pixels, 0, pixels) for b in (-pixels, 0, pixels) if (a, b) != (0, 0))


@torch.no_grad()
def consistency(
    answer: Callable[[Tensor], Tensor], frame: Float[Tensor, "n c h w"], shifted: Sequence[Float[Tensor, "n c h w"]], y: Int[Tensor, " n"], batch: int = 256
) -> dict[str, float]:
    """Answers for a frame and its shifts: shares of images, 0 to 1.

    ``flips``: changed top-1, mean over the shifts; ``worst_flips``: changed by any of them; ``moved``: mean
    absolute change of the first answer's probability; ``accuracy`` of the frame; ``worst_accuracy``: right in
    the frame and in every shift.
    """
    if not len(frame) or not shifted:
        raise Mistake("consistency needs at least one image and one shift")
    before = _probabilities(answer, frame, batch)
    top = before.argmax(1)
    flips, moved = [], []
    for x in shifted:
        after = _probabilities(answer, x, batch)
        flips.append(after.argmax(1) != top)
        moved.append((after.gather(1, top[:, None]) - before.gather(1, top[:, None])).abs())
    changed, right = torch.stack(flips).double(), (top == y).double()
    return {
        "flips": float(changed.mean()),
        "worst_flips": float(changed.amax(0).mean()),
        "moved": float(torch.stack(moved).double().mean()),
        "accuracy": float(right.mean()),
        "worst_accuracy": float((right * (1 - changed.amax(0))).mean()),
    }


def _probabilities(answer: Callable[[Tensor], Tensor], x: Tensor, batch: int) -> Tensor:
    return torch.cat([full(answer(part)).softmax(1) for part in x.split(batch)])


@torch.no_grad()
def representations(answer: nn.Module, x: Float[Tensor, "n c h w"], batch: int = 256) -> Float[Tensor, "n d"] | None:
    """What the last linear layer of the answer is given, [n d]; None where no such layer sees one row an image."""
    taken: dict[str, Tensor] = {}
    rows = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        taken["last"] = args[0]

    handles = [m.register_forward_pre_hook(keep) for m in answer.modules() if isinstance(m, nn.Linear)]
    try:
        for part in x.split(batch):
            answer(part)
            if "last" not in taken or taken["last"].dim() != 2 or len(taken["last"]) != len(part):
                return None
            rows.append(full(taken.pop("last")))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(rows)


@final
@dataclass
class ShiftConsistency(Probe):
    """Answers for each image and its eight neighbours ``pixels`` away.

    ``kind``: "realistic" (new content enters), "cyclic" (goes round) or "zero-pad" (black enters). ``similar``: a
    representation whose cosine similarity falls below this has changed.
    """

    pixels: int = 1
    kind: str = "realistic"
    similar: float = 0.9

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise Mistake(f"shift-consistency: pixels={self.pixels} must be at least 1")
        if self.kind not in ("realistic", "cyclic", "zero-pad"):
            raise Mistake(f"shift-consistency: kind={self.kind!r} must be 'realistic', 'cyclic' or 'zero-pad'")
        if not -1 <= self.similar <= 1:
            raise Mistake(f"shift-consistency: similar={self.similar} must be a cosine, -1 to 1")

    def frames(self, answer: nn.Module, x: Float[Tensor, "n c h w"]) -> list[Tensor]:
        """The frame as it is, then its eight neighbours."""
        shifts = ((0, 0), *neighbours(self.pixels))
        if self.kind != "realistic":
            shift = cyclic_shift if self.kind == "cyclic" else zero_pad_shift
            return [shift(x, d) for d in shifts]
        side = (x.shape[2] - 2 * self.pixels, x.shape[3] - 2 * self.pixels)
        if min(side) < 1:
            raise Mistake(f"shift-consistency: pixels={self.pixels} leaves nothing of images of {x.shape[2]}x{x.shape[3]}")
        found = [realistic_shift(x, d, side) for d in shifts]
        if takes(answer, x, side):
            return found
        return [F.interpolate(frame, size=x.shape[2:], mode="bilinear", align_corners=False) for frame in found]

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        if x.dim() != 4:
            raise Mistake(f"shift-consistency shifts images [n c h w], and the input has shape {tuple(x.shape)}")
        with as_found(answer), torch.no_grad():
            frame, *shifted = self.frames(answer, x)
            found = consistency(answer, frame, shifted, y)
            before = representations(answer, frame)
            changed = []
            for other in shifted if before is not None else ():
                after = representations(answer, other)
                assert before is not None
                assert after is not None
                changed.append((F.cosine_similarity(before, after) < self.similar).double().mean())
        unit = "share of images"
        readings = [
            Reading("changed answers, one shift", found["flips"], unit),
            Reading("changed answers, worst of 8 shifts", found["worst_flips"], unit),
            Reading("change of the answer's probability", found["moved"], "probability"),
            Reading("accuracy", found["accuracy"], unit),
            Reading("accuracy, worst of 8 shifts", found["worst_accuracy"], unit),
        ]
        if changed:
            readings.append(Reading(f"changed representations, cosine below {self.similar:g}", float(torch.stack(changed).mean()), unit))
        shares = {r.name: r.value for r in readings if r.unit == unit}
        return Findings(readings, [Bars("Answers under small shifts", unit, shares)])
