"""The losses of PPO and of the reward model.

Shapes: B sequences, T response tokens, K ranked answers of one prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional

from trainer.logprobs import chunked_selective_logprobs, entropy_from_logits, selective_logprobs
from trainer.masked import check_batch, check_same_shape, fill_padding, masked_mean

__all__ = [
    "ImportanceWeights",
    "OffPolicyCorrection",
    "PolicyLoss",
    "ValueLoss",
    "bradley_terry",
    "centering",
    "chunked_selective_logprobs",
    "entropy_from_logits",
    "importance_weights",
    "old_policy",
    "pairwise_ranking",
    "plackett_luce",
    "policy_loss",
    "score_l2",
    "selective_logprobs",
    "value_loss",
]

# exp(20) is far beyond every clip range and cap, and its products still fit float32: an overflow to inf would turn
# into NaN in the backward pass of the branch that the clip did not take.
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The policy's clipped loss. Every field is a sum over valid tokens over the same denominator, so the fields of
    all micro-batches of a minibatch add up to the minibatch's. 0-dimensional tensors; all but ``loss`` detached."""

    loss: Tensor
    clip_fraction: Tensor
    """Share of tokens at which a clipped branch was taken, where the gradient is 0."""
    approx_kl: Tensor
    """.5 (log new - log old)^2: how far this update has gone, never negative."""
    mean_old_minus_new: Tensor
    """log old - log new, the k1 estimate of KL(old, new), which other trainers report as ppo_kl."""


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_range: float = 0.2,
    weights_BT: Tensor | None = None,
    denominator: Tensor | float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """PPO's max(-A rho, -A clip(rho, 1 - c, 1 + c)) with rho = pi / pi_old, a mean over valid tokens.

    Args:
        logprobs_BT: (B, T) of the policy being trained; the only one that receives a gradient.
        old_logprobs_BT: (B, T) of the policy at the start of the step.
        advantages_BT: (B, T), whitened over the global batch.
        mask_BT: (B, T) True on valid tokens. Padding may hold anything.
        clip_range: c, in (0, 1).
        weights_BT: (B, T) importance weights of ``importance_weights``; None for 1.
        denominator: valid tokens of the *global minibatch*, over all micro-batches and processes, so that gradients
            do not depend on how it is cut. Where gradients are averaged over processes rather than summed, pass
            that count divided by the number of processes. None: those of this mask.
        dual_clip: c > 1: where A < 0 the loss is at most -A c, so that a token that became far likelier since it was
            sampled does not outweigh all others; None for no such bound.

    Raises:
        ValueError: shapes differ, ``clip_range`` or ``dual_clip`` is refused, or the denominator is not positive.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7; dual clip: Ye et al. 2020,
    "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", eq. 5, which has c = 3.
    """
    check_batch(mask_BT, logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT, advantages_BT=advantages_BT)
    if not 0.0 < clip_range < 1.0:
        raise ValueError(f"clip_range is {clip_range}: it must lie between 0 and 1")
    if dual_clip is not None and not 1.0 < dual_clip < math.inf:
        raise ValueError(f"dual_clip is {dual_clip}: it must be finite and above 1")
    tokens = _tokens(mask_BT, denominator)
    advantages_BT = fill_padding(advantages_BT.detach(), mask_BT)
    log_ratio_BT = fill_padding(logprobs_BT, mask_BT) - fill_padding(old_logprobs_BT.detach(), mask_BT)
    ratio_BT = log_ratio_BT.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss_BT = torch.maximum(unclipped_BT, clipped_BT)
    cut_BT = clipped_BT > unclipped_BT
    if dual_clip is not None:
        most_BT = torch.where(advantages_BT < 0, -advantages_BT * dual_clip, math.inf)
        cut_BT |= loss_BT > most_BT
        loss_BT = torch.minimum(loss_BT, most_BT)
    if weights_BT is not None:
        check_batch(mask_BT, weights_BT=weights_BT)
        loss_BT = loss_BT * fill_padding(weights_BT.detach(), mask_BT)
    delta_BT = log_ratio_BT.detach()  # 0 on padding, as loss_BT is: the plain sums below are masked ones.
    return PolicyLoss(
        loss=loss_BT.sum() / tokens,
        clip_fraction=cut_BT.sum() / tokens,
        approx_kl=0.5 * delta_BT.square().sum() / tokens,
        mean_old_minus_new=-delta_BT.sum() / tokens,
    )


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """The critic's clipped loss; fields add up over micro-batches as those of ``PolicyLoss`` do."""

    loss: Tensor
    """Before its coefficient."""
    clip_fraction: Tensor


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    clip_range: float = 0.2,
    denominator: Tensor | float | None = None,
) -> ValueLoss:
    """.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2), a mean over valid tokens.

    Args:
        values_BT: (B, T) of the critic being trained; the only one that receives a gradient.
        old_values_BT: (B, T) of the critic at the start of the step.
        returns_BT: (B, T) unwhitened advantages plus ``old_values_BT``.
        mask_BT: (B, T) True on valid tokens. Padding may hold anything.
        clip_range: c, above 0, in reward units.
        denominator: as ``policy_loss`` has it.

    Raises:
        ValueError: shapes differ, ``clip_range`` is refused, or the denominator is not positive.

    Source: openai/lm-human-preferences, lm_human_preferences/train_policy.py, loss.
    """
    check_batch(mask_BT, values_BT=values_BT, old_values_BT=old_values_BT, returns_BT=returns_BT)
    if not 0.0 < clip_range < math.inf:
        raise ValueError(f"clip_range is {clip_range}: it must be finite and above 0")
    tokens = _tokens(mask_BT, denominator)
    values_BT = fill_padding(values_BT, mask_BT)
    old_values_BT = fill_padding(old_values_BT.detach(), mask_BT)
    returns_BT = fill_padding(returns_BT.detach(), mask_BT)
    near_BT = torch.clamp(values_BT, old_values_BT - clip_range, old_values_BT + clip_range)
    unclipped_BT = (values_BT - returns_BT).square()
    clipped_BT = (near_BT - returns_BT).square()
    return ValueLoss(
        loss=0.5 * torch.maximum(unclipped_BT, clipped_BT).sum() / tokens,
        clip_fraction=(clipped_BT > unclipped_BT).sum() / tokens,
    )


