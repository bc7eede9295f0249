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
FIGURES = ("logprobs", "entropies")
TOKENIZER = SimpleNamespace(pad_token_id=0, model_max_length=256)


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


def load(folder: Path, chunk_bytes: int = 2**20, dtype: torch.dtype = torch.float32) -> ReferenceModel:
    hosting = Hosting(device=torch.device("cpu"), dtype=dtype)
    return ReferenceModel(folder, hosting=hosting, tokenizer=TOKENIZER, chunk_bytes=chunk_bytes)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Phi", {"num_key_value_heads": 4}),  # A bias of the vocabulary.
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 3.0}),
        ("Granite", {"logits_scaling": 0.2}),
    ],
)
def test_in_half_precision_no_logit_is_rounded(kind, changes, dtype, tmp_path, monkeypatch):
    """The figures are those of the hidden states in float64; from logits in half precision they are far off."""
    monkeypatch.setattr(reference, "_CPU_PART", 64)
    folder = save(tmp_path, kind, **changes)
    head: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).get_output_embeddings()
    weight_VD, bias = head.weight.detach().double(), getattr(head, "bias", None)
    model = load(folder, chunk_bytes=2 * 4 * 64 * 7, dtype=dtype)
    seen: list[torch.Tensor] = []
    hidden_states = model.hidden_states

    def spied(*arguments: Any) -> torch.Tensor:
        seen.append(hidden_states(*arguments))
        return seen[-1]

    monkeypatch.setattr(model, "hidden_states", spied)
    results = model.logprobs(items(0.7))
    assert seen[0].dtype == dtype

    logits_NV = seen[0].double() @ weight_VD.T
    if bias is not None:
        logits_NV += bias.detach().double()
    logits_NV /= changes.get("logits_scaling", 1.0)
    if cap := changes.get("final_logit_softcapping"):
        logits_NV = cap * torch.tanh(logits_NV / cap)
    targets_N = torch.tensor([token for item in items(0.7) for token in item.token_ids[item.response_start :]])

    def figures(logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table_NV = (logits_NV / 0.7).log_softmax(-1)
        return table_NV.gather(1, targets_N[:, None])[:, 0], -(table_NV.exp() * table_NV).sum(-1)

    found = [torch.tensor([x for result in results for x in getattr(result, name)]) for name in FIGURES]
    for found_N, exact_N, rounded_N in zip(
        found, figures(logits_NV), figures(logits_NV.to(dtype).double()), strict=True
    ):
        assert (found_N - exact_N).abs().max() < 1e-5
        assert (rounded_N - exact_N).abs().max() > 1e-4


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


def test_a_model_whose_body_gives_no_hidden_states_is_refused(tmp_path):
    changes = {"num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 96}
    folder = save(tmp_path, "Llama4Text", **changes)
    message = "Llama4ForCausalLM gives MoeCausalLMOutputWithPast without last_hidden_state"
    with pytest.raises(StartError, match=message):
        load(folder)


@pytest.mark.parametrize("positions", [1, 2, 3, 100])
@pytest.mark.parametrize("part", [1, 7, 300])
def test_wherever_chunks_and_parts_begin_the_figures_are_the_same(tmp_path, monkeypatch, positions, part):
    folder = save(tmp_path, "Llama")
    whole = load(folder).logprobs(items(0.8))
    monkeypatch.setattr(reference, "_CPU_PART", part)
    model = load(folder, chunk_bytes=2 * 4 * part * positions)
    assert (len(model.head.parts), model.chunk_positions) == (-(-300 // part), positions)
    for found, expected in zip(model.logprobs(items(0.8)), whole, strict=True):
        assert found.logprobs == pytest.approx(expected.logprobs, abs=2e-5)
        assert found.entropies == pytest.approx(expected.entropies, abs=2e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_no_companion_and_no_padding_changes_a_figure(tmp_path, packed):
    model = load(save(tmp_path, "Llama"))
    assert model.hidden_states.packed
    if not packed:
        model.hidden_states.packed = False
        model.model.set_attn_implementation("sdpa")
    batch = items(0.7)
    alone = [model.logprobs([item])[0] for item in batch]
    for order in (batch, batch[::-1], [*batch, *batch]):
        for item, found in zip(order, model.logprobs(order), strict=True):
            expected = alone[batch.index(item)]
            assert len(found.logprobs) == len(item.token_ids) - item.response_start
            assert found.logprobs == pytest.approx(expected.logprobs, abs=2e-5)
            assert found.entropies == pytest.approx(expected.entropies, abs=2e-5)
    padded = model.logprobs(batch)
    model.hidden_states.pad_id = 299  # What padding is filled with makes no difference, not in a single bit.
    assert model.logprobs(batch) == padded


def test_figures_of_a_part_of_a_response_are_those_of_the_whole(tmp_path):
    """Where the response begins says what is told, and not what is computed."""
    model = load(save(tmp_path, "Llama"))
    ids = list(range(3, 43))
    whole, part, last = model.logprobs([ReferenceItem(ids, start, 0.9, True) for start in (1, 15, 39)])
    assert part.logprobs == pytest.approx(whole.logprobs[14:], abs=2e-5)
    assert part.entropies == pytest.approx(whole.entropies[14:], abs=2e-5)
    assert (len(last.logprobs), len(last.entropies)) == (1, 1)
    assert last.logprobs == pytest.approx(whole.logprobs[-1:], abs=2e-5)


def test_probabilities_of_all_next_tokens_add_up_to_one_and_give_the_entropy(tmp_path):
    model = load(save(tmp_path, "Llama"))
    results = model.logprobs([ReferenceItem([5, 6, 7, token], 3, 0.6, True) for token in range(300)])
    logprobs_V = torch.tensor([result.logprobs[0] for result in results], dtype=torch.float64)
    assert logprobs_V.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    entropy = -(logprobs_V.exp() * logprobs_V).sum().item()
    assert [result.entropies[0] for result in results] == pytest.approx([entropy] * 300, abs=2e-4)


def test_a_model_whose_logits_are_no_plain_projection_is_refused(tmp_path):
    # BERT transforms its hidden states once more before it projects them.
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        is_decoder=True,
    )
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    with pytest.raises(StartError, match="its logits are not a plain projection of its last hidden state"):
        load(tmp_path)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def of_no_known_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nothing-known"}')


@pytest.mark.parametrize("damage", [without_weights, cut_off, of_no_known_kind])
def test_a_folder_that_does_not_load_is_refused_in_one_line(tmp_path, damage):
    damage(save(tmp_path, "Llama"))
    with pytest.raises(StartError, match=r"model '.*' does not load as a causal language model: "):
        load(tmp_path)
