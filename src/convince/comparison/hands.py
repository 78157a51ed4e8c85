"""Who does the jobs: this process, worker processes, or a Ray cluster. Same jobs, same results."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from convince import parts
from convince.errors import Mistake

Job = dict[str, Any]
Result = dict[str, Any]
Done = Callable[[Job, Result], None]


@runtime_checkable
class Hands(Protocol):
    """Does jobs in any order, and calls ``done`` for each from the thread that asked.

    A job that would probably end after ``until`` (on the monotonic clock, by its ``estimate`` in seconds) is not
    begun, and ``done`` not called for it.
    """

    count: int  # jobs at the same time

    def run(self, jobs: Sequence[Job], done: Done, until: float = math.inf) -> None: ...

    def close(self) -> None: ...


def late(job: Job, until: float) -> bool:
    """True where a job begun now would probably end after ``until``."""
    return time.monotonic() + job.get("estimate", 0.0) > until


class Here:
    """One job after the other in this process."""

    count = 1

    def __init__(self, data: Any = None) -> None:
        import torch

        from convince.comparison.arm import Desk

        self.desk = Desk(data)
        self.threads = torch.get_num_threads()

    def run(self, jobs: Sequence[Job], done: Done, until: float = math.inf) -> None:
        import torch

        threads = torch.get_num_threads()
        try:
            for job in jobs:
                if late(job, until):
                    continue
                try:
                    result = self.desk.do(job)
                except Exception:  # a defect of one part must not take the other arms with it
                    result = {"defect": traceback.format_exc()}
                done(job, result)
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        """Nothing to take down."""


class Workers:
    """Worker processes of this machine; one that dies is replaced, and its job tried once more."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes = [start() for _ in range(count)]

    def run(self, jobs: Sequence[Job], done: Done, until: float = math.inf) -> None:
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        results: queue.SimpleQueue[tuple[Job, Result | None]] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        for at in range(self.count):
            threading.Thread(target=self._serve, args=(at, waiting, results, until), daemon=True).start()
        for _ in jobs:
            job, result = results.get()
            if result is not None:
                done(job, result)

    def _serve(self, at: int, waiting: queue.SimpleQueue[Job], results: queue.SimpleQueue[tuple[Job, Result | None]], until: float) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            if late(job, until):
                results.put((job, None))
                continue
            result = self._ask(at, job) or self._ask(at, job)
            results.put((job, result or {"mistake": "the process that trained it died twice, perhaps for want of memory; try a smaller --batch or --size"}))

    def _ask(self, at: int, job: Job) -> Result | None:
        """The result of a job, or None where the process died; a new one then stands in its place."""
        process = self._processes[at]
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({**job, "own": own_paths()}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            return json.loads(line)
        except (OSError, ValueError):
            end(process)
            self._processes[at] = start()
            return None

    def keep(self, count: int) -> None:
        """Go on with fewer processes."""
        for process in self._processes[count:]:
            end(process)
        del self._processes[count:]
        self.count = count

    def close(self) -> None:
        for process in self._processes:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a worker process and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def start() -> subprocess.Popen[str]:
    """A worker process; its threads are set by each job."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, "-m", "convince.comparison.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
    )


def own_paths() -> list[str]:
    """A person's own part files, which workers must know too."""
    return [str(path) for path in parts._own]


class Cluster:
    """Tasks of a Ray cluster: ``address`` as ``ray.init`` takes it ("auto", "ray://host:10001", "local").

    The data must be found under the same name on every machine.
    """

    def __init__(self, address: str, threads: int) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise Mistake("--cluster needs the package ray; pip install 'convince[cluster]'") from error
        self.ray = ray
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
        self.count = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        self._task = ray.remote(num_cpus=threads, max_retries=1)(remote_job)

    def run(self, jobs: Sequence[Job], done: Done, until: float = math.inf) -> None:
        left = list(jobs)
        waiting: dict[Any, Job] = {}
        while left or waiting:
            while left and len(waiting) < self.count:
                job = left.pop(0)
                if not late(job, until):
                    waiting[self._task.remote({**job, "own": own_paths()})] = job
            if not waiting:
                continue
            ready, _ = self.ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready[0])
            try:
                result = self.ray.get(ready[0])
            except self.ray.exceptions.RayError as error:
                result = {"mistake": f"the cluster lost this run twice: {str(error).splitlines()[0]}"}
            done(job, result)

    def close(self) -> None:
        self.ray.shutdown()


_desk: Any = None


def remote_job(job: Job) -> Result:
    """One job in a Ray worker, which keeps its data for the next."""
    global _desk
    from convince.comparison.arm import Desk

    for path in job.get("own", ()):
        parts.add_path(path)
    _desk = _desk or Desk()
    try:
        return _desk.do(job)
    except Exception:
        return {"defect": traceback.format_exc()}
