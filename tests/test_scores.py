"""Scores against what everyone uses: scikit-learn, scipy and torchmetrics' definitions, and numbers by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix, log_loss

from convince.data import load
from convince.fit.answer import Scores


def scores(n=200, k=4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    probs = torch.randn(n, k, generator=gen).mul(2).softmax(1)
    return Scores(probs, torch.randint(0, k, (n,), generator=gen), torch.arange(n))


@given(st.integers(1, 400), st.data())
def test_the_interval_is_wilsons(n, data):
    right = data.draw(st.integers(0, n))
    y = torch.zeros(n, dtype=torch.int64)
    probs = torch.zeros(n, 2)
    probs[:right, 0] = 1
    probs[right:, 1] = 1
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert Scores(probs, y, y).accuracy_interval == pytest.approx((expected.low, expected.high))


def test_log_loss_and_confusion_are_scikit_learns():
    s = scores()
    assert s.log_loss == pytest.approx(log_loss(s.y, s.probs.double() / s.probs.double().sum(1, keepdim=True)))
    np.testing.assert_array_equal(s.confusion(), confusion_matrix(s.y, s.predicted))


def test_calibration_error_by_hand():
    """Two bins: 3 answers at 0.9 of which 2 are right, 2 at 0.6 of which 1 is right: 0.6 * 0.2333 + 0.4 * 0.1."""
    probs = torch.tensor([[0.9, 0.1]] * 3 + [[0.6, 0.4]] * 2)
    s = Scores(probs, torch.tensor([0, 0, 1, 0, 1]), torch.arange(5))
    assert s.ece == pytest.approx(0.6 * (0.9 - 2 / 3) + 0.4 * 0.1, abs=1e-6)


def test_embedded_digits_are_scikit_learns():
    ours, theirs = load("digits"), load_digits()
    x = ours.x.take(torch.arange(len(ours.y)))[:, 0].numpy()
    np.testing.assert_array_equal(x, np.rint(theirs.images * 255 / 16))
    np.testing.assert_array_equal(ours.y, theirs.target)
