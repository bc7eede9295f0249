"""FSDP2: each process keeps its part of every weight, gradient and optimiser state, and has the whole of a layer only
while it computes with it.

Gradients are summed over the processes, not averaged: losses are means over the whole batch already. Weights and what
the optimiser keeps are float32; with bfloat16 the layers' weights are brought together in bfloat16, and gradients
summed in float32.

Source: ``torch.distributed.fsdp.fully_shard``; Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded
Data Parallel".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainer import distributed
from trainer.compiling import decoder_layers
from trainer.optimisation import Precision, in_bfloat16

T = TypeVar("T")

GradientSync = Literal["micro-batch", "step"]

_FORWARD = "quartet_forward"


def shard(model: nn.Module, precision: Precision, device: torch.device | None = None) -> None:
    """Splits ``model`` among the processes, in place: first each decoder layer, then what is left as one.

    To be called on the device of training, when nothing about the model has to be tried out any more, and before its
    optimiser is made. With one process it does nothing.

    Args:
        model: as it is trained, the same in all processes.
        precision: of its forward passes.
        device: where its parts go, layer by layer, where it is elsewhere: a whole one may find no room there.
    """
    if not distributed.active() or is_sharded(model):
        return
    device = next(model.parameters()).device if device is None else device
    mesh = init_device_mesh(device.type, (distributed.count(),))
    # On a processor the usual norm takes no bfloat16 weights beside float32 activations.
    whole_norms = device.type == "cpu" and any(isinstance(part, nn.LayerNorm) for part in model.modules())
    half = torch.bfloat16 if in_bfloat16(device, precision) and not whole_norms else None
    # Activations stay as autocast has them. Embeddings, last norm and heads stay float32, as they do under autocast.
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Told to split again after a forward pass: between steps weights are parts, whoever looks at them.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else.
    setattr(model, _FORWARD, _apply)
    register_fsdp_forward_method(model, _FORWARD)


def _apply(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``model`` is split among processes."""
    return isinstance(model, FSDPModule)


def as_forward(model: nn.Module, function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)``, which computes with weights of ``model`` without calling the model itself.

    A split model brings weights together where it is called: what goes past that (a body without its head, a head's
    weight alone) needs to be told.
    """
    if not is_sharded(model):
        return function(*arguments)
    result: T = getattr(model, _FORWARD)(function, *arguments)
    return result


def in_turn(parts: Sequence[T], gradient_sync: GradientSync, *models: nn.Module | None) -> Iterator[T]:
    """The micro-batches of a step, each for a forward and a backward pass of ``models``.

    By ``gradient_sync`` the gradients of split models are brought together after each, or after the last alone.
    """
    for place, part in enumerate(parts):
        for model in models:
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(gradient_sync == "micro-batch" or place == len(parts) - 1)
        yield part


def finite_everywhere(*tensors: Tensor) -> bool:
    """Whether all their numbers are finite, of split ones those of every process; all have to ask."""
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return not distributed.anywhere(not all(bool(tensor.isfinite().all()) for tensor in own))


# Whole tensors, for checkpoints and exports --------------------------------------------------------------------------


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with whole tensors; those of a split module on the CPU, and in the first process alone.

    All processes have to ask. Tied tensors are one.
    """
    if not is_sharded(module):
        return dict(module.state_dict())
    found: dict[int, Tensor | None] = {}
    names = {}
    # The parameters themselves, for a tied one is the same twice.
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            found[id(tensor)] = _whole(tensor.detach())
        names[name] = found[id(tensor)]
    return {name: tensor for name, tensor in names.items() if tensor is not None}


def whole_optimiser(optimiser: Optimizer) -> dict[str, Any]:
    """``optimiser.state_dict()`` with whole tensors, of split ones in the first process alone; all have to ask."""
    state: dict[str, Any] = optimiser.state_dict()
    # A copy: what it gives are the optimiser's own dictionaries.
    whole = {
        index: {key: _whole(value) if isinstance(value, DTensor) else value for key, value in own.items()}
        for index, own in state["state"].items()
    }
    return state | {"state": whole}


def load_optimiser(optimiser: Optimizer, state: dict[str, Any]) -> None:
    """Loads what ``whole_optimiser`` gave, split as the optimiser's parameters are now."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for index, own in state["state"].items():
        for key, value in own.items():
            if isinstance(parameters[index], DTensor) and value.shape == parameters[index].shape:
                own[key] = placed(value, parameters[index])
    optimiser.load_state_dict(state)


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """``whole``, split as ``like`` is; each process takes its part of what it has."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor | None:
    """On the CPU, in the first process alone: together they would need as many times the memory."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.cpu() if distributed.is_first() else None
