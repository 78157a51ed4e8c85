"""Class weights by hand, against scikit-learn, for hard and mixed labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from convince.checks.subject import MODEL, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.training.class_weights import ClassWeights, class_weights


def test_by_hand():
    """Counts 6, 3, 1 of 10: weights 10/18, 10/9, 10/3; unlabelled rows are not counted, a class without rows weighs 1."""
    y = torch.tensor([0] * 6 + [1] * 3 + [2] + [-1] * 5)
    torch.testing.assert_close(class_weights(y, 3), torch.tensor([10 / 18, 10 / 9, 10 / 3], dtype=torch.float64))
    torch.testing.assert_close(class_weights(y, 4), torch.tensor([10 / 18, 10 / 9, 10 / 3, 1], dtype=torch.float64))
    roots = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64) ** -0.5
    torch.testing.assert_close(class_weights(y, 3, 0.5), roots * 10 / (6**0.5 + 3**0.5 + 1))
    assert class_weights(y, 3, 0.0).tolist() == [1.0, 1.0, 1.0]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_mean_over_samples_is_one_and_sklearn_agrees(labels, power):
    y = torch.tensor(labels)
    assert float(class_weights(y, 5, power)[y].mean()) == pytest.approx(1)
    have = np.unique(labels)
    np.testing.assert_allclose(class_weights(y, 5).numpy()[have], compute_class_weight("balanced", classes=have, y=np.array(labels)))


def watched(*parts, **changes):
    run = prepare(make(**{"model": MODEL, "batch": 8, "epochs": 1, "precision": "fp64", "parts": parts, **changes}), tiny_images(), drop_off=False)
    seen = []
    fit(run, None, lambda *_: seen.append((run.batch, run.loss.detach(), run.out.logits.detach())))
    return run, seen


def test_run_weighs_each_row_by_its_class():
    run, seen = watched("class-weights")
    weights = class_weights(run.data.y[run.data.split.train], 3)
    assert weights.unique().numel() == 3
    for batch, loss, logits in seen:
        torch.testing.assert_close(batch.weight, weights[run.data.y[batch.index]])
        expected = F.cross_entropy(logits, batch.y.argmax(1), weight=weights, reduction="sum") / len(logits)
        torch.testing.assert_close(loss, expected)


def test_mixed_labels_take_the_mean_of_their_classes():
    run, seen = watched("class-weights", "cutmix")
    weights = class_weights(run.data.y[run.data.split.train], 3)
    for batch, _, _ in seen:
        torch.testing.assert_close(batch.weight, batch.y @ weights)
    assert any(bool((batch.y.max(1).values < 0.999).any()) for batch, _, _ in seen)


def test_smoothing_does_not_blur_the_weights():
    run, seen = watched("class-weights", "label-smoothing")
    weights = class_weights(run.data.y[run.data.split.train], 3)
    torch.testing.assert_close(seen[0][0].weight, weights[run.data.y[seen[0][0].index]])


def test_weights_work_beside_a_loss():
    _, seen = watched("class-weights", "poly1")
    _, plain = watched("poly1")
    assert not torch.equal(seen[0][1], plain[0][1])


def test_off_weighs_one():
    _, seen = watched("class-weights:power=0.0")
    assert all(torch.equal(batch.weight, torch.ones_like(batch.weight)) for batch, _, _ in seen)


@pytest.mark.parametrize("value", [-1.0, 11.0])
def test_bad_power_is_named(value):
    with pytest.raises(Mistake, match=f"power={value}"):
        ClassWeights(power=value)
