"""What a policy service must answer, computed naively: transformers in float64, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quartet.client import Completion
from quartet.client.policy import WireTensor


def naive_logprobs(
    folder: Path, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """Natural-log probability of each response token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
    table = logits.log_softmax(-1)
    return [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]


def largest_difference(
    folder: Path, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], t: float
) -> float:
    """Between the log-probabilities that came over the wire and the naive ones."""
    worst = 0.0
    for completion in completions:
        naive = naive_logprobs(folder, prompts[completion.prompt_index], completion.token_ids, t)
        assert len(naive) == len(completion.logprobs) > 0
        worst = max(worst, *(abs(a - b) for a, b in zip(naive, completion.logprobs, strict=True)))
    return worst


def wire_tensors(folder: Path) -> list[WireTensor]:
    """The checkpoint in ``folder`` as it goes over the wire."""
    return [
        WireTensor(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            data=memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")
            if tensor.ndim
            else memoryview(tensor.numpy().tobytes()),
        )
        for name, tensor in sorted(load_file(folder / "model.safetensors").items())
    ]
