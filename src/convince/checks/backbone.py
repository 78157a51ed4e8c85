"""Checks of backbones: timm's interface, gradients, batch independence, sizes, counts, feature maps by name."""

from __future__ import annotations

import torch
from torch import nn

from convince.backbones import builder
from convince.checks import Nothing
from convince.checks.subject import Subject, bits, equal
from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.fit.weights import build_by_name
from convince.models.counting import Counts, count_named
from convince.parts import spell

IN_MEMORY = 20_000_000  # sizes with more parameters than this are built on the meta device and counted
GAP = 0.01  # between our counts and the published ones, where no reason is given


def _table(s: Subject) -> bool:
    return s.card.accepts == ("table",)


def _size(s: Subject) -> tuple[int, ...]:
    return () if _table(s) else (8, 8)


def _input(s: Subject, n: int = 3, channels: int = 2) -> torch.Tensor:
    return torch.randn(n, channels, *_size(s), generator=generator("backbone input"))


def _build(s: Subject, classes: int = 5, channels: int = 2) -> nn.Module:
    return build_by_name(builder(s.spec, num_classes=classes, in_chans=channels, size=_size(s)), 0)


def _interface(net: nn.Module, x: torch.Tensor, k: int, who: str) -> None:
    """timm's interface of a network in eval mode that gives ``k`` scores for ``x``."""
    with torch.no_grad():
        whole, features = net(x), net.forward_features(x)  # type: ignore[operator]
        assert whole.shape == (len(x), k), f"{who}: scores have shape {tuple(whole.shape)}, not {(len(x), k)}"
        torch.testing.assert_close(net.forward_head(features), whole)  # type: ignore[operator]
        before = net.forward_head(features, pre_logits=True)  # type: ignore[operator]
        assert before.shape == (len(x), net.num_features), f"{who}: features have shape {tuple(before.shape)}, num_features is {net.num_features}"
        net.reset_classifier(k + 2)  # type: ignore[operator]
        assert net(x).shape == (len(x), k + 2) and net.num_classes == k + 2, f"{who}: reset_classifier({k + 2}) does not give {k + 2} scores"


def check_interface_is_timms(s: Subject) -> None:
    """``forward`` is head after features; ``num_features`` is the size before the head; the head can be reset."""
    _interface(_build(s).eval(), _input(s), 5, s.part.name)


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
        if p.requires_grad and not any(word in name for word in s.card.idle):
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


def check_double_precision_is_kept(s: Subject) -> None:
    """No dtype is hard-coded: in fp64 the scores are fp64."""
    out = _build(s).double().eval()(_input(s).double())
    assert out.dtype == torch.float64, f"fp64 weights and input give {out.dtype}"


def _sizes(s: Subject) -> dict[str, Counts]:
    """Every named size, counted on the meta device at the input it is published for; kept for the other checks."""
    if "sizes" not in vars(s):
        found = {}
        for name in (s.part.name, *s.card.variants):
            row = s.card.published.get(name, {})
            side = row.get("size", 32 if name in s.card.small else 64)
            try:
                found[name] = count_named(spell(name, {}), num_classes=row.get("classes", 10), size=() if _table(s) else (side, side))
            except Mistake as refusal:
                raise AssertionError(f"the size {name!r} refuses {side} pixels ({refusal}); say in published for which it is made") from refusal
            except Exception as error:
                raise AssertionError(f"the size {name!r} cannot be built on the meta device: {type(error).__name__}: {error}") from error
        vars(s)["sizes"] = found
    return vars(s)["sizes"]


def check_sizes_can_be_built(s: Subject) -> None:
    """Every named size can be built and run on the meta device, so that large ones cost nothing."""
    for name, counts in _sizes(s).items():
        assert counts.parameters > 0, f"the size {name!r} has no parameters"


def check_counts_are_the_published_ones(s: Subject) -> None:
    """Parameters and multiply-adds of a published size are the paper's within 1 %, or the card says why not."""
    if not s.card.published:
        raise Nothing("no counts are published")
    for name, row in s.card.published.items():
        ours, gaps = _sizes(s)[name], {}
        for word, mine in (("parameters", ours.parameters), ("macs", ours.macs)):
            if word in row:
                gaps[word] = mine / row[word] - 1
        worst = max(gaps, key=lambda word: abs(gaps[word]))
        if abs(gaps[worst]) > GAP:
            assert row.get("why"), f"{name}: {worst} are {getattr(ours, worst):,}, published are {row[worst]:,.0f} ({gaps[worst]:+.1%}); say why"
        else:
            assert not row.get("why"), f"{name}: the counts are the published ones, so the reason {row['why']!r} explains nothing"


