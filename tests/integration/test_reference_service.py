"""The reference service, live, against naive float64."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from quartet.client import InvalidInputError, ItemFailure, PreconditionError, ReferenceClient, TokenSequence
from quartet.fingerprint import tokenizer_fingerprint


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request, make_policy):
    return make_policy(seed=11, tied=request.param == "tied")


@pytest.fixture(scope="module")
def service(start_service, folder):
    return start_service("reference", folder)


def naive(folder, ids, start, temperature):
    """Log-probabilities and entropies of ids[start:] by the full float64 logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits_SV = model(input_ids=torch.tensor([ids])).logits[0] / temperature
    table_SV = logits_SV.log_softmax(-1)
    logprobs = [table_SV[t - 1, ids[t]].item() for t in range(start, len(ids))]
    entropies = [-(table_SV[t - 1].exp() * table_SV[t - 1]).sum().item() for t in range(start, len(ids))]
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
async def test_log_probabilities_and_entropies_equal_naive_float64(service, folder, tokenizer, temperature):
    generator = torch.Generator().manual_seed(5)
    items = [
        TokenSequence(token_ids=torch.randint(0, 300, (n,), generator=generator).tolist(), response_start=start)
        for n, start in [(2, 1), (30, 10), (128, 1), (5, 4), (77, 50)]
    ]
    async with ReferenceClient(service.address) as client:
        reply = await client.logprobs(
            items,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            temperature=temperature,
            return_entropy=True,
        )
    for item, result in zip(items, reply.results, strict=True):
        logprobs, entropies = naive(folder, item.token_ids, item.response_start, temperature)
        assert result.logprobs == pytest.approx(logprobs, abs=2e-5)
        assert result.entropies == pytest.approx(entropies, abs=2e-5)


async def test_bad_items_are_refused_alone(service, tokenizer):
    items = [
        TokenSequence(token_ids=[5, 6, 7], response_start=1),
        TokenSequence(token_ids=[], response_start=1),
        TokenSequence(token_ids=[5, 6, 7], response_start=0),
        TokenSequence(token_ids=[5, 6, 7], response_start=3),
        TokenSequence(token_ids=[5, -6, 7], response_start=1),
        TokenSequence(token_ids=[5] * 129, response_start=1),
    ]
    async with ReferenceClient(service.address) as client:
        reply = await client.logprobs(items, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    reasons = [r.reason if isinstance(r, ItemFailure) else "" for r in reply.results]
    assert reasons[0] == ""
    assert reasons[1] == "token_ids is empty"
    assert "response_start is 0, must lie in [1, 2]" in reasons[2]
    assert "response_start is 3, must lie in [1, 2]" in reasons[3]
    assert "token id -6 lies outside the vocabulary, [0, 300)" in reasons[4]
    assert "129 tokens, the model takes 128" in reasons[5]


async def test_wrong_requests_are_refused_whole(service, tokenizer):
    fingerprint = tokenizer_fingerprint(tokenizer)
    item = TokenSequence(token_ids=[5, 6], response_start=1)
    async with ReferenceClient(service.address) as client:
        with pytest.raises(InvalidInputError, match="items is empty"):
            await client.logprobs([], tokenizer_fingerprint=fingerprint)
        for bad in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(InvalidInputError, match="temperature is") as refused:
                await client.logprobs([item], tokenizer_fingerprint=fingerprint, temperature=bad)
            assert refused.value.field == "temperature"
        with pytest.raises(PreconditionError, match="send text instead"):
            await client.logprobs([item], tokenizer_fingerprint="f" * 64)


async def test_weights_do_not_change_and_answers_do_not_either(service, tokenizer):
    """Row 22: the reference is frozen."""
    item = TokenSequence(token_ids=list(range(3, 40)), response_start=7)
    async with ReferenceClient(service.address) as client:
        first = await client.logprobs([item], tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
        for _ in range(5):
            again = await client.logprobs([item] * 3, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
            assert again.served_by == first.served_by
            for result in again.results:
                assert result.logprobs == pytest.approx(first.results[0].logprobs, abs=1e-5)
