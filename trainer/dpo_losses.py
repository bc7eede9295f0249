"""The losses of direct preference optimisation: on log-probabilities of whole answers, beside those of a reference.

The implicit reward of an answer is r = beta (log pi - log pi_ref), with log-probabilities summed over its tokens. DPO
is a reward model's loss on these; so label smoothing and the robust form are those of ``losses.bradley_terry``.

Shapes: B pairs, N answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from trainer.losses import bradley_terry
from trainer.masked import check_same_shape


class DpoLoss(StrEnum):
    """Which loss is laid on the difference h = (log pi - log pi_ref of chosen) - (the same of rejected).

    sigmoid: -logsigmoid(beta h); with label smoothing it is the conservative one, cDPO.
    robust: the form that is unbiased under labels flipped with the probability of the label smoothing.
    ipo-mean: (h - 1 / (2 beta))^2, where log-probabilities are means over tokens, as its authors' code has it.
    ipo-sum: the same, where they are sums, as the paper has it.
    """

    SIGMOID = "sigmoid"
    ROBUST = "robust"
    IPO_MEAN = "ipo-mean"
    IPO_SUM = "ipo-sum"


@dataclass(frozen=True, kw_only=True)
class AnswerLogprobs:
    """Of B answers: (B,) log-probabilities summed over tokens, of the policy and of the reference, and how many."""

    policy_B: Tensor
    reference_B: Tensor
    tokens_B: Tensor

    @property
    def gain_B(self) -> Tensor:
        """(B,) log pi - log pi_ref; only the policy's part receives a gradient."""
        return self.policy_B - self.reference_B.detach()

    def gain_in(self, kind: DpoLoss) -> Tensor:
        """(B,) the gain that ``kind`` compares: summed over tokens, or of ipo-mean averaged."""
        return self.gain_B / self.tokens_B if kind is DpoLoss.IPO_MEAN else self.gain_B


def dpo_loss(
    chosen: AnswerLogprobs,
    rejected: AnswerLogprobs,
    *,
    beta: float,
    kind: DpoLoss = DpoLoss.SIGMOID,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The mean loss over pairs.

    Args:
        chosen: the preferred answers.
        rejected: the others.
        beta: price of a nat between policy and reference, above 0.
        kind: which loss.
        label_smoothing: share of labels believed to be flipped, in [0, .5); of sigmoid and robust alone.

    Returns:
        A 0-dimensional tensor.

    Raises:
        ValueError: shapes differ, or ``beta`` or ``label_smoothing`` are refused.

    Source: Rafailov et al. 2023, "Direct Preference Optimization"; cDPO: Mitchell 2023, "A Note on DPO with Noisy
    Preferences"; robust: Chowdhury et al. 2024, "Provably Robust DPO"; IPO: Azar et al. 2023, "A General Theoretical
    Paradigm to Understand Learning from Human Preferences", eq. 17.
    """
    _check(beta, **{f"chosen.{name}": value for name, value in vars(chosen).items()}, rejected=rejected.policy_B)
    if kind in (DpoLoss.SIGMOID, DpoLoss.ROBUST):
        return bradley_terry(
            beta * chosen.gain_B, beta * rejected.gain_B, None, label_smoothing, robust=kind is DpoLoss.ROBUST
        )
    if label_smoothing:
        raise ValueError(f"label_smoothing is {label_smoothing}: {kind} has none, sigmoid and robust have")
    return (chosen.gain_in(kind) - rejected.gain_in(kind) - 1.0 / (2.0 * beta)).square().mean()


def kto_loss(
    gain_N: Tensor,
    desirable_N: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The mean over answers, judged one by one, of w (1 - sigmoid(+-beta (gain - max(0, kl)))).

    Args:
        gain_N: (N,) log pi - log pi_ref of each answer, summed over its tokens.
        desirable_N: (N,) True where the answer was judged good.
        kl: the reference point, an estimate of KL(pi, pi_ref) in nats an answer: the mean gain of answers to other
            prompts. No gradient.
        beta: price of a nat, above 0.
        desirable_weight: w of good answers, at least 0.
        undesirable_weight: w of the others.

    Returns:
        A 0-dimensional tensor.

    Raises:
        ValueError: shapes differ, or a number is refused.

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", eq. 8.
    """
    _check(beta, gain_N=gain_N, desirable_N=desirable_N)
    if desirable_N.dtype != torch.bool:
        raise ValueError(f"desirable_N has dtype {desirable_N.dtype}: it must be torch.bool")
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight}: it must be finite and at least 0")
    reference_point = torch.as_tensor(kl, dtype=gain_N.dtype, device=gain_N.device).detach().clamp(min=0.0)
    sign_N = desirable_N.to(gain_N.dtype) * 2 - 1
    weight_N = torch.where(desirable_N, gain_N.new_tensor(desirable_weight), gain_N.new_tensor(undesirable_weight))
    value_N = torch.sigmoid(sign_N * beta * (gain_N - reference_point))
    return (weight_N * (1.0 - value_N)).mean()


def _check(beta: float, **tensors: Tensor) -> None:
    if not 0.0 < beta < math.inf:
        raise ValueError(f"beta is {beta}: it must be finite and above 0")
    check_same_shape(**tensors)
    name, first = next(iter(tensors.items()))
    if first.dim() != 1 or len(first) == 0:
        raise ValueError(f"{name} has shape {tuple(first.shape)}: it must be one number an answer, at least one")
