"""int8, qat, separable-cnn: the whitepaper's numbers by hand, integer arithmetic, folding, reload."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones.resnet import ResNet
from convince.backbones.separable_cnn import SeparableCNN
from convince.backbones.small_cnn import SmallCNN
from convince.checks.subject import tiny_images
from convince.claims.quantization_whitepaper import judge, rescale
from convince.compress import quantisers as q
from convince.compress.int8 import Int8, Int8Layer, network, quantise, sensitivity_scan, size_report
from convince.compress.measuring import macs, measure
from convince.compress.qat import QAT, QatConv2d
from convince.errors import Mistake
from convince.fit.answer import score
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.settings import settings as make_settings
from convince.fit.train import prepare
from convince.types import Budget

T = torch.tensor


def moved(model: nn.Module, *shape: int) -> nn.Module:
    """The model in eval mode, its batch statistics and affine numbers away from their start."""
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(torch.rand(m.weight.shape, generator=gen) + 0.5)
                m.bias.copy_(torch.randn(m.bias.shape, generator=gen) * 0.3)
        model.train()
        for _ in range(5):
            model(torch.randn(16, *shape, generator=gen))
    return model.eval()


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- quantisers ------------------------------------------------------------------------------------


def test_worked_example_affine() -> None:
    scale, zero = q.quant_params(T(-1.0), T(2.0), 8)
    assert scale.item() == pytest.approx(0.0117647, abs=1e-7)
    assert zero.item() == 85
    x = T([-1.0, 0.0, 0.31, 2.0, 3.0])
    assert (q.centred_codes(x, scale, zero, 8) + zero).tolist() == [0, 85, 111, 255, 255]
    torch.testing.assert_close(q.fake_quant(x, scale, zero, 8), T([-1.0, 0.0, 0.305882, 2.0, 2.0]), atol=1e-6, rtol=0)


def test_symmetric_range_by_hand() -> None:
    scale, zero = q.quant_params(T(-0.5), T(1.27), 8, "symmetric")
    assert scale.item() == pytest.approx(0.01)
    assert zero.item() == 0
    assert q.centred_codes(T([-2.0, -0.5, 0.126, 1.27]), scale, zero, 8, "symmetric").tolist() == [-127, -50, 13, 127]
    assert q.limits(4, "symmetric") == (-7, 7)
    assert q.limits(4, "affine") == (0, 15)


def test_range_is_widened_to_zero_and_a_range_of_zeros_has_scale_one() -> None:
    scale, zero = q.quant_params(T(2.0), T(5.1), 8)
    assert (scale.item(), zero.item()) == (pytest.approx(0.02), 0)
    scale, zero = q.quant_params(T(-5.1), T(-2.0), 8)
    assert (scale.item(), zero.item()) == (pytest.approx(0.02), 255)
    for scheme in ("affine", "symmetric"):
        assert q.quant_params(T(0.0), T(0.0), 8, scheme)[0].item() == 1


def test_gradient_is_straight_through_inside_and_zero_outside() -> None:
    x = T([-1.5, -0.9, 0.31, 1.9, 3.0], dtype=torch.float64, requires_grad=True)
    q.fake_quant(x, *q.quant_params(T(-1.0, dtype=torch.float64), T(2.0, dtype=torch.float64), 8), 8).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20), st.integers(2, 8), st.sampled_from(["affine", "symmetric"]))
def test_error_is_half_a_step_and_quantising_twice_is_once(values: list[float], bits: int, scheme: str) -> None:
    x = T(values, dtype=torch.float64)
    scale, zero = q.quant_params(*q.minmax(x), bits, scheme)
    y = q.fake_quant(x, scale, zero, bits, scheme)
    assert (x - y).abs().max() <= scale * (0.5 + (scheme == "affine") * 0.5) + 1e-9  # the zero is rounded too
    torch.testing.assert_close(q.fake_quant(y, scale, zero, bits, scheme), y, atol=1e-9, rtol=0)
    assert q.fake_quant(torch.zeros(1, dtype=torch.float64), scale, zero, bits, scheme).item() == 0
    with_gradient = q.fake_quant(x.clone().requires_grad_(), scale, zero, bits, scheme)
    assert torch.equal(y, with_gradient)


def test_stochastic_rounding_is_right_on_average() -> None:
    gen = torch.Generator().manual_seed(0)
    y = q.fake_quant(torch.full((20000,), 0.3), T(1.0), T(0.0), 8, gen=gen)
    assert set(y.tolist()) == {0.0, 1.0}
    assert y.mean().item() == pytest.approx(0.3, abs=0.015)


def test_observers_by_hand() -> None:
    x = T([[1.0, -2.0], [4.0, 3.0]])
    assert [v.item() for v in q.minmax(x)] == [-2, 4]
    assert [v.flatten().tolist() for v in q.minmax(x, "channel")] == [[-2, 3], [1, 4]]
    first = q.moving_average(None, (T(-1.0), T(2.0)), 0.9)
    second = q.moving_average(first, (T(-2.0), T(4.0)), 0.9)
    assert [round(v.item(), 6) for v in (*first, *second)] == [-1, 2, -1.1, 2.2]
    assert [v.item() for v in q.percentile(torch.arange(101.0), 0.9)] == [5, 95]
    assert [v.item() for v in q.percentile(torch.arange(101.0), 1.0)] == [0, 100]


# -- folding and integer arithmetic ----------------------------------------------------------------


def test_fold_bn_by_hand() -> None:
    bn = nn.BatchNorm2d(1, eps=0.0)
    with torch.no_grad():
        bn.weight.fill_(3.0), bn.bias.fill_(1.0), bn.running_mean.fill_(2.0), bn.running_var.fill_(4.0)
    weight, bias = q.fold_bn(T([[[[2.0]]]]), T([0.5]), bn)
    assert weight.item() == 3.0  # 2 * 3 / 2
    assert bias.item() == -1.25  # 1 + (0.5 - 2) * 3 / 2


def test_int_linear_corrects_zero_points_by_hand() -> None:
    x, w = T([[10, 20]], dtype=torch.uint8), T([[3, -4]], dtype=torch.int8)
    assert q.int_linear(x, 5, w, T([1])).item() == 5 * 2 + 15 * -5


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 2)])
def test_int8_layer_is_the_integer_convolution(scheme: str, granularity: str, groups: int, stride: int) -> None:
    conv = nn.Conv2d(4, 8, 3, stride, 1, groups=groups)
    x = images(3, 4, 9, 9)
    layer = Int8Layer(conv, 8, 8, granularity, scheme)
    codes, scale, zero = q.quantise_weight(conv.weight.detach(), 8, granularity, scheme)
    x_scale, x_zero = q.quant_params(*q.minmax(x), 8)
    layer.weight.copy_(codes), layer.scale.copy_(scale), layer.bias.copy_(conv.bias.detach())
    if layer.zero is not None:
        layer.zero.copy_(zero)
    layer.inputs.scale.copy_(x_scale), layer.inputs.zero.copy_(x_zero)
    raw = (q.centred_codes(x, x_scale, x_zero, 8) + x_zero).to(torch.uint8)
    total = q.int_conv2d(raw, int(x_zero), codes, zero.flatten().expand(8), stride, 1, groups)
    assert total.dtype == torch.int32
    with torch.no_grad():
        y = layer(x)
        exact = total * (x_scale * scale.reshape(-1, 1, 1)) + conv.bias.view(-1, 1, 1)
        torch.testing.assert_close(y, exact, atol=1e-5, rtol=1e-5)
        dequantised = q.fake_quant(x, x_scale, x_zero, 8), scale * (codes.float() - zero)
        torch.testing.assert_close(y, F.conv2d(dequantised[0], dequantised[1], conv.bias, stride, 1, 1, groups), atol=1e-4, rtol=1e-4)
        out_scale, out_zero = q.quant_params(*q.minmax(y), 8)
        simulated = q.centred_codes(y, out_scale, out_zero, 8) + out_zero
        integer = q.requantise(total, conv.bias, x_scale, scale, out_scale, out_zero, 8)
    assert (integer.float() - simulated).abs().max() <= 1


def test_codes_are_exact_in_bfloat16() -> None:
    whole = torch.arange(-255, 256)
    assert torch.equal(whole.to(torch.bfloat16).to(torch.int64), whole)


# -- networks --------------------------------------------------------------------------------------


def nets() -> list[tuple[nn.Module, tuple[int, ...]]]:
    import timm

    return [
        (ResNet(layers=(1, 1), widths=(8, 16)), (3, 8, 8)),
        (ResNet(layers=(1, 1), widths=(8, 16), stem="photo"), (3, 32, 32)),
        (SmallCNN(widths=(8, 16)), (1, 8, 8)),
        (SeparableCNN(stem=8, widths=(16, 16), strides=(2, 1)), (3, 8, 8)),
        (timm.create_model("resnet10t", num_classes=4), (3, 32, 32)),
    ]


@pytest.mark.parametrize("i", range(5))
def test_networks_keep_their_answer_and_rebuild_from_json(i: int) -> None:
    torch.manual_seed(i)
    model, shape = nets()[i]
    moved(model, *shape)
    x = images(16, *shape)
    made = Int8(batch=8)
    cut = made.plan(model, x)
    small, again = copy.deepcopy(model), copy.deepcopy(model)
    made.apply(small, cut)
    Int8.rebuild(again, **json.loads(json.dumps(cut.spec)))
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        y, z = model(x), small(x)
        assert torch.equal(z, again(x))
        assert torch.equal(z, copy.deepcopy(small)(x))
    assert (y - z).norm() / y.norm() < 0.1
    assert not torch.equal(y, z)
    assert not any(isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)) for m in small.modules())
    stored = {t.dtype for n, t in small.state_dict().items() if n.endswith("weight")}
    assert stored == {torch.int8}
    assert macs(small, x) == macs(model, x)


def test_every_sum_of_a_resnet_is_quantised() -> None:
    found = q.layout(ResNet(layers=(1, 1), widths=(4, 8)), torch.zeros(2, 3, 8, 8))
    assert found.layers[:2] == [("conv1", "bn1"), ("layer1.0.conv1", "layer1.0.bn1")]
    assert ("layer2.0.downsample.0", "layer2.0.downsample.1") in found.layers
    assert {"layer1.0.act2", "layer1.0.bn2", "layer2.0.act2", "layer2.0.bn2", "layer2.0.downsample.1"} <= set(found.outputs)
    assert found.bare == 0


def test_joins_take_256_values() -> None:
    torch.manual_seed(0)
    model = moved(ResNet(layers=(1, 1), widths=(4, 8)), 3, 8, 8)
    x = images(64, 3, 8, 8)
    small = quantise(model, x)
    with torch.no_grad():
        assert len(model.layer1(model.relu(model.bn1(model.conv1(x)))).unique()) > 2000
        assert len(small.layer1(small.relu(small.bn1(small.conv1(x)))).unique()) <= 256


def test_conv_that_two_read_is_not_folded() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.fc((self.bn(y) + y).mean((2, 3)))

    assert q.layout(Two(), torch.zeros(1, 1, 5, 5)).layers == [("conv", None), ("fc", None)]


def test_modules_with_hooks_stay() -> None:
    model = SmallCNN(widths=(4, 8))
    model.features[1].register_forward_hook(lambda m, a, o: o * 2)
    found = q.layout(model, torch.zeros(1, 1, 8, 8))
    assert ("features.0", None) in found.layers
    assert ("features.4", "features.5") in found.layers


def test_size_report_counts_a_quarter() -> None:
    model = moved(ResNet(layers=(1, 1), widths=(16, 32)), 3, 8, 8)
    small = quantise(model, images(8, 3, 8, 8))
    rows = {row["module"]: row for row in size_report(small)}
    assert rows["conv1"] == {"module": "conv1", "type": "Int8Layer", "numbers": 16 * 27 + 16 + 16, "bytes": 16 * 27 + 4 * 16 + 4 * 16}
    assert sum(row["bytes"] for row in size_report(model)) == q.bytes_of(model)
    assert q.bytes_of(small) < 0.3 * q.bytes_of(model)


def test_layers_and_sensitivity_take_one_layer_at_a_time() -> None:
    model = moved(SmallCNN(widths=(4, 8)), 1, 8, 8)
    x = images(8, 1, 8, 8)
    small = quantise(model, x, layers={"fc": 0, "features.0": 4})
    assert isinstance(small.fc, nn.Linear)
    assert small.features[0].weight.abs().max() == 7
    scan = dict(sensitivity_scan(model, x, lambda a: sum(isinstance(m, Int8Layer) for m in a.modules())))
    assert scan == {"features.0": 1.0, "features.4": 1.0, "fc": 1.0}


def test_gradients_reach_the_pixels() -> None:
    model = moved(SmallCNN(widths=(4, 8)), 1, 8, 8)
    x = images(8, 1, 8, 8)
    small = quantise(model, x)
    x.requires_grad_()
    (a,) = torch.autograd.grad(small(x).square().sum(), x)
    (b,) = torch.autograd.grad(model(x).square().sum(), x)
    assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.9


def test_export_gives_the_same_scores() -> None:
    model = moved(ResNet(layers=(1, 1), widths=(4, 8)), 3, 8, 8)
    x = images(4, 3, 8, 8)
    small = quantise(model, x)
    with torch.no_grad():
        exported = torch.export.export(small, (x,)).module()
        torch.testing.assert_close(exported(x), small(x))


def test_refusals() -> None:
    model, x = moved(SmallCNN(widths=(4, 8)), 1, 8, 8), images(8, 1, 8, 8)
    for options, word in [
        ({"w_bits": 9}, "w_bits=9"),
        ({"a_bits": 1}, "a_bits=1"),
        ({"granularity": "row"}, "row"),
        ({"scheme": "odd"}, "odd"),
        ({"layers": {"fc": 9}}, "fc"),
        ({"decay": 1.0}, "decay"),
        ({"batch": 0}, "batch"),
    ]:
        with pytest.raises(Mistake, match=word):
            Int8(**options)
    with pytest.raises(Mistake, match="no convolution"):
        Int8().plan(nn.Sequential(nn.Linear(3, 2)), torch.zeros(4, 3))
    with pytest.raises(Mistake, match="already"):
        Int8().plan(quantise(model, x), x)
    with pytest.raises(Mistake, match="'fx'"):
        Int8(layers={"fx": 8}).plan(model, x)
    with pytest.raises(Mistake, match="got none"):
        Int8().plan(model, x[:0])
    with pytest.raises(Mistake, match="more than the budget"):
        Int8().plan(model, x, Budget(0.1, "bytes"))
    with pytest.raises(Mistake, match="macs"):
        Int8().plan(model, x, Budget(0.1, "macs"))
    Int8().plan(model, x, Budget(0.5, "bytes"))


# -- the separable network and its rescaling --------------------------------------------------------


def test_separable_cnn_parameters_by_hand() -> None:
    """Convolutions 3*32*9 + 32*64 + 64*9 + 64*64 + 64*9 + 64*128 + 128*9 + 2 (128*128 + 128*9), two numbers a BN channel, the head."""
    convs = 864 + 2048 + 576 + 4096 + 576 + 8192 + 1152 + 2 * (16384 + 1152)
    norms = 2 * (32 + 2 * (64 + 64 + 128 + 128 + 128))
    assert sum(p.numel() for p in SeparableCNN().parameters()) == convs + norms + 1290


def test_rescaled_net_is_the_same_function_and_needs_scales_per_channel() -> None:
    torch.manual_seed(0)
    model = moved(SeparableCNN(stem=8, widths=(16, 16), strides=(2, 1)), 3, 8, 8)
    other, x = copy.deepcopy(model), images(32, 3, 8, 8)
    rescale(other, 0)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(other(x), y, atol=1e-4, rtol=1e-4)
        error = {g: float((quantise(other, x, a_bits=0, granularity=g)(x) - y).norm()) for g in ("channel", "tensor")}
    assert error["tensor"] > 3 * error["channel"]


# -- training --------------------------------------------------------------------------------------


def small_run(**changes: object):  # type: ignore[no-untyped-def]
    asked = {"model": "resnet:layers=(1,1),widths=(4,8)", "batch": 8, "epochs": 4, "lr": 0.05, "precision": "fp32", "augment": "none"}
    run = prepare(make_settings(**{**asked, **changes}), tiny_images())
    fit(run)
    return run


def test_qat_weights_are_those_of_the_folded_grid() -> None:
    run = small_run(parts=("qat:w_bits=4,granularity=tensor,start_after=0.0",))
    conv, bn = run.model.conv1, run.model.bn1
    assert isinstance(conv, QatConv2d)
    folded, _ = q.fold_bn(conv.weight.detach(), None, bn)
    scale, _ = q.quant_params(*q.minmax(folded), 4, "symmetric")
    seen = []
    hook = bn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = images(4, 1, 8, 8)
    run.model.eval()(x)
    hook.remove()
    expected = q.fake_quant(folded, scale, T(0.0), 4, "symmetric") / q.bn_factor(bn).view(-1, 1, 1, 1)
    x = conv.inputs(x)
    torch.testing.assert_close(seen[0], F.conv2d(x, expected, None, 1, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", ["w_bits=4", "w_bits=4,granularity=tensor", "a_bits=0,scheme=affine"])
def test_qat_becomes_int8_with_the_same_answers_and_reloads(options: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = small_run(parts=(f"qat:{options},start_after=0.25",))
    answer, x = run.answer.eval(), tiny_images().x.take(torch.arange(16)).float() / 255
    small = quantise(answer, x, **{k: int(v) if v.isdigit() else v for k, v in (o.split("=") for o in options.split(","))})
    with torch.no_grad():
        y, z = answer(x), small(x)
    assert (y - z).abs().median() < 0.02 * y.std()
    if "w_bits" in options:
        with pytest.raises(Mistake, match=r"use int8:w_bits=4"):
            quantise(answer, x)
    if options == "w_bits=4":
        run.edits.append({"part": "int8", "spec": Int8(w_bits=4).plan(answer, x).spec})
        run.model = network(small)
        write_config(tmp_path, run.settings)
        write_model(tmp_path, run)
        loaded = open_run(tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded.answer(x), z)


def test_qat_phases_by_share_of_the_run() -> None:
    seen = []
    part = QAT(start_after=0.5, freeze_ranges_after=0.75, freeze_bn_after=0.5)
    run = prepare(make_settings(model="resnet:layers=(1,),widths=(4,)", batch=8, epochs=2, precision="fp32", augment="none", parts=("qat",)), tiny_images())
    run.team.seats[0].technique.__dict__.update(part.__dict__)
    fit(run, None, lambda *a: seen.append((run.model.conv1.on, run.model.conv1.inputs.watching, run.model.bn1.training)))
    assert seen == [(False, True, True)] * 4 + [(True, True, False)] * 2 + [(True, False, False)] * 2
    assert run.model.conv1.on
    assert run.model.bn1.training == run.model.training


def test_qat_keeps_ranges_still_in_further_passes() -> None:
    run = small_run(parts=("qat:start_after=0.0",))
    before = run.model.conv1.inputs.high.clone()
    run.model.train()
    with run.still():
        run.model(100 * images(4, 1, 8, 8))
    assert torch.equal(run.model.conv1.inputs.high, before)


def test_compressed_run_reloads_and_measures(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = small_run(epochs=12)
    before, data = copy.deepcopy(run.answer).eval(), tiny_images()
    x = run.plan.pixels(data.x.take(data.split.train))
    cut = Int8().plan(run.answer, x)
    Int8().apply(run.model, cut)
    run.edits.append({"part": "int8", "spec": cut.spec})
    write_config(tmp_path, run.settings)
    write_model(tmp_path, run)
    loaded = open_run(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.answer(x), run.answer.eval()(x))
    assert loaded.run.model.conv1.weight.dtype == torch.int8
    rows = data.split.test
    result = measure(before, loaded.answer, data, rows, run.plan)
    assert set(result) == {"before", "after"}
    assert set(result["after"]) == {"accuracy", "accuracy_interval", "bytes", "macs", "seconds"}
    assert result["after"]["accuracy"] == score(loaded.answer, data, rows, run.plan).accuracy
    assert result["after"]["bytes"] < result["before"]["bytes"]
    conv, block = 64 * 4 * 9, 64 * 4 * 36
    assert result["before"]["macs"] == conv + 2 * block + 16 * (8 * 36 + 8 * 72 + 8 * 4) + 8 * 3


# -- the claim's rule ------------------------------------------------------------------------------


def test_judge() -> None:
    def numbers(w8a8: float = 0.5, tensor: float = 0.3, qat4: float = 0.48) -> dict:
        row = {"float": 0.5, "w8a8": w8a8, "ptq4": 0.4, "qat4": qat4, "rescaled": 0.5, "channel": 0.5, "tensor": tensor}
        return {arm: {str(s): row for s in range(4)} for arm in ("resnet8", "separable")}

    assert judge(numbers())[0] == "supported"
    assert judge(numbers(w8a8=0.47))[0] == "contradicted"
    assert judge(numbers(tensor=0.5))[0] == "contradicted"
    assert judge(numbers(qat4=0.4))[0] == "contradicted"
    assert judge(numbers(qat4=0.42))[0] == "inconclusive"
    assert judge(numbers(w8a8=0.485))[0] == "inconclusive"
