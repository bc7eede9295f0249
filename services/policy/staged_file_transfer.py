"""The vLLM weight-transfer engine itself; imported in the worker alone, by name. See vllm_processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.utils import replace_submodule
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class StagedFileInit(WeightTransferInitInfo):
    """Nothing needs to be agreed beforehand."""


@dataclass
class StagedFileUpdate(WeightTransferUpdateInfo):
    """Where the whole checkpoint lies."""

    path: str


class StagedFileTransferEngine(WeightTransferEngine[StagedFileInit, StagedFileUpdate]):  # type: ignore[misc, type-arg]
    """Loads checkpoints from a file that the service staged and verified."""

    init_info_cls: ClassVar[type] = StagedFileInit
    update_info_cls: ClassVar[type] = StagedFileUpdate

    def init_transfer_engine(self, init_info: StagedFileInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        self._lora_layers = _without_adapters(self.model)
        # A CPU repacks linear weights for its matrix kernels: load_weights alone would find empty parameters.
        with torch.device(self.device):
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: that one synchronises an accelerator, which a CPU has not.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: StagedFileUpdate) -> None:
        with torch.device(self.device):
            self.model.load_weights(_tensors(update_info.path))

    def finish_weight_update(self) -> None:
        with torch.device(self.device):
            finalize_layerwise_reload(self.model, self.model_config)
            self._repack_tied_head()
        for name, layer in self._lora_layers:
            replace_submodule(self.model, name, layer)

    def _repack_tied_head(self) -> None:
        """A tied head shares the embedding, but its repacked copy keeps the old weights: make it again."""
        config = self.model_config.hf_text_config
        head = getattr(self.model, "lm_head", None)
        method = getattr(head, "quant_method", None)
        if head is not None and method is not None and getattr(config, "tie_word_embeddings", False):
            method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing is held."""


def _without_adapters(model: Any) -> list[tuple[str, torch.nn.Module]]:
    """Puts the plain layers in place of those that LoRA wraps, and returns the wrappers by name.

    load_weights knows tensors by the names that they have without LoRA. The adapters' own tensors stay in the wrappers.
    """
    wrapped = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BaseLayerWithLoRA)
    ]
    for name, module in wrapped:
        replace_submodule(model, name, module.base_layer)
    return wrapped


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping.
            yield name, file.get_tensor(name)
