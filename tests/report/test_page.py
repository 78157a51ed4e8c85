"""The page: whole sections, nothing loaded, every name escaped, no crash where facts are missing."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convince.errors import Mistake
from convince.report import write_report
from convince.report.facts import SECTIONS, Facts, tidy
from convince.report.page import HERE, render, view

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed by its own end tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts = 0
        self.feed(re.sub(r'base64,[^"\s]*', "base64,", text))  # pictures only make it slow
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def bare_sections(text: str) -> set[str]:
    return set(re.findall(r'<section id="(\w+)" class="empty"', text))


def assert_loads_nothing(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form", "video", "audio"), tag
        for name, value in attrs.items():
            assert not name.startswith("on"), f"{tag} {name}={value}"
            if name in ("src", "href", "srcset", "xlink:href", "data", "action", "poster"):
                assert (value or "").startswith(("data:", "#")), f"{tag} {name}={value}"


def test_the_whole_report_is_well_formed_and_loads_nothing(digits: dict[str, Any], tmp_path: Path) -> None:
    path = write_report(tmp_path / "runs" / "a" / "report.html", digits)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert_loads_nothing(page)
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert bare_sections(text) == set()
    assert [a["id"] for a in page.find("section")] == list(SECTIONS)
    assert len(page.find("script")) == 1
    assert len(text) < 200_000
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_it_can_be_read_without_eyes(digits: dict[str, Any]) -> None:
    page = Page(render(digits))
    assert page.find("html")[0]["lang"] == "en"
    assert all(a.get("alt") for a in page.find("img"))
    assert all(a.get("role") == "img" and a.get("aria-label") for a in page.find("svg"))
    assert all(a.get("scope") in ("row", "col") for a in page.find("th"))
    assert len(page.find("caption")) == len(page.find("table"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in page.find("a")} <= {f"#{i}" for i in ids}
    assert len(page.find("h1")) == 1


def test_the_headline_can_be_quoted() -> None:
    facts = {"run": "a", "model": "resnet20", "test": {"n": 360, "accuracy": 351 / 360}}
    words = Page(render(facts)).text
    assert "resnet20 answers 97.5 % of 360 test images correctly (95 % interval 95.3 to 98.7)." in words


def test_a_given_interval_is_kept_and_named() -> None:
    test = {"n": 360, "accuracy": 0.975, "accuracy_interval": (0.95, 0.99), "interval_method": "bootstrap"}
    words = Page(render({"run": "a", "test": test})).text
    assert "(95 % interval 95.0 to 99.0)" in words
    assert "bootstrap" in words
    assert "Wilson" not in words


def test_the_script_is_the_one_that_the_policy_allows(digits: dict[str, Any]) -> None:
    text = render(digits)
    script = text[text.index("<script>") + 8 : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in Page(text).find("meta") if a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("section", list(SECTIONS))
def test_a_missing_section_says_why(digits: dict[str, Any], section: str) -> None:
    needs = {
        "data": ("data",),
        "training": ("history", "readings"),
        "test": ("test",),
        "calibration": ("calibration", "test"),
        "pictures": ("mistakes", "hits"),
        "cost": ("cost",),
        "samples": ("galleries", "tables"),
        "probes": ("probes",),
        "repeat": ("environment", "command", "config", "weights_sha256"),
    }
    facts = {k: v for k, v in digits.items() if k not in needs[section]}
    text = render(facts)
    assert section in bare_sections(text)
    assert SECTIONS[section] in Page(text).text
    told = Page(render({**facts, "absent": {section: "Because of <reasons>."}}))
    assert "Because of <reasons>." in told.text


def test_a_run_name_is_enough() -> None:
    text = render({"run": "bare"})
    assert bare_sections(text) == set(SECTIONS)
    assert "it was not tested" in Page(text).text


@pytest.mark.parametrize("field", [f for f in Facts.__annotations__ if f != "run"])
def test_every_field_may_be_none_or_empty(digits: dict[str, Any], field: str) -> None:
    Page(render({**digits, field: None}))
    if isinstance(digits.get(field), list | dict | str):
        Page(render({**digits, field: type(digits[field])()}))


def test_every_inner_field_may_be_missing(digits: dict[str, Any]) -> None:
    for field in ("data", "test", "calibration", "cost"):
        for key in digits[field]:
            if (field, key) != ("data", "classes"):
                rest = {k: v for k, v in digits[field].items() if k != key}
                view({**digits, field: rest})
    for field in ("mistakes", "hits"):
        for key in digits[field][0]:
            Page(render({"run": "a", field: [{k: v for k, v in digits[field][0].items() if k != key}]}))


def test_hostile_names_stay_text(hard: dict[str, Any]) -> None:
    text = render(hard)
    page = Page(text)
    assert_loads_nothing(page)
    assert len(page.find("script")) == 1
    assert len(page.find("title")) == 1 + text.count("><title>")  # the page's own, and those of figures
    for raw in ("<script>alert", "<img src=x", "<b>x</b>", "<i>.jpg"):
        assert raw not in text
    for name in ("<script>alert(1)</script>", "שלום עולם", "Ünïcödé 犬", 'quote" onload="x', "файл 7"):
        assert name in page.text
    assert "\u202e" not in text  # a\u202egpj.exe must not read as a picture's name
    assert len(text) < 2_000_000


def test_two_thousand_skipped_files_are_grouped_and_all_listed(hard: dict[str, Any]) -> None:
    page = Page(render(hard))
    assert "2 000 files could not be used, for 4 reasons." in page.text.replace("\u202f", " ")
    assert sum(tag == "li" for tag, _ in page.tags) > 2000


@pytest.mark.parametrize("k", [1, 2, 12, 13, 25, 26, 100])
def test_any_number_of_classes(make_hard: Any, k: int) -> None:
    page = Page(render(make_hard(k, 0)))
    assert f"Confusion matrix of {k} classes" in str([a["aria-label"] for a in page.find("svg")])
    assert "None: every file could be read." in page.text


def test_broken_losses_are_said_and_not_drawn(hard: dict[str, Any]) -> None:
    text = render(hard)
    assert "training loss is not a finite number in 16 of 30 epochs" in Page(text).text
    paths = re.findall(r'd="([^"]*)"', text)
    assert paths
    assert not any("nan" in p.lower() or "inf" in p.lower() for p in paths)
    everything = [{"epoch": e, "train_loss": float("nan"), "val_loss": float("inf")} for e in range(3)]
    assert "no finite values to draw" in Page(render({"run": "a", "history": everything})).text


def test_only_finite_coordinates(digits: dict[str, Any], hard: dict[str, Any]) -> None:
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height")
    for facts in (digits, hard):
        for tag, attrs in Page(render(facts)).tags:
            for name in names:
                if tag not in ("img", "meta") and name in attrs:
                    value = float(attrs[name] or "nan")
                    assert np.isfinite(value), (tag, attrs)
                    assert name not in ("width", "height", "r") or value >= 0, (tag, attrs)


def test_small_pictures_are_crisp_and_large_ones_are_scaled(digits: dict[str, Any], hard: dict[str, Any]) -> None:
    assert all(a.get("class") == "crisp" and a["width"] == "8" for a in Page(render(digits)).find("img"))
    sides = [(a["width"], a["height"], a.get("class")) for a in Page(render(hard)).find("img")]
    assert sides == [("240", "320", None), ("240", "320", None), ("320", "240", None)]


def test_facts_are_left_as_they_were(digits: dict[str, Any]) -> None:
    def plain(x: Any) -> str:
        return json.dumps(x, default=lambda a: a.tolist())

    before = copy.deepcopy(digits)
    render(digits)
    assert plain(before) == plain(digits)


def test_numpy_numbers_and_mistakes_in_the_facts() -> None:
    facts = tidy({"run": "a", "seed": np.int64(3), "test": {"accuracy": np.float32(0.5)}})
    assert type(facts["seed"]) is int
    assert type(facts["test"]["accuracy"]) is float
    with pytest.raises(Mistake, match="'run'"):
        render({})
    with pytest.raises(Mistake, match="'mistakes'"):
        render({"run": "a", "mistake": []})
    with pytest.raises(Mistake, match="'calibration'"):
        render({"run": "a", "absent": {"callibration": "x"}})
    with pytest.raises(Mistake, match=r"\[3 3\].*3 classes.*\[2, 2\]"):
        render({"run": "a", "data": {"classes": list("abc")}, "test": {"confusion": [[1, 0], [0, 1]]}})
    with pytest.raises(Mistake, match="uint8"):
        render({"run": "a", "mistakes": [{"image": np.zeros((2, 2))}]})


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path / "report.html", {"run": "first"})

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, {"run": "second"})
    assert "first" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(("name", "least"), [("ink", 7), ("soft", 4.5), ("a", 4.5), ("c", 4.5), ("d", 4.5), ("b", 3)])
def test_contrast(theme: int, name: str, least: float) -> None:
    css = (HERE / "style.css").read_text(encoding="utf-8")
    pairs = dict(re.findall(r"--(\w+): light-dark\(([^)]*)\)", css))
    for ground in ("paper", "plate"):
        one, other = (_luminance(pairs[n].split(", ")[theme]) for n in (name, ground))
        ratio = (max(one, other) + 0.05) / (min(one, other) + 0.05)
        assert ratio >= least, f"{name} on {ground}: {ratio:.2f}"
