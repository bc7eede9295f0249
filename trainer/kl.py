"""KL divergence from the reference policy: estimators, the loss made of them, and the controllers of its price.

Shapes: B sequences, T response tokens, V vocabulary. KL is always KL(pi, ref) at tokens sampled from pi, in nats.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainer.kl_placement import KlEstimator as KlEstimator
from trainer.kl_placement import check_kl_placement as check_kl_placement
from trainer.masked import check_batch, check_same_shape, fill_padding

# As in trainer.losses: far beyond every cap, and no overflow.
_MAX_LOG_RATIO = 20.0


def k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """log pi - log ref: unbiased, of high variance, negative for many tokens.

    Never clamp it at 0: that turns an estimate of a vanishing KL into a positive one.
    """
    check_same_shape(logprobs_BT=logprobs_BT, ref_logprobs_BT=ref_logprobs_BT)
    return logprobs_BT - ref_logprobs_BT


def k2(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: biased, of low variance; as a differentiable loss its gradient is KL's on-policy."""
    return 0.5 * k1(logprobs_BT, ref_logprobs_BT).square()


def k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """ref/pi - 1 - log(ref/pi): unbiased, of low variance, never negative."""
    log_ratio_BT = -k1(logprobs_BT, ref_logprobs_BT)
    # expm1 keeps the digits that exp - 1 cancels: near pi = ref the estimate is about log_ratio^2 / 2.
    return torch.expm1(log_ratio_BT) - log_ratio_BT


def kl_loss(
    estimator: KlEstimator,
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    denominator: float,
    weights_BT: Tensor | None = None,
    ratio_cap: float = 2.0,
) -> Tensor:
    """Differentiable KL(pi, ref), before its price: the mean over valid tokens of k2 or k3, weighted by pi / pi_old.

    The tokens were sampled before the update, so from its second optimiser step on they are not pi's: the detached,
    capped ratio makes up for it. Within the cap k2's expected gradient is that of KL(pi, ref) at every step, k3's that
    of KL(ref, pi).

    Args:
        estimator: k2 or k3.
        logprobs_BT: (B, T) of the policy being trained; the only one that receives a gradient.
        ref_logprobs_BT: (B, T) of the reference.
        old_logprobs_BT: (B, T) of the policy at the start of the step.
        mask_BT: (B, T) True on valid tokens. Padding may hold anything.
        denominator: as ``trainer.losses.policy_loss`` has it.
        weights_BT: (B, T) importance weights of ``trainer.losses.importance_weights``; None for 1.
        ratio_cap: the largest ratio.

    Returns:
        A 0-dimensional tensor; adds up over micro-batches.

    Raises:
        ValueError: shapes differ, or the estimator is k1.

    Source: the estimators as Shao et al. 2024, "DeepSeekMath", eq. 4 has them; the ratio as DeepSeek-AI 2025,
    "DeepSeek-V3.2", section 3.1.
    """
    check_kl_placement(estimator, "loss")
    check_batch(mask_BT, logprobs_BT=logprobs_BT, ref_logprobs_BT=ref_logprobs_BT, old_logprobs_BT=old_logprobs_BT)
    logprobs_BT, old_logprobs_BT = fill_padding(logprobs_BT, mask_BT), fill_padding(old_logprobs_BT, mask_BT)
    log_ratio_BT = (logprobs_BT - old_logprobs_BT).detach().clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    estimate = k2 if estimator == KlEstimator.K2 else k3
    kl_BT = estimate(logprobs_BT, fill_padding(ref_logprobs_BT.detach(), mask_BT)) * log_ratio_BT.exp().clamp(
        max=ratio_cap
    )
    if weights_BT is not None:
        kl_BT = kl_BT * fill_padding(weights_BT.detach(), mask_BT)
    return kl_BT.sum() / denominator


def sequence_kl(kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(B,) sum of the per-token KL over each sequence's valid tokens: what the adaptive controller is fed with."""
    check_batch(mask_BT, kl_BT=kl_BT)
    return fill_padding(kl_BT, mask_BT).sum(dim=1)


def exact_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p, q) over the whole vocabulary: the oracle that the estimators are tested against.

    Args:
        logits_p: (..., V) unnormalised log-probabilities of p; -inf for tokens that p excludes.
        logits_q: the same of q.

    Returns:
        (...) in nats, at least float32; inf where p gives weight to a token that q excludes.
    """
    check_same_shape(logits_p=logits_p, logits_q=logits_q)
    dtype = torch.promote_types(torch.promote_types(logits_p.dtype, logits_q.dtype), torch.float32)
    log_p = torch.log_softmax(logits_p.to(dtype), dim=-1)
    log_q = torch.log_softmax(logits_q.to(dtype), dim=-1)
    excluded = log_p == -math.inf  # p log p is 0 there, not 0 * inf; filled before use for the gradient's sake.
    difference = log_p.masked_fill(excluded, 0.0) - log_q.masked_fill(excluded, 0.0)
    return (log_p.exp() * difference).sum(dim=-1)


class FixedKlController:
    """A constant price ``beta`` per nat of KL."""

    def __init__(self, beta: float) -> None:
        """
        Raises:
            ValueError: ``beta`` is negative or not finite.
        """
        self._beta = _finite("beta", beta)
        if beta < 0:
            raise ValueError(f"beta is {beta}: it must be at least 0, or the policy is paid for leaving the reference")

    @property
    def beta(self) -> float:
        """Reward units per nat."""
        return self._beta

    def update(self, sequence_kl_mean: float, n_episodes: int) -> None:
        """Checks its input as the adaptive controller does, and leaves ``beta`` alone."""
        _check_update(sequence_kl_mean, n_episodes)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"kind": "fixed", "beta": self._beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is of another controller, or its beta differs from the settings'.
        """
        _check_state(state, self.state_dict(), changing=frozenset())