class OffPolicyCorrection(StrEnum):
    """How the difference between the engine that sampled and the trainer that learns is corrected, never both ways.

    decoupled: pi_old is the trainer's recomputation, and w = min(pi_old / pi_rollout, cap) multiplies the loss.
    bypass: pi_old is what the engine reported, so the clipped ratio itself carries the difference, and no w stands.
    """

    DECOUPLED = "decoupled"
    BYPASS = "bypass"


@dataclass(frozen=True, kw_only=True)
class ImportanceWeights:
    """Truncated weights of the rollout's tokens, and what they say about the rollout. All detached."""

    weights_BT: Tensor
    """min(pi_old / pi_rollout, cap), 0 on padding."""
    mean: Tensor
    """Of pi_old / pi_rollout before truncation; 1 in expectation, healthy in [.5, 2]."""
    ess: Tensor
    """Effective sample size as a share of the tokens, (sum w)^2 / (n sum w^2); healthy above .3."""
    kl: Tensor
    """k1 estimate of KL(rollout, old), nats a token; may be negative, healthy within .1 of 0."""
    truncated_fraction: Tensor
    """Share of tokens whose ratio exceeded the cap."""


def importance_weights(
    old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, cap: float = 2.0
) -> ImportanceWeights:
    """Per-token truncated importance weights from the engine's policy to the trainer's at the start of the step.

    Args:
        old_logprobs_BT: (B, T) the trainer's recomputation.
        rollout_logprobs_BT: (B, T) as the engine sampled, at the same temperature.
        mask_BT: (B, T) True on valid tokens.
        cap: largest weight, above 0.

    Raises:
        ValueError: shapes differ, no token is valid, or ``cap`` is not positive.

    Source: Ionides 2008, "Truncated Importance Sampling"; verl's rollout correction.
    """
    check_batch(mask_BT, old_logprobs_BT=old_logprobs_BT, rollout_logprobs_BT=rollout_logprobs_BT)
    if not 0.0 < cap < math.inf:
        raise ValueError(f"cap is {cap}: it must be finite and above 0")
    with torch.no_grad():
        log_ratio_BT = fill_padding(old_logprobs_BT, mask_BT) - fill_padding(rollout_logprobs_BT, mask_BT)
        ratio_BT = log_ratio_BT.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        weights_BT = fill_padding(ratio_BT.clamp(max=cap), mask_BT)
        return ImportanceWeights(
            weights_BT=weights_BT,
            mean=masked_mean(ratio_BT, mask_BT),
            ess=weights_BT.sum().square() / (weights_BT.square().sum() * mask_BT.sum()),
            kl=-masked_mean(log_ratio_BT, mask_BT),
            truncated_fraction=masked_mean((ratio_BT > cap).to(ratio_BT.dtype), mask_BT),
        )


