"""Generation finds a service that is away or full, as every call that is safe to repeat does, and gets all once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from quartet.client import CallPolicy, OverloadedError, PolicyClient, Sampling, UnavailableError
from quartet.common.v1 import common_pb2
from quartet.policy.v1 import policy_pb2, policy_pb2_grpc

from .test_channel import unused_port

OK = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)
SAMPLING = Sampling(max_new_tokens=4)
QUICK = CallPolicy(first_backoff_s=0.02, max_backoff_s=0.1, patience_s=10.0)


class ScriptedPolicy(policy_pb2_grpc.PolicyServiceServicer):
    """Answers what is still missing; each entry of ``script`` says of one call what happens before which answer."""

    def __init__(self) -> None:
        self.script: list[dict[int, Callable[[Any], Awaitable[None]]]] = []
        self.requests: list[policy_pb2.GenerateRequest] = []

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[policy_pb2.GenerateResponse]:
        self.requests.append(request)
        events = self.script.pop(0) if self.script else {}
        for sample in range(max(request.n, 1)):
            if sample in events:
                await events[sample](context)
            if sample not in request.received:
                completion = policy_pb2.Completion(token_ids=[sample], finish_reason=policy_pb2.FINISH_REASON_LENGTH)
                yield policy_pb2.GenerateResponse(sample_index=sample, status=OK, completion=completion)


async def serve(service: ScriptedPolicy, port: int = 0) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(service, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server, port


@pytest.fixture
async def service() -> AsyncIterator[ScriptedPolicy]:
    service = ScriptedPolicy()
    server, port = await serve(service)
    service.address = f"127.0.0.1:{port}"
    yield service
    await server.stop(0)


async def full(context: Any) -> None:
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("grpc-retry-pushback-ms", "200"),))


async def gone(context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


async def works_and_is_gone(context: Any) -> None:
    await asyncio.sleep(0.8)
    await gone(context)


async def samples(client: PolicyClient, ask: str = "generate", **options: Any) -> list[int]:
    return [item.sample_index async for item in getattr(client, ask)(["a"], SAMPLING, n=4, **options)]


@pytest.mark.parametrize("ask", ["generate", "generate_stream"])
@pytest.mark.parametrize("patience_s", [0.0, 0.5])
async def test_a_service_that_is_not_there_is_given_up_after_the_patience(patience_s, ask):
    policy = CallPolicy(first_backoff_s=0.05, max_backoff_s=0.1, patience_s=patience_s, deadline_s=600.0)
    async with PolicyClient(f"127.0.0.1:{unused_port()}", policy=policy) as client, asyncio.timeout(10):
        start_s = time.monotonic()
        with pytest.raises(UnavailableError, match="policy service: "):
            await samples(client, ask)
        assert patience_s - 0.2 <= time.monotonic() - start_s < 10.0
        with pytest.raises(UnavailableError):
            await samples(client, ask, patience_s=0.0)


@pytest.mark.parametrize("ask", ["generate", "generate_stream"])
async def test_a_refusal_of_an_overloaded_service_is_not_the_end_by_default(service, ask):
    service.script = [{0: full}, {0: gone}, {2: full}]
    async with PolicyClient(service.address, policy=QUICK) as client:
        start_s = time.monotonic()
        assert await samples(client, ask) == [0, 1, 2, 3]
    assert time.monotonic() - start_s >= 0.4  # It asked for this much.
    assert [list(request.received) for request in service.requests] == [[], [], [], [0, 1]]
    assert len({request.request_id for request in service.requests}) == 1


async def test_patience_of_one_request_goes_before_that_of_the_client(service):
    service.script = [{0: full}]
    async with PolicyClient(service.address, policy=QUICK) as client:
        with pytest.raises(OverloadedError, match="full"):
            await samples(client, patience_s=0.0)
    service.script = [{0: full}]
    async with PolicyClient(service.address, policy=CallPolicy(patience_s=0.0)) as client:
        assert await samples(client, patience_s=10.0) == [0, 1, 2, 3]


async def test_patience_is_of_the_time_away_and_not_of_the_time_of_work(service):
    policy = CallPolicy(first_backoff_s=0.02, max_backoff_s=0.1, patience_s=0.5)
    service.script = [{0: works_and_is_gone}, {2: works_and_is_gone}]
    async with PolicyClient(service.address, policy=policy) as client:
        assert await samples(client) == [0, 1, 2, 3]
        service.script = [{1: gone}, *[{0: gone}] * 1000]
        start_s = time.monotonic()
        with pytest.raises(UnavailableError, match="gone"):
            await samples(client)
        assert time.monotonic() - start_s < 10.0


async def test_generation_goes_on_when_the_service_comes_back_on_its_port():
    first, second = ScriptedPolicy(), ScriptedPolicy()
    stopped = asyncio.Event()

    async def hang(context: Any) -> None:
        stopped.set()
        await asyncio.sleep(30)

    first.script = [{2: hang}]
    server, port = await serve(first)
    async with PolicyClient(f"127.0.0.1:{port}", policy=QUICK) as client:
        asked = asyncio.create_task(samples(client))
        await asyncio.wait_for(stopped.wait(), 5)
        await server.stop(0)
        await asyncio.sleep(0.5)
        assert not asked.done()
        server, _ = await serve(second, port)
        assert await asyncio.wait_for(asked, 10) == [0, 1, 2, 3]
    await server.stop(0)
    assert [list(request.received) for request in second.requests] == [[0, 1]]
