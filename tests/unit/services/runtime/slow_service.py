"""A reward service over the real runtime whose model is a sleep: run by test_server.py as a process of its own.

Flags of every service, and from the environment SLOW_LOAD_S, SLOW_CALL_S and SLOW_MODEL_S: of a model that
answers one call at a time, the others wait in the queue of a Batcher.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any, ClassVar

from quartet.common.v1 import common_pb2
from quartet.reward.v1 import reward_pb2, reward_pb2_grpc
from services.runtime.batcher import Batcher, BatchLimits
from services.runtime.config import ServiceSettings
from services.runtime.server import Listener, ServiceRuntime, run_service
from services.runtime.telemetry import ServiceMetrics

SERVICE = "quartet.reward.v1.RewardService"


class SlowSettings(ServiceSettings):
    """A service that is slow."""

    command: ClassVar[str] = "slow-service"


class Slow(reward_pb2_grpc.RewardServiceServicer):
    """Scores 1.0 after a while; a response "fail" asks the service to end with a failure."""

    runtime: ServiceRuntime

    def __init__(self, metrics: ServiceMetrics) -> None:
        limits = BatchLimits(max_batch_tokens=1, max_batch_items=1, max_queued_tokens=1000)
        self.batcher = Batcher(self._work, limits=limits, metrics=metrics)

    def _work(self, items: list[float]) -> list[float]:
        time.sleep(float(os.environ.get("SLOW_MODEL_S", "0")))
        return items

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        if request.items[0].response_text == "fail":
            self.runtime.stop("the engine died")
        await asyncio.sleep(float(os.environ.get("SLOW_CALL_S", "0")))
        score = await self.batcher.submit([1.0], [1])
        ok = common_pb2.ItemStatus(code=common_pb2.ITEM_STATUS_CODE_OK)
        return reward_pb2.ScoreResponse(
            results=[reward_pb2.ScoreResult(status=ok, score=score[0]) for _ in request.items]
        )


async def serve(settings: SlowSettings) -> int:
    metrics = ServiceMetrics("slow")
    servicer = Slow(metrics)
    listener = Listener(
        name="the slow service",
        port=settings.port,
        services=(SERVICE,),
        add=lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server),
    )
    async with ServiceRuntime(name="slow", settings=settings, metrics=metrics) as runtime:
        servicer.runtime = runtime
        await runtime.bind(listener)
        runtime.serve_metrics()
        await asyncio.sleep(float(os.environ.get("SLOW_LOAD_S", "0")))
        return await runtime.run()


if __name__ == "__main__":
    chosen = SlowSettings.from_command_line()
    run_service("slow-service", chosen, lambda: serve(chosen))
