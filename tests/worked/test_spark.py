"""SparK by hand: the share of hidden cells, emptiness through every layer, the decoder's size, the error of a cell."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince import parts
from convince.backbones.resnet import ResNet
from convince.checks.subject import bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit, start
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.pretrain.spark import LightDecoder, Map, at_size, cell_of, draw_mask, maps_of, masked_mean, patch_error, seen_only, sparse


def count(module):
    return sum(p.numel() for p in module.parameters())


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def made(*specs, data=None, **changes):
    chosen = {"model": "resnet:layers=(1,1),widths=(4,8)", "parts": specs, "batch": 8, "epochs": 1, "lr": 0.05, "precision": "fp32", "augment": "none"}
    return prepare(settings(**{**chosen, **changes}), data or tiny_images(), drop_off=False)


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "seen"), [(7, 20), (8, 26), (2, 2)])
def test_cells_that_are_seen(side, seen):
    """The paper keeps 20 of 7x7 cells; the check 26 of 8x8."""
    mask = draw_mask(5, (side, side), 0.6, gen())
    assert mask.sum((1, 2, 3)).tolist() == [seen] * 5
    assert torch.equal(mask, draw_mask(5, (side, side), 0.6, gen()))
    assert not torch.equal(mask[0], mask[1]) or side == 2


def test_every_cell_is_hidden_equally_often():
    share = draw_mask(4000, (4, 4), 0.6, gen()).float().mean(0)
    assert (share - 6 / 16).abs().max() < 0.03


def test_a_mask_at_a_larger_size_by_hand():
    mask = torch.tensor([[[[True, False]]]])
    assert at_size(mask, 2, 4).int().tolist() == [[[[1, 1, 0, 0], [1, 1, 0, 0]]]]
    assert at_size(mask, 1, 1) is None


@quick(max_examples=15, deadline=None)
@given(st.integers(0, 50), st.sampled_from([(1, 1), (2, 2, 1)]))
def test_hidden_places_stay_empty_through_the_network(seed, layers):
    """At every stage exactly the hidden places are 0: the share of places in use is the mask's at each depth."""
    torch.manual_seed(seed)
    net, x = ResNet(3, 2, layers, (4, 8, 16)[: len(layers)]), torch.rand(3, 2, 16, 16)
    mask, used = draw_mask(3, (4, 4), 0.6, gen(seed)), {}
    for sparsely in (True, False):
        hooks = [
            getattr(net, f"layer{i + 1}").register_forward_hook(lambda m, a, o, i=i, s=sparsely: used.update({(s, i): o.abs().sum(1, True) > 0}))
            for i in range(len(layers))
        ]
        if sparsely:
            with sparse(net, mask):
                net.forward_features(x * at_size(mask, 16, 16))
        else:
            net.forward_features(x * at_size(mask, 16, 16))
        for hook in hooks:
            hook.remove()
    for i in range(len(layers)):
        here = at_size(mask, *used[True, i].shape[2:])
        assert not (used[True, i] & ~here).any()
    shares = [float(used[False, i].float().mean()) for i in range(len(layers))]
    assert min(shares) > 0.5 > 6 / 16, "the dense network fills hidden places, as the paper says"


def test_a_mask_of_ones_changes_nothing():
    net, x = ResNet(3, 2, (1, 1), (4, 8), "photo"), torch.rand(3, 2, 32, 32)
    twin = ResNet(3, 2, (1, 1), (4, 8), "photo")
    twin.load_state_dict(net.state_dict())
    plain = twin(x)
    with sparse(net, torch.ones(3, 1, 4, 4, dtype=torch.bool)):
        assert torch.allclose(net(x), plain, atol=1e-5)
    assert torch.allclose(net.bn1.running_var, twin.bn1.running_var, atol=1e-6)


def test_the_statistics_are_those_of_seen_places():
    """Seen values 1 and 3 of (1, 100, 3, 100): mean 2, deviation 1; the hidden ones are 0 and count for nothing."""
    norm, x = nn.BatchNorm2d(1, eps=1e-12), torch.tensor([[[[1.0, 100.0, 3.0, 100.0]]]])
    mask = torch.tensor([[[[True, False, True, False]]]])
    assert seen_only(norm, x, mask).flatten().tolist() == pytest.approx([-1, 0, 1, 0], abs=1e-6)
    assert float(norm.running_mean) == pytest.approx(0.1 * 2)


