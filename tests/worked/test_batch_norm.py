"""Batch norm by hand: the worked batch, torch's layers and fusions, counts, what is dropped and comes back, population statistics, percentiles."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import update_bn

from convince.backbones import builder
from convince.backbones.mlp import MLP
from convince.backbones.plain_cnn import PlainCNN
from convince.backbones.resnet import ResNet
from convince.backbones.sigmoid_mlp import SigmoidMLP
from convince.errors import Mistake
from convince.layers.batch_norm import activation_percentiles, batch_norm, fold_bn, install, is_norm, recompute_stats, running


def numbers(model):
    return sum(p.numel() for p in model.parameters())


def shaken(model, x, steps=3):
    """The network with norms that have seen something and weights that are not their first ones."""
    gen = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                m.weight.uniform_(0.5, 2, generator=gen)
                m.bias.normal_(generator=gen)
    for i in range(steps):
        model.train()(x + 0.1 * i)
    return model.eval()


def test_worked_batch():
    x = torch.tensor([[1.0], [2], [3], [4]])
    y, mean, var = batch_norm(x, torch.ones(1), torch.zeros(1))
    torch.testing.assert_close(y[:, 0], torch.tensor([-1.34163542, -0.44721181, 0.44721181, 1.34163542]))
    assert (float(mean), float(var)) == (2.5, 1.25)
    mean, var = running((torch.zeros(1), torch.ones(1)), mean, var, m=4)
    assert float(mean) == pytest.approx(0.25)
    assert float(var) == pytest.approx(1.0666667)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.sampled_from([(), (3,), (2, 5)]), st.floats(1e-6, 0.1), st.floats(0.05, 1))
def test_parity_with_torch(n, c, space, eps, momentum):
    x = torch.randn(n, c, *space, dtype=torch.float64, generator=torch.Generator().manual_seed(n * 10 + c))
    theirs = (nn.BatchNorm2d if len(space) == 2 else nn.BatchNorm1d)(c, eps=eps, momentum=momentum).double()
    with torch.no_grad():
        theirs.weight.uniform_(-1, 2)
        theirs.bias.normal_()
    y, mean, var = batch_norm(x, theirs.weight, theirs.bias, eps)
    torch.testing.assert_close(y, theirs(x), rtol=1e-6, atol=1e-9)
    mean, var = running((torch.zeros(c).double(), torch.ones(c).double()), mean, var, x.numel() // c, momentum)
    torch.testing.assert_close(mean, theirs.running_mean)
    torch.testing.assert_close(var, theirs.running_var)


def test_result_has_mean_beta_and_deviation_gamma():
    gamma, beta = torch.tensor([2.0, 0.5]), torch.tensor([1.0, -3.0])
    y, _, _ = batch_norm(torch.randn(50, 2, 3) * 7 + 5, gamma, beta)
    torch.testing.assert_close(y.mean((0, 2)), beta, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.std((0, 2), unbiased=False), gamma, rtol=1e-4, atol=1e-4)


def test_the_papers_mnist_network():
    model = SigmoidMLP(hidden=(100, 100, 100), img_size=(28, 28))
    assert numbers(model) == 99_710
    done = install(model)
    assert done.places == ["hidden.0", "hidden.2", "hidden.4"]
    assert done.added == 600 - 300  # scales and shifts, less the biases that they make idle
    assert numbers(model) == 100_010
    assert model.fc.bias is not None


def test_the_norm_stands_before_the_nonlinearity():
    model = PlainCNN(num_classes=3, in_chans=2, layers=(1, 1), widths=(4, 8))
    install(model)
    x = torch.randn(5, 2, 6, 6)
    y = x
    for conv in model.convs:
        assert conv.layer.bias is None
        y = batch_norm(conv.layer(y), conv.bn.weight, conv.bn.bias)[0].relu()
    torch.testing.assert_close(model.forward_features(x), y)


def test_undo_brings_the_biases_back():
    model = MLP(in_chans=5, hidden=(7, 6))
    state, x = copy.deepcopy(model.state_dict()), torch.randn(4, 5)
    before = model(x)
    done = install(model)
    assert "hidden.0.layer.bias" not in model.state_dict()
    assert not torch.equal(model(x), before)
    done.undo()
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model(x), before)


def test_skip_leaves_layers_and_their_biases():
    model = PlainCNN(num_classes=3, in_chans=1, layers=(1, 2), widths=(4, 8))
    assert install(model, skip=("convs.0",)).places == ["convs.1", "convs.2"]
    assert model.convs[0].bias is not None


def test_networks_of_timm_and_torch_without_norms():
    """NF-nets and VGG have none; the last layer of a plain chain counts as its classifier."""
    import timm

    with torch.device("meta"):
        vgg = timm.create_model("vgg11")
        assert len(install(vgg).places) == 8 + 2
        assert vgg(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    nf = builder("timm/test_nfnet", num_classes=3, in_chans=3, size=(32, 32))()
    install(nf)
    assert nf(torch.randn(4, 3, 32, 32)).shape == (4, 3)
    chain = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    assert install(chain).places == ["0"]
    assert chain(torch.randn(4, 2, 6)).shape == (4, 2)


@pytest.mark.parametrize(
    ("module", "norm"),
    [(nn.BatchNorm1d(2), True), (nn.GroupNorm(1, 2), True), (nn.InstanceNorm2d(2), True), (nn.RMSNorm(2), True), (nn.LocalResponseNorm(2), False)],
)
def test_what_counts_as_normalisation(module, norm):
    assert is_norm(module) is norm
    assert not is_norm(nn.ReLU())


# -- folding ---------------------------------------------------------------------------------------


def test_folding_is_torchs():
    x = torch.randn(6, 3, 5, 5)
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5)), x)
    small = fold_bn(model, x)
    theirs = (fuse_conv_bn_eval(model[0], model[1]), fuse_linear_bn_eval(model[3], model[4]))
    for mine, other in zip((small[0], small[3]), theirs, strict=True):
        torch.testing.assert_close(mine.weight, other.weight)
        torch.testing.assert_close(mine.bias, other.bias)
    assert isinstance(small[1], nn.Identity)
    assert isinstance(model[1], nn.BatchNorm2d), "the network itself stays as it was"


@pytest.mark.parametrize("name", ["ours", "resnet", "timm/test_efficientnet"])
def test_folded_networks_answer_alike_without_norms(name):
    x = torch.randn(4, 3, 32, 32)
    if name == "ours":
        model = PlainCNN(num_classes=3, in_chans=3, layers=(1, 1), widths=(4, 8), skip=True)
        install(model)
    elif name == "resnet":
        model = ResNet(num_classes=3, layers=(1, 1), widths=(4, 8))
    else:
        model = builder(name, num_classes=3, in_chans=3, size=(32, 32))()
    model = shaken(model, x)
    small = fold_bn(model, x)
    assert not any(is_norm(m) for m in small.modules())
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-4)
    assert not any(m._forward_pre_hooks for m in [*small.modules(), *model.modules()])
    assert not any(m._forward_hooks for m in small.modules())


class Peeks(nn.Module):
    """Reads a layer's output before its norm as well."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.a(x)
        return self.norm(y) + y


