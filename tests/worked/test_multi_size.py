"""Multi-size training by hand: the paper's two sizes in turn, sizes drawn by epoch, what a network sees."""

import pytest
import torch
from torch import nn

from convince.checks.subject import Subject
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.parts import get
from convince.training.multi_size import MultiSize, at_epoch, resized, sizes


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_papers_sizes():
    assert sizes(MultiSize().scales, (224, 224)) == [(224, 224), (180, 180)]
    assert sizes((1.0, 28 / 36), (36, 36)) == [(36, 36), (28, 28)]
    assert sizes((0.01,), (28, 32)) == [(1, 1)]


def test_epochs_take_turns_or_draw():
    assert [at_epoch((1.0, 0.8), epoch, "cycle", gen()) for epoch in range(4)] == [1.0, 0.8, 1.0, 0.8]
    drawn = [at_epoch((1.0, 0.8), 0, "uniform", gen(seed)) for seed in range(200)]
    assert 0.8 <= min(drawn) < 0.81
    assert 0.99 < max(drawn) <= 1


def test_resizing_keeps_what_fits_and_means():
    x = torch.rand(2, 1, 8, 8, generator=gen())
    assert resized(x, (8, 8)) is x
    half = resized(torch.full((1, 1, 8, 8), 0.3), (4, 6))
    torch.testing.assert_close(half, torch.full((1, 1, 4, 6), 0.3))


@pytest.mark.parametrize("draw", ["cycle", "uniform"])
def test_a_run_sees_one_size_each_epoch(draw):
    run = Subject(get("multi-size")).run(f"multi-size:scales=(1.0,0.5),draw={draw}", epochs=4)
    build, seen = run.build, []

    def watched():
        net = build()
        first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_pre_hook(lambda m, inputs: seen.append((run.epoch, tuple(inputs[0].shape[2:]))) if m.training else None)
        return net

    run.build = watched
    fit(run)
    epochs = {epoch: {size for e, size in seen if e == epoch} for epoch in range(4)}
    assert all(len(found) == 1 for found in epochs.values())
    if draw == "cycle":
        assert list(epochs.values()) == [{(8, 8)}, {(4, 4)}, {(8, 8)}, {(4, 4)}]
    else:
        assert len({min(found) for found in epochs.values()}) > 1


def test_a_network_for_one_size_is_refused():
    run = Subject(get("multi-size")).run("multi-size:scales=(1.0,0.5)", model="cnn-agarap")
    with pytest.raises(Mistake, match="multi-size: the network 'cnn-agarap' does not take images of 4x4 pixels"):
        fit(run)


@pytest.mark.parametrize("other", ["cascaded-forward", "mono-forward"])
def test_a_part_made_for_one_size_is_named_as_the_cause(other):
    run = Subject(get("multi-size")).run("multi-size:scales=(0.5,)", Subject(get(other)).spec)
    with pytest.raises(Mistake, match="multi-size: a step on images of 4x4 pixels fails"):
        fit(run)


@pytest.mark.parametrize(("how", "words"), [({"scales": ()}, r"scales=\(\)"), ({"scales": (1.0, 0.0)}, "scales="), ({"draw": "any"}, "draw='any' must be")])
def test_wrong_options(how, words):
    with pytest.raises(Mistake, match="multi-size: " + words):
        MultiSize(**how)
