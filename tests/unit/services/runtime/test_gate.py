"""Before every call: room for it, a request that comes in time, and health for whoever asks, at nobody's cost."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from quartet.client import CallPolicy, CredentialsError, OverloadedError, RewardClient, ScoreItem, Security
from quartet.client.errors import pushback_s
from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.hosting import serving
from services.runtime import errors
from services.runtime.batcher import Batcher, BatchLimits
from services.runtime.gate import Arrivals, Gate
from services.runtime.health import NOT_SERVING, SERVING, Health
from services.runtime.interceptors import CallInterceptor
from services.runtime.security import TokenCheck
from services.runtime.telemetry import ServiceMetrics
from tests import http2

TOKEN, OTHER = "alpha-0123456789abcdef", "beta-0123456789abcdef"
ITEM = ScoreItem(prompt="a", response="b")
ONCE = CallPolicy(patience_s=0.0)
SCORE = "/quartet.reward.v1.RewardService/Score"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"{TOKEN}\n")
    return path


def gate_of(
    tokens: TokenCheck | None = None, max_calls: int = 8, max_slow_requests: int = 8, request_timeout_s: float = 60
) -> Gate:
    return Gate(
        tokens=tokens, max_calls=max_calls, max_slow_requests=max_slow_requests, request_timeout_s=request_timeout_s
    )


class House(reward_pb2_grpc.RewardServiceServicer):
    """Scores 1.0 when the door is open."""

    def __init__(self) -> None:
        self.door = asyncio.Event()
        self.door.set()
        self.metrics = ServiceMetrics("test")
        self.health = Health()

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        await self.door.wait()
        ok = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)
        return reward_pb2.ScoreResponse(results=[reward_pb2.ScoreResult(status=ok, score=1.0)])

    def refused(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("quartet_test_refused_total", {"reason": reason}) or 0.0

    def counted(self, code: str) -> float:
        labels = {"method": "Score", "code": code}
        return self.metrics.registry.get_sample_value("quartet_test_calls_total", labels) or 0.0


@pytest.fixture
async def open_house():  # type: ignore[no-untyped-def]
    """open_house(gate) serves a house behind it and returns both the house and its address."""
    servers = []

    async def serve(gate: Gate, house: House | None = None) -> tuple[House, str]:
        house = house or House()
        server = grpc.aio.server(interceptors=[CallInterceptor(house.metrics), gate])
        reward_pb2_grpc.add_RewardServiceServicer_to_server(house, server)
        health = house.health
        for name in ("", RewardClient.health_service):
            health.set(name, SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return house, f"127.0.0.1:{port}"

    yield serve
    for server in servers:
        await server.stop(0)


async def until(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_a_refused_token_is_counted_and_logged_and_neither_sent_back_nor_written(open_house, tokens):
    house, address = await open_house(gate_of(tokens=TokenCheck(tokens, "--token-file")))
    with capture_logs() as events:
        async with RewardClient(address, policy=ONCE, security=Security(token=OTHER)) as client:
            with pytest.raises(CredentialsError) as refused:
                await client.score([ITEM])
    assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert refused.value.message == "the token is not accepted: it is wrong, or has been replaced"
    assert house.counted("UNAUTHENTICATED") == 1
    assert [e["code"] for e in events if e["event"] == "call_refused"] == ["UNAUTHENTICATED"]
    assert not {OTHER, TOKEN} & set(re.findall(r"[\w-]+", str(events)))
    async with RewardClient(address, policy=ONCE, security=Security(token=TOKEN)) as client:
        assert (await client.score([ITEM])).results[0].score == 1.0


async def test_a_refused_call_is_not_read(open_house, tokens):
    _, address = await open_house(gate_of(tokens=TokenCheck(tokens, "--token-file")))
    async with grpc.aio.insecure_channel(address) as channel:
        # Bytes that are no message would be refused as such, were they read.
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(SCORE)(b"\xff\xff")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_what_is_full_refuses_calls_of_its_work_unread_and_answers_all_others(open_house):
    gate = gate_of()
    full: list[errors.OverloadedError] = [errors.OverloadedError("no room", retry_after_ms=1500)]
    gate.refusal = lambda method, context: full[0] if full and method == SCORE else None
    house, address = await open_house(gate)
    async with grpc.aio.insecure_channel(address) as channel:
        # Bytes that are no message would be refused as such, were they read.
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(SCORE)(b"\xff\xff")
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert pushback_s(refused.value) == 1.5
        assert house.counted("RESOURCE_EXHAUSTED") == 1
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        full.clear()
        with pytest.raises(grpc.aio.AioRpcError) as read:
            await channel.unary_unary(SCORE)(b"\xff\xff")
        assert read.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_no_more_calls_are_taken_than_allowed_and_each_makes_room_however_it_ends(open_house):
    gate = gate_of(max_calls=3)
    house, address = await open_house(gate)
    house.door.clear()
    async with RewardClient(address, policy=ONCE) as client, grpc.aio.insecure_channel(address) as channel:
        held = [asyncio.create_task(client.score([ITEM])) for _ in range(3)]
        await until(lambda: gate.calls == 3)
        with pytest.raises(OverloadedError, match="3 calls are in hand, at most 3 are taken"):
            await client.score([ITEM])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(SCORE)(b"")
        assert pushback_s(refused.value) == 1.0
        held[0].cancel()  # Gone while it is answered.
        await until(lambda: gate.calls == 2)
        endless = channel.stream_unary(SCORE)()  # Gone before it has sent anything.
        await until(lambda: gate.calls == 3)
        endless.cancel()
        await until(lambda: gate.calls == 2)
        house.door.set()
        await asyncio.gather(*held[1:])
        await until(lambda: gate.calls == 0)
        assert (await client.score([ITEM])).results[0].score == 1.0


async def test_a_request_that_does_not_arrive_is_given_up_and_one_that_is_no_message_is_the_callers_fault(open_house):
    gate = gate_of(max_calls=3, request_timeout_s=0.3)
    house, address = await open_house(gate)
    async with grpc.aio.insecure_channel(address) as channel:
        start_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as slow:
            await channel.stream_unary(SCORE)()  # Opened, and then not a byte.
        assert 0.25 < time.monotonic() - start_s < 10.0
        assert slow.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert slow.value.details() == "the request did not arrive whole within 0.3 s"
        with pytest.raises(grpc.aio.AioRpcError) as empty:
            await channel.stream_unary(SCORE)(iter(()))
        assert empty.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as damaged:
            await channel.unary_unary(SCORE)(b"\xff\xff")
        assert damaged.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the request is not a message of its type" in (damaged.value.details() or "")
    assert (house.counted("DEADLINE_EXCEEDED"), house.counted("INVALID_ARGUMENT")) == (1, 2)
    # The limit is of the request: an answer may take longer.
    house.door.clear()
    asyncio.get_running_loop().call_later(0.6, house.door.set)
    async with RewardClient(address, policy=ONCE) as client:
        assert (await client.score([ITEM])).results[0].score == 1.0


async def test_health_is_checked_however_much_is_watched_and_watches_are_bounded(open_house, monkeypatch):
    monkeypatch.setattr("services.runtime.gate._HEALTH_REQUEST_S", 0.3)
    gate = gate_of(max_calls=2)
    _, address = await open_house(gate)
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="")
        watches = [health.Watch(request) for _ in range(2)]
        assert [(await watch.read()).status for watch in watches] == [health_pb2.HealthCheckResponse.SERVING] * 2
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health.Watch(request).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.value.details() == "2 watches of health are open, at most 2 are taken; try again later"
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        check = "/grpc.health.v1.Health/Check"
        with pytest.raises(grpc.aio.AioRpcError) as slow:
            await channel.stream_unary(check)()
        assert slow.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.aio.AioRpcError) as damaged:
            await channel.unary_unary(check)(b"\xff")
        assert damaged.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        watches[0].cancel()
        await until(lambda: gate.health.calls["watches"] == 1)
        assert (await health.Watch(request).read()).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_few_requests_may_arrive_slowly_and_the_others_are_told_to_come_back_while_quick_ones_are_served(
    open_house,
):
    gate = gate_of(max_slow_requests=4)
    house, address = await open_house(gate)
    request = reward_pb2.ScoreRequest().SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel, RewardClient(address, policy=ONCE) as client:
        slow = [channel.stream_unary(SCORE)() for _ in range(2)]
        await until(lambda: gate.arrivals.slow == 2)
        start_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.stream_unary(SCORE)()
        assert 0.04 < time.monotonic() - start_s < 10.0
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.value.details() == (
            "2 requests of this caller are arriving slowly, as this one does, and the other 2 of 4 are kept for others "
            "(max_slow_requests); try again later"
        )
        assert pushback_s(refused.value) == 1.0
        for _ in range(5):
            assert (await client.score([ITEM])).results[0].score == 1.0
        for call in slow:  # They had the time that they were given.
            await call.write(request)
            await call.done_writing()
            assert len(reward_pb2.ScoreResponse.FromString(await call).results) == 1
        assert gate.arrivals.slow == 0
        assert house.refused("arriving") == 1


@dataclass
class Upload:
    """A request from an address of ours, whose last byte is missing until it is finished."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def begin(cls, address: str, host: str) -> Upload:
        there, _, port = address.rpartition(":")
        upload = cls(*await asyncio.open_connection(there, int(port), local_addr=(host, 0)))
        request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(response_text="a" * 1000)])
        message = http2.message(request.SerializeToString())
        upload.writer.write(http2.PREFACE + http2.settings() + http2.call_headers(SCORE) + message[:-1])
        return upload

    def finish(self) -> None:
        self.writer.write(b"a")

    async def status(self) -> grpc.StatusCode:
        """Of the call, once it has ended."""
        async with asyncio.timeout(10):
            # HPACK without Huffman coding: length and digits stand readable behind the name.
            await self.reader.readuntil(b"grpc-status")
            (length,) = await self.reader.readexactly(1)
            number = int(await self.reader.readexactly(length))
        self.writer.close()
        return next(code for code in grpc.StatusCode if code.value[0] == number)


