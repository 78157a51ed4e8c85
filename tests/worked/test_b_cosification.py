"""B-cosification by hand: units, patch norms, the identity at B = 1, counts, completeness, undoing, the loss, runs that start from another, refusals."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from torch import nn

from convince.backbones import builder
from convince.checks import checks_of, run_check
from convince.checks.subject import MODEL, Subject, bits, equal, tiny_images
from convince.errors import Mistake
from convince.explain.b_cos import BCos, BcosConv2d, BcosLinear, UncentredBatchNorm, colours, contributions, dynamic_linear, patch_norms
from convince.explain.b_cosification import BCosification, bcos_loss, bcosify, image_readers, off_labels, pools_before_head
from convince.fit.answer import Answer, Normalise
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.fit.weights import build_by_name
from convince.parts import get


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def network(name=MODEL, channels=3, side=16, classes=4):
    """Random weights, and running statistics and biases that are not those of a fresh network; float64."""
    net = build_by_name(builder(name, num_classes=classes, in_chans=channels, size=(side, side)), 0).double()
    g = gen(7)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(torch.randn(m.num_features, generator=g))
                m.running_var.copy_(0.5 + torch.rand(m.num_features, generator=g))
                m.weight.copy_(0.5 + torch.rand(m.num_features, generator=g))
                m.bias.copy_(torch.randn(m.num_features, generator=g))
            elif isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None:
                m.bias.copy_(torch.randn(m.bias.shape, generator=g))
    return net.eval()


@functools.cache
def subject():
    return Converted(get("b-cos"))


def images(n=3, channels=3, side=16):
    return torch.randn(n, channels, side, side, generator=gen(1), dtype=torch.float64)


def converted(name=MODEL, **how):
    side = 32 if "convnext" in name else 16
    net, x = network(name, side=side), images(side=side)
    with torch.no_grad():
        readers, pooled = image_readers(net, x), pools_before_head(net, x)
    return net, x, bcosify(net, readers, pooled=pooled, **how)


# -- units -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "expected"), [(2.0, 8.9999955), (1.5, 5.19615), (1.0, 3.0)])
def test_a_unit_by_hand(b, expected):
    """w = (3, 4), patch (1, 0): w.x = 3, |x| = 1."""
    linear, conv = nn.Linear(2, 1).double(), nn.Conv2d(2, 1, 1).double()
    with torch.no_grad():
        for layer in (linear, conv):
            layer.weight.copy_(torch.tensor([3.0, 4.0]).view(layer.weight.shape))
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert BcosLinear.of(linear, b)(x).item() == pytest.approx(expected, rel=1e-6)
    assert BcosConv2d.of(conv, b)(x[:, :, None, None]).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("how", [{}, {"groups": 2}, {"groups": 4, "stride": 2}, {"dilation": 2}, {"padding": "same", "dilation": 3}])
def test_patch_norms_are_those_of_the_patches(how):
    """The patch itself, cut by a convolution that copies it."""
    conv = nn.Conv2d(4, 8, 3, **{"padding": 1, **how}).double()
    x = images(2, 4, 7)
    size = 4 // conv.groups * 9
    copies = nn.Conv2d(4, size * conv.groups, 3, **{"padding": 1, **how}, bias=False).double()
    with torch.no_grad():
        copies.weight.copy_(torch.eye(size, dtype=torch.float64).view(size, -1, 3, 3).repeat(conv.groups, 1, 1, 1))
        patches = copies(x).unflatten(1, (conv.groups, size))
    assert torch.allclose(patch_norms(x, conv), (patches.square().sum(2) + 1e-6).sqrt())
    made = BcosConv2d.of(conv, 2.0)
    norms = patch_norms(x, conv).repeat_interleave(8 // conv.groups, 1)
    wx = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert torch.allclose(made(x), wx * wx.abs() / norms)


@quick(max_examples=20, deadline=None)
@given(st.floats(1, 3), st.floats(0.1, 10), st.integers(0, 50))
def test_a_unit_is_homogeneous_and_prefers_what_is_aligned(b, factor, seed):
    linear = BcosLinear.of(nn.Linear(5, 1).double(), b)
    x = torch.randn(1, 5, generator=gen(seed), dtype=torch.float64)
    w = linear.weight.detach()
    with torch.no_grad():
        assert float(linear(factor * x)) == pytest.approx(factor * float(linear(x)), rel=1e-3, abs=1e-6)
        assert float(linear(w / w.norm())) >= float(linear(x / x.norm())) - 1e-6


def test_the_norm_divides_and_does_not_centre():
    norm = nn.BatchNorm2d(3, momentum=0.3).double()
    made = UncentredBatchNorm.of(norm)
    x = images(4) * 2 + 1
    var = x.var((0, 2, 3), correction=0)
    assert torch.allclose(made.train()(x), x / (var + norm.eps).sqrt().view(-1, 1, 1))
    assert torch.allclose(made.running_var, 0.7 + 0.3 * x.var((0, 2, 3)))
    norm.train()(x)
    assert torch.allclose(made.running_var, norm.running_var)
    assert torch.allclose(made.eval()(x), x / (made.running_var + norm.eps).sqrt().view(-1, 1, 1))


# -- the conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL, "resnet10", "timm/test_resnet", "timm/test_efficientnet", "small-cnn"])
def test_the_conversion_begins_where_the_network_was(name):
    """B = 1, biases and max-pools kept: the scores are as before, less log(C - 1)."""
    net, x = network(name), images()
    with torch.no_grad():
        before = net(x)
        readers, pooled = image_readers(net, x), pools_before_head(net, x)
        surgery = bcosify(net, readers, b=1.0, biases=True, max_pools=True, pooled=pooled)
        assert torch.allclose(net(x), before - math.log(3), rtol=1e-4, atol=1e-4)
        surgery.undo()
        assert torch.equal(net(x), before)


def test_undoing_leaves_no_trace():
    net, x = network("timm/test_resnet"), images()
    before, twin = bits(net), copy.deepcopy(net)
    surgery = bcosify(net, ["conv1.0"] if isinstance(net.conv1, nn.Sequential) else ["conv1"], pooled=True)
    grown = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in twin.parameters())
    assert surgery.added == grown < 0
    surgery.undo()
    assert not equal(before, bits(net))
    assert "forward_head" not in vars(net)
    assert torch.equal(net(x), twin(x))


@pytest.mark.parametrize(("name", "before", "after"), [("resnet18", 11_689_512, 11_693_120), ("resnet50", 25_557_032, 25_538_880)])
def test_parameter_counts(name, before, after):
    import timm

    with torch.device("meta"):
        net = timm.create_model(name)
    assert sum(p.numel() for p in net.parameters()) == before
    bcosify(net, ["conv1"], pooled=True)
    assert sum(p.numel() for p in net.parameters()) == after


def test_max_pools_become_mean_pools_and_biases_go():
    net, _, _ = converted("resnet10")
    assert isinstance(net.maxpool, nn.AvgPool2d)
    assert (net.maxpool.kernel_size, net.maxpool.stride, net.maxpool.padding) == (3, 2, 1)
    assert not [n for n, _ in net.named_parameters() if n.endswith("bias")]
    assert net.conv1.weight.shape[1] == 6
    assert torch.equal(net.conv1.weight[:, :3], -net.conv1.weight[:, 3:])
    assert {n for n, _ in network("resnet10").named_parameters() if not n.endswith("bias")} == {n for n, _ in net.named_parameters()}


def test_the_head_scores_every_place():
    net, x, _ = converted()
    features = net.forward_features(x)
    places = torch.stack([net.fc(features[:, :, i, j]) for i in range(features.shape[2]) for j in range(features.shape[3])])
    assert torch.allclose(net(x), places.mean(0))
    assert net.forward_head(features, pre_logits=True).shape == (3, net.num_features)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        net.fc.weight.zero_()
    assert twin(x).std().item() > 0  # the copy asks its own head
    assert torch.allclose(net(x), torch.full_like(net(x), -math.log(3)))


# -- the explanation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL, "resnet10", "small-cnn", "timm/test_resnet", "timm/test_efficientnet", "timm/test_convnext"])
@pytest.mark.parametrize("b", [1.0, 2.0, 2.5])
def test_contributions_add_up_to_the_score(name, b):
    net, x, _ = converted(name, b=b)
    target = torch.tensor([0, 1, 2])
    found = contributions(net, x, target)
    with torch.no_grad():
        scores = net(x).gather(1, target[:, None])[:, 0]
    assert torch.allclose(found.score, scores, rtol=1e-9)
    assert found.without.tolist() == pytest.approx([-math.log(3)] * 3)
    assert torch.allclose(found.map.sum((1, 2, 3)) + found.without, scores, rtol=1e-6, atol=1e-9)
    encoded = torch.cat([x, -x], 1)
    assert torch.allclose((found.weights * encoded).sum(1, keepdim=True), found.map)


def test_the_matrix_of_one_layer_by_hand():
    """One 1x1 convolution and a mean: W(x) of a pixel is s w / (h w), s its own alignment."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 2, 1).double(), nn.Identity()

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            return self.conv(x).mean((2, 3))

    one = One()
    w = one.conv.weight.detach()[:, :, 0, 0].clone()
    bcosify(one, ["conv"])
    x = images(1, 1, 2)
    found = contributions(one, x, torch.tensor([1]))
    norm = (2 * x.square() + 1e-6).sqrt()
    scale = (w[1] * x).abs() / norm
    assert torch.allclose(found.map, scale * w[1] * x / 4)
    assert torch.allclose(found.weights, torch.cat([scale * w[1] / 2, -scale * w[1] / 2], 1) / 4)


