"""The alarms of a run: figures that crossed a bound beyond which a run is broken, or about to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from trainer.monitor_alarms import Alarm, Figures, worst_alarms
from trainer.monitor_settings import AlarmSettings
from trainer.report.data import SETTINGS_FILE, ReportError, Run
from trainer.report.findings import Header
from trainer.wording import brief, number, percent

# What a step's time may spend in RPC before the services cost more than they bring.
_RPC_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """``key`` should stay within ``low`` and ``high``."""

    key: str
    what: str
    low: float = -math.inf
    high: float = math.inf
    advice: str

    def excess(self, value: float) -> float:
        """By how much ``value`` is out of bounds; 0: it is not."""
        return max(self.low - value, value - self.high, 0.0)

    def bound(self, value: float) -> float:
        return self.low if value < self.low else self.high


def bounds_of(run: Run, kl_budget: float | None = None) -> AlarmSettings:
    """The bounds that the run was watched with, as far as its settings tell; ``kl_budget`` stands for its own."""
    kept = {name: value for name in AlarmSettings.model_fields if (value := run.settings.get(name)) is not None}
    try:
        return AlarmSettings(**(kept if kl_budget is None else kept | {"alarm_kl": kl_budget}))
    except ValidationError as error:
        field = error.errors()[0]["loc"][0]
        raise ReportError(
            f"{SETTINGS_FILE}: {field} is {kept.get(str(field))!r}: {error.errors()[0]['msg']}"
        ) from error


def find_alarms(run: Run, header: Header, bounds: AlarmSettings) -> tuple[Alarm, ...]:
    """Every figure that crossed its bound: in training, with the step at which it did so worst, then held out."""
    rules = _training_rules(run, header, bounds)
    in_training = [alarm for rule in rules if (alarm := _check_steps(run, rule)) is not None]
    return (*in_training, *_check_evaluations(run), *_check_monitors(run, bounds), *_check_rpc(header))


def _training_rules(run: Run, header: Header, bounds: AlarmSettings) -> list[_Rule]:
    # Bounds of importance weights, effective sample size and KL: the ones within which off-policy PPO is healthy.
    drift = "the engine's policy is not the trainer's: check weights versions and numerics"
    rules = [
        _Rule(
            key="samples/failed",
            what="Failed samples",
            high=0,
            advice="they were dropped, not scored: see the services' logs",
        ),
        _Rule(key="rollout/importance_weight_mean", what="The mean importance weight", low=0.5, high=2.0, advice=drift),
        _Rule(key="rollout/ess", what="The effective sample size", low=0.3, advice=drift),
        _Rule(key="rollout/kl_old", what="The KL of engine and trainer", low=-0.1, high=0.1, advice=drift),
        _Rule(
            key="policy/first_ratio_max_abs_log",
            what="The largest log ratio of a step's first pass",
            high=0.01,
            advice="it should be 0: dropout, masks or positions differ between two passes over the same weights",
        ),
        _Rule(
            key="kl/sequence_mean",
            what="The KL to the reference",
            high=header.kl_budget,
            advice="the reward model may be over-optimised: read the samples, raise beta",
        ),
        _Rule(
            key="pairs/tied_share",
            what="The share of tied prompts",
            high=0.9,
            advice="all their answers have one score, so they teach nothing: raise --samples-per-prompt",
        ),
        _Rule(
            key="reward/final_mean",
            what="The mean score as PPO uses it",
            low=-10.0,
            high=10.0,
            advice="it should start near 0: check what the reward model was calibrated on, or clip the scores",
        ),
        _Rule(
            key="response/finished_share",
            what="The share of finished responses",
            low=0.5,
            advice="raise the length limit or the penalty of unfinished ones",
        ),
    ]
    start = run.first("policy/entropy_mean")
    if start is not None and start > 0:
        rules.append(
            _Rule(
                key="policy/entropy_mean",
                what="The entropy",
                low=bounds.alarm_entropy * start,
                advice=f"below {percent(bounds.alarm_entropy)} of its start the policy has nearly stopped exploring",
            )
        )
    return rules


def _check_steps(run: Run, rule: _Rule) -> Alarm | None:
    steps, values = run.series(rule.key)
    excesses = [rule.excess(value) for value in values]
    crossed = sum(excess > 0 for excess in excesses)
    if not crossed:
        return None
    worst = max(range(len(values)), key=excesses.__getitem__)
    step, value, bound = steps[worst], values[worst], rule.bound(values[worst])
    often = f"in {crossed:,d} of {len(steps):,d} steps" if len(steps) > 1 else "in the only step"
    return Alarm(
        key=rule.key,
        step=step,
        value=value,
        bound=bound,
        text=f"{rule.what}: {number(value)} at step {step:,d}, {_side(value, bound)} {often}; {rule.advice}.",
    )


def _check_evaluations(run: Run) -> list[Alarm]:
    alarms: list[Alarm] = []
    for name, evaluation in (("before", run.before), ("after", run.after)):
        if evaluation is None:
            continue
        rules = [
            _Rule(key="failed", what="Failed samples", high=0, advice="the figures are of the others alone"),
            _Rule(
                key="finished_share",
                what="The share of finished responses",
                low=0.5,
                advice="the score of a cut answer says little",
            ),
        ]
        for rule in rules:
            value = getattr(evaluation, rule.key)
            if value is not None and rule.excess(value) > 0:
                bound = rule.bound(value)
                when = f"in the held-out evaluation {name} training"
                text = f"{rule.what}: {number(value)} {when}, {_side(value, bound)}; {rule.advice}."
                alarms.append(
                    Alarm(key=f"evaluation_{name}/{rule.key}", step=None, value=value, bound=bound, text=text)
                )
    return alarms


def _check_monitors(run: Run, bounds: AlarmSettings) -> list[Alarm]:
    """What all evaluations say of the policy, beside the one before training."""
    series: list[tuple[int, Figures]] = [(0, run.before.figures if run.before else {})]
    between_steps = (
        (int(record["step"]), {key.removeprefix("eval/"): record[key] for key in record if key.startswith("eval/")})
        for record in run.records
    )
    series += [(step, figures) for step, figures in between_steps if figures]
    between = len(series)
    if run.after is not None:
        series.append((int(run.records[-1]["step"]) if run.records else 0, run.after.figures))
    return [
        Alarm(
            key=f"eval/{found.key}" if place < between else f"evaluation_after/{found.key}",
            step=series[place][0] if place < between else None,
            value=found.value,
            bound=found.bound,
            text=text,
        )
        for place, found, text in worst_alarms(series, bounds)
    ]


def _check_rpc(header: Header) -> Sequence[Alarm]:
    """On the whole run's share: a single step's, the first above all, says little."""
    if header.rpc_share is None or header.rpc_share <= _RPC_SHARE:
        return ()
    text = f"RPC took {percent(header.rpc_share)} of the steps' time, above {100 * _RPC_SHARE:g} %: see where it went."
    return (Alarm(key="time/rpc_s", step=None, value=header.rpc_share, bound=_RPC_SHARE, text=text),)


def _side(value: float, bound: float) -> str:
    return f"{'above' if value > bound else 'below'} {brief(bound)}"