async def test_one_host_leaves_room_for_the_slow_requests_of_others_over_however_many_connections_it_comes(open_house):
    gate = gate_of(max_slow_requests=4)
    house, address = await open_house(gate)
    slow: list[Upload] = []

    async def takes(host: str) -> None:
        slow.append(await Upload.begin(address, host))
        await until(lambda: gate.arrivals.slow == len(slow))

    async def is_refused(host: str) -> None:
        assert await (await Upload.begin(address, host)).status() is grpc.StatusCode.RESOURCE_EXHAUSTED

    await takes("127.0.0.2")
    await takes("127.0.0.2")
    await is_refused("127.0.0.2")  # It would have three, and leave one.
    await takes("127.0.0.3")
    await is_refused("127.0.0.3")
    await takes("127.0.0.4")
    await is_refused("127.0.0.5")  # There is no room at all: no more than four are held.
    assert house.refused("arriving") == 3
    assert gate.arrivals.slow_of == {"ipv4:127.0.0.2": 2, "ipv4:127.0.0.3": 1, "ipv4:127.0.0.4": 1}
    for upload in slow:
        upload.finish()
    assert [await upload.status() for upload in slow] == [grpc.StatusCode.OK] * 4
    assert not gate.arrivals.slow_of


async def test_of_slow_requests_from_one_host_two_tokens_are_two_callers(open_house, tokens):
    tokens.write_text(f"{TOKEN}\n{OTHER}\n")
    gate = gate_of(tokens=TokenCheck(tokens, "--token-file"), max_slow_requests=4)
    _, address = await open_house(gate)
    async with grpc.aio.insecure_channel(address) as channel:

        def slow(token: str) -> Any:
            return channel.stream_unary(SCORE)(metadata=(("authorization", f"Bearer {token}"),))

        open_calls = [slow(TOKEN), slow(TOKEN)]
        await until(lambda: gate.arrivals.slow == 2)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await slow(TOKEN)
        assert "2 requests of this caller are arriving slowly" in (refused.value.details() or "")
        open_calls.append(slow(OTHER))
        await until(lambda: gate.arrivals.slow == 3)
        assert sorted(gate.arrivals.slow_of.values()) == [1, 2]
        for call in open_calls:
            call.cancel()
        await until(lambda: not gate.arrivals.slow_of)


