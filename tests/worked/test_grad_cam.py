"""Grad-CAM, saliency, guided backpropagation and the localisation measures, by hand and against captum."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.grad_cam import GradCam, grad_cam, importance, neuron_importance, textual_explanation
from convince.explain.guided_backprop import GuidedBackprop, guided_grad_cam
from convince.explain.localisation import bias_audit, box_from_map, energy_in_mask, iou, pointing_hit
from convince.explain.saliency import Saliency
from convince.fit.answer import Answer, Normalise
from convince.robust.rics import Rics


class Small(nn.Module):
    """conv - ReLU (in place or not) - pool - conv - ReLU - global pooling - linear."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 3)
        self.relu1, self.relu2 = nn.ReLU(inplace), nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu1(self.conv1(x)), 2)
        return self.fc(self.relu2(self.conv2(x)).mean((2, 3)))


class TinyViT(nn.Module):
    """A transformer of two blocks; answers from its class token or from the mean of its patches."""

    def __init__(self, class_token: bool, width: int = 8) -> None:
        super().__init__()
        self.class_token = class_token
        self.embed = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 6 + class_token, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width), "heads": nn.Identity()})
            for _ in range(2)
        )
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = self.embed(x).flatten(2).transpose(1, 2)
        if self.class_token:
            t = torch.cat([self.token.expand(len(t), -1, -1), t], 1)
        t = t + self.place
        for block in self.blocks:
            q, k, v = (block["heads"](part.unflatten(2, (2, -1)).transpose(1, 2)) for part in block["qkv"](block["norm1"](t)).chunk(3, 2))
            t = t + block["proj"]((q @ k.transpose(2, 3)).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        t = self.norm(t)
        return self.fc(t[:, 0] if self.class_token else t.mean(1))


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(Small() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum(m(x) for m in self.members) / 3  # type: ignore[return-value]


def seeded(make, seed: int = 0):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# -- by hand -----------------------------------------------------------------------------------------

A = torch.tensor([[[[1.0, 2], [0, 1]], [[0.0, 1], [3, 0]]]])
G = torch.tensor([[[[1.0, 1], [1, 1]], [[-1.0, 0], [0, -1]]]])


def test_worked_example() -> None:
    assert importance(G).tolist() == [[1.0, -0.5]]
    assert grad_cam(A, G).tolist() == [[[[1.0, 1.5], [0.0, 1.0]]]]
    assert grad_cam(A, G, relu=False).tolist() == [[[[1.0, 1.5], [-1.5, 1.0]]]]
    assert grad_cam(A, G, counterfactual=True).tolist() == [[[[0.0, 0.0], [1.5, 0.0]]]]


@pytest.mark.parametrize("target", [0, 1, 2])
def test_conv_pool_linear_is_cam_over_the_area(x: Tensor, target: int) -> None:
    """alpha_k = w_k / (h w), so the map is the class activation map over h w: exact, in float64."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))).double()
    found = GradCam(relu=False, upsample=False)(net, x.double(), target)
    cam = torch.einsum("c,nchw->nhw", net[3].weight[target], net[0](x.double())) / 36
    torch.testing.assert_close(found.map[:, 0], cam)
    assert found.table == {"layer": "0", "plane": [6, 6], "channels": 4}
    bias = net[3].bias[target]
    torch.testing.assert_close(found.map.sum((1, 2, 3)) + bias, net(x.double())[:, target])  # the map adds up to the score


def test_energy_pointing_and_boxes_by_hand() -> None:
    found = torch.tensor([[[[3.0, 1.0], [0.0, -4.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    mask = torch.tensor([[[[True, False], [False, False]]]] * 2)
    assert energy_in_mask(found, mask).tolist() == [0.75, 0.25]  # the empty map counts as even
    assert pointing_hit(found, mask).tolist() == [True, False]
    assert bias_audit(found, mask) == {"energy": 0.5, "area": 0.25, "pointing": 0.5}
    plane = torch.zeros(1, 1, 6, 8)
    plane[0, 0, 1:3, 2:6] = 1.0  # 8 pixels
    plane[0, 0, 4, 7] = 5.0  # the maximum, alone: 0.15 of it is 0.75
    assert box_from_map(plane).tolist() == [[2.0, 1.0, 6.0, 3.0]]
    assert box_from_map(plane, 0.5).tolist() == [[7.0, 4.0, 8.0, 5.0]]
    assert box_from_map(torch.zeros(1, 1, 3, 3)).tolist() == [[0.0] * 4]
    assert iou(torch.tensor([[0.0, 0, 2, 2], [0, 0, 0, 0]]), torch.tensor([[1.0, 0, 3, 2], [0, 0, 0, 0]])).tolist() == pytest.approx([1 / 3, 0])
    with pytest.raises(Mistake, match=r"both must be \[n 1 h w\]"):
        energy_in_mask(found, mask[:1])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_energy_of_a_mask_and_its_complement_add_to_one(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    found, mask = torch.randn(3, 1, 4, 5, generator=gen).double(), torch.rand(3, 1, 4, 5, generator=gen) > 0.5
    torch.testing.assert_close(energy_in_mask(found, mask) + energy_in_mask(found, ~mask), torch.ones(3).double())


def test_textual_explanation_names_neurons() -> None:
    names = ["ear", "wheel", "sky", "leg"]
    assert textual_explanation(torch.tensor([0.5, -2.0, 0.1, 0.7]), names, top=2, bottom=1) == {"for": ["leg", "ear"], "against": ["wheel"]}
    with pytest.raises(Mistake, match="3 for 4 neurons"):
        textual_explanation(torch.zeros(4), names[:3])


# -- the answer and its layers -----------------------------------------------------------------------


def test_inplace_relu_gives_the_same_map(x: Tensor) -> None:
    plain, inplace = seeded(Small), seeded(lambda: Small(inplace=True))
    for layer in ("conv1", "relu1", "conv2", "relu2"):
        a, b = GradCam(layer)(plain, x, 1).map, GradCam(layer)(inplace, x, 1).map
        assert torch.equal(a, b), layer
    assert not torch.equal(GradCam("conv2")(inplace, x, 1).map, GradCam("relu2")(inplace, x, 1).map)  # before and after differ


def test_rows_do_not_depend_on_their_batch(x: Tensor) -> None:
    net, target = seeded(Small).double(), torch.tensor([0, 1, 2, 1, 0])
    whole = GradCam()(net, x.double(), target).map
    for i in range(5):
        torch.testing.assert_close(GradCam()(net, x[i : i + 1].double(), int(target[i])).map, whole[i : i + 1])


def test_works_in_autocast_in_inference_mode_and_frozen(x: Tensor) -> None:
    net = seeded(Small).requires_grad_(False)
    wanted = GradCam()(net, x, 0).map
    with torch.inference_mode():
        assert torch.equal(GradCam()(net, x.clone(), 0).map, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        half = GradCam()(net, x, 0).map
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wanted, rtol=0.1, atol=0.02 * float(wanted.max()))


def test_the_layer_is_found_said_and_named(x: Tensor) -> None:
    answer = Answer(Normalise([0.4], [0.2]), seeded(Small))
    assert GradCam()(answer, x).table["layer"] == "model.relu2"
    assert GradCam("conv1")(answer, x).table == {"layer": "model.conv1", "plane": [8, 8], "channels": 4}
    assert GradCam(upsample=False)(answer, x).map.shape == (5, 1, 4, 4)
    with pytest.raises(Mistake, match=r"no module of the answer; did you mean 'model.conv2'"):
        GradCam("model.conv3")(answer, x)
    with pytest.raises(Mistake, match=r"'model.fc' has no spatial output \(gave \[1, 3\]\)"):
        GradCam("fc")(answer, x)


def test_ensembles_by_member(x: Tensor) -> None:
    net = seeded(Ensemble)
    assert GradCam()(net, x).table["layer"] == "members.2.relu2"
    for i in range(3):
        found, alone = GradCam(f"members.{i}.conv2")(net, x, 1), GradCam("conv2")(net.members[i], x, 1)
        torch.testing.assert_close(found.map * 3, alone.map)  # a third of the score is each member's
    with pytest.raises(Mistake, match=r"several names: members\.0\.conv2, members\.1\.conv2, members\.2\.conv2"):
        GradCam("conv2")(net, x)


def test_token_maps_are_folded_back() -> None:
    wide = torch.rand(2, 1, 8, 12, generator=torch.Generator().manual_seed(3)).double()
    net = seeded(lambda: TinyViT(False)).double()
    found = GradCam(relu=False, upsample=False)(net, wide, 1)
    assert found.table == {"layer": "norm", "plane": [2, 3], "channels": 8}
    taken: list[Tensor] = []
    handle = net.norm.register_forward_hook(lambda m, a, out: taken.append(out))
    net(wide)
    handle.remove()
    by_hand = taken[0] @ net.fc.weight[1] / 6  # dY/dA is w / 6 at each token, its mean over the plane too
    torch.testing.assert_close(found.map.flatten(1), by_hand)
    assert GradCam()(net, wide, 1).map.shape == (2, 1, 8, 12)
    # with a class token the last patches do not reach the score; the last block's first norm does
    assert GradCam()(seeded(lambda: TinyViT(True)).double(), wide, 1).table == {"layer": "blocks.1.norm1", "plane": [2, 3], "channels": 8}


def test_refusals_say_why(x: Tensor) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(Mistake, match=r"no layer of this answer .* beyond 1x1"):
        GradCam()(Answer(Normalise([0.0], [1.0]), flat), x)  # normalised pixels are no feature map
    with pytest.raises(Mistake, match="the input has shape"):
        GradCam()(nn.Linear(4, 3), torch.rand(2, 4))
    net = seeded(Small)
    net.differentiable = False
    for part in (GradCam(), Saliency(), GuidedBackprop()):
        with pytest.raises(Mistake, match="needs gradients"):
            part(net, x)
    with pytest.raises(Mistake, match="CropChosen hands the network a part of the image"):
        GradCam()(Rics(crop=6, patch=3).wrap(seeded(Small)), x)

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = seeded(Small)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).detach()

    with pytest.raises(Mistake, match="none reaches the scores"):
        GradCam()(Cut(), x)


def test_neuron_importance_is_the_mean_of_alpha(x: Tensor) -> None:
    net = seeded(Small).double()
    alpha = neuron_importance(net, x.double(), torch.full((5,), 2), "relu2")
    torch.testing.assert_close(alpha, net.fc.weight[2] / 16)  # each image's alpha is w_k / (h w)


# -- gradients of pixels -----------------------------------------------------------------------------


def test_saliency_is_the_largest_channel() -> None:
    x = torch.rand(2, 3, 4, 4).double()
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
    weight = net[1].weight[1].view(3, 4, 4)
    torch.testing.assert_close(Saliency()(net, x, 1).map[0, 0], weight.abs().amax(0))
    table = Saliency()(nn.Linear(5, 3), torch.rand(2, 5), 0)
    assert table.map.shape == (2, 1, 5)


def test_guided_backprop_by_hand() -> None:
    """a = (1, -1, 2) times x; g from above (-1, 5, 3): only a > 0 and g > 0 passes, so the third: 3 * 2."""
    first, second = nn.Linear(1, 3, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        first.weight[:] = torch.tensor([[1.0], [-1.0], [2.0]])
        second.weight[:] = torch.tensor([[-1.0, 5.0, 3.0], [0.0, 0.0, 0.0]])
    x = torch.ones(1, 1)
    for relu in (nn.ReLU(), nn.ReLU(inplace=True)):
        found = GuidedBackprop()(nn.Sequential(first, relu, second), x, 0)
        assert found.images["gradient"].tolist() == [[6.0]]
    assert Saliency()(nn.Sequential(first, nn.ReLU(), second), x, 0).map.tolist() == [[[5.0]]]  # -1 * 1 + 3 * 2
    with pytest.raises(Mistake, match="has none; use 'saliency'"):
        GuidedBackprop()(nn.Linear(2, 2), torch.ones(1, 2), 0)


def test_guided_backprop_sees_functional_relus(x: Tensor) -> None:
    class Functional(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv1(x), inplace=True), 2)
            return self.fc(self.conv2(x).relu_().mean((2, 3)))

    a, b = GuidedBackprop()(seeded(Small), x, 1), GuidedBackprop()(seeded(Functional), x, 1)
    assert torch.equal(a.images["gradient"], b.images["gradient"])
    assert not torch.equal(a.map, Saliency()(seeded(Small), x, 1).map)
    cam = GradCam()(seeded(Small), x, 1).map
    product = GuidedBackprop(cam=True)(seeded(Small), x, 1)
    assert torch.equal(product.images["gradient"], guided_grad_cam(a.images["gradient"], cam))
    assert product.table["layer"] == "relu2"


def test_captum_gives_the_same(x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attr = pytest.importorskip("captum.attr")
        net, target = seeded(Small), torch.tensor([0, 1, 2, 1, 0])
        for layer in ("conv1", "conv2", "relu2"):
            for relu in (True, False):
                theirs = attr.LayerGradCam(net, getattr(net, layer)).attribute(x, target, relu_attributions=relu)
                ours = GradCam(layer, relu=relu, upsample=False)(net, x, target).map
                torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)
                up = F.interpolate(theirs, (8, 8), mode="bilinear", align_corners=False)
                torch.testing.assert_close(GradCam(layer, relu=relu)(net, x, target).map, up.detach(), rtol=1e-4, atol=1e-6)
        guided = attr.GuidedBackprop(net).attribute(x.clone().requires_grad_(), target)
        torch.testing.assert_close(GuidedBackprop()(net, x, target).images["gradient"], guided.detach(), rtol=1e-4, atol=1e-7)
        plain = attr.Saliency(net).attribute(x.clone().requires_grad_(), target)
        torch.testing.assert_close(Saliency()(net, x, target).map, plain.detach(), rtol=1e-4, atol=1e-7)


def test_the_map_is_finite_for_an_even_image() -> None:
    found = GradCam()(seeded(Small), torch.zeros(1, 1, 8, 8), 0).map
    assert math.isfinite(float(found.sum()))
