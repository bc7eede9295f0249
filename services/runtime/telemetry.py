"""Metrics, by the conventions of Prometheus. docs/metrics.md has a table of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from services.runtime.memory import MemoryMetrics

# A series more for every counter and histogram, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

# From a millisecond to ten minutes: an interactive score and a long generation share the scale.
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
ITEM_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKEN_BUCKETS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)


@dataclass(frozen=True, kw_only=True)
class QueueState:
    """What waits for one model: tokens, items, the age of the oldest; the bytes of requests in hand; and how long the
    model has worked on its batch, 0 without one."""

    tokens: int
    items: int
    held_bytes: int
    oldest_s: float
    batch_s: float = 0.0


class Queue(Protocol):
    """Whatever things wait in."""

    @property
    def queue(self) -> QueueState: ...


class QueueGauges:
    """Gauges over all queues of a service: there are two while one model takes over from another.

    Asked when somebody looks: nothing to keep up to date, and true also while a batch takes long.
    """

    def __init__(self, prefix: str, registry: CollectorRegistry, *, batches: bool) -> None:
        # Replaced as a whole, so that a scrape in its thread sees a tuple that nobody changes.
        self._queues: tuple[Queue, ...] = ()

        def gauge(name: str, meaning: str, value: Callable[[], float]) -> None:
            Gauge(f"{prefix}_{name}", meaning, registry=registry).set_function(value)

        gauge("queue_tokens", "Tokens waiting for the model", lambda: sum(x.queue.tokens for x in self._queues))
        gauge("queue_items", "Items waiting for the model", lambda: sum(x.queue.items for x in self._queues))
        if batches:
            gauge("held_bytes", "Bytes of requests in hand", lambda: sum(x.queue.held_bytes for x in self._queues))
            gauge(
                "batch_age_seconds",
                "Time that the model has worked on the batch in hand",
                lambda: max((x.queue.batch_s for x in self._queues), default=0.0),
            )
        gauge(
            "queue_oldest_seconds",
            "Age of the oldest waiting item",
            lambda: max((x.queue.oldest_s for x in self._queues), default=0.0),
        )

    def watch(self, queue: Queue) -> None:
        self._queues = (*self._queues, queue)

    def forget(self, queue: Queue) -> None:
        self._queues = tuple(x for x in self._queues if x is not queue)


class ServiceMetrics:
    """Metrics that every service has, named ``quartet_<service>_...``, in a registry of their own.

    Labels have few values, which are ours: methods, status codes, and the reasons and kinds named below. None is taken
    from a request.
    """

    def __init__(self, service: str, *, batches: bool = True) -> None:
        """``batches``: it forms model batches by a Batcher, which holds requests while it does."""
        self.service = service
        self.registry = CollectorRegistry()
        prefix = f"quartet_{service}"
        self.calls = Counter(
            f"{prefix}_calls_total",
            "Finished calls by method and status code",
            ["method", "code"],
            registry=self.registry,
        )
        self.call_seconds = Histogram(
            f"{prefix}_call_seconds",
            "Time from arrival of a call to its end",
            ["method"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.calls_in_flight = Gauge(f"{prefix}_calls_in_flight", "Calls being answered", registry=self.registry)
        self.items = Counter(f"{prefix}_items_total", "Items answered by status", ["status"], registry=self.registry)
        self.tokens = Counter(f"{prefix}_tokens_total", "Tokens by kind", ["kind"], registry=self.registry)
        self.weights_version = Gauge(f"{prefix}_weights_version", "Version of the weights", registry=self.registry)
        self.queues = QueueGauges(prefix, self.registry, batches=batches)
        self.refused = Counter(
            f"{prefix}_refused_total",
            "Calls refused or dropped before the model was done with them, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.memory = MemoryMetrics(prefix)
        self.registry.register(self.memory)  # type: ignore[arg-type]  # A collector by its method ``collect``.
        ProcessCollector(registry=self.registry)
        # A service without them has these, too, and does not show them.
        shown = self.registry if batches else None
        self.queue_seconds = Histogram(
            f"{prefix}_queue_seconds",
            "Longest wait of the items of a batch",
            buckets=LATENCY_BUCKETS_S,
            registry=shown,
        )
        self.batch_items = Histogram(
            f"{prefix}_batch_items", "Items of a model batch", buckets=ITEM_BUCKETS, registry=shown
        )
        self.batch_tokens = Histogram(
            f"{prefix}_batch_tokens",
            "Tokens of a model batch, padding included",
            buckets=TOKEN_BUCKETS,
            registry=shown,
        )
        self.batch_occupancy = Histogram(
            f"{prefix}_batch_occupancy",
            "Share of a model batch that is tokens, not padding",
            buckets=SHARE_BUCKETS,
            registry=shown,
        )
        self.batch_seconds = Histogram(
            f"{prefix}_batch_seconds", "Model time of a batch", buckets=LATENCY_BUCKETS_S, registry=shown
        )
