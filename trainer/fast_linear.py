"""Linear layers with the fastest products that a processor has, forwards and backwards.

PyTorch takes its float32 products from MKL, which keeps its fastest code for Intel's processors: on an AMD EPYC with
AVX-512 oneDNN is 1.7 to 2.3 times as fast, for the same numbers up to rounding (``python -m bench linear``). On one
with AVX2 alone it is 0.7 to 1.0 times as fast, so there MKL stays.

In bfloat16, on a processor without such products, PyTorch takes many times as long as in float32. There the products of
float32 are taken of the rounded numbers, whose products float32 holds exactly: bfloat16 is what it is anywhere, and as
fast as float32.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import platform
from typing import Any, cast

import torch
from torch import Tensor, nn

# Laying a weight out anew for every product costs as much as about so many rows of it.
_MIN_ROWS = 64


# Found out once, for torch.compile can't ask the machine.
_AVAILABLE = (
    platform.machine().lower() in ("x86_64", "amd64")
    and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_FASTER = _AVAILABLE and "AVX512" in torch.backends.cpu.get_cpu_capability()
_MULTIPLIES_BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if _AVAILABLE else True


def available() -> bool:
    """Whether this processor and build of torch have oneDNN's products."""
    return _AVAILABLE


def faster() -> bool:
    """Whether oneDNN's float32 products are likely the faster ones here."""
    return _FASTER


def helps(x_NI: Tensor) -> bool:
    """Whether ``product`` may be used with ``x_NI`` now, and is likely the faster one."""
    return (
        faster()
        and x_NI.device.type == "cpu"
        and x_NI.dtype == torch.float32
        and len(x_NI) >= _MIN_ROWS
        and not torch.is_autocast_enabled("cpu")
    )


def multiplies_bfloat16() -> bool:
    """Whether this processor has products of bfloat16, and oneDNN takes them."""
    return _MULTIPLIES_BFLOAT16


def needs_float32(x: Tensor) -> bool:
    """Whether ``x`` would be multiplied in a bfloat16 that this processor has not."""
    if x.device.type != "cpu" or multiplies_bfloat16():
        return False
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16 or (half and x.dtype == torch.float32)


def product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(N, O) ``x @ weight.T + bias`` by oneDNN, outside autograd; float32 on a processor."""
    if torch.compiler.is_compiling():
        return cast(Tensor, _opaque_product(x_NI, weight_OI, bias_O))
    y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return y_NO


def use_fast_linear(model: nn.Module) -> None:
    """Turns the plain linear layers of ``model`` into fast ones, in place; weights, names and hooks stay."""
    if not available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


class FastLinear(nn.Linear):
    """A linear layer that is ``nn.Linear`` except for who multiplies, where that helps."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        x_NI = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
        if needs_float32(x_NI) and self.weight.dtype == torch.float32:
            rounded = cast(Any, _RoundedProduct.apply)
            y_NO: Tensor = rounded(x_NI, self.weight, self.bias)
            return y_NO.view(*x.shape[:-1], self.out_features)
        if not helps(x_NI) or self.weight.dtype != torch.float32:
            return super().forward(x)
        apply = cast(Any, _Product.apply)
        y_NO = apply(x_NI, self.weight, self.bias)
        return y_NO.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return product(x_NI, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_NO = grad_NO.contiguous()
        return (
            product(grad_NO, weight_OI.t().contiguous()) if needs_x else None,
            product(grad_NO.t(), x_NI.t()) if needs_weight else None,
            grad_NO.sum(dim=0) if needs_bias else None,
        )


class _RoundedProduct(torch.autograd.Function):
    """As autocast has it in bfloat16, with float32's products."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.x_dtype = x_NI.dtype
        x_NI = x_NI.to(torch.bfloat16)
        ctx.save_for_backward(x_NI, weight_OI)
        y_NO = _rounded_product(x_NI, weight_OI)
        return (y_NO if bias_O is None else y_NO.add_(_rounded(bias_O))).to(torch.bfloat16)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _rounded_product(grad_NO, weight_OI.t()).to(ctx.x_dtype) if needs_x else None,
            _rounded_product(grad_NO.t(), x_NI.t()) if needs_weight else None,
            grad_NO.sum(dim=0, dtype=torch.float32) if needs_bias else None,
        )


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _rounded_product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """(N, O) float32 products of both as they are in bfloat16."""
    if torch.compiler.is_compiling():
        return cast(Tensor, _opaque_rounded_product(x_NI, weight_OI))
    with torch.autocast("cpu", enabled=False):
        return nn.functional.linear(_rounded(x_NI), _rounded(weight_OI))


# For torch.compile, which has no code of its own for oneDNN's products and leaves roundings out.


@torch.library.custom_op("quartet::product", mutates_args=())
def _opaque_product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return product(x_NI, weight_OI, bias_O)


@torch.library.custom_op("quartet::rounded_product", mutates_args=())
def _opaque_rounded_product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return _rounded_product(x_NI, weight_OI)


@_opaque_product.register_fake
def _(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])


@_opaque_rounded_product.register_fake
def _(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0], dtype=torch.float32)
