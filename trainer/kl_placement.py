"""Which estimator of the KL may stand where. Without torch, so that settings can be refused at once."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal


class KlEstimator(StrEnum):
    """Per-token estimators of KL(pi, ref) from one sample of pi (Schulman 2020, "Approximating KL Divergence")."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


def check_kl_placement(estimator: KlEstimator, placement: Literal["reward", "loss"]) -> None:
    """Refuses pairings whose gradient is not that of KL(pi, ref).

    As a detached reward only k1 works: k2 and k3 there push with about 1 % of the gradient. As a differentiable loss
    k1 has no expected gradient at all, k2 is exact on-policy, and k3 follows the forward KL(ref, pi).

    Raises:
        ValueError: the pairing is refused, with what to use instead.
    """
    if placement not in ("reward", "loss"):
        raise ValueError(f"kl placement is {placement!r}: it must be 'reward' or 'loss'")
    if placement == "reward" and estimator != KlEstimator.K1:
        raise ValueError(
            f"kl estimator {estimator} cannot be the reward: detached, its gradient is not that of the KL "
            "and nearly vanishes close to the reference; use k1 in the reward, or k2 or k3 in the loss"
        )
    if placement == "loss" and estimator == KlEstimator.K1:
        raise ValueError(
            "kl estimator k1 cannot be the loss: its expected gradient is 0, so nothing would hold the policy near "
            "the reference; use k2 or k3 in the loss, or k1 in the reward"
        )
