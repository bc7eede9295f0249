"""When a run stops by its evaluations, and which model is kept as the best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from torch import nn

from trainer.checkpoint import StopRequest
from trainer.evaluate import EvaluatedSample, Evaluation
from trainer.ppo_config import PPOSettings
from trainer.ppo_evaluation import Evaluations, best_folder, keep_only_best
from trainer.ppo_run import PPORun
from trainer.statistics import bootstrap_upper_bound
from trainer.stop_rule import StopRule


def evaluation(
    scores: Sequence[float], gold: Sequence[float] | None = None, *, kl: float = 1.0, unique: float = 1.0
) -> Evaluation:
    named: list[dict[str, float]] = [{} for _ in scores] if gold is None else [{"gold": value} for value in gold]
    return Evaluation(
        n=len(scores),
        failed=0,
        weights_version=0,
        score_mean=float(np.mean(scores)),
        score_ci95=0.1,
        score_std=1.0,
        kl_sequence_mean=kl,
        kl_ci95=0.1,
        length_mean=5.0,
        finished_share=1.0,
        distinct_2=1.0,
        unique_share=unique,
        tokens_per_s=1.0,
        samples=tuple(
            EvaluatedSample(index=i, prompt="p", response="r", score=score, kl=kl, finished=True, scores=named[i])
            for i, score in enumerate(scores)
        ),
    )


NOISE = np.random.default_rng(0).normal(0, 1, 64)


def of(proxy: float, gold: float) -> Evaluation:
    """Over 64 prompts of different difficulty, which pairing takes out, and with noise of the answers, which stays."""
    noise = np.random.default_rng([round(1000 * proxy), round(1000 * gold)]).normal(0, 0.3, 64)
    return evaluation(proxy + NOISE, gold + 3 * NOISE + noise)


def test_the_upper_bound_of_the_bootstrap_is_that_of_scipy_and_covers_as_often_as_it_says():
    stats = pytest.importorskip("scipy.stats")
    values = 0.3 * NOISE + 0.1
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.95, alternative="less", method="percentile",
        rng=np.random.default_rng(3),
    )  # fmt: skip
    assert bootstrap_upper_bound(values) == pytest.approx(theirs.confidence_interval.high, abs=0.006)
    random = np.random.default_rng(5)
    covered = np.mean([bootstrap_upper_bound(random.normal(0, 1, 40), resamples=400) > 0 for _ in range(400)])
    assert covered == pytest.approx(0.95, abs=0.035)


def test_a_run_stops_when_gold_has_fallen_twice_while_the_proxy_rises():
    rule = StopRule(gold="gold", when_worse=True)
    for step, (proxy, gold) in enumerate([(0.0, 0.0), (1.0, 1.0), (1.5, 0.4)]):
        figures = rule.consider(step, of(proxy, gold))
    assert (rule.best.step, rule.falls, rule.reason) == (1, 1, None)
    assert figures["eval/best_step"] == 1
    assert figures["eval/change_from_best"] == pytest.approx(-0.6, abs=0.15)
    rule.consider(3, of(1.6, 0.5))
    assert rule.reason.startswith("reward gold on held-out prompts is -0.")
    assert "after step 1, the best so far" in rule.reason
    assert "for 2 evaluations in a row" in rule.reason


@pytest.mark.parametrize(
    "later",
    [
        [(0.9, 0.4), (0.8, 0.4)],  # The proxy falls, too: that is no over-optimisation.
        [(1.5, 0.4), (1.5, 0.99), (1.5, 0.4)],  # Not twice in a row.
        [(1.5, 0.99), (1.5, 0.99), (1.5, 0.99)],  # Within the noise.
        [(1.5, 0.4), (1.6, 1.4), (1.5, 1.3)],  # A new best begins the count anew.
    ],
)
def test_a_run_goes_on_unless_gold_has_fallen_twice_while_the_proxy_rises(later):
    rule = StopRule(gold="gold", when_worse=True)
    for step, (proxy, gold) in enumerate([(0.0, 0.0), (1.0, 1.0), *later]):
        rule.consider(step, of(proxy, gold))
    assert rule.reason is None


def test_without_a_gold_score_the_bound_alone_decides():
    rule = StopRule(when_worse=True)
    for step, proxy in enumerate((0.0, 1.0, 0.4, 0.3)):
        rule.consider(step, of(proxy, 0.0))
    assert rule.reason.startswith("the reward on held-out prompts is -0.7")
    kept = StopRule()
    for step, proxy in enumerate((0.0, 1.0, 0.4, 0.3)):
        kept.consider(step, of(proxy, 0.0))
    assert kept.reason is None  # Not asked for: the best is kept all the same.
    assert kept.best.step == 1


def test_a_prompt_that_failed_in_one_evaluation_is_left_out_of_the_comparison():
    rule = StopRule()
    rule.consider(0, evaluation([0.0, 0.0, 10.0]))
    rule.consider(1, evaluation([1.0, 1.0]))  # The easy prompt failed: the mean is lower, the policy is better.
    assert rule.best.step == 1


def test_kl_over_budget_and_too_few_unique_responses_stop_at_once():
    rule = StopRule(above_kl=5.0, below_unique=0.9)
    rule.consider(1, evaluation([0.0, 1.0], kl=4.9, unique=0.9))
    assert rule.reason is None
    rule.consider(2, evaluation([0.0, 1.0], kl=5.1))
    assert rule.reason == "KL to the reference is 5.10 nats a response after step 2, above 5"
    rule = StopRule(above_kl=5.0, below_unique=0.9)
    rule.consider(3, evaluation([0.0, 1.0], unique=0.85))
    assert rule.reason == "85% of the responses differ after step 3, below 90%"


def test_a_restored_rule_goes_on_as_the_unbroken_one():
    rule = StopRule(gold="gold", when_worse=True)
    for step, (proxy, gold) in enumerate([(0.0, 0.0), (1.0, 1.0), (1.5, 0.4)]):
        rule.consider(step, of(proxy, gold))
    again = StopRule(gold="gold", when_worse=True)
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again.best == rule.best
    for each in (rule, again):
        each.consider(3, of(1.6, 0.5))
    assert again.reason == rule.reason
    assert again.reason is not None
    with pytest.raises(ValueError, match="the saved stop rule can't be read"):
        again.load_state_dict({"falls": 1})


def test_only_the_best_model_stays(tmp_path: Path):
    for step in (10, 20, 30):
        best_folder(tmp_path, step).mkdir()
    (tmp_path / "best-of-all.txt").touch()
    keep_only_best(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-000020", "best-of-all.txt"]


def settings(**changes):
    return PPOSettings(**({"model": "m", "prompts": ("p",), "output": "o"} | changes))


def test_what_decides_when_to_stop_decides_the_result():
    assert "eval_every" not in settings(eval_every=5).decisive
    assert settings(eval_every=5, stop_when_worse=True).decisive["eval_every"] == 5
    with pytest.raises(ValueError, match="--eval-every is 0: evaluations between steps decide when to stop"):
        settings(stop_above_kl=3.0)
    with pytest.raises(ValueError, match="--gold is 'judge': --rewards has no such name"):
        settings(gold="judge")
    settings(gold="judge", rewards=("proxy=127.0.0.1:1", "judge=127.0.0.1:2"), reward_weights=(1.0, 0.0))


def test_a_new_best_is_exported_and_saved_before_the_former_one_is_removed(tmp_path: Path, monkeypatch):
    """Killed at any moment, the newest checkpoint names a best model that is there."""
    seen: list[tuple[str, list[str]]] = []

    def note(what: str) -> None:
        seen.append((what, sorted(path.name for path in tmp_path.glob("best-*"))))

    def export(model, tokenizer, folder, *, origin, step) -> None:
        assert (origin, folder.name) == ("origin", f"best-{step:06d}")
        folder.mkdir()
        note("export")

    def save_checkpoint(folder, *, state, **more) -> None:
        note(f"checkpoint of best {state['stop_rule']['best']['step']}")

    monkeypatch.setattr("trainer.ppo_run.save_model", export)
    monkeypatch.setattr("trainer.ppo_run.save_checkpoint", save_checkpoint)

    def watch(step: int, found: Evaluation, path: Path | None = None) -> tuple[Evaluation, dict[str, float]]:
        if path is not None:
            found.write(path)
        return found, {}

    scores = iter([0.0, 1.0, 0.5, 2.0])
    run = object.__new__(PPORun)
    run.__dict__ |= {
        "settings": settings(output=str(tmp_path), eval_every=1, save_every=0, steps=9),
        "stop_rule": StopRule(), "step": 0, "episodes": 0, "policy": nn.Module(), "tokenizer": None,
        "_saved_step": 0, "_checkpoint": None, "_started_s": 0.0, "_judges": {}, "_data": "",
        "_ahead": SimpleNamespace(waiting=[]), "_origin": "origin",
    }  # fmt: skip
    monitor: Any = SimpleNamespace(watch=watch)
    evaluations = Evaluations(run.settings, None, monitor, run.stop_rule, ask=Mock(), keep=run._keep_model)
    evaluations.evaluate = lambda: evaluation(next(scores) + NOISE)  # type: ignore[method-assign]
    trained = SimpleNamespace(modules={}, optimisers={}, states={})
    evaluations.before(0)
    for step in (1, 2, 3):
        run.step = step
        evaluations.between(step)
        run.save_when_due(trained)  # type: ignore[arg-type]
    assert seen == [
        ("export", ["best-000001"]),
        ("checkpoint of best 1", ["best-000001"]),
        ("export", ["best-000001", "best-000003"]),
        ("checkpoint of best 3", ["best-000001", "best-000003"]),
    ]
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-000003"]


def test_the_loop_ends_when_the_rule_says_so(tmp_path: Path):
    from tests.unit.trainer.test_ppo import ScriptedRun
    from trainer.ppo import train

    run = ScriptedRun(tmp_path)
    ended: list[int] = []

    def between(step: int) -> dict[str, float]:
        if step == 2:
            run.stop_rule.reason = "it got worse"
        return {}

    run.evaluations.between = between
    run.evaluations.after = lambda step: ended.append(step) or {}  # type: ignore[func-returns-value]
    train(run, StopRequest())  # type: ignore[arg-type]
    assert ended == [2]
    assert run.saved == [2]
