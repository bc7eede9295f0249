"""torch.compile for training: the decoder layers of a model, one by one, so that one compilation serves all that are
alike, and however long their sequences are.

What is compiled is each layer's ``forward`` alone. So hooks (FSDP2's among them), checkpointing and names stay as they
are: a checkpoint or a model doesn't know whether it was compiled. Attention within a row of sequences is run as it is,
between the compiled parts: how it goes depends on how the row is made up.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.errors import ModelError

# Compilations of one layer's code, before torch gives up and runs it as it is: policy and critic, with and without
# gradients, adapters and dropout, packed and padded, one sequence and several.
_MOST_COMPILATIONS = 64
_COMPILED = "_quartet_compiled"


def require_compiler(device: torch.device) -> None:
    """
    Raises:
        ModelError: this machine lacks what torch.compile makes code for ``device`` with; says what to install.
    """
    if reason := lacking(device):
        raise ModelError(f"--compile is set, but {reason}, or leave --compile away")


def lacking(device: torch.device) -> str:
    """What this machine lacks to compile for ``device``, and how to install it; empty where it lacks nothing."""
    return _lacking_of_gpu() if device.type == "cuda" else _lacking_of_processor()


def _lacking_of_processor() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return (
            "this machine has no C++ compiler, which makes its code for a processor: install one (apt-get install g++, "
            "dnf install gcc-c++, xcode-select --install), or name yours in CXX"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"{header} is missing, which its code is compiled with: install it (apt-get install python3-dev)"
    return ""


def _lacking_of_gpu() -> str:
    from torch.utils._triton import has_triton

    if not has_triton():
        return "triton, which makes its code for a GPU, isn't installed or doesn't know this one: pip install triton"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "this machine has no C compiler, which triton needs: install one (apt-get install gcc)"
    return ""


def compile_layers(model: nn.Module) -> None:
    """Compiles every decoder layer of ``model``, in place, when it is first run.

    To be called when nothing about the model has to be tried out any more, and before it is split among processes.

    Raises:
        ModelError: the model doesn't say which of its parts are its layers.
    """
    if is_compiled(model):
        return
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(f"--compile is set, but {type(model).__name__} doesn't say which its decoder layers are")
    compiled: Any = torch.compile  # Its stubs know of no limit.
    for layer in layers:
        layer.forward = compiled(layer.forward, dynamic=True, recompile_limit=_MOST_COMPILATIONS)
    setattr(model, _COMPILED, True)


def is_compiled(model: nn.Module) -> bool:
    """Whether ``compile_layers`` was called with ``model``."""
    return _COMPILED in vars(model)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The parts of ``model`` that its code says are never to be torn apart."""
    kinds = {kind for part in model.modules() for kind in (getattr(part, "_no_split_modules", None) or ())}
    return [part for part in model.modules() if type(part).__name__ in kinds]
