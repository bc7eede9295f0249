"""Weight updates: receive, verify, then apply. Until the commit is verified nothing changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import structlog

from quartet.client.policy import UPDATE_ACCEPTED
from quartet.policy.v1 import weights_pb2, weights_pb2_grpc
from services.hosting import serving
from services.policy.engine import EngineFailedError, InFlight, StillRunningError
from services.policy.hosted import HostedPolicy
from services.policy.staging import StagedCheckpoint, TensorSpec
from services.runtime.errors import (
    AbortedError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    ServiceError,
    UnavailableError,
)
from services.runtime.telemetry import ServiceMetrics

log = structlog.get_logger()

T = TypeVar("T")

_IN_FLIGHT = {
    weights_pb2.IN_FLIGHT_POLICY_UNSPECIFIED: InFlight.KEEP,
    weights_pb2.IN_FLIGHT_POLICY_KEEP: InFlight.KEEP,
    weights_pb2.IN_FLIGHT_POLICY_FINISH: InFlight.FINISH,
    weights_pb2.IN_FLIGHT_POLICY_ABORT: InFlight.ABORT,
}


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    """Replaces the weights of the one policy this process hosts. ``hosted`` is None until it is loaded."""

    def __init__(
        self,
        metrics: ServiceMetrics,
        *,
        staging: Path,
        max_bytes: int,
        stop: Callable[[str], None],
        wait_s: float = 600.0,
    ) -> None:
        """
        Args:
            metrics: of the service.
            staging: folder that incoming weights are staged in.
            max_bytes: of an update.
            stop: ends the service with a reason, when the engine holds weights that nobody knows.
            wait_s: longest that an update waits for requests in flight, within its call's deadline.
        """
        self.metrics = metrics
        self.staging = staging
        self.max_bytes = max_bytes
        self.stop = stop
        self.wait_s = wait_s
        self.hosted: HostedPolicy | None = None
        self._updating = False
        self._applying: asyncio.Task[weights_pb2.UpdateWeightsResponse] | None = None

    def _hosted(self) -> HostedPolicy:
        if self.hosted is None:
            raise UnavailableError("the policy is still loading; try again later")
        return self.hosted

    async def GetWeightsInfo(
        self, request: weights_pb2.GetWeightsInfoRequest, context: Any
    ) -> weights_pb2.GetWeightsInfoResponse:
        return weights_pb2.GetWeightsInfoResponse(served_by=self._hosted().model.served_by)

    async def UpdateWeights(
        self, request_iterator: AsyncIterator[weights_pb2.UpdateWeightsRequest], context: Any
    ) -> weights_pb2.UpdateWeightsResponse:
        hosted = self._hosted()
        if self._updating:
            raise AbortedError("another weight update is under way; try again when it is done")
        self._updating = True
        try:
            return await self._update(hosted, request_iterator, context)
        finally:
            # A client that left does not end an update that is being applied: the next one has to wait for it.
            if self._applying is None or self._applying.done():
                self._updating = False

    async def _update(
        self, hosted: HostedPolicy, steps: AsyncIterator[weights_pb2.UpdateWeightsRequest], context: Any
    ) -> weights_pb2.UpdateWeightsResponse:
        begin: weights_pb2.BeginUpdate | None = None
        staged: StagedCheckpoint | None = None
        with contextlib.ExitStack() as opened:
            try:
                async for step in steps:
                    kind = step.WhichOneof("step")
                    if (kind == "begin") != (begin is None):
                        raise InvalidArgumentError(
                            f"step is {kind or 'not set'}: an update is one begin, then chunks, then one commit",
                            field="step",
                        )
                    if kind == "begin":
                        begin = step.begin
                        staged = await in_thread(self._open, hosted, begin, opened)
                        await context.send_initial_metadata(((UPDATE_ACCEPTED, "1"),))
                    elif kind == "chunk" and staged is not None:
                        # Hashing and copying hold no lock of the interpreter: generation's loop goes on beside them.
                        await in_thread(staged.write, step.chunk.tensor_index, step.chunk.data)
                    elif kind == "commit" and staged is not None and begin is not None:
                        fingerprint = await in_thread(staged.finish, step.commit.weights_fingerprint)
                        # From here on it runs to its end, even when the client leaves: half an update would be no
                        # weights.
                        opened.pop_all()  # Closed by _apply.
                        remaining_s = serving.time_remaining_s(context)
                        wait_s = self.wait_s if remaining_s is None else max(0.0, min(self.wait_s, remaining_s))
                        self._applying = asyncio.create_task(self._apply(hosted, begin, staged, fingerprint, wait_s))
                        self._applying.add_done_callback(self._applied)
                        staged = None
                        return await asyncio.shield(self._applying)
                    else:
                        raise InvalidArgumentError("step is not set: give begin, chunk or commit", field="step")
            except ServiceError:
                if staged is not None:
                    # A status that overtakes a client still sending would reach it as a broken pipe: take the rest in.
                    async for _ in steps:
                        pass
                raise
        raise DataLossError("the stream ended before its commit; the old weights go on serving")

    def _applied(self, task: asyncio.Task[weights_pb2.UpdateWeightsResponse]) -> None:
        self._updating = False
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("update_failed", reason=str(error))

    def _open(
        self, hosted: HostedPolicy, begin: weights_pb2.BeginUpdate, opened: contextlib.ExitStack
    ) -> StagedCheckpoint:
        """``opened`` closes it."""
        current = hosted.model.served_by.weights_version
        if begin.weights_version <= current:
            raise FailedPreconditionError(
                f"begin.weights_version is {begin.weights_version}, must be greater than {current}, which serves now",
                field="begin.weights_version",
            )
        if begin.in_flight not in _IN_FLIGHT:
            raise InvalidArgumentError(
                f"begin.in_flight is {begin.in_flight}, must be one of {sorted(_IN_FLIGHT)}", field="begin.in_flight"
            )
        specs = [TensorSpec(name=t.name, dtype=t.dtype, shape=tuple(t.shape)) for t in begin.tensors]
        hosted.layout.check(specs, self.max_bytes)
        return opened.enter_context(StagedCheckpoint(specs, self.staging))

    async def _apply(
        self,
        hosted: HostedPolicy,
        begin: weights_pb2.BeginUpdate,
        staged: StagedCheckpoint,
        fingerprint: str,
        wait_s: float,
    ) -> weights_pb2.UpdateWeightsResponse:
        with staged:
            try:
                pause_s = await hosted.engine.update_weights(
                    staged.path, begin.weights_version, _IN_FLIGHT[begin.in_flight], wait_s
                )
            except StillRunningError as error:
                raise DeadlineExceededError(
                    f"{error} (--update-wait-s, or the deadline of the call); version "
                    f"{hosted.model.served_by.weights_version} goes on serving"
                ) from error
            except EngineFailedError as error:
                self.stop(str(error))
                raise UnavailableError(f"{error}; the service restarts with the weights of its model folder") from error
        served_by = hosted.model.served_by
        served_by.weights_version = begin.weights_version
        served_by.weights_fingerprint = fingerprint
        self.metrics.weights_version.set(begin.weights_version)
        log.info(
            "weights_updated",
            version=begin.weights_version,
            mib=round(staged.received_bytes / 2**20, 1),
            pause_ms=round(1000 * pause_s, 1),
        )
        return weights_pb2.UpdateWeightsResponse(
            served_by=served_by, received_bytes=staged.received_bytes, pause_seconds=pause_s
        )


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Runs in a thread, and is waited for even when the client leaves: what it works on must not be closed below it."""
    work = asyncio.create_task(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # Seen: nobody is left to be told.
        raise
