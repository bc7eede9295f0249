"""Log-probabilities over the wire: what is asked for reaches the model, and what cannot be is refused by name."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from quartet.client.errors import translate
from quartet.common.v1 import common_pb2
from quartet.reference.v1 import reference_pb2, reference_pb2_grpc
from services.hosting.model import Hosting
from services.reference.logprobs import ReferenceItem, ReferenceModel, ReferenceResult
from services.reference.servicer import HostedReference, ReferenceServicer
from services.runtime.batcher import Batcher, BatchLimits
from services.runtime.telemetry import ServiceMetrics

OK = common_pb2.ITEM_STATUS_CODE_OK
INVALID = common_pb2.ITEM_STATUS_CODE_INVALID
RETRYABLE = common_pb2.ITEM_STATUS_CODE_RETRYABLE
LIMITS = BatchLimits(max_batch_tokens=1000, max_batch_items=4, max_queued_tokens=100_000)
LONGEST = 12


def exact(item: ReferenceItem) -> ReferenceResult:
    """Figures by which item, place and temperature can be told, and that float32 holds exactly."""
    response = item.token_ids[item.response_start :]
    logprobs = [-(i + token / 512) for i, token in enumerate(response)]
    return ReferenceResult(logprobs, [item.temperature + i for i in range(len(response))] if item.entropy else [])


@dataclass
class ScriptedReference:
    """What the servicer needs of a ReferenceModel; ``answer`` may be replaced."""

    vocab_size: int = 300
    max_sequence_tokens: int = LONGEST
    answer: Callable[[ReferenceItem], ReferenceResult] = exact
    seen: list[ReferenceItem] = field(default_factory=list)

    def logprobs(self, items: Sequence[ReferenceItem]) -> list[ReferenceResult]:
        self.seen += items
        return [self.answer(item) for item in items]


def item(token_ids: Sequence[int], response_start: int = 1) -> reference_pb2.LogProbsItem:
    return reference_pb2.LogProbsItem(token_ids=token_ids, response_start=response_start)


@dataclass
class House:
    """The servicer on a real server."""

    servicer: ReferenceServicer
    reference: Any
    stub: Any

    async def logprobs(self, items: Sequence[reference_pb2.LogProbsItem], **fields: Any) -> Any:
        request = reference_pb2.LogProbsRequest(items=items, **{"tokenizer_fingerprint": "ours", **fields})
        return await self.stub.LogProbs(request, timeout=20)

    async def refusal(self, items: Sequence[reference_pb2.LogProbsItem], **fields: Any) -> tuple[Any, str, str]:
        """Status, message and field of a refused request."""
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.logprobs(items, **fields)
        return refused.value.code(), refused.value.details() or "", translate(refused.value, "").field

    def metric(self, name: str, **labels: str) -> float:
        return self.servicer.metrics.registry.get_sample_value(f"quartet_reference_{name}", labels) or 0.0


@pytest.fixture
async def make_house(serve) -> AsyncIterator[Callable[..., Any]]:
    """await make_house(reference) serves it; its tokenizer's fingerprint is "ours"."""
    batchers = []

    async def make(reference: Any) -> House:
        servicer = ReferenceServicer(ServiceMetrics("reference"))
        batchers.append(Batcher(reference.logprobs, limits=LIMITS, metrics=servicer.metrics))
        served_by = common_pb2.ServedBy(model_id="m", tokenizer_fingerprint="ours")
        servicer.hosted = HostedReference(
            reference=reference, model=common_pb2.ModelInfo(served_by=served_by), batcher=batchers[-1]
        )
        channel = await serve(
            servicer.metrics, lambda server: reference_pb2_grpc.add_ReferenceServiceServicer_to_server(servicer, server)
        )
        return House(servicer, reference, reference_pb2_grpc.ReferenceServiceStub(channel))

    yield make
    for batcher in batchers:
        batcher.close()


@pytest.fixture
async def house(make_house) -> House:
    return await make_house(ScriptedReference())


