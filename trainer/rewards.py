"""From the reward model's score of a response to a reward per token.

Shapes: B sequences, T response tokens, right-padded. Only response tokens are looked at, and only where the mask is
True. Where a response ends, and whether by itself, ``trainer.rollout`` finds out from its token ids.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.kl import k1
from trainer.masked import Moments, check_batch, check_right_padded, combine_moments, fill_padding, rows


def last_token_index(mask_BT: Tensor) -> Tensor:
    """(B,) int64 index of each response's last valid token: its EOS where it has one, never the first pad.

    Raises:
        ValueError: a row has no valid token, or a valid one after padding.
    """
    check_batch(mask_BT)
    check_right_padded(mask_BT)
    lengths_B = mask_BT.sum(dim=1)
    empty_B = lengths_B == 0
    if empty_B.any():
        raise ValueError(f"{rows(empty_B)} of mask_BT have no valid response token")
    return lengths_B - 1


@dataclass(frozen=True, kw_only=True)
class MissingEos:
    """What a response that never stopped loses.

    Source: "replace" is vwxyzjn/summarize_from_feedback_details' penalty_reward_value, "subtract" trl's
    missing_eos_penalty.
    """

    mode: Literal["subtract", "replace"]
    """``subtract`` takes ``value`` off the score; ``replace`` makes ``value`` the score."""
    value: float
    """Score units; at least 0 for ``subtract``."""

    def __post_init__(self) -> None:
        if self.mode not in ("subtract", "replace"):
            raise ValueError(f"missing-EOS mode is {self.mode!r}: it must be 'subtract' or 'replace'")
        if not math.isfinite(self.value):
            raise ValueError(f"missing-EOS value is {self.value}: it must be a finite number")
        if self.mode == "subtract" and self.value < 0:
            raise ValueError(f"missing-EOS value is {self.value}: subtracted, it must be at least 0, or it pays")


def apply_missing_eos(
    scores_B: Tensor, finished_B: Tensor, mode: Literal["subtract", "replace"], value: float
) -> Tensor:
    """(B,) scores, penalised where ``finished_B`` is False. See ``MissingEos`` for the modes.

    Raises:
        ValueError: shapes differ, ``finished_B`` is not boolean, or ``mode`` or ``value`` are refused.
    """
    penalty = MissingEos(mode=mode, value=value)
    if finished_B.dtype != torch.bool or finished_B.shape != scores_B.shape:
        raise ValueError(
            f"finished_B is {finished_B.dtype} of shape {tuple(finished_B.shape)}: it must be torch.bool of scores_B's "
            f"shape {tuple(scores_B.shape)}"
        )
    unfinished_B = scores_B - penalty.value if mode == "subtract" else torch.full_like(scores_B, penalty.value)
    return torch.where(finished_B, scores_B, unfinished_B)


def normalise(scores_B: Tensor, mean: float, std: float) -> Tensor:
    """(scores - mean) / std, with the mean and standard deviation kept with the reward model.

    Raises:
        ValueError: ``mean`` is not finite, or ``std`` not finite and positive.
    """
    if not math.isfinite(mean):
        raise ValueError(f"mean is {mean}: it must be a finite number")
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"std is {std}: it must be finite and above 0; a reward model that scores all alike has none")
    return (scores_B - mean) / std


def clip_scores(scores_B: Tensor, limit: float) -> Tensor:
    """Scores clamped to [-limit, limit]; after normalisation, in standard deviations (PPO-max uses 10).

    Raises:
        ValueError: ``limit`` is not positive.
    """
    if not limit > 0:
        raise ValueError(f"limit is {limit}: it must be above 0")
    return scores_B.clamp(-limit, limit)


class RunningScale:
    """Scores over the standard deviation of all scores so far, those of the present batch among them.

    The mean stays: it tells good from bad. While all scores were alike they are left as they are.

    Source: Zheng et al. 2023, "Secrets of RLHF in Large Language Models Part I: PPO", section 5.3.1 (PPO-max).
    """

    def __init__(self) -> None:
        self.moments = Moments(count=0, mean=0.0, squared_deviations=0.0)

    def scale(self, scores_B: Tensor) -> Tensor:
        """Takes the scores into the statistics and returns them scaled."""
        x_B = scores_B.double()
        mean = float(x_B.mean())
        new = Moments(count=len(x_B), mean=mean, squared_deviations=float((x_B - mean).square().sum()))
        self.moments = combine_moments([self.moments, new])
        std = math.sqrt(self.moments.variance) if self.moments.count > 1 else 0.0
        return scores_B / std if std > 0 else scores_B

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self.moments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is not one of these statistics.
        """
        try:
            self.moments = Moments(**state)
        except TypeError as error:
            raise ValueError(f"the saved statistics of the scores hold {sorted(state)}: {error}") from error


