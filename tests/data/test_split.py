"""Splits: disjoint, complete, stratified, seeded; groups never cross; the global random state is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.data.split import draw, quotas
from convince.errors import Mistake

LABELS = st.lists(st.integers(0, 4), min_size=2, max_size=120)
SHARES = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.3, 0.45])


@settings(max_examples=150, deadline=None)
@given(LABELS, SHARES, SHARES, st.integers(0, 2**31))
def test_rows_are_split(labels: list[int], val: float, test: float, seed: int) -> None:
    y = torch.tensor(labels)
    split = draw(y, val=val, test=test, seed=seed)
    together = torch.cat([split.train, split.val, split.test])
    assert together.sort().values.tolist() == list(range(len(y)))
    again = draw(y, val=val, test=test, seed=seed)
    assert all(torch.equal(split[part], again[part]) for part in ("train", "val", "test"))
    for label in y.unique():
        n = int((y == label).sum())
        in_test, in_val = int((y[split.test] == label).sum()), int((y[split.val] == label).sum())
        assert (y[split.train] == label).any()
        if test and n >= 3:
            assert in_test >= 1
        assert in_test <= max(1, int(n * test) + 1)
        assert in_val <= max(1, int(n * val) + 1)
    if not test:
        assert len(split.test) == 0


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_groups_never_cross(data: st.DataObject, seed: int) -> None:
    n = data.draw(st.integers(6, 100))
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 12), min_size=n, max_size=n)))
    y = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    if len(groups.unique()) < 3:
        with pytest.raises(Mistake, match="group"):
            draw(y, val=0.1, test=0.2, seed=seed, groups=groups)
        return
    split = draw(y, val=0.1, test=0.2, seed=seed, groups=groups)
    sides = [set(groups[split[part]].tolist()) for part in ("train", "val", "test")]
    assert not (sides[0] & sides[1])
    assert not (sides[0] & sides[2])
    assert not (sides[1] & sides[2])
    together = torch.cat([split.train, split.val, split.test])
    assert together.sort().values.tolist() == list(range(n))
    assert set(y[split.train].tolist()) == set(y.tolist())


def test_grouped_shares_are_near_where_groups_are_many() -> None:
    rng = np.random.default_rng(0)
    groups = torch.from_numpy(rng.integers(0, 300, 6000))
    y = torch.from_numpy(rng.integers(0, 5, 6000))
    split = draw(y, val=0.1, test=0.2, seed=1, groups=groups)
    for part, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        counts = torch.bincount(y[split[part]], minlength=5) / torch.bincount(y, minlength=5)
        assert (counts - share).abs().max() < 0.03, (part, counts)


def test_a_class_in_one_group_is_learnt_not_tested() -> None:
    y = torch.tensor([0] * 10 + [1] * 3)
    groups = torch.tensor([*range(10), 99, 99, 99])
    for seed in range(10):
        split = draw(y, val=0.1, test=0.2, seed=seed, groups=groups)
        assert {10, 11, 12} <= set(split.train.tolist())
        assert len(split.test)
        assert len(split.val)


def test_stratified_by_hand() -> None:
    """100 + 50 rows at 0.2 and 0.1: 20 + 10 in test, 10 + 5 in val."""
    y = torch.tensor([0] * 100 + [1] * 50)
    split = draw(y, val=0.1, test=0.2, seed=3)
    assert torch.bincount(y[split.test]).tolist() == [20, 10]
    assert torch.bincount(y[split.val]).tolist() == [10, 5]
    assert torch.bincount(y[split.train]).tolist() == [70, 35]


def test_quotas_by_hand() -> None:
    """Shares 2.5, 1.5, 0.5 of 4.5 rows (rounded 4): the largest remainders, in order, take what is missing."""
    counts = np.array([5, 3, 1])
    taken = quotas(counts, 0.5, least=np.zeros(3, int), most=counts)
    assert taken.tolist() == [3, 1, 0]


def test_seeds_differ_and_the_global_state_stays() -> None:
    y = torch.arange(10).repeat(30)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    a, b = draw(y, val=0.1, test=0.2, seed=0), draw(y, val=0.1, test=0.2, seed=1)
    assert not torch.equal(a.test, b.test)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_the_split_of_seed_0_is_known() -> None:
    """Splits are part of every result: this one must not change from version to version."""
    split = draw(torch.tensor([0, 1] * 10), val=0.1, test=0.2, seed=0)
    assert split.test.tolist() == [7, 16, 18, 19]
    assert split.val.tolist() == [2, 9]


def test_unlabelled_rows_are_in_train() -> None:
    y = torch.tensor([0, 1] * 10 + [-1] * 7)
    split = draw(y, val=0.1, test=0.2, seed=0)
    assert set(range(20, 27)) <= set(split.train.tolist())


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.2), (0.5, 0.5), (1.0, 0.0), (0.1, float("nan"))])
def test_bad_shares_are_named(val: float, test: float) -> None:
    with pytest.raises(Mistake, match=r"val|test"):
        draw(torch.tensor([0, 1]), val=val, test=test, seed=0)
