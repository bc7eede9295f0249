"""A small real gRPC server in this process, whose answers a test scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from quartet.client import RewardClient
from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Answer = Callable[[reward_pb2.ScoreRequest, Any], Awaitable[reward_pb2.ScoreResponse]]


@dataclass
class ScriptedReward(reward_pb2_grpc.RewardServiceServicer):
    """A reward service that scores every item 1.0, after the answers in ``script`` are used up."""

    server: grpc.aio.Server
    health: HealthServicer
    port: int = 0
    script: list[Answer] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def calls(self) -> int:
        return len(self.metadata)

    async def set_health(self, status: int) -> None:
        await self.health.set(RewardClient.health_service, status)

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        self.metadata.append({key: value for key, value in context.invocation_metadata() if isinstance(value, str)})
        if self.script:
            return await self.script.pop(0)(request, context)
        ok = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)
        return reward_pb2.ScoreResponse(
            results=[reward_pb2.ScoreResult(status=ok, score=1.0, token_count=1) for _ in request.items],
            served_by=common_pb2.ServedBy(model_id=self.address),
        )


@pytest.fixture
async def start_scripted() -> AsyncIterator[Callable[..., Awaitable[ScriptedReward]]]:
    """await start_scripted(*answers, port=0, status=SERVING) serves on a free port until the test ends."""
    started: list[ScriptedReward] = []

    async def start(*answers: Answer, port: int = 0, status: int = SERVING) -> ScriptedReward:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        service = ScriptedReward(server, HealthServicer(), script=list(answers))
        reward_pb2_grpc.add_RewardServiceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(service.health, server)
        service.port = server.add_insecure_port(f"127.0.0.1:{port}")
        await service.set_health(status)
        await server.start()
        started.append(service)
        return service

    yield start
    for service in started:
        await service.server.stop(0)


def abort(code: grpc.StatusCode, message: str, *metadata: tuple[str, Any]) -> Answer:
    """An answer that refuses."""

    async def answer(request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        await context.abort(code, message, metadata)
        raise AssertionError("abort raises")

    return answer
