"""Claims and evidence: the rules stand in words, every verdict follows from the stored numbers and the claim as it stands."""

import hashlib
import importlib
import json

import pytest
from scipy import stats

from convince.claims import EVIDENCE, HERE, VERDICTS, Bench, Paired, known, paired
from convince.parts import Part, find

PAPERS = known()


def test_the_paired_interval_is_scipys():
    a, b = [0.9, 0.8, 0.85, 0.95], [0.8, 0.79, 0.8, 0.81]
    found = paired("x", a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 4


def test_equal_arms_give_zero_and_one_pair_an_endless_interval():
    assert paired("x", [1.0, 2.0], [1.0, 2.0]) == Paired("x", 0.0, 0.0, 0.0, 2)
    assert paired("x", [1.0], [0.5]).high == float("inf")


@pytest.mark.parametrize("paper", PAPERS)
def test_a_claim_says_its_rules_before_it_runs(paper):
    claim = importlib.import_module("convince.claims." + paper.replace("-", "_"))
    for name in ("SAYS", "SUPPORTED", "CONTRADICTED", "BUDGET"):
        assert len(getattr(claim, name).split()) >= 5, f"{paper}: {name} is not a sentence"
    assert any(isinstance(row, Part) and row.card.paper == paper for row in find()), f"no part names the paper {paper}"


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*.json")), ids=lambda path: path.stem)
def test_stored_evidence_is_what_the_claim_makes_of_its_numbers(path):
    proof = json.loads(path.read_text())
    source = HERE / f"{proof['paper'].replace('-', '_')}.py"
    assert proof["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest(), "the claim was changed after it ran"
    claim = importlib.import_module("convince.claims." + source.stem)
    verdict, comparisons = claim.judge(proof["numbers"])
    assert verdict == proof["verdict"]
    assert verdict in VERDICTS
    assert len(comparisons) == len(proof["comparisons"])
    assert proof["seconds"] <= 600
    assert proof["scale"] == "small"
    assert {"processor", "threads"} <= set(proof["hardware"])


def test_a_cell_is_stored_and_not_repeated(tmp_path):
    calls = []

    def cell():
        calls.append(1)
        return {"accuracy": 0.5}

    first = Bench(tmp_path / "store.json", say=lambda line: None)
    first.arm("base", 0, cell)
    again = Bench(tmp_path / "store.json", say=lambda line: None)
    assert again.arm("base", 0, cell) == {"accuracy": 0.5}
    assert len(calls) == 1


def test_a_draw_is_stratified_and_repeats():
    from convince.claims import draw

    a, b, c = draw("digits", 200, 50, 100, 0), draw("digits", 200, 50, 100, 0), draw("digits", 200, 50, 100, 1)
    assert (len(a.split.train), len(a.split.val), len(a.split.test)) == (200, 50, 100)
    assert (a.split.train == b.split.train).all()
    assert set(a.split.train.tolist()) != set(c.split.train.tolist())
    assert not set(a.split.train.tolist()) & set(a.split.val.tolist())
    counts = a.y[a.split.train].bincount()
    assert int(counts.max() - counts.min()) <= 6
