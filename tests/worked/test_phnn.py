"""PHNN by hand: Kronecker sums, Hamilton's product, the released initial law, exact sizes, what a swap must keep."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as nnf

from convince.backbones import builder
from convince.backbones.phresnet import PhResNet, pad_channels
from convince.backbones.plain_cnn import PlainCNN
from convince.backbones.resnet import ResNet
from convince.errors import Mistake
from convince.layers.phnn import ALGEBRAS, PHConv2d, PHLinear, install, param_report, ph_weight, phnn
from convince.models.counting import count_named


def numbers(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_weight_is_a_sum_of_kronecker_products_at_every_tap(n):
    A, F = torch.randn(n, n, n, dtype=torch.float64), torch.randn(n, 3, 2, 2, 3, dtype=torch.float64)
    W = ph_weight(A, F)
    assert W.shape == (3 * n, 2 * n, 2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(W[:, :, i, j], sum(torch.kron(A[s], F[s, :, :, i, j]) for s in range(n)))
    torch.testing.assert_close(ph_weight(A, F[..., 0, 0]), W[:, :, 0, 0])


def test_worked_weight():
    """A_1 = [[1, 2], [3, 4]], A_2 = I, F_1 = [[5]], F_2 = [[7]]: 5 A_1 + 7 I = [[12, 10], [15, 27]]."""
    A = torch.tensor([[[1.0, 2], [3, 4]], [[1, 0], [0, 1]]])
    assert ph_weight(A, torch.tensor([[[5.0]], [[7.0]]])).tolist() == [[12, 10], [15, 27]]


def hamilton(p, q):
    """The product of two quaternions (r, i, j, k)."""
    a, b, c, d = p
    e, f, g, h = q
    return (a * e - b * f - c * g - d * h, a * f + b * e + c * h - d * g, a * g - b * h + c * e + d * f, a * h + b * g - c * f + d * e)


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 0, (1, 3)), (2, 2, 5)])
def test_quaternion_convolution_by_hand(stride, padding, kernel):
    """Each of 3 output quaternions is the sum over 2 input ones of filter times input, by Hamilton's rule, one real convolution a product."""
    layer = PHConv2d(8, 12, kernel, n=4, stride=stride, padding=padding, bias=False, algebra="quaternion").double()
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    F = layer.F.unflatten(0, (4, 3))
    parts = x.chunk(4, 1)  # r, i, j, k of both input quaternions

    class Product:
        def __init__(self, filters):
            self.filters = filters

        def __mul__(self, other):
            return nnf.conv2d(other, self.filters, stride=stride, padding=padding)

    wanted = torch.cat(hamilton([Product(f) for f in F], parts), 1)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_complex_convolution_is_torchs():
    layer = PHConv2d(6, 4, 3, n=2, padding=1, bias=False, algebra="complex").double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    F, z = layer.F.unflatten(0, (2, 2)), torch.complex(*x.chunk(2, 1))
    wanted = nnf.conv2d(z, torch.complex(F[0], F[1]), padding=1)
    torch.testing.assert_close(layer(x), torch.cat([wanted.real, wanted.imag], 1))


def test_units_multiply_as_they_should():
    """i i = j j = k k = -1 and i j = k, also as matrices."""
    one, i, j, k = (torch.tensor(m) for m in ALGEBRAS["quaternion"])
    for unit in (i, j, k):
        assert torch.equal(unit @ unit, -one)
    assert torch.equal(i @ j, k)
    assert torch.equal(j @ i, -k)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_parameters_are_a_share_and_the_layers_are_ordinary_ones_with_this_weight(n, o, i, bias, linear):
    if linear:
        layer, x = PHLinear(n * i, n * o, n, bias=bias), torch.randn(2, 5, n * i)
        torch.testing.assert_close(layer(x), nnf.linear(x, layer.weight, layer.bias))
    else:
        layer, x = PHConv2d(n * i, n * o, 3, n, padding=1, bias=bias), torch.randn(2, n * i, 4, 4)
        torch.testing.assert_close(layer(x), nnf.conv2d(x, layer.weight, layer.bias, padding=1))
    real = n * i * n * o * (1 if linear else 9)
    assert numbers(layer) == real // n + n**3 + (n * o if bias else 0)
    assert param_report(nn.Sequential(layer)) == [{"layer": "0", "n": n, "parameters": numbers(layer), "real": real + (n * o if bias else 0)}]


def test_released_initial_law():
    """Both uniform by Xavier's law on their raw shapes: A within sqrt(3) / n, F within sqrt(6 / (fan_in + fan_out)) of [n, out / n, in / n, k, k]."""
    torch.manual_seed(0)
    layer = PHConv2d(64, 128, 3, n=4, bias=False).requires_grad_(False)
    for tensor, bound in ((layer.A, 3**0.5 / 4), (layer.F, (6 / (32 * 16 * 9 + 4 * 16 * 9)) ** 0.5)):
        assert float(tensor.abs().max()) <= bound
        assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.2)
    # var(W) = sum_s var(A_s) var(F_s)
    assert float(layer.weight.var()) == pytest.approx(float(4 * layer.A.square().mean() * layer.F.var()), rel=0.25)


