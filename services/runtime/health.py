"""Health by the protocol of gRPC (grpc.health.v1), told without ever waiting for whoever listens.

grpcio-health-checking has such a servicer, too. There a watcher who reads nothing holds the lock that a change of
status needs, and so keeps a service from becoming ready and from ending.
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.errors import NotFoundError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """What status each service has by its name; "" is the process as a whole. Used by the event loop alone."""

    def __init__(self) -> None:
        self._statuses: dict[str, health_pb2.HealthCheckResponse.ServingStatus] = {}
        self._changed = asyncio.Event()  # Another one after every change.
        self._ended = False

    def set(self, service: str, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        """Says so from now on, unless the end has begun; those who watch are told in their own time."""
        if not self._ended:
            self._statuses[service] = status
            self._tell()

    def end(self) -> None:
        """NOT_SERVING for good; watches end once they have been told."""
        self._ended = True
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            raise NotFoundError("no service of this name is served here")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(
            statuses={name: health_pb2.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        )

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        told = None
        while True:
            # Before the status is looked at: a change while it is written is not missed.
            changed = self._changed
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != told:
                # Waits while nobody reads. gRPC cannot end such a stream: the gate bounds how many there are, and they
                # end with their connection or the service.
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            elif self._ended:
                return
            else:
                await changed.wait()
