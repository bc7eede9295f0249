"""Spans of waits and batches: how each request's time went, and which requests a batch was made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from quartet import tracing
from services.runtime.waiting import Entry


class Traced(Protocol):
    """A request in the queue. ``place``: within which it came; ``waits_since_s``: its last batch, or when it came."""

    request_id: str
    place: tracing.Place
    waits_since_s: float


def begin_batch(batch: Sequence[Entry[Any]], *, padded_tokens: int) -> tracing.Span:
    """The span of a batch that begins now.

    It stands in the trace of its oldest request, with links to all of them; each one's wait ends with a link to it.
    """
    if not tracing.active():
        return tracing.NO_SPAN
    now_s, now_unix_ns = time.monotonic(), time.time_ns()
    items: dict[Traced, int] = {}
    for entry in batch:
        items[entry.call.payload] = items.get(entry.call.payload, 0) + 1
    oldest: Traced = min(batch, key=lambda entry: entry.call.arrived_s).call.payload
    span = tracing.span(
        "model batch",
        attributes={
            "quartet.batch.items": len(batch),
            "quartet.batch.tokens": sum(entry.tokens for entry in batch),
            "quartet.batch.padded_tokens": padded_tokens,
            "quartet.batch.requests": len(items),
        },
        parent=oldest.place,
        links=[request.place for request in items if request.place is not None],
        start_unix_ns=now_unix_ns,
    )
    for request, count in items.items():
        _end_wait(request, now_s, now_unix_ns, links=[span.place], items=count)
    return span


def expire(request: Traced) -> None:
    """The wait of a request that nobody wants any more."""
    if tracing.active():
        _end_wait(request, time.monotonic(), time.time_ns(), links=(), items=0)


def end_batch(batch: Sequence[Entry[Any]], span: tracing.Span) -> None:
    """What is left of the requests waits anew."""
    span.end()
    if span is not tracing.NO_SPAN:
        now_s = time.monotonic()
        for entry in batch:
            entry.call.payload.waits_since_s = now_s


def _end_wait(request: Traced, now_s: float, now_unix_ns: int, *, links: Sequence[Any], items: int) -> None:
    if request.place is None:  # It came before traces were kept.
        return
    waited_ns = round(1e9 * (now_s - request.waits_since_s))
    span = tracing.span(
        "queue",
        attributes={"quartet.items": items, "quartet.request_id": request.request_id},
        parent=request.place,
        links=links,
        start_unix_ns=now_unix_ns - waited_ns,
    )
    if not items:
        span.fail("expired")
    span.end(now_unix_ns)