@pytest.mark.parametrize(("n", "algebra"), [(2, None), (4, None), (2, "complex"), (4, "quaternion")])
def test_fan_law_keeps_the_variance_of_an_ordinary_layer(n, algebra):
    torch.manual_seed(0)
    layer = PHConv2d(64, 128, 3, n=n, init="fan", algebra=algebra)
    assert float(layer.weight.detach().var()) == pytest.approx(2 / (64 * 9), rel=0.05)
    assert float(PHLinear(512, 512, n, init="fan", algebra=algebra).weight.detach().var()) == pytest.approx(2 / 512, rel=0.05)
    assert ("A" in dict(layer.named_parameters())) == (algebra is None)


@pytest.mark.parametrize(("spec", "parameters"), [("phresnet:n=1", 11_173_962), ("phresnet50-n2:n=1", 23_520_842)])
def test_real_networks_have_the_papers_sizes(spec, parameters):
    assert count_named(spec, num_classes=10, size=(32, 32)).parameters == parameters


def test_mini_shrinks_as_the_claim_says():
    four, three, real = (count_named(s, num_classes=10, size=(32, 32)).parameters for s in ("phresnet-mini", "phresnet-mini-n3", "phresnet-mini:n=1"))
    assert four == 45_682
    assert three == 59_653
    assert real == 174_274


def test_input_is_padded_with_zeros():
    x = torch.randn(2, 3, 2, 2)
    for n, channels in ((1, 3), (2, 4), (3, 3), (4, 4)):
        y = pad_channels(x, n)
        assert y.shape[1] == channels
        assert torch.equal(y[:, :3], x)
        assert not y[:, 3:].any()


def test_quaternion_network_has_no_rule_to_learn():
    model = PhResNet(num_classes=3, layers=(1, 1), widths=(8, 16), n=4, algebra="quaternion")
    assert not any(name.endswith(".A") for name, _ in model.named_parameters())
    assert all(m.n == 4 for m in model.modules() if isinstance(m, PHConv2d))


def test_install_keeps_geometry_and_leaves_first_and_last():
    model = ResNet(num_classes=4, layers=(1, 1), widths=(4, 8))
    before = {name: (m.stride, m.padding) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    shape = model(torch.randn(2, 3, 8, 8)).shape
    done = install(model, n=2)
    assert done.places == ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]
    assert isinstance(model.conv1, nn.Conv2d)
    for name in done.places:
        layer = model.get_submodule(name)
        assert isinstance(layer, PHConv2d)
        assert (layer.geometry["stride"], layer.geometry["padding"]) == before[name]
    assert model(torch.randn(2, 3, 8, 8)).shape == shape
    real = 4 * 4 * 9 * 2 + 4 * 8 * 9 + 8 * 8 * 9 + 4 * 8
    assert done.added == real // 2 + 5 * 8 - real


def test_skip_names_what_stays():
    model = PlainCNN(num_classes=4, in_chans=4, layers=(1, 1), widths=(4, 8))
    assert install(copy.deepcopy(model), n=2, skip=()).places == ["convs.0", "convs.1", "fc"]
    assert install(copy.deepcopy(model), n=2, skip=("convs.*",)).places == ["fc"]
    assert install(copy.deepcopy(model), n=2).places == ["convs.1"]


def test_timm_networks_take_it():
    """A token network, and VGG, which the paper makes hypercomplex too."""
    vit = builder("timm/test_vit", num_classes=3, in_chans=3, size=(32, 32))().eval()
    assert any("qkv" in name for name in install(vit, n=4).places)
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    vgg = builder("timm/vgg11", num_classes=10, in_chans=3, size=(224, 224))
    with torch.device("meta"):
        model = vgg()
        places = install(model, n=4).places
    assert len(places) == 9  # seven convolutions after the first, and the two large layers before the classifier
    assert numbers(model) < 0.26 * 128_807_306


def test_export_and_double_precision():
    model = PhResNet(num_classes=3, in_chans=1, layers=(1,), widths=(4,), n=2).eval()
    x = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    layer = PHConv2d(2, 4, 3, n=2).double()
    assert torch.autograd.gradcheck(layer, torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True))


def hooked():
    model = PlainCNN(num_classes=4, in_chans=4, layers=(2,), widths=(4,))
    model.convs[1].register_forward_hook(lambda m, i, o: o)
    return model


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PHConv2d(3, 8, 3, n=2), "n=2 must divide the 3 input and the 8 output"),
        (lambda: PHLinear(4, 6, n=4), "n=4 must divide the 4 input and the 6 output"),
        (lambda: PHConv2d(4, 4, 3, init="kaiming"), "init='kaiming' must be"),
        (lambda: PHConv2d(4, 4, 3, n=4, algebra="complex"), "algebra='complex' with n=4"),
        (lambda: PHConv2d(4, 4, 3, n=4, algebra="octonion"), "algebra='octonion'"),
        (lambda: phnn(nn.Conv2d(4, 4, 3, groups=2)), "no Conv2d of one group"),
        (lambda: install(ResNet(layers=(1, 1), widths=(4, 6)), n=4), r"n=4 must divide .* \(here layer2.0.conv1 of ResNet\)"),
        (lambda: install(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), "no plain convolution or linear layer"),
        (lambda: install(hooked()), "attached to convs.1 .* install phnn first"),
        (lambda: PhResNet(n=3), "phresnet: n=3 must divide every width"),
        (lambda: PhResNet(layers=(1, 1)), "must name the same stages"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(Mistake, match=words):
        call()


def test_a_refused_swap_changes_nothing():
    model = ResNet(layers=(1, 1), widths=(4, 6))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Mistake, match="n=4"):
        install(model, n=4)
    assert model.state_dict().keys() == before.keys()
