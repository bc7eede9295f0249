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
