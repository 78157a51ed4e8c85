"""Worker processes: the same result as here, a death that costs one job's time, and nothing left behind."""

import os
import signal

import pytest

from convince.comparison import worker
from convince.comparison.hands import Here, Workers, end, start
from convince.fit.settings import settings

SETTINGS = settings(model="small-cnn:widths=(4,8)", epochs=1, batch=64, augment="none", precision="fp32").model_dump(mode="json")
JOB = {"do": "train", "settings": SETTINGS, "samples": 128, "threads": 1, "metrics": ["accuracy"]}


def did(hands, *jobs):
    out = []
    hands.run(list(jobs), lambda job, result: out.append((job, result)))
    return out


@pytest.fixture(scope="module")
def workers():
    hands = Workers(1)
    yield hands
    hands.close()


def test_a_worker_gives_the_bits_of_this_process(workers):
    (_, there), (_, here) = *did(workers, JOB), *did(Here(), JOB)
    assert there["weights_sha256"] == here["weights_sha256"]
    assert there["metrics"] == here["metrics"]
    assert there["curve"] == here["curve"]


def test_a_mistake_comes_back_in_words(workers):
    ((_, result),) = did(workers, {**JOB, "settings": {**SETTINGS, "parts": ["triplet-network", "oversampling"]}})
    assert "both own the order" in result["mistake"]


def test_a_defect_comes_back_as_a_trace(workers):
    ((_, result),) = did(workers, {**JOB, "metrics": ["no such metric"]})
    assert "mistake" in result or "defect" in result


def test_a_worker_that_dies_is_replaced_and_its_job_done_again(workers):
    os.kill(workers._processes[0].pid, signal.SIGKILL)
    ((_, result),) = did(workers, JOB)
    assert result["metrics"]["accuracy"] > 0


def test_a_job_that_kills_twice_is_told_and_the_next_goes_on(workers, monkeypatch):
    real = workers._ask
    monkeypatch.setattr(workers, "_ask", lambda at, job: None if job.get("deadly") else real(at, job))
    results = {job.get("deadly", False): result for job, result in did(workers, {**JOB, "deadly": True}, JOB)}
    assert "died twice" in results[True]["mistake"]
    assert "metrics" in results[False]


def test_the_input_ends_and_so_does_the_worker():
    process = start()
    process.stdin.close()
    assert process.wait(timeout=120) == 0
    end(process)


def test_a_worker_leaves_when_its_parent_has_gone(monkeypatch):
    left = []
    monkeypatch.setattr(worker.os, "getppid", lambda: 1)
    monkeypatch.setattr(worker.os, "_exit", left.append)
    worker.leave_with_parent(999_999)
    assert left == [1]
