"""Rules as rewards of tests: quick to learn, and one that tells nothing apart."""

from __future__ import annotations

from collections.abc import Sequence


def score(pairs: Sequence[tuple[object, str]]) -> list[float]:
    """The share of small letters in each response."""
    return [sum("a" <= letter <= "z" for letter in response) / max(1, len(response)) for _, response in pairs]


def nothing(pairs: Sequence[tuple[object, str]]) -> list[float]:
    """The same score for every response."""
    return [0.5 for _ in pairs]
