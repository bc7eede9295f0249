"""Around every call: errors become a status with details, and are counted and logged under the request id."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from quartet.client import (
    CallPolicy,
    DamagedError,
    DeadlineError,
    InvalidInputError,
    OverloadedError,
    PolicyClient,
    PreconditionError,
    QuartetError,
    RewardClient,
    Sampling,
    ScoreItem,
    ServiceFailedError,
    UnavailableError,
)
from quartet.client.errors import pushback_s
from quartet.common.v1 import common_pb2
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.runtime import errors
from services.runtime.interceptors import CallInterceptor
from services.runtime.telemetry import ServiceMetrics

ONCE = CallPolicy(patience_s=0.0)
ITEM = ScoreItem(prompt="a", response="b")
OK = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)


class House(reward_pb2_grpc.RewardServiceServicer, policy_pb2_grpc.PolicyServiceServicer):
    """Raises ``error`` where there is one; a stream does so after two replies, of so many ``tokens``."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.tokens = 1
        self.left = asyncio.Event()
        self.metrics = ServiceMetrics("test")

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        if self.error is not None:
            raise self.error
        return reward_pb2.ScoreResponse(results=[reward_pb2.ScoreResult(status=OK, score=1.0)])

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[policy_pb2.GenerateResponse]:
        count = self.tokens
        completion = policy_pb2.Completion(token_ids=[1] * count, logprobs=[-1.0] * count, finish_reason=2)
        try:
            for index in range(3):
                if index == 2:
                    if self.error is not None:
                        raise self.error
                    await asyncio.sleep(30)
                yield policy_pb2.GenerateResponse(sample_index=index, status=OK, completion=completion)
        finally:
            self.left.set()

    def counted(self, method: str, code: str) -> float:
        return (
            self.metrics.registry.get_sample_value("quartet_test_calls_total", {"method": method, "code": code}) or 0.0
        )


@pytest.fixture
async def house() -> AsyncIterator[tuple[House, str]]:
    service = House()
    server = grpc.aio.server(interceptors=[CallInterceptor(service.metrics)])
    reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    await server.stop(0)


