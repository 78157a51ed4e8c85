"""Many images: explained in batches, in the processor's fast number format where the map survives it, with progress."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from convince.explain.passes import scores
from convince.fit.precision import Plan
from convince.kinds import Explainer, as_found
from convince.types import Explanation

AGREE = 0.99  # rank correlation with the fp32 map below which the fast format is not used
TRIED = 3  # images, at most, on which that is found out; one where there are few, since each costs two explanations
FEW = 8  # images; fewer are explained in full precision at once

Progress = Callable[[int, int], None]  # images done, of


def explain_all(
    explainer: Explainer,
    answer: nn.Module,
    x: Float[Tensor, "n ..."],
    target: Int[Tensor, " n"] | int | None = None,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """What ``explainer(answer, x, target)`` gives, ``explainer.rows`` images at a time.

    Under a ``plan`` in bf16, and with at least 8 images, a copy of the answer (batch norms folded into the convolutions before them) is
    explained in bf16 if the maps of the first one to three images have a rank correlation of at least 0.99 with those in full precision. The
    table says which ("precision") and how well they agreed ("agreement"), and which classes were explained; its other entries are those of the first batch.
    """
    if target is None:
        with as_found(answer), torch.no_grad():
            target = scores(answer, x).argmax(1)
    target = torch.as_tensor(target, device=x.device).expand(len(x))
    said: dict[str, Any] = {"precision": "fp64" if x.dtype == torch.float64 else "fp32"}
    used, context = answer, None
    if plan is not None and plan.precision == "bf16" and explainer.fast and x.dim() == 4 and len(x) >= FEW:
        with as_found(answer):
            fast = folded(answer, x[:1])
        first = slice(0, max(1, min(TRIED, len(x) // FEW)))
        exact = explainer(answer, x[first], target[first]).map
        if exact is not None:
            with plan.autocast():
                quick = explainer(fast, x[first], target[first]).map
            assert quick is not None
            said["agreement"] = min(rank_correlation(exact, quick).tolist())
            if said["agreement"] >= AGREE:
                used, context, said["precision"] = fast, plan, "bf16"
    found = []
    for rows in torch.arange(len(x)).split(explainer.rows):
        if context is None:
            found.append(explainer(used, x[rows], target[rows]))
        else:
            with context.autocast():
                found.append(explainer(used, x[rows], target[rows]))
        if progress is not None:
            progress(int(rows[-1]) + 1, len(x))
    return joined(found, said)


def joined(found: list[Explanation], said: dict[str, Any]) -> Explanation:
    """Batches after one another: maps and images by row; the table of the first, and what is said of all."""
    maps = [f.map for f in found if f.map is not None]
    images = {name: torch.cat([f.images[name] for f in found]) for name in found[0].images}
    return Explanation(torch.cat(maps) if len(maps) == len(found) else None, images, {**found[0].table, **said})


def folded(answer: nn.Module, x: Float[Tensor, "1 c h w"]) -> nn.Module:
    """A copy of an answer in eval mode, in which each batch norm that follows a convolution at once is folded into it.

    Found in one pass; a convolution whose output something else reads too would give other scores, and then the plain copy is returned.
    """
    pairs: dict[str, str] = {}
    made: dict[int, tuple[str, Tensor]] = {}
    handles = []
    for name, module in answer.named_modules():
        if type(module) is nn.Conv2d and not module._forward_hooks and not module._forward_pre_hooks:
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: made.update({id(out): (name, out)})))
        elif type(module) is nn.BatchNorm2d and module.track_running_stats and not module._forward_hooks:

            def follows(module: nn.Module, args: Any, name: str = name) -> None:
                if id(args[0]) in made:
                    pairs[made[id(args[0])][0]] = name

            handles.append(module.register_forward_pre_hook(follows))
    try:
        with torch.no_grad():
            before = answer(x)
    finally:
        for handle in handles:
            handle.remove()
    plain, fast = copy.deepcopy(answer), copy.deepcopy(answer)
    if len(set(pairs.values())) < len(pairs):
        return plain  # one batch norm after several convolutions
    for conv_name, bn_name in pairs.items():
        conv, bn = fast.get_submodule(conv_name), fast.get_submodule(bn_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, nn.BatchNorm2d)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        parent, _, last = bn_name.rpartition(".")
        setattr(fast.get_submodule(parent), last, nn.Identity())
    for p in fast.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        after = fast(x)
    return fast if torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())) else plain


def rank_correlation(a: Float[Tensor, "n ..."], b: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """Spearman's rank correlation of each row's values, ties by their mean rank; 1 for two constant rows, 0 where one alone is constant."""
    from scipy.stats import rankdata

    def centred(x: Tensor) -> Tensor:
        ranks = torch.from_numpy(rankdata(x.detach().flatten(1).double().cpu().numpy(), axis=1))
        return ranks - ranks.mean(1, keepdim=True)

    u, v = centred(a), centred(b)
    lengths = u.norm(dim=1) * v.norm(dim=1)
    both = (u.norm(dim=1) + v.norm(dim=1) == 0).double()
    return torch.where(lengths > 0, (u * v).sum(1) / lengths.clamp_min(1e-300), both)