class BlockedHouse(House):
    """Queues behind a model that answers nothing until the door is open, with room for 900 tokens, 100 an item."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        limits = BatchLimits(max_batch_tokens=100, max_batch_items=1, max_queued_tokens=900)
        self.batcher: Batcher[int, int] = Batcher(self._work, limits=limits, metrics=self.metrics)
        self.callers: list[Any] = []

    def _work(self, items: list[int]) -> list[int]:
        self.opened.wait()
        return items

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        self.callers.append(serving.caller(context))
        await self.batcher.submit([0], [100], caller=self.callers[-1])
        return reward_pb2.ScoreResponse()


@pytest.mark.parametrize("checked", [False, True])
async def test_a_token_makes_a_caller_of_its_own_exactly_where_it_is_checked(open_house, tokens, checked):
    """One connection and nine calls, each with another token: as one caller it gets 8/9 of the queue, and no more."""
    names = [f"token-{number}-0123456789abcdef" for number in range(9)]
    tokens.write_text("\n".join(names))
    gate = gate_of(tokens=TokenCheck(tokens, "--token-file") if checked else None, max_calls=32)
    house, address = await open_house(gate, BlockedHouse())
    gate.refusal = lambda method, context: house.batcher.refusal(serving.caller(context))
    admission = house.batcher.admission
    async with grpc.aio.insecure_channel(address) as channel:

        def score(token: str) -> Any:
            return channel.unary_unary(SCORE)(b"", metadata=(("authorization", f"Bearer {token}"),))

        with_model = score(names[0])  # It does not wait, and so counts for nobody.
        await until(lambda: len(house.callers) == 1 and admission.queued_tokens == 0)
        queued = []
        for number, name in enumerate(names[:8], start=1):
            queued.append(score(name))
            await until(lambda: admission.queued_tokens == 100 * number)  # noqa: B023
        if checked:
            assert len(set(house.callers)) == 8
            queued.append(score(names[8]))
            await until(lambda: admission.queued_tokens == 900)
        else:
            assert len(set(house.callers)) == 1
            for name in (names[8], "never-seen-before"):  # Read and refused; and then unread.
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await score(name)
                assert (refused.value.details() or "").startswith(
                    "800 tokens of this caller are waiting, 100 more would leave only 0 of 900 to others"
                )
            assert house.refused("caller_tokens") == 2
            assert len(house.callers) == 10
        house.opened.set()
        await asyncio.gather(with_model, *queued)
    house.batcher.close()


async def test_a_message_that_is_here_is_not_refused_because_the_event_loop_was_held_up():
    arrivals = Arrivals(max_slow=1, timeout_s=30)
    slow = asyncio.create_task(arrivals.read(asyncio.get_running_loop().create_future(), "not here", lambda: "a"))
    await until(lambda: arrivals.slow == 1)
    pipe_out, pipe_in = socket.socketpair()
    pipe_out.setblocking(False)
    reading = asyncio.create_task(
        arrivals.read(asyncio.get_running_loop().sock_recv(pipe_out, 10), "the message did not come", lambda: "b")
    )
    await asyncio.sleep(0)
    pipe_in.sendall(b"here")
    time.sleep(0.2)  # noqa: ASYNC251  # Past the moment, with the loop at a standstill.
    assert await reading == b"here"
    slow.cancel()
    pipe_in.close()
    pipe_out.close()


async def test_a_refused_request_is_gone_from_memory_without_the_collector(open_house):
    """Many MiB each: under overload they would pile up until it comes by."""
    seen: list[weakref.ref[Any]] = []

    class Request:
        pass

    def deserialise(content: bytes) -> Request:
        request = Request()
        seen.append(weakref.ref(request))
        return request

    async def unary(request: Request, context: Any) -> bytes:
        raise errors.OverloadedError("full")

    async def broken(request: Request, context: Any) -> bytes:
        raise KeyError("broken")

    async def streaming(request: Request, context: Any) -> AsyncIterator[bytes]:
        yield b""
        raise errors.OverloadedError("full")

    handlers = {
        "unary": grpc.unary_unary_rpc_method_handler(unary, deserialise, None),
        "broken": grpc.unary_unary_rpc_method_handler(broken, deserialise, None),
        "streaming": grpc.unary_stream_rpc_method_handler(streaming, deserialise, None),
    }
    server = grpc.aio.server(interceptors=[CallInterceptor(ServiceMetrics("test")), gate_of()])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.collect()
    gc.disable()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with capture_logs():
                for name in ("unary", "broken"):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await channel.unary_unary(f"/test/{name}")(b"")
                with pytest.raises(grpc.aio.AioRpcError):
                    async for _ in channel.unary_stream("/test/streaming")(b""):
                        pass
        await until(lambda: [request() for request in seen] == [None] * 3)
    finally:
        gc.enable()
        await server.stop(0)


async def test_one_connection_can_not_take_the_room_for_health_from_another(open_house):
    gate = gate_of(max_calls=1000)
    _, address = await open_house(gate)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        grpc.aio.insecure_channel(address, options=options) as greedy,
        grpc.aio.insecure_channel(address, options=options) as modest,
    ):
        request = health_pb2.HealthCheckRequest(service="")
        watches = [health_pb2_grpc.HealthStub(greedy).Watch(request) for _ in range(64)]
        assert {(await watch.read()).status for watch in watches} == {SERVING}
        for method in (CHECK, WATCH):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await greedy.stream_unary(method)()
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "64 calls for health are open on this connection" in (refused.value.details() or "")
            assert pushback_s(refused.value) == 1.0
        assert (await health_pb2_grpc.HealthStub(modest).Check(request)).status == SERVING
        assert gate.health.calls == {"watches": 64, "checks": 0}
    await until(lambda: gate.health.calls["watches"] == 0)
    assert not gate.health.calls_of


async def test_of_checks_without_a_request_one_of_a_host_stays_and_that_only_for_two_seconds(open_house):
    gate = gate_of()
    gate.health.max_calls = 1000
    _, address = await open_house(gate)
    async with grpc.aio.insecure_channel(address) as channel:
        start_s = time.monotonic()

        async def empty() -> tuple[grpc.StatusCode, float]:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.stream_unary(CHECK)()
            return refused.value.code(), time.monotonic() - start_s

        ended = await asyncio.gather(*(empty() for _ in range(50)))
    late = [seconds for code, seconds in ended if code is grpc.StatusCode.DEADLINE_EXCEEDED]
    early = [seconds for code, seconds in ended if code is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert (len(late), len(early)) == (1, 49)
    assert min(late) > 1.9
    assert max(early) < 1.9


@pytest.mark.parametrize(
    ("size", "code"), [(1000, "NOT_FOUND"), (1100, "INVALID_ARGUMENT"), (10**6, "INVALID_ARGUMENT")]
)
async def test_a_request_for_health_is_short(open_house, size, code):
    _, address = await open_house(gate_of())
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="x" * size))
    assert refused.value.code().name == code
    if size > 1000:
        assert re.search(r"a request for health has \d+ bytes, at most 1024 are read", refused.value.details() or "")


async def test_health_is_told_on_every_change_and_watches_end_with_the_service(open_house):
    house, address = await open_house(gate_of())
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="later"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        house.health.set("later", SERVING)
        assert (await watch.read()).status == SERVING
        statuses = (await stub.List(health_pb2.HealthListRequest())).statuses
        assert {name: reply.status for name, reply in statuses.items()} == {
            "": SERVING,
            "later": SERVING,
            RewardClient.health_service: SERVING,
        }
        house.health.end()
        house.health.set("later", SERVING)  # It is the end: nothing turns it back.
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        assert await watch.code() is grpc.StatusCode.OK
        assert (await stub.Check(health_pb2.HealthCheckRequest(service="later"))).status == NOT_SERVING
