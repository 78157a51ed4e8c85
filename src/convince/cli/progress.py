"""A progress bar on stderr for work longer than two seconds; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any


class Bar:
    """Call with (done, total, text). Nothing is drawn, and rich not imported, in the first two seconds."""

    def __init__(self, *, every: float = 10.0) -> None:
        self.began = self.last = time.monotonic()
        self.every = every
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if now - self.began < 2:
            return
        if sys.stderr.isatty():
            self._draw(done, total, text)
        elif now - self.last > self.every:
            self.last = now
            print(f"{text}: {done}/{total}, {now - self.began:.0f} s", file=sys.stderr, flush=True)

    def _draw(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(text, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, description=text)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
