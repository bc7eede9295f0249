"""verl as an oracle: on random inputs it agrees with us to 1e-6, but for exceptions, which are named and pinned.

verl leaves numbers on padding, so what it returns is multiplied by the mask. Shapes: B sequences, T response tokens.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.oracles import peers
from tests.oracles.batches import BATCHES, SEEDS, Batch, assert_agree, gradient
from trainer import kl, losses
from trainer.advantages import gae, group_mean_baseline, leave_one_out, masked_mean, masked_var, rewards_to_go, whiten
from trainer.rewards import place_scores, shape_rewards

peers.require("verl")
# verl imports Ray at once, for processes that no function here starts; this is all of it that the import looks at.
ray = types.ModuleType("ray")
ray.ObjectRef = object  # type: ignore[attr-defined]
sys.modules.setdefault("ray", ray)
core_algos: Any = importlib.import_module("verl.trainer.ppo.core_algos")
rollout_correction: Any = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
verl_config: Any = importlib.import_module("verl.workers.config")
tensordict: Any = importlib.import_module("tensordict")
torch_functional: Any = importlib.import_module("verl.utils.torch_functional")
# Its module is the whole trainer on Ray; the function itself needs none of that.
apply_kl_penalty = peers.function_of(
    "verl.trainer.ppo.ray_trainer",
    "apply_kl_penalty",
    core_algos=core_algos,
    masked_mean=torch_functional.masked_mean,
    torch=torch,
)

UNIT = st.floats(0, 1)
CLIPS = st.floats(0.05, 0.5)
# Steps of the policy: from those of one update to ratios far beyond every clip.
STEPS = st.sampled_from([0.1, 1.0, 10.0])


# GAE and whitening


@given(batch=BATCHES, gamma=UNIT, lam=UNIT)
def test_advantages_and_returns_agree(batch: Batch, gamma: float, lam: float) -> None:
    rewards_BT, values_BT, mask_BT = batch.normal(), batch.normal(), batch.mask_BT
    theirs_BT, their_returns_BT = core_algos.compute_gae_advantage_return(
        rewards_BT, values_BT, mask_BT.long(), gamma, lam
    )
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    assert_agree(whiten(advantages_BT, mask_BT), theirs_BT * mask_BT)
    assert_agree(returns_BT, their_returns_BT * mask_BT)


@given(batch=BATCHES, scale=st.floats(0.1, 100), offset=st.floats(-10, 10), shift_mean=st.booleans())
def test_whitening_agrees(batch: Batch, scale: float, offset: float, shift_mean: bool) -> None:
    x_BT, mask_BT = batch.normal(scale) + offset, batch.mask_BT
    assert_agree(masked_mean(x_BT, mask_BT), torch_functional.masked_mean(x_BT, mask_BT))
    assert_agree(masked_var(x_BT, mask_BT), torch_functional.masked_var(x_BT, mask_BT))
    assert_agree(whiten(x_BT, mask_BT, shift_mean), torch_functional.masked_whiten(x_BT, mask_BT, shift_mean) * mask_BT)


def test_exception_a_nan_on_padding_reaches_their_advantages() -> None:
    """They multiply padding by 0, and NaN * 0 is NaN (OpenRLHF#1240); we replace it."""
    batch = Batch(0, [8, 3])
    rewards_BT, values_BT = batch.normal(), batch.normal()
    clean_BT, _ = gae(rewards_BT, values_BT, batch.mask_BT)
    values_BT[~batch.mask_BT] = math.nan
    assert torch.equal(gae(rewards_BT, values_BT, batch.mask_BT)[0], clean_BT)
    theirs_BT, _ = core_algos.compute_gae_advantage_return(rewards_BT, values_BT, batch.mask_BT.long(), 1.0, 0.95)
    assert theirs_BT[1].isnan().all()


def test_exception_they_whiten_two_tokens_and_we_refuse_fewer_than_eight() -> None:
    batch = Batch(0, [1, 1])
    x_BT = batch.normal()
    theirs_BT = torch_functional.masked_whiten(x_BT, batch.mask_BT)
    assert theirs_BT[batch.mask_BT].abs().tolist() == pytest.approx([0.5**0.5] * 2)  # Whatever x holds.
    with pytest.raises(ValueError, match="at least 8 valid tokens, there are 2"):
        whiten(x_BT, batch.mask_BT)


def test_exception_they_step_over_gaps_in_a_response_and_we_refuse_them() -> None:
    """Theirs are tokens of tools between tokens of the policy, which we do not have."""
    batch = Batch(0, [8, 8])
    rewards_BT, values_BT, mask_BT = batch.normal(), batch.normal(), batch.mask_BT.clone()
    mask_BT[0, 3] = False
    _, their_returns_BT = core_algos.compute_gae_advantage_return(rewards_BT, values_BT, mask_BT.long(), 1.0, 0.95)
    without = [t for t in range(8) if t != 3]
    _, returns_BT = gae(rewards_BT[:1, without], values_BT[:1, without], mask_BT[:1, without])
    assert_agree(their_returns_BT[:1, without], returns_BT)
    with pytest.raises(ValueError, match="in rows 0 a valid token follows padding"):
        gae(rewards_BT, values_BT, mask_BT)


# The policy's loss


@given(batch=BATCHES, step=STEPS, clip_range=CLIPS)
def test_the_policy_loss_its_gradient_and_its_figures_agree(batch: Batch, step: float, clip_range: float) -> None:
    """Without the third clip, which theirs has by default: see below."""
    old_BT, advantages_BT, mask_BT = batch.logprobs(), batch.normal(), batch.mask_BT
    new_BT = (old_BT + batch.normal(step).clamp(-19, 19)).requires_grad_()
    ours = losses.policy_loss(new_BT, old_BT, advantages_BT, mask_BT, clip_range)
    loss, figures = _policy_loss(new_BT, old_BT, advantages_BT, mask_BT, clip_range=clip_range)
    assert_agree(ours.loss, loss)
    assert_agree(gradient(ours.loss, new_BT), gradient(loss, new_BT))
    assert_agree(ours.clip_fraction, figures["actor/pg_clipfrac"])
    assert_agree(ours.mean_old_minus_new, figures["actor/ppo_kl"])


@given(batch=BATCHES, cap=st.floats(0.5, 4), processes=st.integers(1, 4), cut=st.integers(1, 5))
def test_weighted_micro_batches_over_the_tokens_of_all_processes_agree(
    batch: Batch, cap: float, processes: int, cut: int
) -> None:
    """Ours divides by the global minibatch's tokens a process; theirs is told tokens and processes."""
    assume(cut < len(batch.lengths))
    old_BT, advantages_BT = batch.logprobs(), batch.normal()
    new_BT, rollout_BT = old_BT + batch.normal(0.3), old_BT + batch.normal(0.3)
    tokens = sum(batch.lengths)
    for part in (slice(0, cut), slice(cut, None)):
        mask_BT = batch.mask_BT[part]
        weights = losses.importance_weights(old_BT[part], rollout_BT[part], mask_BT, cap)
        ours = losses.policy_loss(
            new_BT[part], old_BT[part], advantages_BT[part], mask_BT, 0.2, weights.weights_BT, tokens / processes
        )
        their_weights_BT, _ = rollout_correction.compute_rollout_correction_weights(
            old_BT[part] - rollout_BT[part], mask_BT, rollout_is_threshold=cap
        )
        loss, _ = _policy_loss(
            new_BT[part],
            old_BT[part],
            advantages_BT[part],
            mask_BT,
            their_weights_BT,
            dp_size=processes,
            batch_num_tokens=tokens,
        )
        assert_agree(weights.weights_BT, their_weights_BT)
        assert_agree(ours.loss, loss)


@given(ratio=st.floats(0.1, 20), advantage=st.floats(-5, 5))
def test_exception_their_loss_of_a_bad_action_stops_growing_at_three_times_its_probability(
    ratio: float, advantage: float
) -> None:
    """The dual clip (Ye et al. 2020), on by default in verl: beyond it a bad action that became likelier has gradient
    0. PPO as published, and row 11 of the standard, have none."""
    old_BT, mask_BT = torch.full((1, 1), -30.0, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    new_BT, advantages_BT = old_BT + math.log(ratio), torch.full_like(old_BT, advantage)
    ours = losses.policy_loss(new_BT, old_BT, advantages_BT, mask_BT).loss.item()
    theirs = _policy_loss(new_BT, old_BT, advantages_BT, mask_BT, dual_clip=3.0)[0].item()
    assert theirs == pytest.approx(min(ours, -3 * advantage) if advantage < 0 else ours)


@given(batch=BATCHES, step=STEPS, dual_clip=st.floats(1.1, 5))
def test_the_dual_clip_agrees(batch: Batch, step: float, dual_clip: float) -> None:
    old_BT, advantages_BT, mask_BT = batch.logprobs(), batch.normal(), batch.mask_BT
    new_BT = (old_BT + batch.normal(step)).requires_grad_()
    ours = losses.policy_loss(new_BT, old_BT, advantages_BT, mask_BT, dual_clip=dual_clip).loss
    theirs, _ = _policy_loss(new_BT, old_BT, advantages_BT, mask_BT, dual_clip=dual_clip)
    assert_agree(ours, theirs)
    assert_agree(gradient(ours, new_BT), gradient(theirs, new_BT))


def test_exception_their_figure_of_drift_ends_at_twenty_nats_a_token() -> None:
    """In both losses the ratio ends at exp(20); ours still reports how far the policy really went."""
    old_BT, mask_BT = torch.tensor([[-1.0]]), torch.ones(1, 1, dtype=torch.bool)
    ours = losses.policy_loss(old_BT - 50, old_BT, torch.ones(1, 1), mask_BT)
    _, figures = _policy_loss(old_BT - 50, old_BT, torch.ones(1, 1), mask_BT)
    assert ours.mean_old_minus_new.item() == 50
    assert figures["actor/ppo_kl"] == pytest.approx(20)


def _policy_loss(
    new_BT: torch.Tensor,
    old_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    weights_BT: torch.Tensor | None = None,
    *,
    clip_range: float = 0.2,
    dual_clip: float = 1e12,
    **of_global_batch: int,
) -> tuple[torch.Tensor, dict[str, float]]:
    """verl's, as its actor calls it; 3 is its default of ``dual_clip``."""
    config = verl_config.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio=clip_range,
        clip_ratio_low=clip_range,
        clip_ratio_high=clip_range,
        clip_ratio_c=dual_clip,
        global_batch_info=of_global_batch,
    )
    return core_algos.compute_policy_loss_vanilla(
        old_BT, new_BT, advantages_BT, mask_BT, config.loss_agg_mode, config, weights_BT
    )


# The critic's loss


@given(batch=BATCHES, step=st.sampled_from([0.1, 1.0, 10.0]), clip_range=st.floats(0.05, 2))
def test_the_value_loss_its_gradient_and_its_clip_fraction_agree(batch: Batch, step: float, clip_range: float) -> None:
    old_BT, returns_BT, mask_BT = batch.normal(), batch.normal(2.0), batch.mask_BT
    new_BT = (old_BT + batch.normal(step)).requires_grad_()
    ours = losses.value_loss(new_BT, old_BT, returns_BT, mask_BT, clip_range)
    loss, clip_fraction = core_algos.compute_value_loss(new_BT, returns_BT, old_BT, mask_BT, clip_range)
    assert_agree(ours.loss, loss)
    assert_agree(gradient(ours.loss, new_BT), gradient(loss, new_BT))
    assert_agree(ours.clip_fraction, clip_fraction)
    tokens = 3 * sum(batch.lengths)
    loss, _ = core_algos.compute_value_loss(
        new_BT, returns_BT, old_BT, mask_BT, clip_range, dp_size=2, batch_num_tokens=tokens
    )
    assert_agree(losses.value_loss(new_BT, old_BT, returns_BT, mask_BT, clip_range, tokens / 2).loss, loss)


# KL, its reward and its price


@given(batch=BATCHES)
def test_the_estimators_of_kl_agree(batch: Batch) -> None:
    new_BT = batch.logprobs()
    ref_BT = new_BT + batch.normal().clamp(-10, 2.4)  # Within what theirs counts up to: see below.
    for name, estimator in (("k1", kl.k1), ("k2", kl.k2), ("k3", kl.k3)):
        assert_agree(estimator(new_BT, ref_BT), core_algos.kl_penalty(new_BT, ref_BT, name))


@given(batch=BATCHES, name=st.sampled_from(["k1+", "k3+"]))
def test_the_gradient_that_they_lend_to_other_estimators_is_that_of_k2(batch: Batch, name: str) -> None:
    """verl too found that only k2's is the gradient of the KL: with a plus it takes k2's under another's value."""
    new_BT, ref_BT = batch.logprobs().requires_grad_(), batch.logprobs()
    theirs_BT = core_algos.kl_penalty(new_BT, ref_BT, name)
    assert_agree(gradient(kl.k2(new_BT, ref_BT).sum(), new_BT), gradient(theirs_BT.sum(), new_BT))


def test_exception_their_k3_ends_at_ten_nats() -> None:
    new, ref = torch.tensor([-4.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    assert core_algos.kl_penalty(new, ref, "k3").item() == 10
    assert kl.k3(new, ref).item() == pytest.approx(math.exp(3) - 4)


@given(batch=BATCHES, beta=st.floats(0, 2))
def test_rewards_agree(batch: Batch, beta: float) -> None:
    lp_BT, ref_BT, scores_B, mask_BT = batch.logprobs(), batch.logprobs(), batch.scores(), batch.mask_BT
    rewards_BT, _ = shape_rewards(scores_B, lp_BT, ref_BT, mask_BT, beta)
    placed_BT = place_scores(scores_B, mask_BT)
    assert_agree(rewards_BT, core_algos.compute_rewards(placed_BT, lp_BT, ref_BT, beta) * mask_BT)
    theirs_BT, _ = _apply_kl_penalty(batch, placed_BT, lp_BT, ref_BT, core_algos.FixedKLController(beta))
    assert_agree(rewards_BT, theirs_BT)


@given(
    beta=st.floats(0.001, 1),
    target=st.floats(0.5, 20),
    horizon=st.floats(2000, 1e5),
    updates=st.lists(st.tuples(st.floats(-1, 100), st.integers(1, 2048)), min_size=1, max_size=20),
)
def test_the_adaptive_controller_agrees(
    beta: float, target: float, horizon: float, updates: list[tuple[float, int]]
) -> None:
    ours, theirs = (make(beta, target, horizon) for make in (kl.AdaptiveKlController, core_algos.AdaptiveKLController))
    for measured, episodes in updates:
        ours.update(measured, episodes)
        theirs.update(measured, episodes)
        assert_agree(ours.beta, theirs.value)


def test_exception_their_beta_turns_negative_where_ours_is_refused() -> None:
    ours, theirs = (make(0.1, 6.0, 100.0) for make in (kl.AdaptiveKlController, core_algos.AdaptiveKLController))
    theirs.update(0.0, 1000)
    assert theirs.value == pytest.approx(-0.1)
    with pytest.raises(ValueError, match=r"must be above clip \* n_episodes = 200"):
        ours.update(0.0, 1000)


def test_exception_their_controller_is_fed_the_mean_over_tokens() -> None:
    """A target of LMHP's, 6 nats a sequence, is there out of reach for 8 tokens at 1 nat each, and beta falls; the
    standard's row 20 sums over tokens (historical: trlx#361), so 8 is above 6 and beta rises."""
    batch = Batch(0, [8, 8])
    ref_BT = batch.logprobs()
    ours, theirs = (make(0.1, 6.0, 1e4) for make in (kl.AdaptiveKlController, core_algos.AdaptiveKLController))
    placed_BT = torch.zeros_like(ref_BT)
    _, measured = _apply_kl_penalty(batch, placed_BT, ref_BT + 1, ref_BT, theirs)
    assert measured == pytest.approx(1.0)
    assert theirs.value < 0.1
    ours.update(kl.sequence_kl(kl.k1(ref_BT + 1, ref_BT), batch.mask_BT).mean().item(), 2)
    assert ours.beta > 0.1


def test_exception_they_let_k3_be_the_reward_and_we_refuse_it() -> None:
    batch = Batch(0, [8, 4])
    lp_BT, ref_BT = batch.logprobs(), batch.logprobs()
    rewards_BT, _ = _apply_kl_penalty(
        batch, torch.zeros_like(lp_BT), lp_BT, ref_BT, core_algos.FixedKLController(0.1), "low_var_kl"
    )
    assert_agree(rewards_BT, -0.1 * kl.k3(lp_BT, ref_BT).clamp(max=10) * batch.mask_BT)
    with pytest.raises(ValueError, match="cannot be the reward"):
        kl.check_kl_placement(kl.KlEstimator.K3, "reward")


def _apply_kl_penalty(
    batch: Batch, placed_BT: torch.Tensor, lp_BT: torch.Tensor, ref_BT: torch.Tensor, controller: Any, name: str = "kl"
) -> tuple[torch.Tensor, float]:
    """verl's rewards, and the KL that it feeds its controller with."""
    tensors = {
        "response_mask": batch.mask_BT,
        "token_level_scores": placed_BT,
        "old_log_probs": lp_BT,
        "ref_log_prob": ref_BT,
    }
    data = types.SimpleNamespace(batch=tensordict.TensorDict(tensors, batch_size=[len(batch.lengths)]))
    data, metrics = apply_kl_penalty(data, controller, kl_penalty=name)
    return data.batch["token_level_rewards"], metrics["actor/reward_kl_penalty"]


# Importance weights, log-probabilities, entropy


@given(batch=BATCHES, drift=st.sampled_from([0.01, 0.3, 3.0]), cap=st.floats(0.5, 4))
def test_importance_weights_and_their_figures_agree(batch: Batch, drift: float, cap: float) -> None:
    old_BT, mask_BT = batch.logprobs(), batch.mask_BT
    rollout_BT = old_BT + batch.normal(drift)
    ours = losses.importance_weights(old_BT, rollout_BT, mask_BT, cap)
    weights_BT, figures = rollout_correction.compute_rollout_correction_weights(
        old_BT - rollout_BT, mask_BT, rollout_is_threshold=cap
    )
    assert_agree(ours.weights_BT, weights_BT)
    assert_agree(ours.ess, figures["rollout_is_eff_sample_size"])
    assert_agree(ours.truncated_fraction, figures["rollout_is_ratio_fraction_high"])
    assert_agree(ours.kl, rollout_correction.compute_offpolicy_metrics(old_BT, rollout_BT, mask_BT)["kl"])


def test_exception_their_mean_weight_is_of_the_truncated_ones() -> None:
    """It ends at the cap, where ours is of the ratios, whose expectation is 1 however far the two policies are."""
    rollout_BT, mask_BT = torch.full((1, 2), -1.0, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    old_BT = rollout_BT + math.log(5)
    ours = losses.importance_weights(old_BT, rollout_BT, mask_BT, cap=2.0)
    _, figures = rollout_correction.compute_rollout_correction_weights(old_BT - rollout_BT, mask_BT)
    assert ours.mean.item() == pytest.approx(5)
    assert figures["rollout_is_mean"] == pytest.approx(2)


@given(seed=SEEDS, scale=st.floats(0.1, 10))
def test_logprobs_and_entropies_agree(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = scale * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    ids_BT = torch.randint(11, (2, 5), generator=generator)
    assert_agree(
        losses.selective_logprobs(logits_BTV, ids_BT), torch_functional.logprobs_from_logits(logits_BTV, ids_BT)
    )
    assert_agree(losses.entropy_from_logits(logits_BTV), torch_functional.entropy_from_logits(logits_BTV))


# Advantages without a critic

# Groups of 2 to 4 samples of a prompt, in any order.
GROUPS = st.lists(st.integers(2, 4), min_size=2, max_size=4).flatmap(
    lambda sizes: st.permutations([group for group, size in enumerate(sizes) for _ in range(size)])
)


@given(seed=SEEDS, groups=GROUPS)
def test_advantages_within_groups_agree(seed: int, groups: list[int]) -> None:
    batch = Batch(seed, [1 + (seed + 3 * i) % 8 for i in range(len(groups))])
    rewards_BT, mask_BT, groups_B = batch.normal(), batch.mask_BT, torch.tensor(groups)
    theirs = {"token_level_rewards": rewards_BT * mask_BT, "response_mask": mask_BT, "index": np.array(groups)}
    assert_agree(leave_one_out(rewards_BT, mask_BT, groups_B), core_algos.compute_rloo_outcome_advantage(**theirs)[0])
    for by_std in (True, False):
        expected_BT, _ = core_algos.compute_grpo_outcome_advantage(**theirs, norm_adv_by_std_in_grpo=by_std)
        assert_agree(group_mean_baseline(rewards_BT, mask_BT, groups_B, by_std), expected_BT)
    assume(sum(batch.lengths) >= 8)
    above_BT = group_mean_baseline(rewards_BT, mask_BT, groups_B, divide_by_std=False)
    expected_BT, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(**theirs)
    assert_agree(whiten(above_BT, mask_BT), expected_BT)


@given(batch=BATCHES, gamma=UNIT)
def test_rewards_to_go_agree(batch: Batch, gamma: float) -> None:
    rewards_BT, mask_BT = batch.normal(), batch.mask_BT
    config = types.SimpleNamespace(gamma=gamma)
    advantages_BT, returns_BT = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        rewards_BT, mask_BT.long(), config
    )
    ours_BT = rewards_to_go(rewards_BT, mask_BT, gamma)
    assert_agree(ours_BT, returns_BT)
    assert_agree(whiten(ours_BT, mask_BT), advantages_BT)


def test_exception_a_response_alone_in_its_group_has_its_own_reward_for_advantage_there_and_0_here() -> None:
    """Where all others of a prompt failed there is nothing to compare with, so nothing to learn."""
    rewards_BT, mask_BT = torch.tensor([[3.0], [1.0], [2.0]]), torch.ones(3, 1, dtype=torch.bool)
    theirs = {"token_level_rewards": rewards_BT, "response_mask": mask_BT, "index": np.array([0, 1, 1])}
    groups_B = torch.tensor([0, 1, 1])
    for ours_BT, theirs_BT in (
        (leave_one_out(rewards_BT, mask_BT, groups_B), core_algos.compute_rloo_outcome_advantage(**theirs)[0]),
        (group_mean_baseline(rewards_BT, mask_BT, groups_B), core_algos.compute_grpo_outcome_advantage(**theirs)[0]),
    ):
        assert ours_BT[0].item() == 0
        assert theirs_BT[0].item() == pytest.approx(3.0, rel=1e-5)
        assert_agree(ours_BT[1:], theirs_BT[1:])
