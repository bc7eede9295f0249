"""Traces kept by OpenTelemetry. Imported only where they are asked for: see ``quartet.tracing``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata as packages
from typing import Any

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from quartet.tracing import Attributes, Kind, Metadata, Place, Span

_KINDS = {
    "internal": trace.SpanKind.INTERNAL,
    "client": trace.SpanKind.CLIENT,
    "server": trace.SpanKind.SERVER,
}
# W3C's alone: baggage is anybody's text.
_W3C = TraceContextTextMapPropagator()


def exporting_provider(service: str, endpoint: str | None) -> TracerProvider:
    """A provider that sends spans in batches, from a thread of its own, to ``endpoint`` or where the variables say."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    attributes = {"service.version": packages.version("quartet")}
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not named:
        attributes["service.name"] = service
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class OtelSpan(Span):
    """A span of OpenTelemetry."""

    def __init__(self, kept: trace.Span, place: contexts.Context) -> None:
        self._kept = kept
        self.place = place

    @property
    def metadata(self) -> Metadata:  # type: ignore[override]
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, self.place)
        return tuple(carrier.items())

    @property
    def trace_id(self) -> str:  # type: ignore[override]
        return trace.format_trace_id(self._kept.get_span_context().trace_id)

    def set(self, attributes: Attributes) -> None:
        self._kept.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._kept.add_event(name, attributes)

    def fail(self, reason: str) -> None:
        self._kept.set_status(trace.StatusCode.ERROR, reason)

    def stay(self) -> None:
        contexts.attach(self.place)

    def end(self, at_unix_ns: int | None = None) -> None:
        self._kept.end(at_unix_ns)


class OtelTracer:
    """Makes spans by a provider. ``owned``: it is shut down with us."""

    def __init__(self, provider: TracerProvider, *, owned: bool = True) -> None:
        self._provider = provider
        self._owned = owned
        self._tracer = provider.get_tracer("quartet", packages.version("quartet"))

    def span(
        self,
        name: str,
        kind: Kind,
        attributes: Attributes,
        parent: Place,
        links: Sequence[Place],
        start_unix_ns: int | None,
    ) -> Span:
        kept = self._tracer.start_span(
            name,
            context=parent,
            kind=_KINDS[kind],
            attributes=attributes,
            links=[trace.Link(trace.get_current_span(place).get_span_context()) for place in links],
            start_time=start_unix_ns,
        )
        return OtelSpan(kept, trace.set_span_in_context(kept, parent))

    def here(self) -> Place:
        return contexts.get_current()

    def from_metadata(self, metadata: Any) -> Place:
        carrier: Mapping[str, str] = {
            key: value for key, value in metadata or () if key in _W3C.fields and isinstance(value, str)
        }
        return _W3C.extract(carrier, contexts.Context())

    @contextlib.contextmanager
    def enter(self, place: Place) -> Iterator[None]:
        token = contexts.attach(place)
        try:
            yield
        finally:
            contexts.detach(token)

    def close(self) -> None:
        if self._owned:
            self._provider.shutdown()
