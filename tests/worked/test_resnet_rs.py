"""ResNet-RS: published counts, the block by hand, the recipe's switches, and that all off is the baseline."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from convince.backbones import builder
from convince.backbones.resnet_rs import BLOCKS, SIZES, Block, resnet_rs, scale_rule
from convince.checks.subject import bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.folder import open_run
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare, train
from convince.training.resnet_rs_training import OFF, ResNetRsTraining, ladder, magnitude_for

COUNTS = {50: 35_691_912, 101: 63_618_696, 152: 86_621_576, 200: 93_209_992, 270: 129_861_448, 350: 163_956_168, 420: 191_891_656}


def recipe(**switches):
    return "resnet-rs-training:" + ",".join(f"{k}={v}" for k, v in {**OFF, **switches}.items())


def run(*parts, **changes):
    chosen = {"model": "resnet:layers=(1,1),widths=(4,8)", "batch": 8, "epochs": 2, "lr": 0.05, "precision": "fp32", "augment": "none"}
    made = prepare(settings(**{**chosen, "parts": parts, **changes}), tiny_images(), drop_off=False)
    fit(made)
    return made


@pytest.mark.parametrize("depth", [50, 101, 152, 200])
def test_published_counts(depth):
    with torch.device("meta"):
        model = builder(f"resnet-rs{depth}", num_classes=1000, in_chans=3, size=(160, 160))()
    assert sum(p.numel() for p in model.parameters()) == COUNTS[depth]
    assert 3 * sum(BLOCKS[depth]) + 2 == depth


def test_presets_name_every_depth():
    assert set(BLOCKS) == set(SIZES) == set(COUNTS)
    assert max(side for sides in SIZES.values() for side in sides) == 320
    assert (scale_rule(10), scale_rule(350)) == ("width", "depth")


def test_small_count_by_hand():
    """Widths 16-32-64, one block a stage, 10 classes, 3 channels."""

    def block(a, b):
        hidden = b // 4
        return 9 * a * b + 9 * b * b + 4 * b + (b * hidden + hidden) + (hidden * b + b) + (0 if a == b else a * b + 2 * b)

    stem = 27 * 8 + 9 * 8 * 8 + 9 * 8 * 16 + 2 * (8 + 8 + 16)
    expected = stem + block(16, 16) + block(16, 32) + block(32, 64) + 65 * 10
    assert sum(p.numel() for p in resnet_rs().parameters()) == expected


def test_shortcut_is_the_mean_of_four():
    block = Block(1, 2, 2).eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.downsample[1].weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
        found = block(torch.tensor([[[[1.0, 2], [3, 6]]]]))
    torch.testing.assert_close(found.flatten(), torch.tensor([3.0, 6.0]), rtol=1e-4, atol=0)


def test_odd_sides():
    assert resnet_rs(4, 1)(torch.rand(2, 1, 27, 31)).shape == (2, 4)


def test_all_switches_off_is_the_baseline():
    assert not equal(bits(run().answer), bits(run(recipe()).answer))


@pytest.mark.parametrize("switch", [{"smoothing": 0.1}, {"ema": 0.9}, {"layers": 1}, {"dropout": 0.5}, {"weight_decay": 0.1}])
def test_each_switch_alone_does_something(switch):
    assert equal(bits(run().answer), bits(run(recipe(**switch)).answer))


@pytest.mark.parametrize(
    ("switch", "part"),
    [({"smoothing": 0.2}, "label-smoothing:smoothing=0.2"), ({"ema": 0.9}, "ema:decay=0.9")],
)
def test_a_switch_is_the_part(switch, part):
    assert not equal(bits(run(recipe(**switch)).answer), bits(run(part).answer))


def test_weight_decay_is_the_runs_lowered():
    assert not equal(bits(run(recipe(weight_decay=0.02)).answer), bits(run(weight_decay=0.02).answer))
    groups = run(recipe(weight_decay=0.02), steps=3).team.seats
    assert groups[0].technique.weight_decay == 0.02
    assert not equal(bits(run(recipe(weight_decay=0.02), weight_decay=0.0).answer), bits(run(weight_decay=0.0).answer)), "no decay stays none"


def test_dropout_is_before_the_head_in_training_alone():
    made = run(recipe(dropout=0.5))
    assert isinstance(made.model.fc.input_dropout, nn.Dropout)
    x = torch.rand(4, 1, 8, 8)
    answer = made.answer.eval()
    assert torch.equal(answer(x), answer(x))
    made.model.train()
    assert not torch.equal(made.model.fc(torch.ones(4, 8)), made.model.fc(torch.ones(4, 8)))


def test_the_ladder_adds_one_rung_at_a_time():
    rungs = ladder()
    assert rungs[0] == OFF
    for a, b in itertools.pairwise(rungs):
        assert len([k for k in a if a[k] != b[k]]) == 1
    default = ResNetRsTraining()
    assert all(getattr(default, k) == v for k, v in rungs[-1].items())


def test_magnitudes():
    assert [magnitude_for(side) for side in (28, 32, 63, 64, 160, 191, 192, 320)] == [5, 5, 5, 10, 10, 10, 15, 15]


def test_whole_recipe_reloads(tmp_path):
    chosen = settings(model="resnet:layers=(1,1),widths=(4,8)", batch=8, epochs=2, lr=0.05, precision="fp32", augment="none", parts=("resnet-rs-training",))
    done = train(chosen, tiny_images(), folder=tmp_path / "run")
    x = tiny_images().x.take(torch.arange(8))
    assert torch.equal(open_run(tmp_path / "run").logits(x), done.answer(x.float() / 255))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: resnet_rs(depth=18), "depth=18"),
        (lambda: resnet_rs(layers=(1, 1)), "one number a stage"),
        (lambda: resnet_rs(drop_path=0.1), "drop_path=0.1"),
        (lambda: ResNetRsTraining(dropout=1.0), "dropout=1.0"),
        (lambda: ResNetRsTraining(ema=1.0), "decay=1.0"),
        (lambda: ResNetRsTraining(magnitude=40), "magnitude=40"),
        (lambda: ResNetRsTraining(smoothing=2.0), "smoothing=2.0"),
        (lambda: ResNetRsTraining(weight_decay=-1.0), "weight_decay=-1.0"),
        (lambda: run("resnet-rs-training", "ema"), "switch on one of them"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(Mistake, match=words):
        make()