def test_values_are_the_same_in_explanation_mode_and_it_ends():
    net, x, _ = converted("timm/test_convnext")
    before = net(x)
    with dynamic_linear(net):
        assert torch.allclose(net(x), before)
    with pytest.raises(RuntimeError), dynamic_linear(net):
        raise RuntimeError
    assert not any(getattr(m, "steady", False) for m in net.modules())


def test_colours_by_hand():
    """A pixel that asks for red in full, one that asks for the opposite, one that speaks against."""
    weights = torch.zeros(1, 6, 1, 3)
    weights[0, 0, 0, 0], weights[0, 3, 0, 1], weights[0, 0, 0, 2] = 2.0, 2.0, 5.0
    picture = colours(weights, torch.tensor([[[[1.0, 1.0, -1.0]]]]), smooth=1)
    assert picture[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0], abs=1e-5)
    assert picture[0, :, 0, 1].tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert picture[0, :, 0, 2].tolist() == [1, 1, 1]


def test_reduced_precision_does_not_touch_the_sum():
    net, x, _ = converted()
    answer = Answer(Normalise((0.5,) * 3, (0.25,) * 3), net).float().eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = BCos()(answer, x.float().sigmoid())
    assert found.map.dtype == torch.float32
    assert found.images["colours"].shape == x.shape
    assert found.table["score without pixels"] == pytest.approx(-math.log(3))


