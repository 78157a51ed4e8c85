"""ReLUs of any network, given another backward pass: what guided backpropagation and the deconvnet have in common."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CURVED = ("leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "hardswish", "mish", "relu6", "hardtanh")


class passing_back(TorchFunctionMode):
    """While it is entered, every ReLU, module or function, in place or not, is ``rule``, an autograd function with the backward pass of a method.

    ``count`` says how many were met, ``others`` which other activations. Nothing is changed in any network.
    """

    OUT = (F.relu, torch.relu, Tensor.relu)
    IN = (torch.relu_, Tensor.relu_)

    def __init__(self, rule: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.rule = rule
        self.count = 0
        self.others: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.OUT and func not in self.IN:
            name = getattr(func, "__name__", "").rstrip("_")
            if name in CURVED:
                self.others.add(name)
            return func(*args, **kwargs)
        self.count += 1
        a = args[0] if args else kwargs["input"]
        inplace = func in self.IN or kwargs.get("inplace", len(args) > 1 and args[1])
        out = self.rule.apply(a)
        return a.copy_(out) if inplace else out
