"""The line is fair between callers, old items go whatever comes later, and batches are full of neighbours in length."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.runtime.waiting import Call, Entry, WaitingLine

NEVER_OLD_S = 1e9


def make_line(*, tokens: int = 1000, items: int = 10, max_wait_s: float = NEVER_OLD_S) -> WaitingLine[str]:
    return WaitingLine(max_batch_tokens=tokens, max_batch_items=items, max_wait_s=max_wait_s)


def add(line: WaitingLine[str], name: str, lengths: list[int], *, caller: str | None = None, at: float = 0.0) -> None:
    line.add(Call(name, lengths, arrived_s=at, caller=caller))


def take(line: WaitingLine[str], at: float = 0.0) -> list[tuple[str, int]]:
    return [(entry.call.payload, entry.index) for entry in line.take(at)]


class AnyMix(RuleBasedStateMachine):
    """Whatever is added, dropped, expired and taken in whatever order, against plain sets."""

    max_tokens, max_items, max_wait_s, padded = 120, 6, 3.0, True

    def __init__(self) -> None:
        super().__init__()
        self.line: WaitingLine[int] = WaitingLine(
            max_batch_tokens=self.max_tokens,
            max_batch_items=self.max_items,
            max_wait_s=self.max_wait_s,
            padded=self.padded,
        )
        self.now_s = 0.0
        self.calls: list[Call[int]] = []
        self.waiting: set[Entry[int]] = set()
        self.batches_since_old: Counter[Entry[int]] = Counter()  # Batches since an item was older than the cap.
        self.bound: dict[Entry[int], int] = {}

    def cost(self, batch: list[Entry[int]]) -> int:
        return len(batch) * max(entry.tokens for entry in batch)

    def may_be_left(self, misfits: int) -> int:
        """How many that fit may be left when so many did not."""
        return 0

    def older(self, entry: Entry[int]) -> int:
        """How many waiting items are before it."""
        return sum((e.call.payload, e.index) < (entry.call.payload, entry.index) for e in self.waiting)

    @rule(
        lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
        caller=st.sampled_from([None, "a", "b"]),
        lives_s=st.none() | st.floats(0.5, 20),
    )
    def arrive(self, lengths, caller, lives_s):
        deadline_s = None if lives_s is None else self.now_s + lives_s
        call = Call(len(self.calls), lengths, arrived_s=self.now_s, caller=caller, deadline_s=deadline_s)
        self.calls.append(call)
        self.line.add(call)
        self.waiting |= set(call.entries)

    @precondition(lambda self: self.calls)
    @rule(which=st.randoms(use_true_random=False))
    def leave(self, which):
        call = which.choice(self.calls)
        gone = self.waiting & set(call.entries)
        assert self.line.drop(call) == sum(entry.tokens for entry in gone)
        self.waiting -= gone

    @rule(seconds=st.floats(0, 2))
    def pass_time(self, seconds):
        self.now_s += seconds

    @rule()
    def expire(self):
        late = {e.call for e in self.waiting if e.call.deadline_s is not None and e.call.deadline_s <= self.now_s}
        expired = self.line.expire(self.now_s)
        assert len(expired) == len(set(expired))
        assert set(expired) == late
        self.waiting = {entry for entry in self.waiting if entry.call not in late}

    @rule()
    def take(self):
        for entry in self.waiting:
            if self.now_s - entry.call.arrived_s >= self.max_wait_s and entry not in self.bound:
                self.bound[entry] = 2 * self.older(entry) + 2
        batch = self.line.take(self.now_s)
        assert bool(batch) == bool(self.waiting)
        assert len(set(batch)) == len(batch)
        assert set(batch) <= self.waiting
        self.waiting -= set(batch)
        if not batch:
            return
        assert len(batch) <= self.max_items
        assert len(batch) == 1 or self.cost(batch) <= self.max_tokens
        if len(batch) < self.max_items:  # It is full: nobody else would fit.
            fitting = [entry for entry in self.waiting if self.cost([*batch, entry]) <= self.max_tokens]
            assert len(fitting) <= self.may_be_left(len(self.waiting) - len(fitting))
        for entry in self.waiting & self.bound.keys():
            self.batches_since_old[entry] += 1
            assert self.batches_since_old[entry] < self.bound[entry]  # Nobody starves, whatever came later.

    @invariant()
    def counts_are_of_what_waits(self):
        assert self.line.items == len(self.waiting)
        assert self.line.tokens == sum(entry.tokens for entry in self.waiting)
        assert len(self.line) == len({entry.call for entry in self.waiting})
        assert self.line.oldest_s() == min((entry.call.arrived_s for entry in self.waiting), default=None)
        for caller in ("a", "b"):
            own = sum(entry.tokens for entry in self.waiting if entry.call.caller == caller)
            assert self.line.tokens_of(caller) == own

    def teardown(self):
        while self.waiting:
            self.take()
        assert (self.line.items, self.line.tokens, len(self.line), self.line.oldest_s()) == (0, 0, 0, None)


TestAnyMix = AnyMix.TestCase
TestAnyMix.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class AnyMixUnpadded(AnyMix):
    """The same where a batch costs what its tokens are."""

    padded = False

    def cost(self, batch):
        return sum(entry.tokens for entry in batch)

    def may_be_left(self, misfits):
        return 10_000 if misfits > 16 else 0


TestAnyMixUnpadded = AnyMixUnpadded.TestCase
TestAnyMixUnpadded.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), tokens=st.integers(1, 400))
def test_a_batch_of_one_list_begins_with_its_first_item_and_holds_its_neighbours_in_length(lengths, tokens):
    line = make_line(tokens=tokens)
    add(line, "call", lengths)
    waiting = dict(enumerate(lengths))
    while waiting:
        batch = [index for _, index in take(line)]
        assert batch[0] == min(waiting)
        chosen = [waiting.pop(index) for index in batch]
        assert all(n <= min(chosen) or n >= max(chosen) for n in waiting.values())


def test_without_padding_a_batch_is_what_comes_next_and_then_what_came_first():
    line = WaitingLine[str](max_batch_tokens=100, max_batch_items=10, max_wait_s=NEVER_OLD_S, padded=False)
    add(line, "old", [30, 60, 5], caller="a")
    add(line, "other", [50, 45, 20, 1], caller="b")
    # Of its own 60 + 5 fill up to 95; of the next one, 1 is all that fits.
    assert take(line) == [("old", 0), ("old", 1), ("old", 2), ("other", 3)]
    assert take(line) == [("other", 0), ("other", 1)]
    assert take(line) == [("other", 2)]


def test_without_padding_many_that_are_too_long_do_not_make_filling_a_batch_slow():
    line = WaitingLine[str](max_batch_tokens=100, max_batch_items=10, max_wait_s=NEVER_OLD_S, padded=False)
    add(line, "call", [60] * 100_000 + [1])
    start_s = time.perf_counter()
    assert [len(take(line)) for _ in range(2000)] == [1] * 2000
    assert time.perf_counter() - start_s < 5


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([50, 100, 49, 1, 52], {0, 2, 4}),  # 150 padded tokens hold three of 50, not two of 100.
        ([50, 60, 43, 10], {0, 2, 3}),  # 43 is nearer than 60; then four of 60 would not fit, three of 50 do.
        ([200, 1, 1], {0}),  # Too long for the budget, so alone.
    ],
)
def test_the_budget_counts_padding_and_goes_to_the_nearest(lengths, expected):
    line = make_line(tokens=160)
    add(line, "call", lengths)
    assert {index for _, index in take(line)} == expected


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), crowd=st.integers(1, 5), batches=st.integers(0, 20), tokens=st.integers(1, 900))
def test_one_item_beside_callers_with_thousands_is_in_the_very_next_batch(seed, crowd, batches, tokens):
    draw = random.Random(seed)
    line = make_line()
    for number in range(crowd):
        add(line, f"big {number}", [draw.randint(1, 500) for _ in range(1000)], caller=f"caller {number}")
    for _ in range(2 * crowd + batches):  # Each of the others has had its first turn, which may be two batches.
        take(line)
    add(line, "small", [tokens], caller="another")
    assert ("small", 0) in take(line)


def test_one_item_behind_thousands_of_the_same_connection_waits_for_at_most_two_batches():
    line = make_line()
    add(line, "big", [5] * 10_000, caller="proxy")
    take(line)
    add(line, "small", [900], caller="proxy")
    assert ("small", 0) in take(line) + take(line)


def test_a_caller_of_one_call_is_not_behind_a_thousand_calls_of_another():
    line = make_line(items=4)
    for number in range(1000):
        add(line, f"call {number}", [random.Random(number).randint(1, 200)], caller="crowd")
    take(line)
    add(line, "single", [37, 400], caller="single")
    assert ("single", 0) in take(line)
    assert ("single", 1) in take(line) + take(line)


def test_a_hundred_items_beside_ten_thousand_get_their_share_of_batches_whatever_the_lengths():
    draw = random.Random(0)
    line = make_line(tokens=64 * 512, items=64)
    add(line, "big", [draw.randint(1, 512) for _ in range(10_000)])
    add(line, "small", [draw.randint(1, 512) for _ in range(100)])
    left, batches = 100, 0
    while left:
        left -= sum(name == "small" for name, _ in take(line))
        batches += 1
    # Alone it would be two batches. With a seat each second batch and no more it would be two hundred.
    assert batches <= 32


def test_callers_share_batches_evenly():
    line = make_line(items=8)
    for caller in "abc":
        add(line, caller, [100] * 400, caller=caller)
    count: Counter[str] = Counter()
    for _ in range(30):
        count.update(name for name, _ in take(line))
    assert count == {"a": 80, "b": 80, "c": 80}


def bulk_and_crowd(draw: random.Random, *, padded: bool, one_connection: bool = False) -> WaitingLine[str]:
    """A list of ten thousand, and 64 callers with one item each, which are four or five batches together."""
    line = WaitingLine[str](max_batch_tokens=4096, max_batch_items=256, max_wait_s=2.0, padded=padded)
    add(line, "bulk", [draw.randint(50, 400) for _ in range(10_000)], caller="bulk")
    for number in range(64):
        add(line, "small", [draw.randint(50, 400)], caller="bulk" if one_connection else f"{number}", at=0.01)
    return line


@pytest.mark.parametrize("one_connection", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_crowd_of_small_calls_beside_a_list_of_ten_thousand_is_served_in_about_ten_batches(
    padded, one_connection, seed
):
    line = bulk_and_crowd(random.Random(seed), padded=padded, one_connection=one_connection)
    left, batches, bulk = 64, 0, 0
    while left:
        batch = take(line, at=0.5 * batches)  # The list grows old meanwhile, and begins every second batch.
        left -= sum(name == "small" for name, _ in batch)
        bulk += sum(name == "bulk" for name, _ in batch)
        batches += 1
    assert batches <= (13 if padded else 7)
    assert bulk >= 10  # Its first batch, and what room was left.


@pytest.mark.parametrize("padded", [False, True])
def test_asking_one_by_one_gets_no_more_than_a_list_does_nor_less(padded):
    draw = random.Random(0)
    line = WaitingLine[str](max_batch_tokens=4096, max_batch_items=256, max_wait_s=NEVER_OLD_S, padded=padded)
    add(line, "bulk", [draw.randint(50, 400) for _ in range(10_000)], caller="bulk")
    for caller in range(60):
        add(line, f"{caller}", [draw.randint(50, 400)], caller=f"{caller}")
    tokens: Counter[str] = Counter()
    for _ in range(800):
        batch = line.take(0.0)
        for entry in batch:
            tokens[entry.call.payload] += entry.tokens
        for entry in batch:
            if entry.call.payload != "bulk":  # Answered, it asks for the next one.
                add(line, entry.call.payload, [draw.randint(50, 400)], caller=entry.call.payload)
    share = tokens.total() / 61
    # Padded batches are filled with whatever is nearest in length, where nobody next fits.
    assert 0.5 * share < tokens["bulk"] < (8 if padded else 3) * share
    small = [tokens[f"{caller}"] for caller in range(60)]
    assert 0.7 * share < min(small) <= max(small) < 1.2 * share


def test_callers_share_tokens_evenly_whatever_the_lengths_of_their_items():
    line = WaitingLine[str](max_batch_tokens=1000, max_batch_items=100, max_wait_s=NEVER_OLD_S, padded=False)
    for caller, length in (("short", 10), ("middle", 130), ("long", 900)):
        add(line, caller, [length] * (60_000 // length), caller=caller)
    tokens: Counter[str] = Counter()
    for _ in range(90):
        for entry in line.take(0.0):
            tokens[entry.call.payload] += entry.tokens
    assert max(tokens.values()) - min(tokens.values()) <= 2000


def test_what_begins_alike_stays_together_among_many_callers():
    """Four answers to each prompt stand side by side in a list."""
    draw = random.Random(0)
    line = WaitingLine[str](max_batch_tokens=4096, max_batch_items=256, max_wait_s=2.0, padded=False)
    for caller in range(8):
        for number in range(16):
            lengths = [draw.randint(50, 400) for _ in range(64)]
            add(line, f"{caller}.{number}", lengths, caller=f"{caller}")
    pieces = 0
    batches = 0
    while batch := take(line, at=0.3 * batches):
        pieces += len({(name, index // 4) for name, index in batch})
        batches += 1
    assert batches <= 460  # Full ones: as many as the tokens need.
    assert pieces <= 1.45 * 8 * 16 * 16  # Of 2,048 groups; each end of a batch or a turn may cut one.


def test_callers_that_come_and_go_are_not_remembered_for_ever():
    line = make_line(items=1)
    add(line, "bulk", [10] * 10_000, caller="bulk")
    take(line)
    for number in range(9000):
        add(line, f"{number}", [1], caller=f"{number}")
        assert take(line) == [(f"{number}", 0)]
    assert len(line._left) <= 4096
    assert len(line._callers) == 1


def test_an_old_item_goes_though_newcomers_never_end():
    line = make_line(items=1, max_wait_s=5.0)
    add(line, "old", [100] * 3, at=0.0)
    gone: list[tuple[str, int]] = []
    for second in range(20):
        for number in range(2):
            add(line, f"new {second}.{number}", [3], at=float(second))
        gone += take(line, at=float(second))
    # After its own first turn newcomers go first until it is old; then it begins every second batch, and no more.
    assert [second for second, (name, _) in enumerate(gone) if name == "old"] == [0, 5, 7]


def test_an_old_list_does_not_hold_up_those_in_turn():
    line = make_line(items=2, max_wait_s=1.0)
    add(line, "old", [10] * 100, caller="old", at=0.0)
    for caller in "abcd":
        add(line, caller, [500], caller=caller, at=0.5)
    gone = [take(line, at=100.0) for _ in range(8)]
    assert [name for batch in gone for name, _ in batch if name != "old"] == ["a", "b", "c", "d"]


def test_most_of_a_batch_of_mixed_lengths_is_not_padding():
    draw = random.Random(0)
    line = make_line(tokens=16384, items=256)
    for number in range(200):
        add(line, f"{number}", [draw.randint(1, 512) for _ in range(16)], caller=f"{number % 7}")
    shares = []
    while batch := line.take(0.0):
        lengths = [entry.tokens for entry in batch]
        shares.append(sum(lengths) / (max(lengths) * len(lengths)))
    assert statistics.mean(shares) > 0.85


def test_a_batch_costs_the_same_beside_a_thousand_and_a_hundred_thousand_items():
    def seconds(queued: int) -> float:
        draw = random.Random(0)
        line = make_line(tokens=10**9, items=64)
        for number in range(queued // 100):
            add(line, f"{number}", [draw.randint(1, 2000) for _ in range(100)])
        return statistics.median(_seconds(lambda: line.take(0.0)) for _ in range(15))

    # Sorting anew would cost a hundred times as much.
    assert seconds(100_000) < 10 * seconds(1_000)


def test_calls_with_far_deadlines_do_not_pile_up():
    line = make_line()
    for number in range(5000):
        line.add(Call(f"{number}", [1], arrived_s=0.0, deadline_s=1e6 + number))
        assert take(line) == [(f"{number}", 0)]
    assert len(line._deadlines) < 100


def _seconds(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s
