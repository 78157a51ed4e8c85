"""What else can be explained than a class: the likeness to another image. A view of an answer whose one score is that number."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake


@final
class Similarity(nn.Module):
    """``Similarity(answer, other)(x)`` is [n 1]: the cosine between what the last linear layer is given for ``x`` and for the image ``other``.

    Every explainer takes it in place of the answer, with target 0. ``other`` is [1 c h w] in [0, 1]. Raises Mistake for an answer whose last
    linear layer does not see one row an image.
    """

    logits = False  # the score is a number of its own, no class score

    def __init__(self, answer: nn.Module, other: Float[Tensor, "1 c h w"]) -> None:
        super().__init__()
        self.answer = answer
        self.head = next((name for name, m in reversed(list(answer.named_modules())) if isinstance(m, nn.Linear)), "")
        if not self.head:
            raise Mistake(f"similarity: {type(answer).__name__} has no linear layer to compare images before; explain a class instead")
        answer.eval()
        with torch.no_grad():
            self.register_buffer("other", self.features(other).detach())

    def features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """What the last linear layer is given."""
        taken: list[Tensor] = []

        def take(module: nn.Module, args: Any) -> None:
            taken.append(args[0])

        handle = self.answer.get_submodule(self.head).register_forward_pre_hook(take)
        try:
            self.answer(x)
        finally:
            handle.remove()
        if not taken or taken[-1].dim() != 2 or len(taken[-1]) != len(x):
            raise Mistake(f"similarity: the last linear layer {self.head!r} does not see one row an image; explain a class instead")
        return taken[-1]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1"]:
        other: Tensor = self.other  # type: ignore[assignment]
        return F.cosine_similarity(self.features(x), other, dim=1)[:, None]
