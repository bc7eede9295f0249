"""What happens around every call: request id, log, metrics, and the one place where errors become a status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import grpc
import structlog
from structlog.contextvars import bind_contextvars

from quartet import tracing
from services.runtime import calls
from services.runtime.calls import REQUEST_ID, CallRecord
from services.runtime.errors import DeadlineExceededError, InternalError, ServiceError, UnavailableError, refuse
from services.runtime.telemetry import ServiceMetrics

log = structlog.get_logger()

# Where the service and not its caller has failed, by the conventions of OpenTelemetry.
_OUR_FAULT = frozenset(
    {
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.DATA_LOSS,
    }
)


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every handler but those of health, which pass untouched."""

    def __init__(self, metrics: ServiceMetrics, *, reader_timeout_s: float = 300.0) -> None:
        """
        Args:
            metrics: of the service.
            reader_timeout_s: how long a reply of a stream may wait for its reader, who else would hold for ever what
                the call holds.
        """
        self.metrics = metrics
        self.reader_timeout_s = reader_timeout_s
        self._in_hand: set[_Call] = set()

    def end_calls(self) -> None:
        """Ends the calls in hand with UNAVAILABLE, for their clients to try again: who is cut off learns nothing."""
        for call in list(self._in_hand):
            call.end()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method  # type: ignore[attr-defined]
        if handler is None or method.startswith("/grpc.health."):
            return handler
        metadata: Any = handler_call_details.invocation_metadata or ()  # type: ignore[attr-defined]
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def streaming(request: Any, context: Any) -> None:
                async with (
                    _Call(self.metrics, self._in_hand, method, metadata, context),
                    # Closed at once when the client leaves, not when the collector gets to it: slots wait to be freed.
                    contextlib.aclosing(behaviour(request, context)) as replies,
                ):
                    async for reply in replies:
                        await self._write(context, reply)

            make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else None
            make = make or grpc.unary_stream_rpc_method_handler
            return make(streaming, handler.request_deserializer, handler.response_serializer)
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def unary(request: Any, context: Any) -> Any:
            async with _Call(self.metrics, self._in_hand, method, metadata, context):
                return await behaviour(request, context)

        make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else None
        make = make or grpc.unary_unary_rpc_method_handler
        return make(unary, handler.request_deserializer, handler.response_serializer)

    async def _write(self, context: Any, reply: Any) -> None:
        """Sends one reply of a stream; comes back when there is room for the next one on its way to the reader."""
        try:
            async with asyncio.timeout(self.reader_timeout_s):
                await context.write(reply)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"a reply was not read within {self.reader_timeout_s:g} s (reader_timeout_s); what the call held is "
                "freed: read on while replies come, or ask for fewer at a time"
            ) from error
        except grpc.aio.BaseError as error:
            # The client has left or the server has stopped, and we see it here before gRPC cancels this task.
            raise asyncio.CancelledError from error


class _Call:
    """One call from arrival to status, and among those ``in_hand`` meanwhile."""

    def __init__(self, metrics: ServiceMetrics, in_hand: set[_Call], method: str, metadata: Any, context: Any) -> None:
        self.metrics = metrics
        self.in_hand = in_hand
        self.ended = False
        self.path = method
        self.method = method.rpartition("/")[2]
        self.metadata = metadata
        self.context = context
        self.start_s = 0.0

    def end(self) -> None:
        """The service ends, and doesn't wait for this call any more."""
        self.ended = True
        self.task.cancel()

    async def __aenter__(self) -> Self:
        self.start_s = time.monotonic()
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.in_hand.add(self)
        self.metrics.calls_in_flight.inc()
        self.record = CallRecord(
            request_id=calls.read_request_id(self.metadata),
            method=self.method,
            caller=calls.caller_of(self.context),
        )
        # gRPC has made this task for this call: nothing needs to be put back at its end.
        calls.begin(self.record)
        bind_contextvars(request_id=self.record.request_id)
        self.span = tracing.NO_SPAN
        if tracing.active():
            self._trace()
        self.context.set_trailing_metadata(((REQUEST_ID, self.record.request_id),))
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        seconds = time.monotonic() - self.start_s
        self.in_hand.discard(self)
        if self.ended and isinstance(error, asyncio.CancelledError):
            self.task.uncancel()
            error = UnavailableError("the service is ending and could not finish this call in time; try again")
        self.metrics.calls_in_flight.dec()
        self.metrics.call_seconds.labels(self.method).observe(seconds)
        code = grpc.StatusCode.OK
        if isinstance(error, ServiceError):
            code = error.code
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            code = grpc.StatusCode.CANCELLED
        elif error is not None and not isinstance(error, grpc.aio.AbortError):
            code = grpc.StatusCode.INTERNAL
        self.metrics.calls.labels(self.method, code.name).inc()
        if isinstance(error, ServiceError) and error.refused_as:
            self.metrics.refused.labels(error.refused_as).inc()
        self._log(code, seconds, error)
        self._end_trace(code)
        if not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return
        del traceback  # It leads to the request, and the stack of what is raised now leads here.
        if not isinstance(error, ServiceError):
            unknown = error
            message = f"internal error; the service's log says why under request id {self.record.request_id}"
            error = InternalError(message)
            error.__cause__ = unknown
        await refuse(self.context, error, ((REQUEST_ID, self.record.request_id),))

    def _trace(self) -> None:
        """Begins the span of the call, within the client's where it sent one."""
        self.span = tracing.span(
            self.path.lstrip("/"),
            kind="server",
            attributes={
                "rpc.system": "grpc",
                "rpc.service": self.path.lstrip("/").rpartition("/")[0],
                "rpc.method": self.method,
                "quartet.request_id": self.record.request_id,
            },
            parent=tracing.from_metadata(self.metadata),
        )
        self.span.stay()
        bind_contextvars(trace_id=self.span.trace_id)

    def _end_trace(self, code: grpc.StatusCode) -> None:
        if self.span is tracing.NO_SPAN:
            return
        record = self.record
        self.span.set(
            {"rpc.grpc.status_code": code.value[0], "quartet.items": record.items, "quartet.tokens": record.tokens}
        )
        if record.weights_version is not None:
            self.span.set({"quartet.weights_version": record.weights_version})
        if code in _OUR_FAULT:
            self.span.fail(code.name)
        self.span.end()

    def _log(self, code: grpc.StatusCode, seconds: float, error: BaseException | None) -> None:
        """One line a call. What was asked and answered is counted here and never told."""
        record = self.record
        event: dict[str, Any] = {
            "request_id": record.request_id,  # Also where a generator is closed outside of its task.
            "method": self.method,
            "code": code.name,
            "seconds": round(seconds, 4),
            "caller": record.caller,
            "items": record.items,
            "tokens": record.tokens,
            "weights_version": record.weights_version,
        }
        if code is grpc.StatusCode.INTERNAL and not isinstance(error, InternalError):
            log.error("call_failed", **event, exc_info=error)
        elif isinstance(error, ServiceError):
            if error.field:
                event["field"] = error.field
            if not error.may_quote or log.is_enabled_for(logging.DEBUG):
                event["reason"] = error.message
            log.warning("call_refused", **event)
        else:
            log.info("call_done", **event)
