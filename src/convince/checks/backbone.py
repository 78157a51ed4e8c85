"""Checks of backbones: timm's interface, gradients, batch independence, variants on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from convince.backbones import builder
from convince.checks.subject import Subject, bits, equal
from convince.fit.randomness import generator
from convince.fit.weights import build_by_name
from convince.parts import spell


def _size(s: Subject) -> tuple[int, ...]:
    return () if s.card.accepts == ("table",) else (8, 8)


def _input(s: Subject, n: int = 3, channels: int = 2) -> torch.Tensor:
    return torch.randn(n, channels, *_size(s), generator=generator("backbone input"))


def _build(s: Subject, classes: int = 5, channels: int = 2) -> nn.Module:
    return build_by_name(builder(s.spec, num_classes=classes, in_chans=channels, size=_size(s)), 0)


def check_interface_is_timms(s: Subject) -> None:
    """``forward`` is head after features; ``num_features`` is the size before the head; the head can be reset."""
    net = _build(s).eval()
    x = _input(s)
    with torch.no_grad():
        whole, features = net(x), net.forward_features(x)  # type: ignore[operator]
        assert whole.shape == (3, 5), f"scores have shape {tuple(whole.shape)}, not (3, 5)"
        torch.testing.assert_close(net.forward_head(features), whole)  # type: ignore[operator]
        before = net.forward_head(features, pre_logits=True)  # type: ignore[operator]
        assert before.shape == (3, net.num_features), f"features have shape {tuple(before.shape)}, num_features is {net.num_features}"
        net.reset_classifier(7)  # type: ignore[operator]
        assert net(x).shape == (3, 7) and net.num_classes == 7, "reset_classifier(7) does not give 7 scores"


def check_channels_are_an_argument(s: Subject) -> None:
    """The network takes one and four channels."""
    for channels in (1, 4):
        out = _build(s, channels=channels).eval()(_input(s, channels=channels))
        assert out.shape == (3, 5), f"{channels} channels give shape {tuple(out.shape)}"


def check_every_weight_gets_a_gradient(s: Subject) -> None:
    """After one backward pass in training mode no parameter is without a finite gradient."""
    net = _build(s).train()
    net(_input(s, n=6)).square().sum().backward()
    for name, p in net.named_parameters():
        if not any(word in name for word in s.card.idle):
            assert p.grad is not None, f"{name} got no gradient"
            assert bool(torch.isfinite(p.grad).all()), f"the gradient of {name} is not finite"


def check_rows_do_not_mix_in_eval(s: Subject) -> None:
    """In eval mode a row's scores do not depend on its neighbours, and repeat."""
    net, x = _build(s).eval(), _input(s)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-5)
        assert torch.equal(net(x), net(x)), "two passes in eval mode differ"


def check_weights_go_by_name(s: Subject) -> None:
    """One seed gives equal weights, another seed others."""
    a, b = bits(_build(s)), bits(_build(s))
    assert not equal(a, b), f"one seed gives two different networks: {equal(a, b)}"
    other = build_by_name(builder(s.spec, num_classes=5, in_chans=2, size=_size(s)), 1)
    assert equal(a, bits(other)), "another seed gives the same weights"


def check_variants_can_be_built(s: Subject) -> None:
    """Every named size can be built (on the meta device, so that large ones cost nothing)."""
    with torch.device("meta"):
        for name, options in {s.part.name: {}, **s.card.variants}.items():
            size = (64, 64) if _size(s) else ()
            try:
                net = builder(spell(name, {}), num_classes=10, in_chans=3, size=size)()
            except Exception as error:
                raise AssertionError(f"the variant {name!r} with {options} cannot be built: {error}") from error
            assert sum(p.numel() for p in net.parameters()) > 0, f"the variant {name!r} has no parameters"
