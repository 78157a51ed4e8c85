"""State on disk: one atomic, exact checkpoint file; optimiser state by name; edits that change shapes.

A checkpoint is a single safetensors file: tensors by path, everything else as JSON in its header.
It is written to a temporary name, flushed and renamed, so a kill at any moment leaves the old one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from convince.errors import Mistake

if TYPE_CHECKING:
    from convince.fit.run import Run

FORMAT = 1  # of checkpoints and runs; a newer one is refused


def flatten(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move tensors of a nested structure into ``tensors`` by path; what is left is JSON."""
    match tree:
        case Tensor():
            tensors[path] = tree
            return {"$tensor": path}
        case torch.dtype():
            return {"$dtype": str(tree).removeprefix("torch.")}
        case dict():
            if all(isinstance(k, str) and not k.startswith("$") for k in tree):
                return {k: flatten(v, f"{path}/{k}", tensors) for k, v in tree.items()}
            return {"$items": [[k, flatten(v, f"{path}/{k}", tensors)] for k, v in tree.items()]}
        case tuple():
            return {"$tuple": [flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(tree)]}
        case list():
            return [flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(tree)]
        case None | bool() | int() | float() | str():
            return tree
    raise TypeError(f"{path}: state may hold tensors, numbers, strings, lists, tuples and dicts, not {type(tree).__name__}")


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`flatten`."""
    match tree:
        case {"$tensor": path}:
            return tensors[path]
        case {"$dtype": name}:
            return getattr(torch, name)
        case {"$items": items}:
            return {k: unflatten(v, tensors) for k, v in items}
        case {"$tuple": items}:
            return tuple(unflatten(v, tensors) for v in items)
        case dict():
            return {k: unflatten(v, tensors) for k, v in tree.items()}
        case list():
            return [unflatten(v, tensors) for v in tree]
    return tree


def write_tree(path: Path, tree: Any) -> None:
    """Write a nested structure to one safetensors file, atomically. A full disk keeps the old file."""
    tensors: dict[str, Tensor] = {}
    skeleton = flatten(tree, "", tensors)
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in seen and tensor.numel() else tensor
        seen.add(address)
    write_atomic(path, save(tensors, metadata={"tree": json.dumps(skeleton), "format": str(FORMAT)}))


def read_tree(path: Path) -> Any:
    """Read what :func:`write_tree` wrote; a damaged or newer file is a Mistake. Nothing in it can run."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            newer(int(header.get("format", 0)), path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return unflatten(json.loads(header["tree"]), tensors)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, Mistake):
            raise
        raise Mistake(f"{path}: not a readable state file ({error}); restore it from a copy, or train again") from error


def newer(format: int, path: Path) -> None:
    """Refuse a file made by a newer version."""
    if format > FORMAT:
        raise Mistake(f"{path}: written by a newer Convince (format {format}, this one reads up to {FORMAT}); upgrade with pip install -U convince")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write to a temporary name, flush to disk, rename. On a full disk the old file stays and a Mistake says so."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Mistake(
            f"{path}: cannot be written ({error.strerror}); what was saved before is intact. Free space or permissions, then --resume {path.parent}"
        ) from error


# -- optimiser state by name -----------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Any]:
    """``optimizer.state_dict()`` with parameter names in place of positions."""
    raw = optimizer.state_dict()
    by_position = [names[p] for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in raw["param_groups"]]
    return {"state": {by_position[i]: v for i, v in raw["state"].items()}, "groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], kept: dict[str, Any]) -> None:
    """Give an optimiser the state :func:`optimizer_state` took, with equal bits.

    ``Optimizer.load_state_dict`` casts state to the parameter's dtype, so it is set directly.
    """
    for group, values in zip(optimizer.param_groups, kept["groups"], strict=True):
        group.update(values)
        for p in group["params"]:
            state = kept["state"].get(names[p])
            if state is not None:
                optimizer.state[p] = {k: _like(v, p) for k, v in state.items()}


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """Lay state of the parameter's shape out in memory as the parameter is."""
    if isinstance(value, Tensor):
        value = value.to(parameter.device) if value.dim() else value
        if value.shape == parameter.shape:
            return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value


# -- a run's state ---------------------------------------------------------------------------------


def run_state(run: Run) -> dict[str, Any]:
    """Everything that a run needs to go on with equal bits."""
    names = {p: n for n, p in named(run)}
    return {
        "place": [run.stage_number, run.epoch, run.step],
        "counts": {"images": run.images, "steps": run.steps_done, "stage": run.stage_steps, "rows": len(run.record.rows), "stopped": run.stopped},
        "edits": run.edits,
        "model": dict(run.model.state_dict()),
        "extra": dict(run.extra.state_dict()),
        "optimizer": None if run.optimizer is None else optimizer_state(run.optimizer, names),
        "parts": {seat.name: seat.technique.state() for seat in run.team.seats},
    }


def named(run: Run) -> list[tuple[str, nn.Parameter]]:
    """Parameters of the network and of ``run.extra``, by name."""
    return [*run.model.named_parameters(), *((f"extra.{n}", p) for n, p in run.extra.named_parameters())]


def restore_run(run: Run, state: dict[str, Any]) -> None:
    """Bring a started run (built, ``on_start`` done) to the state; the optimiser follows in its stage."""
    done = len(run.edits)
    if state["edits"][:done] != run.edits:
        raise Mistake("the parts of this run edit the network differently now than when it was saved; use the version that made it")
    for edit in state["edits"][done:]:
        run.replay(edit)
    run.model.load_state_dict(state["model"])
    run.extra.load_state_dict(state["extra"])
    for seat in run.team.seats:
        seat.technique.restore(run, state["parts"].get(seat.name, {}))
    run.stage_number, run.epoch, run.step = state["place"]
    counts = state["counts"]
    run.images, run.steps_done, run.stage_steps, run.stopped = counts["images"], counts["steps"], counts["stage"], counts["stopped"]
    run.record.cut(counts["rows"])


# -- pruning while training ------------------------------------------------------------------------


def resize_run(run: Run, keep: Mapping[str, Sequence[Any]]) -> None:
    """Slice parameters and buffers (by name) to ``keep`` along ``axis``; optimiser state follows."""
    homes = dict(run.model.named_modules())
    for name, (axis, rows) in keep.items():
        path, _, leaf = name.rpartition(".")
        module = homes[path]
        old = getattr(module, leaf)
        index = torch.tensor(rows, device=old.device)
        sliced = old.detach().index_select(axis, index)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(sliced, requires_grad=old.requires_grad)
            new.grad = None if old.grad is None else old.grad.index_select(axis, index)
            setattr(module, leaf, new)
            if run.optimizer is not None:
                _swap(run.optimizer, old, new, axis, index)
        else:
            setattr(module, leaf, sliced)
        _sizes(module)


def _swap(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, axis: int, index: Tensor) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    kept = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            kept[name] = value.index_select(axis, index)
        elif not isinstance(value, Tensor) or value.dim() == 0:
            kept[name] = value
        else:
            return  # factored state does not survive a cut; the optimiser starts it anew
    optimizer.state[new] = kept


def _sizes(module: nn.Module) -> None:
    """Write a sliced module's sizes into its attributes."""
    if isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
        if module.groups == 1:
            module.in_channels = module.weight.shape[1]
        else:
            module.groups = module.in_channels = module.out_channels
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = module.weight.shape[0]
