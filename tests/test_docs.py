"""What the pages say works: the part of CONTRIBUTING.md passes its checks, commands of the README exist, pages can be generated."""

import re
import runpy
from pathlib import Path

import pytest

from convince import parts
from convince.checks import run_checks
from convince.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


def test_the_part_of_contributing_passes_every_check(tmp_path):
    source = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    path = tmp_path / "unsure_first.py"
    path.write_text(source, encoding="utf-8")
    known = list(parts._own)
    try:
        parts.add_path(path)
        outcomes = run_checks(parts.get("unsure-first"))
        assert len(outcomes) > 12
        assert [f"{o.check}: {o.reason}" for o in outcomes if o.outcome != "passed"] == []
    finally:
        parts._own[:] = known
        parts.find.cache_clear()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/data.md"])
def test_commands_and_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in re.findall(r"`?convince ([a-z]+)", text):
        assert command in {*COMMANDS, "import", "compare", "certify", "export", "serve"}, f"{page}: no command is named {command!r}"
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}, which does not exist"
    for room, file in re.findall(r"`([a-z_]+)/((?:image/)?[a-z0-9_]+\.py)`", text):
        places = [ROOT / "src/convince" / room / file, ROOT / "src" / room / file, ROOT / room / file]
        assert any(place.exists() for place in places), f"{page} names {room}/{file}"


def test_the_parts_page_can_be_made():
    page = runpy.run_path(str(ROOT / "docs" / "make_parts_page.py"))["page"]()
    assert page.count("\n| `") == sum(isinstance(row, parts.Part) for row in parts.find())


def test_every_module_opens_with_a_sentence():
    for path in (ROOT / "src").rglob("*.py"):
        first = path.read_text(encoding="utf-8").lstrip()[:200]
        if first:
            assert first.startswith('"""'), f"{path} does not open with a sentence"
