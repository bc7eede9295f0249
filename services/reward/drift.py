"""Whether scores still look like those kept with the model: three two-sample tests under Holm's correction.

The population stability index alone, with its usual bounds, cries wolf: without any drift PSI over ten bins exceeds 0.1
in more than 80 % of comparisons of 100 with 100 scores, and in one of six of 256 with 256. Here it is calibrated by
permutation, and stands beside the Kolmogorov-Smirnov test and a z test of the mean. The chance that a comparison finds
a drift where there is none is at most ``alpha``; it holds for each comparison and not for a thousand of them together.

A drift of scores is not a failure of the reward model: reinforcement learning moves them by design. It says that the
model now judges texts unlike those it was measured on, and so that its accuracy there is not known.

Shapes: M scores of the baseline, N of the window, K bins, R permutations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quartet.model_folder import METADATA_FILE
from services.runtime.errors import StartError

Scores = NDArray[np.float64]

_BINS = 10
# Resolution of the calibrated p-value: 1 / 5,000, well below a third of any sensible alpha.
_PERMUTATIONS = 4_999
# The z test takes the standard error for known; with so many scores it is, to a few per cent.
FEWEST_SCORES = 50
MOST_BASELINE_SCORES = 100_000


@dataclass(frozen=True, eq=False)
class Baseline:
    """Raw scores of held-out texts, kept with the model; float64, (M,), M >= FEWEST_SCORES."""

    scores: Scores

    @cached_property
    def mean(self) -> float:
        return float(self.scores.mean())

    @cached_property
    def std(self) -> float:
        return float(self.scores.std(ddof=1))


def read_baseline(metadata: dict[str, Any], folder: str) -> Baseline | str:
    """The baseline kept with a model in quartet.json, as ``"baseline": {"scores": [...]}``, or why there is none.

    Raises:
        StartError: what is kept there is not usable.
    """
    if (kept := metadata.get("baseline")) is None:
        return f"no baseline scores are kept with the model (baseline.scores in {METADATA_FILE})"
    where = f"{folder}/{METADATA_FILE}: baseline.scores"
    scores = kept.get("scores") if isinstance(kept, dict) else None
    if not isinstance(scores, list):
        raise StartError(f"{where} must be a list of raw scores, is {type(scores).__name__}")
    if len(scores) > MOST_BASELINE_SCORES:
        raise StartError(f"{where} has {len(scores)} values, at most {MOST_BASELINE_SCORES} are taken; 1000 are enough")
    for place, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise StartError(f"{where}[{place}] is {score!r}, must be a finite number")
    if len(scores) < FEWEST_SCORES:
        return f"the model's baseline has {len(scores)} scores, at least {FEWEST_SCORES} are needed"
    return Baseline(np.array(scores, dtype=np.float64))


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One comparison. ``p`` is the smallest of the three p-values by Holm's correction, ``drifted`` p <= alpha."""

    drifted: bool
    alpha: float
    p: float
    psi: float
    psi_p: float
    ks: float
    ks_p: float
    shift_stds: float
    z: float
    z_p: float
    score_count: int
    baseline_count: int


def compare(baseline: Baseline, window_N: Scores, *, alpha: float, seed: int = 0) -> Drift:
    """Compares the window with the baseline. The same scores and ``seed`` give the same figures.

    Raises:
        ValueError: the window has fewer than FEWEST_SCORES scores, or one that is not finite.
    """
    if len(window_N) < FEWEST_SCORES or not np.isfinite(window_N).all():
        raise ValueError(f"a window of {len(window_N)} scores: at least {FEWEST_SCORES} finite ones are compared")
    psi, psi_p = permuted_psi(baseline.scores, window_N, seed=seed)
    ks, ks_p = kolmogorov_smirnov(baseline.scores, window_N)
    z, z_p = mean_shift(baseline.scores, window_N)
    p = min(holm((psi_p, ks_p, z_p)))
    shift = float(window_N.mean()) - baseline.mean
    return Drift(
        drifted=p <= alpha,
        alpha=alpha,
        p=p,
        psi=psi,
        psi_p=psi_p,
        ks=ks,
        ks_p=ks_p,
        shift_stds=shift / baseline.std if baseline.std > 0 else math.copysign(math.inf, shift) if shift else 0.0,
        z=z,
        z_p=z_p,
        score_count=len(window_N),
        baseline_count=len(baseline.scores),
    )


