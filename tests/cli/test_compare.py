"""convince compare on the command line: JSON, the page, worker processes, kill and start again, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

SMALL = ("--model", "small-cnn:widths=(4,8)", "--epochs", "1", "--batch", "32", "--samples", "128")


def test_json_has_the_promised_names_and_the_page_stands_alone(cli, tmp_path):
    done = cli("compare", "--with", "cutmix", "--seeds", "2", "--workers", "0", *SMALL, "--json", "--out", "c")
    assert done.code == 0, done.err
    (row,) = done.json["changes"]
    assert set(row) >= {"change", "n", "difference", "interval", "p", "p_corrected", "detectable", "margin", "verdict", "cost"}
    assert row["n"] == 2
    assert row["verdict"] in ("better", "worse", "equivalent", "not decided")
    assert set(row["cost"]["baseline"]) >= {"seconds", "images", "peak_bytes", "operations"}
    assert "permutation test cannot reach" in done.err
    page = (tmp_path / "c" / "compare.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "convince compare digits --with cutmix" in page
    assert json.loads((tmp_path / "c" / "compare.json").read_text())["changes"][0]["differences"] == row["differences"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name changes by --with PART, or a room by --all ROOM"),
        (("--with", "cutmix", "--all", "augment"), "name changes"),
        (("--with", "cutmx"), "cutmix"),
        (("--with", "cutmix", "--budget", "5 minutes"), "write UNIT=NUMBER"),
        (("--with", "cutmix", "--metric", "acc"), "no such metric"),
        (("--all", "kitchen"), "Rooms:"),
    ],
)
def test_mistakes_are_sentences_with_exit_code_two(cli, words, said):
    done = cli("compare", *words)
    assert done.code == 2
    assert said in done.err


def test_a_folder_that_holds_something_else_is_left_alone(cli, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    done = cli("compare", "--with", "cutmix", "--out", "mine")
    assert done.code == 2
    assert "holds no comparison" in done.err
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear"


def test_killed_and_started_again_repeats_no_arm_and_ends_with_the_same_numbers(tmp_path):
    """kill -9 after the first arms are on disk; workers leave with it; what is there is not touched, the rest follows."""
    words = [sys.executable, "-m", "convince", "compare", "--with", "poly1", "--seeds", "3", "--workers", "1", *SMALL, "--json", "--out", "c"]
    whole = subprocess.run([*words[:-1], "whole"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    arms, end = tmp_path / "c" / "arms", time.monotonic() + 300
    while len(list(arms.glob("*.json"))) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in arms.glob("*.json")}
    assert len(done) >= 2
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert {name: (arms / name).stat().st_mtime_ns for name in done} == done
    first, second = json.loads(whole.stdout), json.loads(again.stdout)
    assert second["changes"][0]["differences"] == first["changes"][0]["differences"]
    assert second["changes"][0]["interval"] == first["changes"][0]["interval"]


def test_a_cluster_gives_the_numbers_of_this_machine(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed; pip install 'convince[cluster]'")
    words = [sys.executable, "-m", "convince", "compare", "--with", "poly1", "--seeds", "2", *SMALL, "--json", "--out"]
    told = [
        json.loads(subprocess.run([*words, name, *how], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300).stdout)
        for name, how in (("here", ("--workers", "2")), ("there", ("--cluster", "local")))
    ]
    assert told[0]["changes"][0]["differences"] == told[1]["changes"][0]["differences"]
