"""TRL as an oracle of DPO, KTO and reward losses, to 1e-6, but for exceptions, which are named and pinned.

Its losses stand in methods of its trainers. They are called as they are, with a stand-in for the trainer that has the
settings they read, and a model that answers with random log-probabilities.
Shapes: B pairs, N answers, T response tokens, S tokens of prompt and answer.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import peers
from tests.oracles.batches import SEEDS, Batch, T, assert_agree, gradient
from tests.oracles.trl.stand_in import trainer_of_trl
from trainer import losses
from trainer.dpo_losses import AnswerLogprobs, DpoLoss, dpo_loss, kto_loss

peers.require("trl")
trl: Any = importlib.import_module("trl.trainer")

# An even number of answers: the first half are chosen, the others rejected.
ANSWERS = st.builds(
    Batch, SEEDS, st.integers(1, 4).flatmap(lambda b: st.lists(st.integers(1, T), min_size=2 * b, max_size=2 * b))
)
BETAS = st.floats(0.01, 2.0)
SMOOTHING = st.floats(0.01, 0.45)


class Answered:
    """Random log-probabilities of answers' tokens under a policy, and sums of them under a reference."""

    def __init__(self, batch: Batch) -> None:
        self.mask_NT = batch.mask_BT
        self.logprobs_NT = batch.logprobs().masked_fill(~batch.mask_BT, 0.0).requires_grad_()
        self.reference_N = (batch.logprobs() * batch.mask_BT).sum(dim=1)
        self.tokens_N = batch.mask_BT.sum(dim=1).double()

    def ours(self, rows: Tensor | slice) -> AnswerLogprobs:
        return AnswerLogprobs(
            policy_B=self.logprobs_NT.sum(dim=1)[rows], reference_B=self.reference_N[rows], tokens_B=self.tokens_N[rows]
        )

    @property
    def halves(self) -> tuple[AnswerLogprobs, AnswerLogprobs]:
        half = len(self.tokens_N) // 2
        return self.ours(slice(0, half)), self.ours(slice(half, None))

    def model(self, **_: Any) -> SimpleNamespace:
        """Answers as a causal language model with TRL's fused head does, whichever tokens it is given."""
        zeros_NT = torch.zeros_like(self.logprobs_NT)
        return SimpleNamespace(
            log_probs=self.logprobs_NT, entropy=zeros_NT, mean_logits=zeros_NT, is_top1=zeros_NT.bool()
        )

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Of a prompt of one token."""
        completion_mask_NS = torch.nn.functional.pad(self.mask_NT.long(), (1, 0))
        return {
            "input_ids": torch.ones_like(completion_mask_NS),
            "attention_mask": torch.nn.functional.pad(self.mask_NT.long(), (1, 0), value=1),
            "completion_mask": completion_mask_NS,
        }


# DPO


def dpo_of_trl(answered: Answered, loss: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    trainer = trainer_of_trl(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
    )
    chosen_B, rejected_B = answered.reference_N.chunk(2)
    reference = {"ref_chosen_logps": chosen_B, "ref_rejected_logps": rejected_B}
    return trl.DPOTrainer._compute_loss(trainer, answered.model, answered.inputs | reference, False)


@given(batch=ANSWERS, beta=BETAS, e=SMOOTHING)
@pytest.mark.parametrize(
    ("kind", "theirs", "smoothed"),
    [(DpoLoss.SIGMOID, "sigmoid", False), (DpoLoss.ROBUST, "robust", True), (DpoLoss.IPO_MEAN, "ipo", False)],
)
def test_dpo_losses_and_their_gradients_agree(
    kind: DpoLoss, theirs: str, smoothed: bool, batch: Batch, beta: float, e: float
) -> None:
    answered = Answered(batch)
    smoothing = e if smoothed else 0.0
    ours = dpo_loss(*answered.halves, beta=beta, kind=kind, label_smoothing=smoothing)
    expected = dpo_of_trl(answered, theirs, beta, smoothing)
    assert_agree(ours, expected)
    assert_agree(
        gradient(ours, answered.logprobs_NT) * answered.mask_NT,
        gradient(expected, answered.logprobs_NT) * answered.mask_NT,
    )


@given(batch=st.builds(Batch, SEEDS, st.lists(st.integers(1, T), min_size=2, max_size=2)), beta=BETAS, e=SMOOTHING)
def test_cdpo_agrees_pair_by_pair_with_their_alignment_by_transport(batch: Batch, beta: float, e: float) -> None:
    """``aot`` sorts the pairs of a batch and then takes cDPO's loss: of one pair that is cDPO."""
    answered = Answered(batch)
    ours = dpo_loss(*answered.halves, beta=beta, label_smoothing=e)
    expected = dpo_of_trl(answered, "aot", beta, e)
    assert_agree(ours, expected)
    assert_agree(gradient(ours, answered.logprobs_NT), gradient(expected, answered.logprobs_NT))


@given(batch=ANSWERS, beta=BETAS, e=SMOOTHING)
def test_exception_their_sigmoid_ignores_label_smoothing(batch: Batch, beta: float, e: float) -> None:
    answered = Answered(batch)
    theirs = dpo_of_trl(answered, "sigmoid", beta, e)
    assert theirs.item() == dpo_of_trl(answered, "sigmoid", beta, 0.0).item()
    h_B = answered.halves[0].gain_B - answered.halves[1].gain_B
    smoothed = dpo_loss(*answered.halves, beta=beta, label_smoothing=e)
    # -logsigmoid(-x) = -logsigmoid(x) + x.
    assert_agree(smoothed, theirs + e * beta * h_B.mean())


