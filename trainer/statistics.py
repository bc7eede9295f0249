"""Means and shares with their 95 % intervals.

Shapes: N observations, G groups of them, R bootstrap resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trainer.wording import fixed

Floats = Sequence[float] | npt.NDArray[np.float64]

_NORMAL_975 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate, the bounds of its 95 % interval, and the number of observations behind it."""

    value: float
    low: float
    high: float
    count: int

    def as_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}

    def __str__(self) -> str:
        value, low, high = (fixed(x, 3) for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def mean_interval(values_N: Floats) -> Interval:
    """The mean with Student's interval. The observations must be independent; else see ``mean_interval_of_groups``.

    Raises:
        ValueError: fewer than 2 values, or one that is not finite.
    """
    x_N = _finite(values_N, at_least=2)
    half = student_quantile(len(x_N) - 1) * float(x_N.std(ddof=1)) / math.sqrt(len(x_N))
    mean = float(x_N.mean())
    return Interval(value=mean, low=mean - half, high=mean + half, count=len(x_N))


def mean_interval_of_groups(values_N: Floats, groups_N: Sequence[Hashable]) -> Interval:
    """The mean of the groups' means with Student's interval: answers to one prompt, the group, are not independent.

    Of one group alone, the interval is over its values: what is known then is that group's own mean.

    Raises:
        ValueError: fewer than 2 values, one that is not finite, or not one group a value.
    """
    x_N = _finite(values_N, at_least=2)
    sums: dict[Hashable, tuple[float, int]] = {}
    for value, group in zip(x_N.tolist(), groups_N, strict=True):
        total, count = sums.get(group, (0.0, 0))
        sums[group] = (total + value, count + 1)
    return mean_interval(x_N if len(sums) == 1 else [total / count for total, count in sums.values()])


def wilson_interval(successes: float, count: int) -> Interval:
    """A share with Wilson's score interval, which holds near 0 and 1 and for small counts. Ties may count .5.

    Raises:
        ValueError: ``count`` is below 1 or ``successes`` outside [0, count].

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"successes is {successes} of count {count}: they must be within 0 and a count of at least 1")
    return replace(_wilson(successes / count, count), count=count)


def _wilson(share: float, count: float) -> Interval:
    """Wilson's interval of a share of so many observations, whole or not; the interval's count is rounded."""
    z2 = _NORMAL_975**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL_975 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half), count=round(count))


def wilson_interval_of_groups(values_N: Floats, groups_N: Sequence[Hashable]) -> Interval:
    """A share whose observations (0, 1, or .5 of a tie) come in groups, such as the pairs of one prompt.

    Wilson's interval at the effective number of observations: theirs over the design effect, which is the variance of
    the share between groups over that of independent observations. With one observation a group it is Wilson's own;
    where all observations are alike, nothing is known of the effect, and each group counts as one.

    Raises:
        ValueError: fewer than 2 values, one outside [0, 1], or not one group a value.

    Source: Kish 1965, "Survey Sampling", section 8.2; Dean & Pagano 2015, "Evaluating Confidence Interval Methods for
    Binomial Proportions in Clustered Surveys".
    """
    x_N = _finite(values_N, at_least=2)
    if x_N.min() < 0 or x_N.max() > 1:
        raise ValueError(f"values lie between {x_N.min():g} and {x_N.max():g}: shares are of values from 0 to 1")
    places_N, groups = _places(groups_N, len(x_N))
    count, share = len(x_N), float(x_N.mean())
    errors_G = np.bincount(places_N, weights=x_N - share, minlength=groups)
    independent = count / (count - 1) * float(((x_N - share) ** 2).sum())
    between = groups / (groups - 1) * float((errors_G**2).sum()) if groups > 1 else 0.0
    effective = float(groups) if independent == 0 or between == 0 else count * min(1.0, independent / between)
    return replace(_wilson(share, effective), count=count)


def share_of_groups(values_N: Floats, groups_N: Sequence[Hashable]) -> Interval:
    """``wilson_interval_of_groups``, also of a single value: of one there are no groups to tell apart.

    Raises:
        ValueError: as it, and without any value.
    """
    if len(values_N) == 1:
        return wilson_interval(float(values_N[0]), 1)
    return wilson_interval_of_groups(values_N, groups_N)


def bootstrap_of_groups(
    statistic: Callable[[npt.NDArray[np.float64]], float],
    groups_N: Sequence[Hashable],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A statistic with its percentile bootstrap interval; whole groups are drawn, each with all of its observations.

    Args:
        statistic: of the N observations by how often each counts, (N,); its value is the one where each counts once.
        groups_N: group of each observation.
        resamples: at least 100.
        seed: of what is drawn.

    Raises:
        ValueError: no observation, or fewer than 100 resamples.

    Source: Davison & Hinkley 1997, "Bootstrap Methods and their Application", section 3.8.
    """
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}: percentiles need at least 100")
    places_N, groups = _places(groups_N, len(groups_N))
    random = np.random.default_rng(seed)
    drawn_RG = random.multinomial(groups, np.full(groups, 1.0 / groups), size=resamples)
    values_R = [statistic(drawn_G[places_N].astype(np.float64)) for drawn_G in drawn_RG]
    low, high = np.quantile(values_R, [0.025, 0.975])
    value = statistic(np.ones(len(places_N)))
    return Interval(value=value, low=float(low), high=float(high), count=len(places_N))


