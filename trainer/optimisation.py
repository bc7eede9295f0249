"""Optimiser, schedule, precision: what every stage does with its gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from trainer.errors import DivergedError

Precision = Literal["auto", "float32", "bfloat16"]


def choose_device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context of forward passes. Weights and optimiser stay float32 whatever the precision."""
    if in_bfloat16(device, precision):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def in_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Whether products on ``device`` are computed in bfloat16."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def make_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> AdamW:
    """AdamW in two groups: matrices, which decay, and vectors (biases, norms), which don't."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=eps, fused=True)


def linear_schedule(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Share of the peak learning rate at ``step``, from 0: up over the warm-up, then down to 0 after the last step."""
    warmup_steps = math.ceil(warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (total_steps - step) / max(1, total_steps - warmup_steps)


def set_learning_rate(optimiser: Optimizer, learning_rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate


def apply_gradients(optimiser: Optimizer, max_norm: float) -> float:
    """Scales the gradient down to ``max_norm``, takes a step, clears the gradient. Returns the norm before scaling.

    Raises:
        DivergedError: the gradient is not finite; the weights are untouched.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    whole = nn.utils.clip_grad_norm_(parameters, max_norm)
    # Of parameters that are split among processes it is the norm of all parts together.
    norm = float(whole.full_tensor() if isinstance(whole, DTensor) else whole)
    if not math.isfinite(norm):
        raise DivergedError(f"the gradient's norm is {norm}")
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def clip_weights(parameters: Iterable[Tensor], bound: float) -> None:
    """Keeps every weight within [-bound, bound]: a Lipschitz bound, as in Wasserstein GANs (Arjovsky et al. 2017)."""
    for parameter in parameters:
        parameter.clamp_(-bound, bound)