async def test_results_stand_in_the_order_of_the_items_whatever_the_batches(house):
    draw = torch.Generator().manual_seed(0)
    asked = [
        item(torch.randint(0, 300, (n,), generator=draw).tolist(), start)
        for n, start in [(5, 2), (12, 1), (2, 1), (12, 11), (7, 3), (3, 1), (9, 8), (4, 2), (11, 5)]
    ]
    reply = await house.logprobs(asked)
    for one, result in zip(asked, reply.results, strict=True):
        assert (result.status.code, result.status.reason) == (OK, "")
        expected = exact(ReferenceItem(list(one.token_ids), one.response_start, 1.0, False))
        assert list(result.logprobs) == expected.logprobs
        assert list(result.entropies) == []
    assert reply.served_by == house.servicer.hosted.model.served_by
    assert 0 < reply.work.start_unix_ns <= reply.work.end_unix_ns
    assert house.metric("items_total", status="ITEM_STATUS_CODE_OK") == 9
    assert house.metric("tokens_total", kind="reference") == 5 + 12 + 2 + 12 + 7 + 3 + 9 + 4 + 11


async def test_a_request_of_more_items_than_are_taken_is_refused_before_any_of_them_is_looked_at(house):
    code, said, wrong_field = await house.refusal([item([])] * 16_385)
    assert (code, wrong_field) == (grpc.StatusCode.INVALID_ARGUMENT, "items")
    assert said == "items has 16385 items, a request may have 16384 (max_request_items); split it"
    assert house.metric("refused_total", reason="too_large") == 1
    assert house.metric("items_total", status="ITEM_STATUS_CODE_INVALID") == 0


