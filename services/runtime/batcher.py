"""Forms model batches from whatever waits, with no timer: the next batch forms while the model runs.

One thread owns the model. A call's items are admitted whole or refused whole (``admission``), wait in a line that is
fair between callers and fills batches with neighbours in length (``waiting``), are split over batches as the budget
demands, and joined again in order. What was cancelled or expired is dropped before it reaches the model.

The thread and the event loop meet under one lock, which either holds only to change the line. The thread never waits
for the loop beyond that: what a batch has finished goes to the loop in one callback. A second thread looks whether a
batch takes longer than any may: the model hangs then, and what hangs can't be ended, only left behind.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import structlog

from quartet import tracing
from services.runtime import batch_spans, calls, tracebacks
from services.runtime.admission import Admission, Hold
from services.runtime.errors import DeadlineExceededError, OverloadedError, ServiceError, UnavailableError
from services.runtime.telemetry import QueueState, ServiceMetrics
from services.runtime.waiting import Call, Entry, WaitingLine

log = structlog.get_logger()

# How soon it is seen that a model which is being replaced has answered its last request: nobody waits for it.
_DRAIN_POLL_S = 0.05
_MOST_LOGGED_IDS = 32
# How often it is looked whether a batch takes too long.
_WATCH_EVERY_S = 1.0
# So many batches on end that fail, none of them left whole in between, are no bad items: the model is broken for good,
# as after an error of the GPU that every later call repeats.
MOST_FAILURES = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ItemError:
    """One item failed in the model; the same item may succeed later exactly when ``retryable``."""

    reason: str
    retryable: bool


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Budgets. Tokens count padding (items x longest) in a batch that is ``padded``, and never in the queue.

    ``max_held_bytes``: of all requests from arrival to answer. ``max_queue_s``: most seconds of the model's work that
    may wait. ``max_wait_s``: age from which the oldest item begins every second batch. ``max_batch_s``: a batch that
    takes longer will never be done.
    """

    max_batch_tokens: int
    max_batch_items: int
    max_queued_tokens: int
    max_held_bytes: int = 256 * 2**20
    max_queue_s: float = math.inf
    max_wait_s: float = 2.0
    max_batch_s: float = math.inf
    padded: bool = True


