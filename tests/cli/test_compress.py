"""convince compress: a smaller run that opens again, its numbers, and what is refused in words."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from convince.cli import main
from convince.cli.compress import amount
from convince.cli.runs import data_of
from convince.errors import Mistake
from convince.fit.folder import open_run
from convince.fit.settings import settings
from convince.fit.train import train
from convince.types import Budget


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network on the embedded digits."""
    from convince.data import load

    folder = tmp_path_factory.mktemp("runs") / "digits"
    asked = settings(model="resnet:layers=(1,1),widths=(8,16)", epochs=2, batch=64, lr=0.1, precision="fp32", augment="none")
    train(asked, load("digits"), folder=folder)
    return folder


@pytest.fixture
def convince(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Call the command line: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convince", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr()
        return int(end.value.code or 0), out.out, out.err

    return call


def test_compressed_run_opens_and_answers_as_measured(run: Path, convince: Any, tmp_path: Path) -> None:
    out = tmp_path / "small"
    code, text, error = convince("compress", run, "--with", "int8", "--out", out, "--json")
    assert code == 0, error
    result = json.loads(text)
    assert set(result) == {"run", "from", "parts", "calibrated_on", "n", "before", "after"}
    for row in (result["before"], result["after"]):
        assert set(row) == {"accuracy", "accuracy_interval", "bytes", "macs", "seconds"}
        assert row["accuracy_interval"][0] <= row["accuracy"] <= row["accuracy_interval"][1]
        assert row["seconds"] > 0
    before, after = result["before"], result["after"]
    assert after["bytes"] < 0.35 * before["bytes"]
    assert after["macs"] == before["macs"]
    assert abs(after["accuracy"] - before["accuracy"]) < 0.03
    assert before["accuracy"] > 0.5
    assert result["calibrated_on"] == 1258
    assert json.loads((out / "compress.json").read_text()) == result
    loaded = open_run(out)
    assert loaded.run.model.conv1.weight.dtype == torch.int8
    data, rows = data_of(loaded, None)
    right = loaded.logits(data.x.take(rows)).argmax(1) == data.y[rows]
    assert float(right.double().mean()) == after["accuracy"]
    assert (out / "model.safetensors").stat().st_size < 0.5 * (run / "model.safetensors").stat().st_size
    assert [edit["part"] for edit in json.loads((out / "structure.json").read_text())["edits"]] == ["int8"]
    assert (out / "config.yaml").read_text() == (run / "config.yaml").read_text()


def test_text_for_a_person_and_the_original_left_alone(run: Path, convince: Any, tmp_path: Path) -> None:
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, text, _ = convince("compress", run, "--with", "int8:w_bits=4,a_bits=0", "--images", 50)
    assert code == 0
    assert text.splitlines()[1].startswith("before")
    assert "times smaller" in text
    assert (tmp_path / "runs" / "digits-int8-1" / "structure.json").exists()
    assert kept == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_other_data_can_judge(run: Path, convince: Any, tmp_path: Path) -> None:
    import numpy as np

    from convince.data import load

    data = load("digits")
    np.savez(tmp_path / "other.npz", x=data.x.take(data.split.val).numpy()[:, 0], y=data.y[data.split.val].numpy())
    code, text, error = convince("compress", run, tmp_path / "other.npz", "--with", "int8", "--json")
    assert code == 0, error
    assert json.loads(text)["n"] == len(data.split.val)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--with", "int9"), "did you mean 'int8'"),
        (("--with", "flip-crop"), "not compressor"),
        (("--with", "int8:w_bits=9"), "w_bits=9"),
        (("--with", "int8:bits=4"), "no option 'bits'"),
        (("--with", "int8", "--budget", "0.05"), "more than the budget"),
        (("--with", "int8", "--budget", "lots"), "--budget lots"),
        (("--with", "int8", "--images", "0"), "--images 0"),
        ((), "--with"),
    ],
)
def test_mistakes_exit_with_two_and_say_why(run: Path, convince: Any, words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    code, text, error = convince("compress", run, *words, "--json")
    assert code == 2
    assert says in error
    assert says in json.loads(text)["error"]
    assert not (tmp_path / "runs").exists()


def test_a_run_is_compressed_once_and_must_exist(run: Path, convince: Any, tmp_path: Path) -> None:
    assert convince("compress", run, "--with", "int8", "--out", tmp_path / "small")[0] == 0
    code, _, error = convince("compress", tmp_path / "small", "--with", "int8")
    assert code == 2
    assert "already" in error
    code, _, error = convince("compress", tmp_path / "nothing", "--with", "int8")
    assert code == 2
    assert "no such run" in error


def test_table_runs_are_refused(convince: Any, tmp_path: Path) -> None:
    from convince.checks.subject import tiny_table

    train(settings(model="mlp:hidden=(8,)", epochs=1, batch=8), tiny_table(), folder=tmp_path / "table")
    from convince.compress.int8 import Int8

    with pytest.raises(Mistake, match="no convolution"):
        Int8().plan(open_run(tmp_path / "table").answer, torch.zeros(4, 5))


def test_amounts() -> None:
    assert amount("25%") == amount("0.25") == Budget(0.25, "bytes")
    assert amount("300000bytes") == Budget(300000, "bytes")
    assert amount("0.5macs") == Budget(0.5, "macs")
    for wrong in ("0", "150%", "-1", "5 apples"):
        with pytest.raises(Mistake, match="--budget"):
            amount(wrong)


def test_qat_run_compresses_to_its_bits(convince: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run trained with simulated 4-bit weights keeps its accuracy in the codes."""
    from convince.data import load

    asked = settings(model="resnet:layers=(1,1),widths=(8,16)", epochs=2, batch=64, lr=0.1, precision="fp32", augment="none", parts=("qat:w_bits=4",))
    trained = train(asked, load("digits"), folder=tmp_path / "qat")
    code, _, error = convince("compress", tmp_path / "qat", "--with", "int8", "--json")
    assert code == 2
    assert "int8:w_bits=4" in error
    code, text, error = convince("compress", tmp_path / "qat", "--with", "int8:w_bits=4", "--json", "--out", tmp_path / "small")
    assert code == 0, error
    result = json.loads(text)
    assert trained.test is not None
    assert result["before"]["accuracy"] == trained.test.accuracy
    assert abs(result["after"]["accuracy"] - result["before"]["accuracy"]) <= 0.01
    assert yaml.safe_load((tmp_path / "small" / "config.yaml").read_text())["parts"] == ["qat:w_bits=4"]
    assert open_run(tmp_path / "small").run.edits[-1]["part"] == "int8"
