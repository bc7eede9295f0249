"""Bootstrap of a service: listeners, health, reflection, metrics, and a graceful end.

A service is built before it serves: the listeners are bound first, so that a port already taken is refused before a
model is loaded, health says NOT_SERVING while it loads, and SERVING after the warm-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from quartet import tracing
from quartet.model_folder import ModelFolderError
from services.runtime.config import ServiceSettings
from services.runtime.errors import StartError
from services.runtime.gate import Gate, Refusal
from services.runtime.health import NOT_SERVING, SERVING, Health
from services.runtime.interceptors import CallInterceptor
from services.runtime.logs import configure_logging
from services.runtime.security import Guard, ListenerSecurity, warn_of_exposure
from services.runtime.telemetry import ServiceMetrics

log = structlog.get_logger()

# More than may come over all connections.
_MAX_UNSEEN_CALLS = 2**20
# A peer that does not answer pings is gone; one that has called nothing for so long connects again when it does.
_KEEPALIVE_MS = 60_000
_IDLE_MS = 900_000
# For what a service that fails has left to say: its model is gone, and who waits is told so at once.
_LAST_WORDS_S = 2.0
# In which calls that the end cuts short are told so.
_FAREWELL_S = 1.0
# A scraper sends its request at once.
_HTTP_TIMEOUT_S = 10.0


@dataclass(kw_only=True)
class Listener:
    """One gRPC listener: where it binds, what it serves, and to whom.

    ``add`` registers the servicers; ``services`` are their full names, for health and reflection; ``security`` and
    ``host`` are those of the settings where they are None; ``refusal`` says why a call of a method is refused unread,
    if it is.
    """

    name: str
    port: int
    services: tuple[str, ...]
    add: Callable[[grpc.aio.Server], None]
    security: ListenerSecurity | None = None
    host: str | None = None
    refusal: Refusal | None = None
    server: grpc.aio.Server | None = field(default=None, init=False)


class ServiceRuntime:
    """Runs the listeners of one service until it is told to stop. Leaving it as a context closes what is open."""

    def __init__(self, *, name: str, settings: ServiceSettings, metrics: ServiceMetrics) -> None:
        self.name = name
        self.settings = settings
        self.metrics = metrics
        self.health = Health()
        self.listeners: list[Listener] = []
        self._calls = CallInterceptor(metrics, reader_timeout_s=settings.reader_timeout_s)
        self.at_drain: list[Callable[[], None]] = []
        """Called when the service begins to end, for work that would outlast the grace period to be given up."""
        self.ends_s = 0.0
        """When the grace period is over, by the monotonic clock; known from when the service begins to end."""
        self._stop = asyncio.Event()
        self._failure: str | None = None
        self._ready = False

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Also while the model loads: the first process of a container has no default handler to end it.
            loop.add_signal_handler(number, self._on_signal, number)
        return self

    def _on_signal(self, number: int) -> None:
        if not self._ready:
            # Nothing is in hand, and a thread that loads can't be told to stop.
            log.info("stopped_while_loading", service=self.name)
            os._exit(128 + number)
        self._stop.set()

    async def __aexit__(self, *exception: object) -> None:
        await self.close(grace_s=0.0)

    async def bind(self, *listeners: Listener) -> None:
        """Binds and starts the listeners, NOT_SERVING; the first is the service's own.

        Raises:
            StartError: a port is taken or not allowed, a certificate, key or token file is not usable, or an admin port
                would let in whom the first listener does; names the listener and address or the flag and file, and what
                to do.
        """
        if self.settings.health_port is not None:
            nothing = ListenerSecurity()
            health = Listener(
                name="health (--health-port)",
                port=self.settings.health_port,
                services=(),
                add=lambda server: None,
                security=nothing,
            )
            listeners = (*listeners, health)
        # All files first: none of them is refused while another listener is open already.
        guards = [Guard(listener.security or self.settings.security) for listener in listeners]
        for listener, guard in zip(listeners, guards, strict=True):
            if listener.security is not None:  # A port of its own has credentials of its own.
                guard.keep_apart_from(guards[0])
        for listener, guard in zip(listeners, guards, strict=True):
            certificate = guard.certificate
            host = listener.host or self.settings.host
            _require_free(host, listener)
            gate = Gate(
                tokens=guard.tokens,
                max_calls=self.settings.max_calls,
                max_slow_requests=self.settings.max_slow_requests,
                request_timeout_s=self.settings.request_timeout_s,
                refusal=listener.refusal,
            )
            server = grpc.aio.server(
                interceptors=[self._calls, gate], options=_channel_options(self.settings, listener)
            )
            listener.add(server)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
            if self.settings.reflection and listener.services:
                names = (*listener.services, "grpc.health.v1.Health", reflection.SERVICE_NAME)
                reflection.enable_server_reflection(names, server)
            address = f"{host}:{listener.port}"
            try:
                if certificate is None:
                    port = server.add_insecure_port(address)
                else:
                    port = server.add_secure_port(address, certificate.credentials())
            except RuntimeError as error:
                reason = "the port is taken or not allowed"
                if certificate is not None:
                    reason += ", or gRPC does not take the kind of key in the certificate (RSA and ECDSA it does)"
                raise _cannot_listen(host, listener, reason) from error
            listener.server, listener.host, listener.port = server, host, port
            self.listeners.append(listener)
            if listener.services:
                security = listener.security or self.settings.security
                warn_of_exposure(host, port, listener.name, security)
            for service in listener.services:
                self.health.set(service, NOT_SERVING)
            await server.start()
        self.health.set("", SERVING)  # Liveness: the process answers, ready or not.

    def serve_metrics(self) -> int:
        """Starts the Prometheus endpoint and returns its port.

        Raises:
            StartError: the port is taken.
        """
        settings = self.settings
        return serve_metrics(self.metrics.registry, settings.metrics_host or settings.host, settings.metrics_port)

    def set_serving(self, serving: bool) -> None:
        """Turns readiness of all services on or off; liveness stays."""
        for listener in self.listeners:
            for service in listener.services:
                self.health.set(service, SERVING if serving else NOT_SERVING)

    def stop(self, failure: str | None = None) -> None:
        """Asks the service to end; with a ``failure`` it exits 1, so that a supervisor starts it again."""
        self._failure = self._failure or failure
        self._stop.set()

    async def run(self) -> int:
        """Serves until a signal or ``stop``; drains; returns the exit code."""
        self._ready = True
        # What the start has built stays for good: a full collection would walk it all, for a tenth of a second or more.
        gc.collect()
        gc.freeze()
        self.set_serving(True)
        addresses = {listener.name: f"{listener.host}:{listener.port}" for listener in self.listeners}
        log.info("ready", service=self.name, addresses=addresses)
        await self._stop.wait()
        grace_s = min(_LAST_WORDS_S, self.settings.grace_s) if self._failure else self.settings.grace_s
        self.ends_s = time.monotonic() + grace_s
        log.info("draining", service=self.name, grace_s=grace_s, failure=self._failure)
        for give_up in self.at_drain:
            give_up()
        await self.close(grace_s=grace_s)
        log.info("stopped", service=self.name)
        return 1 if self._failure else 0

    async def close(self, grace_s: float) -> None:
        """NOT_SERVING, then work in flight finishes within ``grace_s``, then the listeners close.

        What has not finished by then, waiting or with the model, ends as UNAVAILABLE: gRPC alone would close its
        connection without a word of ours.
        """
        listeners, self.listeners = self.listeners, []
        self.health.end()
        stops = [asyncio.ensure_future(x.server.stop(grace_s + _FAREWELL_S)) for x in listeners if x.server is not None]
        if stops and (await asyncio.wait(stops, timeout=grace_s))[1]:
            self._calls.end_calls()
        await asyncio.gather(*stops)


def _channel_options(settings: ServiceSettings, listener: Listener) -> list[tuple[str, int]]:
    options = [
        # By default gRPC lets a fast client send many MiB ahead of what is read, of every call. Without that 64 KiB
        # come before a message is asked for, and then all of it. On a port of its own are uploads that gain from it.
        ("grpc.http2.bdp_probe", int(listener.security is not None)),
        # Without this two processes could share a port and split its calls between them.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_message_mib * 2**20),
        # Clients' keepalive pings on idle links are welcome, not answered with too_many_pings.
        ("grpc.http2.min_ping_interval_without_data_ms", 60_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that opens a connection and says nothing, or a little now and then, loses it.
        ("grpc.server_handshake_timeout_ms", int(settings.handshake_timeout_s * 1000)),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.max_connection_calls),
        # Above 1,000 calls that have not been looked at gRPC would drop some, as CANCELLED and at random. We look at
        # all of them, and refuse those above max_calls with a status that says what to do.
        ("grpc.server.max_pending_requests", _MAX_UNSEEN_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_UNSEEN_CALLS),
    ]
    if settings.max_connection_age_s:
        # What is in flight may finish: the limit is of connections, not of calls.
        options.append(("grpc.max_connection_age_ms", max(1, int(settings.max_connection_age_s * 1000))))
    return options


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> int:
    """Starts a Prometheus endpoint and returns its port.

    Raises:
        StartError: the port is taken.
    """
    try:
        server, _ = start_http_server(port, addr=host.strip("[]"), registry=registry)
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port} for metrics: {error.strerror}; "
            "stop what holds it or choose another --metrics-port"
        ) from error
    server.RequestHandlerClass = _impatient(server.RequestHandlerClass)
    return int(server.server_port)


def _impatient(handler: Any) -> type:
    """The HTTP handler, which waits forever for a request, as one that gives up."""

    class Impatient(handler):  # type: ignore[misc]
        timeout = _HTTP_TIMEOUT_S

        def handle(self) -> None:
            with contextlib.suppress(TimeoutError, ConnectionError):
                super().handle()

    return Impatient


def _require_free(host: str, listener: Listener) -> None:
    """Refuses a port that is taken, with the system's reason: gRPC would only log it, in its own words."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), listener.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind(address)
    except OSError as error:
        raise _cannot_listen(host, listener, error.strerror or str(error)) from error


def _cannot_listen(host: str, listener: Listener, reason: str) -> StartError:
    return StartError(
        f"cannot listen on {host}:{listener.port} for {listener.name}: {reason}; stop what holds it or choose another"
    )


def run_service(name: str, settings: ServiceSettings, serve: Callable[[], Awaitable[int]]) -> None:
    """Entry of every service's main: logging, event loop, and errors of the start as one line with exit code 2."""
    configure_logging(settings.log_level, settings.log_format)
    code = 2
    try:
        tracing.start(name, settings.otlp_endpoint)
        code = _run_loop(serve)
    except (StartError, ModelFolderError, tracing.TracingError) as error:
        sys.stderr.write(f"{name}: {error}\n")
    except KeyboardInterrupt:
        code = 130
    tracing.stop()
    sys.stderr.flush()
    sys.exit(code)


def _run_loop(serve: Callable[[], Awaitable[int]]) -> int:
    async def main() -> int:
        return await serve()

    try:
        import uvloop
    except ImportError:  # Windows.
        return asyncio.run(main())
    result: Any = uvloop.run(main())
    return int(result)