@dataclass(eq=False)
class _Request(Generic[Item, Result]):
    """One caller's list, until all of it is answered. ``results`` is the model thread's alone."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Result | ItemError]]
    items: Sequence[Item]
    results: list[Result | ItemError | None]
    request_id: str
    place: tracing.Place
    waits_since_s: float
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.items)


class Batcher(Generic[Item, Result]):
    """Runs ``process`` on batches in a thread of its own.

    ``process`` takes a list of items and returns a result or an ItemError for each, in order. If it raises, every item
    of the batch is answered with a retryable ItemError and the cause is logged: one bad batch must not end a service.

    ``on_death`` is called, from a thread and with the reason, when the model will answer no more: something else than
    an Exception has ended its thread, a batch takes longer than ``max_batch_s``, or MOST_FAILURES batches on end have
    failed. Who goes on regardless refuses or fails whatever comes.
    """

    def __init__(
        self,
        process: Callable[[list[Item]], Sequence[Result | ItemError]],
        *,
        limits: BatchLimits,
        metrics: ServiceMetrics,
        on_death: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._process = process
        self._on_death = on_death
        self._failures = 0  # On end.
        self._metrics = metrics
        self.admission = Admission(
            max_queued_tokens=limits.max_queued_tokens,
            max_held_bytes=limits.max_held_bytes,
            max_queue_s=limits.max_queue_s,
            metrics=metrics,
        )
        self._line: WaitingLine[_Request[Item, Result]] = WaitingLine(
            max_batch_tokens=limits.max_batch_tokens,
            max_batch_items=limits.max_batch_items,
            max_wait_s=limits.max_wait_s,
            padded=limits.padded,
        )
        self._padded = limits.padded
        self._unanswered: set[_Request[Item, Result]] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._left_waiting = False  # By the batch that was taken last: it is as large as may be.
        self._begun_s: float | None = None  # When the model got the batch in hand.
        self._ended = threading.Event()
        metrics.queues.watch(self)
        self._threads = [threading.Thread(target=self._run, name="model", daemon=True)]
        if limits.max_batch_s < math.inf:
            watch = threading.Thread(target=self._watch, args=(limits.max_batch_s,), name="model watch", daemon=True)
            self._threads.append(watch)
        for thread in self._threads:
            thread.start()

    def refusal(self, caller: Hashable) -> OverloadedError | None:
        """Why a call of ``caller`` is refused before its request is read; see ``Admission.refusal``."""
        with self._changed:
            own = self._line.tokens_of(caller)
        return self.admission.refusal(caller=caller, own_tokens=own)

    def hold(self, size_bytes: int) -> AbstractContextManager[Hold]:
        """Admits a request by its size, before any work; to be held until it is answered. See ``Admission.hold``."""
        return self.admission.hold(size_bytes)

    async def submit(
        self,
        items: Sequence[Item],
        tokens: Sequence[int],
        *,
        time_remaining_s: float | None = None,
        caller: Hashable | None = None,
        hold: Hold | None = None,
    ) -> list[Result | ItemError]:
        """Results of ``items``, which have ``tokens`` tokens each, in order. Cancelling drops what has not begun.

        Args:
            time_remaining_s: after it nobody wants the results; None: ever.
            caller: calls of one caller share its turns; None: a caller of its own.
            hold: what ``hold`` gave for the request that these items are of.

        Raises:
            InvalidArgumentError: the list is longer than the whole queue.
            OverloadedError: the queue has no room for all of it; nothing was begun.
            DeadlineExceededError: ``time_remaining_s`` passed while it waited.
            UnavailableError: the service is shutting down.
        """
        if len(items) != len(tokens):
            raise ValueError(f"{len(items)} items, but tokens of {len(tokens)}")
        if not items:
            return []
        if time_remaining_s is not None and time_remaining_s <= 0:
            self._metrics.refused.labels("expired").inc()
            raise DeadlineExceededError("the deadline had passed before the request could wait")
        total = sum(tokens)
        now_s = time.monotonic()
        with self._changed:
            own = 0 if caller is None else self._line.tokens_of(caller)
        # Before anything is made for each item: refusing is cheap.
        self.admission.enqueue(total, hold, caller=caller, own_tokens=own)
        loop = asyncio.get_running_loop()
        request: _Request[Item, Result] = _Request(
            loop,
            loop.create_future(),
            items,
            [None] * len(items),
            calls.current_request_id(),
            tracing.here(),
            now_s,
        )
        call = Call(
            request,
            tokens,
            arrived_s=now_s,
            caller=caller,
            deadline_s=None if time_remaining_s is None else now_s + time_remaining_s,
        )
        with self._changed:
            if self._closed:
                self.admission.leave(total)
                self._metrics.refused.labels("closing").inc()
                raise UnavailableError("the service is shutting down")
            self._line.add(call)
            self._unanswered.add(request)
            self._changed.notify()
        try:
            return await request.future
        except asyncio.CancelledError:
            self._metrics.refused.labels("cancelled").inc()
            raise
        finally:
            if call.waiting or request in self._unanswered:
                with self._changed:
                    self.admission.leave(self._line.drop(call))
                    self._unanswered.discard(request)

    def close(self) -> None:
        """Refuses new work, answers what waits, and ends the threads. Returns when they have: never, if it hangs.

        From then on nothing of the batcher's own refers to the model.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        for thread in self._threads:
            thread.join()
        self._metrics.queues.forget(self)

    async def drained(self) -> None:
        """Returns when no request is held and none waits. Whoever lets no new one in may then close."""
        while self.admission.holds or self._unanswered:  # noqa: ASYNC110  # Two locks, two threads: looking is simpler.
            await asyncio.sleep(_DRAIN_POLL_S)

    @property
    def queue(self) -> QueueState:
        """What waits and is in hand now; see ``QueueGauges``."""
        return QueueState(
            tokens=self.admission.queued_tokens,
            items=self._line.items,
            held_bytes=self.admission.held_bytes,
            oldest_s=self._oldest_age_s(),
            batch_s=self._batch_age_s(),
        )

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                if batch:
                    self._answer(batch, self._results(batch))
                    if self._failures == MOST_FAILURES:
                        self._failures += 1  # Said once.
                        self._on_death(f"{MOST_FAILURES} model batches on end have failed")
        except BaseException as error:
            # Whatever ends the thread, nobody is left waiting for it.
            log.error("model_thread_ended", calls=len(self._unanswered), exc_info=error)
            self._give_up("the model has stopped; try again later")
            self._on_death(f"the model's thread was ended by {type(error).__name__}")
        finally:
            self._ended.set()

    def _watch(self, most_s: float) -> None:
        """In a thread of its own, until the model's has ended: a batch that takes longer than this is its last."""
        while not self._ended.wait(min(_WATCH_EVERY_S, most_s / 4)):
            if self._batch_age_s() > most_s:
                reason = f"the model hangs: a batch has taken more than {most_s:g} s (batch_timeout_s)"
                log.error("model_hangs", calls=len(self._unanswered), stack=tracebacks.stack_of(self._threads[0]))
                self._give_up(f"{reason}; the service is restarted, try again later")
                self._on_death(reason)
                return

    def _give_up(self, reason: str) -> None:
        """Refuses new work, and answers all that has no answer yet with UNAVAILABLE and ``reason``."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            left = list(self._unanswered)
        self._metrics.refused.labels("died").inc(len(left))
        error = UnavailableError(reason)
        self._settle([(request, error) for request in left])

    def _next_batch(self) -> list[Entry[_Request[Item, Result]]] | None:
        """Waits for work and takes it from the line; None at the end. Empty when all of it had expired."""
        with self._changed:
            while not self._line.items:
                if self._closed:
                    return None
                self._changed.wait()
            now_s = time.monotonic()
            before = self._line.tokens
            expired = self._line.expire(now_s)
            batch = self._line.take(now_s)
            self._left_waiting = self._line.items > 0
            self.admission.leave(before - self._line.tokens)
        if batch:
            self._metrics.queue_seconds.observe(now_s - min(entry.call.arrived_s for entry in batch))
        if expired:
            self._metrics.refused.labels("expired").inc(len(expired))
            for call in expired:
                batch_spans.expire(call.payload)
            error = DeadlineExceededError("the deadline passed while the request waited")
            self._settle([(call.payload, error) for call in expired])
        return batch

    def _results(self, batch: list[Entry[_Request[Item, Result]]]) -> Sequence[Result | ItemError]:
        """What the model says to each item of ``batch``."""
        tokens = sum(entry.tokens for entry in batch)
        padded = max(entry.tokens for entry in batch) * len(batch) if self._padded else tokens
        span = batch_spans.begin_batch(batch, padded_tokens=padded)
        start_s = self._begun_s = time.monotonic()
        results: Sequence[Result | ItemError]
        try:
            results = self._process([entry.call.payload.items[entry.index] for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
        except Exception as error:
            log.error("batch_failed", items=len(batch), request_ids=_request_ids(batch), exc_info=error)
            span.fail(type(error).__name__)
            results = [ItemError(f"the model failed: {type(error).__name__}", retryable=True)] * len(batch)
            self._failures += 1
        else:
            self._failures = 0
            if self._left_waiting:  # Else a trickle of short texts would pass for all that the model can do.
                self.admission.served(tokens, time.monotonic() - start_s)
        self._begun_s = None
        batch_spans.end_batch(batch, span)
        self._metrics.batch_seconds.observe(time.monotonic() - start_s)
        self._metrics.batch_items.observe(len(batch))
        self._metrics.batch_tokens.observe(padded)
        self._metrics.batch_occupancy.observe(tokens / padded if padded else 1.0)
        return results

    def _answer(self, batch: list[Entry[_Request[Item, Result]]], results: Sequence[Result | ItemError]) -> None:
        """Puts each result in its place, and hands over the lists that are whole now."""
        done: list[tuple[_Request[Item, Result], list[Any] | ServiceError]] = []
        for entry, result in zip(batch, results, strict=True):
            request = entry.call.payload
            request.results[entry.index] = result
            request.missing -= 1
            if not request.missing:
                done.append((request, request.results))
        self._settle(done)

    def _settle(self, done: Sequence[tuple[_Request[Item, Result], list[Any] | ServiceError]]) -> None:
        """Tells those who wait, each event loop in one callback."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], list[Any] | ServiceError]]] = {}
        with self._changed:
            for request, outcome in done:
                self._unanswered.discard(request)
                by_loop.setdefault(request.loop, []).append((request.future, outcome))
        for loop, outcomes in by_loop.items():
            try:
                loop.call_soon_threadsafe(_set_outcomes, outcomes)
            except RuntimeError:  # The loop is closed: nobody is there to be told.
                log.warning("answers_without_a_reader", calls=len(outcomes))

    def _oldest_age_s(self) -> float:
        with self._changed:
            oldest_s = self._line.oldest_s()
        return 0.0 if oldest_s is None else time.monotonic() - oldest_s

    def _batch_age_s(self) -> float:
        begun_s = self._begun_s
        return 0.0 if begun_s is None else time.monotonic() - begun_s


def _request_ids(batch: Iterable[Entry[_Request[Any, Any]]]) -> list[str]:
    """Of the calls that have items in ``batch``; enough of them to find the log of each."""
    found = dict.fromkeys(entry.call.payload.request_id for entry in batch)
    return list(found)[:_MOST_LOGGED_IDS]


def _set_outcomes(outcomes: Iterable[tuple[asyncio.Future[Any], list[Any] | ServiceError]]) -> None:
    for future, outcome in outcomes:
        if future.done():  # Cancelled meanwhile.
            continue
        if isinstance(outcome, ServiceError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
