"""Traces: spans of calls, waits, batches and phases, by OpenTelemetry where it is installed and asked for.

Otherwise nothing happens here, and nothing is imported: every function answers with what does nothing. A trace goes
from process to process in the call's metadata, in the form of W3C (``traceparent``).

Spans tell who, when and how much: ids, counts and codes. Never a text, a token or a credential, nor the message of an
error, which may quote one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]
Kind = Literal["internal", "client", "server"]
Metadata = tuple[tuple[str, str], ...]
Place = Any
"""Where in a trace something happens: opaque; None while no traces are kept."""

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("quartet.tracing")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PARTS = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")


class TracingError(Exception):
    """Traces were asked for and cannot be had; the message says why and what to do."""


class Span:
    """Something that takes time. This one does nothing: what there is while no traces are kept.

    As a context it ends with its block, and an exception marks it as failed. ``place``: for what happens within it.
    """

    place: Place = None
    metadata: Metadata = ()
    """What takes the trace to a service."""
    trace_id = ""

    def set(self, attributes: Attributes) -> None:
        """Adds attributes."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Adds something that happened now."""

    def fail(self, reason: str) -> None:
        """Marks it as failed. ``reason``: a code or the name of an error's type."""

    def stay(self) -> None:
        """Makes it the place of all that this task does from now on. For tasks that are made for it."""

    def end(self, at_unix_ns: int | None = None) -> None:
        """Ends it, now unless told otherwise. Once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Exception):
            self.fail(kind.__name__)
        self.end()


NO_SPAN = Span()


class Tracer(Protocol):
    """What keeps traces; ``quartet.tracing_otel`` has the one there is."""

    def span(
        self,
        name: str,
        kind: Kind,
        attributes: Attributes,
        parent: Place,
        links: Sequence[Place],
        start_unix_ns: int | None,
    ) -> Span: ...

    def here(self) -> Place: ...

    def from_metadata(self, metadata: Any) -> Place: ...

    def enter(self, place: Place) -> contextlib.AbstractContextManager[None]: ...

    def close(self) -> None: ...


_tracer: Tracer | None = None


def start(service: str, endpoint: str | None = None) -> bool:
    """Begins to send traces as ``service`` where an endpoint is set; returns whether one is.

    All else is set by the standard variables of OpenTelemetry (``OTEL_EXPORTER_OTLP_HEADERS``,
    ``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME``, ``OTEL_SDK_DISABLED``, ...). A variable that cannot be followed is a
    warning in the log: it may be set for everything on a machine.

    Args:
        endpoint: of a collector that takes OTLP over gRPC, http(s)://host:port; None: what the variables say.

    Raises:
        TracingError: ``endpoint`` is set, and is none, or the extra ``otel`` is not installed.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if endpoint is None:
        if not any(os.environ.get(name, "").strip() for name in _ENDPOINTS) or _elsewhere():
            return False
    elif not endpoint.startswith(("http://", "https://")):
        raise TracingError(
            f"the endpoint of traces is {endpoint!r}, must be http://host:port (plain) or https://host:port (TLS)"
        )
    if not _installed():
        message = "traces need the extra otel: pip install 'quartet[otel]'"
        if endpoint is not None:
            raise TracingError(message)
        _log.warning("no traces are sent, although an endpoint is set in the environment: %s", message)
        return False
    from quartet.tracing_otel import OtelTracer, exporting_provider

    _use(OtelTracer(exporting_provider(service, endpoint)))
    return True


def use(provider: TracerProvider) -> None:
    """Lets the clients in this process add to the traces of an application that has OpenTelemetry set up itself.

    ``provider`` stays the application's to shut down.
    """
    from quartet.tracing_otel import OtelTracer

    _use(OtelTracer(provider, owned=False))


def stop() -> None:
    """Sends what has not been sent yet, and keeps no more traces."""
    global _tracer
    tracer, _tracer = _tracer, None
    if tracer is not None:
        tracer.close()


def active() -> bool:
    """Whether traces are kept: for work that would be for them alone."""
    return _tracer is not None


def span(
    name: str,
    *,
    kind: Kind = "internal",
    attributes: Attributes | None = None,
    parent: Place = None,
    links: Sequence[Place] = (),
    start_unix_ns: int | None = None,
) -> Span:
    """Begins a span within ``parent``, or else where this task is; it is not the place of what follows."""
    if _tracer is None:
        return NO_SPAN
    return _tracer.span(name, kind, attributes or {}, parent, links, start_unix_ns)


@contextlib.contextmanager
def phase(name: str, attributes: Attributes | None = None) -> Iterator[Span]:
    """A span that is the place of all within the block."""
    if _tracer is None:
        yield NO_SPAN
        return
    with span(name, attributes=attributes) as begun, _tracer.enter(begun.place):
        yield begun


def traced(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes every call of a function, not of a coroutine, a ``phase`` of this name."""

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def within(*arguments: P.args, **named: P.kwargs) -> T:
            if _tracer is None:
                return function(*arguments, **named)
            with phase(name):
                return function(*arguments, **named)

        return within

    return wrap


def here() -> Place:
    """The place of this task."""
    return None if _tracer is None else _tracer.here()


def from_metadata(metadata: Any) -> Place:
    """The place that a caller's metadata names, or where a trace of its own begins."""
    return None if _tracer is None else _tracer.from_metadata(metadata)


def _use(tracer: Tracer) -> None:
    global _tracer
    stop()
    _tracer = tracer


def _installed() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in _PARTS)
    except ModuleNotFoundError:  # A package above it is missing.
        return False


def _elsewhere() -> bool:
    """Whether the environment wants its traces somewhere that is not OTLP over gRPC."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if exporter == "none":
        return True
    protocol = next((value for name in _PROTOCOLS if (value := os.environ.get(name, "").strip())), "grpc")
    if exporter == "otlp" and protocol == "grpc":
        return False
    wanted = f"OTEL_TRACES_EXPORTER {exporter}" if exporter != "otlp" else f"OTEL_EXPORTER_OTLP_PROTOCOL {protocol}"
    _log.warning("no traces are sent: the environment asks for %s, and there is otlp over grpc alone", wanted)
    return True
