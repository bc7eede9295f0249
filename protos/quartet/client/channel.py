"""Channels: load balancing over healthy replicas, deadlines, retries and readiness, the same for every client."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quartet import tracing
from quartet.client.errors import NotReadyError, UnavailableError, translate
from quartet.client.security import Security

T = TypeVar("T")

REQUEST_ID = "quartet-request-id"
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
_belongs_to: ContextVar[str] = ContextVar("quartet_request_ids", default="")


@dataclass(frozen=True, kw_only=True)
class CallPolicy:
    """How long to wait, how often to try again, and how large a message may be. Seconds, MiB.

    ``deadline_s`` bounds one attempt; ``patience_s`` bounds how long a call that is safe to repeat goes on trying
    while the service is away or overloaded, so that a service that is restarted is found again. ``max_message_mib``:
    of requests and replies; the service has a limit of its own.
    """

    deadline_s: float = 600.0
    patience_s: float = 120.0
    first_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    max_message_mib: int = 64


def target_of(addresses: str) -> str:
    """The gRPC target of ``host:port``, ``ip:port,ip:port``, or any URI gRPC knows (``dns:///name:port``).

    Calls are spread over the addresses of a list, or over those that the one name resolves to.

    Raises:
        ValueError: it is none of these.
    """
    if "://" in addresses or addresses.startswith(("unix:", "ipv4:", "ipv6:", "dns:")):
        return addresses
    parts = split_addresses(addresses)
    if len(parts) == 1:
        return f"dns:///{parts[0]}"
    kinds = {_ip_version(part) for part in parts}
    if kinds not in ({4}, {6}):
        raise ValueError(
            f"address {addresses!r}: several must be IP addresses of one kind, because gRPC resolves one name alone; "
            "give a name that resolves to all of them"
        )
    return f"ipv{kinds.pop()}:" + ",".join(part.replace("localhost:", "127.0.0.1:") for part in parts)


def split_addresses(addresses: str) -> list[str]:
    """The single addresses of a list; a URI is one.

    Raises:
        ValueError: one is not host:port.
    """
    if "://" in addresses or addresses.startswith("unix:"):
        return [addresses]
    if addresses.startswith(("ipv4:", "ipv6:", "dns:")):
        scheme, _, rest = addresses.partition(":")
        return [f"{scheme}:{part}" for part in rest.split(",")]
    parts = [part.strip() for part in addresses.split(",") if part.strip()]
    if not parts or not all(_is_host_port(part) for part in parts):
        raise ValueError(f"address {addresses!r} must be host:port, or several of them with commas between")
    return parts


def _is_host_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    # An IPv6 address without brackets could not be told from its port.
    return bool(host) and (":" not in host or host.startswith("[")) and port.isdigit() and 0 < int(port) < 65536


def _ip_version(address: str) -> int:
    """4, 6, or 0 for a name."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).version
    except ValueError:
        return 0


def open_channel(addresses: str, health_service: str, security: Security, *, max_message_mib: int) -> grpc.aio.Channel:
    """A channel that spreads calls over the replicas that report ``health_service`` as SERVING."""
    service_config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": health_service},
    }
    options: list[tuple[str, object]] = [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.max_receive_message_length", max_message_mib * 2**20),
        ("grpc.max_send_message_length", max_message_mib * 2**20),
        # Long unary calls over idle links: notice a dead peer, without angering the server's ping policy.
        ("grpc.keepalive_time_ms", 300_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Two clients in one process must not share a connection that one of them closes.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return security.open_channel(target_of(addresses), options)


class ServiceClient:
    """Base of the typed clients: one channel, one service. Use as an async context manager or call ``close``."""

    health_service: str
    name: str

    def __init__(self, addresses: str, *, policy: CallPolicy | None = None, security: Security | None = None) -> None:
        """``addresses``: see :func:`target_of`. Must be made inside a running event loop.

        Raises:
            CredentialsError: a file of ``security`` cannot be used.
        """
        self.addresses = addresses
        self.policy = policy or CallPolicy()
        self.security = security or Security()
        self._credentials = self.security.metadata_source(addresses)
        self._channel = open_channel(
            addresses, self.health_service, self.security, max_message_mib=self.policy.max_message_mib
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; calls in flight are cancelled."""
        await self._channel.close(None)

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when the service reports SERVING at every address of the list, and calls get there.

        Raises:
            NotReadyError: it did not within ``timeout_s``; names the service, its address and the last answer.
        """
        end = time.monotonic() + timeout_s
        await asyncio.gather(*(self._wait_address(one, end, timeout_s) for one in split_addresses(self.addresses)))
        # The channel of the calls may be pausing between two tries to connect, and would refuse the next call at once.
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                await self._channel.channel_ready()
        except TimeoutError:
            raise NotReadyError(
                f"serving at {self.addresses}, but calls did not get there within {timeout_s:g} s", service=self.name
            ) from None

    async def _wait_address(self, address: str, end: float, timeout_s: float) -> None:
        last = "no answer"
        # Its own plain channel: the balanced one would hide a NOT_SERVING backend instead of showing it.
        async with self.security.open_channel(target_of(address), []) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=self.health_service)
            while True:
                remaining_s = end - time.monotonic()
                try:
                    reply = await stub.Check(
                        request, timeout=max(0.05, min(2.0, remaining_s)), metadata=self._credentials()
                    )
                    last = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                except grpc.aio.AioRpcError as error:
                    last = f"{error.code().name}: {error.details()}"
                if time.monotonic() >= end:
                    raise NotReadyError(
                        f"not ready at {address} after {timeout_s:g} s (last answer: {last}); "
                        "is it started, and is the address right?",
                        service=self.name,
                    )
                await asyncio.sleep(min(0.2, max(0.0, end - time.monotonic())))

    def _metadata(self, request_id: str) -> tuple[tuple[str, str], ...]:
        return ((REQUEST_ID, request_id), *self._credentials())

    async def _call(self, method: Callable[..., Awaitable[T]], request: Any) -> T:
        """One unary call that is safe to repeat, tried again with backoff while the service is away or overloaded."""
        request_id = new_request_id()
        start = time.monotonic()
        backoff_s = self.policy.first_backoff_s
        with self._span(type(request).__name__.removesuffix("Request"), request_id) as span:
            while True:
                metadata = (*self._metadata(request_id), *span.metadata)
                try:
                    # Not wait_for_ready: that would wait for a service that is away until the deadline of an attempt.
                    return await method(request, timeout=self.policy.deadline_s, metadata=metadata)
                except grpc.aio.AioRpcError as error:
                    typed = translate(error, self.name, request_id)
                    pause_s = spread_pause_s(backoff_s, typed.retry_after_s)
                    waited_s = time.monotonic() - start
                    if not isinstance(typed, UnavailableError) or waited_s + pause_s > self.policy.patience_s:
                        span.set({"rpc.grpc.status_code": error.code().value[0]})
                        raise typed from error
                    span.event("tried again", {"code": error.code().name, "pause_s": pause_s})
                    await asyncio.sleep(pause_s)
                    backoff_s = min(2 * backoff_s, self.policy.max_backoff_s)

    def _span(self, method: str, request_id: str) -> tracing.Span:
        """Of a call with all its attempts."""
        if not tracing.active():
            return tracing.NO_SPAN
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": self.health_service,
            "rpc.method": method,
            "quartet.request_id": request_id,
        }
        return tracing.span(f"{self.health_service}/{method}", kind="client", attributes=attributes)

    @contextlib.asynccontextmanager
    async def _stream(
        self, request_id: str | None = None, *, method: str
    ) -> AsyncIterator[tuple[tuple[str, str], ...]]:
        """Metadata of a streaming call; its failures come out typed. Not retried: the caller knows what is missing."""
        request_id = request_id or new_request_id()
        with self._span(method, request_id) as span:
            try:
                yield (*self._metadata(request_id), *span.metadata)
            except grpc.aio.AioRpcError as error:
                span.set({"rpc.grpc.status_code": error.code().value[0]})
                raise translate(error, self.name, request_id) from error


def spread_pause_s(backoff_s: float, retry_after_s: float) -> float:
    """Seconds before the next try: about ``backoff_s``, and never less than the service asked for.

    At random, so that callers who were refused in one moment do not come back in one.
    """
    return max(backoff_s * random.uniform(0.8, 1.2), retry_after_s * random.uniform(1.0, 1.3))


def new_request_id() -> str:
    """Of a call: what it belongs to, where that is said, and something that no other call has."""
    belongs_to = _belongs_to.get()
    return f"{belongs_to}.{uuid.uuid4().hex}" if belongs_to else uuid.uuid4().hex


@contextlib.contextmanager
def request_ids(prefix: str) -> Iterator[None]:
    """Calls made within have request ids that begin with ``prefix`` and a dot, so that logs of services can be searched
    for all that belongs together.

    Raises:
        ValueError: ``prefix`` is not 1 to 64 letters, digits, ``.``, ``_`` and ``-``.
    """
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix is {prefix!r}, must be 1 to 64 letters, digits, '.', '_' and '-'")
    token = _belongs_to.set(prefix)
    try:
        yield
    finally:
        _belongs_to.reset(token)
