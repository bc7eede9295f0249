"""Work of services on this machine's clock."""

from __future__ import annotations

import pytest

from quartet.client.types import WorkInterval
from trainer.service_time import covered_s, within_call


def test_work_is_placed_within_its_call_and_never_grows():
    def placed(start: int, end: int) -> tuple[int, int]:
        found = within_call(WorkInterval(start_unix_ns=start, end_unix_ns=end), 100, 200)
        return found.start_unix_ns, found.end_unix_ns

    assert placed(110, 150) == (110, 150)
    assert placed(100, 200) == (100, 200)
    assert placed(5110, 5150) == (130, 170)  # In the middle.
    assert placed(190, 230) == (130, 170)
    assert placed(0, 500) == (100, 200)
    assert placed(0, 0) == (150, 150)
    assert placed(9, 3) == (150, 150)  # A clock that was set back.


def test_covered_time_is_the_union_of_the_intervals_inside_the_window():
    def interval(start: float, end: float) -> WorkInterval:
        return WorkInterval(start_unix_ns=int(start * 1e9), end_unix_ns=int(end * 1e9))

    intervals = [interval(3, 5), interval(0, 2), interval(1, 2.5), interval(3.5, 4), interval(9, 12)]
    assert covered_s(intervals, int(0.5e9), int(10e9)) == pytest.approx(2.0 + 2.0 + 1.0)
    assert covered_s([], 0, 10) == 0.0
