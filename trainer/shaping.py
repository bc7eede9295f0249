"""What an update learns from: a rollout's scores as rewards, and rewards as advantages.

Shapes: N samples of a rollout, T response tokens, right-padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quartet.client.reward import Normalisation
from trainer import rewards
from trainer.advantages import gae, group_mean_baseline, leave_one_out, rewards_to_go, whiten
from trainer.experience import Experience
from trainer.kl import AdaptiveKlController, FixedKlController, k3, sequence_kl
from trainer.losses import ImportanceWeights, OffPolicyCorrection, old_policy
from trainer.masked import masked_mean, masked_var
from trainer.ppo_config import PPOSettings, RunSettings
from trainer.rewards import RunningScale
from trainer.statistics import mean_interval_of_groups


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What the trainer's own models say of a rollout before any update: (N, T), 0 on padding."""

    logprobs_NT: Tensor
    entropies_NT: Tensor
    values_NT: Tensor  # 0 everywhere without a critic.


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the update learns from: (N, T), 0 on padding."""

    old_logprobs_NT: Tensor
    weights: ImportanceWeights | None
    old_values_NT: Tensor
    advantages_NT: Tensor
    returns_NT: Tensor  # Of the critic alone.
    kl_price: float  # Of a nat in the loss; 0 where it is paid in the reward.


class Shaping:
    """From scores to advantages, by the settings.

    ``kl`` and ``scale`` change from step to step: the price of KL and the statistics of the scores.
    """

    def __init__(self, settings: PPOSettings, normalisation: Normalisation | None) -> None:
        """
        Args:
            settings: of the run.
            normalisation: statistics that scores are normalised by; None for raw scores.
        """
        self.settings = settings
        self.normalisation = normalisation
        self.kl: FixedKlController | AdaptiveKlController = (
            FixedKlController(settings.kl_beta)
            if settings.kl == "fixed"
            else AdaptiveKlController(settings.kl_beta, settings.kl_target, settings.kl_horizon)
        )
        self.scale = RunningScale()

    def targets(self, experience: Experience, before: Evaluated) -> tuple[Targets, dict[str, float]]:
        """Rewards, advantages and returns, and their figures; the price of KL moves after it was used."""
        settings, mask_NT = self.settings, experience.mask_NT
        old_logprobs_NT, weights = old_policy(
            OffPolicyCorrection(settings.correction),
            before.logprobs_NT,
            experience.rollout_logprobs_NT,
            mask_NT,
            settings.importance_cap,
        )
        scores_N = self.final_scores(experience)
        beta = self.kl.beta
        rewards_NT, kl_NT = rewards.shape_rewards(
            scores_N,
            old_logprobs_NT,
            experience.ref_logprobs_NT,
            mask_NT,
            beta if settings.kl_placement == "reward" else 0.0,
        )
        if settings.whiten_rewards:
            rewards_NT = whiten(rewards_NT, mask_NT, shift_mean=False)
        advantages_NT, returns_NT = self.advantages(experience, rewards_NT, before.values_NT)
        kl_N = sequence_kl(kl_NT, mask_NT)
        self.kl.update(float(kl_N.mean()), len(kl_N))
        metrics = {
            **score_metrics(experience),
            "reward/final_mean": float(scores_N.mean()),
            "kl/sequence_mean": float(kl_N.mean()),
            "kl/token_mean": float(masked_mean(kl_NT, mask_NT)),
            "kl/k3_token_mean": _k3_mean(old_logprobs_NT, experience.ref_logprobs_NT, mask_NT),
            "kl/beta": beta,
            "policy/entropy_mean": float(masked_mean(before.entropies_NT, mask_NT)),
            # Both are 0 on padding.
            "rollout/logprob_max_abs_difference": float(
                (before.logprobs_NT - experience.rollout_logprobs_NT).abs().max()
            ),
        }
        if settings.has_critic:
            metrics |= {
                "value/mean": float(masked_mean(before.values_NT, mask_NT)),
                "value/explained_variance": explained_variance(before.values_NT, returns_NT, mask_NT),
            }
        if settings.compares_samples:
            metrics["advantage/zero_share"] = float((advantages_NT == 0).all(dim=1).float().mean())
        if weights is not None:
            metrics |= {
                "rollout/importance_weight_mean": float(weights.mean),
                "rollout/ess": float(weights.ess),
                "rollout/kl_old": float(weights.kl),
            }
        if settings.whitens_advantages:
            advantages_NT = whiten(advantages_NT, mask_NT)
        if settings.advantage_clip is not None:
            advantages_NT = advantages_NT.clamp(-settings.advantage_clip, settings.advantage_clip)
        return (
            Targets(
                old_logprobs_NT=old_logprobs_NT,
                weights=weights,
                old_values_NT=before.values_NT,
                advantages_NT=advantages_NT,
                returns_NT=returns_NT,
                kl_price=beta if settings.kl_placement == "loss" else 0.0,
            ),
            metrics,
        )

    def advantages(self, experience: Experience, rewards_NT: Tensor, values_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages, not whitened, and the returns that the critic learns (without one: all 0)."""
        settings, mask_NT = self.settings, experience.mask_NT
        if settings.advantage == "gae":
            return gae(rewards_NT, values_NT, mask_NT, settings.gamma, settings.lam)
        if settings.advantage == "reinforce++":
            advantages_NT = rewards_to_go(rewards_NT, mask_NT, settings.gamma)
        elif settings.advantage == "rloo":
            advantages_NT = leave_one_out(rewards_NT, mask_NT, experience.groups_N)
        else:
            by_std = settings.advantage == "grpo" and settings.group_std
            advantages_NT = group_mean_baseline(rewards_NT, mask_NT, experience.groups_N, divide_by_std=by_std)
        return advantages_NT, torch.zeros_like(advantages_NT)

    def final_scores(self, experience: Experience) -> Tensor:
        """(N,) scores as PPO uses them: normalised, scaled, clipped, and less what length and a missing end cost.

        Moves the statistics that they are scaled by.
        """
        settings, scores_N = self.settings, experience.scores_N
        if self.normalisation is not None:
            scores_N = rewards.normalise(scores_N, self.normalisation.mean, self.normalisation.std)
        if settings.scale_scores:
            scores_N = self.scale.scale(scores_N)
        if settings.score_clip is not None:
            scores_N = rewards.clip_scores(scores_N, settings.score_clip)
        return penalised(scores_N, experience, settings)


