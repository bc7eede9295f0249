"""Metrics of the gateway, by the conventions of Prometheus. docs/metrics.md has a table of them all."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from services.runtime.telemetry import ITEM_BUCKETS, LATENCY_BUCKETS_S


class GatewayMetrics:
    """Labels have few values, which are ours: routes, HTTP statuses, reasons, and the names of the file of keys."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "quartet_gateway_requests_total",
            "Finished requests by route, HTTP status and name of the key",
            ["route", "status", "key"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "quartet_gateway_request_seconds",
            "Time from the head of a request to the end of its response",
            ["route"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.in_flight = Gauge("quartet_gateway_requests_in_flight", "Requests in hand", registry=self.registry)
        self.held_bytes = Gauge("quartet_gateway_held_bytes", "Bytes of requests in hand", registry=self.registry)
        self.tokens = Counter(
            "quartet_gateway_tokens_total",
            "Tokens scored, generated or given log-probabilities, by name of the key",
            ["key"],
            registry=self.registry,
        )
        self.refused = Counter(
            "quartet_gateway_refused_total", "Requests refused before any work, by reason", ["reason"],
            registry=self.registry,
        )  # fmt: skip
        self.joined_items = Histogram(
            "quartet_gateway_joined_items",
            "Items of a call to the reward service that was made of requests with one item each",
            buckets=ITEM_BUCKETS,
            registry=self.registry,
        )
        self.waiting_items = Gauge(
            "quartet_gateway_waiting_items", "Items that wait to be sent to the reward service", registry=self.registry
        )
        ProcessCollector(registry=self.registry)
