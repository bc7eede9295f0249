"""A rule for tests of the gateway: scores letters, takes its time or fails where the response says so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


def score(pairs: Sequence[tuple[Any, str]]) -> list[float | None]:
    """A share of small letters; after ``sleep 0.5`` such a time; none of ``fail``."""
    found: list[float | None] = []
    for _, response in pairs:
        command, _, value = response.partition(" ")
        if command == "sleep":
            time.sleep(float(value))
        letters = sum("a" <= letter <= "z" for letter in response)
        found.append(None if command == "fail" else letters / max(1, len(response)))
    return found
