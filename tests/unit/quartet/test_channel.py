"""Calls find a service that comes back, stop when their patience ends, and never go to a replica that is not ready."""

from __future__ import annotations

import asyncio
import socket
import time

import grpc
import pytest

from quartet.client import (
    CallPolicy,
    DeadlineError,
    NotReadyError,
    OverloadedError,
    RewardClient,
    ScoreItem,
    UnavailableError,
)
from quartet.client.channel import spread_pause_s, target_of
from quartet.reward.v1 import reward_pb2

from .conftest import NOT_SERVING, SERVING, abort

ITEM = ScoreItem(prompt="a", response="b")
QUICK = CallPolicy(first_backoff_s=0.02, max_backoff_s=0.1, patience_s=10.0)


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def test_a_call_is_tried_again_while_the_service_is_away_or_overloaded(start_scripted):
    service = await start_scripted(
        abort(grpc.StatusCode.UNAVAILABLE, "shutting down"),
        abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
        abort(grpc.StatusCode.UNAVAILABLE, "still"),
    )
    async with RewardClient(service.address, policy=QUICK) as client:
        scores = await client.score([ITEM])
    assert [result.score for result in scores.results] == [1.0]
    assert service.calls == 4
    ids = {metadata["quartet-request-id"] for metadata in service.metadata}
    assert len(ids) == 1  # One call of the caller's is one request in the logs.


async def test_the_pause_that_the_service_asks_for_is_kept(start_scripted):
    service = await start_scripted(abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", ("grpc-retry-pushback-ms", "700")))
    async with RewardClient(service.address, policy=QUICK) as client:
        start_s = time.monotonic()
        await client.score([ITEM])
    assert 0.7 <= time.monotonic() - start_s < 10.0


def test_a_pause_is_never_shorter_than_asked_for_and_differs_from_call_to_call():
    asked = [spread_pause_s(0.1, 2.0) for _ in range(200)]
    assert all(2.0 <= pause_s <= 2.6 for pause_s in asked)
    assert max(asked) - min(asked) > 0.3
    own = [spread_pause_s(2.0, 0.0) for _ in range(200)]
    assert all(1.6 <= pause_s <= 2.4 for pause_s in own)
    assert spread_pause_s(2.0, 0.5) >= 1.6


async def test_callers_who_were_refused_in_one_moment_do_not_come_back_in_one(start_scripted):
    came_s: list[float] = []

    async def refuse(request, context):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("grpc-retry-pushback-ms", "1000"),))

    async def answer(request, context):
        came_s.append(time.monotonic())
        return reward_pb2.ScoreResponse(results=[reward_pb2.ScoreResult(score=1.0)])

    service = await start_scripted(*[refuse] * 30, *[answer] * 30)
    async with RewardClient(service.address, policy=QUICK) as client:
        await asyncio.gather(*(client.score([ITEM]) for _ in range(30)))
    # 30 draws from 0.3 s; all within half of them would come once in 10^7 times.
    assert max(came_s) - min(came_s) > 0.15


async def test_patience_ends_with_the_last_refusal(start_scripted):
    refuse = abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "4000 tokens are waiting")
    service = await start_scripted(*[refuse] * 1000)
    policy = CallPolicy(first_backoff_s=0.05, max_backoff_s=0.1, patience_s=0.6)
    async with RewardClient(service.address, policy=policy) as client:
        start_s = time.monotonic()
        with pytest.raises(OverloadedError, match="reward service: 4000 tokens are waiting"):
            await client.score([ITEM])
        assert 0.3 <= time.monotonic() - start_s < 10.0
    assert 3 <= service.calls <= 14


async def test_a_pause_longer_than_the_patience_left_is_not_waited_for(start_scripted):
    service = await start_scripted(
        abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", ("grpc-retry-pushback-ms", "60000"))
    )
    async with RewardClient(service.address, policy=QUICK) as client:
        start_s = time.monotonic()
        with pytest.raises(OverloadedError, match="full"):
            await client.score([ITEM])
        assert time.monotonic() - start_s < 5.0


async def test_a_service_that_is_not_there_is_given_up_after_the_patience(start_scripted):
    policy = CallPolicy(first_backoff_s=0.05, max_backoff_s=0.1, patience_s=0.5, deadline_s=600.0)
    async with RewardClient(f"127.0.0.1:{unused_port()}", policy=policy) as client:
        start_s = time.monotonic()
        with pytest.raises(UnavailableError, match="reward service: ") as gone:
            await client.score([ITEM])
        assert time.monotonic() - start_s < 10.0
    assert gone.value.code is grpc.StatusCode.UNAVAILABLE


async def test_a_call_goes_on_when_the_service_comes_back_on_its_port(start_scripted):
    service = await start_scripted()
    async with RewardClient(service.address, policy=QUICK) as client:
        await client.score([ITEM])
        await service.server.stop(0)
        call = asyncio.create_task(client.score([ITEM]))
        await asyncio.sleep(0.5)
        assert not call.done()
        again = await start_scripted(port=service.port)
        scores = await asyncio.wait_for(call, 10.0)
    assert [result.score for result in scores.results] == [1.0]
    assert again.calls == 1


async def test_the_deadline_ends_a_call_that_hangs_and_is_not_tried_again(start_scripted):
    cancelled = asyncio.Event()

    async def hang(request, context):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    service = await start_scripted(hang)
    async with RewardClient(service.address, policy=CallPolicy(deadline_s=0.4)) as client:
        start_s = time.monotonic()
        with pytest.raises(DeadlineError):
            await client.score([ITEM])
        assert 0.3 <= time.monotonic() - start_s < 10.0
        await asyncio.wait_for(cancelled.wait(), 5.0)  # The service learned of it.
    assert service.calls == 1


