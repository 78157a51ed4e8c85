"""Checks of layers: installed in networks of ours and of timm's they work, learn, and are undone without a trace."""

from __future__ import annotations

import copy

import torch
from torch import nn

from convince.backbones import builder
from convince.checks import Nothing
from convince.checks.subject import MODEL, Subject, bits, equal
from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.fit.weights import build_by_name, edit_by_name
from convince.layers.surgery import Surgery

OURS = {MODEL: 8, "conv-stem-vit:dim=16,depth=2,heads=2": 8}
TIMMS = {"timm/test_resnet": 32, "timm/test_vit": 32, "timm/test_convnext": 32, "timm/test_efficientnet": 32, "timm/test_nfnet": 32}


def _hosts(s: Subject) -> dict[str, int]:
    """Networks to put the layer into, and their images' sides in pixels."""
    own = {s.card.host: 8} if s.card.host and not s.card.host.startswith("timm/") else {}
    theirs = {s.card.host: 32} if s.card.host and s.card.host.startswith("timm/") else {}
    return {**OURS, **own, **TIMMS, **theirs}


def _host(name: str, side: int) -> tuple[nn.Module, torch.Tensor]:
    net = build_by_name(builder(name, num_classes=3, in_chans=3, size=(side, side)), 0)
    return net, torch.rand(4, 3, side, side, generator=generator("layer input"))


def _install(s: Subject, net: nn.Module) -> Surgery:
    """The layer put in with weights by name, as a run does it."""
    done: list[Surgery] = []
    edit_by_name(net, lambda model: done.append(s.part.module().install(model, **s.options)), 0)
    assert isinstance(done[-1], Surgery), f"install returns {type(done[-1]).__name__}, not a Surgery"
    return done[-1]


def _hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


def _welcome(s: Subject) -> list[str]:
    """The hosts that take the layer; the others refuse it in a sentence that names it."""
    taken = []
    for name, side in _hosts(s).items():
        net, _ = _host(name, side)
        before = bits(net)
        try:
            _install(s, net)
            taken.append(name)
        except Mistake as refusal:
            assert s.part.name in str(refusal), f"the refusal of {name} does not name {s.part.name}: {refusal}"
            assert not equal(before, bits(net)), f"refused, the layer changed {name}"
    return taken


def check_layer_fits_ours_and_timms(s: Subject) -> None:
    """At least one network of ours and one of timm's take it and give scores of the same shape; the others refuse it in words."""
    taken = _welcome(s)
    assert any(name.startswith("timm/") for name in taken), f"no network of timm's takes it: tried {', '.join(TIMMS)}"
    assert any(not name.startswith("timm/") for name in taken), f"no network of ours takes it: tried {', '.join(OURS)}"
    for name in taken:
        net, x = _host(name, _hosts(s)[name])
        before = sum(p.numel() for p in net.parameters())
        surgery = _install(s, net)
        out = net.eval()(x)
        assert out.shape == (4, 3) and bool(torch.isfinite(out).all()), f"in {name}: scores of shape {tuple(out.shape)}, or not finite"
        grown = sum(p.numel() for p in net.parameters()) - before
        assert surgery.added == grown, f"in {name}: added says {surgery.added} parameters, the network grew by {grown}"
        assert surgery.places, f"in {name}: places names nothing"


def check_layer_is_undone_cleanly(s: Subject) -> None:
    """After ``undo`` names, weights, scores and hooks are as before."""
    for name in _welcome(s):
        net, x = _host(name, _hosts(s)[name])
        net.eval()
        with torch.no_grad():
            before, state, hooks = net(x), bits(net), _hooks(net)
            surgery = s.part.module().install(net, **s.options)
            net(x)
            surgery.undo()
            assert not equal(state, bits(net)), f"in {name}: after undo {equal(state, bits(net))} differs"
            assert _hooks(net) == hooks, f"in {name}: a hook is left behind"
            assert torch.equal(before, net.eval()(x)), f"in {name}: after undo the scores differ"


def check_new_weights_get_gradients(s: Subject) -> None:
    """Every parameter that the layer brings gets a gradient in training mode, in each network that takes it."""
    for name in _welcome(s):
        net, x = _host(name, _hosts(s)[name])
        old = {n for n, _ in net.named_parameters()}
        _install(s, net)
        net.train()(x).square().sum().backward()
        for weight, p in net.named_parameters():
            if weight not in old and p.requires_grad and not any(word in weight for word in s.card.idle):
                assert p.grad is not None, f"in {name}: {weight} got no gradient"


def check_layer_is_copied_with_the_network(s: Subject) -> None:
    """A deep copy of the network gives equal scores by its own weights."""
    name = _welcome(s)[0]
    net, x = _host(name, _hosts(s)[name])
    _install(s, net)
    twin = copy.deepcopy(net).eval()
    with torch.no_grad():
        before = twin(x)
        assert torch.equal(net.eval()(x), before), f"in {name}: a copy gives other scores"
        for p in net.parameters():
            p.zero_()
        assert torch.equal(before, twin(x)), f"in {name}: the copy looks at the weights of the original"


def check_start_is_unchanged(s: Subject) -> None:
    """Where the card says so, a network computes what it did when the layer is put in (to 1e-5, in training mode)."""
    if not s.card.unchanged:
        raise Nothing("the card does not say that the start is unchanged")
    for name in _welcome(s):
        net, x = _host(name, _hosts(s)[name])
        twin = copy.deepcopy(net)
        _install(s, twin)
        torch.manual_seed(0)
        before = net.train()(x)
        torch.manual_seed(0)
        assert torch.allclose(twin.train()(x), before, rtol=1e-5, atol=1e-5), f"in {name}: the scores changed when the layer was put in"