class AdaptiveKlController:
    """Steers the mean KL of a sequence towards a target by moving ``beta`` a little after every batch.

    beta *= 1 + clip(KL / target - 1, -clip, clip) * n_episodes / horizon
    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2, and
    openai/lm-human-preferences, lm_human_preferences/train_policy.py.
    """

    def __init__(self, initial_beta: float, target: float, horizon: float, clip: float = 0.2) -> None:
        """
        Args:
            initial_beta: reward units per nat; above 0, since a product can never leave 0.
            target: nats per sequence, the KL summed over tokens and averaged over sequences.
            horizon: episodes over which a clipped error moves ``beta`` by the factor ``clip``.
            clip: bound of the proportional error.

        Raises:
            ValueError: a value is not finite or not positive.
        """
        for name, value in (("initial_beta", initial_beta), ("target", target), ("horizon", horizon), ("clip", clip)):
            if _finite(name, value) <= 0:
                raise ValueError(f"{name} is {value}: it must be above 0")
        self._beta = float(initial_beta)
        self._target = float(target)
        self._horizon = float(horizon)
        self._clip = float(clip)

    @property
    def beta(self) -> float:
        """Reward units per nat, as of the last update."""
        return self._beta

    def update(self, sequence_kl_mean: float, n_episodes: int) -> None:
        """Moves ``beta``, after the batch that was shaped with the present one.

        Args:
            sequence_kl_mean: mean over episodes of ``sequence_kl``. An estimate, so it may be slightly negative.
            n_episodes: sequences it was measured on, of all processes.

        Raises:
            ValueError: the KL is not finite, ``n_episodes`` is not positive, or so many episodes were measured at
                once that one step could bring ``beta`` to 0 or below.
        """
        _check_update(sequence_kl_mean, n_episodes)
        if self._clip * n_episodes >= self._horizon:
            raise ValueError(
                f"n_episodes is {n_episodes}: with horizon {self._horizon:g} and clip {self._clip:g} one update could "
                f"bring beta to 0 or below; the horizon must be above clip * n_episodes = {self._clip * n_episodes:g}"
            )
        error = min(max(sequence_kl_mean / self._target - 1.0, -self._clip), self._clip)
        self._beta *= 1.0 + error * n_episodes / self._horizon

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the present ``beta``, and the settings that will move it on."""
        return {
            "kind": "adaptive",
            "beta": self._beta,
            "target": self._target,
            "horizon": self._horizon,
            "clip": self._clip,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over ``beta``.

        Raises:
            ValueError: the state is of another controller, lacks a value, holds an impossible beta, or its target,
                horizon or clip differ from the settings'.
        """
        _check_state(state, self.state_dict(), changing=frozenset({"beta"}))
        if not (math.isfinite(state["beta"]) and state["beta"] > 0):
            raise ValueError(f"the saved beta of the KL controller is {state['beta']}: it must be finite and above 0")
        self._beta = float(state["beta"])


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: it must be a finite number")
    return float(value)


def _check_update(sequence_kl_mean: float, n_episodes: int) -> None:
    _finite("sequence_kl_mean", sequence_kl_mean)
    if n_episodes < 1:
        raise ValueError(f"n_episodes is {n_episodes}: it must be at least 1")


def _check_state(saved: dict[str, Any], present: dict[str, Any], changing: frozenset[str]) -> None:
    """Refuses a saved state that the present settings could not have produced."""
    if saved.get("kind") != present["kind"]:
        raise ValueError(f"the saved KL controller is {saved.get('kind')!r}, the settings ask for {present['kind']!r}")
    if saved.keys() != present.keys():
        raise ValueError(f"the saved KL controller holds {sorted(saved)}: it must hold {sorted(present)}")
    for name, value in present.items():
        if name not in changing and saved[name] != value:
            raise ValueError(f"the saved KL controller has {name} {saved[name]}, the settings say {value}")