def test_the_network_is_left_as_it_was():
    net = ResNet(3, 1, (1, 1), (4, 8))
    names = [(n, type(m)) for n, m in net.named_modules()]
    with pytest.raises(RuntimeError), sparse(net, torch.ones(1, 1, 2, 2, dtype=torch.bool)):
        raise RuntimeError
    assert names == [(n, type(m)) for n, m in net.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# -- decoder and loss ------------------------------------------------------------------------------


def test_the_decoder_of_the_paper():
    """ResNet-50: widths 768, 384, 192, 96 of the densified maps, then 48 and 24, and a 1x1 convolution to 3 channels."""
    found = [Map("a", 4, 256), Map("b", 8, 512), Map("c", 16, 1024), Map("d", 32, 2048)]
    decoder = LightDecoder(found, 768, 3)
    assert [(k, d.project.in_channels, d.project.out_channels, d.project.kernel_size[0]) for k, d in decoder.densify.items()] == [
        ("32", 2048, 768, 1),
        ("16", 1024, 384, 3),
        ("8", 512, 192, 3),
        ("4", 256, 96, 3),
    ]
    blocks = sum(a * a * 16 + a + 9 * a * a + 2 * a + 9 * a * b + 2 * b for a, b in [(768, 384), (384, 192), (192, 96), (96, 48), (48, 24)])
    dense = sum(3 * a + a * b * e * e + b for a, b, e in [(2048, 768, 1), (1024, 384, 3), (512, 192, 3), (256, 96, 3)])
    assert count(decoder) == blocks + dense + 24 * 3 + 3
    maps = {m.stride: torch.rand(1, m.channels, 64 // m.stride, 64 // m.stride) for m in found}
    assert decoder(maps, torch.tensor([[[[True, False], [False, True]]]])).shape == (1, 3, 64, 64)


def test_equal_widths_need_no_projection():
    decoder = LightDecoder([Map("a", 2, 8), Map("b", 4, 64)], 64, 1, token=False)
    assert isinstance(decoder.densify["4"].project, nn.Identity)
    assert decoder.densify["2"].project.kernel_size == (3, 3)
    assert decoder.densify["2"].token is None


def test_the_embedding_stands_in_hidden_places():
    densify = LightDecoder([Map("a", 1, 3), Map("b", 2, 3)], 3, 1).densify["2"]
    mask = torch.tensor([[[[True, False], [False, True]]]])
    out = densify(torch.rand(1, 3, 2, 2), mask)
    assert torch.equal(out[0, :, 0, 1], densify.token.flatten())
    assert not torch.equal(out[0, :, 0, 0], densify.token.flatten())


def test_the_error_of_a_cell_by_hand():
    """Pixels 0, 0, 2, 2: mean 1, unbiased variance 4/3, targets -+ 0.8660254; a guess of 0 errs by 0.75, an exact one by 0."""
    x = torch.tensor([[[[0.0, 0.0], [2.0, 2.0]]]])
    assert float(patch_error(torch.zeros_like(x), x, 2)) == pytest.approx(0.75, abs=1e-5)
    assert float(patch_error((x - 1) * 0.8660254, x, 2)) == pytest.approx(0, abs=1e-9)
    assert float(patch_error(torch.zeros(1, 3, 4, 4), torch.rand(1, 3, 4, 4), 4)) == pytest.approx(47 / 48, abs=1e-3)


def test_only_hidden_cells_count():
    error, mask = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[[[True, False]]], [[[False, True]]]])
    assert float(masked_mean(error, mask)) == 3
    assert float(masked_mean(error, mask, "all")) == 3.75


# -- the stage -------------------------------------------------------------------------------------


def test_cells_by_image_size():
    assert [cell_of((s, s), t, None) for s, t in [(224, 32), (28, 4), (32, 4), (64, 32), (224, 4), (8, 2)]] == [32, 4, 4, 32, 28, 2]
    with pytest.raises(Mistake, match="patch=6"):
        cell_of((32, 32), 4, 6)
    with pytest.raises(Mistake, match="larger --size"):
        cell_of((32, 32), 32, None)


@pytest.mark.parametrize(
    ("model", "side", "expected"),
    [
        ("resnet8", 28, [("layer1", 1), ("layer2", 2), ("layer3", 4)]),
        ("resnet18-slim", 64, [("relu", 2), ("layer1", 4), ("layer2", 8), ("layer3", 16), ("layer4", 32)]),
        ("timm/resnet10t", 64, [("act1", 2), ("layer1", 4), ("layer2", 8), ("layer3", 16), ("layer4", 32)]),
    ],
)
def test_maps_are_found_by_their_strides(model, side, expected):
    run = made("spark:epochs=1,width=16", data=tiny_images(side), model=model)
    start(run)
    assert [(m.module, m.stride) for m in maps_of(run)] == expected
    assert list(run.extra["spark"].modules_at) == [s for _, s in expected if s > 1][-4:]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [run.normalise, *run.model.modules()])


