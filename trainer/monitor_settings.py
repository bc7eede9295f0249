"""What is watched of a policy on held-out prompts, and the bounds beyond which there is an alarm. No torch here."""

from __future__ import annotations

from pydantic import Field

from quartet.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Settings, UnitFloat
from trainer.report_settings import KL_BUDGET
from trainer.service_credentials import Address


class AlarmSettings(Settings):
    """Bounds of held-out figures; "before" is the evaluation before training."""

    alarm_kl: PositiveFloat = Field(KL_BUDGET, description="KL to the reference above which there is an alarm, nats")
    alarm_unique: UnitFloat = Field(0.9, description="share of different responses below which there is an alarm")
    alarm_distinct: UnitFloat = Field(
        0.7, description="the same of distinct 1-, 2- and 3-grams, as a share of those before"
    )
    alarm_length_correlation: NonNegativeFloat = Field(
        0.3, description="the same of a rise of the correlation of reward and length that is no chance"
    )
    alarm_entropy: UnitFloat = Field(0.2, description="the same of entropy, as a share of that before")
    alarm_perplexity: PositiveFloat = Field(
        1.5, description="the same of the perplexity of --monitor-demonstrations, as a multiple of that before"
    )
    alarm_score_shift: PositiveFloat = Field(
        4.0, description="the same of the mean score's distance from that before, in standard deviations of scores then"
    )
    alarm_spread: PositiveFloat = Field(
        2.0, description="the same of the spread of an ensemble's scores, as a multiple of that before"
    )


class JudgeSettings(Settings):
    """A second opinion on held-out responses."""

    judge: Address | None = Field(
        None,
        description="reward service that nothing is trained on and that scores held-out responses, too: host:port, or "
        "ip:port,ip:port,...",
    )


class MonitorSettings(JudgeSettings, AlarmSettings):
    """What is watched of the policy that is trained."""

    monitor_demonstrations: tuple[str, ...] = Field(
        (), description="held-out demonstrations, files or hub names, whose perplexity is watched"
    )
    max_monitor_demonstrations: PositiveInt = Field(128, description="the first so many of them are used")
    exact_kl: bool = Field(
        True,
        description="measure KL over the whole vocabulary where the reference is --model: it is loaded once more, for "
        "the time of each evaluation, and split among processes as the policy is",
    )
