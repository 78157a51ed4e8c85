"""The estimator passes scikit-learn's own checks, and works on images, folders and files."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import parametrize_with_checks

from convince import Classifier
from convince.errors import Mistake


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([Classifier(epochs=60), Classifier(parts=("poly1", "label-smoothing"), epochs=60)])
def test_scikit_learns_own_checks(estimator, check):
    """No check is excluded; those that scikit-learn itself skips (array API) are shown as skipped."""
    check(estimator)


@pytest.fixture(scope="module")
def fitted():
    digits = load_digits()
    x = np.round(digits.images * 255 / 16).astype(np.uint8)
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])[digits.target]
    model = Classifier(model="small-cnn:widths=(16,32)", epochs=6, parts=("cutmix:prob=0.2",))
    return model.fit(x[:1200], names[:1200]), x[1200:], names[1200:]


def test_images_with_named_classes(fitted):
    model, x, y = fitted
    assert model.score(x, y) > 0.8
    probs = model.predict_proba(x[:7])
    assert probs.shape == (7, 10)
    np.testing.assert_allclose(probs.sum(1), 1)
    assert set(model.predict(x[:7])) <= set(model.classes_)


def test_explain_gives_a_map(fitted):
    model, x, _ = fitted
    assert model.explain(x[:3], method="grad-cam").map.shape == (3, 1, 8, 8)


def test_saved_and_pickled_models_answer_the_same(fitted, tmp_path):
    model, x, _ = fitted
    before = model.predict_proba(x[:20])
    model.save(tmp_path / "run")
    np.testing.assert_array_equal(Classifier.load(tmp_path / "run").predict_proba(x[:20]), before)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(x[:20]), before)
    with pytest.raises(Mistake, match="exists already"):
        model.save(tmp_path / "run")
    assert not any(path.suffix in (".pt", ".pth", ".pkl") for path in (tmp_path / "run").iterdir())


def test_clone_and_params(fitted):
    model, _, _ = fitted
    assert clone(model).get_params() == model.get_params()
    assert clone(model).set_params(epochs=3).epochs == 3


def test_a_built_in_name_is_a_source(tmp_path):
    model = Classifier(model="small-cnn:widths=(8,16)", epochs=2).fit("digits")
    assert list(model.classes_) == list("0123456789")
    assert 0 <= model.score("digits") <= 1


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (np.full((20, 8, 8), 2.0), np.arange(20) % 2, r"\[0, 1\]|0 to 1"),
        (np.zeros((20, 8, 8), np.uint8), np.zeros(20), "2 classes"),
        (np.zeros((20, 8, 8), np.uint8), np.arange(19) % 2, "19"),
    ],
)
def test_bad_arrays_are_named(x, y, said):
    with pytest.raises(ValueError, match=said):
        Classifier(epochs=1).fit(x, y)


def test_fit_leaves_the_random_state_and_inputs():
    x, y = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32), np.arange(40) % 2
    kept, state = x.copy(), torch.get_rng_state()
    Classifier(epochs=2).fit(x, y)
    np.testing.assert_array_equal(x, kept)
    assert torch.equal(state, torch.get_rng_state())
