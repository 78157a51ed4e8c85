"""Annotators and nuisances come with tables and arrays, follow their rows, and are refused in words where they cannot be."""

import numpy as np
import pytest
import torch

from convince.data import load
from convince.errors import Mistake


def table(tmp_path, **columns):
    path = tmp_path / "t.csv"
    head = ["a", "b", "label", *columns]
    rows = [[i, i * i, "yes" if i % 2 else "no", *(column[i % len(column)] for column in columns.values())] for i in range(20)]
    path.write_text("\n".join(",".join(map(str, row)) for row in [head, *rows]))
    return path


def test_columns_of_annotators_and_nuisances_are_no_features(tmp_path):
    data = load(table(tmp_path, **{"annotator:ann": ["no", "yes"], "annotator:bob": ["yes", ""], "nuisance": ["ruler", "none", ""]}), seed=0)
    assert data.preprocess.channels == 2
    assert data.classes == ("no", "yes")
    assert data.extra["annotators"].tolist()[:4] == [[0, 1], [1, -1], [0, 1], [1, -1]]
    assert data.extra["nuisance"].tolist()[:4] == [1, 0, -1, 1]


def test_an_annotator_who_names_no_class_is_a_mistake(tmp_path):
    with pytest.raises(Mistake, match="'yess', which is no class"):
        load(table(tmp_path, **{"annotator": ["yess"]}))


def arrays(n=30):
    gen = np.random.default_rng(0)
    return {"x": gen.random((n, 4)).astype(np.float32), "y": np.arange(n) % 3, "annotators": np.tile([[0, -1], [1, 2], [2, 2]], (n // 3, 1))}


def test_arrays_bring_them_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(), nuisance=np.arange(30) % 2)
    data = load(tmp_path / "a.npz", seed=0)
    assert data.extra["annotators"].shape == (30, 2)
    assert data.extra["nuisance"].tolist() == (np.arange(30) % 2).tolist()
    assert torch.equal(data.resplit(3).extra["annotators"], data.extra["annotators"])


def test_a_part_without_them_is_unknown_throughout():
    a = arrays()
    given = {"train_x": a["x"], "train_y": a["y"], "train_annotators": a["annotators"], "test_x": a["x"][:6], "test_y": a["y"][:6]}
    data = load(given, seed=0)
    assert data.extra["annotators"].shape == (36, 2)
    assert bool((data.extra["annotators"][-6:] == -1).all())


@pytest.mark.parametrize("wrong", [np.zeros((29, 2), int), np.zeros((30, 2)), np.full((30, 2), 3), np.full((30, 2), -2)])
def test_arrays_that_do_not_fit_are_mistakes(wrong):
    with pytest.raises(Mistake, match="annotator"):
        load({**arrays(), "annotators": wrong})


def test_annotators_write_classes_as_labels_do():
    a = arrays()
    given = {**a, "y": a["y"] + 5, "annotators": np.where(a["annotators"] < 0, -1, a["annotators"] + 5)}
    assert load(given, seed=0).extra["annotators"].tolist() == a["annotators"].tolist()


def test_a_class_without_files_is_not_known_to_annotators(tmp_path):
    """Settling drops class b, none of whose files can be read; what annotators said of it is unknown from then on."""
    from PIL import Image

    rows = ["path,label,annotator:ann"]
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'ac'[i % 2]},{'abc'[i % 3]}")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows.append("broken.png,b,a")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    data = load(tmp_path / "t.csv", size=8, seed=0)
    assert data.classes == ("a", "c")
    assert data.extra["annotators"][:3, 0].tolist() == [0, -1, 1]


def test_a_crowd_trains_a_classifier(tmp_path):
    from convince.fit.settings import settings
    from convince.fit.train import train

    data = load(arrays(90), seed=0)
    done = train(settings(model="mlp:hidden=(8,)", parts=("madl",), epochs=2, batch=16, augment="none"), data)
    assert 0 <= done.test.accuracy <= 1
