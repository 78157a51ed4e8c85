"""The four families of the visualisation survey: by hand, closed forms, and the deconvnet against captum."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.activation_maximisation import ActivationMaximisation, centre, feature_maps, total_variation
from convince.explain.deconvnet import Deconvnet
from convince.explain.guided_backprop import GuidedBackprop
from convince.explain.layer import find_layer
from convince.explain.network_dissection import concept_iou, dissect, network_dissection, thresholds
from convince.explain.network_inversion import NetworkInversion, network_inversion, relative_error, upconv_inversion
from convince.explain.saliency import Saliency
from convince.fit.answer import Answer, Normalise


class Small(nn.Module):
    """conv - ReLU - pool - conv - ReLU - global pooling - linear."""

    def __init__(self, act: type[nn.Module] = nn.ReLU, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 3)
        self.relu1, self.relu2 = (act(inplace=True), act(inplace=True)) if inplace else (act(), act())
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.conv1(x)))
        return self.fc(self.relu2(self.conv2(x)).mean((2, 3)))


def small(*args, **kwargs) -> Small:  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small(*args, **kwargs).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(1)).double()


# -- activation maximisation -------------------------------------------------------------------------


def test_total_variation_by_hand() -> None:
    """[[1 2] [4 8]]: differences (right, below) are (1, 3), (0, 6), (4, 0), (0, 0)."""
    x = torch.tensor([[[[1.0, 2], [4, 8]]]]).double()
    assert total_variation(x).tolist() == [10 + 36 + 16]
    assert total_variation(x, 1.0).item() == pytest.approx(10**0.5 + 6 + 4, abs=2e-6)
    assert total_variation(x, 4.0).item() == pytest.approx(100 + 36**2 + 16**2)


def test_a_linear_answer_is_answered_by_the_corner_of_the_cube() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    found = ActivationMaximisation(l2=0, tv=0, blur_every=0, jitter=0, steps=60)(net, torch.rand(2, 1, 4, 4).double(), torch.tensor([0, 1]))
    assert found.map is None
    assert torch.equal(found.images["image"], (net[1].weight > 0).double().view(2, 1, 4, 4))


def test_the_image_is_of_the_class_and_not_of_the_picture(x: Tensor) -> None:
    net, part = small(), ActivationMaximisation(steps=12)
    both = part(net, x, torch.tensor([2, 0, 2]))
    assert torch.equal(both.images["image"][0], both.images["image"][2])
    torch.testing.assert_close(both.images["image"][1], part(net, x[:1].flip(2), 0).images["image"][0])
    assert both.table["units"] == [0, 2]
    torch.testing.assert_close(torch.tensor(both.table["reached"]).double()[1], net(both.images["image"])[0, 2].detach())
    begin = ActivationMaximisation(steps=1, lr=1e-9)(net, x, 2)
    assert both.table["reached"][1] > begin.table["reached"][0]
    assert bool((both.images["image"] >= 0).all() & (both.images["image"] <= 1).all())


def test_a_channel_of_a_layer(x: Tensor) -> None:
    net = small()
    found = ActivationMaximisation(layer="conv2", unit=4, steps=20)(net, x, 1)
    image = found.images["image"][:1]
    mean = feature_maps(net, image, find_layer(net, x, torch.ones(3, dtype=torch.int64), "conv2")).mean((2, 3))[0, 4]
    assert found.table["layer"] == "conv2"
    assert found.table["reached"] == pytest.approx([mean.item()])
    assert "chance" not in found.table
    with pytest.raises(Mistake, match=r"activation-maximisation: channel 6 of layer 'conv2': it has channels 0 to 5"):
        ActivationMaximisation(layer="conv2", unit=6)(net, x, 1)


def test_the_zero_image_is_the_mean_of_the_normalisation(x: Tensor) -> None:
    assert centre(small(), x).unique().tolist() == [0.5]
    assert centre(Answer(Normalise([0.25], [0.5]), small()), x).unique().tolist() == [0.25]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"tv": -1}, "must be at least 0"),
        ({"start": "zero"}, "start='zero': must be 'noise' or 'mean'"),
        ({"layer": "conv1"}, r"give both \(a channel of a layer\) or neither"),
    ],
)
def test_activation_maximisation_refuses_in_words(options: dict, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        ActivationMaximisation(**options)


# -- inversion ---------------------------------------------------------------------------------------


def test_relative_error_by_hand() -> None:
    assert relative_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist() == pytest.approx([8 / 25])


def test_features_that_lose_nothing_give_the_image_back(x: Tensor) -> None:
    turn = torch.linalg.qr(torch.randn(144, 144, generator=torch.Generator().manual_seed(2)).double())[0]
    found = network_inversion(lambda z: z.flatten(1) @ turn, x, torch.full_like(x, 0.5), lam_alpha=0, lam_tv=0, steps=300)
    torch.testing.assert_close(found, x, rtol=0, atol=2e-3)
    far = network_inversion(lambda z: z.flatten(1) @ turn, x, torch.full_like(x, 0.5), lam_alpha=0, lam_tv=1.0, steps=300)
    assert bool((total_variation(far) < total_variation(found)).all())


def test_inversion_matches_the_features_and_not_the_class(x: Tensor) -> None:
    net = small()
    found = NetworkInversion("conv1", steps=150)(net, x, 0)
    assert found.table["layer"] == "conv1"
    assert found.table["feature error"] < 0.02
    assert torch.equal(found.images["inverted"], NetworkInversion("conv1", steps=150)(net, x, 2).images["inverted"])
    torch.testing.assert_close(found.images["inverted"][1:2], NetworkInversion("conv1", steps=150)(net, x[1:2], 0).images["inverted"])
    with pytest.raises(Mistake, match="lam_tv=-1"):
        NetworkInversion(lam_tv=-1)
    with pytest.raises(Mistake, match="the input has shape"):
        NetworkInversion()(nn.Linear(4, 2), torch.rand(2, 4), 0)


def test_an_up_convolutional_network_inverts_too() -> None:
    net = small().float()
    slope, ramp = torch.rand(2, 64, 1, 1, 1, generator=torch.Generator().manual_seed(5)), torch.linspace(0, 1, 12)
    x = slope[0] * ramp[:, None] + (1 - slope[1]) * ramp  # planes of all slopes
    decoder, layer = upconv_inversion(net, x, "pool", epochs=60, lr=2e-3)
    found = decoder(feature_maps(net, x, layer).flatten(1))
    assert found.shape == x.shape
    assert F.mse_loss(found, x) < 0.3 * F.mse_loss(x.mean(0, keepdim=True).expand_as(x), x)
    assert net.fc.weight.requires_grad


# -- deconvnet ---------------------------------------------------------------------------------------


def test_deconvnet_by_hand() -> None:
    """a = (1, -1, 2) times x; g from above (-1, 5, 3): every g > 0 passes, open or shut: 5 * -1 + 3 * 2."""
    first, second = nn.Linear(1, 3, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        first.weight[:] = torch.tensor([[1.0], [-1.0], [2.0]])
        second.weight[:] = torch.tensor([[-1.0, 5.0, 3.0], [0.0, 0.0, 0.0]])
    x = torch.ones(1, 1)
    for relu in (nn.ReLU(), nn.ReLU(inplace=True)):
        net = nn.Sequential(first, relu, second)
        assert Deconvnet()(net, x, 0).images["signal"].tolist() == [[1.0]]
        assert GuidedBackprop()(net, x, 0).images["gradient"].tolist() == [[6.0]]  # both masks
        assert Saliency()(net, x, 0).map.tolist() == [[[5.0]]]  # the forward mask


def test_captum_gives_the_same(x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attr = pytest.importorskip("captum.attr")
        net, target = small(), torch.tensor([0, 1, 2])
        theirs = attr.Deconvolution(net).attribute(x.clone().requires_grad_(), target)
    found = Deconvnet()(net, x, target)
    torch.testing.assert_close(found.images["signal"], theirs.detach())
    torch.testing.assert_close(found.map, theirs.detach().abs())
    torch.testing.assert_close(Deconvnet()(small(inplace=True), x, target).map, found.map)


def test_nothing_leaves_the_receptive_field(x: Tensor) -> None:
    """conv2 at (i, j) sees rows 2i - 3 to 2i + 4: pool 2 doubles 3 rows to 6, and conv1 adds one on each side."""
    net = small()
    found = Deconvnet("conv2", 3)(net, x, 0)
    activity = net.conv2(net.pool(net.relu1(net.conv1(x))))[:, 3]
    assert found.table["plane"] == [6, 6]
    some = 0
    for image, signal, (i, j) in zip(activity, found.images["signal"], found.table["strongest at"], strict=True):
        assert image[i, j] == image.max()
        field = torch.zeros(12, 12, dtype=torch.bool)
        field[max(0, 2 * i - 3) : 2 * i + 5, max(0, 2 * j - 3) : 2 * j + 5] = True
        assert bool((signal[0][~field] == 0).all())
        some += int((signal[0][field] != 0).sum())
    assert some > 0


def test_the_first_convolution_is_sent_back_by_its_kernel(x: Tensor) -> None:
    net = small()
    found = Deconvnet("conv1", 2)(net, x[:1], 0)
    i, j = found.table["strongest at"][0]
    alone = torch.zeros(1, 4, 12, 12).double()
    alone[0, 2, i, j] = net.conv1(x[:1])[0, 2, i, j]
    torch.testing.assert_close(found.images["signal"], F.conv_transpose2d(alone, net.conv1.weight, padding=1).detach())


def test_deconvnet_refuses_in_words(x: Tensor) -> None:
    with pytest.raises(Mistake, match="has none; use 'saliency'"):
        Deconvnet()(nn.Linear(2, 2), torch.ones(1, 2), 0)
    for layer in (None, "conv1"):
        with pytest.raises(Mistake, match="this answer has gelu too"):
            Deconvnet(layer, None if layer is None else 0)(small(nn.GELU), x, 0)
    with pytest.raises(Mistake, match="deconvnet: channel 9 of layer 'conv1'"):
        Deconvnet("conv1", 9)(small(), x, 0)
    with pytest.raises(Mistake, match="channel=3: give both"):
        Deconvnet(channel=3)


# -- dissection --------------------------------------------------------------------------------------


def test_dissection_by_hand() -> None:
    """Activations 1 2 3 4, the top half above T = 2.5: mask 0 0 1 1; concept 0 1 1 0: IoU 1/3."""
    a = torch.tensor([[[[1.0, 2, 3, 4]]]])
    assert thresholds(a, 0.5).tolist() == [2.5]
    concepts = {"thing": torch.tensor([[[False, True, True, False]]]), "nowhere": torch.zeros(1, 1, 4, dtype=torch.bool)}
    found = dissect(a, concepts, quantile=0.5)
    assert found.concepts == ("thing",)
    assert found.iou.tolist() == [[pytest.approx(1 / 3)]]
    assert found.table() == [{"unit": 0, "concept": "thing", "iou": pytest.approx(1 / 3), "detector": True}]
    assert dissect(a, concepts, quantile=0.5, least=0.34).unique == 0


def test_the_threshold_leaves_its_share_above() -> None:
    a = torch.randn(50, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    above = (a > thresholds(a)[:, None, None]).double().mean((0, 2, 3))
    assert above.tolist() == pytest.approx([0.005] * 3)


def test_iou_sums_over_the_set_and_activity_is_enlarged() -> None:
    """Image 1 shares 2 of 3 pixels, image 2 none of 1: 2/4. A 1x1 activity above T covers the whole mask."""
    a = torch.tensor([[[[1.0, 1], [0, 0]]], [[[0.0, 0], [0, 0]]]])
    masks = torch.tensor([[[[True, True], [True, False]]], [[[False, False], [False, True]]]])
    assert concept_iou(a, torch.tensor([0.5]), masks).tolist() == [[0.5]]
    assert concept_iou(a, torch.tensor([0.5]), masks, rows=1).tolist() == [[0.5]]
    assert concept_iou(torch.ones(1, 2, 1, 1), torch.tensor([0.5, 1.0]), masks[:1]).tolist() == [[0.75], [0.0]]


def test_a_turned_basis_has_no_detectors_of_its_own() -> None:
    """Two units that fire on one concept each are two detectors; their sum and difference are the union's, IoU 1/2."""
    red, blue = torch.zeros(1, 10, 10, dtype=torch.bool), torch.zeros(1, 10, 10, dtype=torch.bool)
    red[0, 0], blue[0, 9] = True, True
    a = torch.stack([red, blue], 1).double()
    assert dissect(a, {"red": red, "blue": blue}, 0.1).iou.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert dissect(a, {"red": red, "blue": blue}, 0.1).unique == 2
    turned = torch.einsum("uv,nvhw->nuhw", torch.tensor([[1.0, 1], [1, -1]]).double(), a)
    assert dissect(turned, {"red": red, "blue": blue}, 0.3).iou.tolist() == [[0.5, 0.5], [1.0, 0.0]]


def test_dissection_of_a_network(x: Tensor) -> None:
    net = small()
    bright = x[:, 0] > 0.9
    found = network_dissection(net, x, {"bright": bright}, "conv1", quantile=0.05, least=0.0)
    taken = net.conv1(x).detach()
    assert torch.equal(found.iou, dissect(taken, {"bright": bright}, 0.05).iou)
    assert len(found.table()) == 4
    with pytest.raises(Mistake, match="no concept is in any image"):
        network_dissection(net, x, {"dark": x[:, 0] < 0})
    with pytest.raises(Mistake, match=r"the mask of 'bright' has shape \(2, 12, 12\)"):
        network_dissection(net, x, {"bright": bright[:2]})
    with pytest.raises(Mistake, match=r"quantile=1\.5"):
        network_dissection(net, x, {"bright": bright}, quantile=1.5)
