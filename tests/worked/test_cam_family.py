"""Grad-CAM++, Smooth Grad-CAM++, Eigen-CAM and Score-CAM: by hand, closed forms, and against pytorch-grad-cam."""

from __future__ import annotations

import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.eigen_cam import THRESHOLDS, EigenCam, eigen_cam, wsol_iou
from convince.explain.layer import find_layer, maps_and_gradients
from convince.explain.score_cam import ScoreCam, maps_of
from convince.explain.smooth_grad_cam_pp import SmoothGradCamPp, alphas, grad_cam_pp, powers, smooth_derivatives, weigh
from convince.explain.targets import Similarity


class Small(nn.Module):
    """conv - ReLU in place - pool - conv - ReLU, then global pooling and a linear layer, or (``deep``) two fully connected layers."""

    def __init__(self, deep: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc1, self.fc = (nn.Linear(96, 12), nn.Linear(12, 3)) if deep else (None, nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x), inplace=True), 2)
        x = self.relu(self.conv2(x))
        return self.fc(x.mean((2, 3)) if self.fc1 is None else F.relu(self.fc1(x.flatten(1))))


def seeded(make, seed: int = 0):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval().requires_grad_(False)


def deep() -> nn.Module:
    return Small(deep=True)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("pytorch_grad_cam")


# -- Grad-CAM++ and Smooth Grad-CAM++ ----------------------------------------------------------------

A = torch.tensor([[[[1.0, 2], [0, 1]], [[0.0, 1], [3, 0]]]])
G = torch.tensor([[[[1.0, 0.5], [0, 0.5]], [[-1.0, 0], [0.5, -0.5]]]])


def test_grad_cam_pp_by_hand() -> None:
    """alpha of the first map: 1/(2 + 4), 1/4 / (1/2 + 4/8), 0/0 -> 0, the same; of the second 1/(2 - 4) = -0.5, 0, 1/4, and 1/4 / (1/2 - 4/8) -> 0."""
    torch.testing.assert_close(alphas(A, powers(G)), torch.tensor([[[[1 / 6, 0.25], [0, 0.25]], [[-0.5, 0], [0.25, 0]]]]))
    torch.testing.assert_close(grad_cam_pp(A, G), torch.tensor([[[[0.41667, 0.95833], [0.375, 0.41667]]]]), rtol=1e-4, atol=1e-5)
    # the printed form, D1 above the line: w = (1/6 + 0.5 * 0.5 + 0.5 * 0.5, 0.5 * 0.5)
    torch.testing.assert_close(weigh(A, powers(G), numerator="D1"), torch.tensor([[[[2 / 3, 4 / 3 + 0.25], [0.75, 2 / 3]]]]))


def test_chosen_maps_and_neurons_by_hand() -> None:
    torch.testing.assert_close(weigh(A, powers(G), channels=(1,)), torch.tensor([[[[0, 0.125], [0.375, 0]]]]))
    # the upper left cell alone: w = (1/6, -0.5 * ReLU(-1) = 0)
    torch.testing.assert_close(weigh(A, powers(G), neurons=(0, 0, 1, 1)), A[:, :1] / 6)
    torch.testing.assert_close(weigh(A, powers(G), neurons=(0, 0, 2, 2)), grad_cam_pp(A, G))


def test_averages_of_two_pictures_by_hand() -> None:
    """One map of one cell, A = 2, gradients 1 and 3: D = (2, 5, 14), alpha = 5 / (10 + 28), w = 2 alpha, map = 4 alpha."""
    a, g = torch.tensor([[[[2.0]]]]), torch.tensor([1.0, 3.0])
    derivatives = tuple((g**k).mean().view(1, 1, 1, 1) for k in (1, 2, 3))
    assert float(weigh(a, derivatives)) == pytest.approx(4 * 5 / 38)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Small, deep])
def test_without_noise_it_is_grad_cam_pp(x: Tensor, make) -> None:  # type: ignore[no-untyped-def]
    net, target = seeded(make), torch.tensor([0, 1, 2, 1, 0])
    layer = find_layer(net, x, target)
    plain = grad_cam_pp(*maps_and_gradients(net, x, target, layer))
    found = SmoothGradCamPp(copies=1, sigma=0.0, upsample=False)(net, x, target)
    assert torch.equal(found.map, plain)
    assert found.table == {"layer": "relu", "plane": [4, 4], "channels": 6}
    up = F.interpolate(plain, (8, 8), mode="bilinear", align_corners=False)
    assert torch.equal(SmoothGradCamPp(sigma=0.0)(net, x, target).map, up)


