"""NetAug by hand: slices, counts, which channels go together, eq. 2, and what the further pass leaves alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.checks.subject import Subject, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.parts import get
from convince.training.netaug import augmented, base_widths, draw_widths, extra_weights, largest_widths, plan_of, widened


def net(spec, side=16, channels=3):
    torch.manual_seed(0)
    return builder(spec, num_classes=10, in_chans=channels, size=(side, side))().double().eval()


def planned(model, side=16, channels=3):
    return plan_of(model, model, torch.rand(2, channels, side, side, dtype=torch.float64))


def test_widened_by_hand():
    base, right, below = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6], [7, 8]]), torch.tensor([[9.0, 10, 11, 12], [13, 14, 15, 16]])
    assert widened(base, right, below, 3, 3).tolist() == [[1, 2, 5], [3, 4, 7], [9, 10, 11]]
    assert widened(base, right, below, 2, 2) is base
    assert widened(base, right, below, 4, 4)[:2, :2].tolist() == base.tolist()


def test_published_sizes():
    """MobileNetV2-Tiny is w0.35 with a final conv of 448: 0.75 million parameters for 1,000 classes."""
    with torch.device("meta"):
        model = builder("timm/mobilenetv2_035", num_classes=10, in_chans=3, size=(64, 64))()
    count = sum(p.numel() for p in model.parameters())
    wide, tiny = 1280 * 112 + 2 * 1280 + 1281 * 10, 448 * 112 + 2 * 448 + 449 * 1000
    assert count - wide + tiny == 750_280
    assert sum(p.numel() for p in net("small-cnn:widths=(8,16,24)").parameters()) == 5_170


def test_plain_network_has_three_widths_and_its_largest_count():
    model = net("small-cnn:widths=(8,16,24)")
    plan = planned(model)
    assert [(space.size, space.middle) for space in plan.spaces] == [(8, False), (16, False), (24, False)]
    extra = extra_weights(model, plan, largest_widths(plan, (1, 2, 3), (1.0,)))
    whole = sum(p.numel() for p in [*model.parameters(), *extra.parameters()])
    with torch.device("meta"):
        wide = builder("small-cnn:widths=(24,48,72)", num_classes=10, in_chans=3, size=(16, 16))()
    assert whole == sum(p.numel() for p in wide.parameters())


def test_residual_blocks_share_widths_and_hide_their_middle():
    plan = planned(net("resnet8"))
    assert [space.size for space in plan.spaces if space.middle] == [16, 32, 64], "conv1 of each block"
    assert [space.size for space in plan.spaces if not space.middle] == [16, 32, 64], "stem with layer1; conv2 with its shortcut"
    joined = [plan.layers[name].writes.root() for name in ("conv1.weight", "layer1.0.conv2.weight")]
    assert joined[0] is joined[1]


def test_inverted_blocks():
    model = net("timm/mobilenetv2_035", side=32)
    plan = planned(model, side=32)
    assert plan.layers["blocks.1.0.conv_dw.weight"].reads is None
    hidden = plan.layers["blocks.1.0.conv_pw.weight"].writes.root()
    assert hidden is plan.layers["blocks.1.0.conv_dw.weight"].writes.root()
    assert hidden.middle
    assert not plan.layers["blocks.1.0.conv_pwl.weight"].writes.root().middle
    widths = largest_widths(plan, (1.0, 2.0), (1.0, 3.0))
    assert widths[id(hidden)] == hidden.size * 6, "expansion times the block's input"
    extra = extra_weights(model, plan, widths)
    with augmented(model, plan, extra, widths):
        assert model(torch.rand(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 10)


@pytest.mark.parametrize("spec", ["small-cnn:widths=(4,8)", "resnet8", "nin:width=8"])
def test_at_base_widths_it_is_the_plain_network(spec):
    model = net(spec)
    plan = planned(model)
    extra = extra_weights(model, plan, largest_widths(plan, (1, 3), (1, 2)))
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    with augmented(model, plan, extra, base_widths(plan)):
        inside = model(x)
    torch.testing.assert_close(inside, model(x), rtol=0, atol=1e-5)
    with augmented(model, plan, extra, largest_widths(plan, (1, 3), (1, 2))):
        assert not torch.allclose(model(x), inside), "the widened network is another one"


def test_widened_network_is_the_wide_one():
    """A wide small-cnn with the assembled weights gives the same scores."""
    model, wide = net("small-cnn:widths=(2,3)").train(), net("small-cnn:widths=(4,6)").train()
    plan = planned(model)
    widths = largest_widths(plan, (1.0, 2.0), (1.0,))
    extra = extra_weights(model, plan, widths)
    with torch.no_grad():
        for name, p in wide.named_parameters():
            base, key = dict(model.named_parameters())[name], name.replace(".", "-")
            if name == "fc.bias":
                p.copy_(base)
            elif p.dim() == 1:
                p.copy_(torch.cat([base, extra[f"{key}-below"]]))
            else:
                right, below = (extra.get(f"{key}-{which}", base) for which in ("right", "below"))
                p.copy_(widened(base, right, below, *p.shape[:2]))
    x = torch.rand(5, 3, 16, 16, dtype=torch.float64)
    with augmented(model, plan, extra, widths):
        torch.testing.assert_close(model(x), wide(x))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.booleans())
def test_drawn_widths_are_allowed(seed, middle_only):
    plan = RESNET
    widths = draw_widths(plan, (1.0, 1.8, 2.6), (1.0, 1.6, 2.2, 2.8), generator(seed), middle_only=middle_only)
    for space in plan.spaces:
        m = 1.0
        if space.middle:
            source = space.source.root()
            m = widths[id(source)] / source.size
            assert min(abs(widths[id(space)] - space.size * e * a) for e in (1.0, 1.6, 2.2, 2.8) for a in (1.0, 1.8, 2.6)) <= 0.51
            assert widths[id(space)] >= round(space.size * m) - 1
        elif middle_only:
            assert widths[id(space)] == space.size
        else:
            assert widths[id(space)] in {round(space.size * e) for e in (1.0, 1.8, 2.6)}


RESNET = planned(net("resnet8"))


def test_all_multipliers_occur():
    first = RESNET.spaces[0]
    seen = [draw_widths(RESNET, (1, 2, 3), (1.0,), generator(i))[id(first)] for i in range(300)]
    assert {seen.count(first.size * m) > 60 for m in (1, 2, 3)} == {True}


def test_gradient_is_that_of_equation_2():
    """The gradient at the base's weights is grad L(W) + alpha grad L([W, W_i]); the new weights get alpha times theirs."""
    chosen = {"model": "small-cnn:widths=(2,3)", "batch": 32, "epochs": 1, "precision": "fp64", "augment": "none", "lr": 1.0, "weight_decay": 0.0}
    chosen |= {"schedule": "constant"}
    moved = {}
    for alpha in (0.0, 0.5, 1.0):
        run = prepare(make(**chosen, parts=(f"netaug:alpha={alpha},width_mults=(2.0,),expand_mults=(1.0,)",)), tiny_images(), drop_off=False)
        fit(run)
        moved[alpha] = (dict(run.model.named_parameters()), run)
    for name, base in moved[0.0][0].items():
        half, whole = moved[0.5][0][name] - base, moved[1.0][0][name] - base
        torch.testing.assert_close(2 * half, whole, rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(p, moved[1.0][0][n]) for n, p in moved[0.0][0].items())
    run = moved[1.0][1]
    assert run.images == 64, "the further pass is counted"
    for name, buffer in run.model.named_buffers():
        assert torch.equal(buffer, dict(moved[0.0][1].model.named_buffers())[name]), "the first batch's statistics are the base's alone"