def old_policy(
    correction: OffPolicyCorrection,
    recomputed_logprobs_BT: Tensor | None,
    rollout_logprobs_BT: Tensor,
    mask_BT: Tensor,
    cap: float = 2.0,
) -> tuple[Tensor, ImportanceWeights | None]:
    """The old log-probabilities for ``policy_loss``, and the weights to go with them.

    Args:
        correction: which of the two corrections is in use.
        recomputed_logprobs_BT: (B, T) by the trainer; needed by ``decoupled``, unused by ``bypass``.
        rollout_logprobs_BT: (B, T) as the engine sampled.
        mask_BT: (B, T) True on valid tokens.
        cap: largest weight of ``decoupled``.

    Raises:
        ValueError: ``decoupled`` without recomputed log-probabilities, or what ``importance_weights`` refuses.
    """
    if correction == OffPolicyCorrection.BYPASS:
        check_batch(mask_BT, rollout_logprobs_BT=rollout_logprobs_BT)
        return rollout_logprobs_BT.detach(), None
    if recomputed_logprobs_BT is None:
        raise ValueError("correction 'decoupled' needs recomputed_logprobs_BT; without them use 'bypass'")
    weights = importance_weights(recomputed_logprobs_BT, rollout_logprobs_BT, mask_BT, cap)
    return recomputed_logprobs_BT.detach(), weights


