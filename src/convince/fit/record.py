"""What a run measured: metrics.jsonl (the truth, cut back on resume) and TensorBoard events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Record:
    """Rows of numbers, kept in memory and, with a folder, appended to ``metrics.jsonl``."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self._events: Any = None

    @property
    def path(self) -> Path | None:
        return None if self.folder is None else self.folder / "metrics.jsonl"

    def row(self, **values: Any) -> None:
        """Append a row and push it out at once."""
        self.rows.append(values)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            self._event(values)

    def reading(self, name: str, value: float, unit: str, stage: int, epoch: int, step: int) -> None:
        """Append a named number that a part reported."""
        self.row(kind="reading", name=name, value=value, unit=unit, stage=stage, epoch=epoch, steps=step)

    def cut(self, count: int) -> None:
        """Keep the first ``count`` rows: what a checkpoint had seen. Lines half written are dropped."""
        if self.path is None or not self.path.exists():
            self.rows = self.rows[:count]
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()[:count]
        self.rows = [json.loads(line) for line in lines]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, self.path)

    def _event(self, values: dict[str, Any]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            assert self.folder is not None
            self._events = SummaryWriter(str(self.folder / "events"), purge_step=values.get("steps", 0))
        step = values.get("steps", 0)
        if values.get("kind") == "reading":
            self._events.add_scalar(f"parts/{values['name']}", values["value"], step)
        else:
            for name, value in values.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._events is not None:
            self._events.close()
            self._events = None
