"""When services worked for a rollout, by this machine's clock: the rest of its time is transport and bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence

from quartet.client.types import WorkInterval


def within_call(work: WorkInterval, asked_ns: int, answered_ns: int) -> WorkInterval:
    """When a service worked, by this machine's clock: somewhere within the call that it worked for.

    Where the service's clock is off by more than that, the work is put in the middle of the call, as if both ways had
    taken equally long (RFC 5905, NTP, assumes the same); how long it took needs no common clock.
    """
    if asked_ns <= work.start_unix_ns <= work.end_unix_ns <= answered_ns:
        return work
    duration_ns = min(max(0, work.end_unix_ns - work.start_unix_ns), answered_ns - asked_ns)
    start_ns = asked_ns + (answered_ns - asked_ns - duration_ns) // 2
    return WorkInterval(start_unix_ns=start_ns, end_unix_ns=start_ns + duration_ns)


def covered_s(intervals: Sequence[WorkInterval], start_ns: int, end_ns: int) -> float:
    """Seconds of [start_ns, end_ns] that lie in at least one interval."""
    covered = 0
    reached = start_ns
    for interval in sorted(intervals, key=lambda interval: interval.start_unix_ns):
        first, last = max(reached, interval.start_unix_ns), min(end_ns, interval.end_unix_ns)
        if last > first:
            covered += last - first
            reached = last
    return covered / 1e9
