"""ECA and SE by hand: the kernel rule, the worked gates, exact added counts, and what an edit must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.backbones.resnet import ResNet
from convince.backbones.small_cnn import SmallCNN
from convince.errors import Mistake
from convince.layers import eca, se

GEN = torch.Generator


def small(**options):
    return ResNet(num_classes=4, in_chans=1, **{"layers": (1, 1), "widths": (4, 8), **options})


@pytest.mark.parametrize(("channels", "k"), [(16, 3), (32, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)])
def test_adaptive_kernel(channels, k):
    assert eca.kernel_size(channels) == k


@settings(deadline=None)
@given(st.integers(1, 4096))
def test_kernel_is_odd_and_grows(channels):
    k = eca.kernel_size(channels)
    assert k % 2 == 1
    assert 3 <= k <= eca.kernel_size(channels + 1)


def test_worked_gates():
    got = eca.gates(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.5, 1, -0.5]))
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.73105858, 0.88079708, 0.99592986]]))


def test_module_is_the_function():
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    layer = eca.Eca(6, k=5).double()
    torch.testing.assert_close(layer(x), eca.eca(x, layer.conv.weight.flatten()))


@pytest.mark.parametrize("channels", [16, 64, 256])
def test_parity_with_timm(channels):
    from timm.layers import EcaModule

    theirs, mine = EcaModule(channels), eca.Eca(channels)
    mine.conv.load_state_dict(theirs.conv.state_dict())
    x = torch.randn(3, channels, 4, 4)
    torch.testing.assert_close(mine(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "released"), [("resnet18", 44), ("resnet34", 72), ("resnet50", 80), ("resnet101", 157), ("resnet152", 234), ("mobilenet_v2", 31)]
)
def test_added_parameters_of_the_released_nets(name, released):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
        before = dict(model.named_parameters())
        assert eca.install(model, k=eca.RELEASED[name]).added == released
    after = dict(model.named_parameters())
    assert before.keys() <= after.keys()
    assert sum(p.numel() for p in after.values()) - sum(p.numel() for p in before.values()) == released


def test_adaptive_resnet50_and_se50():
    with torch.device("meta"):
        assert eca.install(torchvision.models.resnet50()).added == 86
        model = torchvision.models.resnet50()
        assert sum(p.numel() for p in model.parameters()) == 25_557_032
        assert se.install(model).added == 2_530_992
        assert sum(p.numel() for p in model.parameters()) == 28_088_024


def test_counts_of_the_claim():
    with torch.device("meta"):
        assert eca.install(ResNet(layers=(1, 1, 1))).added == 9
        assert se.install(ResNet(layers=(1, 1, 1)), r=4).added == 148 + 552 + 2128


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2_050", "regnetx_002"])
def test_timm_nets_are_found(name):
    import timm

    with torch.device("meta"):
        ends = eca.residual_ends(timm.create_model(name))
    blocks = {"resnet18": 8, "resnet50": 16, "mobilenetv2_050": 17, "regnetx_002": 13}
    assert len(ends) == blocks[name]
    assert not any("downsample" in end.name for end in ends)


@pytest.mark.parametrize(("form", "weights"), [("none", 0), ("diagonal", 8), ("full", 64), ("grouped", 32), ("bottleneck", 8 * 4 * 2 + 4 + 8)])
def test_se_forms(form, weights):
    layer = se.Se(8, r=2, form=form)
    assert sum(p.numel() for p in layer.parameters()) == weights
    x = torch.randn(2, 8, 3, 3)
    assert layer(x).shape == x.shape
    if form == "none":
        torch.testing.assert_close(layer(x), x * x.mean((2, 3), keepdim=True).sigmoid())


@pytest.mark.parametrize("layer", [eca, se])
def test_edit_gates_before_the_addition(layer):
    """The block with a gate equals relu(gate(bn2) + shortcut), written out by hand."""
    model = small().eval()
    layer.install(model)
    block = model.layer2[0]
    x = torch.randn(2, 4, 6, 6)
    bare = copy.deepcopy(block)
    gate = getattr(bare.bn2, layer.CARD.part)
    bare.bn2._forward_hooks.clear()
    y = gate(bare.bn2(bare.conv2(torch.relu(bare.bn1(bare.conv1(x))))))
    torch.testing.assert_close(block(x), torch.relu(y + bare.downsample(x)))


@pytest.mark.parametrize("layer", [eca, se])
def test_copies_states_and_old_weights(layer):
    model = small().eval()
    x = torch.randn(2, 1, 8, 8)
    old = {name: p.clone() for name, p in model.state_dict().items()}
    before = model(x)
    layer.install(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in old.items())
    assert not torch.equal(model(x), before)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if f".{layer.CARD.part}." in name:
                p.add_(1.0)  # the copy's hook must lead to the copy's gate
    assert not torch.equal(twin(x), model(x))
    other = small().eval()
    layer.install(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_export_traces_the_gates():
    model = small().eval()
    eca.install(model)
    x = torch.randn(2, 1, 8, 8)
    exported = torch.export.export(model, (x,))
    assert sum(node.target is torch.ops.aten.conv1d.default for node in exported.graph.nodes) == 2
    torch.testing.assert_close(exported.module()(x), model(x))


def test_every_gate_gets_a_gradient_in_float64():
    model = small().double()
    eca.install(model)
    assert next(model.layer1[0].bn2.eca.parameters()).dtype == torch.float64
    model(torch.randn(3, 1, 8, 8, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "eca" in name)
    layer = eca.Eca(5, k=3).double()
    assert torch.autograd.gradcheck(layer, torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 3, 5, 7]), st.integers(1, 9))
def test_gates_lie_between_0_and_1_and_images_stay_apart(n, k, c):
    x = torch.randn(n, c, 2, 3, generator=GEN().manual_seed(n * 100 + k * 10 + c))
    layer = eca.Eca(c, k=k)
    g = layer.gates(x)
    assert g.shape == (n, c)
    assert bool(((g > 0) & (g < 1)).all())
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


def test_k1_has_no_interaction_and_k3_has():
    x = torch.randn(1, 8, 2, 2)
    changed = x.clone()
    changed[:, 3] += 1
    for k, reach in ((1, {3}), (3, {2, 3, 4})):
        layer = eca.Eca(8, k=k)
        moved = (layer.gates(changed) - layer.gates(x)).abs()[0] > 1e-6
        assert set(moved.nonzero()[:, 0].tolist()) <= reach
        assert bool(moved[3])


def test_attention_stats_are_class_means():
    model = small().eval()
    eca.install(model)
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 0, 1, 1, 1, 3])
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    stats = eca.attention_stats(model, [(x[:4], y[:4]), (x[4:], y[4:])], k=4)
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    assert list(stats) == ["layer1.0.bn2.eca", "layer2.0.bn2.eca"]
    alone = eca.attention_stats(model, [(x[:2], torch.zeros(2, dtype=torch.int64))], k=1)
    torch.testing.assert_close(stats["layer2.0.bn2.eca"][0], alone["layer2.0.bn2.eca"][0])
    assert stats["layer1.0.bn2.eca"][2].isnan().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: eca.install(SmallCNN()), "no residual blocks"),
        (lambda: se.install(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))), "no residual blocks"),
        (lambda: eca.Eca(8, k=2), "odd"),
        (lambda: eca.Eca(8, k="wide"), "odd"),
        (lambda: eca.install(small(), k=(3, 3, 3)), "names 3 stages, and ResNet has 2"),
        (lambda: se.Se(8, r=0), "r=0"),
        (lambda: se.Se(9, r=2, form="grouped"), "divides 9"),
        (lambda: se.Se(8, form="deep"), "form='deep'"),
        (lambda: eca.attention_stats(SmallCNN(), [], 2), "no eca layer"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(Mistake, match=words):
        call()


def test_a_refused_edit_changes_nothing():
    model = small()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(Mistake, match="odd"):
        eca.install(model, k=(3, 4))
    assert [name for name, _ in model.named_modules()] == names
    eca.install(model)
    with pytest.raises(Mistake, match="already"):
        eca.install(model)


def test_preactivation_blocks_are_not_taken():
    block = nn.Module()
    block.norm, block.conv, block.downsample = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Identity()
    assert eca.residual_ends(nn.Sequential(block)) == []


def test_run_reload_and_resume(tmp_path):
    """A short fit on digits, interrupted at a step: equal bits; the stored run answers equally."""
    from convince.data import load
    from convince.fit import folder as disk
    from convince.fit.loop import fit
    from convince.fit.settings import settings as make
    from convince.fit.train import prepare, resolve

    data = load("digits", seed=0)
    data = data.subset(data.split.train[:48])
    wanted = make(
        model="resnet:layers=(1,1),widths=(4,8)", parts=("eca:k=(1,3)", "flip-crop:flip=0.0"), augment="none", epochs=2, batch=16, lr=0.1, precision="fp32"
    )
    wanted, _ = resolve(wanted.updated(checkpoint_seconds=0), data)

    whole = prepare(wanted, data)
    fit(whole)
    broken = prepare(wanted, data)
    checkpoint = tmp_path / "checkpoint.safetensors"

    class Stop(Exception):
        pass

    def stop(done, total, line):
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        fit(broken, checkpoint, stop)
    again = prepare(wanted, data)
    fit(again, checkpoint)
    a, b = whole.model.state_dict(), again.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert a["layer1.0.bn2.eca.conv.weight"].numel() == 1
    disk.write_config(tmp_path, wanted)
    disk.write_model(tmp_path, whole)
    x = data.x.take(data.split.test[:16])
    answer = whole.answer.eval()
    torch.testing.assert_close(disk.open_run(tmp_path).logits(x), answer(x.float() / 255).detach(), rtol=0, atol=0)