def permuted_psi(
    baseline_M: Scores, window_N: Scores, *, permutations: int = _PERMUTATIONS, seed: int = 0
) -> tuple[float, float]:
    """Population stability index over ten bins of equal share, and its p-value by permutation.

    The bins are deciles of both samples together. A permutation of who is whose then leaves the bins as they are and
    only deals each bin's scores anew, which is one draw of the multivariate hypergeometric distribution; the p-value is
    exact whatever the distribution of scores, ties included (Phipson and Smyth 2010, eq. 2, for the ones added).
    """
    both = np.concatenate([baseline_M, window_N])
    # Ties make some deciles equal: fewer bins then. An edge belongs to the bin on its left.
    edges = np.unique(np.quantile(both, np.arange(1, _BINS) / _BINS, method="inverted_cdf"))
    edges = edges[edges < both.max()]  # Above the largest score there is nothing.
    bins = len(edges) + 1
    counts_K = np.bincount(np.searchsorted(edges, both, side="left"), minlength=bins)
    window_K = np.bincount(np.searchsorted(edges, window_N, side="left"), minlength=bins)
    psi = float(stability_index(counts_K - window_K, window_K))
    random = np.random.default_rng(seed)
    dealt_RK = random.multivariate_hypergeometric(counts_K, len(window_N), size=permutations, method="marginals")
    # Equal counts must compare as equal, whatever the order of summation.
    at_least = int((stability_index(counts_K - dealt_RK, dealt_RK) >= psi - 1e-12).sum())
    return psi, (1 + at_least) / (1 + permutations)


def stability_index(baseline_K: NDArray[np.int64], window_K: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum over bins of (q - p) ln(q / p), of counts in the last dimension; half a score is added to every bin."""
    p, q = ((x + 0.5) / (x + 0.5).sum(axis=-1, keepdims=True) for x in (baseline_K, window_K))
    index: NDArray[np.float64] = ((q - p) * np.log(q / p)).sum(axis=-1)
    return index


def kolmogorov_smirnov(first_M: Scores, second_N: Scores) -> tuple[float, float]:
    """Largest distance between two empirical distribution functions, and the exact p-value of so large a one.

    Of all orders in which M and N scores can fall, those whose distance stays smaller are counted on the lattice of
    (scores of the first, of the second) passed, row after row. With ties the p-value errs on the large side; below
    1e-14 it is rounding.
    Source: psmirnov of R's stats package (ks.c), whose scaling keeps the counts within a float.
    """
    few, many = sorted((np.sort(first_M), np.sort(second_N)), key=len)
    m, n = len(few), len(many)
    points = np.concatenate([few, many])
    places = [np.searchsorted(x, points, side="right") for x in (few, many)]
    # In units of 1 / (m n), so that equal distances are equal numbers.
    distance = int(np.abs(places[0] * n - places[1] * m).max())
    reached = np.arange(n + 1) * m
    inside = np.where(reached < distance, 1.0, 0.0)
    for i in range(1, m + 1):
        low, high = np.searchsorted(reached, [i * n - distance + 1, i * n + distance])
        inside[:low] = inside[high:] = 0.0
        inside[low:high] = np.cumsum(inside[low:high] * (i / (i + n)))
    return distance / (m * n), min(1.0, max(0.0, 1.0 - float(inside[n])))


def mean_shift(first_M: Scores, second_N: Scores) -> tuple[float, float]:
    """Difference of the means, second less first, over its standard error; and the two-sided p-value of the normal."""
    error = math.sqrt(first_M.var(ddof=1) / len(first_M) + second_N.var(ddof=1) / len(second_N))
    difference = float(second_N.mean() - first_M.mean())
    if error == 0.0:  # Both constant: the same constant, or surely not.
        return (0.0, 1.0) if difference == 0.0 else (math.copysign(math.inf, difference), 0.0)
    z = difference / error
    return z, math.erfc(abs(z) / math.sqrt(2.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values by Holm's correction, in their order. Source: Holm 1979, "A simple sequentially rejective..."."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
