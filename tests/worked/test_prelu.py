"""PReLU by hand: the worked value and gradient, torch's layer, slopes counted, what is replaced, and weight decay."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.backbones.plain_cnn import PlainCNN
from convince.backbones.resnet import ResNet
from convince.checks.subject import Subject
from convince.errors import Mistake
from convince.fit.loop import plain_sgd, start
from convince.layers.he_init import plain_net
from convince.layers.prelu import install, prelu
from convince.parts import get


def small(**options):
    return ResNet(num_classes=4, in_chans=1, **{"layers": (1, 1), "widths": (4, 8), **options})


@pytest.mark.parametrize(("x", "y", "slope"), [(-2.0, -0.5, -2.0), (3.0, 3.0, 0.0)])
def test_worked_value_and_gradient(x, y, slope):
    """With a = 0.25: f(-2) = -0.5 and df/da = -2; f(3) = 3 and df/da = 0."""
    a = torch.tensor([0.25], requires_grad=True)
    out = prelu(torch.tensor([[x]]), a)
    out.sum().backward()
    assert (out.item(), a.grad.item()) == (y, slope)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([(), (3,), (2, 3)]), st.booleans())
def test_parity_with_torch(n, c, space, channelwise):
    x = torch.randn(n, c, *space, generator=torch.Generator().manual_seed(n + c))
    layer = nn.PReLU(c if channelwise else 1)
    with torch.no_grad():
        layer.weight.uniform_(-0.5, 1)
    torch.testing.assert_close(prelu(x, layer.weight), layer(x))


@given(st.floats(-5, 5))
def test_slope_0_is_relu_and_slope_1_the_identity(value):
    x = torch.tensor([[value]])
    assert torch.equal(prelu(x, torch.zeros(1)), x.relu())
    assert torch.equal(prelu(x, torch.ones(1)), x)


def test_slopes_are_counted_by_channels_or_layers():
    model = small()
    state = set(model.state_dict())
    done = install(model)
    assert done.places == ["relu", "layer1.0.act1", "layer1.0.act2", "layer2.0.act1", "layer2.0.act2"]
    assert done.added == 4 + 4 + 4 + 8 + 8
    assert state <= set(model.state_dict())
    assert all(float(m.weight.detach().mean()) == 0.25 for m in model.modules() if isinstance(m, nn.PReLU))
    assert install(small(), channelwise=False).added == 5
    fourteen = plain_net(depth=13, width=4)
    assert install(fourteen, channelwise=False).added == 13  # the paper's 14-layer net has 13 rectifiers
    assert install(plain_net(depth=13, width=4)).added == 13 * 4


def test_block_by_hand():
    model = small().eval()
    install(model, init=0.1)
    block, x = model.layer2[0], torch.randn(2, 4, 6, 6)
    y = block.bn2(block.conv2(prelu(block.bn1(block.conv1(x)), torch.full((8,), 0.1))))
    torch.testing.assert_close(block(x), prelu(y + block.downsample(x), torch.full((8,), 0.1)))


def test_seeing_the_channels_changes_nothing():
    model = small().train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    install(model, init=0.0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    twin = small()
    twin.load_state_dict(before)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model(x), twin(x))  # slopes 0: the network as it was


@pytest.mark.parametrize(("name", "added"), [("vgg11_bn", 64 + 128 + 2 * 256 + 4 * 512 + 2 * 4096), ("resnet50", 22_720), ("regnety_002", None)])
def test_timm_networks(name, added):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
        done = install(model)
    assert added is None or done.added == added
    assert not any(type(m) is nn.ReLU for m in model.modules())


def test_tables_and_odd_networks():
    table = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    assert install(table).added == 7
    fixed = builder("cnn-agarap", num_classes=3, in_chans=1, size=(28, 28))()
    assert install(fixed).added > 0
    tokens = nn.Sequential(nn.Linear(5, 7), nn.Unflatten(1, (7, 1)), nn.ReLU())
    with pytest.raises(Mistake, match=r"reads inputs of \(axes, channels\) \(3, 7\)"):
        install(tokens)
    assert install(tokens, channelwise=False).added == 1


def test_a_shared_rectifier_has_one_slope_where_its_widths_agree():
    with torch.device("meta"):
        assert install(torchvision.models.resnet18()).added == 64 + 2 * (64 + 128 + 256 + 512)
        with pytest.raises(Mistake, match=r"layer1.0.relu of ResNet reads inputs of .*\(4, 64\), \(4, 256\)"):
            install(torchvision.models.resnet50())
        assert install(torchvision.models.resnet50(), channelwise=False).added == 17


def test_the_runs_sgd_does_not_decay_slopes():
    run = Subject(get("prelu")).run("prelu")
    start(run)
    optimizer = plain_sgd(run, list(run.model.named_parameters()))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    slopes = [m.weight for m in run.model.modules() if isinstance(m, nn.PReLU)]
    assert len(slopes) == 5
    assert all(decay[id(a)] == 0 for a in slopes)
    assert decay[id(run.model.conv1.weight)] > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: install(PlainCNN()), "prelu: PlainCNN has no nn.ReLU module"),
        (lambda: install(small(), skip=("*",)), "no nn.ReLU module"),
        (lambda: install(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(999, 2))), "takes no square image .* channelwise=false"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(Mistake, match=words):
        call()


def test_a_rectifier_that_never_runs_is_named():
    model = small()
    model.idle = nn.ReLU()
    with pytest.raises(Mistake, match="prelu: idle of ResNet is not used"):
        install(model)
    assert len(install(model, skip=("idle",)).places) == 5
