"""Diffusion features by hand: the noise schedules, the paper's 37 blocks, what an image becomes, what answers, what rests."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.checks.subject import bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.answer import logits_of
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit, start
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.pretrain.diffusion_features import FeatureNet, denoising_loss, diffusion_features, pooled, sweep
from convince.pretrain.diffusion_unet import DiffusionUNet, fitting, kept_signal, q_sample, time_embedding

TINY = "epochs=1,width=4,mult=(1,2),block=out.0"


def made(*specs, data=None, **changes):
    chosen = {"model": "resnet:layers=(1,1),widths=(4,8)", "parts": specs, "batch": 8, "epochs": 1, "lr": 0.05, "precision": "fp32", "augment": "none"}
    return prepare(settings(**{**chosen, **changes}), data or tiny_images(), drop_off=False)


def awake(unet, seed=0):
    """The U-Net with the layers that begin at 0 drawn as well."""
    gen = torch.Generator().manual_seed(seed)
    for p in unet.parameters():
        if not p.any():
            p.data.copy_(torch.randn(p.shape, generator=gen) * 0.1)
    return unet


# -- noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "kept", "digits"), [(0, 0.9999, 1e-9), (90, 0.913264, 1e-6), (300, 0.394011, 1e-6), (700, 0.006868, 1e-6), (999, 4.036e-5, 1e-8)]
)
def test_the_signal_that_the_linear_schedule_keeps(t, kept, digits):
    assert float(kept_signal()[t]) == pytest.approx(kept, abs=digits)


def test_the_cosine_schedule_by_hand():
    """abar_t = f(t) / f(0) at t = 500 of 1000: cos^2(0.508 / 1.008 pi / 2) / cos^2(0.008 / 1.008 pi / 2) = 0.493844."""
    f = [math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2 for s in (0.5, 0.0)]
    assert float(kept_signal("cosine")[499]) == pytest.approx(f[0] / f[1])
    assert 0 < float(kept_signal("cosine")[-1]) < 1e-5
    with pytest.raises(Mistake, match="linear, cosine"):
        kept_signal("quadratic")


@quick(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["linear", "cosine"]))
def test_a_noisy_image_has_unit_variance(t, schedule):
    """sqrt(abar)^2 + sqrt(1 - abar)^2 = 1, and the image is never louder than before."""
    kept = kept_signal(schedule)[t].expand(2)
    one, zero = torch.ones(2, 1, 3, 3, dtype=torch.float64), torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    signal, noise = q_sample(one, zero, kept), q_sample(zero, one, kept)
    assert torch.allclose(signal.square() + noise.square(), one)
    assert (kept_signal(schedule).diff() < 0).all()


def test_a_noisy_image_by_hand():
    """abar 0.64: 0.8 x 2 + 0.6 x (-1) = 1."""
    assert float(q_sample(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0), torch.tensor([0.64]))) == pytest.approx(1.0)
    assert float(denoising_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, -3.0]]]]))) == 5


def test_the_time_embedding_by_hand():
    found = time_embedding(torch.tensor([0, 100]), 4)
    assert found[0].tolist() == [1, 1, 0, 0]
    assert found[1].tolist() == pytest.approx([math.cos(100), math.cos(1), math.sin(100), math.sin(1)], abs=1e-5)


# -- the network -----------------------------------------------------------------------------------


def test_the_paper_has_37_blocks():
    """256 px: 7x256, 6x512, 12x1024, 6x512, 6x256; block 24 gives 1,024 channels at 16x16; 2x2 averages of it are 4,096 features."""
    with torch.device("meta"):
        unet = DiffusionUNet(3, 256, (1, 1, 2, 2, 4, 4), depth=2, attention=3)
    assert [d for d, _ in unet.shapes.values()] == [256] * 7 + [512] * 6 + [1024] * 12 + [512] * 6 + [256] * 6
    assert [256 >> halved for _, halved in unet.shapes.values()][18] == 8
    name, (d, halved) = list(unet.shapes.items())[23]
    assert (name, d, 256 >> halved, d * 2 * 2) == ("out.4", 1024, 16, 4096)
    heads = {m.heads: m.qkv.in_channels for m in unet.modules() if type(m).__name__ == "Attention"}
    assert all(channels // count == 64 for count, channels in heads.items())


def test_the_small_one_by_hand():
    """Width 4, levels (1, 2): a residual block a -> b has 2a + 9ab + b + 16b + b + 2b + 9bb + b, and ab + b where a is not b."""
    unet = DiffusionUNet(1, 4, (1, 2))

    def block(a, b):
        return 2 * a + 9 * a * b + 21 * b + 9 * b * b + (0 if a == b else a * b + b)

    def attends(d):
        return 2 * d + 3 * d * d + 3 * d + d * d + d

    ins = 9 * 4 + 4 + block(4, 4) + 9 * 16 + 4 + block(4, 8) + attends(8)
    mid = 2 * block(8, 8) + attends(8)
    outs = block(16, 8) + attends(8) + block(12, 8) + attends(8) + 9 * 64 + 8 + block(12, 4) + block(8, 4)
    time, last = 4 * 16 + 16 + 16 * 16 + 16, 8 + 9 * 4 + 1
    assert sum(p.numel() for p in unet.parameters()) == ins + mid + outs + time + last
    assert unet.names == ["in.0", "in.1", "in.2", "in.3", "mid", "out.0", "out.1", "out.2", "out.3"]


@pytest.mark.parametrize(("mult", "depth"), [((1,), 1), ((1, 2), 2), ((2, 1, 1), 1)])
def test_blocks_have_the_shapes_it_says(mult, depth):
    unet = DiffusionUNet(2, 4, mult, depth)
    found = [(name, m.shape[1], m.shape[2]) for name, m in unet.walk(torch.rand(1, 2, 8, 8), torch.tensor([3]))]
    assert found == [(name, d, 8 >> halved) for name, (d, halved) in unet.shapes.items()]


def test_it_begins_by_telling_nothing():
    """The last convolution begins at 0: the loss begins at the noise's variance."""
    unet, x = DiffusionUNet(2, 4, (1, 2)), torch.rand(3, 2, 8, 8)
    assert not unet(x, torch.tensor([0, 5, 999])).any()


