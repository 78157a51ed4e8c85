"""Label smoothing by hand, and against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.checks.subject import MODEL, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.training.label_smoothing import LabelSmoothing, smooth


def test_by_hand():
    """Four classes, 0.1: 0.925 and three times 0.025."""
    y = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.025, 0.925, 0.025, 0.025], [0.475, 0.475, 0.025, 0.025], [0.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(smooth(y, 0.1), expected, rtol=0, atol=1e-15)
    assert torch.equal(smooth(y, 0.0), y)


@given(st.floats(0, 1), st.integers(2, 12))
@settings(max_examples=40, deadline=None)
def test_against_torch(smoothing, k):
    """Cross-entropy on smoothed labels is torch's ``label_smoothing``; rows keep their sum."""
    z, c = torch.randn(9, k, generator=generator("smooth"), dtype=torch.float64), torch.arange(9) % k
    y = smooth(F.one_hot(c, k).double(), smoothing)
    torch.testing.assert_close(F.cross_entropy(z, y), F.cross_entropy(z, c, label_smoothing=smoothing))
    torch.testing.assert_close(y.sum(1), torch.ones(9, dtype=torch.float64))


def test_run_trains_on_smoothed_mixed_labels():
    """Beside cutmix every label is at least smoothing / k: smoothing comes last."""
    run = prepare(make(model=MODEL, batch=8, epochs=1, precision="fp64", parts=("label-smoothing:smoothing=0.3", "cutmix")), tiny_images())
    seen = []
    fit(run, None, lambda *_: seen.append(run.batch.y))
    y = torch.cat(seen)
    assert float(y.min()) == pytest.approx(0.1)
    torch.testing.assert_close(y.sum(1), torch.ones(len(y), dtype=torch.float64))
    assert bool(((y.max(1).values < 0.79) & (y.max(1).values > 0.11)).any())  # some are mixed


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_bad_share_is_named(value):
    with pytest.raises(Mistake, match=f"smoothing={value}"):
        LabelSmoothing(smoothing=value)
