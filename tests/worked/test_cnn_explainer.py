"""CNN Explainer's engine: TinyVGG's exact size, random pixels recomputed by hand, and what it says of what it cannot show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convince.explain
from convince.backbones.tinyvgg import Tinyvgg
from convince.errors import Mistake
from convince.explain.cnn_explainer import CnnExplainer, Step, explain_value, output_size, trace, window
from convince.fit.answer import Answer, Normalise


def seeded(make):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def image(side: int = 24, channels: int = 3) -> Tensor:
    return torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_exact_size_of_tinyvgg() -> None:
    net = Tinyvgg()
    assert sum(p.numel() for p in net.parameters()) == 19_920
    assert sum(p.numel() for p in Tinyvgg(img_size=(32, 32)).parameters()) == 5_520
    sides = [step.output.shape[1] for step in trace(net.eval(), image(64)).steps if step.kind in ("conv", "max pool")]
    assert sides == [62, 60, 30, 28, 26, 13]
    with pytest.raises(Mistake, match="tinyvgg: images of 12x12 pixels leave no map"):
        Tinyvgg(img_size=(12, 12))


def test_output_sizes_by_hand() -> None:
    assert output_size(7, 3, 0, 2, 1) == (3, True)
    assert output_size(7, 3, 1, 1, 2) == (5, True)
    assert output_size(6, 3, 0, 2) == (2, False)
    assert output_size(2, 3) == (0, False)


def test_a_convolution_by_hand() -> None:
    x = np.arange(9.0).reshape(1, 3, 3)
    conv = Step("c", "conv", -1, x, np.zeros((1, 3, 3)), np.ones((1, 1, 3, 3)), np.array([0.5]), {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1})  # fmt: skip  # noqa: E501
    assert explain_value(conv, (0, 1, 1))["value"] == 36.5
    corner = explain_value(conv, (0, 0, 0))
    assert corner["patch"].tolist() == [[[0, 0, 0], [0, 0, 1], [0, 3, 4]]]
    assert corner["value"] == 0 + 1 + 3 + 4 + 0.5
    assert window(x, (0, 0), {"kernel_size": (2, 2), "stride": (1, 1), "padding": (0, 0), "dilation": (2, 2)}).tolist() == [[[0, 2], [6, 8]]]


class Mixed(nn.Module):
    """All that can be shown, and a skip connection, which cannot."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.grouped, self.average, self.largest = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1)
        self.flatten, self.drop, self.fc = nn.Flatten(), nn.Dropout(0.5), nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.bn(self.conv(x)))
        b = self.grouped(a)
        return self.fc(self.drop(self.flatten(self.largest(self.average(b + a if self.skip else b)))))


@pytest.mark.parametrize("skip", [False, True])
def test_random_pixels_recomputed_by_hand(skip: bool) -> None:
    net = seeded(lambda: Mixed(skip))
    with torch.no_grad():
        net.bn.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        net.bn.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    answer = Answer(Normalise([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]), net.eval())
    found = trace(answer, image(23), ("a", "b", "c", "d"))
    kinds = [step.kind for step in found.steps]
    first = ["normalise", "conv", "norm", "relu", "conv"]
    rest = ["average pool", "max pool", "flatten", "linear", "softmax"]
    assert kinds == [*first, *(["opaque"] if skip else []), *rest]
    gen = np.random.default_rng(0)
    for _ in range(300):
        step = found.steps[int(gen.integers(len(found.steps)))]
        at = tuple(int(gen.integers(n)) for n in step.output.shape)
        if step.kind == "opaque":
            with pytest.raises(Mistake, match="is opaque"):
                explain_value(step, at)
            continue
        shown = explain_value(step, at)
        assert shown["value"] == pytest.approx(float(step.output[at]), abs=1e-9), (step.name, at)
        if "kernel" in shown:
            assert shown["value"] == pytest.approx(float((shown["patch"] * shown["kernel"]).sum()) + shown["bias"], abs=1e-12)
    for i, step in enumerate(found.steps):  # each reads what the step it names gave
        if step.source is not None and step.kind != "opaque":
            before = image(23)[0].double().numpy() if step.source == -1 else found.steps[step.source].output
            np.testing.assert_array_equal(before, step.input, err_msg=f"{i} {step.name}")
    assert float(found.steps[-1].output.sum()) == pytest.approx(1)


def test_intermediate_maps_sum_to_the_output() -> None:
    found = trace(seeded(lambda: Mixed(False)).eval(), image(24))
    for name in ("conv", "grouped"):
        step = found.step(name)
        bias = np.zeros(6) if step.bias is None else step.bias
        for channel in range(6):
            np.testing.assert_allclose(step.intermediate(channel).sum(0) + bias[channel], step.output[channel], atol=1e-12)
    assert len(found.step("grouped").intermediate(0)) == 2
    with pytest.raises(Mistake, match="only a convolution"):
        found.step("relu").intermediate(0)


def test_a_wrong_trace_is_caught() -> None:
    """One kernel turned over: the sum of the terms is no longer the activation."""
    import dataclasses

    step = trace(seeded(lambda: Mixed(False)).eval(), image(24)).step("conv")
    assert step.weight is not None
    wrong = dataclasses.replace(step, weight=np.ascontiguousarray(step.weight.transpose(0, 1, 3, 2)))
    gaps = [abs(explain_value(wrong, (0, i, j))["value"] - step.output[0, i, j]) for i in range(4) for j in range(4)]
    assert max(gaps) > 1e-3


def test_the_model_is_left_as_found_and_functional_steps_are_opaque() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 2, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x)).mean((2, 3))) * 2

    net = seeded(Functional).train()
    found = convince.explain.trace(net, image(8))
    assert [(s.name, s.kind) for s in found.steps] == [
        ("conv", "conv"), ("before fc", "opaque"), ("fc", "linear"), ("scores", "opaque"), ("softmax", "softmax")]  # fmt: skip
    assert net.training
    assert not net.conv._forward_hooks
    with pytest.raises(Mistake, match="did you mean 'conv'"):
        found.step("convv")
    with pytest.raises(Mistake, match=r"no value at \(0, 9, 0\)"):
        explain_value(found.step("conv"), (0, 9, 0))


def test_refusals_and_the_overview() -> None:
    net = seeded(lambda: Tinyvgg(img_size=(24, 24))).eval()
    with pytest.raises(Mistake, match="traces one image"):
        trace(net, image(24).expand(2, -1, -1, -1))
    with pytest.raises(Mistake, match="more than 4,000,000 numbers"):
        trace(nn.Sequential(nn.Conv2d(3, 80, 1)), image(240))
    seen = CnnExplainer(channels=3)(net, image(24).expand(2, -1, -1, -1))
    assert seen.map is None
    assert seen.images["overview"].shape == (2, 1, 3 * 26, 10 * 26)
    assert seen.table["steps"][:2] == ["features.0: conv", "features.1: relu"]
    with pytest.raises(Mistake, match="channels=0"):
        CnnExplainer(channels=0)
    with pytest.raises(AttributeError, match="no attribute 'trade'"):
        convince.explain.trade  # noqa: B018
