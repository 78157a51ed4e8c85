"""A run on disk: what is written, and how it is read back without running anything from it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from convince import parts
from convince.backbones import builder, part_of
from convince.data import Data, MemoryStore, Preprocess
from convince.errors import Mistake
from convince.fit import precision
from convince.fit.adapters import seat
from convince.fit.answer import logits_of
from convince.fit.randomness import preserved
from convince.fit.run import Run
from convince.fit.settings import Settings, from_yaml
from convince.fit.state import FORMAT, newer, read_tree, write_atomic, write_tree
from convince.fit.technique import Team
from convince.types import Split


def write_config(folder: Path, settings: Settings) -> None:
    """config.yaml and environment.json, and copies of a person's own parts: written before training, and not again on resume."""
    write_atomic(folder / "config.yaml", settings.to_yaml())
    if not (folder / "environment.json").exists():
        write_atomic(folder / "environment.json", json.dumps(environment(), indent=1))
    for part in own_parts(settings):
        (folder / "parts").mkdir(exist_ok=True)
        copy = folder / "parts" / part.path.name
        if copy.resolve() != part.path.resolve():
            shutil.copyfile(part.path, copy)


def own_parts(settings: Settings) -> list[parts.Part]:
    """The parts of a person's own that these settings name, the network's among them."""
    named = [parts.get(parts.parse(spec)[0]) for spec in settings.parts]
    if settings.model is not None and (network := part_of(settings.model)) is not None:
        named.append(network)
    return [part for part in named if part.own]


def environment() -> dict[str, Any]:
    """Versions, processor and the command: what a reader needs to repeat the run."""
    from importlib.metadata import version

    packages = ("convince", "torch", "torchvision", "numpy", "scikit-learn", "pillow", "safetensors")
    return {
        "command": " ".join(["convince", *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "versions": {name: version(name) for name in packages},
        **precision.hardware(),
    }


def processor() -> str:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_model(folder: Path, run: Run) -> None:
    """model.safetensors (the network, plain names), parts.safetensors, structure.json, labels.json."""
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in run.model.state_dict().items()}
    write_atomic(folder / "model.safetensors", save(tensors, metadata={"format": str(FORMAT)}))
    states = {seat.name: seat.technique.state() for seat in run.team.seats}
    write_tree(folder / "parts.safetensors", {name: state for name, state in states.items() if state})
    own = {part.name: {"file": f"parts/{part.path.name}", "sha256": _sha256(part.path)} for part in own_parts(run.settings)}
    structure = {
        "format": FORMAT,
        "model": run.settings.model,
        "parts": [parts.spell(made.name, made.options) for made in run.team.seats],
        "edits": run.edits,
        "own": own,
        "members": run.owners,
        "weights_sha256": weights_sha256(run.answer),
    }
    write_atomic(folder / "structure.json", json.dumps(structure, indent=1))
    labels = {"format": FORMAT, "classes": list(run.data.classes), "preprocess": run.data.preprocess.to_json()}
    for i, child in enumerate(run.children):
        inner = folder / "members" / str(i)
        inner.mkdir(parents=True, exist_ok=True)
        write_config(inner, child.settings)
        write_model(inner, child)
    write_atomic(folder / "labels.json", json.dumps(labels, indent=1, ensure_ascii=False))


def weights_sha256(answer: nn.Module) -> str:
    """One hash of all of an answer's parameters and buffers: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(answer.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


@dataclass
class Loaded:
    """A finished run, ready to answer: ``answer`` maps [0, 1] pixels to scores."""

    folder: Path
    settings: Settings
    classes: tuple[str, ...]
    preprocess: Preprocess
    answer: nn.Module
    run: Run
    plan: precision.Plan

    def logits(self, x: Tensor) -> Tensor:
        """Scores [n k] for decoded pixels (uint8 [n c h w]) or table rows."""
        return logits_of(self.answer, x, self.plan)


def open_run(folder: str | Path, *, trust: bool = False) -> Loaded:
    """Load a finished run. Its own parts run only with ``trust``; no pickle is read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise Mistake(f"{folder}: no such run; 'convince train --out {folder}' makes one")
    if not (folder / "structure.json").exists():
        hint = f"finish it with 'convince train --resume {folder}'" if (folder / "config.yaml").exists() else "it holds no run"
        raise Mistake(f"{folder}: no finished run here; {hint}")
    structure, labels = _json(folder / "structure.json"), _json(folder / "labels.json")
    try:
        for found, name in ((structure, "structure.json"), (labels, "labels.json")):
            newer(int(found["format"]), folder / name)
        _trust(folder, structure["own"], trust)
        settings = from_yaml(folder / "config.yaml")
        preprocess = Preprocess.from_json(labels["preprocess"])
        data = without_samples(preprocess, tuple(labels["classes"]))
        seats = [seat(spec) for spec in structure["parts"]]
        wanted = [word for made in seats for word in made.card.expects]  # it was trained, so all was there
        team = Team(seats, gives=tuple(wanted))
        plan = precision.choose(settings.precision, preprocess.kind, settings.kernels)
        build = builder(structure["model"], num_classes=data.k, in_chans=preprocess.channels, size=preprocess.size)
        run = Run(settings, data, team, build, plan)
        with preserved():
            run.model = plan.place(build())
        run.normalise = run.normalise.to(plan.device)
        for edit in structure["edits"]:
            run.replay(edit)
        run.model.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{folder}: the run is damaged ({type(error).__name__}: {str(error).splitlines()[0]}); restore it from a copy, or train again") from error
    run.children = [open_run(inner, trust=trust).run for inner in sorted((folder / "members").glob("*"), key=lambda p: int(p.name))]
    run.owners = [str(name) for name in structure.get("members", ())]
    states = read_tree(folder / "parts.safetensors")
    for made in team.seats:
        made.technique.restore(run, states.get(made.name, {}))
    answer = run.answer.eval()
    return Loaded(folder, settings, data.classes, preprocess, answer, run, plan)


def without_samples(preprocess: Preprocess, classes: tuple[str, ...]) -> Data:
    """Data with classes and preprocessing and no rows: what a loaded run answers for."""
    none = torch.empty(0, dtype=torch.int64)
    shape = (0, preprocess.channels, *preprocess.size)
    empty = MemoryStore(torch.empty(shape, dtype=torch.uint8 if preprocess.kind == "image" else torch.float32))
    return Data(empty, none, Split(none, none, none), classes, preprocess, None, None, {}, [], [], "", "", True)


def _trust(folder: Path, own: dict[str, dict[str, str]], trust: bool) -> None:
    """Make a person's own parts of a run known, only where the same file is known already or trusted."""
    for name, entry in own.items():
        known = next((p for p in parts.find() if isinstance(p, parts.Part) and p.name == name), None)
        if known is not None and _sha256(known.path) == entry["sha256"]:
            continue
        copy = (folder / entry["file"]).resolve()
        if not copy.is_relative_to(folder.resolve()) or not copy.is_file() or _sha256(copy) != entry["sha256"]:
            raise Mistake(f"{folder}: the part {name!r} is not the file this run was made with; pass the original with --parts")
        found = parts.read(copy)
        if not trust and not (isinstance(found, parts.Part) and found.card.of is not None):  # a card that is data alone runs nothing
            raise Mistake(f"{folder}: uses the part {name!r} from {copy}, which is code; read it, then pass --trust")
        parts.add_path(copy)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"{path}: not readable ({error}); restore it from a copy, or train again") from error
    if not isinstance(found, dict):
        raise Mistake(f"{path}: holds no run")
    return found
