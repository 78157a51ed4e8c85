"""Waterline by hand: the roofline of two layers, bytes and operations of every kind of layer, times, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.diagnose.waterline import (
    Layer,
    Peaks,
    Waterline,
    account,
    attainable,
    efficiency,
    efficiency_gap,
    ideal,
    machine_peaks,
    measured,
    predicted,
    profile_layers,
    sequence,
    waterline,
)
from convince.errors import Mistake
from convince.models.counting import count

A, B, PEAKS = Layer("a", 1000, 50), Layer("b", 200, 80), Peaks(100.0, 10.0)
Y = torch.zeros(2, dtype=torch.int64)


def test_worked_waterline():
    """Peak 100 op/s, bandwidth 10 byte/s: a may reach the peak in 10 s; b with 2.5 operations a byte a quarter of it, in 8 s."""
    assert (A.intensity, B.intensity) == (20, 2.5)
    assert (attainable(A, PEAKS), attainable(B, PEAKS)) == (1, 0.25)
    assert (predicted(A, PEAKS), predicted(B, PEAKS)) == (10, 8)
    level = waterline([A, B], PEAKS)
    assert level.seconds == 18
    assert level.efficiency == pytest.approx(12 / 18)


def test_the_area_of_the_drawing_is_the_mean_efficiency():
    line = sequence([A, B], PEAKS).series["layers"]
    assert line == [(0, 1), (10_000, 1), (10_000, 0.25), (18_000, 0.25)]
    area = sum((right - left) * height for (left, height), (right, _) in zip(line[::2], line[1::2], strict=True))
    assert area / 18_000 == pytest.approx(waterline([A, B], PEAKS).efficiency)


@given(st.integers(0, 10**9), st.integers(1, 10**9), st.floats(1, 1e12), st.floats(1, 1e12))
def test_time_at_the_attainable_efficiency_is_the_predicted_time(ops, moved, peak, bandwidth):
    layer, peaks = Layer("x", ops, moved), Peaks(peak, bandwidth)
    assert 0 <= attainable(layer, peaks) <= 1
    assert ideal(layer, peaks) == pytest.approx(predicted(layer, peaks) * attainable(layer, peaks))


def test_efficiency_is_ideal_over_measured_time():
    assert efficiency(Layer("a", 1000, 50, 40.0), PEAKS) == 0.25
    with pytest.raises(Mistake, match="waterline: a was not timed; take the layers from profile_layers"):
        efficiency(A, PEAKS)


def test_gap_of_models_by_error():
    timed = [Layer("a", 1000, 50, 40.0)]
    gap = efficiency_gap({"late": (0.3, timed), "early": (0.1, [*timed, *timed])}, PEAKS)
    assert gap.series == {"ideal": [(0.1, 20), (0.3, 10)], "measured": [(0.1, 80), (0.3, 40)]}
    assert gap.log


def test_convolutions_and_linear_layers_by_hand():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 5 * 5, 3))
    conv, relu, linear = account(net, torch.randn(2, 4, 5, 5))
    assert conv == Layer("0", 2 * 2 * 6 * 25 * (2 * 9), 4 * (2 * 4 * 25 + 6 * 2 * 9 + 6 + 2 * 6 * 25))
    assert relu == Layer("1", 0, 4 * 2 * (2 * 6 * 25))
    assert linear == Layer("3", 2 * 2 * 3 * 150, 4 * (2 * 150 + 3 * 150 + 3 + 2 * 3))
    (halved,) = account(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)).double(), torch.randn(1, 1, 2, 2).double())
    assert halved.bytes == 8 * (4 + 1 + 4), "bytes are those of the format"


def test_what_a_block_adds_itself_stands_under_its_name():
    net = builder("resnet:layers=(1,1),widths=(4,8)", num_classes=3, in_chans=1, size=(8, 8))()
    found = {layer.name: layer for layer in account(net, torch.randn(2, 1, 8, 8))}
    assert found["layer1.0"].ops == 0
    assert found["layer1.0"].bytes >= 3 * 4 * 2 * 4 * 64, "the sum reads two maps and writes one"


@pytest.mark.parametrize(
    "spec", ["resnet:layers=(1,1),widths=(4,8)", "convfirst-mini", "sequencer2d-mini", "timm/vit_tiny_patch16_224:patch_size=8,depth=1", "timm/resnet10t"]
)
def test_operations_are_those_of_the_counter(spec):
    """Convolutions, LSTMs and attention that is one fused call; a network of another house too."""
    net = builder(spec, num_classes=3, in_chans=1, size=(32, 32))()
    assert sum(layer.ops for layer in account(net, torch.randn(1, 1, 32, 32))) == 2 * count(net, (32, 32), 1).macs


def test_times_are_measured_and_the_network_is_left_as_found():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    layers = profile_layers(net, torch.randn(4, 1, 16, 16), repeats=3, warmup=1)
    assert [layer.name for layer in layers] == ["0", "1", "2"]
    assert measured(layers) > 0
    assert all(efficiency(layer, Peaks(1e15, 1e15)) < 1 for layer in layers)
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(Mistake, match="repeats=0"):
        profile_layers(net, torch.randn(1, 1, 8, 8), repeats=0)


def test_peaks_of_this_machine_are_plausible():
    peaks = machine_peaks(seconds=0.05)
    assert 1e8 < peaks.ops < 1e16
    assert 1e8 < peaks.bytes < 1e14


def test_readings_do_not_depend_on_a_format_around_and_scale_with_the_peaks():
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)), torch.rand(2, 1, 8, 8)
    found = Waterline().probe(net, x, Y)
    with torch.autocast("cpu", torch.bfloat16):
        assert Waterline().probe(net, x, Y) == found
    faster = Waterline(peak=2e11, bandwidth=4e10).probe(net, x, Y)
    values = {r.name: r.value for r in found.readings}
    assert {r.name: r.value for r in faster.readings}["predicted time"] == pytest.approx(values["predicted time"] / 2)
    assert values["multiply-adds"] == 4 * 36 * 9 + 3 * 144
    timed = {r.name for r in Waterline(measured=True).probe(net, x, Y).readings}
    assert timed > {"measured time", "measured efficiency", "0: measured efficiency"}


def test_wrong_settings_are_refused():
    with pytest.raises(Mistake, match="waterline: peak=0"):
        Waterline(peak=0)
    with pytest.raises(Mistake, match="waterline: ReLU multiplies nothing"):
        Waterline().probe(nn.ReLU(), torch.rand(2, 1, 4, 4), Y)
    with pytest.raises(Mistake, match="at least one image"):
        Waterline().probe(nn.Flatten(), torch.rand(0, 1, 4, 4), Y[:0])