@given(batch=ANSWERS, beta=BETAS)
def test_exception_they_have_ipo_by_averages_alone(batch: Batch, beta: float) -> None:
    """The sums of the paper are theirs where answers have one token, which then carries the whole answer's."""
    answered = Answered(batch)
    ours = dpo_loss(*answered.halves, beta=beta, kind=DpoLoss.IPO_SUM)
    whole = Answered(Batch(0, [1] * len(batch.lengths)))
    with torch.no_grad():
        whole.logprobs_NT[:, 0] = answered.logprobs_NT.sum(dim=1)
    whole.reference_N = answered.reference_N
    assert_agree(ours, dpo_of_trl(whole, "ipo", beta))


@given(
    batch=ANSWERS,
    other=SEEDS,
    beta=BETAS,
    weights=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    good=st.integers(0, 255),
)
def test_kto_and_its_gradient_agree(
    batch: Batch, other: int, beta: float, weights: tuple[float, float], good: int
) -> None:
    answered, mismatched = Answered(batch), Answered(Batch(other, batch.lengths))
    desirable_N = torch.tensor([bool(good >> i & 1) for i in range(len(batch.lengths))])
    trainer = trainer_of_trl(
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda model, inputs: mismatched.logprobs_NT.detach().sum(dim=1),
        loss_type="kto",
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    inputs = answered.inputs | {
        "label": desirable_N,
        "ref_logps": answered.reference_N,
        "ref_KL_logps": mismatched.reference_N,
    }
    expected = trl.KTOTrainer._compute_loss(trainer, answered.model, inputs, False)
    ours = kto_loss(
        answered.ours(slice(None)).gain_B,
        desirable_N,
        mismatched.ours(slice(None)).gain_B.mean(),
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    assert_agree(ours, expected)
    assert_agree(
        gradient(ours, answered.logprobs_NT) * answered.mask_NT,
        gradient(expected, answered.logprobs_NT) * answered.mask_NT,
    )


# Reward models

SCORES = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 3)), min_size=1, max_size=6)


def reward_loss_of_trl(scores_N: Tensor, margin_B: Tensor | None, centring: float | None) -> Tensor:
    trainer = trainer_of_trl(args=SimpleNamespace(center_rewards_coefficient=centring))
    inputs = {} if margin_B is None else {"margin": margin_B}
    return trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores_N[:, None]), inputs)


@given(rows=SCORES, with_margin=st.booleans(), centring=st.none() | st.floats(0, 1))
def test_reward_losses_and_their_gradients_agree(
    rows: list[tuple[float, float, float]], with_margin: bool, centring: float | None
) -> None:
    chosen_B, rejected_B, margin_B = torch.tensor(rows, dtype=torch.float64).T
    scores_N = torch.cat([chosen_B, rejected_B]).requires_grad_()
    chosen_B, rejected_B = scores_N.chunk(2)
    expected = reward_loss_of_trl(scores_N, margin_B if with_margin else None, centring)
    ours = losses.bradley_terry(chosen_B, rejected_B, margin_B if with_margin else None)
    if centring is not None:
        ours = ours + centring * losses.centering(chosen_B, rejected_B)
    assert_agree(ours, expected)
    assert_agree(gradient(ours, scores_N), gradient(expected, scores_N))


@given(chosen=st.floats(-10, 10), rejected=st.floats(-10, 10), e=SMOOTHING, robust=st.booleans())
def test_smoothed_and_robust_reward_losses_agree_with_their_dpo_of_a_flat_reference(
    chosen: float, rejected: float, e: float, robust: bool
) -> None:
    """Exception: TRL has them for DPO alone. A score is what a log-probability is at beta 1 and a reference of 0."""
    answered = Answered(Batch(0, [1, 1]))
    with torch.no_grad():
        answered.logprobs_NT[:, 0] = torch.tensor([chosen, rejected])
    answered.reference_N = torch.zeros(2, dtype=torch.float64)
    chosen_B, rejected_B = answered.logprobs_NT[:, 0].chunk(2)
    ours = losses.bradley_terry(chosen_B, rejected_B, label_smoothing=e, robust=robust)
    assert_agree(ours, dpo_of_trl(answered, "robust" if robust else "aot", 1.0, e))


@given(chosen=st.floats(-10, 10), rejected=st.floats(-10, 10), probability=st.floats(0.51, 0.99))
def test_soft_labels_agree_with_their_smoothed_dpo_of_a_flat_reference(
    chosen: float, rejected: float, probability: float
) -> None:
    """A label of probability p is one that is flipped with probability 1 - p."""
    answered = Answered(Batch(0, [1, 1]))
    with torch.no_grad():
        answered.logprobs_NT[:, 0] = torch.tensor([chosen, rejected])
    answered.reference_N = torch.zeros(2, dtype=torch.float64)
    chosen_B, rejected_B = answered.logprobs_NT[:, 0].chunk(2)
    ours = losses.bradley_terry(chosen_B, rejected_B, probability=probability)
    assert_agree(ours, dpo_of_trl(answered, "aot", 1.0, 1 - probability))
