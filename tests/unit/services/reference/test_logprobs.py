"""Log-probabilities in parts and chunks against the full table of logits in float64.

Shapes: S tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from services.hosting.model import Hosting
from services.reference import logprobs as reference
from services.reference.logprobs import ReferenceItem, ReferenceModel
from services.runtime.errors import StartError

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
TOKENIZER = SimpleNamespace(pad_token_id=0, model_max_length=256)
ON_CPU = Hosting(device=torch.device("cpu"), dtype=torch.float32)


def save(folder: Path, kind: str, **changes: Any) -> Path:
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**(SMALL | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))  # Biases that matter.
    model.save_pretrained(folder)
    return folder


def load(folder: Path, chunk_bytes: int = 2**20) -> ReferenceModel:
    return ReferenceModel(folder, hosting=ON_CPU, tokenizer=TOKENIZER, chunk_bytes=chunk_bytes)


def items(temperature: float, entropy: bool = True) -> list[ReferenceItem]:
    draw = torch.Generator().manual_seed(5)
    return [
        ReferenceItem(torch.randint(0, 300, (n,), generator=draw).tolist(), start, temperature, entropy)
        for n, start in [(2, 1), (30, 10), (90, 1), (5, 4), (77, 50)]
    ]


@torch.inference_mode()
def naive(folder: Path, item: ReferenceItem) -> tuple[list[float], list[float]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    logits_SV = model(input_ids=torch.tensor([item.token_ids])).logits[0] / item.temperature
    table_SV = logits_SV.double().log_softmax(-1)
    where = range(item.response_start, len(item.token_ids))
    logprobs = [table_SV[t - 1, item.token_ids[t]].item() for t in where]
    return logprobs, [-(table_SV[t - 1].exp() * table_SV[t - 1]).sum().item() for t in where]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"tie_word_embeddings": False}),
        ("Phi", {"num_key_value_heads": 4}),  # A bias of the vocabulary.
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 3.0}),
        ("Granite", {"logits_scaling": 5.0}),
        ("Cohere", {"logit_scale": 0.25}),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_parts_of_the_vocabulary_and_chunks_of_positions_give_the_whole_tables_figures(
    kind, changes, temperature, tmp_path, monkeypatch
):
    monkeypatch.setattr(reference, "_CPU_PART", 64)  # 300 tokens: five parts, the last one shorter.
    folder = save(tmp_path, kind, **changes)
    model = load(folder, chunk_bytes=2 * 4 * 64 * 7)
    assert (len(model.head.parts), model.chunk_positions) == (5, 7)
    for item, result in zip(items(temperature), model.logprobs(items(temperature)), strict=True):
        logprobs, entropies = naive(folder, item)
        assert result.logprobs == pytest.approx(logprobs, abs=5e-5)
        assert result.entropies == pytest.approx(entropies, abs=5e-5)
    alone = model.logprobs(items(temperature, entropy=False))
    assert all(result.entropies == [] for result in alone)


def test_items_of_one_batch_have_temperatures_and_wishes_of_their_own(tmp_path):
    model = load(save(tmp_path, "Llama"))
    mixed = [
        ReferenceItem([5, 6, 7, 8], 1, temperature, entropy)
        for temperature, entropy in [(1.0, True), (0.5, False), (2.0, True)]
    ]
    for item, result in zip(mixed, model.logprobs(mixed), strict=True):
        logprobs, entropies = naive(tmp_path, item)
        assert result.logprobs == pytest.approx(logprobs, abs=5e-5)
        assert result.entropies == (pytest.approx(entropies, abs=5e-5) if item.entropy else [])


def test_logits_far_apart_neither_overflow_nor_vanish(tmp_path):
    folder = save(tmp_path, "Llama", tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(500.0)
    model.save_pretrained(folder)
    item = ReferenceItem(list(range(3, 40)), 1, 1.0, True)
    (result,) = load(folder).logprobs([item])
    logprobs, entropies = naive(folder, item)
    assert min(logprobs) < -1000
    assert result.logprobs == pytest.approx(logprobs, rel=1e-4)
    assert result.entropies == pytest.approx(entropies, abs=1e-2)


def test_a_folder_that_is_no_language_model_is_refused(tmp_path, make_reward_model):
    with pytest.raises(StartError, match="is not a language model: its checkpoint lacks lm_head"):
        load(make_reward_model())
