"""Admission counts exactly, refuses before any work what will not fit, and says when to come back, as measured."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.admission import Admission
from services.runtime.errors import InvalidArgumentError, OverloadedError
from services.runtime.telemetry import ServiceMetrics

OUTCOMES = ("answered", "fails", "invalid")


def make(*, tokens: int = 1000, size_bytes: int = 10_000) -> Admission:
    return Admission(max_queued_tokens=tokens, max_held_bytes=size_bytes, metrics=ServiceMetrics("test"))


def refusals(admission: Admission) -> dict[str, float]:
    samples = next(iter(admission._metrics.refused.collect())).samples
    return {sample.labels["reason"]: sample.value for sample in samples if sample.name.endswith("_total")}


@pytest.mark.parametrize(
    ("tokens", "seconds", "pushback_ms"), [(2000, 4.0, 1800), (100_000, 1.0, 10), (1, 1.0, 60_000)]
)
def test_the_pushback_is_what_waits_over_the_measured_rate(tokens, seconds, pushback_ms):
    admission = make()
    admission.served(tokens, seconds)
    admission.enqueue(900)  # At 500 tokens a second: 1.8 s. Never less than 10 ms nor more than a minute.
    with pytest.raises(OverloadedError, match="900 tokens are waiting, 101 more would exceed 1000") as refused:
        admission.enqueue(101)
    assert refused.value.retry_after_ms == pushback_ms
    admission.enqueue(100)
    assert refusals(admission) == {"queue_tokens": 1.0}


def test_the_rate_is_of_the_models_time_and_follows_a_change():
    admission = make()
    assert admission.tokens_per_s == 0.0
    for _ in range(10):
        admission.served(500, 1.0)
    assert admission.tokens_per_s == pytest.approx(500.0)
    for _ in range(10):  # One half-life: each half of the time counts by its age.
        admission.served(2000, 1.0)
    assert admission.tokens_per_s == pytest.approx((2000 * (1 - 0.5) + 500 * (0.5 - 0.25)) / (1 - 0.25))


def test_what_can_never_fit_is_an_invalid_argument_with_the_bound():
    admission = make()
    with (
        pytest.raises(InvalidArgumentError, match=r"10001 bytes, at most 10000 are held at a time \(max_held_mib\)"),
        admission.hold(10_001),
    ):
        pytest.fail("it was let in")
    with pytest.raises(InvalidArgumentError, match=r"1001 tokens, at most 1000 may wait at a time \(max_queued_tokens"):
        admission.enqueue(1001)
    with admission.hold(10_000) as hold:
        admission.enqueue(1000, hold)
    assert refusals(admission) == {"too_large": 2.0}
    assert (admission.held_bytes, admission.queued_tokens) == (0, 1000)


def test_bytes_are_held_until_the_answer_and_refused_beyond():
    admission = make()
    with admission.hold(6000):
        with (
            pytest.raises(OverloadedError, match="6000 bytes are in hand, 4001 more would exceed 10000") as refused,
            admission.hold(4001),
        ):
            pytest.fail("it was let in")
        assert refused.value.retry_after_ms == 1000  # Nothing measured yet.
        with admission.hold(4000):
            assert admission.held_bytes == 10_000
    with contextlib.suppress(ZeroDivisionError), admission.hold(10_000):
        raise ZeroDivisionError
    assert admission.held_bytes == 0
    assert refusals(admission) == {"queue_bytes": 1.0}


def test_a_request_that_will_not_fit_by_its_size_is_refused_before_its_tokens_are_counted():
    admission = make()
    with admission.hold(1200) as hold:
        admission.enqueue(300, hold)  # Four bytes a token.
    with (
        admission.hold(2000) as being_read,
        pytest.raises(OverloadedError, match="800 tokens are waiting or being read"),
    ):
        # 300 wait, 500 are expected of the one that is being read, 201 of this one.
        admission.hold(804).__enter__()
    with admission.hold(800) as hold:
        admission.enqueue(200, hold)
    assert being_read.expected_tokens == 500
    admission.leave(500)
    # An estimate refuses nothing while nothing waits, and the exact count decides.
    with admission.hold(9000) as hold:
        admission.enqueue(1000, hold)
    assert refusals(admission) == {"queue_tokens": 1.0}


@settings(deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 4000), st.integers(0, 500), st.sampled_from(["answered", "fails", "invalid"])),
        max_size=60,
    )
)
def test_the_counts_never_pass_their_limits_and_return_to_zero(steps):
    admission = make()
    queued = 0
    with contextlib.ExitStack() as held:
        for size, tokens, outcome in steps:
            try:
                hold = held.enter_context(admission.hold(size))
                if outcome != "invalid":  # Such a request has no item for the model.
                    admission.enqueue(tokens, hold)
                    queued += tokens
            except OverloadedError:
                continue
            assert admission.held_bytes <= 10_000
            assert admission.queued_tokens == queued <= 1000
            if outcome == "fails":
                admission.leave(tokens)
                queued -= tokens
    admission.leave(queued)
    assert (admission.held_bytes, admission.queued_tokens, admission._expected_tokens) == (0, 0, 0)


def test_a_caller_leaves_room_for_others_and_whoever_has_nothing_waiting_may_fill_the_queue():
    admission = make(tokens=900)
    admission.enqueue(400)
    admission.enqueue(400, own_tokens=400)  # 800 of its own, 8 times the 100 that it leaves.
    with pytest.raises(
        OverloadedError, match="800 tokens of this caller are waiting, 1 more would leave only 99 of 900"
    ):
        admission.enqueue(1, own_tokens=800)
    assert refusals(admission) == {"caller_tokens": 1.0}
    admission.enqueue(100)  # Another's.
    assert admission.queued_tokens == 900
    admission.leave(900)
    admission.enqueue(900)
    assert admission.queued_tokens == 900


def test_who_holds_all_of_its_share_is_refused_unread_until_as_much_is_free_and_others_are_not():
    admission = make(tokens=900)
    admission.enqueue(800, caller="a")
    assert admission.refusal(caller="a", own_tokens=800) is None  # Nobody was refused: who is small may fit.
    with pytest.raises(OverloadedError):
        admission.enqueue(50, caller="a", own_tokens=800)
    shut = admission.refusal(caller="a", own_tokens=800)
    assert str(shut) == (
        "800 tokens of this caller are waiting, 50 more would leave only 50 of 900 to others; try again later"
    )
    assert admission.refusal(caller="b", own_tokens=0) is None
    assert admission.refusal(caller="b", own_tokens=100) is None
    admission.leave(49)
    assert admission.refusal(caller="a", own_tokens=751) is not None  # 801 of its own would be more than 8 times 99.
    admission.leave(1)
    assert admission.refusal(caller="a", own_tokens=750) is None  # 800 and 100.
    admission.enqueue(50, caller="a", own_tokens=750)
    assert refusals(admission) == {"caller_tokens": 3.0}


def test_who_was_refused_for_its_share_shuts_out_nobody_else_and_stays_refused_while_others_come():
    admission = make(tokens=900)
    admission.enqueue(500, caller="small")
    admission.enqueue(300, caller="large")
    with pytest.raises(OverloadedError, match="300 tokens of this caller are waiting, 70 more would leave only 30"):
        admission.enqueue(70, caller="large", own_tokens=300)
    # With 70 more it would have more than 8 times 30 as well. But it was refused nothing, and wants one.
    assert admission.refusal(caller="small", own_tokens=500) is None
    admission.enqueue(1, caller="small", own_tokens=500)
    assert admission.refusal(caller="new", own_tokens=0) is None
    assert admission.refusal(caller="large", own_tokens=300) is not None
    assert admission.refusal(caller="large", own_tokens=0) is None  # All of its own is with the model.
    assert not admission._wanted_of_share
    assert refusals(admission) == {"caller_tokens": 2.0}


def test_of_callers_that_were_refused_for_their_share_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr("services.runtime.admission._REMEMBERED", 2)
    admission = make(tokens=900)
    admission.enqueue(850)
    for caller in ("a", "b", "a", "c"):
        with pytest.raises(OverloadedError):
            admission.enqueue(10, caller=caller, own_tokens=800)
    refused = [caller for caller in "abc" if admission.refusal(caller=caller, own_tokens=800) is not None]
    assert refused == ["a", "c"]


def test_no_more_waits_than_the_model_does_in_the_set_time_by_its_measured_rate():
    admission = Admission(
        max_queued_tokens=10_000, max_held_bytes=10_000, metrics=ServiceMetrics("test"), max_queue_s=2.0
    )
    admission.enqueue(5000)  # Nothing is measured yet.
    admission.leave(5000)
    admission.served(100, 1.0)
    admission.enqueue(500)  # It finds nothing before it: it would never be taken else.
    with pytest.raises(
        OverloadedError, match=r"with 1 more the model would need 5 s for them, at most 2 s may wait"
    ) as e:
        admission.enqueue(1)
    assert e.value.retry_after_ms == 5000
    shut = admission.refusal()
    assert str(shut) == "500 tokens are waiting or being read of at most 200; try again later"
    with pytest.raises(OverloadedError, match="max_queue_s"), admission.hold(1):
        pytest.fail("it was let in")
    admission.leave(400)
    assert admission.refusal() is None
    admission.enqueue(100)
    assert admission.queued_tokens == 200
    assert refusals(admission) == {"queue_seconds": 3.0}


def test_while_there_is_no_room_whoever_comes_is_refused_unread_until_there_is_as_much_as_was_wanted():
    admission = make(tokens=1000)
    assert admission.refusal() is None
    admission.served(100, 1.0)
    admission.enqueue(950)
    assert admission.refusal() is None  # Nobody was refused: who is small may fit.
    with pytest.raises(OverloadedError):
        admission.enqueue(100)
    shut = admission.refusal()
    assert shut is not None
    assert (str(shut), shut.retry_after_ms) == (
        "950 tokens are waiting or being read of at most 1000; try again later",
        9500,
    )
    admission.leave(40)
    assert admission.refusal() is not None  # 90 are free, 100 were wanted.
    admission.leave(10)
    assert admission.refusal() is None
    admission.enqueue(100)
    # A large one is not waited for: an eighth of the queue opens the door.
    with pytest.raises(OverloadedError):
        admission.enqueue(900)
    admission.leave(124)
    assert admission.refusal() is not None
    admission.leave(1)
    assert admission.refusal() is None
    assert refusals(admission) == {"queue_tokens": 5.0}
