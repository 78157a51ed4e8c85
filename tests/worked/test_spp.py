"""Spatial pyramid pooling by hand: the bins of 13 positions, torchvision's pooling, boxes of an image, whose networks take it."""

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.plain_cnn import PlainCNN
from convince.errors import Mistake
from convince.layers.spp import Spp, bins, full_image_predict, install, project, region_seconds, repool, spatial_pyramid_pool, spp_regions, ten_view_predict


def maps(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_lengths_of_the_papers_pyramids():
    assert [bins(levels) for levels in ((6, 3, 2, 1), (4, 3, 2, 1), (4, 2, 1))] == [50, 30, 21]
    assert Spp()(maps(2, 256, 13, 13)).shape == (2, 12800)
    assert Spp((4, 3, 2, 1))(maps(1, 256, 10, 10)).shape == (1, 7680)


def test_bins_of_thirteen_rows():
    """Row r holds the number r: the largest of a bin is its last row, and minus the largest of -r its first."""
    rows = torch.arange(13.0)[None, None, :, None].expand(1, 1, 13, 13)
    last, first = spatial_pyramid_pool(rows, (6,)), -spatial_pyramid_pool(-rows, (6,))
    assert last.view(6, 6)[:, 0].tolist() == [2, 4, 6, 8, 10, 12]
    assert first.view(6, 6)[:, 0].tolist() == [0, 2, 4, 6, 8, 10]
    assert spatial_pyramid_pool(rows, (3,)).view(3, 3)[:, 0].tolist() == [4, 8, 12]
    assert (-spatial_pyramid_pool(-rows, (3,))).view(3, 3)[:, 0].tolist() == [0, 4, 8]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_is_the_formula_bin_by_bin(h, w, levels):
    x = maps(2, 3, h, w)
    want = []
    for n in levels:
        for c in range(3):
            for i in range(n):
                for j in range(n):
                    rows, columns = slice(i * h // n, -(-(i + 1) * h // n)), slice(j * w // n, -(-(j + 1) * w // n))
                    want.append(x[:, c, rows, columns].amax((1, 2)))
    assert torch.equal(spatial_pyramid_pool(x, levels), torch.stack(want, 1))


def test_mean_of_one_bin_is_global_pooling():
    x = maps(2, 3, 5, 7)
    torch.testing.assert_close(Spp((1,), "mean")(x), x.mean((2, 3)))
    assert torch.equal(Spp((1,))(x), x.amax((2, 3)))


# -- boxes -----------------------------------------------------------------------------------------


def test_projection_by_hand():
    """S = 16: left 20 -> floor(1.25) + 1 = 2; right 100 -> ceil(6.25) - 1 = 6; a box between two centres takes the nearer."""
    boxes = torch.tensor([[20.0, 16.0, 100.0, 96.0], [0.0, 0.0, 224.0, 224.0], [17.0, 40.0, 22.0, 47.0], [215.0, 0.0, 224.0, 10.0]])
    assert project(boxes, 16, (14, 14)).tolist() == [[2, 2, 6, 5], [1, 1, 13, 13], [1, 3, 1, 3], [13, 0, 13, 0]]


def test_region_is_the_pyramid_of_its_window():
    f = maps(3, 14, 12)
    found = spp_regions(f, torch.tensor([[20.0, 16.0, 100.0, 96.0], [0.0, 30.0, 60.0, 200.0]]), 16, (2, 1))
    assert torch.equal(found[0], spatial_pyramid_pool(f[None, :, 2:6, 2:7], (2, 1))[0])
    assert torch.equal(found[1], spatial_pyramid_pool(f[None, :, 2:13, 1:4], (2, 1))[0])
    theirs = torchvision.ops.roi_pool(f[None], [torch.tensor([[20.0, 16.0, 100.0, 96.0]])], 2, 1 / 16)
    assert theirs.flatten(1).shape == (1, 12)


def test_times_of_both_ways():
    conv = nn.Conv2d(1, 2, 3, 2, 1)
    both = region_seconds(conv, maps(1, 32, 32), torch.tensor([[0.0, 0.0, 16.0, 16.0], [4.0, 8.0, 30.0, 30.0]]), 2, (2, 1), repeats=2)
    assert min(both) > 0


# -- networks --------------------------------------------------------------------------------------


def test_our_network_and_back():
    net = PlainCNN(5, 1, layers=(1, 1, 2), widths=(4, 8, 8)).eval()
    x = maps(2, 1, 36, 36)
    before, features, fc = net(x), net.forward_features(x), net.fc
    with install(net, (4, 2, 1)) as done:
        assert done.places == ["fc", "pool"]
        assert done.added == 5 * 8 * 20
        assert net.num_features == 21 * 8
        assert torch.equal(net(x), net.fc(spatial_pyramid_pool(features, (4, 2, 1))))
        assert net(maps(1, 1, 17, 44)).shape == (1, 5)
        net.reset_classifier(3)
        assert net(x).shape == (2, 3)
        net.fc = fc
    assert net.num_features == 8
    assert torch.equal(net(x), before)


@pytest.mark.parametrize(("name", "channels"), [("test_resnet", 96), ("test_efficientnet", 256), ("test_nfnet", 192)])
def test_timms_networks(name, channels):
    net = timm.create_model(name, num_classes=3).eval()
    assert install(net, (2, 1)).added == 3 * channels * 4
    assert net(maps(2, 3, 32, 48)).shape == (2, 3)


def test_torchvisions_networks():
    """AlexNet as in the paper: the 6x6 pooling and fc6 make room for 50 bins and a wider fc6."""
    with torch.device("meta"):
        net, small = torchvision.models.alexnet(), torchvision.models.resnet18()
    assert install(net).added == 4096 * 256 * (50 - 36)
    assert net.classifier[1].in_features == 12800
    assert net.eval()(torch.empty(1, 3, 180, 180, device="meta")).shape == (1, 1000)
    assert install(small, (1,)).added == 0


@pytest.mark.parametrize("name", ["timm/test_convnext", "timm/test_vit", "conv-stem-vit:dim=16,depth=2,heads=2", "timm/mobilenetv3_small_050"])
def test_other_networks_are_refused_whole(name):
    net = builder(name, num_classes=3, in_chans=3, size=(32, 32))()
    names = list(net.state_dict())
    with pytest.raises(Mistake, match=r"^spp: \w+ (has no pooling module|does not pool)"):
        install(net)
    assert list(net.state_dict()) == names


def test_another_pooling_of_a_persons_own():
    net = PlainCNN(3, 1, layers=(1, 1), widths=(2, 4))
    repool(net, nn.Sequential(nn.Conv2d(4, 2, 1), nn.Flatten()), 2 * 16, "flat")
    net(maps(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(Mistake, match="flat: PlainCNN does not pool"):
        repool(net, nn.Flatten(), 64, "flat")


def test_answers_for_whole_images():
    net = PlainCNN(3, 1, layers=(1, 1), widths=(2, 4)).eval()
    install(net, (2, 1))
    images = [maps(1, 20, 30), maps(1, 16, 12)]
    whole = full_image_predict(net, images, (16, 24))
    torch.testing.assert_close(whole.sum(1), torch.ones(2))
    torch.testing.assert_close(full_image_predict(net, images[1:], (12,)), net(images[1][None]).softmax(1))
    x = maps(2, 1, 12, 12)
    views = [x[..., a : a + 8, b : b + 8] for a, b in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))]
    want = torch.stack([net(v).softmax(1) for view in views for v in (view, view.flip(3))]).mean(0)
    torch.testing.assert_close(ten_view_predict(net, x, 8), want)
    with pytest.raises(Mistake, match="ten_view_predict: crop=13 must be from 1 to the images' shorter side, 12"):
        ten_view_predict(net, x, 13)


@pytest.mark.parametrize(("how", "words"), [({"levels": ()}, r"levels=\(\) must be"), ({"levels": (0,)}, "levels="), ({"mode": "sum"}, "mode='sum' must be")])
def test_wrong_options(how, words):
    with pytest.raises(Mistake, match="spp: " + words):
        Spp(**how)