async def test_the_longest_request_is_answered_in_order(house):
    asked = [item([n % 300, n // 300]) for n in range(16_384)]
    results = (await house.logprobs(asked)).results
    expected = [exact(ReferenceItem([n % 300, n // 300], 1, 1.0, False)).logprobs for n in range(16_384)]
    assert [list(result.logprobs) for result in results] == expected


@pytest.mark.parametrize(("asked", "told"), [(None, 1.0), (0.5, 0.5), (2.0, 2.0), (2.0**-60, 2.0**-60)])
async def test_the_model_is_told_the_temperature_and_whether_entropies_are_wanted(house, asked, told):
    fields = {} if asked is None else {"temperature": asked}
    (result,) = (await house.logprobs([item([5, 6, 7])], return_entropy=True, **fields)).results
    assert house.reference.seen == [ReferenceItem([5, 6, 7], 1, told, True)]
    assert list(result.entropies) == [torch.tensor(told + i).item() for i in range(2)]


@pytest.mark.parametrize("wrong", [0.0, -0.5, math.nan, math.inf])
async def test_a_temperature_that_no_softmax_has_refuses_the_request(house, wrong):
    code, said, wrong_field = await house.refusal([item([5, 6])], temperature=wrong)
    assert (code, wrong_field) == (grpc.StatusCode.INVALID_ARGUMENT, "temperature")
    assert said == f"temperature is {wrong}, must be a finite number greater than 0"
    assert house.reference.seen == []


async def test_nobodys_and_anothers_token_ids_are_refused_and_so_is_an_empty_request(house):
    code, said, wrong_field = await house.refusal([item([5, 6])], tokenizer_fingerprint="")
    assert (code, wrong_field) == (grpc.StatusCode.INVALID_ARGUMENT, "tokenizer_fingerprint")
    assert "token ids are accepted only with the fingerprint" in said
    code, said, wrong_field = await house.refusal([item([5, 6])], tokenizer_fingerprint="theirs")
    assert (code, wrong_field) == (grpc.StatusCode.FAILED_PRECONDITION, "tokenizer_fingerprint")
    assert "tokenizer_fingerprint is theirs..., this service's tokenizer is ours..." in said
    assert await house.refusal([]) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "items is empty: send at least one",
        "items",
    )


async def test_each_refused_item_says_why_and_never_reaches_the_model(house):
    ids = list(range(20, 33))
    results = (
        await house.logprobs(
            [
                item([5, 6]),
                item([]),
                item([5]),  # There is nothing before its only token.
                item([5, 6], 0),
                item([5, 6], 2),
                item([5, 6], -1),
                item([5, 300]),
                item([-2, 5]),
                item(ids),
                item(ids[:LONGEST], LONGEST - 1),
            ]
        )
    ).results
    assert [r.status.code for r in results] == [OK, *[INVALID] * 8, OK]
    for place, reason in enumerate(
        [
            "",
            "token_ids is empty",
            "response_start is 1, must lie in [1, 0]: ",
            "response_start is 0, must lie in [1, 1]: the first token has nothing before it to be predicted from",
            "response_start is 2, must lie in [1, 1]: ",
            "response_start is -1, must lie in [1, 1]: ",
            "token id 300 lies outside the vocabulary, [0, 300)",
            "token id -2 lies outside the vocabulary, [0, 300)",
            "token_ids has 13 tokens, the model takes 12",
            "",
        ]
    ):
        assert results[place].status.reason.startswith(reason)
        assert bool(results[place].status.reason) is bool(results[place].status.code != OK)
        assert (len(results[place].logprobs) > 0) is (results[place].status.code == OK)
    assert sorted(len(seen.token_ids) for seen in house.reference.seen) == [2, LONGEST]
    assert house.metric("items_total", status="ITEM_STATUS_CODE_INVALID") == 8
    (alone,) = (await house.logprobs([item([])])).results
    assert alone.status.code == INVALID


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["a log-probability", "an entropy"])
async def test_a_figure_that_is_no_number_makes_its_item_invalid_alone(house, wrong, name):
    broken = (
        ReferenceResult([-1.0, wrong], [1.0, 2.0]) if "log" in name else ReferenceResult([-1.0, -2.0], [1.0, wrong])
    )
    house.reference.answer = lambda one: broken if 66 in one.token_ids else exact(one)
    asked = [item([5, 6]), item([5, 66, 7]), item([5, 8])]
    first, bad, last = (await house.logprobs(asked, return_entropy=True)).results
    assert (first.status.code, last.status.code) == (OK, OK)
    assert (bad.status.code, bad.status.reason) == (INVALID, f"the model gives {name} that is not a finite number")
    assert (list(bad.logprobs), list(bad.entropies)) == ([], [])


async def test_a_batch_that_failed_may_be_asked_again_and_the_other_batches_are_answered(house):
    def answer(one: ReferenceItem) -> ReferenceResult:
        if 66 in one.token_ids:
            raise RuntimeError("a secret")
        return exact(one)

    house.reference.answer = answer
    # Batches have four items at most, neighbours in length.
    asked = [*[item([5, 6])] * 4, *[item([5, 5, 5, 66])] * 4]
    results = (await house.logprobs(asked)).results
    assert [r.status.code for r in results] == [*[OK] * 4, *[RETRYABLE] * 4]
    assert {r.status.reason for r in results[4:]} == {"the model failed: RuntimeError"}
    house.reference.answer = exact
    assert {r.status.code for r in (await house.logprobs(asked)).results} == {OK}


async def test_before_the_model_is_loaded_the_service_says_so(house):
    house.servicer.hosted = None
    assert (await house.refusal([item([5, 6])]))[0] is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await house.stub.GetModelInfo(reference_pb2.GetModelInfoRequest())
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_real_model_answers_with_its_own_figures_and_refuses_those_that_overflow(
    make_house, make_policy, tokenizer
):
    folder = make_policy(seed=3)
    hosting = Hosting(device=torch.device("cpu"), dtype=torch.float32)
    house = await make_house(ReferenceModel(folder, hosting=hosting, tokenizer=tokenizer, chunk_bytes=2**16))
    asked = [item(list(range(5, 5 + n)), start) for n, start in [(2, 1), (60, 20), (128, 127), (31, 1), (60, 59)]]
    results = (await house.logprobs(asked, temperature=0.5, return_entropy=True)).results
    exact_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for one, result in zip(asked, results, strict=True):
        with torch.inference_mode():
            table_SV = (exact_model(torch.tensor([list(one.token_ids)])).logits[0] / 0.5).log_softmax(-1)
        places = range(one.response_start, len(one.token_ids))
        logprobs = [table_SV[t - 1, one.token_ids[t]].item() for t in places]
        entropies = [-(table_SV[t - 1].exp() * table_SV[t - 1]).sum().item() for t in places]
        assert list(result.logprobs) == pytest.approx(logprobs, abs=5e-5)
        assert list(result.entropies) == pytest.approx(entropies, abs=5e-5)
    # Logits divided by next to nothing are no numbers any more: no figure is better than a wrong one.
    for result in (await house.logprobs(asked, temperature=1e-40, return_entropy=True)).results:
        assert result.status.code == INVALID
        assert (len(result.logprobs), len(result.entropies)) == (0, 0)
