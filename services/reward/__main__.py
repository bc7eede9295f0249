"""``quartet-reward``: hosts a reward model."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable

from quartet.reward.v1 import admin_pb2_grpc, reward_pb2_grpc
from services.hosting import serving
from services.reward.admin_servicer import RewardAdminServicer
from services.reward.checking import check
from services.reward.config import RewardSettings
from services.reward.loading import load
from services.reward.python_scorer import PythonScorer, load_python_scorer
from services.reward.score_watch import ScoreWatch
from services.reward.servicer import RewardServicer
from services.runtime import allocator
from services.runtime.server import Listener, ServiceRuntime, run_service
from services.runtime.telemetry import ServiceMetrics

SERVICE = "quartet.reward.v1.RewardService"
ADMIN_SERVICE = "quartet.reward.v1.RewardAdminService"


def main(argv: list[str] | None = None) -> None:
    settings = RewardSettings.from_command_line(argv)
    allocator.share_one_arena()
    if settings.check:
        run_service(RewardSettings.command, settings, lambda: check(settings))
    run_service(RewardSettings.command, settings, lambda: serve(settings))


async def serve(settings: RewardSettings) -> int:
    """Binds, loads, warms up, and serves until told to stop."""
    metrics = ServiceMetrics("reward")
    watch = ScoreWatch(metrics, window=settings.drift_window, every=settings.drift_every, alpha=settings.drift_alpha)
    servicer = RewardServicer(metrics, watch, max_request_items=settings.max_request_items)
    admin = RewardAdminServicer(servicer, settings, load=lambda changed: load(changed, rule, metrics, end))
    listener = Listener(
        name="the reward service",
        port=settings.port,
        services=(SERVICE,),
        add=lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server),
        refusal=servicer.refusal,
    )
    admin_listener = Listener(
        name="model swaps (--admin-port)",
        host=settings.admin_host,
        port=settings.admin_port,
        services=(ADMIN_SERVICE,),
        security=settings.admin_security,
        add=lambda server: admin_pb2_grpc.add_RewardAdminServiceServicer_to_server(admin, server),
    )
    async with ServiceRuntime(name="reward", settings=settings, metrics=metrics) as runtime:
        await runtime.bind(listener, admin_listener)
        runtime.serve_metrics()
        end = serving.ending(runtime)
        # Once, however often the model is swapped: Python keeps a module that it has imported.
        rule = await serving.in_own_thread(_load_rule, settings, end) if settings.scorer else None
        servicer.host(await serving.in_own_thread(load, settings, rule, metrics, end))
        runtime.at_drain.append(admin.give_up)
        code = await runtime.run()

    async def end_threads() -> None:
        await admin.close()
        if rule is not None:
            await asyncio.to_thread(rule.close)

    await serving.end_in_grace(runtime, end_threads(), code)
    if admin.loading:
        # Nothing waits for the model that is still being loaded; a thread that loads can't be told to stop.
        os._exit(code)
    return code


def _load_rule(settings: RewardSettings, on_hang: Callable[[str], None]) -> PythonScorer:
    return load_python_scorer(settings.scorer, timeout_s=settings.scorer_timeout_s or math.inf, on_hang=on_hang)


if __name__ == "__main__":
    main()
