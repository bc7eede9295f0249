"""What stands before every call of a listener: credentials, room for one more call, a request that comes in time.

A refused call costs no memory: its request is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from services.runtime import calls
from services.runtime.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    OverloadedError,
    ServiceError,
    UnauthenticatedError,
    refuse,
)
from services.runtime.security import TokenCheck

# Open to everybody: probes and balancing clients have no credentials, and it tells nothing but readiness.
_OPEN = "/grpc.health.v1.Health/"
_RETRY_AFTER_MS = 1000
# What has not arrived by then takes its time. A message of some MiB is faster in one rack.
_MOMENT_S = 0.05
# Of the event loop, in which what has arrived is seen: a loop that was held up blames no sender.
_ROUNDS = 3
# A request for health is the name of a service, and sent at once. Behind a proxy many clients share a connection.
_HEALTH_REQUEST_BYTES = 1024
_HEALTH_REQUEST_S = 2.0
_HEALTH_SLOW = 2
_HEALTH_CALLS_PER_CONNECTION = 64

Message = TypeVar("Message")
Refusal = Callable[[str, Any], ServiceError | None]
"""Why a call, of a method and in a context, is refused before its request is read; None: it is not."""


class _Arrival:
    """A message that is being read: who sends it where it counts as slow, and why it was refused for that if it was."""

    __slots__ = ("counted_for", "refused", "timer")

    def __init__(self) -> None:
        self.counted_for: Hashable | None = None
        self.refused = ""
        self.timer: asyncio.Handle | None = None


class Arrivals:
    """Messages that are being read. Most are here in a moment; of the others at most ``max_slow`` may take their time.

    Nobody knows how large a message is before all of it is here, and what arrives is held in memory. So the slow ones
    come to ``max_slow`` times the largest message that is accepted, the others to what the network carries in a moment.

    Who has slow ones may have as many as it leaves free, alone half of them: so nobody shuts out whoever has none, as
    in ``Admission``.
    """

    def __init__(self, *, max_slow: int, timeout_s: float) -> None:
        self.max_slow = max_slow
        self.timeout_s = timeout_s
        self.slow_of: Counter[Hashable] = Counter()

    @property
    def slow(self) -> int:
        """Messages that take their time now."""
        return self.slow_of.total()

    async def read(self, message: Awaitable[Message], late: str, sender: Callable[[], Hashable]) -> Message:
        """The message, once it is here. ``sender``: whose it is, asked where it takes its time.

        Raises:
            OverloadedError: it takes its time, and so do as many others, of all or of its sender, as may.
            DeadlineExceededError: it took longer than ``timeout_s``; says ``late`` of it.
        """
        loop = asyncio.get_running_loop()
        arrival = _Arrival()
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                arrival.timer = loop.call_later(_MOMENT_S, self._judge, arrival, sender, limit, 0)
                return await message
        except TimeoutError as error:
            if arrival.refused:
                raise OverloadedError(
                    f"{arrival.refused} (max_slow_requests); try again later",
                    retry_after_ms=_RETRY_AFTER_MS,
                    refused_as="arriving",
                ) from error
            raise DeadlineExceededError(f"{late} within {self.timeout_s:g} s") from error
        finally:
            if arrival.timer is not None:
                arrival.timer.cancel()
            if (one := arrival.counted_for) is not None:
                self.slow_of[one] -= 1
                if not self.slow_of[one]:
                    del self.slow_of[one]

    def _judge(self, arrival: _Arrival, sender: Callable[[], Hashable], limit: asyncio.Timeout, rounds: int) -> None:
        """A moment has gone by: the message is slow from now on, or refused where there is no room for that."""
        loop = asyncio.get_running_loop()
        one = sender()
        own, free = self.slow_of[one], self.max_slow - self.slow
        if free and (not own or own + 1 < free):
            arrival.counted_for = one
            self.slow_of[one] += 1
        elif rounds < _ROUNDS:
            arrival.timer = loop.call_soon(self._judge, arrival, sender, limit, rounds + 1)
        else:
            arrival.refused = (
                f"{own} requests of this caller are arriving slowly, as this one does, and the other {free} of "
                f"{self.max_slow} are kept for others"
                if free
                else f"{self.max_slow} requests are arriving slowly, as this one does, and no more are taken"
            )
            limit.reschedule(loop.time())


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets in the calls of a listener. It stands inside CallInterceptor, which counts and logs what it raises.

    Health has a gate of its own within: it needs no token, and is answered however much else is asked.
    """

    def __init__(
        self,
        *,
        tokens: TokenCheck | None,
        max_calls: int,
        max_slow_requests: int,
        request_timeout_s: float,
        refusal: Refusal | None = None,
    ) -> None:
        self.tokens = tokens
        self.refusal = refusal
        self.max_calls = max_calls
        self.arrivals = Arrivals(max_slow=max_slow_requests, timeout_s=request_timeout_s)
        self.calls = 0
        self.health = HealthGate(max_calls)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method  # type: ignore[attr-defined]
        if handler is None:
            return None
        if method.startswith(_OPEN):
            return self.health.admit(handler)
        if self.tokens is not None:
            reason = self.tokens.refusal(handler_call_details.invocation_metadata)  # type: ignore[attr-defined]
            if reason is not None:
                return _refusing(UnauthenticatedError(reason, refused_as="credentials"))
            calls.token_checked()
        if self.calls >= self.max_calls:
            return _refusing(
                OverloadedError(
                    f"{self.calls} calls are in hand, at most {self.max_calls} are taken; try again later",
                    retry_after_ms=_RETRY_AFTER_MS,
                    refused_as="calls",
                )
            )
        return self._admit(handler, method)

    def _admit(self, handler: Any, method: str) -> Any:
        """The handler, its call counted until its task ends, and its request waited for no longer than allowed."""
        task = asyncio.current_task()
        assert task is not None
        self.calls += 1
        task.add_done_callback(self._release)
        deserialise = _refusing_damage(handler.request_deserializer)
        serialise = handler.response_serializer
        if handler.request_streaming:
            if handler.response_streaming:

                async def both(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
                    messages = self._each(requests, context)
                    async with contextlib.aclosing(handler.stream_stream(messages, context)) as replies:
                        async for reply in replies:
                            yield reply

                return grpc.stream_stream_rpc_method_handler(both, deserialise, serialise)

            async def stream(requests: AsyncIterator[Any], context: Any) -> Any:
                return await handler.stream_unary(self._each(requests, context), context)

            return grpc.stream_unary_rpc_method_handler(stream, deserialise, serialise)
        # As handlers of a stream of requests: gRPC would wait for a single one by itself, for ever.
        if handler.response_streaming:

            async def streaming(_: Any, context: Any) -> AsyncIterator[Any]:
                self._require_room(method, context)
                request = await _only_request(context, self.arrivals)
                async with contextlib.aclosing(handler.unary_stream(request, context)) as replies:
                    async for reply in replies:
                        yield reply

            return grpc.stream_stream_rpc_method_handler(streaming, deserialise, serialise)

        async def unary(_: Any, context: Any) -> Any:
            self._require_room(method, context)
            return await handler.unary_unary(await _only_request(context, self.arrivals), context)

        return grpc.stream_unary_rpc_method_handler(unary, deserialise, serialise)

    def _require_room(self, method: str, context: Any) -> None:
        if self.refusal is not None and (error := self.refusal(method, context)) is not None:
            raise error

    def _release(self, _: Any) -> None:
        self.calls -= 1

    async def _each(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """The messages of a stream, none waited for longer than allowed: who goes silent holds up nobody."""
        following, sender = aiter(requests), partial(calls.sender_of, context)
        while True:
            try:
                late = "the next message of the stream did not come"
                request = await self.arrivals.read(anext(following), late, sender)
            except StopAsyncIteration:
                return
            yield request


class HealthGate:
    """Lets in calls for health, which have no credentials and so little room: nobody who calls may cost others theirs.

    Checks and watches are counted apart, at most ``max_calls`` of either, and together for each connection, so that one
    connection takes no room from another.
    """

    def __init__(self, max_calls: int) -> None:
        self.max_calls = max_calls
        self.arrivals = Arrivals(max_slow=_HEALTH_SLOW, timeout_s=_HEALTH_REQUEST_S)
        self.calls: Counter[str] = Counter()
        self.calls_of: Counter[str] = Counter()

    def admit(self, handler: Any) -> Any:
        kind = "watches" if handler.response_streaming else "checks"
        behaviour = handler.unary_stream or handler.unary_unary

        async def answer(_: Any, context: Any) -> Any:
            try:
                with self._room(kind, context.peer()):
                    return await behaviour(await _only_request(context, self.arrivals), context)
            except ServiceError as error:
                await refuse(context, error)

        make: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(answer, _refusing_size(_refusing_damage(handler.request_deserializer)), handler.response_serializer)

    @contextlib.contextmanager
    def _room(self, kind: str, connection: str) -> Iterator[None]:
        if self.calls[kind] >= self.max_calls:
            raise OverloadedError(
                f"{self.calls[kind]} {kind} of health are open, at most {self.max_calls} are taken; try again later",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        if self.calls_of[connection] >= _HEALTH_CALLS_PER_CONNECTION:
            raise OverloadedError(
                f"{self.calls_of[connection]} calls for health are open on this connection, at most "
                f"{_HEALTH_CALLS_PER_CONNECTION} are taken; try again later",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        self.calls[kind] += 1
        self.calls_of[connection] += 1
        try:
            yield
        finally:
            self.calls[kind] -= 1
            self.calls_of[connection] -= 1
            if not self.calls_of[connection]:
                del self.calls_of[connection]


async def _only_request(context: Any, arrivals: Arrivals) -> Any:
    late = "the request did not arrive whole"
    request = await arrivals.read(context.read(), late, partial(calls.sender_of, context))
    if request is grpc.aio.EOF:  # type: ignore[attr-defined]
        raise InvalidArgumentError("the call ended without a request, or with one larger than is accepted")
    return request


def _refusing_damage(deserialise: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """A deserialiser for which bytes that are no message are the caller's fault."""

    def checked(content: bytes) -> Any:
        try:
            return content if deserialise is None else deserialise(content)
        except DecodeError as error:
            raise InvalidArgumentError(f"the request is not a message of its type: {error}") from error

    return checked


def _refusing_size(deserialise: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserialiser of requests for health, which does not look into what is too large for one."""

    def checked(content: bytes) -> Any:
        if len(content) > _HEALTH_REQUEST_BYTES:
            raise InvalidArgumentError(
                f"a request for health has {len(content)} bytes, at most {_HEALTH_REQUEST_BYTES} are read"
            )
        return deserialise(content)

    return checked


def _refusing(error: ServiceError) -> Any:
    """A handler that reads nothing and refuses. As one of streams, because gRPC reads a single request by itself."""

    async def refused(requests: Any, context: Any) -> Any:
        raise error

    return grpc.stream_unary_rpc_method_handler(refused)