def check_small_sizes_are_small(s: Subject) -> None:
    """There is a size for pictures of 28 to 64 pixels: at most 100 million multiply-adds at 32, and it takes 28, 32 and 64."""
    if _table(s):
        raise Nothing("made for tables")
    assert s.card.small, "the card names no size for small pictures (small=)"
    for name in s.card.small:
        counts = count_named(name, num_classes=10, size=(32, 32))
        assert counts.macs <= 100e6, f"{name} takes {counts.macs / 1e6:.0f} million multiply-adds at 32 pixels; a small size takes at most 100"
        for side in (28, 64):
            count_named(name, num_classes=10, size=(side, side), in_chans=1)


def _as_small_as_it_takes(s: Subject, name: str) -> tuple[nn.Module, torch.Tensor]:
    """A size with random weights and a batch of two images, with as few pixels as it does not refuse."""
    own = s.card.published.get(name, {}).get("size", 64)
    for side in sorted({*(side for side in (32, 64, 96) if side < own), own}):
        size = () if _table(s) else (side, side)
        net, x = builder(name, num_classes=3, in_chans=3, size=size), torch.randn(2, 3, *size, generator=generator("sizes"))
        try:
            made = net()
            with torch.no_grad():
                made.eval()(x)
            return made, x
        except Mistake as refusal:
            said = refusal
    raise AssertionError(f"the size {name!r} refuses the {own} pixels it is made for: {said}")


def check_sizes_conform(s: Subject) -> None:
    """Every size of at most 20 million parameters, built in memory: timm's interface, and a gradient for every weight."""
    for name, counts in _sizes(s).items():
        if counts.parameters > IN_MEMORY:
            continue
        net, x = _as_small_as_it_takes(s, name)
        net.train()(x).square().sum().backward()
        for weight, p in net.named_parameters():
            if p.requires_grad and not any(word in weight for word in s.card.idle):
                assert p.grad is not None, f"{name}: {weight} got no gradient"
        _interface(net.eval(), x, 3, name)


def check_other_inputs_work_or_are_refused(s: Subject) -> None:
    """Odd sides and other forms than squares give scores, or a Mistake that names the network; never another error."""
    if _table(s):
        raise Nothing("made for tables")
    for size in ((9, 9), (15, 10), (8, 16), (3, 3), (1, 1)):
        try:
            net = builder(s.spec, num_classes=3, in_chans=1, size=size)().eval()
            with torch.no_grad():
                out = net(torch.zeros(2, 1, *size))
            assert out.shape == (2, 3), f"{size[0]}x{size[1]} pixels give shape {tuple(out.shape)}"
        except Mistake as refusal:
            assert s.part.name in str(refusal), f"the refusal of {size[0]}x{size[1]} pixels does not name {s.part.name}: {refusal}"


def check_feature_maps_are_named(s: Subject) -> None:
    """``feature_info`` names modules whose output has the channels it says; an empty list says that there are none."""
    from convince.backbones.maps import feature_maps, info

    net = _build(s).eval()
    assert getattr(net, "feature_info", None) is not None, "feature_info is missing; set it with layers.head.maps()"
    if _table(s) or not info(net):
        raise Nothing("the network has no feature maps")
    names = dict(net.named_modules())
    for row in info(net):
        assert row["module"] in names, f"feature_info names {row['module']!r}, which is no module of the network"
    steps = [row["reduction"] for row in info(net)]
    assert steps == sorted(steps), f"reductions {steps} fall from one map to the next"
    with torch.no_grad():
        found = feature_maps(net, _input(s))
    for row in info(net):
        shape = tuple(found[row["module"]].shape)
        assert shape[:2] == (3, row["num_chs"]), f"{row['module']} gives shape {shape}, feature_info says {row['num_chs']} channels"


def check_timm_can_make_it(s: Subject) -> None:
    """``timm.create_model`` builds every size by its name."""
    if _table(s):
        raise Nothing("timm's networks take images")
    import timm

    for name in (s.part.name, *s.card.variants):
        assert timm.is_model(name.replace("-", "_")), f"timm does not know {name.replace('-', '_')}"
    with torch.device("meta"):
        net = timm.create_model(s.card.small[0].replace("-", "_"), num_classes=3, in_chans=1, img_size=32)
    assert net.num_classes == 3, "timm.create_model(num_classes=3) gives another number"
