"""TRL's PPO as an oracle: on random inputs it agrees with us to 1e-6, but for exceptions, which are named and pinned.

Its rewards, advantages and losses stand in the middle of ``PPOTrainer.train``: those very statements are executed here,
on variables of ours. TRL has no adaptive controller of the KL. Shapes: B sequences, T response tokens.
"""

from __future__ import annotations

import importlib
import math
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import peers
from tests.oracles.batches import BATCHES, FULL_BATCHES, SEEDS, Batch, T, assert_agree, gradient
from trainer import kl, losses
from trainer.advantages import gae, masked_mean, masked_var, whiten
from trainer.rewards import apply_missing_eos, shape_rewards

peers.require("trl_ppo")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl_ppo: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
# From the rollout's log-probabilities, values and scores to whitened advantages, and then a micro-batch's losses.
SHAPING = peers.statements(trl_ppo.PPOTrainer.train, "contain_eos_token = ", "advantages = torch.masked_fill(")
LOSSES = peers.statements(trl_ppo.PPOTrainer.train, "new_logprobs = torch.masked_fill(", "loss = pg_loss")
FIGURES = peers.statements(trl_ppo.PPOTrainer.train, "pg_clipfrac = ", "entropy_stats[")

EOS, PAD = 1, 0
UNIT = st.floats(0, 1)