def test_what_cannot_work_is_said():
    for options in ({"epochs": -1}, {"ratio": 1.0}, {"scales": 0}, {"over": "some"}):
        with pytest.raises(Mistake, match=next(iter(options))):
            parts.make("spark", **options)
    with pytest.raises(Mistake, match="--size 32"):
        fit(made("spark:epochs=1", data=tiny_images(28), model="small-cnn"))
    with pytest.raises(Mistake, match="needs two or more"):
        fit(made("spark:epochs=1", model="resnet:layers=(1,),widths=(4,)"))


def test_a_norm_over_space_is_refused():
    run = made("spark:epochs=1", data=tiny_images(32))
    whole = run.build

    def build():
        net = whole()
        net.bn1 = nn.GroupNorm(2, 4)
        return net

    run.build = build
    with pytest.raises(Mistake, match="stay empty"):
        fit(run)


def test_the_head_rests_and_the_rest_moves():
    whole, begun = made("spark:epochs=1", epochs=0), made(epochs=0)
    fit(whole)
    fit(begun)
    old = dict(begun.model.named_parameters())
    assert {n for n, p in whole.model.named_parameters() if torch.equal(p, old[n])} == {"fc.weight", "fc.bias"}
    told = [row["value"] for row in whole.record.rows if row["kind"] == "reading"]
    assert len(told) == 1
    assert 0 < told[0] < 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [whole.normalise, *whole.model.modules()])


def test_labels_are_not_looked_at():
    data = tiny_images()
    runs = [made("spark:epochs=1", epochs=0, data=d) for d in (data, dataclasses.replace(data, y=(data.y + 1) % 3))]
    for run in runs:
        fit(run)
    assert not equal(bits(runs[0].model), bits(runs[1].model))


def test_cells_are_learnt_and_ablations_differ():
    found = {}
    for spec in ("epochs=4", "epochs=1", "epochs=1,sparse=false", "epochs=1,scales=1", "epochs=1,token=false", "epochs=1,over=all"):
        run = made(f"spark:{spec}", epochs=0, lr=0.1, model="resnet:layers=(1,1,1),widths=(4,8,8)" if "scales" in spec else "resnet8:widths=(4,4,8)")
        fit(run)
        found[spec] = [row["value"] for row in run.record.rows if row["kind"] == "reading"][-1]
    assert found["epochs=4"] < found["epochs=1"] < 2
    assert len(set(found.values())) == 6


class Killed(Exception):
    pass


def test_resume_and_reload(tmp_path):
    whole, steps = made("spark:epochs=2", checkpoint_seconds=0), []
    fit(whole)

    def kill(*_):
        steps.append(1)
        if len(steps) == 6:
            raise Killed

    with pytest.raises(Killed):
        fit(made("spark:epochs=2", checkpoint_seconds=0), tmp_path / "c", kill)
    again = made("spark:epochs=2", checkpoint_seconds=0)
    fit(again, tmp_path / "c")
    assert not equal(bits(whole.model), bits(again.model))
    assert not equal(bits(whole.extra), bits(again.extra))
    write_config(tmp_path, whole.settings)
    write_model(tmp_path, whole)
    assert not equal(bits(open_run(tmp_path).run.model), bits(whole.model))


def test_off_is_the_baseline():
    runs = [made(*spec) for spec in ((), ("spark:epochs=0",))]
    for run in runs:
        fit(run)
    assert not equal(bits(runs[0].answer), bits(runs[1].answer))