# -- the fine-tuning ---------------------------------------------------------------------------------


def test_the_loss_by_hand():
    y = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    assert off_labels(y)[0].tolist() == pytest.approx([0.2, 0.2, 0.2, 1.0, 0.2])
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.0]])
    terms = [-(t * math.log(p) + (1 - t) * math.log(1 - p)) for t, p in zip([0.2, 0.2, 0.2, 1.0, 0.2], logits.sigmoid()[0].tolist(), strict=True)]
    assert float(bcos_loss(logits, y)[0]) == pytest.approx(sum(terms) / 5, rel=1e-5)
    assert float(bcos_loss(logits, torch.zeros_like(y))[0]) == 0
    bias = torch.full((1, 5), -math.log(4))  # where a network says nothing, every score has the probability 1/C
    assert bias.sigmoid()[0].tolist() == pytest.approx([0.2] * 5)


def run_with(*parts, **changes):
    how = {"model": MODEL, "batch": 8, "epochs": 1, "lr": 0.01, "precision": "fp32", "augment": "none", "kernels": {}}
    return prepare(settings(**{**how, "parts": parts, **changes}), tiny_images())


def test_a_run_starts_from_another_is_explained_and_read_back(tmp_path):
    base = run_with()
    fit(base)
    folder = tmp_path / "base"
    folder.mkdir()
    write_config(folder, base.settings)
    write_model(folder, base)
    run = run_with("b-cosification", start=str(folder), epochs=0)
    fit(run)
    w = base.model.conv1.weight
    assert torch.equal(run.model.conv1.weight, torch.cat([w, -w], 1) / 2)
    assert torch.equal(run.model.fc.weight, base.model.fc.weight)
    assert torch.equal(run.model.bn1.running_var, base.model.bn1.running_var)
    run = run_with("b-cosification", start=str(folder))
    fit(run)
    assert not torch.equal(run.model.conv1.weight, torch.cat([w, -w], 1) / 2)
    assert isinstance(run.optimizer or torch.optim.Adam([w]), torch.optim.Adam)
    other = tmp_path / "b-cos"
    other.mkdir()
    write_config(other, run.settings)
    write_model(other, run)
    loaded = open_run(other)
    x = run.plan.pixels(run.data.x.take(torch.arange(4)))
    with torch.no_grad():
        scores = loaded.answer(x)
        assert torch.equal(scores, run.answer.eval()(x))
    found = BCos()(loaded.answer, x)
    total = found.map.sum((1, 2, 3)) + found.table["score without pixels"]
    assert torch.allclose(total, scores.amax(1), rtol=1e-4, atol=1e-4)


