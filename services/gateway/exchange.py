"""What happens around every HTTP request: request id, key, limits of size and time, log, metrics, trace, and the one
place where what nobody foresaw becomes a status.

The body is read here, whole, before the application sees the request, so that a caller who sends slowly or too much
holds nothing of it, and a caller who leaves is noticed: then what runs for it is cancelled, down to the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars

from quartet import tracing
from quartet.client.channel import request_ids
from quartet.client.errors import QuartetError
from services.gateway.keys import ANYBODY, Caller, Keys, Limits
from services.gateway.metrics import GatewayMetrics
from services.gateway.problems import ProblemError

log = structlog.get_logger()

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json", "/favicon.ico"})
"""Without a key: they tell nothing but what the gateway is, and whether it is ready."""
DEADLINE = "x-request-timeout"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_RECENT = 2048


@dataclass(eq=False, kw_only=True)
class Exchange:
    """One request while it is in hand. ``tokens``: taken from the caller's limits; ``items``: answered."""

    request_id: str
    caller: Caller = ANYBODY
    start_s: float = field(default_factory=time.monotonic)
    body_bytes: int = 0
    items: int = 0
    tokens: int = 0
    status: int = 0


_current: ContextVar[Exchange] = ContextVar("quartet_exchange")


def current() -> Exchange:
    """The request that this code runs for."""
    return _current.get()


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Of requests: see GatewaySettings."""

    body_bytes: int
    held_bytes: int
    requests: int
    arrival_s: float
    deadline_s: float


class Exchanges:
    """The outermost ASGI application."""

    def __init__(self, app: App, *, bounds: Bounds, keys: Keys | None, limits: Limits, metrics: GatewayMetrics) -> None:
        self._app = app
        self._bounds = bounds
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._in_hand: set[Exchange] = set()
        self._held_bytes = 0
        self.recent_s: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        """When the latest requests that were answered ended, by the monotonic clock, and how long they took."""

    @property
    def in_hand(self) -> int:
        """Requests now."""
        return len(self._in_hand)

    def latencies_s(self, within_s: float) -> list[float]:
        """Of the requests that were answered in the last ``within_s`` seconds, in order; of the latest ones alone where
        they are very many."""
        since_s = time.monotonic() - within_s
        return sorted(seconds for at_s, seconds in self.recent_s if at_s >= since_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        sent_id = headers.get("x-request-id", "")
        exchange = Exchange(request_id=sent_id if _REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex)
        _current.set(exchange)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                if not any(name.lower() == b"x-request-id" for name, _ in message["headers"]):
                    message["headers"] = [*message["headers"], (b"x-request-id", exchange.request_id.encode())]
            await send(message)

        self._in_hand.add(exchange)
        self._metrics.in_flight.set(len(self._in_hand))
        outcome = "request_done"
        with bound_contextvars(request_id=exchange.request_id), request_ids(exchange.request_id):
            try:
                with self._span(scope, exchange, headers):
                    await self._answer(scope, receive, watched, exchange, headers)
            except asyncio.CancelledError:
                outcome = "request_left"
                exchange.status = exchange.status or 499
                raise
            except _LeftError:
                outcome = "request_left"
                exchange.status = exchange.status or 499
            finally:
                self._in_hand.discard(exchange)
                self._held_bytes -= exchange.body_bytes
                self._metrics.in_flight.set(len(self._in_hand))
                self._metrics.held_bytes.set(self._held_bytes)
                self._record(scope, exchange, outcome)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, exchange: Exchange, headers: dict[str, str]
    ) -> None:
        """Answers, with a problem where there is one."""
        try:
            seconds = self._admit(scope, exchange, headers)
            body = await self._read(receive, exchange, headers)
            await self._run(scope, receive, send, body, seconds)
        except _LeftError:
            raise
        except Exception as error:
            problem = error if isinstance(error, ProblemError) else None
            if isinstance(error, QuartetError):
                problem = ProblemError.of(error)
            if problem is None:
                log.error("request_failed", exc_info=error)
                problem = ProblemError(
                    500, f"internal error; the gateway's log says why under request id {exchange.request_id}"
                )
            if exchange.status:  # It had begun to answer.
                raise _LeftError from error
            await problem.response(exchange.request_id)(scope, receive, send)

    def _admit(self, scope: Scope, exchange: Exchange, headers: dict[str, str]) -> float:
        """Seconds that the request may take.

        Raises:
            ProblemError: its key is none, or a header is wrong, or there is no room for it.
        """
        if len(self._in_hand) > self._bounds.requests:
            self._metrics.refused.labels("requests").inc()
            raise ProblemError(503, f"{self._bounds.requests} requests are in hand, as many as may be (--max-requests)")
        if self._keys is not None and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            exchange.caller = self._caller(headers)
        wanted = headers.get(DEADLINE)
        if wanted is None:
            return self._bounds.deadline_s
        try:
            seconds = float(wanted)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise ProblemError(
                422, f"header X-Request-Timeout is {wanted[:80]!r}: must be seconds, above 0", field="X-Request-Timeout"
            )
        return min(seconds, self._bounds.deadline_s)

    def _caller(self, headers: dict[str, str]) -> Caller:
        assert self._keys is not None
        sent = headers.get("authorization", "")
        scheme, _, key = sent.partition(" ")
        if not sent:
            key = headers.get("x-api-key", "")
        elif scheme.lower() != "bearer":
            key = ""
        caller = self._keys.caller_of(key.strip()) if key.strip() else None
        if caller is None:
            self._metrics.refused.labels("key").inc()
            told = "the key is not accepted: it is wrong, or has been revoked" if key.strip() else "there is no key"
            raise ProblemError(401, f"{told}; send the header Authorization: Bearer KEY")
        return caller

    async def _read(self, receive: Receive, exchange: Exchange, headers: dict[str, str]) -> bytes:
        """The whole body.

        Raises:
            ProblemError: it is too large, arrives too slowly, or there is no room for it.
            _LeftError: the caller left before it had arrived.
        """
        bounds = self._bounds
        told = headers.get("content-length", "")
        if told.isdecimal() and int(told) > bounds.body_bytes:
            raise self._too_large(f"{int(told):,} bytes")
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(bounds.arrival_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _LeftError
                    part: bytes = message.get("body", b"")
                    parts.append(part)
                    exchange.body_bytes += len(part)
                    self._held_bytes += len(part)
                    if exchange.body_bytes > bounds.body_bytes:
                        raise self._too_large(f"more than {bounds.body_bytes:,} bytes")
                    if self._held_bytes > bounds.held_bytes:
                        self._metrics.refused.labels("held_bytes").inc()
                        raise ProblemError(
                            503,
                            f"requests in hand hold {bounds.held_bytes:,} bytes, as many as may be (--max-held-mib)",
                        )
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            self._metrics.refused.labels("arriving").inc()
            raise ProblemError(
                408, f"the body did not arrive within {bounds.arrival_s:g} s (--arrival-timeout-s)"
            ) from None
        self._metrics.held_bytes.set(self._held_bytes)
        return b"".join(parts)

    def _too_large(self, size: str) -> ProblemError:
        self._metrics.refused.labels("too_large").inc()
        return ProblemError(413, f"the body has {size}, at most {self._bounds.body_bytes:,} are read (--max-body-mib)")

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytes, seconds: float) -> None:
        """Runs the application until it has answered, the caller leaves or time is up."""
        gone = asyncio.Event()
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        work = asyncio.create_task(_in_time(self._app(scope, replay, send), seconds))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                gone.set()
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
                raise _LeftError
            await work
        except TimeoutError:
            raise ProblemError(504, f"not done within {seconds:g} s, the time that the request may take") from None
        finally:
            for task in (work, leaving):
                task.cancel()

    def _span(self, scope: Scope, exchange: Exchange, headers: dict[str, str]) -> tracing.Span:
        if not tracing.active():
            return tracing.NO_SPAN
        return tracing.span(
            f"{scope['method']} request",
            kind="server",
            attributes={"http.request.method": scope["method"], "quartet.request_id": exchange.request_id},
            parent=tracing.from_metadata(list(headers.items())),
        )

    def _record(self, scope: Scope, exchange: Exchange, outcome: str) -> None:
        """One line a request. What was asked and answered is counted and never told."""
        now_s = time.monotonic()
        seconds = now_s - exchange.start_s
        route = getattr(scope.get("route"), "path", "unmatched")
        status = exchange.status or 500
        self._metrics.requests.labels(route, str(status), exchange.caller.name).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if route not in OPEN_PATHS and status < 400:
            self.recent_s.append((now_s, seconds))
        event = {
            "request_id": exchange.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "key": exchange.caller.name,
            "items": exchange.items,
            "tokens": exchange.tokens,
        }
        (log.warning if status >= 500 else log.info)(outcome, **event)


class _LeftError(Exception):
    """There is nobody to answer any more."""


async def _in_time(work: Awaitable[None], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await work


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
