"""Classifier: the Python twin of the command line, a scikit-learn estimator."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, no_type_check

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from convince.data import Data, load, load_like
from convince.errors import Mistake
from convince.fit.answer import score as score_rows
from convince.fit.folder import Loaded, open_run, write_config, write_model
from convince.fit.settings import settings
from convince.fit.train import Trained, train
from convince.types import Explanation

_SAVED = ("model.safetensors", "parts.safetensors", "structure.json", "labels.json", "config.yaml")


class Classifier(ClassifierMixin, BaseEstimator):
    """Train a network with parts switched on by name; ``fit``, ``predict_proba``, ``explain``, ``save``.

    Parameters are those of ``convince train``; None means chosen from the data. ``fit`` takes a folder, a
    table file or a built-in name, or arrays: tables [n d], images uint8 [n h w], [n h w c] or [n c h w] (floats
    in [0, 1]). Arrays are trained on whole: ``val`` is 0 unless a share is asked for.

    Attributes after ``fit``: ``classes_``, ``n_features_in_`` (tables), ``result_`` (settings, cost, notes).
    Raises :class:`~convince.errors.Mistake`, a ValueError, for what a person can mend.
    """

    model: str | None
    parts: Sequence[str]
    epochs: int | None
    batch: int | None
    lr: float | None
    augment: str
    size: int | None
    fit_mode: str
    precision: str
    val: float
    seed: int

    @no_type_check  # scikit-learn sets parameters to anything and expects fit to complain
    def __init__(
        self,
        model: str | None = None,
        parts: Sequence[str] = (),
        epochs: int | None = None,
        batch: int | None = None,
        lr: float | None = None,
        augment: str = "auto",
        size: int | None = None,
        fit_mode: str = "letterbox",
        precision: str = "auto",
        val: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.parts = parts
        self.epochs = epochs
        self.batch = batch
        self.lr = lr
        self.augment = augment
        self.size = size
        self.fit_mode = fit_mode
        self.precision = precision
        self.val = val
        self.seed = seed

    def fit(self, x: Any, y: Any = None) -> Classifier:
        """Train on a source (its own labels) or on arrays with ``y`` [n]."""
        named = {"model": self.model, "parts": tuple(self.parts), "epochs": self.epochs, "batch": self.batch, "lr": self.lr}
        named |= {"augment": self.augment, "size": self.size, "fit": self.fit_mode, "precision": self.precision, "val": self.val}
        asked = settings(**named, test=0.0, seed=self.seed, data=str(x) if isinstance(x, (str, os.PathLike)) else "arrays")
        data = self._training_data(x, y)
        trained = train(asked, data)
        trained.answer.eval()
        self.result_: Trained | None = trained
        self._loaded = Loaded(Path(), trained.settings, data.classes, data.preprocess, trained.answer, trained.run, trained.run.plan)
        return self

    def _training_data(self, x: Any, y: Any) -> Data:
        if isinstance(x, (str, os.PathLike)):
            data = load(x, size=self.size, fit=self.fit_mode, val=self.val, test=0.0, seed=self.seed)
            self.classes_ = np.array(data.classes)
            return data
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        if getattr(x, "ndim", 2) in (3, 4):
            x, y = np.asarray(x), np.asarray(y)
        else:
            x, y = validate_data(self, x, y, dtype=np.float32)
        if y.ndim != 1:
            y = y.reshape(len(y)) if y.ndim == 2 and y.shape[1] == 1 else y
        check_classification_targets(y)
        self.classes_ = unique_labels(y)
        if len(self.classes_) < 2:
            raise Mistake(f"y holds one class, {self.classes_[0]!r}; a classifier needs at least 2 classes")
        codes = np.searchsorted(self.classes_, y)
        data = load(x, codes, val=self.val, test=0.0, seed=self.seed, size=self.size, fit=self.fit_mode)
        return data

    def _pixels(self, x: Any) -> Tensor:
        """Samples as the network takes them: uint8 [n c h w], or float32 [n d]."""
        check_is_fitted(self, "_loaded")
        p = self._loaded.preprocess
        if isinstance(x, (str, os.PathLike)) or p.kind == "image":
            if not isinstance(x, (str, os.PathLike)):
                data = load_like(x, np.zeros(len(x), dtype=np.int64), preprocess=p, classes=self._loaded.classes)
            else:
                data = load_like(x, preprocess=p, classes=self._loaded.classes)
            return data.x.take(torch.arange(len(data.y)))
        return torch.from_numpy(np.ascontiguousarray(validate_data(self, x, dtype=np.float32, reset=False)))

    def predict_proba(self, x: Any) -> np.ndarray:
        """Probabilities [n k], columns in the order of ``classes_``."""
        pixels = self._pixels(x)
        return self._loaded.logits(pixels).double().softmax(1).numpy()

    def predict(self, x: Any) -> np.ndarray:
        """The most probable class of each sample [n]."""
        best = self.predict_proba(x).argmax(1)
        return self.classes_[best]

    def score(self, x: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Share of right answers on a labelled source, or on arrays with ``y``."""
        if not isinstance(x, (str, os.PathLike)):
            return super().score(x, y, sample_weight)
        check_is_fitted(self, "_loaded")
        data = load_like(x, preprocess=self._loaded.preprocess, classes=self._loaded.classes)
        rows = torch.arange(len(data.y))
        return score_rows(self._loaded.answer, data, rows, self._loaded.plan).accuracy

    def explain(self, x: Any, method: str = "grad-cam", target: int | None = None, **options: Any) -> Explanation:
        """Why the samples are answered as they are: an explainer by name, on ``target`` or the predicted class."""
        from convince import parts

        pixels = self._pixels(x)
        return parts.make(method, **options)(self._loaded.answer, self._loaded.plan.pixels(pixels), target)

    def save(self, folder: str | Path) -> Path:
        """Write a run that ``convince predict`` and :meth:`load` open. The folder must not exist."""
        check_is_fitted(self, "_loaded")
        folder = Path(folder)
        if folder.exists():
            raise Mistake(f"{folder}: exists already; choose another name")
        folder.mkdir(parents=True)
        self._write(folder)
        return folder

    def _write(self, folder: Path) -> None:
        write_config(folder, self._loaded.settings)
        write_model(folder, self._loaded.run)

    @classmethod
    def load(cls, folder: str | Path, *, trust: bool = False) -> Classifier:
        """Open a run that was saved, here or by ``convince train``."""
        loaded = open_run(folder, trust=trust)
        s = loaded.settings
        made = cls(s.model, s.parts, s.epochs, s.batch, s.lr, s.augment, s.size, s.fit, s.precision, s.val, s.seed)
        made._loaded, made.classes_ = loaded, np.array(loaded.classes)
        return made

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_loaded")

    def __getstate__(self) -> dict[str, Any]:
        """Plain values, and a fitted network as the bytes of its run folder (safetensors and JSON)."""
        state = dict(super().__getstate__())
        state.pop("result_", None)
        if state.pop("_loaded", None) is not None:
            with tempfile.TemporaryDirectory() as folder:
                self._write(Path(folder))
                state["_run"] = {name: (Path(folder) / name).read_bytes() for name in _SAVED}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        run = state.pop("_run", None)
        super().__setstate__(state)
        if run is not None:
            with tempfile.TemporaryDirectory() as folder:
                for name in _SAVED:
                    (Path(folder) / name).write_bytes(run[name])
                self._loaded = open_run(folder)