def test_what_cannot_be_folded_is_refused():
    x = torch.randn(8, 3)
    with pytest.raises(Mistake, match="answers otherwise when folded"):
        fold_bn(shaken(Peeks(), x), x)
    with pytest.raises(Mistake, match="no batch norm that reads"):
        fold_bn(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), x)


# -- statistics ------------------------------------------------------------------------------------


def test_population_statistics_are_torchs_and_the_papers():
    model = PlainCNN(num_classes=3, in_chans=1, layers=(1, 1), widths=(4, 8)).double()
    install(model)
    batches = [torch.randn(5, 1, 6, 6, dtype=torch.float64) + i for i in range(4)]
    other = copy.deepcopy(model)
    update_bn(batches, other)
    recompute_stats(model.eval(), batches)
    assert not any(m.training for m in model.modules())
    norm = model.convs[0].bn
    assert norm.momentum == 0.1
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    bare = [nn.functional.conv2d(x, model.convs[0].layer.weight, padding=1) for x in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean((0, 2, 3)) for b in bare]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var((0, 2, 3)) for b in bare]).mean(0))


def test_statistics_without_batches_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    shaken(model, torch.randn(4, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Mistake, match="got no batches"):
        recompute_stats(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(Mistake, match="no batch norm with running statistics"):
        recompute_stats(nn.Linear(2, 2), [torch.zeros(1, 2)])


def test_percentiles_by_hand():
    model = nn.Sequential(nn.Identity(), nn.Flatten())
    x = torch.stack([torch.zeros(101), torch.arange(101.0)], 1)  # unit 1 takes 0, 1, ..., 100
    assert activation_percentiles(model, x, "0", unit=1) == pytest.approx([15, 50, 85])
    assert activation_percentiles(model, x, "0", unit=0, at=(0, 100)) == [0, 0]
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: install(ResNet(layers=(1, 1), widths=(4, 8))), r"normalised already \(bn1 is a BatchNorm2d\)"),
        (lambda: install(nn.Sequential(nn.Linear(3, 3))), "no convolution or linear layer before its classifier"),
        (lambda: install(PlainCNN(), eps=0.0), "eps must be positive"),
        (lambda: install(PlainCNN(), momentum=0.0), "momentum above 0"),
        (lambda: activation_percentiles(PlainCNN(), torch.zeros(1, 1, 8, 8), "conv.0"), "no module 'conv.0'; did you mean 'convs.0'"),
        (lambda: activation_percentiles(PlainCNN(), torch.zeros(1, 1, 8, 8), "convs.0", unit=16), "count channels from 0 to 15"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(Mistake, match=words):
        call()


def test_installed_twice_is_refused():
    model = PlainCNN(layers=(1,), widths=(4,))
    install(model)
    with pytest.raises(Mistake, match="normalised already"):
        install(model)
