"""Advantages and returns from rewards and values, and their whitening.

Shapes: B sequences, T response tokens, right-padded.
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

__all__ = ["Moments", "combine_moments", "gae", "masked_mean", "masked_moments", "masked_var", "whiten"]

_MIN_WHITEN_TOKENS = 8
_WHITEN_EPSILON = 1e-8


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
