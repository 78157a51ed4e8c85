"""Cards are found by reading: fast, importing nothing, broken files listed; names and options are checked."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convince import parts
from convince.errors import Mistake
from convince.parts import Broken, Card, Part, literal, parse, read, spell

HEAD = '"""A part: it is written in a test."""\nfrom convince.parts import Card\n'


def card(text: str) -> str:
    return f'{HEAD}\nCARD = Card(\n    part="mine",\n    kind="loss",\n    title="Mine",\n    {text}\n)\n'


def test_literals_arithmetic_and_inf_are_read(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(card('off=8/255, strength="eps", tiny={"a": -2**3, "b": [1e-3 * 2, (True, None)], "c": inf},'))
    found = read(path)
    assert isinstance(found, Part)
    assert found.card.off == 8 / 255
    assert found.card.tiny == {"a": -8, "b": [0.002, (True, None)], "c": math.inf}
    assert found.line == 4


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("tiny=dict(a=1),", 8, "not a literal"),
        ('url=f"{1}",', 8, "not a literal"),
        ("off=__import__('os').system('true'),", 8, "not a literal"),
        ("tiny={**{}},", 8, "not a literal"),
        ("kindd='loss',", 4, "kindd"),
        ("departs='one sentence',", 4, "departs"),
        ("off=9**9**9,", 8, "exponent"),
        ("off=1/0,", 4, "division"),
        ("off=(", 4, "never closed"),
    ],
)
def test_a_card_that_cannot_be_read_is_broken_with_its_line(tmp_path, text, line, said):
    path = tmp_path / "mine.py"
    path.write_text(card(text))
    found = read(path)
    assert isinstance(found, Broken)
    assert said in found.reason
    assert abs(found.line - line) <= 1
    assert str(path) in str(found)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00CARD", b"CARD = make()\n", b"CARD: Card = other\n"])
def test_files_that_look_like_parts_never_vanish(tmp_path, content):
    path = tmp_path / "odd.py"
    path.write_bytes(content)
    assert isinstance(read(path), Broken)


def test_a_file_without_a_card_is_no_part(tmp_path):
    path = tmp_path / "helper.py"
    path.write_text("X = 1\n")
    assert read(path) is None


def test_broken_and_twin_files_are_listed_beside_the_good(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(card(""))
    (tmp_path / "b.py").write_text(card("tiny=oops,"))
    (tmp_path / "c.py").write_text(card(""))
    monkeypatch.setenv("CONVINCE_PARTS", str(tmp_path))
    parts.find.cache_clear()
    try:
        rows = [row for row in parts.find() if row.path.parent == tmp_path]
        assert [type(row) for row in rows] == [Part, Broken, Broken]
        assert "stands in" in rows[2].reason
        with pytest.raises(Mistake, match=r"broken.*b\.py"):
            parts.get("b")
    finally:
        monkeypatch.delenv("CONVINCE_PARTS")
        parts.find.cache_clear()


def test_three_hundred_files_are_all_read(tmp_path):
    body = "\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60))
    for i in range(300):
        (tmp_path / f"p{i}.py").write_text(card("").replace('"mine"', f'"mine-{i}"') + body)
    rows = [read(path) for path in sorted(tmp_path.iterdir())]
    assert sorted(row.name for row in rows) == sorted(f"mine-{i}" for i in range(300))


def test_listing_imports_no_part():
    import subprocess

    code = "import sys; from convince.parts import find; find(); assert not {'torch', 'convince.augment.cutmix'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


values = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | st.sampled_from(["sum", "a b", "8/255", "x,y", "None", "k=v"])


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,5}", fullmatch=True), values | st.tuples(values, values), max_size=4))
def test_spell_and_parse_are_inverse(options):
    name, back = parse(spell("part", options))
    assert name == "part"
    assert back == options
    assert [type(v) for v in back.values()] == [type(v) for v in options.values()]


def test_options_are_parsed_as_a_person_writes_them():
    assert parse("fgsm:eps=8/255,norm=inf") == ("fgsm", {"eps": 8 / 255, "norm": math.inf})
    assert parse("resnet:layers=(1,1),stem=small") == ("resnet", {"layers": (1, 1), "stem": "small"})
    assert parse("cutmix") == ("cutmix", {})


def test_wrong_names_and_options_suggest_the_nearest():
    with pytest.raises(Mistake, match=r"no part is named 'cutmx'; did you mean 'cutmix'\?"):
        parts.make("cutmx")
    with pytest.raises(Mistake, match=r"cutmix: no option 'probability'.*Options: .*prob"):
        parts.make("cutmix", probability=1)
    assert parts.get("Cut_Mix").name == "cutmix"


def test_cards_refuse_what_they_cannot_mean():
    with pytest.raises(Mistake, match="did you mean 'loss'"):
        Card(part="x", kind="los", title="t")
    with pytest.raises(Mistake, match="lower-case"):
        Card(part="My Part", kind="loss", title="t")
    with pytest.raises(Mistake, match="without strength"):
        Card(part="x", kind="loss", title="t", off=0.0)


def test_a_literal_cannot_run_code():
    import ast

    for text in ("open('x')", "a.b", "[x for x in (1,)]", "lambda: 1", "f'{1}'", "1 if 1 else 2"):
        with pytest.raises(SyntaxError):
            literal(ast.parse(text, mode="eval").body)
