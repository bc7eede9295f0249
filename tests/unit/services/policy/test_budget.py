"""The budget counts prompts and what may be generated, guesses text by its bytes, and knows how fast it goes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.common.v1 import common_pb2
from services.policy.budget import Budget, BudgetLimits
from services.policy.config import PolicySettings
from services.runtime.errors import InvalidArgumentError, OverloadedError
from services.runtime.telemetry import ServiceMetrics
from tests.unit.services.policy.served import ids

TEXT = common_pb2.Prompt(text="x" * 98)  # Of 100 bytes on the wire.


class Clock:
    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def make(clock: Clock | None = None, **changes: int) -> Budget:
    limits = BudgetLimits(**{"max_completions": 10, "max_tokens": 1000, "max_bytes": 10_000, **changes})
    return Budget(limits, ServiceMetrics("test"), clock=clock or Clock())


def test_by_default_a_step_of_ppo_fits_512_prompts_of_2k_tokens_with_8_answers_of_2k():
    limits = PolicySettings(model="m").budget_limits
    assert limits.max_completions >= 512 * 8
    assert limits.max_tokens >= 512 * 8 * (2048 + 2048)
    assert limits.max_bytes >= 512 * 2048 * 3  # A token id takes at most three bytes up to 2,097,151.


def test_the_pushback_is_what_is_in_hand_over_the_rate_at_which_it_went():
    clock = Clock()
    budget = make(clock)
    budget.admit(8, 800)
    with pytest.raises(OverloadedError, match="800 tokens are waiting, 201 more would exceed 1000") as refused:
        budget.admit(1, 201)
    assert refused.value.retry_after_ms == 1000  # Nothing is known yet.
    for _ in range(4):
        clock.now_s += 0.5
        budget.finished(100)  # 200 a second.
    with pytest.raises(OverloadedError) as refused:
        budget.admit(1, 601)
    assert refused.value.retry_after_ms == 1000 * 400 / 200
    with pytest.raises(
        OverloadedError, match="8 completions are in hand and 3 more were asked for, at most 10"
    ) as full:
        budget.admit(3, 3)
    assert full.value.retry_after_ms == 2000
    # What nobody wants any more goes without work, and idle time is none either.
    budget.dropped(400)
    clock.now_s += 1000
    budget.admit(1, 500)
    clock.now_s += 1.0
    budget.finished(200)
    with pytest.raises(OverloadedError) as refused:
        budget.admit(1, 701)
    assert refused.value.retry_after_ms == pytest.approx(1000 * 300 / 200, abs=1)


def test_what_can_never_fit_is_invalid():
    budget = make()
    with pytest.raises(InvalidArgumentError, match="1001 tokens, at most 1000 may wait at a time"):
        budget.admit(1, 1001)
    with pytest.raises(InvalidArgumentError, match="prompts times n is 11, at most 10 completions"):
        budget.check(11)
    with pytest.raises(InvalidArgumentError, match="10001 bytes"), budget.hold(10_001):
        pytest.fail("it was let in")
    assert (budget.tokens, budget.completions, budget.held_bytes) == (0, 0, 0)


def test_tokens_are_counted_and_text_is_guessed_by_what_was_measured():
    budget = make()
    asked = {"samples": 2, "new_tokens": 10, "longest": 100}
    assert budget.expect([ids(*range(30)), TEXT, ids(*[5] * 500)], **asked) == [30, 0, 100]
    budget.learn(25, 100)
    assert budget.expect([ids(*range(30)), TEXT, common_pb2.Prompt(text="x" * 9000)], **asked) == [30, 25, 100]


def test_a_guess_makes_no_request_too_large():
    budget = make()
    budget.learn(90, 100)
    asked = {"new_tokens": 10, "longest": 100}
    assert budget.expect([TEXT] * 5, samples=2, **asked) == [90] * 5  # 1,000 with what is generated.
    assert budget.expect([TEXT] * 6, samples=2, **asked) == [0] * 6
    assert budget.expect([ids(*[5] * 100)] * 5, samples=2, **asked) == [100] * 5  # This is too large, as is known.


def test_the_exact_count_takes_the_place_of_the_guess_or_nothing_does():
    budget = make()
    budget.admit(2, 300)
    budget.recount(300, 400)
    assert budget.tokens == 400
    budget.admit(2, 300)
    with pytest.raises(OverloadedError):
        budget.recount(300, 601)
    assert budget.tokens == 400
    with pytest.raises(InvalidArgumentError):
        budget.recount(400, 1001)
    assert budget.tokens == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 700), st.sampled_from(["finished", "dropped", None]))))
def test_the_counts_never_pass_their_limits_and_return_to_zero(steps):
    clock = Clock()
    budget = make(clock)
    left: list[tuple[int, int]] = []
    for completions, tokens, end in steps:
        clock.now_s += 0.1
        try:
            budget.admit(completions, tokens)
        except OverloadedError:
            pass
        else:
            left.append((completions, tokens))
        assert budget.completions == sum(count for count, _ in left) <= 10
        assert budget.tokens == sum(count for _, count in left) <= 1000
        if end is not None and left:
            count, tokens = left.pop(0)
            getattr(budget, end)(tokens)
            budget.release(count)
    for count, tokens in left:
        budget.dropped(tokens)
        budget.release(count)
    assert (budget.tokens, budget.completions) == (0, 0)
