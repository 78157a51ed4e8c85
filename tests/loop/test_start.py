"""Pretraining alone, beginning with another run's weights, and pictures without labels."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from convince.checks.subject import tiny_images
from convince.data import load
from convince.errors import Mistake
from convince.fit.settings import settings
from convince.fit.train import train

HOW = {"model": "small-cnn:widths=(4,8)", "batch": 8, "augment": "none", "precision": "fp32", "epochs": 1, "checkpoint_seconds": 0}


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    """A run that learnt rotations of pictures without labels, and the folder of them."""
    root = tmp_path_factory.mktemp("heap")
    gen = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(gen.integers(0, 255, (8, 8), dtype=np.uint8)).save(root / f"{i}.png")
    data = load(root, size=8, unlabelled=True)
    run = tmp_path_factory.mktemp("runs") / "pre"
    return train(settings(**HOW, parts=("rotnet:epochs=2",), pretrain_only=True), data, folder=run), run, root


def test_pictures_directly_in_a_folder_are_unlabelled_and_all_for_training(heap):
    done, _, root = heap
    assert len(done.data.split.train) == 16
    assert bool((done.data.y == -1).all())
    with pytest.raises(Mistake, match="no class folders"):
        load(root, size=8)


def test_pretraining_alone_stops_before_the_main_stage(heap):
    done, run, _ = heap
    assert {row["stage"] for row in done.run.record.rows if row["kind"] == "epoch"} == {"rotnet"}
    assert done.test is None
    assert (run / "model.safetensors").exists()


def test_pretraining_alone_needs_something_to_pretrain(heap):
    with pytest.raises(Mistake, match="no part that is switched on has a stage before"):
        train(settings(**HOW, pretrain_only=True), tiny_images())


def test_a_run_begins_with_the_weights_of_another(heap):
    _, run, _ = heap
    from safetensors.torch import load_file

    stored = load_file(run / "model.safetensors")
    done = train(settings(**{**HOW, "epochs": 0}, start=str(run)), tiny_images())
    mine = done.run.model.state_dict()
    same = [name for name in stored if stored[name].shape == mine[name].shape]
    assert all(torch.equal(stored[name], mine[name]) for name in same)
    assert 0 < len(same) < len(mine), "the head has other classes and stays as drawn"
    assert any("started with" in note for note in done.notes)


def test_where_nothing_fits_or_nothing_is_there_it_is_said(heap, tmp_path):
    _, run, _ = heap
    with pytest.raises(Mistake, match="no weights can be read"):
        train(settings(**HOW, start=str(tmp_path)), tiny_images())
    with pytest.raises(Mistake, match="none of its weights fits"):
        train(settings(**{**HOW, "model": "resnet:layers=(1,1),widths=(4,8)"}, start=str(run)), tiny_images())


def test_labelled_and_unlabelled_pictures_go_together(heap):
    """The pretext sees all rows, the main stage those with a label."""
    base = tiny_images()
    y = base.y.clone()
    y[base.split.train[::2]] = -1
    done = train(settings(**HOW, parts=("rotnet:epochs=1",)), dataclasses.replace(base, y=y))
    images = {c.name: c.images for c in done.run.ledger}
    assert images == {"rotnet": 4 * 32, "train": 16}