def bradley_terry(
    chosen_B: Tensor,
    rejected_B: Tensor,
    margin: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    robust: bool = False,
    probability: Tensor | float | None = None,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Mean over pairs of -logsigmoid(D - m), with D = chosen - rejected.

    With l(D) = -logsigmoid(D - m), p = ``probability`` and e = ``label_smoothing``:
    soft labels: p l(D) + (1 - p) l(-D); a tie is p = .5, whose optimum is D = 0;
    smoothed: the same with (1 - e) p + e (1 - p) for p; for p = 1 and m = 0 the optimum is D = log((1 - e) / e);
    robust: the same with (p - e) / (1 - 2e) for p, in expectation over labels flipped with probability e the loss on
    the true ones. It is unbounded below, so it is no measure for a noise-free evaluation set.

    Args:
        chosen_B: (B,) score of each preferred answer: one number a sequence, read at its last token.
        rejected_B: (B,) score of the other.
        margin: m >= 0, one for all or (B,); None for 0.
        label_smoothing: e, the share of labels believed to be flipped, in [0, .5).
        robust: the unbiased form instead of the smoothed one.
        probability: that the first of the two is the better one, in [0, 1], one for all or (B,); None for 1.
        weights_B: (B,) of the pairs, whose weighted sum is then returned; None for 1 / B each.

    Returns:
        A 0-dimensional tensor.

    Raises:
        ValueError: scores are not one a sequence, shapes differ, or ``margin``, ``label_smoothing`` or
            ``probability`` are refused.

    Source: Bradley & Terry 1952; margin: Touvron et al. 2023, "Llama 2", eq. 2; smoothed: Mitchell 2023, "A Note on
    DPO with Noisy Preferences"; robust: Chowdhury et al. 2024, "Provably Robust DPO".
    """
    _check_pairs(chosen_B, rejected_B)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be at least 0 and below .5")
    margin_B = _margin(margin, chosen_B)
    difference_B = chosen_B - rejected_B
    right_B = -functional.logsigmoid(difference_B - margin_B)
    if label_smoothing == 0.0 and probability is None:
        return _mean(right_B, weights_B)
    share_B = _probability(probability, chosen_B)
    if robust:
        share_B = (share_B - label_smoothing) / (1 - 2 * label_smoothing)
    else:
        share_B = label_smoothing + (1 - 2 * label_smoothing) * share_B
    flipped_B = -functional.logsigmoid(-difference_B - margin_B)
    return _mean(share_B * right_B + (1 - share_B) * flipped_B, weights_B)


def plackett_luce(scores_K: Tensor) -> Tensor:
    """-log P(ranking), P the product over places of softmax over what is left. For K = 2 it is Bradley-Terry.

    Args:
        scores_K: (..., K) scores of answers to one prompt, the best first, K at least 2.

    Returns:
        A 0-dimensional tensor: the mean over leading dimensions.

    Source: Plackett 1975, "The Analysis of Permutations"; Luce 1959, "Individual Choice Behavior".
    """
    _check_ranking(scores_K)
    # logcumsumexp from the back: at each place, the total over it and all that rank below.
    remaining_K = scores_K.flip(-1).logcumsumexp(dim=-1).flip(-1)
    return (remaining_K - scores_K).sum(dim=-1).mean()


def pairwise_ranking(scores_K: Tensor) -> Tensor:
    """Mean over the C(K, 2) pairs of -logsigmoid(better - worse), all pairs of a prompt in one batch element.

    Args:
        scores_K: (..., K) scores of answers to one prompt, the best first, K at least 2.

    Returns:
        A 0-dimensional tensor: the mean over leading dimensions.

    Source: Ouyang et al. 2022, "Training language models to follow instructions with human feedback", eq. 1.
    """
    _check_ranking(scores_K)
    better, worse = torch.triu_indices(scores_K.shape[-1], scores_K.shape[-1], offset=1, device=scores_K.device)
    return -functional.logsigmoid(scores_K[..., better] - scores_K[..., worse]).mean()


def centering(chosen_B: Tensor, rejected_B: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """mean((chosen + rejected)^2), before its coefficient: keeps scores near 0, which Bradley-Terry leaves free.

    ``weights_B`` as ``bradley_terry`` has them.

    Source: Eisenstein et al. 2023, "Helping or Herding?"; trl's center_rewards_coefficient.
    """
    _check_pairs(chosen_B, rejected_B)
    return _mean((chosen_B + rejected_B).square(), weights_B)


def score_l2(chosen_B: Tensor, rejected_B: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Mean squared score, before its coefficient; arguments as ``centering`` has them."""
    _check_pairs(chosen_B, rejected_B)
    return 0.5 * _mean(chosen_B.square() + rejected_B.square(), weights_B)


def _tokens(mask_BT: Tensor, denominator: Tensor | float | None) -> float:
    tokens = float(mask_BT.sum() if denominator is None else denominator)
    if not 0.0 < tokens < math.inf:
        what = "mask_BT has no valid token, so the default denominator" if denominator is None else "denominator"
        raise ValueError(
            f"{what} is {tokens:g}: it must be the positive number of valid tokens of the global minibatch"
        )
    return tokens


def _check_pairs(chosen_B: Tensor, rejected_B: Tensor) -> None:
    check_same_shape(chosen_B=chosen_B, rejected_B=rejected_B)
    if chosen_B.dim() != 1 or len(chosen_B) == 0:
        raise ValueError(
            f"chosen_B has shape {tuple(chosen_B.shape)}: it must be one score a sequence, (B,) with B at least 1; "
            "scores of single tokens would let the padding of the shorter answer into the loss"
        )


def _mean(x_B: Tensor, weights_B: Tensor | None) -> Tensor:
    if weights_B is None:
        return x_B.mean()
    check_same_shape(x_B=x_B, weights_B=weights_B)
    return (weights_B * x_B).sum()


def _probability(probability: Tensor | float | None, chosen_B: Tensor) -> Tensor:
    share_B = torch.as_tensor(1.0 if probability is None else probability, dtype=chosen_B.dtype, device=chosen_B.device)
    if share_B.shape not in ((), chosen_B.shape):
        raise ValueError(
            f"probability has shape {tuple(share_B.shape)}: it must be one number or {tuple(chosen_B.shape)}"
        )
    if not bool(((share_B >= 0) & (share_B <= 1)).all()):
        raise ValueError("probability holds a value outside [0, 1]: each is that the first answer is the better one")
    return share_B


def _margin(margin: Tensor | float | None, chosen_B: Tensor) -> Tensor:
    margin_B = torch.as_tensor(0.0 if margin is None else margin, dtype=chosen_B.dtype, device=chosen_B.device)
    if margin_B.shape not in ((), chosen_B.shape):
        raise ValueError(f"margin has shape {tuple(margin_B.shape)}: it must be one number or {tuple(chosen_B.shape)}")
    if not bool(((margin_B >= 0) & margin_B.isfinite()).all()):
        raise ValueError("margin holds a negative or non-finite value: each must be at least 0")
    return margin_B


def _check_ranking(scores_K: Tensor) -> None:
    if scores_K.dim() < 1 or scores_K.shape[-1] < 2 or scores_K.numel() == 0:
        raise ValueError(f"scores_K has shape {tuple(scores_K.shape)}: a ranking needs at least 2 answers")