async def test_calls_that_the_end_cuts_short_are_told_to_try_again_also_where_the_client_does_not_read():
    """While gRPC sends a reply the call is in its hands, and not ours to cancel: it ends when the client reads on."""
    sent = 0

    async def pour(request: bytes, context: Any) -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(200):
            yield bytes(2**20)
            sent += 1

    async def wait(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    metrics = ServiceMetrics("test")
    interceptor = CallInterceptor(metrics)
    server = grpc.aio.server(interceptors=[interceptor])
    handlers = {"pour": grpc.unary_stream_rpc_method_handler(pour), "wait": grpc.unary_unary_rpc_method_handler(wait)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            replies = aiter(channel.unary_stream("/test/pour")(b""))
            await anext(replies)
            waiting = channel.unary_unary("/test/wait")(b"")
            before = -1
            while before != sent or len(interceptor._in_hand) < 2:  # Until there is no room for more.
                before = sent
                await asyncio.sleep(0.3)
            assert sent < 100
            interceptor.end_calls()
            with pytest.raises(grpc.aio.AioRpcError) as told_waiting:
                await waiting
            with pytest.raises(grpc.aio.AioRpcError) as told_reading:
                async for _ in replies:
                    pass
            for told in (told_waiting.value, told_reading.value):
                assert told.code() is grpc.StatusCode.UNAVAILABLE
                assert told.details() == "the service is ending and could not finish this call in time; try again"
            assert sent == before  # Nothing after the one on its way.
            assert not interceptor._in_hand
    finally:
        await server.stop(0)
    for method in ("pour", "wait"):
        labels = {"method": method, "code": "UNAVAILABLE"}
        assert metrics.registry.get_sample_value("quartet_test_calls_total", labels) == 1


@pytest.mark.parametrize(
    ("error", "typed", "code"),
    [
        (errors.InvalidArgumentError("n is 0, must be at least 1", field="n"), InvalidInputError, "INVALID_ARGUMENT"),
        (errors.FailedPreconditionError("another tokenizer", field="t"), PreconditionError, "FAILED_PRECONDITION"),
        (errors.AbortedError("another update is under way"), PreconditionError, "ABORTED"),
        (errors.OverloadedError("full", retry_after_ms=250), OverloadedError, "RESOURCE_EXHAUSTED"),
        (errors.UnavailableError("loading"), UnavailableError, "UNAVAILABLE"),
        (errors.DeadlineExceededError("too late"), DeadlineError, "DEADLINE_EXCEEDED"),
        (errors.DataLossError("checksum differs"), DamagedError, "DATA_LOSS"),
        (errors.InternalError("the engine died"), ServiceFailedError, "INTERNAL"),
    ],
)
async def test_an_error_of_ours_becomes_its_status_with_message_and_field(house, error, typed, code):
    service, address = house
    service.error = error
    async with RewardClient(address, policy=ONCE) as client:
        with capture_logs() as logs, pytest.raises(QuartetError) as failed:
            await client.score([ITEM])
    assert type(failed.value) is typed
    assert (failed.value.message, failed.value.field) == (error.message, error.field)
    assert service.counted("Score", code) == 1
    assert str(failed.value) == f"reward service: {error.message} (request id {failed.value.request_id})"
    assert logs == [
        {
            "event": "call_refused",
            "log_level": "warning",
            "request_id": failed.value.request_id,
            "method": "Score",
            "code": code,
            "seconds": logs[0]["seconds"],
            "caller": logs[0]["caller"],
            "items": 0,
            "tokens": 0,
            "weights_version": None,
            **({"field": error.field} if error.field else {}),
            "reason": error.message,
        }
    ]
    assert logs[0]["caller"].startswith("ipv4:127.0.0.1:")


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\U0001d518", "%", "\n"])
async def test_an_error_that_quotes_a_large_request_still_comes_as_its_status_with_its_beginning_and_end(house, letter):
    service, address = house
    service.error = errors.InvalidArgumentError(f"head_weights names {letter * 10**6!r}: no head", field=letter * 10**6)
    async with RewardClient(address, policy=ONCE) as client:
        with capture_logs() as logs, pytest.raises(InvalidInputError) as refused:
            await client.score([ITEM])
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    said = refused.value.message
    assert said.startswith("head_weights names '")
    assert said.endswith("': no head")
    assert len(said.encode()) <= 1024
    assert len(refused.value.field.encode()) <= 1024
    assert len(logs[0]["reason"].encode()) <= 1024
    assert sum(len(str(value)) for value in logs[0].values()) < 2600
    _, left_out, _ = re.split(r" \[\.\.\. ([\d,]+) characters \.\.\.\] ", said)
    assert 10**6 - 1024 < int(left_out.replace(",", "")) <= 2 * 10**6


@pytest.mark.parametrize("size", [0, 1, 250, 1023, 1024, 1025, 5000])
def test_a_text_is_shortened_only_when_it_is_too_long_and_never_within_a_letter(size):
    for text in ("a" * size, "\u00e9" * (size // 2), "\U0001d518" * (size // 4)):
        short = errors.shortened(text)
        assert len(short.encode()) <= 1024
        assert (short == text) == (len(text.encode()) <= 1024)
        assert set(short) <= set(text) | set(" [.]0123456789,characters")


async def test_the_pause_asked_for_is_in_the_trailer(house):
    service, address = house
    service.error = errors.OverloadedError("full", retry_after_ms=250)
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reward_pb2_grpc.RewardServiceStub(channel).Score(reward_pb2.ScoreRequest())
    assert pushback_s(refused.value) == 0.25


async def test_an_unknown_exception_is_internal_with_the_request_id_and_without_its_text(house):
    service, address = house
    service.error = KeyError("the secret of a prompt")
    async with RewardClient(address, policy=ONCE) as client:
        with capture_logs() as logs, pytest.raises(ServiceFailedError) as failed:
            await client.score([ITEM])
    request_id = failed.value.request_id
    assert len(request_id) == 32
    assert failed.value.message == f"internal error; the service's log says why under request id {request_id}"
    (entry,) = logs
    assert (entry["event"], entry["log_level"], entry["code"]) == ("call_failed", "error", "INTERNAL")
    assert entry["exc_info"] is service.error
    assert service.counted("Score", "INTERNAL") == 1


async def test_a_call_without_a_request_id_and_one_with_an_endless_one_are_answered(house):
    service, address = house
    service.error = RuntimeError()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match=r"request id [0-9a-f]{32}") as nameless:
            await stub.Score(reward_pb2.ScoreRequest())
        given = dict(nameless.value.trailing_metadata())["quartet-request-id"]
        assert nameless.value.details().endswith(given)
        with capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError):
            await stub.Score(reward_pb2.ScoreRequest(), metadata=(("quartet-request-id", 'a" b\\{c'),))
        assert logs[0]["request_id"] == "a__b__c"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Score(reward_pb2.ScoreRequest(), metadata=(("quartet-request-id", "x" * 1000),))
    assert failed.value.details() == f"internal error; the service's log says why under request id {'x' * 128}"


async def test_a_call_that_succeeds_is_counted_and_timed(house):
    service, address = house
    async with RewardClient(address) as client:
        for _ in range(3):
            await client.score([ITEM])
    assert service.counted("Score", "OK") == 3
    value = service.metrics.registry.get_sample_value
    assert value("quartet_test_call_seconds_count", {"method": "Score"}) == 3
    assert value("quartet_test_calls_in_flight") == 0


async def test_a_stream_that_fails_gives_what_it_had_and_then_the_typed_error(house):
    service, address = house
    service.error = errors.UnavailableError("the engine restarts")
    async with PolicyClient(address, policy=ONCE) as client:
        stream = client.generate(["a"], Sampling(max_new_tokens=1), n=3)
        received = [await anext(stream), await anext(stream)]
        with pytest.raises(UnavailableError, match="policy service: the engine restarts") as failed:
            await anext(stream)
    assert [completion.sample_index for completion in received] == [0, 1]
    assert failed.value.request_id
    assert service.counted("Generate", "UNAVAILABLE") == 1


async def test_a_client_that_leaves_a_stream_frees_it_at_once_and_is_counted_as_cancelled(house):
    service, address = house
    async with PolicyClient(address) as client:
        stream = client.generate(["a"], Sampling(max_new_tokens=1), n=3)
        async for _ in stream:
            break
        await stream.aclose()
        await asyncio.wait_for(service.left.wait(), 5)
    for _ in range(100):
        if service.counted("Generate", "CANCELLED"):
            break
        await asyncio.sleep(0.02)
    assert service.counted("Generate", "CANCELLED") == 1
    assert service.metrics.registry.get_sample_value("quartet_test_calls_in_flight") == 0


async def test_clients_that_leave_while_a_reply_is_on_its_way_to_them_are_counted_as_cancelled_and_nothing_else(house):
    service, address = house
    service.tokens = 100_000
    windows = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with capture_logs() as logs:
        for _ in range(10):
            async with grpc.aio.insecure_channel(address, options=windows) as channel:
                stub = policy_pb2_grpc.PolicyServiceStub(channel)
                for call in [stub.Generate(policy_pb2.GenerateRequest()) for _ in range(8)]:
                    await call.read()
        for _ in range(250):
            if service.metrics.registry.get_sample_value("quartet_test_calls_in_flight") == 0:
                break
            await asyncio.sleep(0.02)
    assert service.counted("Generate", "CANCELLED") == 80
    assert {log["event"] for log in logs} == {"call_done"}
