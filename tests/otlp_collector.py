"""A collector of traces for tests: takes OTLP over gRPC, keeps what came. Without the extra otel importers skip."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes OTLP over gRPC, and keeps what came."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []
        self.lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:
        with self.lock:
            self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[tuple[str, Any]]:
        """(service, span), in the order in which they began."""
        with self.lock:
            found = [
                (attribute.value.string_value, span)
                for request in self.requests
                for resource in request.resource_spans
                for attribute in resource.resource.attributes
                if attribute.key == "service.name"
                for scope in resource.scope_spans
                for span in scope.spans
            ]
        return sorted(found, key=lambda pair: pair[1].start_time_unix_nano)

    def wait_for(self, *names: tuple[str, str]) -> dict[tuple[str, str], Any]:
        """The last span of each (service, name), once all have come."""
        end_s = time.monotonic() + 20
        while True:
            found = {(service, span.name): span for service, span in self.spans()}
            if set(names) <= set(found):
                return found
            assert time.monotonic() < end_s, (names, sorted(found))
            time.sleep(0.05)


def inside(child: Any, parent: Any) -> bool:
    return (child.trace_id, child.parent_span_id) == (parent.trace_id, parent.span_id)


@contextlib.contextmanager
def start_collector() -> Iterator[tuple[Collector, str]]:
    """The collector and its endpoint."""
    servicer = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield servicer, endpoint
    finally:
        server.stop(0)
