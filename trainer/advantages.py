"""Advantages from rewards, with a critic's values or against other samples of the prompt, and their whitening.

Shapes: B sequences, T response tokens, right-padded; G groups, each the samples of one prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.masked import (
    Moments,
    check_batch,
    check_right_padded,
    combine_moments,
    fill_padding,
    masked_mean,
    masked_moments,
    masked_var,
)

__all__ = [
    "Moments",
    "combine_moments",
    "gae",
    "group_mean_baseline",
    "leave_one_out",
    "masked_mean",
    "masked_moments",
    "masked_var",
    "rewards_to_go",
    "whiten",
]

_MIN_WHITEN_TOKENS = 8
_WHITEN_EPSILON = 1e-8
_STD_EPSILON = 1e-6


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over each response.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with value and advantage 0 after the
    last valid token, whatever the critic says about padding.

    Args:
        rewards_BT: (B, T) reward of each token.
        values_BT: (B, T) the critic's value of the state in which each token was chosen.
        mask_BT: (B, T) True on valid tokens.
        gamma: discount, in [0, 1].
        lam: trade of bias (0) for variance (1), in [0, 1].

    Returns:
        advantages_BT, not whitened, and returns_BT = advantages + values, both detached and exactly 0 on padding.

    Raises:
        ValueError: shapes differ, rows are not right-padded, or ``gamma`` or ``lam`` lie outside [0, 1].

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16;
    defaults of openai/lm-human-preferences.
    """
    check_batch(mask_BT, rewards_BT=rewards_BT, values_BT=values_BT)
    check_right_padded(mask_BT)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}: it must lie in [0, 1]")
    # Zeroed before the recursion: afterwards a value read off a pad would already be inside the last token's delta.
    rewards_BT = fill_padding(rewards_BT, mask_BT)
    values_BT = fill_padding(values_BT, mask_BT)
    next_values_BT = torch.cat([values_BT[:, 1:], torch.zeros_like(values_BT[:, :1])], dim=1)
    deltas_BT = rewards_BT + gamma * next_values_BT - values_BT
    advantages_BT = torch.zeros_like(deltas_BT)
    advantage_B = torch.zeros_like(deltas_BT[:, 0])
    for t in reversed(range(deltas_BT.shape[1])):
        advantage_B = deltas_BT[:, t] + gamma * lam * advantage_B
        advantages_BT[:, t] = advantage_B
    return advantages_BT, advantages_BT + values_BT


def rewards_to_go(rewards_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """(B, T) discounted sum of a token's own reward and all that follow it, 0 on padding: REINFORCE without a baseline.

    Whitened over the batch it is REINFORCE++.

    Raises:
        ValueError: as ``gae``.

    Source: Williams 1992, "Simple Statistical Gradient-Following Algorithms"; Hu 2025, "REINFORCE++".
    """
    return gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, lam=1.0)[0]


@torch.no_grad()
def leave_one_out(rewards_BT: Tensor, mask_BT: Tensor, groups_B: Tensor) -> Tensor:
    """RLOO: a response's reward less the mean of the *other* responses to its prompt, the same for all its tokens.

    The baseline is independent of the response, so the gradient is unbiased. A response that is alone in its group,
    where others failed, has nothing to be compared with: its advantage is 0.

    Args:
        rewards_BT: (B, T) reward of each token; a response's reward is their sum.
        mask_BT: (B, T) True on valid tokens.
        groups_B: (B,) int64, equal for samples of one prompt; in any order, groups of any size.

    Returns:
        (B, T), not whitened, detached and exactly 0 on padding.

    Raises:
        ValueError: shapes differ.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, "Back to
    Basics: Revisiting REINFORCE Style Optimization".
    """
    totals_B, means_B, counts_B, _ = _groups(rewards_BT, mask_BT, groups_B)
    # R - (n mean - R) / (n - 1) is n / (n - 1) (R - mean).
    advantages_B = (totals_B - means_B) * counts_B / (counts_B - 1).clamp(min=1)
    return _on_all_tokens(advantages_B.masked_fill(counts_B == 1, 0.0), rewards_BT, mask_BT)


