"""Rules as rewards of tests: quick to learn, and one that tells nothing apart."""

from __future__ import annotations

from collections.abc import Sequence


def score(pairs: Sequence[tuple[object, str]]) -> list[float]:
    """The share of the letter e in each response."""
    return [response.count("e") / max(1, len(response)) for _, response in pairs]


def nothing(pairs: Sequence[tuple[object, str]]) -> list[float]:
    """The same score for every response."""
    return [0.5 for _ in pairs]
