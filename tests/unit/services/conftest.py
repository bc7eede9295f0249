"""A servicer on a real server of this process, with the interceptor that every service has around its calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from services.runtime.gate import Gate
from services.runtime.interceptors import CallInterceptor
from services.runtime.telemetry import ServiceMetrics

Serve = Callable[..., Awaitable[grpc.aio.Channel]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """await serve(metrics, add) serves what ``add`` adds, behind a gate if any, and returns a channel to it."""
    opened: list[tuple[grpc.aio.Server, grpc.aio.Channel]] = []

    async def start(metrics: ServiceMetrics, add: Callable[[grpc.aio.Server], Any], *gates: Gate) -> grpc.aio.Channel:
        server = grpc.aio.server(interceptors=[CallInterceptor(metrics), *gates])
        add(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        # Its own connection, and not one of a test before.
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
        opened.append((server, channel))
        return channel

    yield start
    for server, channel in opened:
        await channel.close(None)
        await server.stop(0)
