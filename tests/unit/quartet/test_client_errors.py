"""Every status comes out as the typed error that says what to do, with field and request id."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from quartet.client import (
    AlreadyExistsError,
    CallPolicy,
    CredentialsError,
    DamagedError,
    DeadlineError,
    InvalidInputError,
    ItemFailure,
    LogProbs,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    QuartetError,
    ReferenceClient,
    RewardClient,
    Score,
    ScoreItem,
    ServiceFailedError,
    TokenSequence,
    UnavailableError,
    WeightsClient,
    WireTensor,
)
from quartet.common.v1 import common_pb2
from quartet.reference.v1 import reference_pb2, reference_pb2_grpc
from quartet.reward.v1 import reward_pb2

from .conftest import abort

ITEM = ScoreItem(prompt="a", response="b")
ONCE = CallPolicy(patience_s=0.0)
EXPECTED = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInputError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.UNIMPLEMENTED: InvalidInputError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.ABORTED: PreconditionError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.DATA_LOSS: DamagedError,
    grpc.StatusCode.INTERNAL: ServiceFailedError,
    grpc.StatusCode.UNKNOWN: ServiceFailedError,
    grpc.StatusCode.PERMISSION_DENIED: CredentialsError,
    grpc.StatusCode.UNAUTHENTICATED: CredentialsError,
}


@pytest.mark.parametrize("code", EXPECTED)
async def test_a_status_becomes_its_typed_error(start_scripted, code):
    service = await start_scripted(abort(code, "what went wrong"))
    async with RewardClient(service.address, policy=ONCE) as client:
        with pytest.raises(QuartetError) as failed:
            await client.score([ITEM])
    error = failed.value
    assert type(error) is EXPECTED[code]
    assert (error.code, error.message, error.service, error.field) == (code, "what went wrong", "reward service", "")
    assert str(error) == f"reward service: what went wrong (request id {error.request_id})"
    assert error.request_id == service.metadata[0]["quartet-request-id"] != ""
    assert service.calls == 1


@pytest.mark.parametrize(("mib", "limit_mib", "who"), [(2, 1, "CLIENT"), (5, 64, "SERVER")])
async def test_a_message_that_is_too_large_is_refused_at_once_and_says_what_to_do(start_scripted, mib, limit_mib, who):
    """gRPC says RESOURCE_EXHAUSTED, as an overloaded service does, but waiting will not help."""
    service = await start_scripted()  # With gRPC's default limit, 4 MiB.
    item = ScoreItem(prompt="a" * (mib * 2**20), response="b")
    async with RewardClient(service.address, policy=CallPolicy(patience_s=60.0, max_message_mib=limit_mib)) as client:
        async with asyncio.timeout(10):
            with pytest.raises(InvalidInputError, match=rf"{who}.*larger than max.*max_message_mib of CallPolicy"):
                await client.score([item])
        assert (await client.score([ITEM])).results  # The connection goes on.
    assert service.calls == 1


async def test_the_field_named_in_the_details_comes_out(start_scripted):
    violation = error_details_pb2.BadRequest.FieldViolation(field="items", description="is empty")
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    code = grpc.StatusCode.INVALID_ARGUMENT
    status = status_pb2.Status(code=code.value[0], message="items is empty", details=[detail])
    service = await start_scripted(
        abort(code, "items is empty", ("grpc-status-details-bin", status.SerializeToString()))
    )
    async with RewardClient(service.address) as client:
        with pytest.raises(InvalidInputError, match="items is empty") as refused:
            await client.score([ITEM])
    assert refused.value.field == "items"


async def test_every_call_has_a_request_id_of_its_own(start_scripted):
    service = await start_scripted()
    async with RewardClient(service.address) as client:
        for _ in range(3):
            await client.score([ITEM])
    assert len({metadata["quartet-request-id"] for metadata in service.metadata}) == 3


async def test_a_failed_item_is_a_failure_and_never_a_number(start_scripted):
    async def mixed(request, context):
        def status(code, reason=""):
            return common_pb2.ItemStatus(code=code, reason=reason)

        return reward_pb2.ScoreResponse(
            results=[
                reward_pb2.ScoreResult(status=status(common_pb2.ITEM_STATUS_CODE_OK), score=-2.5, token_count=3),
                reward_pb2.ScoreResult(status=status(common_pb2.ITEM_STATUS_CODE_INVALID, "too long"), score=9.0),
                reward_pb2.ScoreResult(status=status(common_pb2.ITEM_STATUS_CODE_RETRYABLE, "model failed")),
                reward_pb2.ScoreResult(score=7.0),  # A service that forgot the status.
            ]
        )

    service = await start_scripted(mixed)
    async with RewardClient(service.address) as client:
        results = (await client.score([ITEM] * 4)).results
    assert results[0] == Score(score=-2.5, normalised_score=None, token_count=3, truncated=False)
    assert results[1] == ItemFailure(reason="too long", retryable=False)
    assert results[2] == ItemFailure(reason="model failed", retryable=True)
    assert isinstance(results[3], ItemFailure)


async def test_fewer_results_than_items_are_a_failure_of_the_service(start_scripted):
    async def short(request, context):
        ok = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)
        return reward_pb2.ScoreResponse(results=[reward_pb2.ScoreResult(status=ok, score=1.0)])

    service = await start_scripted(short)
    async with RewardClient(service.address) as client:
        with pytest.raises(ServiceFailedError, match="1 results for 2 items"):
            await client.score([ITEM, ITEM])


async def test_log_probabilities_of_another_length_than_the_response_are_a_failure():
    ok = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)

    class Short(reference_pb2_grpc.ReferenceServiceServicer):
        async def LogProbs(self, request, context):
            results = [reference_pb2.LogProbsResult(status=ok, logprobs=[-1.0, -2.0]) for _ in request.items]
            return reference_pb2.LogProbsResponse(results=results)

    server = grpc.aio.server()
    reference_pb2_grpc.add_ReferenceServiceServicer_to_server(Short(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    items = [TokenSequence(token_ids=[1] * (2 + tokens), response_start=2) for tokens in (2, 3)]
    async with ReferenceClient(f"127.0.0.1:{port}") as client:
        whole, short = (await client.logprobs(items, tokenizer_fingerprint="f")).results
    await server.stop(0)
    assert whole == LogProbs(logprobs=(-1.0, -2.0), entropies=())
    assert short == ItemFailure(reason="the service gave 2 log-probabilities for 3 response tokens", retryable=False)


async def test_a_stream_that_is_refused_while_it_is_written_comes_out_with_the_services_status():
    """The refusal may arrive before, in, or after a write, which fails by itself then."""

    class Refuse(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation, details):
            if "Weights" not in details.method:
                return await continuation(details)

            async def handle(requests, context):
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")

            return grpc.stream_unary_rpc_method_handler(handle)

    server = grpc.aio.server(interceptors=[Refuse()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        tensors = [WireTensor(name="w", dtype="F32", shape=(1,), data=memoryview(b"abcd"))]
        for _ in range(300):
            async with WeightsClient(f"127.0.0.1:{port}", policy=ONCE) as weights:
                updates = [weights.update(tensors, weights_version=version) for version in (1, 2)]
                refused = await asyncio.gather(*updates, return_exceptions=True)
            assert [type(error) for error in refused] == [CredentialsError] * 2
    finally:
        await server.stop(None)
