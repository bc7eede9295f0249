"""What the model's scores look like: their distribution, the latest of them, and how far they are from the baseline."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from services.reward.drift import FEWEST_SCORES, Baseline, Drift, compare
from services.runtime.telemetry import ServiceMetrics

log = structlog.get_logger()

# Upper bounds of the histogram: in standard deviations around the mean where these are known, else as they are.
_STEPS = (-4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3, 4)
_POWERS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
_RAW_BOUNDS = (*(-x for x in reversed(_POWERS)), 0.0, *_POWERS)
_ADVICE = (
    "the scores no longer look like those kept with the model. That is not a failure of the reward model, for training "
    "moves scores by design: it is a reason to have people compare fresh answers, and to see how often the model agrees"
)


@dataclass(frozen=True, kw_only=True)
class WatchState:
    """The latest items of one model, and the last comparison with its baseline.

    Means, deviations and shares are None where there is nothing to take them of. ``not_compared`` says why ``drift`` is
    None.
    """

    weights_version: int
    score_count: int = 0
    mean: float | None = None
    std: float | None = None
    truncated_share: float | None = None
    invalid_share: float | None = None
    drift: Drift | None = None
    compared_unix_ns: int = 0
    not_compared: str = ""


class ScoreWatch:
    """Counts scores, keeps the latest ``window``, and compares these with the baseline after ``every`` new ones.

    Used from the event loop; Prometheus reads it from a thread of its own. All of it is of one model: ``begin`` starts
    anew, and what another version scored is left out.
    """

    def __init__(
        self,
        metrics: ServiceMetrics,
        *,
        window: int = 1000,
        every: int = 100,
        alpha: float = 0.01,
        prefix: str = "quartet_reward",
    ) -> None:
        self.every = every
        self.alpha = alpha
        self.prefix = prefix
        self._lock = threading.Lock()
        self._truncated_total = 0
        self._comparing: asyncio.Task[None] | None = None
        # (score, truncated) of items with a score; and of all items, whether they were invalid.
        self._scored: deque[tuple[float, bool]] = deque(maxlen=window)
        self._invalid: deque[bool] = deque(maxlen=window)
        self.begin(0, "no model serves yet")
        metrics.registry.register(self)  # type: ignore[arg-type]  # A collector by its method ``collect``.

    def begin(self, weights_version: int, baseline: Baseline | str, spread: tuple[float, float] | None = None) -> None:
        """Another model serves from now on.

        Args:
            baseline: the scores kept with it, or why it is not compared with any.
            spread: mean and standard deviation (> 0) that its scores are known to have; else those of the baseline.
        """
        if isinstance(baseline, Baseline) and baseline.std > 0:
            spread = (baseline.mean, baseline.std)
        with self._lock:
            self._version = weights_version
            self._baseline = baseline
            self._bounds = _RAW_BOUNDS if spread is None else _bounds(*spread)
            self._counts = [0] * (len(self._bounds) + 1)
            self._scored.clear()
            self._invalid.clear()
            self._new = 0
            self._drift: Drift | None = None
            self._compared_unix_ns = 0

    def observe(
        self, weights_version: int, scores: Sequence[float], *, truncated: Sequence[bool], invalid: int = 0
    ) -> None:
        """Takes in what a call was answered: raw scores, whether each item was truncated, how many were invalid."""
        with self._lock:
            self._truncated_total += sum(truncated)
            if weights_version != self._version:
                return  # A late answer of a model that has been replaced.
            for score in scores:
                self._counts[bisect_left(self._bounds, score)] += 1
            self._scored.extend(zip(scores, truncated, strict=True))
            self._invalid.extend([False] * len(scores) + [True] * invalid)
            self._new += len(scores)
            due = self._new >= self.every and len(self._scored) >= FEWEST_SCORES
        if due and isinstance(self._baseline, Baseline) and (self._comparing is None or self._comparing.done()):
            self._new = 0
            window_N = np.array([score for score, _ in self._scored])
            self._comparing = asyncio.create_task(self._compare(weights_version, self._baseline, window_N))
            self._comparing.add_done_callback(_report_failure)

    async def _compare(self, weights_version: int, baseline: Baseline, window_N: np.ndarray) -> None:  # type: ignore[type-arg]
        drift = await asyncio.to_thread(compare, baseline, window_N, alpha=self.alpha)
        if weights_version != self._version:
            return
        before, self._drift, self._compared_unix_ns = self._drift, drift, time.time_ns()
        figures = {
            "p": drift.p,
            "alpha": drift.alpha,
            "psi": round(drift.psi, 4),
            "ks": round(drift.ks, 4),
            "shift_stds": round(drift.shift_stds, 3),
            "scores": drift.score_count,
            "weights_version": weights_version,
        }
        if drift.drifted and (before is None or not before.drifted):
            log.warning("scores_drifted", **figures, advice=_ADVICE)
        elif not drift.drifted and before is not None and before.drifted:
            log.info("scores_back_at_baseline", **figures)

    def state(self) -> WatchState:
        """As it is now."""
        with self._lock:
            scored, invalid = list(self._scored), list(self._invalid)
            state = WatchState(
                weights_version=self._version,
                score_count=len(scored),
                drift=self._drift,
                compared_unix_ns=self._compared_unix_ns,
                not_compared="" if self._drift is not None else self._why_not_compared(),
            )
        scores_N = np.array([score for score, _ in scored])
        return replace(
            state,
            mean=float(scores_N.mean()) if len(scored) else None,
            std=float(scores_N.std(ddof=1)) if len(scored) > 1 else None,
            truncated_share=sum(cut for _, cut in scored) / len(scored) if scored else None,
            invalid_share=sum(invalid) / len(invalid) if invalid else None,
        )

    def _why_not_compared(self) -> str:
        if isinstance(self._baseline, str):
            return self._baseline
        needed = max(FEWEST_SCORES, self.every)
        return f"{self._new} scores since this model serves, the first comparison comes with {needed}"

    def collect(self) -> Iterable[Metric]:
        """For Prometheus. What is not known has no sample, and never a number that stands for it."""
        state = self.state()
        with self._lock:
            bounds, counts, truncated = self._bounds, list(self._counts), self._truncated_total
        name = self.prefix
        named = [*(f"{bound:.15g}" for bound in bounds), "+Inf"]
        yield HistogramMetricFamily(
            f"{name}_score",
            "Raw scores of the model that serves; bounds are standard deviations around the mean where these are kept",
            buckets=list(zip(named, accumulate(counts), strict=True)),
        )
        yield CounterMetricFamily(f"{name}_truncated_items", "Items that were truncated to be scored", value=truncated)
        known: list[tuple[str, str, float | None]] = [
            ("window_scores", "Scores in the window", state.score_count),
            ("window_score_mean", "Mean of the raw scores in the window", state.mean),
            ("window_score_std", "Standard deviation of the raw scores in the window", state.std),
            ("window_truncated_share", "Share of the window's scored items that were truncated", state.truncated_share),
            ("window_invalid_share", "Share of the latest items that were invalid", state.invalid_share),
        ]
        if (drift := state.drift) is not None:
            known += [
                ("drifted", "1 where the window's scores differ from the baseline's", float(drift.drifted)),
                ("drift_p", "Smallest p-value of the three tests by Holm's correction", drift.p),
                ("drift_psi", "Population stability index of window and baseline", drift.psi),
                ("drift_psi_p", "Its p-value by permutation", drift.psi_p),
                ("drift_ks_p", "Exact p-value of the Kolmogorov-Smirnov test", drift.ks_p),
                ("drift_mean_p", "p-value of the z test of the mean", drift.z_p),
                ("drift_mean_shift_stds", "Shift of the mean in deviations of the baseline", drift.shift_stds),
            ]
        for suffix, meaning, value in known:
            family = GaugeMetricFamily(f"{name}_{suffix}", meaning)
            if value is not None:
                family.add_metric([], value)
            yield family


def _bounds(mean: float, std: float) -> tuple[float, ...]:
    """Of the histogram, to a hundredth of ``std``: they are names that people read."""
    digits = 2 - math.floor(math.log10(std))
    return tuple(round(mean + step * std, digits) for step in _STEPS)


def _report_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("comparison_failed", exc_info=error)
