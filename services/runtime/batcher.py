"""Forms model batches from whatever waits, with no timer: the next batch forms while the model runs.

One thread owns the model. A batch holds the oldest item and its neighbours in length, up to a budget of padded tokens,
so that nothing starves and little is padded. A call's items are admitted whole or refused whole, split over batches as
the budget demands, and joined again in order. What was cancelled or expired is dropped before it reaches the model.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import structlog

from services.runtime.errors import DeadlineExceededError, OverloadedError, UnavailableError
from services.runtime.telemetry import ServiceMetrics

log = structlog.get_logger()

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ItemError:
    """One item failed in the model; the same item may succeed later exactly when ``retryable``."""

    reason: str
    retryable: bool


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Budgets. Tokens count padding in a batch (items x longest), and not in the queue."""

    max_batch_tokens: int
    max_batch_items: int
    max_queued_tokens: int


@dataclass(eq=False)
class _Call(Generic[Result]):
    """One caller's list, until all of it is answered."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Result | ItemError]]
    results: list[Result | ItemError | None]
    deadline_s: float | None
    missing: int
    cancelled: bool = False


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    tokens: int
    index: int
    call: _Call[Result]
    enqueued_s: float = field(default_factory=time.monotonic)


class Batcher(Generic[Item, Result]):
    """Runs ``process`` on batches in a thread of its own.

    ``process`` takes a list of items and returns a result or an ItemError for each, in order. If it raises, every item
    of the batch is answered with a retryable ItemError and the cause is logged: one bad batch must not end a service.
    """

    def __init__(
        self,
        process: Callable[[list[Item]], Sequence[Result | ItemError]],
        *,
        limits: BatchLimits,
        metrics: ServiceMetrics,
    ) -> None:
        self._process = process
        self._limits = limits
        self._metrics = metrics
        self._waiting: list[_Entry[Item, Result]] = []  # In order of arrival.
        self._queued_tokens = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    async def submit(
        self, items: Sequence[Item], tokens: Sequence[int], *, time_remaining_s: float | None = None
    ) -> list[Result | ItemError]:
        """Results of ``items``, which have ``tokens`` tokens each, in order. Cancelling drops what has not begun.

        Raises:
            OverloadedError: the queue has no room for all of it; nothing was begun.
            DeadlineExceededError: ``time_remaining_s`` passed while it waited.
            UnavailableError: the service is shutting down.
        """
        loop = asyncio.get_running_loop()
        call: _Call[Result] = _Call(
            loop=loop,
            future=loop.create_future(),
            results=[None] * len(items),
            deadline_s=None if time_remaining_s is None else time.monotonic() + time_remaining_s,
            missing=len(items),
        )
        if not items:
            return []
        total = sum(tokens)
        with self._changed:
            if self._closed:
                raise UnavailableError("the service is shutting down")
            if self._queued_tokens and self._queued_tokens + total > self._limits.max_queued_tokens:
                raise OverloadedError(
                    f"{self._queued_tokens} tokens are waiting, {total} more would exceed "
                    f"{self._limits.max_queued_tokens}; try again later",
                    retry_after_ms=500,
                )
            self._waiting += [
                _Entry(item, count, index, call) for index, (item, count) in enumerate(zip(items, tokens, strict=True))
            ]
            self._queued_tokens += total
            self._metrics.queue_tokens.set(self._queued_tokens)
            self._changed.notify()
        try:
            return await call.future
        finally:
            call.cancelled = True  # Harmless when done; when cancelled, the thread drops the rest.

    def close(self) -> None:
        """Refuses new work, answers what waits, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch = self._take()
            if not batch:
                continue
            start_s = time.monotonic()
            results: Sequence[Result | ItemError]
            try:
                results = self._process([entry.item for entry in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"{len(results)} results for {len(batch)} items")
            except Exception as error:
                log.error("batch_failed", items=len(batch), exc_info=error)
                results = [ItemError(f"the model failed: {type(error).__name__}", retryable=True)] * len(batch)
            self._metrics.batch_seconds.observe(time.monotonic() - start_s)
            self._metrics.batch_tokens.observe(max(entry.tokens for entry in batch) * len(batch))
            for entry, result in zip(batch, results, strict=True):
                self._answer(entry, result)

    def _take(self) -> list[_Entry[Item, Result]]:
        """Removes the next batch from the queue. Called with the lock held."""
        now_s = time.monotonic()
        alive = []
        for entry in self._waiting:
            if entry.call.cancelled:
                self._queued_tokens -= entry.tokens
            elif entry.call.deadline_s is not None and entry.call.deadline_s < now_s:
                self._queued_tokens -= entry.tokens
                self._refuse(entry.call, DeadlineExceededError("the deadline passed while the request waited"))
            else:
                alive.append(entry)
        batch = self._choose(alive)
        chosen = {id(entry) for entry in batch}
        self._waiting = [entry for entry in alive if id(entry) not in chosen]
        self._queued_tokens -= sum(entry.tokens for entry in batch)
        self._metrics.queue_tokens.set(self._queued_tokens)
        self._metrics.queue_oldest_seconds.set(now_s - self._waiting[0].enqueued_s if self._waiting else 0.0)
        return batch

    def _choose(self, alive: list[_Entry[Item, Result]]) -> list[_Entry[Item, Result]]:
        """The oldest item, then its neighbours in length while the padded budget lasts."""
        if not alive:
            return []
        order = sorted(alive, key=lambda entry: entry.tokens)
        low = high = order.index(alive[0])  # The window [low, high] of the order grows to the nearer side.
        while high - low + 1 < self._limits.max_batch_items:
            below = order[low - 1].tokens if low > 0 else None
            above = order[high + 1].tokens if high + 1 < len(order) else None
            size = high - low + 2
            fits_above = above is not None and above * size <= self._limits.max_batch_tokens
            fits_below = below is not None and order[high].tokens * size <= self._limits.max_batch_tokens
            if fits_above and (not fits_below or above - order[high].tokens <= order[low].tokens - below):  # type: ignore[operator]
                high += 1
            elif fits_below:
                low -= 1
            else:
                break
        return order[low : high + 1]

    def _answer(self, entry: _Entry[Item, Result], result: Result | ItemError) -> None:
        call = entry.call
        call.results[entry.index] = result
        call.missing -= 1
        if call.missing == 0:
            results: list[Result | ItemError] = list(call.results)  # type: ignore[arg-type]
            call.loop.call_soon_threadsafe(_settle, call.future, results)

    def _refuse(self, call: _Call[Result], error: DeadlineExceededError) -> None:
        call.cancelled = True
        call.loop.call_soon_threadsafe(_settle, call.future, error)


def _settle(future: asyncio.Future[list[Result | ItemError]], outcome: list[Result | ItemError] | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
