"""Runs the command line in this process, and makes one small run that the tests of a module share."""

import json
import sys
from dataclasses import dataclass

import pytest

from convince.cli import main


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """``cli("train", "digits")`` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["convince", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Done(int(end.value.code or 0), out, err)

    return call


SMALL = ("--model", "small-cnn:widths=(4,8)", "--epochs", "2")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run on digits, trained once, with a part that measures."""
    from convince.data import load
    from convince.fit.settings import settings
    from convince.fit.train import train
    from convince.report.run import write_run_report

    folder = tmp_path_factory.mktemp("runs") / "digits"
    result = train(settings(data="digits", model="small-cnn:widths=(8,16)", epochs=4, parts=("example-forgetting",)), load("digits"), folder=folder)
    write_run_report(result)
    (folder / "checkpoint.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of two classes of PNG files, one damaged."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("photos")
    gen = np.random.default_rng(0)
    for name, low in (("dunkel_ü", 0), ("hell", 120)):
        (root / name).mkdir()
        for i in range(12):
            Image.fromarray(gen.integers(low, low + 130, (20, 16, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    (root / "hell" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    return root
