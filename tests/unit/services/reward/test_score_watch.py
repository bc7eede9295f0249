"""The window of latest scores, its metrics, and when it is compared with the baseline."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
import structlog

from services.reward.drift import Baseline, compare
from services.reward.score_watch import _STEPS, ScoreWatch
from services.runtime.telemetry import ServiceMetrics

RNG = np.random.default_rng


def baseline_of(mean: float = 0.0, std: float = 1.0, size: int = 1000) -> Baseline:
    return Baseline(RNG(0).normal(mean, std, size))


class Watched:
    """A watch and what Prometheus sees of it."""

    def __init__(self, **settings: float) -> None:
        self.metrics = ServiceMetrics("reward")
        self.watch = ScoreWatch(self.metrics, **settings)  # type: ignore[arg-type]

    def observe(self, scores: object, version: int = 0, truncated: int = 0, invalid: int = 0) -> None:
        values = np.asarray(scores, dtype=float).tolist()
        flags = [index < truncated for index in range(len(values))]
        self.watch.observe(version, values, truncated=flags, invalid=invalid)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"quartet_reward_{name}", labels)

    async def compared(self) -> None:
        """Until the comparison that is under way is done."""
        assert self.watch._comparing is not None
        await self.watch._comparing

    def buckets(self) -> dict[float, float]:
        return {
            float(sample.labels["le"]): sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "quartet_reward_score_bucket"
        }


def test_figures_are_those_of_the_latest_scores_alone():
    watched = Watched(window=50, every=1000)
    scores = RNG(1).normal(3.0, 2.0, 80)
    watched.observe(scores[:60], truncated=60)
    watched.observe(scores[60:], truncated=5, invalid=10)
    latest = scores[-50:]
    assert watched.value("window_scores") == 50
    assert watched.value("window_score_mean") == pytest.approx(latest.mean())
    assert watched.value("window_score_std") == pytest.approx(latest.std(ddof=1))
    # Of the 50 scored, 30 of the first call and 5 of the second were cut; of the last 50 items 10 were invalid.
    assert watched.value("window_truncated_share") == 35 / 50
    assert watched.value("window_invalid_share") == 10 / 50
    assert watched.value("truncated_items_total") == 65


def test_what_is_not_known_has_no_sample():
    watched = Watched()
    assert watched.value("window_scores") == 0
    unknown = ("window_score_mean", "window_score_std", "window_truncated_share", "window_invalid_share", "drifted")
    assert [watched.value(name) for name in (*unknown, "drift_p", "drift_psi")] == [None] * 7
    watched.observe([1.0])
    assert (watched.value("window_score_mean"), watched.value("window_score_std")) == (1.0, None)


def test_the_histogram_counts_in_deviations_of_the_baseline_else_of_the_normalisation_else_in_powers_of_two():
    watched = Watched(every=10_000)
    baseline = baseline_of(5.0, 0.5)
    watched.watch.begin(0, baseline, (100.0, 7.0))
    scores = RNG(2).normal(5.0, 0.5, 500)
    watched.observe(scores)
    buckets = watched.buckets()
    bounds = list(buckets)
    assert bounds[7] == pytest.approx(baseline.mean, abs=baseline.std / 100)
    assert bounds[0] == pytest.approx(baseline.mean - 4 * baseline.std, abs=baseline.std / 100)
    assert bounds[-1] == math.inf
    assert list(buckets.values()) == [(scores <= bound).sum() for bound in bounds]
    # However far from zero and however close together, each has a name of its own.
    for mean, std in ((1e6, 1e-3), (-3e-5, 4e-9), (0.0, 1e5)):
        watched.watch.begin(0, "none kept", (mean, std))
        found = [x for x in watched.buckets() if x != math.inf]
        assert found == pytest.approx([mean + step * std for step in _STEPS], abs=std / 100)
        assert len(set(found)) == len(_STEPS)
    watched.watch.begin(1, "none kept", (100.0, 7.0))
    assert list(watched.buckets())[:3] == [72.0, 79.0, 82.5]
    assert set(watched.buckets().values()) == {0}
    watched.watch.begin(2, "none kept")
    watched.observe([-1.0, 0.1, 1e9, -1e9], version=2)
    buckets = watched.buckets()
    finite = sorted(bound for bound in buckets if bound != math.inf)
    assert finite == [-bound if bound else 0.0 for bound in reversed(finite)]
    assert [buckets[bound] for bound in (-64.0, -2.0, -1.0, 0.0, 0.125, 64.0, math.inf)] == [1, 1, 2, 2, 3, 3, 4]


async def test_scores_like_the_baseline_are_compared_and_found_alike():
    watched = Watched(window=300, every=100)
    baseline = baseline_of()
    watched.watch.begin(0, baseline)
    scores = RNG(3).normal(size=100)
    watched.observe(scores[:99])
    assert watched.watch._comparing is None
    assert watched.watch.state().not_compared == (
        "99 scores since this model serves, the first comparison comes with 100"
    )
    with structlog.testing.capture_logs() as logs:
        watched.observe(scores[99:])
        await watched.compared()
    state = watched.watch.state()
    assert state.drift == compare(baseline, scores, alpha=0.01)
    assert not state.drift.drifted
    assert state.not_compared == ""
    assert logs == []
    assert watched.value("drifted") == 0.0
    for gauge, value in (
        ("drift_p", state.drift.p),
        ("drift_psi", state.drift.psi),
        ("drift_psi_p", state.drift.psi_p),
        ("drift_ks_p", state.drift.ks_p),
        ("drift_mean_p", state.drift.z_p),
        ("drift_mean_shift_stds", state.drift.shift_stds),
    ):
        assert watched.value(gauge) == value


async def test_a_drift_is_logged_once_with_what_it_means_and_so_is_its_end():
    watched = Watched(window=200, every=100)
    watched.watch.begin(0, baseline_of())
    random = RNG(4)
    with structlog.testing.capture_logs() as logs:
        for mean in (1.0, 1.0, 1.0, 0.0, 0.0, 0.0):
            watched.observe(random.normal(mean, 1.0, 100))
            await watched.compared()
    assert [log["event"] for log in logs] == ["scores_drifted", "scores_back_at_baseline"]
    assert logs[0]["log_level"] == "warning"
    assert logs[0]["p"] <= 0.01
    assert logs[0]["shift_stds"] == pytest.approx(1.0, abs=0.3)
    assert "not a failure of the reward model" in logs[0]["advice"]
    assert "have people compare fresh answers" in logs[0]["advice"]
    assert watched.value("drifted") == 0.0


async def test_few_scores_wait_and_no_baseline_is_never_compared():
    watched = Watched(window=200, every=10)
    watched.watch.begin(0, baseline_of())
    watched.observe([0.5] * 49)
    assert watched.watch._comparing is None
    watched.observe([0.5])
    await watched.compared()
    assert watched.watch.state().drift.score_count == 50
    watched.watch.begin(1, "the model's baseline has 3 scores, at least 50 are needed")
    watched.observe([0.5] * 500, version=1)
    assert watched.watch.state().drift is None
    assert "has 3 scores" in watched.watch.state().not_compared
    assert watched.value("drifted") is None


async def test_a_new_model_starts_anew_and_late_answers_of_the_old_one_are_left_out():
    watched = Watched(window=200, every=100)
    watched.watch.begin(0, baseline_of())
    watched.observe(RNG(5).normal(3.0, 1.0, 100))
    watched.watch.begin(1, baseline_of(10.0))
    await watched.compared()  # Of the old model: nobody wants it now.
    assert watched.watch.state().drift is None
    watched.observe([3.0] * 100, version=0, truncated=100)
    assert watched.watch.state().score_count == 0
    assert watched.value("truncated_items_total") == 100
    watched.observe(RNG(6).normal(10.0, 1.0, 100), version=1)
    await watched.compared()
    state = watched.watch.state()
    assert (state.weights_version, state.score_count, state.drift.drifted) == (1, 100, False)


async def test_one_comparison_at_a_time_and_the_loop_goes_on_meanwhile(monkeypatch):
    import threading

    gate, calls = threading.Event(), []

    def slow(baseline, window_N, *, alpha):
        calls.append(len(window_N))
        gate.wait(10)
        return compare(baseline, window_N, alpha=alpha)

    monkeypatch.setattr("services.reward.score_watch.compare", slow)
    watched = Watched(window=200, every=50)
    watched.watch.begin(0, baseline_of())
    for _ in range(4):
        watched.observe(RNG(7).normal(size=50))
        await asyncio.sleep(0.01)
    assert calls == [50]
    gate.set()
    await watched.compared()
    watched.observe([0.0])
    await watched.compared()
    assert calls == [50, 200]
