"""What a policy's answers to fixed prompts look like: how alike, how repetitive, how long, and whether length pays.

Pure functions of token ids and numbers. A response is a sequence of token ids, its end token among them.
Shapes: N responses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

Response = Sequence[int]

# What a count of 0 is taken for in BLEU, so that one order without a match does not make the product 0.
_BLEU_FLOOR = 0.1


def ngrams(response: Response, n: int) -> list[tuple[int, ...]]:
    """All ``n`` tokens that stand in a row, in order; none of a shorter response."""
    return [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]


def distinct_n(responses: Sequence[Response], n: int) -> float:
    """Distinct n-grams as a share of all, over all responses together; 1 where none is long enough.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models".
    """
    grams = [gram for response in responses for gram in ngrams(response, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def unique_share(responses: Sequence[Response]) -> float:
    """Different responses as a share of all."""
    return len({tuple(response) for response in responses}) / len(responses)


def repeated_share(responses: Sequence[Response], n: int = 4) -> float:
    """Share of n-grams that stood in the same response before; the mean over responses that have any, 0 without.

    Source: Welleck et al. 2020, "Neural Text Generation With Unlikelihood Training", seq-rep-n.
    """
    shares = [1 - len(set(grams)) / len(grams) for response in responses if (grams := ngrams(response, n))]
    return math.fsum(shares) / len(shares) if shares else 0.0


def self_bleu(responses: Sequence[Response], n: int = 4) -> float:
    """How alike the responses are: the mean BLEU-n of each against all others, 0 to 1; 0 of fewer than 2.

    A count of 0 is taken for .1, so that short responses count (smoothing method 1 of Chen & Cherry 2014, as in
    nltk). It grows with the number of responses: compare equal numbers. Time is that of counting all n-grams once.
    Source: Zhu et al. 2018, "Texygen: A Benchmarking Platform for Text Generation Models".
    """
    if len(responses) < 2:
        return 0.0
    by_order = [_clipped_counts(responses, order) for order in range(1, n + 1)]
    lengths = np.array([len(response) for response in responses])
    total = 0.0
    for index, length in enumerate(lengths.tolist()):
        matches = [counts[index] for counts in by_order]
        if matches[0] == 0 or length == 0:
            continue  # Without one token in common BLEU is 0, however it is smoothed.
        precisions = [(matched or _BLEU_FLOOR) / max(1, length - order) for order, matched in enumerate(matches)]
        others = np.delete(lengths, index)
        # The nearest reference's length, the shorter of two that are as near.
        nearest = int(others[np.lexsort((others, np.abs(others - length)))[0]])
        brevity = 1.0 if length > nearest else math.exp(1 - nearest / length)
        total += brevity * math.exp(math.fsum(map(math.log, precisions)) / n)
    return total / len(responses)


def _clipped_counts(responses: Sequence[Response], n: int) -> list[int]:
    """For each response, its n-grams that others have, each at most as often as the other that has it most."""
    counts = [Counter(ngrams(response, n)) for response in responses]
    # Of each n-gram the highest count, whose it is, and the highest of the others.
    best: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for index, own in enumerate(counts):
        for gram, count in own.items():
            first, holder, second = best.get(gram, (0, -1, 0))
            best[gram] = (count, index, first) if count > first else (first, holder, max(second, count))
    return [
        sum(min(count, best[gram][2] if best[gram][1] == index else best[gram][0]) for gram, count in own.items())
        for index, own in enumerate(counts)
    ]


def correlation(x_N: Sequence[float], y_N: Sequence[float]) -> float | None:
    """Pearson's; None of fewer than 3 values, or where one of the two does not vary."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (x_N, y_N))
    if len(x) < 3:
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    # Deviations of equal values are what rounding left of them.
    if not (_varies(x_N) and _varies(y_N)) or scale == 0:
        return None
    return max(-1.0, min(1.0, float(x @ y) / scale))


def within_correlation(x_N: Sequence[float], y_N: Sequence[float], groups_N: Sequence[Hashable]) -> float | None:
    """Pearson's of the deviations from each group's means: what is left where some prompts ask for long answers.

    None where no group has two values that differ, in one of the two.
    """
    places: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups_N):
        places.setdefault(group, []).append(index)
    x, y = (np.asarray(values, dtype=np.float64).copy() for values in (x_N, y_N))
    for values, given in ((x, x_N), (y, y_N)):
        for rows in places.values():
            own = [given[row] for row in rows]
            values[rows] = values[rows] - values[rows].mean() if _varies(own) else 0.0
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale > 0 else None


def _varies(values: Sequence[float]) -> bool:
    return any(value != values[0] for value in values)


def quantile(values_N: Sequence[float], share: float) -> float:
    """Interpolated linearly between neighbours."""
    return float(np.quantile(np.asarray(values_N, dtype=np.float64), share))
