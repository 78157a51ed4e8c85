"""The commands: what they print, their exit codes, their JSON, what they leave on disk."""

import csv
import json
import shutil
import subprocess
import sys

import pytest

SMALL = ("--model", "small-cnn:widths=(4,8)", "--epochs", "2")


def test_train_json_is_one_object_with_the_promised_names(cli, tmp_path):
    done = cli("train", *SMALL, "--out", "r", "--json")
    assert done.code == 0, done.err
    assert set(done.json) >= {"run", "model", "parts", "test", "seconds", "samples_per_second", "precision", "skipped", "duplicates", "weights_sha256"}
    assert set(done.json["test"]) == {"n", "accuracy", "accuracy_interval", "log_loss", "ece"}
    assert {"total", "train"} <= set(done.json["seconds"])
    files = {p.name for p in (tmp_path / "r").iterdir()}
    assert files >= {"config.yaml", "model.safetensors", "structure.json", "labels.json", "metrics.jsonl", "environment.json", "report.html", "events"}
    assert "checkpoint.safetensors" not in files


def test_train_on_photographs_names_what_was_skipped(cli, photos, tmp_path):
    done = cli("train", photos, *SMALL, "--size", "16", "--out", "r", "--with", "cutmix", "--with", "poly1:epsilon=2", "--json")
    assert done.code == 0, done.err
    assert [row["file"] for row in done.json["skipped"]] == ["hell/broken.jpg"]
    assert done.json["parts"] == ["cutmix", "poly1:epsilon=2", "flip-crop:flip=0.0"]
    labels = json.loads((tmp_path / "r" / "labels.json").read_text())
    assert labels["classes"] == ["dunkel_ü", "hell"]
    again = cli("predict", "r", photos / "hell" / "3.png", photos / "hell" / "broken.jpg", "--csv", "out.csv", "--json")
    assert again.code == 0
    (row,) = again.json["predictions"]
    assert set(row) == {"file", "label", "probability", "probabilities"}
    assert row["probability"] == pytest.approx(max(row["probabilities"].values()))
    assert [s["file"].split("/")[-1] for s in again.json["skipped"]] == ["broken.jpg"]
    with open(tmp_path / "out.csv", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["file", "label", "probability", "dunkel_ü", "hell"]
    scored = cli("evaluate", "r", photos, "--json")
    assert scored.code == 0
    assert scored.json["test"]["n"] == 5, "its own data: the test part alone"
    copy = shutil.copytree(photos, tmp_path / "copy")
    assert cli("evaluate", "r", copy, "--json").json["test"]["n"] == 24, "other data: all of it"


def test_strict_makes_a_damaged_file_an_error(cli, photos):
    done = cli("train", photos, *SMALL, "--strict", "--json")
    assert done.code == 2
    assert "broken.jpg" in done.json["error"]


def test_evaluate_agrees_with_what_training_said(cli, run):
    first = cli("evaluate", run, "--json").json
    stored = json.loads((run / "structure.json").read_text())
    assert first["weights_sha256"] == stored["weights_sha256"]
    assert first["test"]["n"] == 359


def test_minutes_become_steps_before_the_first_one(cli, tmp_path):
    done = cli("train", "--model", "small-cnn:widths=(4,8)", "--minutes", "0.05", "--out", "r", "--json")
    assert done.code == 0, done.err
    config = (tmp_path / "r" / "config.yaml").read_text()
    assert "minutes: null" in config
    assert "steps: null" not in config


def test_probe_shows_what_a_part_measured(cli, run):
    done = cli("probe", run, "--with", "example-forgetting", "--json")
    assert done.code == 0, done.err
    assert done.json["readings"]
    assert {"name", "value", "unit"} == set(done.json["readings"][0])
    assert cli("probe", run, "--with", "shift-consistency", "--images", "20").code == 0


def test_attack_and_explain(cli, run, tmp_path):
    done = cli("attack", run, "--with", "deepfool", "--images", "20", "--json")
    assert done.code == 0, done.err
    readings = {r["name"]: r["value"] for r in done.json["readings"]}
    assert readings["fooled"] > 0.9
    limited = cli("attack", run, "--with", "fgsm", "--eps", "8/255", "--images", "20", "--json").json
    assert {r["name"]: r["value"] for r in limited["readings"]}["median linf change"] <= 8 / 255 + 1e-6
    from PIL import Image
    from sklearn.datasets import load_digits

    Image.fromarray((load_digits().images[3] * 15.9).astype("uint8")).save(tmp_path / "three.png")
    sheet = cli("explain", run, "three.png", "--method", "grad-cam", "--method", "saliency", "--out", "sheet.png", "--json")
    assert sheet.code == 0, sheet.err
    with Image.open(tmp_path / "sheet.png") as found:
        assert found.size[0] > 400
    assert cli("explain", run, "three.png", "--target", "17").code == 2


def test_parts_show_doctor_and_check(cli):
    rows = cli("parts", "--json").json
    assert {"part", "kind", "room", "paper", "title", "year", "file", "verdict"} == set(rows[0])
    assert [r["part"] for r in cli("parts", "cutmix", "--json").json] == ["attentive-cutmix", "cutmix"]
    shown = cli("show", "cutmix", "--json").json
    assert shown["options"]["alpha"] == 1.0
    assert "departs from the paper" in cli("show", "resnet20").out
    assert cli("doctor", "--json").json["plan"]["precision"] in ("bf16", "fp32")
    done = cli("check", "cutmix", "--json")
    assert done.code == 0
    assert done.json["failed"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nowhere/at/all"], "nowhere/at/all"),
        (["train", "digitz"], "digits"),
        (["train", "--model", "resnet21"], "resnet20"),
        (["train", "--model", "timm/resnet1O"], "did you mean"),
        (["train", "--with", "cutmixx"], "did you mean 'cutmix'"),
        (["train", "--with", "cutmix:alfa=2"], "did you mean 'alpha'"),
        (["train", "--with", "cutmix:alpha"], "'alpha' has no '='"),
        (["train", "--with", "oversampling", "--with", "triplet-network"], "both own the"),
        (["train", "--with", "grad-cam"], "convince explain"),
        (["train", "--epochs", "-1"], "epochs=-1"),
        (["train", "--minutes", "0"], "minutes=0"),
        (["train", "--resume", "nothing"], "no run starts there"),
        (["train", "--val", "0.9", "--test", "0.9"], "0.9"),
        (["evaluate", "nothing"], "no such run"),
        (["predict", "nothing", "x.png"], "no such run"),
        (["show", "no-such-part"], "no part is named"),
        (["parts", "--kind", "los"], "did you mean 'loss'"),
        (["parts", "--room", "nowhere"], "Rooms:"),
        (["prove", "no-such-paper"], "no claim is known"),
        (["trian"], "did you mean 'train'"),
        (["train", "--epoks", "3"], "--epo"),
        (["check", "no_such.py"], "no_such.py"),
        (["train", "--parts", "no/such/folder"], "no such file or folder"),
    ],
)
def test_a_mistake_is_named_with_exit_code_2(cli, words, said):
    done = cli(*words)
    assert done.code == 2, done
    assert said in done.err
    assert done.out == ""
    as_json = cli(*words, "--json")
    assert as_json.code == 2
    assert said in as_json.json["error"]