def test_noise_changes_nothing_behind_global_pooling_and_much_behind_layers_that_bend(x: Tensor) -> None:
    """Behind global average pooling the gradient is w_k / (h w) for every picture: alpha has the closed form 1 / (2 + w_k mean(A_k))."""
    net = seeded(Small).double()
    found = SmoothGradCamPp(upsample=False)(net, x.double(), 1).map
    torch.testing.assert_close(found, SmoothGradCamPp(sigma=0.0, upsample=False)(net, x.double(), 1).map)
    maps = maps_of(net, x.double(), find_layer(net, x.double(), torch.ones(5).long()))
    w = net.fc.weight[1].relu()
    closed = torch.einsum("nk,nkij->nij", w / (2 + w * maps.mean((2, 3))), maps)
    torch.testing.assert_close(found[:, 0], closed)
    bent = seeded(deep)
    assert not torch.allclose(SmoothGradCamPp()(bent, x, 1).map, SmoothGradCamPp(sigma=0.0)(bent, x, 1).map, rtol=0.01)


def test_copies_are_averaged_one_by_one_and_scaled_by_the_range(x: Tensor) -> None:
    """In parts of several copies and image by image the same derivatives come out; noise is a share of each image's own range."""
    net, target = seeded(deep).double(), torch.tensor([0, 1, 2, 1, 0])
    x = x.double() * torch.tensor([1, 0.5, 0.25, 1, 1]).view(-1, 1, 1, 1)
    noise = 0.3 * torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    layer = find_layer(net, x, target)
    found = smooth_derivatives(net, x, target, noise, layer)
    for i in range(5):
        span = x[i].max() - x[i].min()
        each = [maps_and_gradients(net, x[i : i + 1] + span * s, target[i : i + 1], layer)[1] for s in noise]
        for k in range(3):
            torch.testing.assert_close(found[k][i : i + 1], sum(g ** (k + 1) for g in each) / 9)


def test_seed_and_refusals(x: Tensor) -> None:
    net = seeded(deep)
    assert torch.equal(SmoothGradCamPp(copies=4)(net, x, 1).map, SmoothGradCamPp(copies=4)(net, x, 1).map)
    assert not torch.equal(SmoothGradCamPp(copies=4)(net, x, 1).map, SmoothGradCamPp(copies=4, seed=1)(net, x, 1).map)
    for wrong, said in (({"copies": 0}, "copies=0"), ({"sigma": -1.0}, "sigma=-1.0"), ({"numerator": "D3"}, "one of D2, D1")):
        with pytest.raises(Mistake, match=said):
            SmoothGradCamPp(**wrong)
    with pytest.raises(Mistake, match="smooth-grad-cam-pp: channels=\\(6,\\): layer 'relu' has 0 to 5"):
        SmoothGradCamPp(channels=(6,))(net, x, 1)
    with pytest.raises(Mistake, match="neurons=\\(0, 0, 5, 1\\): must be \\(left, top, right, bottom\\)"):
        SmoothGradCamPp(neurons=(0, 0, 5, 1))(net, x, 1)
    like = SmoothGradCamPp(copies=3)(Similarity(net, x[:1]), x[1:], 0)
    assert like.map.shape == (4, 1, 8, 8)


# -- Eigen-CAM ---------------------------------------------------------------------------------------

M = torch.tensor([[2.0, 1], [1, 2], [0, 0], [4, 4]]).T.reshape(1, 2, 2, 2)  # two maps of 2 x 2


def test_eigen_cam_by_hand() -> None:
    """M'M = [[21, 20], [20, 21]]: eigenvalues 41 and 1, v_1 = (1, 1) / sqrt 2."""
    found, share = eigen_cam(M)
    torch.testing.assert_close(found.flatten(), torch.tensor([3, 3, 0, 8]) / 2**0.5)
    assert share.item() == pytest.approx(41 / 42)
    centred, _ = eigen_cam(M, center=True)
    torch.testing.assert_close(centred.flatten(), torch.tensor([-0.35355, -0.35355, -2.47487, 3.18198]), rtol=1e-4, atol=1e-5)
    empty, none = eigen_cam(torch.zeros(1, 3, 2, 2))
    assert not empty.any()
    assert none.item() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_the_map_is_the_best_projection_and_its_sign_agrees_with_the_mean(seed: int, center: bool, signed: bool) -> None:
    gen = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 5, 3, 4, generator=gen).double()
    maps = maps if signed else maps.relu()
    found, share = eigen_cam(maps, center=center)
    other, same = eigen_cam(maps[:, torch.randperm(5, generator=gen)], center=center)
    torch.testing.assert_close(found, other)  # the order of the maps is no matter
    torch.testing.assert_close(share, same)
    if not center and not signed:
        assert bool((found >= -1e-12).all())
    rows = maps.flatten(2) - maps.flatten(2).mean(2, keepdim=True) * center
    for _ in range(5):  # no direction holds more
        way = F.normalize(torch.randn(5, generator=gen).double(), dim=0)
        assert bool((torch.einsum("d,ndp->np", way, rows).norm(dim=1) <= found.flatten(1).norm(dim=1) + 1e-9).all())
    lead = found.flatten(1) - (found.flatten(1).mean(1, keepdim=True) if center or signed else 0)
    assert bool(((lead * maps.flatten(2).mean(1)).sum(1) >= -1e-9).all())