def apply_length_penalty(scores_B: Tensor, mask_BT: Tensor, price: float, free_tokens: int = 0) -> Tensor:
    """(B,) scores less ``price`` for each response token beyond ``free_tokens``.

    Raises:
        ValueError: ``price`` or ``free_tokens`` is negative, or there is not one score a row.
    """
    check_batch(mask_BT)
    if not 0 <= price < math.inf or free_tokens < 0:
        raise ValueError(f"price is {price} and free_tokens {free_tokens}: both must be finite and at least 0")
    if scores_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"scores_B has shape {tuple(scores_B.shape)}: mask_BT has {len(mask_BT)} rows, one score each")
    return scores_B - price * (mask_BT.sum(dim=1) - free_tokens).clamp(min=0)


def place_scores(scores_B: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, T) zeros, with each score on its response's last valid token.

    Raises:
        ValueError: a score is not finite (a failed scoring is never a number), there is not one score a row, or a row
            has no valid token.
    """
    last_B = last_token_index(mask_BT)
    if scores_B.shape != last_B.shape:
        raise ValueError(f"scores_B has shape {tuple(scores_B.shape)}: mask_BT has {len(last_B)} rows, one score each")
    failed_B = ~scores_B.isfinite()
    if failed_B.any():
        raise ValueError(f"scores_B is not finite in {rows(failed_B)}")
    placed_BT = scores_B.new_zeros(mask_BT.shape)
    return placed_BT.scatter(1, last_B[:, None], scores_B[:, None])


def shape_rewards(
    scores_B: Tensor, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The reward of every token: r_t = -beta (log pi_old - log ref)_t, plus the score on the last token.

    Args:
        scores_B: (B,) final scores: normalised, penalised and clipped as wanted.
        logprobs_BT: (B, T) of the policy that sampled, before any update.
        ref_logprobs_BT: (B, T) of the reference, at the same temperature.
        mask_BT: (B, T) True on valid tokens. Padding may hold anything.
        beta: price of a nat, at least 0.

    Returns:
        rewards_BT and kl_BT (k1, never clamped), both detached and exactly 0 on padding.

    Raises:
        ValueError: shapes differ, ``beta`` is refused, or a valid token's log-probability or a score is not finite.

    Source: openai/lm-human-preferences, lm_human_preferences/train_policy.py, compute_rewards.
    """
    check_batch(mask_BT, logprobs_BT=logprobs_BT, ref_logprobs_BT=ref_logprobs_BT)
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta is {beta}: it must be finite and at least 0")
    for name, values_BT in (("logprobs_BT", logprobs_BT), ("ref_logprobs_BT", ref_logprobs_BT)):
        broken_B = (~values_BT.isfinite() & mask_BT).any(dim=1)
        if broken_B.any():
            raise ValueError(f"{name} is not finite on valid tokens of {rows(broken_B)}")
    with torch.no_grad():
        kl_BT = k1(fill_padding(logprobs_BT, mask_BT), fill_padding(ref_logprobs_BT, mask_BT))
        return place_scores(scores_B, mask_BT) - beta * kl_BT, kl_BT