async def test_cancelling_a_call_frees_the_service(start_scripted):
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(request, context):
        began.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    service = await start_scripted(hang)
    async with RewardClient(service.address) as client:
        call = asyncio.create_task(client.score([ITEM]))
        await asyncio.wait_for(began.wait(), 5.0)
        call.cancel()
        await asyncio.wait_for(cancelled.wait(), 5.0)
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_calls_are_spread_over_the_replicas_that_serve_and_no_others(start_scripted):
    replicas = [await start_scripted(status=status) for status in (SERVING, NOT_SERVING, SERVING)]
    addresses = ",".join(replica.address for replica in replicas)

    def taken() -> list[int]:
        counts = [replica.calls for replica in replicas]
        for replica in replicas:
            replica.metadata.clear()
        return counts

    async with RewardClient(addresses, policy=QUICK) as client:
        await client.score([ITEM])
        await asyncio.sleep(0.5)  # Until both are connected.
        taken()
        for _ in range(40):
            await client.score([ITEM])
        assert taken() == [20, 0, 20]
        await replicas[0].set_health(NOT_SERVING)
        await replicas[1].set_health(SERVING)
        await asyncio.sleep(0.5)
        for _ in range(40):
            await client.score([ITEM])
        assert taken() == [0, 20, 20]
        await replicas[2].server.stop(0)
        for _ in range(10):
            await client.score([ITEM])
        assert taken() == [0, 10, 0]


async def test_a_service_that_loads_is_waited_for(start_scripted):
    service = await start_scripted(status=NOT_SERVING)

    async def become_ready():
        await asyncio.sleep(0.5)
        await service.set_health(SERVING)

    async with RewardClient(service.address, policy=QUICK) as client:
        ready = asyncio.create_task(become_ready())
        start_s = time.monotonic()
        await client.wait_ready(10.0)
        assert 0.4 <= time.monotonic() - start_s < 10.0
        await ready
        await service.set_health(NOT_SERVING)
        await asyncio.sleep(0.3)  # Until the channel, which is connected, is told.
        call = asyncio.create_task(client.score([ITEM]))
        await asyncio.sleep(0.4)
        assert service.calls == 0
        await service.set_health(SERVING)
        await asyncio.wait_for(call, 10.0)


async def test_a_call_without_patience_gets_to_a_service_that_came_back_and_was_waited_for(start_scripted):
    service = await start_scripted()
    async with RewardClient(service.address, policy=CallPolicy(patience_s=0.0)) as client:
        await client.score([ITEM])
        await service.server.stop(0)
        end_s = time.monotonic() + 2.5  # By then the channel pauses as long as it ever does before it connects again.
        while time.monotonic() < end_s:
            with pytest.raises(UnavailableError):
                await client.score([ITEM])
            await asyncio.sleep(0.02)
        await start_scripted(port=service.port)
        await client.wait_ready(10.0)
        assert (await client.score([ITEM])).results


async def test_who_is_not_ready_is_named_with_address_wait_and_last_answer(start_scripted):
    port = unused_port()
    async with RewardClient(f"127.0.0.1:{port}") as client:
        start_s = time.monotonic()
        with pytest.raises(NotReadyError, match=rf"^reward service: not ready at 127.0.0.1:{port} after 0.5 s") as away:
            await client.wait_ready(0.5)
        assert time.monotonic() - start_s < 10.0
    assert "last answer: UNAVAILABLE: " in str(away.value)
    assert "is it started, and is the address right?" in str(away.value)
    service = await start_scripted(status=NOT_SERVING)
    async with RewardClient(service.address) as client:
        with pytest.raises(NotReadyError, match=r"after 0.3 s \(last answer: NOT_SERVING\)"):
            await client.wait_ready(0.3)


@pytest.mark.parametrize(
    ("addresses", "target"),
    [
        ("reward:50052", "dns:///reward:50052"),
        ("127.0.0.1:1", "dns:///127.0.0.1:1"),
        ("127.0.0.1:1, localhost:2", "ipv4:127.0.0.1:1,127.0.0.1:2"),
        ("dns:///reward.svc:50052", "dns:///reward.svc:50052"),
        ("unix:/run/reward.sock", "unix:/run/reward.sock"),
    ],
)
def test_addresses_become_targets(addresses, target):
    assert target_of(addresses) == target


@pytest.mark.parametrize("addresses", ["", "reward", "reward:", "reward:http", "127.0.0.1:1,reward", ",", "a b:x"])
def test_an_address_without_a_port_is_refused_by_its_text(addresses):
    with pytest.raises(ValueError, match="must be host:port, or several of them with commas between") as refused:
        target_of(addresses)
    assert repr(addresses) in str(refused.value)


def test_several_names_are_refused_because_grpc_would_resolve_none_of_them():
    with pytest.raises(ValueError, match=r"several must be IP addresses of one kind.*give a name that resolves to all"):
        target_of("policy-0:50051,policy-1:50051")
    with pytest.raises(ValueError, match="of one kind"):
        target_of("127.0.0.1:1,[::1]:2")
    assert target_of("[::1]:1,[::2]:2") == "ipv6:[::1]:1,[::2]:2"


async def test_readiness_of_a_list_is_that_of_every_address(start_scripted):
    ready, loading = await start_scripted(), await start_scripted(status=NOT_SERVING)
    async with RewardClient(f"{ready.address},{loading.address}") as client:
        with pytest.raises(
            NotReadyError, match=f"not ready at {loading.address} after 0.5 s .last answer: NOT_SERVING"
        ):
            await client.wait_ready(0.5)
        await loading.set_health(SERVING)
        await client.wait_ready(5.0)
