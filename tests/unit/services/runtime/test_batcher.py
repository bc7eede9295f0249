"""The batcher keeps order, admits whole requests, fills a budget, starves nobody, and drops what nobody waits for."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.batcher import MOST_FAILURES, Batcher, BatchLimits, ItemError
from services.runtime.errors import DeadlineExceededError, InvalidArgumentError, OverloadedError, UnavailableError
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

    for batch in model.batches[1:]:
        longest = max(n for _, n in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens  # Padding included.
        assert len(batch) <= max_items
    went = sorted(item for batch in model.batches[1:] for item in batch)
    assert went == sorted((f"{c}.{i}", n) for c, lengths in enumerate(calls) for i, n in enumerate(lengths))


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
        if sum(lengths) > room:  # Never to be had, however long one waits.
            assert isinstance(outcome, InvalidArgumentError)
            assert f"{sum(lengths)} tokens, at most {room} may wait" in outcome.message
        elif queued + sum(lengths) > room:
            assert isinstance(outcome, OverloadedError)
            assert outcome.retry_after_ms == 1000  # The model has not finished a batch that would tell its rate.
            assert f"{queued} tokens are waiting, {sum(lengths)} more would exceed {room}" in outcome.message
        else:
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
    assert batcher.admission.queued_tokens == 0
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
    with pytest.raises(ValueError, match="1 items, but tokens of 2"):
        await batcher.submit([("a", 1)], [1, 2])
    assert await batcher.submit([("a", 1)], [1]) == ["a:1"]
    await asyncio.to_thread(batcher.close)


async def test_a_lone_item_is_not_kept_waiting_for_company():
    model = Model()
    batcher = make(model, limits())
    start_s = time.monotonic()
    for _ in range(200):
        await batcher.submit([("a", 1)], [1])
    assert time.monotonic() - start_s < 5.0
    await asyncio.to_thread(batcher.close)


async def test_the_model_goes_on_while_the_event_loop_is_blocked_and_answers_a_batch_in_one_callback(monkeypatch):
    model = Model()
    batcher = make(model, limits(items=8))
    callbacks = 0
    loop = asyncio.get_running_loop()
    schedule = loop.call_soon_threadsafe

    def counted(callback, *arguments, **options):
        nonlocal callbacks
        callbacks += callback.__module__ == "services.runtime.batcher"
        return schedule(callback, *arguments, **options)

    plugged = await plug(batcher, model)
    calls = [asyncio.create_task(batcher.submit([(f"{n}", 1)], [1])) for n in range(80)]
    await asyncio.sleep(0)
    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    model.release.set()
    end_s = time.monotonic() + 5
    while len(model.batches) < 11 and time.monotonic() < end_s:
        time.sleep(0.001)  # noqa: ASYNC251  The loop is blocked on purpose.
    assert len(model.batches) == 11
    assert not any(call.done() for call in calls)
    assert await asyncio.gather(*calls) == [[f"{n}:1"] for n in range(80)]
    await plugged
    assert callbacks == 11  # The plug's, and one for each batch of eight calls.
    await asyncio.to_thread(batcher.close)


async def test_a_caller_with_one_item_is_not_behind_ten_thousand_of_another():
    model = Model()
    batcher = make(model, limits(items=100))
    plugged = await plug(batcher, model)
    many = [
        asyncio.create_task(batcher.submit([(f"{call}.{n}", 1) for n in range(100)], [1] * 100, caller="many"))
        for call in range(100)
    ]
    await asyncio.sleep(0)
    one = asyncio.create_task(batcher.submit([("one", 700)], [700], caller="one"))
    await asyncio.sleep(0)
    model.release.set()
    assert await one == ["one:700"]
    assert [len(results) for results in await asyncio.gather(*many)] == [100] * 100
    await plugged
    assert [("one", 700) in batch for batch in model.batches[:3]] == [False, False, True]
    await asyncio.to_thread(batcher.close)


async def test_a_refused_request_is_told_to_come_back_when_the_queue_will_be_done():
    def slow(items: list[str]) -> list[str]:
        time.sleep(0.1)
        return items

    batcher = Batcher(slow, limits=limits(tokens=100, items=1, queued=500), metrics=ServiceMetrics("test"))
    await batcher.submit(["measured", "left waiting by it"], [100, 100])  # 1,000 tokens a second.
    waiting = [asyncio.create_task(batcher.submit([f"{n}"], [100])) for n in range(5)]
    await asyncio.sleep(0.02)  # One is in the model, four wait.
    start_s = time.monotonic()
    with pytest.raises(OverloadedError) as refused:
        await batcher.submit(["too much"], [101])
    pushback_ms = refused.value.retry_after_ms
    assert pushback_ms == pytest.approx(1000 * 400 / batcher.admission.tokens_per_s, abs=1)
    assert pushback_ms > 300
    await asyncio.gather(*waiting)
    assert 0.7 < (time.monotonic() - start_s) / (pushback_ms / 1000) < 6  # The batch in the model comes on top.
    await asyncio.to_thread(batcher.close)


async def test_what_had_expired_on_arrival_is_refused_at_once():
    model = Model()
    batcher = make(model, limits())
    with pytest.raises(DeadlineExceededError, match="had passed before"):
        await batcher.submit([("late", 1)], [1], time_remaining_s=0.0)
    await asyncio.to_thread(batcher.close)
    assert model.batches == []


@pytest.mark.parametrize("end", [SystemExit("a library called exit"), asyncio.CancelledError(), KeyboardInterrupt()])
async def test_whatever_ends_the_model_thread_everybody_is_answered_and_its_death_is_told(end):
    model = Model()
    told: list[str] = []

    def process(items: list[tuple[str, int]]) -> Sequence[str | ItemError]:
        model.process(items)
        raise end

    batcher = Batcher(process, limits=limits(), metrics=ServiceMetrics("test"), on_death=told.append)
    plugged = await plug(batcher, model)
    waiting = asyncio.create_task(batcher.submit([("waiting", 1)], [1]))
    await asyncio.sleep(0.01)
    model.release.set()
    outcomes = await asyncio.wait_for(asyncio.gather(plugged, waiting, return_exceptions=True), 5)
    assert [type(outcome) for outcome in outcomes] == [UnavailableError, UnavailableError]
    with pytest.raises(UnavailableError):
        await batcher.submit([("late", 1)], [1])
    assert batcher.admission.queued_tokens == 0
    await asyncio.to_thread(batcher.close)
    assert told == [f"the model's thread was ended by {type(end).__name__}"]


async def test_a_model_that_fails_batch_after_batch_is_dead_and_one_that_does_now_and_then_is_not():
    broken: list[bool] = []
    told: list[str] = []

    def process(items: list[str]) -> list[str | ItemError]:
        if broken and broken.pop():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return list(items)

    batcher = Batcher(process, limits=limits(), metrics=ServiceMetrics("test"), on_death=told.append)
    failed = [ItemError("the model failed: RuntimeError", retryable=True)]
    for failures in (MOST_FAILURES - 1, MOST_FAILURES - 1):
        broken += [True] * failures
        assert [await batcher.submit(["a"], [1]) for _ in range(failures)] == [failed] * failures
        assert await batcher.submit(["a"], [1]) == ["a"]
        assert told == []
    broken += [True] * (MOST_FAILURES + 3)
    for _ in range(MOST_FAILURES + 3):
        assert await batcher.submit(["a"], [1]) == failed
    await asyncio.to_thread(batcher.close)
    assert told == [f"{MOST_FAILURES} model batches on end have failed"]


async def test_a_batch_that_never_ends_is_the_last_and_nobody_waits_for_it():
    told: list[str] = []
    begun, stuck = threading.Event(), threading.Event()

    def process(items: list[tuple[str, int]]) -> list[str]:
        begun.set()
        stuck.wait(60)
        return [text for text, _ in items]

    hung = replace(limits(), max_batch_s=0.4)
    batcher = Batcher(process, limits=hung, metrics=ServiceMetrics("test"), on_death=told.append)
    in_hand = asyncio.ensure_future(batcher.submit([("in hand", 1)], [1]))
    await asyncio.to_thread(begun.wait)
    waiting = asyncio.ensure_future(batcher.submit([("waiting", 1)], [1]))
    reason = "the model hangs: a batch has taken more than 0.4 s (batch_timeout_s)"
    for call in (in_hand, waiting):
        with pytest.raises(UnavailableError, match=re.escape(f"{reason}; the service is restarted, try again later")):
            await asyncio.wait_for(call, 20)
    with pytest.raises(UnavailableError):
        await batcher.submit([("late", 1)], [1])
    assert told == [reason]
    stuck.set()  # An answer that comes after all hurts nobody.
    await asyncio.to_thread(batcher.close)
    assert (batcher.queue.tokens, batcher.queue.items, batcher.admission.holds) == (0, 0, 0)
    assert told == [reason]


async def test_batches_within_their_time_are_no_hang_however_many_there_are():
    told: list[str] = []
    process = lambda items: [time.sleep(0.1) or text for text, _ in items]  # noqa: E731
    quick = replace(limits(items=1), max_batch_s=20.0)
    batcher = Batcher(process, limits=quick, metrics=ServiceMetrics("test"), on_death=told.append)
    assert await batcher.submit([(str(i), 1) for i in range(5)], [1] * 5) == list("01234")
    await asyncio.to_thread(batcher.close)
    assert told == []


async def test_a_batcher_that_is_closed_has_not_died():
    told: list[str] = []
    model = Model()
    batcher = Batcher(model.process, limits=limits(), metrics=ServiceMetrics("test"), on_death=told.append)
    assert await batcher.submit([("a", 1)], [1]) == ["a:1"]
    await asyncio.to_thread(batcher.close)
    assert told == []


async def test_a_trickle_of_short_texts_does_not_pass_for_all_that_the_model_can_do():
    """A batch takes .05 s, whatever is in it: by the trickle 20 tokens a second, by what the model can do 2,000."""
    seconds: list[float] = []

    def process(items: list[str]) -> list[str]:
        start_s = time.monotonic()
        time.sleep(0.05)
        seconds.append(time.monotonic() - start_s)
        return items

    chosen = replace(limits(tokens=100), max_queue_s=1.0)
    batcher = Batcher(process, limits=chosen, metrics=ServiceMetrics("test"))
    for _ in range(4):
        await batcher.submit(["short"], [1])
    assert batcher.admission.tokens_per_s == 0.0
    seconds.clear()
    burst = [asyncio.create_task(batcher.submit([f"{n}"], [50])) for n in range(20)]
    assert await asyncio.gather(*burst) == [[f"{n}"] for n in range(20)]
    # The last batch leaves nothing waiting.
    last = 100 if len(seconds) == 10 else 50
    expected = (1000 - last) / sum(seconds[:-1])
    assert batcher.admission.tokens_per_s == pytest.approx(expected, rel=0.1)
    await asyncio.to_thread(batcher.close)


async def test_a_closed_batcher_leaves_no_thread_that_would_hold_the_model():
    model = Model()
    before = set(threading.enumerate())
    batcher = Batcher(model.process, limits=replace(limits(), max_batch_s=60.0), metrics=ServiceMetrics("test"))
    own = set(threading.enumerate()) - before
    assert {thread.name for thread in own} == {"model", "model watch"}
    await asyncio.to_thread(batcher.close)
    assert not any(thread.is_alive() for thread in own)


async def test_answers_for_an_event_loop_that_is_gone_hurt_nobody():
    model = Model()
    batcher = make(model, limits())
    plugged = await plug(batcher, model)

    def abandon() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(batcher.submit([("abandoned", 1)], [1]))
        loop.run_until_complete(asyncio.sleep(0.01))
        task._log_destroy_pending = False
        loop.close()

    await asyncio.to_thread(abandon)
    model.release.set()
    assert await batcher.submit([("next", 1)], [1]) == ["next:1"]
    await plugged
    await asyncio.to_thread(batcher.close)


async def test_metrics_tell_what_waits_what_was_refused_and_how_full_batches_are():
    model = Model()
    metrics = ServiceMetrics("test")
    batcher = Batcher(model.process, limits=limits(queued=100), metrics=metrics)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"quartet_test_{name}", labels)

    with batcher.hold(321) as hold:
        plugged = await plug(batcher, model)
        waiting = asyncio.create_task(batcher.submit([("a", 20), ("b", 60)], [20, 60], hold=hold))
        cancelled = asyncio.create_task(batcher.submit([("c", 5)], [5]))
        await asyncio.sleep(0.05)
        assert value("queue_tokens") == 85
        assert value("queue_items") == 3
        assert value("held_bytes") == 321
        age_s = value("queue_oldest_seconds")
        assert age_s is not None
        assert 0.05 <= age_s < 5
        cancelled.cancel()
        await asyncio.wait([cancelled])
        with pytest.raises(OverloadedError):
            await batcher.submit([("d", 30)], [30])
        model.release.set()
        await waiting
    await plugged
    assert [value(name) for name in ("queue_tokens", "queue_items", "held_bytes", "queue_oldest_seconds")] == [
        0,
        0,
        0,
        0,
    ]
    assert value("refused_total", reason="cancelled") == 1
    assert value("refused_total", reason="queue_tokens") == 1
    assert value("batch_occupancy_count") == 2
    assert value("batch_occupancy_sum") == pytest.approx(1 + 80 / 120)  # The plug alone; 20 and 60 in 2 x 60.
    assert value("batch_tokens_sum") == 1 + 120
    assert value("queue_seconds_count") == 2
    await asyncio.to_thread(batcher.close)


async def test_thousands_of_cancellations_deadlines_and_errors_leave_nothing_behind():
    draw = random.Random(0)
    seen: Counter[str] = Counter()

    def process(items: list[str]) -> list[str | ItemError]:
        seen.update(items)
        time.sleep(draw.random() * 0.0005)
        if draw.random() < 0.02:
            raise ValueError("a bad batch")
        return [ItemError("bad item", retryable=False) if item.endswith("7") else f"={item}" for item in items]

    batcher = Batcher(process, limits=limits(tokens=4000, items=32, queued=100_000), metrics=ServiceMetrics("test"))
    outcomes: Counter[str] = Counter()

    async def caller(name: int) -> None:
        chance = random.Random(name)
        for turn in range(25):
            items = [f"{name}.{turn}.{n}" for n in range(chance.choice((1, 1, 2, 8, 40)))]
            lengths = [chance.randint(1, 300) for _ in items]
            remaining_s = chance.choice((None, None, 0.0, 0.002, 0.02, 10.0))
            try:
                with batcher.hold(sum(lengths)) as hold:
                    submitted = asyncio.ensure_future(
                        batcher.submit(items, lengths, time_remaining_s=remaining_s, caller=name % 17, hold=hold)
                    )
                    if chance.random() < 0.4:
                        await asyncio.sleep(chance.random() * 0.01)
                        submitted.cancel()
                    results = await submitted
            except asyncio.CancelledError:
                outcomes["cancelled"] += 1
            except DeadlineExceededError:
                assert remaining_s is not None
                outcomes["expired"] += 1
            except OverloadedError as error:
                outcomes["overloaded"] += 1
                await asyncio.sleep(chance.random() * (error.retry_after_ms or 0) / 1000)
            except UnavailableError:
                outcomes["closing"] += 1
            else:
                outcomes["answered"] += 1
                assert len(results) == len(items)
                for item, result in zip(items, results, strict=True):
                    failed = ItemError("the model failed: ValueError", retryable=True)
                    assert result in (
                        ItemError("bad item", retryable=False) if item.endswith("7") else f"={item}",
                        failed,
                    )
                    assert seen[item] == 1

    callers = [asyncio.create_task(caller(name)) for name in range(200)]
    await asyncio.wait(callers, timeout=0.8)
    closing = asyncio.create_task(asyncio.to_thread(batcher.close))  # In the middle of it, if it takes that long.
    await asyncio.wait_for(asyncio.gather(*callers), 30)
    await closing
    assert sum(outcomes.values()) == 200 * 25  # Every call had an end, and one only.
    assert all(outcomes[end] > 50 for end in ("cancelled", "expired", "answered")), outcomes
    assert max(seen.values()) == 1
    assert (batcher.admission.queued_tokens, batcher.admission.held_bytes, batcher.admission._expected_tokens) == (
        0,
        0,
        0,
    )
    assert (batcher._line.items, batcher._line.tokens, len(batcher._line), len(batcher._unanswered)) == (0, 0, 0, 0)
