"""Exact KL and entropy against float64 tables of every token, and against their own estimates by sampling."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from tests.conftest import llama_config
from trainer.encoding import EncodedResponse
from trainer.exact_kl import distributions, evaluating
from trainer.models import disable_dropout


def rows(seed: int = 0, count: int = 5) -> list[EncodedResponse]:
    random = np.random.default_rng(seed)
    lengths = [(2 + index % 3, 1 + 2 * index) for index in range(count)]
    return [
        EncodedResponse(
            ids=random.integers(3, 60, prompt + response).astype(np.int32), prompt_tokens=prompt, truncated=False
        )
        for prompt, response in lengths
    ]


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    disable_dropout(model)
    return model


def gemma(seed: int) -> Gemma2ForCausalLM:
    """Its logits are capped: they are not hidden states times output weights."""
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=0.5,
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20.0)
    return model


def naive(policy, reference, row: EncodedResponse, temperature: float) -> tuple[float, float]:
    """Of one response: sum p log(p / q) and -sum p log p over all tokens, by loops over float64 tables."""
    ids = torch.tensor(row.ids.tolist())[None]
    tables = [
        (model.double().eval()(ids).logits[0] / temperature).log_softmax(-1).detach().numpy()
        for model in (policy, reference)
    ]
    kl = entropy = 0.0
    for place in range(row.prompt_tokens, len(row)):
        for log_p, log_q in zip(tables[0][place - 1], tables[1][place - 1], strict=True):
            kl += np.exp(log_p) * (log_p - log_q)
            entropy -= np.exp(log_p) * log_p
    return kl, entropy


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_both_are_those_of_whole_float64_tables(make, temperature):
    policy, reference = make(1), make(2)
    policy.train()
    batch = rows()
    found = {
        tokens: distributions(
            policy,
            reference,
            batch,
            temperature=temperature,
            pad_id=0,
            micro_batch_tokens=tokens,
            precision="float32",
        )
        for tokens in (1, 40, 10_000)
    }
    assert policy.training  # As it was.
    expected = [naive(policy, reference, row, temperature) for row in batch]
    assert min(kl for kl, _ in expected) > 0.01
    for each in found.values():
        assert each.kl == pytest.approx([kl for kl, _ in expected], rel=1e-4)
        assert each.entropy == pytest.approx([entropy for _, entropy in expected], rel=1e-4)


def test_a_policy_is_at_no_distance_from_itself_and_without_a_reference_there_is_none():
    policy = llama(1)
    kept = {"temperature": 1.0, "pad_id": 0, "micro_batch_tokens": 64, "precision": "float32"}
    assert distributions(policy, policy, rows(), **kept).kl == pytest.approx([0.0] * 5, abs=1e-6)
    alone = distributions(policy, None, rows(), **kept)
    assert alone.kl is None
    assert alone.entropy == distributions(policy, policy, rows(), **kept).entropy


def test_it_is_what_sampled_kl_and_surprise_are_on_average():
    """Many one-token answers drawn from pi: log pi - log ref and -log pi have these means."""
    policy, reference = llama(3), llama(4)
    row = rows(seed=2, count=1)[0]
    exact = distributions(
        policy, reference, [row], temperature=1.0, pad_id=0, micro_batch_tokens=64, precision="float32"
    )
    prompt = torch.tensor(row.ids[: row.prompt_tokens].tolist())[None]
    with torch.no_grad():
        log_p, log_q = (model.eval()(prompt).logits[0, -1].log_softmax(-1) for model in (policy, reference))
    drawn = torch.multinomial(log_p.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    for values, nats in ((log_p[drawn] - log_q[drawn], exact.kl[0]), (-log_p[drawn], exact.entropy[0])):
        assert float(values.mean()) == pytest.approx(nats, abs=4 * float(values.std()) / 200_000**0.5)


def test_the_mode_comes_back_after_an_error():
    model = llama(1).train()
    with contextlib.suppress(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert model.training
