"""LoRA: a small adapter is trained in place of the model's own weights, which stay as they are.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the layers are peft's.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.scale_config import ScaleSettings
from trainer.sharding import whole_state

_NAME = "default"
_ATTRIBUTE = "_quartet_adapter"
_TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}


@dataclass(frozen=True)
class Adapter:
    """The adapter of a model, as peft has it: ``peft_model`` shares all of its layers with the model."""

    peft_model: Any

    @property
    def config(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        content: dict[str, Any] = self.peft_model.peft_config[_NAME].to_dict()
        return content

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Names and tensors as peft saves them, sharing memory with the model."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        return [(name, tensor.detach()) for name, tensor in sorted(state.items())]

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within it the model is the one that it was before it was given the adapter."""
        with self.peft_model.disable_adapter():
            yield

    def save(self, folder: Path) -> None:
        """Writes ``folder`` as peft does, for ``PeftModel.from_pretrained`` on the model that training began with."""
        self.peft_model.save_pretrained(folder, save_embedding_layers=False)


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter that ``model`` was given, None where all of its weights are its own."""
    found: Adapter | None = vars(model).get(_ATTRIBUTE)
    return found


def add_adapter(model: Any, settings: ScaleSettings, *, seed: int) -> Adapter:
    """Gives ``model`` an adapter, in place: from here on its own weights want no gradient.

    It computes what it did before, for one of the two factors begins at zero. A classifier's head is trained whole, as
    a part of the adapter.

    Args:
        model: as ``trainer.models`` loads it.
        settings: rank, alpha, dropout and targets.
        seed: of the other factor.

    Raises:
        ModelError: peft isn't installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError(f"--lora-rank needs peft, which isn't installed ({error}): pip install peft") from error

    targets = settings.lora_targets
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        task_type=next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None),
    )
    with torch.random.fork_rng(devices=_devices_of(model)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # It finds out which way a weight lies.
        torch.manual_seed(seed)
        try:
            adapter = Adapter(get_peft_model(model, config))
        except ValueError as error:
            raise ModelError(f"--lora-targets {' '.join(targets)} can't be used with this model: {error}") from error
    model.train(model.training)  # The new layers, too.
    setattr(model, _ATTRIBUTE, adapter)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in model.parameters())
    sys.stdout.write(f"LoRA of rank {settings.lora_rank}: {trained:,} of {whole:,} parameters are trained\n")
    return adapter


def _devices_of(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


@torch.no_grad()
def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of ``model`` under the names that it has without an adapter, the adapter's share added to its weights.

    Weights that no adapter touches share memory with the model, which is left as it is to the bit.
    """
    state = whole_state(model)
    if adapter_of(model) is None:
        return state
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            weight = f"{name}.base_layer.weight"
            state[weight] = state[weight] + module.get_delta_weight(_NAME).to(state[weight].dtype)
    return {_plain_name(name): tensor for name, tensor in state.items() if not _is_of_adapter(name.split("."))}


def _is_of_adapter(parts: Iterable[str]) -> bool:
    return any(part.startswith("lora_") or part == "original_module" for part in parts)


def _plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{_NAME}.", ".")
