"""What is kept for retries is bounded by number, bytes and age, and never taken from a call that waits for it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from services.policy.kept_requests import KeepLimits, KeptRequests, RequestName
from services.runtime.errors import InvalidArgumentError


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(clock) -> KeptRequests[object]:
    return KeptRequests(KeepLimits(count=3, max_bytes=100, age_s=60.0), clock=clock)


def of(request_id: str, caller: str = "") -> RequestName:
    return RequestName(((), caller), request_id)


def keep(kept: KeptRequests[object], name: str, size: int = 10, *, left: bool = True) -> object:
    request = object()
    kept.add(of(name), name.encode(), request)
    assert kept.grow(of(name), request, size)
    if left:
        kept.leave(of(name), request)
    return request


def known(kept: KeptRequests[object], *names: str) -> str:
    """Which of them are kept; looking takes none into use."""
    return "".join(name for name in names if of(name) in kept)


def test_the_same_content_finds_the_request_and_other_content_is_refused(kept):
    request = keep(kept, "a")
    assert kept.find(of("a"), b"a") is request
    assert kept.find(of("b"), b"a") is None
    with pytest.raises(InvalidArgumentError, match="request_id is 'a', which stands for a request of other content"):
        kept.find(of("a"), b"other")
    assert kept.find(of("a"), b"a") is request


def test_nobody_meets_the_request_of_another_under_the_same_id(kept):
    mine = keep(kept, "a")
    assert kept.find(of("a", "another"), b"a") is None
    theirs = object()
    kept.add(of("a", "another"), b"other content", theirs)
    assert kept.find(of("a", "another"), b"other content") is theirs
    assert kept.find(of("a"), b"a") is mine


def test_the_longest_unused_goes_first_when_there_are_too_many(kept):
    first = keep(kept, "a")
    for name in "bc":
        keep(kept, name)
    assert kept.find(of("a"), b"a") is first
    kept.leave(of("a"), first)  # Now the newest.
    keep(kept, "d")
    assert known(kept, *"abcd") == "acd"
    assert kept.held_bytes == 30


def test_bytes_are_bounded_whoever_they_are_of(kept):
    for name in "abc":
        keep(kept, name, 30)
    assert known(kept, *"abc") == "abc"
    running = keep(kept, "d", 20, left=False)
    assert known(kept, *"abcd") == "bcd"
    assert kept.grow(of("d"), running, 75)  # 95 of one that is in use: all others go.
    assert (known(kept, *"abcd"), kept.held_bytes) == ("d", 95)
    assert not kept.grow(of("d"), running, 6)  # More than may be kept at all.
    assert (len(kept), kept.held_bytes) == (0, 0)
    assert not kept.grow(of("d"), running, 1)
    kept.leave(of("d"), running)
    assert len(kept) == 0


def test_age_counts_from_when_the_last_call_left(kept, clock):
    request = keep(kept, "a", left=False)
    clock.now_s += 1000.0
    assert kept.find(of("a"), b"a") is request  # In use all the time.
    kept.leave(of("a"), request)
    clock.now_s += 59.0
    assert kept.find(of("a"), b"a") is request
    kept.leave(of("a"), request)
    clock.now_s += 60.0
    assert kept.find(of("a"), b"a") is None
    assert (len(kept), kept.held_bytes) == (0, 0)


def test_those_in_use_are_kept_beyond_the_number(kept):
    for name in "abcde":
        keep(kept, name, left=False)
    assert known(kept, *"abcde") == "abcde"


def test_one_that_was_forgotten_changes_nothing_of_its_successor(kept):
    old = keep(kept, "a", left=False)
    kept.forget(of("a"), old)
    new = keep(kept, "a", 20, left=False)
    kept.forget(of("a"), old)
    kept.leave(of("a"), old)
    assert not kept.grow(of("a"), old, 50)
    assert kept.find(of("a"), b"a") is new
    assert kept.held_bytes == 20


def test_with_a_number_of_zero_nothing_is_kept(clock):
    kept: KeptRequests[object] = KeptRequests(KeepLimits(count=0), clock=clock)
    kept.add(of("a"), b"a", object())
    assert kept.find(of("a"), b"other") is None
    assert len(kept) == 0
