"""The batcher keeps order, admits whole requests, fills a budget, starves nobody, and drops what nobody waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.batcher import Batcher, BatchLimits, ItemError
from services.runtime.errors import DeadlineExceededError, OverloadedError, UnavailableError
from services.runtime.telemetry import ServiceMetrics

PLUG = ("plug", 0)


@dataclass
class Model:
    """Notes its batches; a plug in a batch holds it until ``release`` is set."""

    batches: list[list[tuple[str, int]]] = field(default_factory=list)
    plugged: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def process(self, items: list[tuple[str, int]]) -> Sequence[str | ItemError]:
        self.batches.append(items)
        if PLUG in items:
            self.plugged.set()
            assert self.release.wait(10)
        return [f"{name}:{tokens}" for name, tokens in items]


def limits(*, tokens: int = 1000, items: int = 100, queued: int = 1_000_000) -> BatchLimits:
    return BatchLimits(max_batch_tokens=tokens, max_batch_items=items, max_queued_tokens=queued)


def make(model: Model, chosen: BatchLimits) -> Batcher[tuple[str, int], str]:
    return Batcher(model.process, limits=chosen, metrics=ServiceMetrics("test"))


async def plug(batcher: Batcher[tuple[str, int], str], model: Model) -> asyncio.Task[object]:
    """Occupies the model, so that what is submitted next waits in the queue."""
    task: asyncio.Task[object] = asyncio.create_task(batcher.submit([PLUG], [1]))
    assert await asyncio.to_thread(model.plugged.wait, 10)
    return task


# Lists of the lengths of the items of each call.
calls_of_lengths = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(calls=calls_of_lengths, max_tokens=st.integers(1, 200), max_items=st.integers(1, 10))
def test_every_call_gets_its_results_in_order_whatever_the_batches(calls, max_tokens, max_items):
    model = Model()

    async def run() -> list[list[str | ItemError]]:
        batcher = make(model, limits(tokens=max_tokens, items=max_items))
        plugged = await plug(batcher, model)
        submitted = [
            asyncio.create_task(batcher.submit([(f"{c}.{i}", n) for i, n in enumerate(lengths)], lengths))
            for c, lengths in enumerate(calls)
        ]
        await asyncio.sleep(0)  # All of them are in the queue now, in this order.
        model.release.set()
        results = await asyncio.gather(*submitted)
        await plugged
        await asyncio.to_thread(batcher.close)
        return results

    results = asyncio.run(run())
    assert results == [[f"{c}.{i}:{n}" for i, n in enumerate(lengths)] for c, lengths in enumerate(calls)]

    waiting = [(f"{c}.{i}", n) for c, lengths in enumerate(calls) for i, n in enumerate(lengths)]
    for batch in model.batches[1:]:
        longest = max(n for _, n in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens  # Padding included.
        assert len(batch) <= max_items
        assert waiting[0] in batch  # The oldest is always taken: nothing starves.
        rest = [item for item in waiting if item not in batch]
        shortest = min(n for _, n in batch)
        assert all(n <= shortest or n >= longest for _, n in rest)  # Neighbours in length: little padding.
        if len(batch) < max_items:  # And full: nobody else would fit beside them.
            above = [n for _, n in rest if n >= longest]
            below = [n for _, n in rest if n <= shortest]
            assert not above or (len(batch) + 1) * min(above) > max_tokens
            assert not below or (len(batch) + 1) * longest > max_tokens
        waiting = rest
    assert waiting == []


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=12),
    room=st.integers(1, 200),
)
def test_a_request_is_admitted_whole_or_refused_whole(sizes, room):
    model = Model()

    async def run() -> list[object]:
        batcher = make(model, limits(queued=room))
        plugged = await plug(batcher, model)
        submitted = [
            asyncio.create_task(batcher.submit([(f"{c}.{i}", n) for i, n in enumerate(lengths)], lengths))
            for c, lengths in enumerate(sizes)
        ]
        await asyncio.sleep(0)
        model.release.set()
        outcomes = await asyncio.gather(*submitted, return_exceptions=True)
        await plugged
        await asyncio.to_thread(batcher.close)
        return outcomes

    outcomes = asyncio.run(run())
    queued = 0
    admitted: set[str] = set()
    for c, (lengths, outcome) in enumerate(zip(sizes, outcomes, strict=True)):
        if queued and queued + sum(lengths) > room:
            assert isinstance(outcome, OverloadedError)
            assert outcome.retry_after_ms == 500
            assert f"{queued} tokens are waiting, {sum(lengths)} more would exceed {room}" in outcome.message
        else:  # One larger than the whole queue is taken when nothing waits: it could never be otherwise.
            queued += sum(lengths)
            assert outcome == [f"{c}.{i}:{n}" for i, n in enumerate(lengths)]
            admitted |= {f"{c}.{i}" for i in range(len(lengths))}
    assert {name for batch in model.batches[1:] for name, _ in batch} == admitted


async def test_what_was_cancelled_or_expired_never_reaches_the_model():
    model = Model()
    batcher = make(model, limits(tokens=4))
    plugged = await plug(batcher, model)
    cancelled = asyncio.create_task(batcher.submit([("cancelled", 2), ("cancelled too", 2)], [2, 2]))
    expired = asyncio.create_task(batcher.submit([("expired", 2)], [2], time_remaining_s=0.05))
    patient = asyncio.create_task(batcher.submit([("patient", 2)], [2], time_remaining_s=60.0))
    await asyncio.sleep(0.01)
    cancelled.cancel()
    await asyncio.sleep(0.1)
    model.release.set()
    assert await patient == ["patient:2"]
    with pytest.raises(DeadlineExceededError, match="the deadline passed while the request waited"):
        await expired
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await plugged
    assert model.batches == [[PLUG], [("patient", 2)]]
    # Their place in the queue is free again: this would be refused beside four tokens that nobody waits for.
    assert batcher._queued_tokens == 0
    await asyncio.to_thread(batcher.close)


async def test_the_rest_of_a_call_that_expires_in_the_middle_is_dropped():
    model = Model()
    batcher = make(model, limits(items=1))
    call = asyncio.create_task(batcher.submit([PLUG, ("second", 1)], [1, 1], time_remaining_s=0.05))
    await asyncio.sleep(0.1)
    model.release.set()
    with pytest.raises(DeadlineExceededError):
        await call
    await asyncio.to_thread(batcher.close)
    assert model.batches == [[PLUG]]


@pytest.mark.parametrize("broken", ["raises", "too few results"])
async def test_a_batch_that_fails_is_answered_as_retryable_and_the_next_one_runs(broken):
    calls = 0

    def process(items: list[str]) -> list[str | ItemError]:
        nonlocal calls
        calls += 1
        if calls > 1:
            return list(items)
        if broken == "raises":
            raise ValueError("secret detail of a prompt")
        return list(items[:-1])

    batcher = Batcher(process, limits=limits(), metrics=ServiceMetrics("test"))
    kind = "ValueError" if broken == "raises" else "RuntimeError"
    # The kind of error is told, its text, which may hold users' content, is not.
    expected = [ItemError(f"the model failed: {kind}", retryable=True)] * 2
    assert await batcher.submit(["a", "b"], [1, 1]) == expected
    assert await batcher.submit(["a", "b"], [1, 1]) == ["a", "b"]
    await asyncio.to_thread(batcher.close)


async def test_one_failed_item_fails_alone():
    error = ItemError("not finite", retryable=False)
    batcher = Batcher(
        lambda items: [error if item == "bad" else item for item in items],
        limits=limits(),
        metrics=ServiceMetrics("test"),
    )
    assert await batcher.submit(["a", "bad", "b"], [1, 1, 1]) == ["a", error, "b"]
    await asyncio.to_thread(batcher.close)


async def test_closing_answers_what_waits_and_refuses_what_comes():
    model = Model()
    batcher = make(model, limits())
    plugged = await plug(batcher, model)
    waiting = asyncio.create_task(batcher.submit([("waiting", 1)], [1]))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(asyncio.to_thread(batcher.close))
    await asyncio.sleep(0.05)
    with pytest.raises(UnavailableError, match="shutting down"):
        await batcher.submit([("late", 1)], [1])
    model.release.set()
    assert await waiting == ["waiting:1"]
    await plugged
    await asyncio.wait_for(closing, 5)


async def test_an_empty_list_is_answered_at_once_and_counts_must_match():
    model = Model()
    batcher = make(model, limits())
    assert await batcher.submit([], []) == []
    with pytest.raises(ValueError, match="zip"):
        await batcher.submit([("a", 1)], [1, 2])
    assert await batcher.submit([("a", 1)], [1]) == ["a:1"]
    await asyncio.to_thread(batcher.close)


async def test_a_lone_item_is_not_kept_waiting_for_company():
    model = Model()
    batcher = make(model, limits())
    start_s = time.monotonic()
    for _ in range(20):
        await batcher.submit([("a", 1)], [1])
    assert time.monotonic() - start_s < 1.0
    await asyncio.to_thread(batcher.close)