class Rollout:
    """A random rollout. A response that fills its row may have an EOS there or none; tokens after an EOS are noise."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.mask_BT = batch, batch.mask_BT
        # TRL counts one token more, of a response that does not fill its row.
        self.longer_mask_BT = Batch(0, [min(length + 1, T) for length in batch.lengths]).mask_BT
        self.scores_B = batch.scores()
        self.logprobs_BT, self.ref_BT, self.values_BT = batch.logprobs(), batch.logprobs(), batch.normal()
        self.logits_BTV = torch.stack([batch.normal() for _ in range(7)], dim=-1)
        self.finished_B = (torch.tensor(batch.lengths) < T) | (self.scores_B > 0)
        self.ids_BT = torch.full(self.mask_BT.shape, 5)
        last_B = torch.tensor(batch.lengths) - 1
        rows = torch.arange(len(last_B))
        self.ids_BT[rows[self.finished_B], last_B[self.finished_B]] = EOS

    def of_trl(self, **settings: Any) -> SimpleNamespace:
        """What PPOTrainer.train makes of it."""
        args = SimpleNamespace(
            **{"missing_eos_penalty": None, "kl_estimator": "k1", "kl_coef": 0.05, "whiten_rewards": False}
            | {"gamma": 1.0, "lam": 0.95}
            | settings
        )
        postprocessed_BT = trl_ppo.truncate_response(EOS, PAD, self.ids_BT)
        names = vars(trl_ppo) | {
            "self": SimpleNamespace(args=args, processing_class=SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)),
            "args": args,
            "responses": self.ids_BT,
            "postprocessed_responses": postprocessed_BT,
            "sequence_lengths": trl_ppo.first_true_indices(postprocessed_BT == PAD) - 1,
            "logprobs": self.logprobs_BT,
            "ref_logprobs": self.ref_BT,
            "values": self.values_BT,
            "scores": self.scores_B.clone(),
        }
        exec(SHAPING, names)
        return SimpleNamespace(**names)

    def losses_of_trl(
        self, new_BT: Tensor, vpred_BT: Tensor, advantages_BT: Tensor, returns_BT: Tensor, rows: slice = slice(None)
    ) -> SimpleNamespace:
        """Of the micro-batch ``rows``, with clip ranges of .2."""
        names = vars(trl_ppo) | {
            "args": SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1),
            "micro_batch_inds": rows,
            "context_length": 1,
            "padding_mask": ~self.mask_BT,
            "padding_mask_p1": ~self.longer_mask_BT,
            "new_logprobs": new_BT[rows],
            "mb_logprobs": self.logprobs_BT.masked_fill(~self.mask_BT, trl_ppo.INVALID_LOGPROB)[rows],
            "mb_advantage": advantages_BT[rows],
            "mb_return": returns_BT[rows],
            "mb_values": self.values_BT.masked_fill(~self.longer_mask_BT, 0.0)[rows],
            # As the model returns them: one more state than tokens, and a last dimension of 1.
            "vpred_temp": torch.nn.functional.pad(vpred_BT[rows], (0, 1))[..., None],
            "logits": self.logits_BTV[rows],
            "ppo_epoch_idx": 0,
            "minibatch_idx": 0,
            "gradient_accumulation_idx": 0,
        }
        figures = ("approxkl", "pg_clipfrac", "pg_loss", "vf_loss", "vf_clipfrac", "entropy")
        names |= {f"{name}_stats": {} for name in figures}
        exec(LOSSES, names)
        exec(FIGURES, names)
        return SimpleNamespace(**names | {f"mean_{name}": names[f"{name}_stats"][0, 0, 0] for name in figures})


# Rewards, GAE and whitening


@given(
    batch=FULL_BATCHES,
    beta=st.floats(0, 2),
    gamma=UNIT,
    lam=UNIT,
    whitened=st.booleans(),
    penalty=st.none() | st.floats(0, 5),
)
def test_rewards_advantages_and_returns_agree_where_responses_fill_their_rows(
    batch: Batch, beta: float, gamma: float, lam: float, whitened: bool, penalty: float | None
) -> None:
    rollout = Rollout(batch)
    theirs = rollout.of_trl(kl_coef=beta, gamma=gamma, lam=lam, whiten_rewards=whitened, missing_eos_penalty=penalty)
    scores_B, mask_BT = rollout.scores_B, rollout.mask_BT
    if penalty is not None:
        scores_B = apply_missing_eos(scores_B, rollout.finished_B, "subtract", penalty)
    rewards_BT, kl_BT = shape_rewards(scores_B, rollout.logprobs_BT, rollout.ref_BT, mask_BT, beta)
    if whitened:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False)
    advantages_BT, returns_BT = gae(rewards_BT, rollout.values_BT, mask_BT, gamma, lam)
    assert_agree(kl_BT, theirs.kl)
    assert_agree(rewards_BT, theirs.rewards)
    assert_agree(returns_BT, theirs.returns)
    assert_agree(whiten(advantages_BT, mask_BT), theirs.advantages)


@given(batch=BATCHES, beta=st.floats(0, 2), lam=UNIT)
def test_exception_their_score_sits_one_token_after_the_end(batch: Batch, beta: float, lam: float) -> None:
    """On the first pad of a response that does not fill its row (trl#1893, trl#3750), whose value the critic was never
    asked for as a state of the response. Theirs is ours of responses one token longer, which cost no KL."""
    rollout = Rollout(batch)
    theirs = rollout.of_trl(kl_coef=beta, lam=lam)
    longer_BT = rollout.longer_mask_BT
    lp_BT, ref_BT = (x_BT.masked_fill(~rollout.mask_BT, 0.0) for x_BT in (rollout.logprobs_BT, rollout.ref_BT))
    rewards_BT, kl_BT = shape_rewards(rollout.scores_B, lp_BT, ref_BT, longer_BT, beta)
    advantages_BT, returns_BT = gae(rewards_BT, rollout.values_BT, longer_BT, 1.0, lam)
    assert_agree(kl_BT, theirs.kl)
    assert_agree(rewards_BT, theirs.rewards)
    assert_agree(returns_BT, theirs.returns)
    assert_agree(whiten(advantages_BT, rollout.mask_BT), theirs.advantages)
    right_BT, _ = shape_rewards(rollout.scores_B, rollout.logprobs_BT, rollout.ref_BT, rollout.mask_BT, beta)
    short_B = torch.tensor(batch.lengths) < T
    assert (right_BT - theirs.rewards).abs().amax(dim=1).gt(1e-9).equal(short_B & (rollout.scores_B.abs() > 1e-9))


@given(batch=BATCHES, scale=st.floats(0.1, 100), offset=st.floats(-10, 10), shift_mean=st.booleans())
def test_whitening_agrees(batch: Batch, scale: float, offset: float, shift_mean: bool) -> None:
    x_BT, mask_BT = batch.normal(scale) + offset, batch.mask_BT
    assert_agree(masked_mean(x_BT, mask_BT), trl_ppo.masked_mean(x_BT, mask_BT))
    assert_agree(masked_var(x_BT, mask_BT), trl_ppo.masked_var(x_BT, mask_BT))
    assert_agree(whiten(x_BT, mask_BT, shift_mean), trl_ppo.masked_whiten(x_BT, mask_BT, shift_mean) * mask_BT)


def test_exception_a_nan_on_padding_reaches_every_cell_that_they_whiten() -> None:
    batch = Batch(0, [8, 3])
    x_BT = batch.normal()
    clean_BT = whiten(x_BT, batch.mask_BT)
    x_BT[~batch.mask_BT] = math.nan
    assert torch.equal(whiten(x_BT, batch.mask_BT), clean_BT)
    assert trl_ppo.masked_whiten(x_BT, batch.mask_BT).isnan().all()


def test_exception_one_token_whitens_to_nan_there_and_is_refused_here() -> None:
    batch = Batch(0, [1])
    x_BT = batch.normal()
    assert trl_ppo.masked_whiten(x_BT, batch.mask_BT)[0, 0].isnan()
    with pytest.raises(ValueError, match="at least 8 valid tokens, there are 1"):
        whiten(x_BT, batch.mask_BT)


@given(batch=BATCHES)
def test_exception_they_let_k3_be_the_reward_and_we_refuse_it(batch: Batch) -> None:
    rollout = Rollout(batch)
    theirs = rollout.of_trl(kl_estimator="k3")
    assert_agree(kl.k3(rollout.logprobs_BT, rollout.ref_BT) * rollout.mask_BT, theirs.kl)
    with pytest.raises(ValueError, match="cannot be the reward"):
        kl.check_kl_placement(kl.KlEstimator.K3, "reward")


# The losses


@given(batch=BATCHES, step=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_policy_loss_its_gradient_and_its_clip_fraction_agree(batch: Batch, step: float) -> None:
    rollout = Rollout(batch)
    advantages_BT = batch.normal()
    new_BT = (rollout.logprobs_BT + batch.normal(step).clamp(-19, 19)).requires_grad_()
    ours = losses.policy_loss(new_BT, rollout.logprobs_BT, advantages_BT, rollout.mask_BT)
    theirs = rollout.losses_of_trl(new_BT, batch.normal(), advantages_BT, batch.normal())
    assert_agree(ours.loss, theirs.pg_loss)
    assert_agree(gradient(ours.loss, new_BT), gradient(theirs.pg_loss, new_BT))
    assert_agree(ours.clip_fraction, theirs.pg_clipfrac)


@given(batch=FULL_BATCHES)
def test_approximate_kl_and_entropy_agree_where_responses_fill_their_rows(batch: Batch) -> None:
    rollout = Rollout(batch)
    new_BT, zeros_BT = rollout.logprobs_BT + batch.normal(0.3), torch.zeros_like(rollout.logprobs_BT)
    theirs = rollout.losses_of_trl(new_BT, zeros_BT, zeros_BT, zeros_BT)
    ours = losses.policy_loss(new_BT, rollout.logprobs_BT, zeros_BT, rollout.mask_BT)
    assert_agree(ours.approx_kl, theirs.mean_approxkl)
    assert_agree(masked_mean(losses.entropy_from_logits(rollout.logits_BTV), rollout.mask_BT), theirs.mean_entropy)


@given(batch=BATCHES)
def test_exception_their_approximate_kl_and_entropy_are_means_over_padding_too(batch: Batch) -> None:
    """So both change with the longest response of the batch. Padding adds nothing to the KL, and still counts."""
    rollout = Rollout(batch)
    new_BT, zeros_BT = rollout.logprobs_BT + batch.normal(0.3), torch.zeros_like(rollout.logprobs_BT)
    theirs = rollout.losses_of_trl(new_BT, zeros_BT, zeros_BT, zeros_BT)
    ours = losses.policy_loss(new_BT, rollout.logprobs_BT, zeros_BT, rollout.mask_BT)
    share = rollout.mask_BT.sum() / rollout.mask_BT.numel()
    assert_agree(ours.approx_kl * share, theirs.mean_approxkl)
    assert_agree(losses.entropy_from_logits(rollout.logits_BTV).mean(), theirs.mean_entropy)


@given(batch=FULL_BATCHES, step=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_value_loss_and_its_gradient_agree_where_responses_fill_their_rows(batch: Batch, step: float) -> None:
    _compare_value_losses(Rollout(batch), step)


@given(batch=BATCHES)
def test_exception_their_value_loss_spans_one_token_after_the_end(batch: Batch) -> None:
    """The pad on which their score sits. Theirs is ours of responses one token longer."""
    _compare_value_losses(Rollout(batch), 1.0)


def _compare_value_losses(rollout: Rollout, step: float) -> None:
    batch, longer_BT = rollout.batch, rollout.longer_mask_BT
    returns_BT = batch.normal(2.0)
    new_BT = (rollout.values_BT + batch.normal(step)).requires_grad_()
    ours = losses.value_loss(new_BT, rollout.values_BT, returns_BT, longer_BT)
    theirs = rollout.losses_of_trl(rollout.logprobs_BT, new_BT, batch.normal(), returns_BT)
    assert_agree(ours.loss, theirs.vf_loss)
    assert_agree(gradient(ours.loss, new_BT), gradient(theirs.vf_loss, new_BT))
    assert_agree(ours.clip_fraction, theirs.vf_clipfrac)


def test_exception_their_micro_batches_weigh_alike_whatever_they_hold() -> None:
    """8 tokens and 2: each micro-batch is a mean over its own, and accumulation averages the two. Row 11 of the
    standard divides by the tokens of the minibatch, so that gradients do not depend on how it is cut."""
    rollout = Rollout(Batch(0, [8, 2]))
    batch = rollout.batch
    new_BT, advantages_BT = rollout.logprobs_BT + batch.normal(0.1), batch.normal()

    def ours(rows: slice, denominator: float | None) -> float:
        tensors = (x_BT[rows] for x_BT in (new_BT, rollout.logprobs_BT, advantages_BT, rollout.mask_BT))
        return losses.policy_loss(*tensors, denominator=denominator).loss.item()

    parts = [slice(0, 1), slice(1, 2)]
    theirs = [rollout.losses_of_trl(new_BT, batch.normal(), advantages_BT, batch.normal(), rows) for rows in parts]
    averaged = sum(part.pg_loss.item() for part in theirs) / 2
    assert averaged == pytest.approx(sum(ours(rows, None) for rows in parts) / 2)
    assert sum(ours(rows, 10.0) for rows in parts) == pytest.approx(ours(slice(None), None))
    assert averaged != pytest.approx(ours(slice(None), None), rel=0.1)


def test_exception_their_ratio_overflows_in_float32() -> None:
    """exp(100): with an advantage of 0 their loss is NaN and the step with it; our ratio ends at exp(20)."""
    rollout = Rollout(Batch(0, [8]))
    rollout.logprobs_BT = rollout.logprobs_BT.float()
    new_BT, zeros_BT = rollout.logprobs_BT + 100, torch.zeros(1, T)
    assert rollout.losses_of_trl(new_BT, zeros_BT, zeros_BT, zeros_BT).pg_loss.isnan()
    assert losses.policy_loss(new_BT, rollout.logprobs_BT, zeros_BT, rollout.mask_BT).loss.item() == 0
    bad_BT = -torch.ones(1, T)
    assert rollout.losses_of_trl(new_BT, zeros_BT, bad_BT, zeros_BT).pg_loss.item() == math.inf
    assert losses.policy_loss(new_BT, rollout.logprobs_BT, bad_BT, rollout.mask_BT).loss.item() == pytest.approx(
        math.exp(20)
    )


# Log-probabilities


@given(seed=SEEDS, scale=st.floats(0.1, 10))
def test_logprobs_agree(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = scale * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    ids_BT = torch.randint(11, (2, 5), generator=generator)
    assert_agree(losses.selective_logprobs(logits_BTV, ids_BT), trl_ppo.selective_log_softmax(logits_BTV, ids_BT))
