"""Linear layers whose weights lie as the processor reads them fastest, and products in float32.

Shapes: N rows, C inputs, O outputs.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of the products that weights are laid out for; others are right as well.
_ROWS = 2048


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight lies as oneDNN reads it fastest.

    The same numbers as ``F.linear`` up to rounding, at about twice its speed in float32 where that is MKL's; and a
    row's result does not depend on the rows beside it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # Some models ask a layer's weight for its precision: it has one, without content.
        self.register_buffer("weight", torch.empty_like(weight, device="meta"), persistent=False)
        self.weight_packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight_packed, self.bias, "none", [], "")
        return y


def float32_linear(x_NC: Tensor, weight_OC: Tensor, bias_O: Tensor | None) -> Tensor:
    """(N, O) float32 of numbers in any precision: products of half precision, too, are added up and kept in float32.

    A copy of ``weight_OC`` in float32 may exist meanwhile.
    """
    if x_NC.is_cuda and x_NC.dtype == weight_OC.dtype != torch.float32:
        y_NO = torch.mm(x_NC, weight_OC.t(), out_dtype=torch.float32)
        return y_NO if bias_O is None else y_NO.add_(bias_O)
    # A product of two numbers of half precision is exact in float32.
    return F.linear(x_NC.float(), weight_OC.float(), None if bias_O is None else bias_O.float())


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this processor and build of torch have packed products of ``dtype``."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


def prepack(module: nn.Module) -> None:
    """Replaces the plain linear layers below ``module`` by packed ones, and lets go of their weights as they were."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            if can_prepack(child.weight.dtype):
                setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            prepack(child)