class Converted(Subject):
    """The explainer's own checks, on answers that it explains."""

    def answer(self):
        return self._converted

    @functools.cached_property
    def _converted(self):
        return self.fitted("b-cosification", epochs=12).answer.eval()

    def linear(self):
        return self.fitted("b-cosification", epochs=0, seed=1).answer.eval()


@pytest.mark.parametrize("check", checks_of("explainer"))
def test_the_explainer_conforms_on_answers_that_it_explains(check):
    outcome = run_check(subject(), check)
    assert outcome.outcome in ("passed", "skipped"), outcome.reason


# -- refusals ----------------------------------------------------------------------------------------


def test_what_cannot_be_explained_is_refused():
    with pytest.raises(Mistake, match=r"b-cos: ResNet has no B-cos layers .* --with b-cosification"):
        BCos()(network(), images())
    net, x, _ = converted(biases=True)
    with pytest.raises(Mistake, match="something else adds to it"):
        BCos()(net, x)
    with pytest.raises(Mistake, match="b-cos explains images"):
        BCos()(nn.Linear(3, 2), torch.randn(2, 3))


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(Mistake, match="position embeddings, class tokens"):
        fit(run_with("b-cosification", model="conv-stem-vit:dim=16,depth=1,heads=2"))
    net, _, _ = converted()
    with pytest.raises(Mistake, match="has B-cos layers already"):
        bcosify(net, ["conv1"])
    with pytest.raises(Mistake, match="read by no layer as it is"):
        bcosify(network(), [])
    with pytest.raises(Mistake, match="ScaledStdConv2d"):
        bcosify(network("timm/test_nfnet", side=32), ["stem.conv1"])
    for bad in ("b=0.5", "lr=0.0", "clip=-1.0"):
        with pytest.raises(Mistake, match=f"b-cosification: .*{bad.split('=')[0]}="):
            run_with(f"b-cosification:{bad}")
    assert BCosification() == BCosification(2.0, 1e-4, 0.01)
