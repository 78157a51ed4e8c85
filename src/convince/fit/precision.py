"""Which device, number format and memory layout a run uses, from what the machine can do."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit import kernels

PRECISIONS = ("auto", "bf16", "fp32", "fp64")


@dataclass(frozen=True)
class Plan:
    """``precision`` of the forward pass, ``channels_last`` for image tensors, where they live, and ways for some convolutions."""

    device: str
    precision: str
    channels_last: bool
    reason: str
    kernels: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and of pixels before the network."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of every forward pass."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device, dtype and layout, its depthwise and grouped convolutions in the chosen ways."""
        model = model.to(device=self.device, dtype=self.dtype)
        kernels.install(model, self.kernels)
        for tensor in [*model.parameters(), *model.buffers()] if self.channels_last else ():
            if tensor.dim() == 4:  # torch's own way refuses a network with weights of five axes
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return model

    def pixels(self, x: Tensor) -> Tensor:
        """uint8 or float input -> [0, 1] (tables: as they are) on the device, in the layout."""
        scale = x.dtype == torch.uint8
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x = x.to(device=self.device, dtype=self.dtype, non_blocking=True)
        return x.div_(255) if scale else x


def hardware() -> dict[str, Any]:
    """What the machine can do: processor flags, cores, accelerator."""
    cpu = torch.backends.cpu.get_cpu_capability()
    facts: dict[str, Any] = {
        "cpu_capability": cpu,
        "avx512_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
    }
    if facts["cuda"]:
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def choose(precision: str = "auto", kind: str = "image", ways: Mapping[str, tuple[str, str]] | None = None) -> Plan:
    """The plan for this machine. ``kind`` "table" stays in fp32: its layers are too small to gain. ``ways``: of :mod:`convince.fit.kernels`."""
    if precision not in PRECISIONS:
        raise Mistake(f"--precision {precision}: must be one of {', '.join(PRECISIONS)}")
    have = hardware()
    device = "cuda" if have["cuda"] else "cpu"
    bf16 = torch.cuda.is_bf16_supported() if have["cuda"] else have["amx"] or have["avx512_bf16"]
    if precision == "auto":
        if kind != "image":
            precision, reason = "fp32", "tables gain nothing from bf16"
        elif bf16:
            unit = have.get("gpu") or ("AMX" if have["amx"] else "AVX512-BF16")
            precision, reason = "bf16", f"{unit} multiplies bf16 faster than fp32"
        else:
            precision, reason = "fp32", f"{have['cpu_capability']} has no bf16 units"
    else:
        reason = "asked for"
    return Plan(device, precision, channels_last=kind == "image", reason=reason, kernels=ways or {})


def full(x: Tensor) -> Tensor:
    """bf16 and fp16 -> fp32; fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def peak_flops(precision: str, side: int = 1024, seconds: float = 0.5) -> float:
    """Floating-point operations a second of one large matrix product in this format, measured now."""
    import time

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(side, side, dtype=dtype, device=device)
    a @ a
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
