"""LoRA adapters from seeds, and the model that one makes of its base, merged in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter as its trainer has it: PEFT's configuration and its state dict, by PEFT's names."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def scale(self, module: str) -> float:
        rank = self.ranks.get(module, self.config["r"])
        alpha = self.alphas.get(module, self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def save(self, folder: Path) -> Path:
        """As PEFT saves it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    @property
    def arrays(self) -> dict[str, Any]:
        return {name: tensor.numpy() for name, tensor in self.state.items()}


def make_lora(
    folder: Path,
    seed: int,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = ALL,
    size: float = 0.1,
    ranks: dict[str, int] | None = None,
    alphas: dict[str, float] | None = None,
    **config: Any,
) -> Lora:
    """An adapter of the model in ``folder`` with both factors far from zero; ``ranks``, ``alphas``: by module."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in base_model(folder).named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            r = (ranks or {}).get(name, rank)
            stem = f"base_model.model.{name}"
            state[f"{stem}.lora_A.weight"] = size * torch.randn(r, module.in_features, generator=draw)
            state[f"{stem}.lora_B.weight"] = size * torch.randn(module.out_features, r, generator=draw)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets), "bias": "none"}
    return Lora(settings | config, state, ranks or {}, alphas or {})


@lru_cache(maxsize=4)
def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@lru_cache(maxsize=16)
def merged_model(folder: Path, lora: Lora | None) -> Any:
    """W + s B A in float64, with nothing of an adapter left."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if lora is None:
        return model
    with torch.no_grad():
        for name, module in model.named_modules():
            if (a := lora.state.get(f"base_model.model.{name}.lora_A.weight")) is not None:
                b = lora.state[f"base_model.model.{name}.lora_B.weight"]
                module.weight += lora.scale(name) * (b.double() @ a.double())
    return model


@torch.inference_mode()
def merged_logprobs(folder: Path, lora: Lora | None, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """Natural-log probability of each response token, by one full forward pass of the merged model."""
    logits = merged_model(folder, lora)(torch.tensor([[*prompt, *response]])).logits[0]
    table = logits.log_softmax(-1)
    return [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]


def furthest(
    folder: Path, lora: Lora | None, prompt: Sequence[int], response: Sequence[int], logprobs: Sequence[float]
) -> float:
    """Largest difference of ``logprobs`` from the merged model's."""
    assert len(response) == len(logprobs) > 0
    exact = merged_logprobs(folder, lora, prompt, response)
    return max(abs(a - b) for a, b in zip(exact, logprobs, strict=True))
