"""``quartet-reward``: hosts a reward model."""

from __future__ import annotations

import asyncio

from quartet.reward.v1 import reward_pb2_grpc
from services.reward.checking import check
from services.reward.config import RewardSettings
from services.reward.loading import load as load
from services.reward.servicer import RewardServicer
from services.runtime.server import Listener, ServiceRuntime, run_service
from services.runtime.telemetry import ServiceMetrics

SERVICE = "quartet.reward.v1.RewardService"


def main(argv: list[str] | None = None) -> None:
    settings = RewardSettings.from_command_line(argv)
    if settings.check:
        run_service(RewardSettings.command, settings, lambda: check(settings))
    run_service(RewardSettings.command, settings, lambda: serve(settings))


async def serve(settings: RewardSettings) -> int:
    """Binds, loads, warms up, and serves until told to stop."""
    metrics = ServiceMetrics("reward")
    servicer = RewardServicer(metrics)
    listener = Listener(
        name="the reward service",
        port=settings.port,
        services=(SERVICE,),
        add=lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server),
    )
    async with ServiceRuntime(name="reward", settings=settings, metrics=metrics) as runtime:
        await runtime.bind(listener)
        runtime.serve_metrics()
        hosted = servicer.hosted = await asyncio.to_thread(load, settings, metrics)
        code = await runtime.run()
    await asyncio.to_thread(hosted.close)
    return code


if __name__ == "__main__":
    main()
