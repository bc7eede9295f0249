"""Several reward services as one: whom to ask, by name, and how their scores become one score."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from quartet.client import ModelInfo, RewardClient
from quartet.client.reward import Normalisation
from trainer.errors import ServicesError
from trainer.ppo_config import ServiceAddresses


@dataclass(frozen=True, kw_only=True)
class HostedReward:
    """What one reward service hosts, as it said when it was first asked."""

    name: str
    """As the settings call it; empty where it is the only one."""
    model: ModelInfo
    takes_tokens: bool
    """Whether it reads the policy's token ids; else text goes over the wire."""
    normalisation: Normalisation | None
    """Kept with the model."""
    weight: float
    normalised_by: Normalisation | None
    """What its scores are normalised by before they are summed up; None: nothing."""

    @property
    def title(self) -> str:
        return service_title(self.name)

    def as_judge(self) -> dict[str, object]:
        """What decides the rewards besides the settings, as JSON values: it must be the same when a run goes on."""
        normalised_by = None if self.normalised_by is None else asdict(self.normalised_by)
        after = f" {self.name}" if self.name else ""
        return {f"reward{after}": self.model.served_by.result_fingerprint, f"normalisation{after}": normalised_by}


def service_title(name: str) -> str:
    """For messages and metrics' readers: ``reward service``, or ``reward service NAME``."""
    return f"reward service {name}" if name else "reward service"


def combined(rewards: Sequence[HostedReward], scores: Mapping[str, float]) -> float:
    """The weighted sum of the scores, each normalised by its own statistics; of one service alone, its raw score.

    Args:
        rewards: the services.
        scores: raw score of each, by name.
    """
    if len(rewards) == 1 and not rewards[0].name:
        return scores[rewards[0].name]
    total = 0.0
    for reward in rewards:
        score, by = scores[reward.name], reward.normalised_by
        total += reward.weight * (score if by is None else (score - by.mean) / by.std)
    return total


async def ask_rewards(
    settings: ServiceAddresses, clients: Mapping[str, RewardClient], policy_tokenizer: str
) -> tuple[HostedReward, ...]:
    """What each reward service hosts, and what its scores will count for.

    Raises:
        ServicesError: scores are to be normalised, and a model has no statistics to do it by.
        QuartetError: one stayed away.
    """
    found = []
    for name, weight in settings.weights_of_rewards.items():
        model, normalisation = await clients[name].get_model_info()
        if settings.normalise_reward == "on" and normalisation is None:
            raise ServicesError(
                f"--normalise-reward is on, but no mean and std are kept with the model {model.served_by.model_id!r} "
                f"of the {service_title(name)}; train it with --calibrate-on, or choose off"
            )
        found.append(
            HostedReward(
                name=name,
                model=model,
                takes_tokens=model.served_by.tokenizer_fingerprint == policy_tokenizer,
                normalisation=normalisation,
                weight=weight,
                normalised_by=None if settings.normalise_reward == "off" else normalisation,
            )
        )
    raw = [reward.name for reward in found if reward.normalised_by is None]
    if raw and len(raw) < len(found):
        sys.stderr.write(
            f"warning: scores of {', '.join(raw)} are summed up as they are, the others normalised: no mean and std "
            "are kept with the model\n"
        )
    return tuple(found)


def means_by_name(scores: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Mean raw score of each service, as figures for the log; none where there is one service alone."""
    names = scores[0] if scores else ()
    return {f"{prefix}/{name}_mean": sum(row[name] for row in scores) / len(scores) for name in names}
