"""Settings: everything a person may choose about a run, as one object that round-trips to config.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convince.errors import Mistake, nearest


class Settings(BaseModel):
    """What ``convince train`` was asked for. None means: chosen from the data, and written down.

    ``start`` is a run whose weights the network begins with, where names and shapes agree; ``pretrain_only`` ends
    before the main stage. ``lr`` None is the optimiser's own; ``steps`` of the main stage override ``epochs``; ``schedule``
    is the factor of the learning rate over a stage; ``kernels`` are ways to compute depthwise and grouped convolutions
    (training, inference; see ``fit/kernels.py``); ``checkpoint_seconds`` is the longest work lost.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "digits"
    model: str | None = None
    start: str | None = None
    pretrain_only: bool = False
    parts: tuple[str, ...] = ()
    augment: Literal["auto", "none", "crop", "flip-crop"] = "auto"
    epochs: int | None = Field(None, ge=0)
    minutes: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    batch: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, le=1)
    size: int | None = Field(None, ge=4)
    fit: Literal["letterbox", "crop", "stretch"] = "letterbox"
    val: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.2, ge=0, lt=1)
    group: str | None = None
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    kernels: dict[str, tuple[str, str]] | None = None
    seed: int = Field(0, ge=0)
    workers: int = Field(0, ge=0)
    strict: bool = False
    checkpoint_seconds: float = Field(30.0, ge=0)

    def updated(self, **changes: Any) -> Settings:
        """A copy with these fields changed, checked again."""
        return settings(**{**self.model_dump(), **changes})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def settings(**values: Any) -> Settings:
    """Make :class:`Settings`; a wrong name or value becomes a Mistake that names it and the rule."""
    for name in values:
        if name not in Settings.model_fields:
            raise Mistake(f"no setting is named {name!r}{nearest(name, list(Settings.model_fields))}")
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise Mistake(f"{name}={first['input']!r}: {first['msg'].lower()}") from error


def from_yaml(path: Path) -> Settings:
    """Read a run's config.yaml; what is not plain settings is refused."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise Mistake(f"{path}: not a readable config: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict) or "data" not in values:
        raise Mistake(f"{path}: holds no settings of a run")
    try:
        return settings(**values)
    except Mistake as error:
        raise Mistake(f"{path}: {error}") from error