def test_neither_the_class_nor_the_head_is_asked(x: Tensor) -> None:
    net = seeded(Small)
    found = EigenCam()(net, x, 0)
    assert torch.equal(found.map, EigenCam()(net, x, 2).map)
    nn.init.normal_(net.fc.weight, generator=torch.Generator().manual_seed(5))
    assert torch.equal(found.map, EigenCam()(net, x, 0).map)
    assert found.table["layer"] == "relu"
    assert len(found.table["explained"]) == 5
    assert all(0 < share <= 1 for share in found.table["explained"])
    asked = EigenCam(class_specific=True, upsample=False)
    assert not torch.equal(asked(net, x, 0).map, asked(net, x, 2).map)
    target = torch.ones(5).long()
    maps, gradients = maps_and_gradients(net, x, target, find_layer(net, x, target))
    torch.testing.assert_close(asked(net, x, 1).map, eigen_cam(maps * gradients.relu())[0].relu())


def test_boxes_at_thresholds_by_hand() -> None:
    """A plane with a block of 1 inside a block of 0.5: each threshold finds the block it cuts out."""
    plane = torch.zeros(1, 1, 8, 8)
    plane[0, 0, 1:7, 1:7], plane[0, 0, 2:4, 2:4] = 0.5, 1.0
    found = wsol_iou(plane, torch.tensor([[1.0, 1, 7, 7]]), (0.2, 0.5, 0.6))
    assert found[:, 0].tolist() == pytest.approx([1, 1, 4 / 36])
    assert THRESHOLDS[0] == 0.15
    assert THRESHOLDS[-1] == 0.9
    assert len(THRESHOLDS) == 16


# -- against pytorch-grad-cam ------------------------------------------------------------------------


def plane_of(cam, x: Tensor, target: Tensor, theirs: ModuleType) -> Tensor:  # type: ignore[no-untyped-def]
    """Their map on the layer's plane, before it is scaled and enlarged."""
    taken: list[np.ndarray] = []
    inner = cam.get_cam_image
    cam.get_cam_image = lambda *args: taken.append(inner(*args)) or taken[-1]
    cam.activations_and_grads.release()
    cam.activations_and_grads = type(cam.activations_and_grads)(cam.model, cam.target_layers, None, True)
    cam(x, [theirs.utils.model_targets.ClassifierOutputTarget(int(t)) for t in target])
    cam.activations_and_grads.release()
    return torch.from_numpy(np.asarray(taken[0]))[:, None].clamp_min(0)


def test_their_grad_cam_pp_is_ours(x: Tensor, theirs: ModuleType) -> None:
    target = torch.tensor([0, 1, 2, 1, 0])
    for make in (Small, deep):
        net = seeded(make)
        net.fc.weight *= 30  # their denominator has 1e-6 added: gradients must be large beside its root
        net.requires_grad_(True)
        found = SmoothGradCamPp(sigma=0.0, upsample=False)(net, x, target)
        assert found.table["layer"] == "relu"
        whole = plane_of(theirs.GradCAMPlusPlus(net, [net.relu]), x, target, theirs)
        torch.testing.assert_close(found.map, whole, rtol=2e-3, atol=2e-3 * float(whole.max()))


def test_their_centred_eigen_cam_is_ours(x: Tensor, theirs: ModuleType) -> None:
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection

    net, target = seeded(Small), torch.zeros(5).long()
    maps = maps_of(net, x, find_layer(net, x, target))
    ours, _ = eigen_cam(maps, center=True)
    up_to_sign = torch.from_numpy(get_2d_projection(maps.numpy()))[:, None]
    sign = (ours * up_to_sign).sum((1, 2, 3), keepdim=True).sign()  # theirs has whatever sign LAPACK left
    torch.testing.assert_close(ours, up_to_sign * sign, rtol=1e-4, atol=1e-6)
    net.requires_grad_(True)
    whole = plane_of(theirs.EigenCAM(net, [net.relu]), x, target, theirs)
    kept = sign.flatten() > 0
    torch.testing.assert_close(EigenCam(center=True, upsample=False)(net, x, 0).map[kept], whole[kept], rtol=1e-4, atol=1e-6)


def test_their_score_cam_is_ours_where_nothing_is_enlarged(theirs: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    """They enlarge maps with aligned corners; a layer as large as the image is the case in which that is no difference."""
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)))
    x, target = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 2, 1])
    found = ScoreCam("1")(net, x, target).map
    net.requires_grad_(True)
    torch.testing.assert_close(found, plane_of(theirs.ScoreCAM(net, [net[1]]), x, target, theirs), rtol=1e-4, atol=1e-6)
    capfd.readouterr()  # their progress bars
