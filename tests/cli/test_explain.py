"""convince explain and convince probe: sheets, rankings, figures in the report, and every wrong request in words."""

import shutil

import numpy as np
import pytest
from PIL import Image

from convince.data import load
from convince.explain.ranking import CONTROLS
from convince.report.probes import renew


@pytest.fixture
def files(tmp_path):
    """Three digits, one as colour and four times as large, and a file that is no picture."""
    data = load("digits")
    for i in range(3):
        image = Image.fromarray(data.x.take(data.split.test[i : i + 1])[0, 0].numpy())
        (image.resize((32, 32)).convert("RGB") if i == 2 else image).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    return ["0.png", "1.png", "2.png"]


def test_a_sheet_has_a_score_beside_every_map(cli, run, files, tmp_path):
    done = cli("explain", run, *files, "notes.txt", "--method", "grad-cam", "--method", "rise:masks=40,cells=4", "--out", "sheet.png", "--json")
    assert done.code == 0, done
    found = done.json
    assert [row["file"] for row in found["explained"]] == files
    assert found["skipped"][0]["file"] == "notes.txt"
    for row in found["explained"]:
        for spec in ("grad-cam", "rise:masks=40,cells=4"):
            scores = row["scores"][spec]
            assert scores["faithfulness"] == pytest.approx(scores["insertion"] - scores["deletion"])
    assert found["methods"]["grad-cam"]["layer"]
    assert found["methods"]["grad-cam"]["precision"] == "fp32"
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[2] == 3
    assert sheet.shape[0] > 3 * 224
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("insertion") >= 6
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_a_method_without_a_map_shows_its_picture(cli, run, files, tmp_path):
    done = cli("explain", run, files[0], "--method", "cnn-explainer:channels=2", "--out", "s.png", "--json")
    assert done.code == 0, done
    assert done.json["explained"][0]["scores"]["cnn-explainer:channels=2"]["faithfulness"] is None
    assert (tmp_path / "s.html").read_text().count("<img") == 2


def test_a_likeness_is_explained(cli, run, files):
    done = cli("explain", run, files[0], "--like", files[1], "--out", "s.png", "--json")
    assert done.code == 0, done
    assert done.json["explained"][0]["explained"] == "likeness to 1.png"


def test_a_ranking_sets_two_maps_that_know_nothing_beside(cli, run, tmp_path):
    words = ("--method", "grad-cam", "--method", "saliency", "--metric", "faithfulness", "--metric", "randomisation", "--against", run)
    done = cli("explain", run, "--score", "--images", 9, *words, "--out", "rank.html", "--json")
    assert done.code == 0, done
    found = done.json
    assert found["images"] == 9
    assert {row["method"] for row in found["ranking"]} == {"grad-cam", "saliency", *CONTROLS}
    means = [row["faithfulness"]["mean"] for row in found["ranking"]]
    assert means == sorted(means, reverse=True)
    for row in found["ranking"]:
        assert row["against"]["mean"] == pytest.approx(1, abs=0.01)  # the run beside itself, in bf16 and fp32
        if row["method"] in CONTROLS:
            assert row["randomisation"]["mean"] == pytest.approx(1)
    assert "Which maps tell the truth" in (tmp_path / "rank.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name at least one image"),
        (("0.png", "--target", "17"), "no such class"),
        (("0.png", "--like", "1.png", "--target", "3"), "give one"),
        (("0.png", "--like", "notes.txt"), "--like notes.txt"),
        (("0.png", "--metric", "insertion"), "belong to --score"),
        (("--score", "--metric", "insertoin"), "did you mean 'insertion'"),
        (("--score", "a", "b"), "--score takes one DATA"),
        (("--score", "--images", "1"), "at least 2"),
        (("0.png", "--method", "cutmix"), "is of kind technique"),
        (("nothing.png",), "no such file"),
        (("notes.txt",), "none of these files could be read"),
    ],
)
def test_wrong_requests_are_named(cli, run, files, words, said):
    done = cli("explain", run, *words)
    assert done.code == 2, done
    assert said in done.err


def test_a_probe_draws_into_the_report(cli, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "probes", ignore_errors=True)  # other tests may have measured the shared run
    renew(copy)
    assert "No probe has measured this run" in (copy / "report.html").read_text()
    done = cli("probe", copy, "--with", "filter-report", "--images", 20, "--json")
    assert done.code == 0, done
    page = (copy / "report.html").read_text()
    assert done.json["report"].endswith("report.html")
    assert "No probe has measured this run" not in page
    assert "Filters by depth" in page
    assert (copy / "probes" / "filter-report.json").is_file()
    assert cli("probe", copy, "--with", "filter-report", "--images", 0).code == 2


def test_a_probe_rides_along_and_says_its_overhead(cli, tmp_path):
    done = cli("train", "digits", "--model", "small-cnn:widths=(4,8)", "--epochs", 3, "--with", "filter-report", "--out", "r", "--json")
    assert done.code == 0, done
    text = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert "filter-report: overhead" in text
    assert "Filters by depth" in (tmp_path / "r" / "report.html").read_text()