def bootstrap_interval(values_N: Floats, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean with its percentile bootstrap interval: no assumption about the distribution of the values.

    For two models on the same items give the differences item by item: the pairing then narrows the interval.

    Raises:
        ValueError: fewer than 2 values, one that is not finite, or fewer than 100 resamples.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    x_N = _finite(values_N, at_least=2)
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}: percentiles need at least 100")
    random = np.random.default_rng(seed)
    means_R = np.array([x_N[random.integers(0, len(x_N), len(x_N))].mean() for _ in range(resamples)])
    low, high = np.quantile(means_R, [0.025, 0.975])
    return Interval(value=float(x_N.mean()), low=float(low), high=float(high), count=len(x_N))


def bootstrap_upper_bound(
    values_N: Floats, *, probability: float = 0.95, resamples: int = 2000, seed: int = 0
) -> float:
    """One-sided upper confidence bound of the mean: the percentile of its bootstrap. For pairs give the differences.

    Raises:
        ValueError: as ``bootstrap_interval``.
    """
    x_N = _finite(values_N, at_least=2)
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}: percentiles need at least 100")
    random = np.random.default_rng(seed)
    means_R = np.array([x_N[random.integers(0, len(x_N), len(x_N))].mean() for _ in range(resamples)])
    return float(np.quantile(means_R, probability))


@functools.cache
def student_quantile(degrees: int, probability: float = 0.975) -> float:
    """Quantile of Student's t, to 1e-7, by bisection on its integrated density.

    Raises:
        ValueError: fewer than 1 degree of freedom, or a probability outside (.5, 1).
    """
    if degrees < 1 or not 0.5 < probability < 1:
        raise ValueError(f"degrees is {degrees} and probability {probability}: they must be at least 1 and in (.5, 1)")
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    # t = sqrt(n) tan(a) makes the integrand scale * sqrt(n) * cos(a)^(n - 1): bounded, on a bounded range.
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def mass_below(angle: float) -> float:
        a = 0.5 * angle * (nodes + 1)
        area = 0.5 * angle * float((weights * np.cos(a) ** (degrees - 1)).sum())
        return 0.5 + math.exp(log_scale) * math.sqrt(degrees) * area

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mass_below(middle) < probability else (low, middle)
    return math.sqrt(degrees) * math.tan(0.5 * (low + high))


def _places(groups_N: Sequence[Hashable], count: int) -> tuple[npt.NDArray[np.int64], int]:
    """Number of each observation's group, and how many there are."""
    if len(groups_N) != count or count == 0:
        raise ValueError(f"there are {len(groups_N)} groups for {count} values: each value has one")
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(group, len(numbers)) for group in groups_N]
    return np.array(places, dtype=np.int64), len(numbers)


def _finite(values: Floats, *, at_least: int) -> npt.NDArray[np.float64]:
    x_N = np.asarray(values, dtype=np.float64)
    if x_N.ndim != 1 or len(x_N) < at_least:
        raise ValueError(f"values have shape {x_N.shape}: an interval needs a list of at least {at_least}")
    if not np.isfinite(x_N).all():
        raise ValueError(f"value {int((~np.isfinite(x_N)).argmax())} is {x_N[~np.isfinite(x_N)][0]}: it must be finite")
    return x_N
