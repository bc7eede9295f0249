"""LoRA in a transformers model: every row of a batch gets what its own adapter adds, and the base rows nothing.

Hooks on the linear layers add s B A x (Hu et al. 2021, arXiv:2106.09685, equation 3) to the rows of each adapter in
turn. Nothing is merged into the weights, so adapters and base generate side by side, and weights may be replaced below.

Shapes: B rows, S positions, I input and O output features of a layer, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from services.policy.adapter_config import AdapterConfig, module_of
from services.policy.engine import AdapterRefusedError

_PROBE_SHAPE = (2, 3)  # Rows and positions, two numbers that no flattening of them gives.


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRankAdapter:
    """A_RI and B_OR, the scale multiplied in, of every adapted module; float32, as PEFT keeps them for training."""

    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_tensors(safetensors: Path) -> dict[str, Tensor]:
    """The tensors of a staged adapter in float32.

    Raises:
        AdapterRefusedError: one holds what is not a finite number.
    """
    try:
        with safe_open(safetensors, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a mapping.
    except (SafetensorError, OSError) as error:
        raise AdapterRefusedError(f"its staged file can't be read: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterRefusedError(f"{name!r} holds a value that is not a finite number")
    return tensors


def read_adapter(safetensors: Path, config: AdapterConfig, device: torch.device) -> LowRankAdapter:
    """A staged adapter, ready to be applied.

    Raises:
        AdapterRefusedError: see :func:`read_tensors`.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(safetensors).items():
        if (parsed := module_of(name)) is None:
            raise AdapterRefusedError(f"{name!r} is no tensor of a LoRA adapter")
        module, factor = parsed
        halves.setdefault(module, {})[factor] = tensor.to(device)
    return LowRankAdapter(
        factors={module: (half["A"], half["B"] * config.scale_of(module)) for module, half in halves.items()}
    )


def linear_modules(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) features of the linear layers below the head, by the names that PEFT knows them by."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's: its weight is (in, out).
            into, out = module.weight.shape
            found[name] = (int(into), int(out))
    return found


def linear_modules_of(folder: Path, *, trust_remote_code: bool) -> dict[str, tuple[int, int]]:
    """:func:`linear_modules` of the model in ``folder``, whose weights are not read."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return linear_modules(model)


def row_wise_modules(model: Any, device: torch.device) -> dict[str, tuple[int, int]]:
    """Those :func:`linear_modules` that see a batch as (B, S, I): the layers in which a row can be told from another.

    Experts that see the tokens of all rows in one list are left out. Found by a forward pass.
    """
    modules = linear_modules(model)
    seen: set[str] = set()

    def note(name: str, _module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 3 and args[0].shape[:2] == _PROBE_SHAPE:
            seen.add(name)

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in modules]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(_PROBE_SHAPE, dtype=torch.int64, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: features for name, features in modules.items() if name in seen}


class RowAdapters:
    """Applies adapters inside the forward passes of one thread."""

    def __init__(self) -> None:
        self._groups: list[tuple[LowRankAdapter, Tensor | None]] = []

    def attach(self, model: torch.nn.Module, modules: Mapping[str, tuple[int, int]]) -> None:
        """Hooks into the ``modules`` of a model; without adapters in a batch they change nothing."""
        for name in modules:
            model.get_submodule(name).register_forward_hook(partial(self._add, name))

    @contextlib.contextmanager
    def applied(self, adapters: Sequence[LowRankAdapter | None], device: torch.device) -> Iterator[None]:
        """In forward passes of len(adapters) rows, row i is adapted by ``adapters[i]``; None is the base model."""
        rows: dict[LowRankAdapter, list[int]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                rows.setdefault(adapter, []).append(row)
        self._groups = [
            # None: all rows, which then need no gathering.
            (adapter, None if len(places) == len(adapters) else torch.tensor(places, device=device))
            for adapter, places in rows.items()
        ]
        try:
            yield
        finally:
            self._groups = []

    def _add(self, name: str, _module: torch.nn.Module, args: tuple[Any, ...], output_BSO: Tensor) -> Tensor:
        for adapter, rows in self._groups:
            if (factors := adapter.factors.get(name)) is None:
                continue
            A_RI, B_OR = factors
            x = args[0] if rows is None else args[0][rows]
            delta = functional.linear(functional.linear(x.to(A_RI.dtype), A_RI), B_OR)
            if rows is None:
                output_BSO = (output_BSO + delta).to(output_BSO.dtype)
            else:
                output_BSO = output_BSO.index_copy(0, rows, (output_BSO[rows] + delta).to(output_BSO.dtype))
        return output_BSO