@torch.no_grad()
def group_mean_baseline(rewards_BT: Tensor, mask_BT: Tensor, groups_B: Tensor, divide_by_std: bool = True) -> Tensor:
    """GRPO: a response's reward less the mean of its group, over the group's standard deviation, for all its tokens.

    Without the division it is Dr. GRPO, and (n - 1) / n of ``leave_one_out``; the division weighs prompts whose rewards
    differ little as much as others, which no reward asks for. A response that is alone in its group has advantage 0.

    Args:
        rewards_BT, mask_BT, groups_B: as ``leave_one_out``.
        divide_by_std: by Bessel's standard deviation of the group plus 1e-6.

    Returns:
        (B, T), detached and exactly 0 on padding.

    Raises:
        ValueError: shapes differ.

    Source: Shao et al. 2024, "DeepSeekMath", section 4.1.2; Liu et al. 2025, "Understanding R1-Zero-Like Training";
    verl, verl/trainer/ppo/core_algos.py compute_grpo_outcome_advantage, which differs in groups of one.
    """
    totals_B, means_B, counts_B, deviations_B = _groups(rewards_BT, mask_BT, groups_B)
    advantages_B = totals_B - means_B
    if divide_by_std:
        advantages_B = advantages_B / (deviations_B + _STD_EPSILON)
    return _on_all_tokens(advantages_B.masked_fill(counts_B == 1, 0.0), rewards_BT, mask_BT)


def _groups(rewards_BT: Tensor, mask_BT: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B,) float64 each: sum of rewards, and mean, size and Bessel's deviation (of one: 0) of the group it is in."""
    check_batch(mask_BT, rewards_BT=rewards_BT)
    if groups_B.shape != mask_BT.shape[:1]:
        raise ValueError(f"groups_B has shape {tuple(groups_B.shape)}: mask_BT has {len(mask_BT)} rows, one group each")
    totals_B = fill_padding(rewards_BT, mask_BT).sum(dim=1, dtype=torch.float64)
    _, places_B = torch.unique(groups_B, return_inverse=True)
    # A product with who is in which group: sums by scattering come in any order on a GPU, and so in other last bits.
    member_BG = torch.nn.functional.one_hot(places_B).double()
    counts_G = member_BG.sum(dim=0)
    means_B = (member_BG.T @ totals_B / counts_G)[places_B]
    variances_G = member_BG.T @ (totals_B - means_B).square() / (counts_G - 1).clamp(min=1)
    return totals_B, means_B, counts_G[places_B], variances_G.sqrt()[places_B]


def _on_all_tokens(advantages_B: Tensor, like_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return fill_padding(advantages_B.to(like_BT.dtype)[:, None].expand_as(mask_BT), mask_BT)


def whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True, moments: Moments | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the valid tokens of the whole global batch, 0 on padding.

    Args:
        x_BT: (B, T) advantages (``shift_mean`` True) or rewards (False: the mean is put back).
        mask_BT: (B, T) True on valid tokens.
        shift_mean: whether the mean is removed.
        moments: of the tokens of *all* processes (``combine_moments`` of each one's ``masked_moments``); None when
            this batch is the whole of it.

    Raises:
        ValueError: fewer than 8 tokens in the whole batch: their variance would be noise.

    Source: trl, trl/trainer/utils.py masked_whiten; verl, verl/utils/torch_functional.py masked_whiten.
    """
    check_batch(mask_BT, x_BT=x_BT)
    if moments is None:
        moments = masked_moments(x_BT, mask_BT)
    if moments.count < _MIN_WHITEN_TOKENS:
        raise ValueError(f"whitening needs at least {_MIN_WHITEN_TOKENS} valid tokens, there are {moments.count}")
    whitened_BT = (x_BT - moments.mean) * (moments.variance + _WHITEN_EPSILON) ** -0.5
    if not shift_mean:
        whitened_BT = whitened_BT + moments.mean
    return fill_padding(whitened_BT, mask_BT)