def test_a_run_folder_that_exists_is_refused_and_left_alone(cli, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes.txt").write_text("mine")
    done = cli("train", *SMALL, "--out", "r")
    assert done.code == 2
    assert "--resume" in done.err
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["structure.json", "labels.json", "model.safetensors", "config.yaml", "parts.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"{}", b'{"format": 99}', b"!!python/object/apply:os.system [touch hacked]"])
def test_a_damaged_or_hostile_run_is_named_and_nothing_runs(cli, run, tmp_path, name, content):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / name).write_bytes(content)
    done = cli("evaluate", copy)
    assert done.code == 2, done
    assert str(copy) in done.err
    assert not (tmp_path / "hacked").exists()


def test_a_run_that_names_a_path_outside_is_refused(cli, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    structure = json.loads((copy / "structure.json").read_text())
    structure["own"] = {"evil": {"file": "../evil.py", "sha256": "0"}}
    (copy / "structure.json").write_text(json.dumps(structure))
    for trust in ((), ("--trust",)):
        done = cli("evaluate", copy, *trust)
        assert done.code == 2
        assert "evil" in done.err


OWN = '''"""Twice: doubles the loss, a part of a person's own."""
from dataclasses import dataclass
from typing import final

from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="twice",
    kind="technique",
    title="Twice the loss",
    strength="factor",
    off=1.0,
)


@final
@dataclass
class Twice(Technique):
    """Multiply the loss."""

    factor: float = 2.0

    def on_loss(self, run):
        run.loss = run.loss * self.factor
'''


def test_a_part_of_your_own_is_listed_shown_checked_switched_on_and_needs_trust(cli, tmp_path):
    from convince import parts

    known = list(parts._own)
    try:
        (tmp_path / "twice.py").write_text(OWN)
        assert cli("check", "twice.py").code == 0
        assert [r["part"] for r in cli("parts", "twice", "--parts", "twice.py", "--json").json] == ["twice"]
        assert "Twice the loss" in cli("show", "twice", "--parts", "twice.py").out
        assert cli("train", *SMALL, "--parts", "twice.py", "--with", "twice", "--out", "r").code == 0
        assert (tmp_path / "r" / "parts" / "twice.py").read_text() == OWN
        parts._own[:] = known
        parts.find.cache_clear()
        done = cli("evaluate", "r")
        assert done.code == 2
        assert "--trust" in done.err
        assert cli("evaluate", "r", "--trust").code == 0
    finally:
        parts._own[:] = known
        parts.find.cache_clear()


def test_help_and_parts_import_nothing_heavy():
    code = """
import sys
sys.argv = ["convince", *sys.argv[1:]]
from convince.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "numpy", "timm", "sklearn", "scipy", "rich", "pydantic", "PIL", "yaml"} & set(sys.modules)
assert not heavy, f"{sys.argv[1:]} imports {heavy}"
"""
    for words in (["--help"], ["parts"], ["--version"], ["train", "--help"]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, timeout=60)
