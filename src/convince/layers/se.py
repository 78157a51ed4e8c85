"""Se: squeeze-and-excitation, channel gates from the pooled vector through a small bottleneck."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.eca import gate
from convince.layers.surgery import Surgery
from convince.parts import Card

CARD = Card(
    part="se",
    kind="layer",
    title="Squeeze-and-Excitation Networks",
    year=2018,
    url="https://arxiv.org/abs/1709.01507",
    departs=("forms besides 'bottleneck' are the variants that the ECA paper takes SE apart with",),
    expects=("images",),
    tiny={"r": 2},
)

FORMS = ("bottleneck", "none", "diagonal", "full", "grouped")


@final
class Se(nn.Module):
    """Each channel times ``sigmoid(fc(relu(fc(mean))))``, the hidden layer ``r`` times narrower.

    ``form``: "bottleneck" is SE. The dissection of the ECA paper (its Table 2): "none" has no parameters (SE-Var1),
    "diagonal" one weight a channel (SE-Var2), "full" one C x C matrix (SE-Var3), "grouped" ``r`` blocks of that matrix (SE-GC).
    """

    def __init__(self, channels: int, r: int = 16, form: str = "bottleneck") -> None:
        super().__init__()
        if form not in FORMS:
            raise Mistake(f"se: form={form!r} must be one of {', '.join(FORMS)}")
        if not isinstance(r, int) or r < 1 or (form == "grouped" and channels % r):
            raise Mistake(f"se: r={r!r} must be a whole number from 1{f' that divides {channels} channels' if form == 'grouped' else ''}")
        self.excite: nn.Module = nn.Identity()
        if form == "bottleneck":
            hidden = max(channels // r, 1)
            self.excite = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1))
        elif form != "none":
            groups = {"diagonal": channels, "full": 1, "grouped": r}[form]
            self.excite = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x * self.excite(x.mean((2, 3), keepdim=True)).sigmoid()


def install(model: nn.Module, r: int = 16, form: str = "bottleneck") -> Surgery:
    """Gate each residual branch of ``model`` before its addition, in place.

    Existing parameter names stay; the new ones are called ``layer1.0.bn2.se.excite.0.weight``. Raises Mistake for a
    network without residual blocks.
    """
    return gate(model, "se", lambda end: Se(end.channels, r, form))