def test_the_level_counts_and_rows_do_not_mix():
    unet, x = awake(DiffusionUNet(1, 4, (1, 2))).eval(), torch.rand(2, 1, 8, 8)
    both = unet(x, torch.tensor([3, 800]))
    assert torch.allclose(both[:1], unet(x[:1], torch.tensor([3])), atol=1e-6)
    assert not torch.allclose(both[:1], unet(x[:1], torch.tensor([800])), atol=1e-4)


def test_features_are_the_blocks_map_and_average_draws():
    unet, x, noise = awake(DiffusionUNet(1, 4, (1, 2))).eval(), torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    kept, level = kept_signal()[90].expand(2), torch.tensor([90, 90])
    singly = [dict(unet.walk(q_sample(x, eps.expand_as(x), kept), level))["out.1"] for eps in noise]
    assert torch.equal(diffusion_features(unet, x, noise[:1], 90, "out.1"), singly[0])
    assert torch.allclose(diffusion_features(unet, x, noise, 90, "out.1"), (singly[0] + singly[1]) / 2)
    with pytest.raises(Mistake, match=r"in.0 to in.3, mid, and out.0 to out.3"):
        diffusion_features(unet, x, noise, 90, "out.4")


def test_pooling_by_hand():
    map = torch.arange(16.0).view(1, 1, 4, 4)
    assert pooled(map, 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert pooled(map, 1).tolist() == [[7.5]]
    assert pooled(map, 0).tolist() == [list(range(16))]


@pytest.mark.parametrize(("size", "sides"), [((28, 28), (28, 28)), ((30, 30), (28, 28)), ((224, 224), (64, 64)), ((240, 120), (64, 32)), ((3, 3), (4, 4))])
def test_the_size_it_works_at(size, sides):
    assert fitting(size, 4, 64) == sides


def test_a_sweep_looks_at_every_cell():
    """A cell is the pooled map of its block at its level, each image under noise of its own."""
    unet, x, z = awake(DiffusionUNet(1, 4, (1, 2))).eval(), torch.rand(3, 1, 8, 8), torch.rand(2, 1, 8, 8)
    table = sweep(unet, (x, z), torch.Generator().manual_seed(1), [0, 700], ["in.1", "out.3"], lambda a, b: (a, b))
    assert set(table) == {(t, b) for t in (0, 700) for b in ("in.1", "out.3")}
    gen = torch.Generator().manual_seed(1)
    for images, found in zip((x, z), table[700, "out.3"], strict=True):
        noise = torch.randn(images.shape, generator=gen, dtype=torch.float64).float()
        noisy = q_sample(images, noise, kept_signal()[700].expand(len(images)))
        with torch.no_grad():
            assert torch.allclose(found, pooled(dict(unet.walk(noisy, torch.full((len(images),), 700)))["out.3"]), atol=1e-6)


@pytest.mark.parametrize("block", ["in.0", "mid", "out.0", "out.3"])
def test_what_counts_for_an_answer(block):
    """Exactly the parameters that ``used`` names get a gradient."""
    features = {"t": 90, "block": block, "pool": 2, "head": "linear", "draws": 1, "side": 64, "schedule": "linear"}
    net = FeatureNet(1, (8, 8), 3, {"width": 4, "mult": (1, 2), "depth": 1}, features)
    awake(net.unet)
    net(torch.rand(4, 1, 8, 8)).square().sum().backward()
    got = {n for n, p in net.named_parameters() if p.grad is not None}
    timeless = {n for n, _ in net.named_parameters() if n.startswith("unet.time.")} if block == "in.0" else set()
    assert got == {n for n, _ in net.named_parameters() if net.used(n)} - timeless


# -- the run ---------------------------------------------------------------------------------------


def test_only_the_unet_learns_first_and_only_the_head_afterwards():
    runs = {n: made(f"diffusion-features:{TINY}", epochs=n) for n in (0, 2)}
    begun = made(f"diffusion-features:{TINY}")
    start(begun)
    for run in runs.values():
        fit(run)
    first, second, drawn = bits(runs[0].model), bits(runs[2].model), bits(begun.model)
    moved = {n for n in drawn if not torch.equal(drawn[n], first[n])}
    assert moved
    assert all(n.startswith("diffusion.unet.") for n in moved)
    assert {n for n in first if not torch.equal(first[n], second[n])} == {
        *("diffusion.fc.weight", "diffusion.fc.bias", "diffusion.norm.running_mean", "diffusion.norm.running_var", "diffusion.norm.num_batches_tracked")
    }
    assert type(runs[2].answer.model) is FeatureNet


def test_finetuning_moves_what_the_block_stands_on():
    whole, frozen = made(f"diffusion-features:{TINY},finetune=true"), made(f"diffusion-features:{TINY}")
    fit(whole)
    fit(frozen)
    old = bits(frozen.model)
    moved = {n for n, p in whole.model.named_parameters() if not torch.equal(p, old[n])}
    assert "diffusion.unet.ins.0.weight" in moved
    assert not [n for n in moved if not n.startswith("diffusion.") or "unet.outs.1" in n or "unet.noise" in n]


def test_the_answer_is_an_average_of_the_weights():
    """ema=0 holds the weights that learn; otherwise step 1 goes by (1 + 1) / (10 + 1): 2/11 old, 9/11 new."""
    runs = [made(f"diffusion-features:{TINY},ema={ema}", epochs=0) for ema in (0.0, 0.999)]
    for run in runs:
        run.most_steps = 1
        fit(run)
    begun = made(f"diffusion-features:{TINY}")
    start(begun)
    old = dict(begun.model.diffusion.unet.named_parameters())
    assert not equal(bits(runs[0].model.diffusion.unet), bits(runs[0].extra["diffusion"]))
    for name, p in runs[1].model.diffusion.unet.named_parameters():
        new = runs[1].extra["diffusion"].get_parameter(name)
        share = 2 / 11
        assert torch.allclose(p, share * old[name] + (1 - share) * new, atol=1e-6), name


def test_labels_are_not_looked_at():
    data = tiny_images()
    runs = [made(f"diffusion-features:{TINY}", epochs=0, data=d) for d in (data, dataclasses.replace(data, y=(data.y + 1) % 3))]
    for run in runs:
        fit(run)
    assert not equal(bits(runs[0].model), bits(runs[1].model))


def test_noise_is_told_and_reported():
    run = made(f"diffusion-features:{TINY.replace('epochs=1', 'epochs=12')}", epochs=0)
    fit(run)
    told = [row["value"] for row in run.record.rows if row["kind"] == "reading"]
    assert len(told) == 12
    assert told[-1] < 0.9 < told[0] < 1.2


@pytest.mark.parametrize("options", ["head=attention", "pool=0", "draws=2", "schedule=cosine", "t=0"])
def test_each_option_counts(options):
    x, found = torch.rand(3, 1, 8, 8), []
    for spec in (TINY, f"{TINY},{options}"):
        run = made(f"diffusion-features:{spec}")
        fit(run)
        found.append(run.answer.eval()(x))
    assert not torch.allclose(*found)


def test_any_size_and_a_network_that_does_not_matter(tmp_path):
    data = tiny_images(13, 3)
    run = made(f"diffusion-features:{TINY},side=8", data=data, model="small-cnn:widths=(4,)")
    fit(run)
    assert tuple(run.model.diffusion.size) == (8, 8)
    assert run.evaluate("test").probs.shape == (8, 3)


class Killed(Exception):
    pass


def test_resume_and_reload(tmp_path):
    spec = f"diffusion-features:{TINY.replace('epochs=1', 'epochs=2')}"
    whole = made(spec, checkpoint_seconds=0)
    fit(whole)
    steps = []

    def kill(*_):
        steps.append(1)
        if len(steps) == 6:
            raise Killed

    with pytest.raises(Killed):
        fit(made(spec, checkpoint_seconds=0), tmp_path / "c", kill)
    again = made(spec, checkpoint_seconds=0)
    fit(again, tmp_path / "c")
    assert not equal(bits(whole.answer), bits(again.answer))
    assert not equal(bits(whole.extra), bits(again.extra))
    write_config(tmp_path, whole.settings)
    write_model(tmp_path, whole)
    x = whole.data.x.take(torch.arange(5))
    assert torch.equal(open_run(tmp_path).logits(x), logits_of(whole.answer.eval(), x, whole.plan))


def test_the_answer_can_be_copied_exported_and_explained():
    run = made(f"diffusion-features:{TINY}")
    fit(run)
    answer, x = run.answer.eval(), torch.rand(2, 1, 8, 8, requires_grad=True)
    assert torch.equal(copy.deepcopy(answer)(x), answer(x))
    answer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    exported = torch.export.export(answer, (x.detach(),)).module()
    assert torch.allclose(exported(x.detach()), answer(x), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": -1}, "at least"),
        ({"t": 1000}, "0 to 999"),
        ({"head": "mlp"}, "attention"),
        ({"width": 3}, "even"),
        ({"schedule": "exp"}, "linear"),
        ({"lr": 0}, "above 0"),
    ],
)
def test_refusals(options, says):
    with pytest.raises(Mistake, match=says):
        parts.make("diffusion-features", **options)


def test_a_wrong_block_is_refused_at_the_start():
    with pytest.raises(Mistake, match=r"block='out.9'"):
        fit(made("diffusion-features:block=out.9"))


def test_the_network_of_the_run_rests():
    run = made(f"diffusion-features:{TINY}")
    assert isinstance(run.model, nn.Identity)
    with pytest.raises(Mistake, match="mutes"):
        made(f"diffusion-features:{TINY}", "se")