def test_second_half_widens_only_the_middle():
    data = tiny_images()
    for model, images in (("small-cnn:widths=(2,3)", 32 * 4 + 32 * 2), ("resnet:layers=(1,1),widths=(2,3)", 32 * 8)):
        run = prepare(make(model=model, batch=16, epochs=4, precision="fp32", augment="none", lr=0.01, parts=("netaug:width_mults=(2.0,)",)), data)
        fit(run)
        assert run.images == images, "a network without middle channels trains alone in the second half"


def test_what_ships_is_the_plain_network():
    run = Subject(get("netaug")).trained
    assert set(run.answer.state_dict()) == set(Subject(get("netaug")).baseline.answer.state_dict())
    assert len(run.extra["netaug"]) > 0


def test_the_objective_is_the_runs_own():
    data = tiny_images()
    both = []
    for parts in (("netaug:width_mults=(2.0,)", "poly1:epsilon=2.0"), ("netaug:width_mults=(2.0,)",)):
        run = prepare(make(model="small-cnn:widths=(2,3)", batch=32, epochs=1, precision="fp64", augment="none", lr=0.1, parts=parts), data)
        fit(run)
        both.append(float(run.loss.detach()))
    assert both[0] > both[1] + 0.5, "epsilon adds 2 (1 - Pt) to each of two losses"


@pytest.mark.parametrize(
    ("parts", "model", "words"),
    [
        ("netaug", "timm/vit_tiny_patch16_224:depth=1,embed_dim=12,num_heads=1,patch_size=4", "no channels to widen"),
        ("netaug:alpha=-1", "resnet8", "alpha=-1"),
        ("netaug:width_mults=(0.5,)", "resnet8", "at least 1"),
        ("netaug:full=2", "resnet8", "full=2"),
    ],
)
def test_refusals(parts, model, words):
    with pytest.raises(Mistake, match=words):
        fit(prepare(make(model=model, batch=16, epochs=1, precision="fp32", augment="none", parts=(parts,)), tiny_images()))


def test_it_learns_where_the_plain_network_does():
    x = torch.rand(4, 1, 8, 8)
    run = prepare(make(model="small-cnn:widths=(4,8)", batch=8, epochs=8, precision="fp32", augment="none", lr=0.05, parts=("netaug",)), tiny_images())
    fit(run)
    assert run.evaluate("train").accuracy > 0.8
    assert F.softmax(run.answer.eval()(x), 1).shape == (4, 3)