def penalised(scores_N: Tensor, experience: Experience, settings: RunSettings) -> Tensor:
    """(N,) scores less what length and a missing end cost."""
    if settings.length_penalty:
        scores_N = rewards.apply_length_penalty(
            scores_N, experience.mask_NT, settings.length_penalty, settings.length_penalty_after
        )
    if settings.missing_eos != "none":
        scores_N = rewards.apply_missing_eos(
            scores_N, experience.finished_N, settings.missing_eos, settings.missing_eos_value
        )
    return scores_N


def _k3_mean(logprobs_NT: Tensor, ref_logprobs_NT: Tensor, mask_NT: Tensor) -> float:
    # It is an exponential of the gap: float32 ends at 88 nats, float64 at 709.
    return float(masked_mean(k3(logprobs_NT.double(), ref_logprobs_NT.double()), mask_NT))


def explained_variance(values_NT: Tensor, returns_NT: Tensor, mask_NT: Tensor) -> float:
    """Share of the returns' variance that the values foretold: 1 is all, 0 none; below 0 they mislead.

    Where all returns are equal there is nothing to explain: 0.
    """
    variance = float(masked_var(returns_NT, mask_NT))
    return 1.0 - float(masked_var(returns_NT - values_NT, mask_NT)) / variance if variance > 0 else 0.0


def score_metrics(experience: Experience) -> dict[str, float]:
    """Raw scores with their interval, which is over prompts, and the lengths of the responses."""
    score = mean_interval_of_groups(experience.scores_N.tolist(), experience.prompts)
    lengths_N = experience.mask_NT.sum(dim=1).float()
    return {
        "reward/score_mean": score.value,
        "reward/score_std": float(experience.scores_N.std()),
        "reward/score_ci95": (score.high - score.low) / 2,
        "reward/missing_eos_share": 1.0 - float(experience.finished_N.float().mean()),
        "response/finished_share": float(experience.finished_N.float().mean()),
        "response/length_mean": float(lengths_N.mean()),
        "response/length_p95": float(lengths_N.quantile(0.95)),
    }
