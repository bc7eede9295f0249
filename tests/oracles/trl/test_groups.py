"""TRL's GRPO and RLOO as oracles, to 1e-6, but for exceptions, which are named and pinned.

Shapes: B responses, T response tokens.
"""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import peers
from tests.oracles.batches import BATCHES, SEEDS, Batch, T, assert_agree, gradient
from tests.oracles.trl.stand_in import trainer_of_trl
from trainer import kl, losses
from trainer.advantages import group_mean_baseline, leave_one_out, masked_mean

peers.require("trl")
trl: Any = importlib.import_module("trl.trainer")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # No test here generates.
    grpo_trainer: Any = importlib.import_module("trl.trainer.grpo_trainer")
GRPO_ADVANTAGES = peers.statements(
    trl.GRPOTrainer._generate_and_score_completions,
    "if self.multi_objective_aggregation",
    "advantages = torch.nan_to_num(",
)
RLOO_ADVANTAGES = peers.statements(
    trl.RLOOTrainer._generate_and_score_completions, "grouped_rewards = ", "advantages = torch.nan_to_num("
)


# The clipped policy loss


def group_loss_of_trl(
    trainer: Any, new_BT: Tensor, old: dict[str, Tensor], advantages: Tensor, mask_BT: Tensor, **settings: Any
) -> Tensor:
    """``trainer._compute_loss`` of responses whose log-probabilities are ``new_BT``."""
    stand_in = trainer_of_trl(
        **{
            "_get_per_token_logps_and_entropies": lambda *_, **__: (new_BT, torch.zeros_like(new_BT), None),
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "importance_sampling_level": "token",
            "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
            "use_vllm": False,
            "current_gradient_accumulation_steps": 1,
            "_entropy_bonus_enabled": False,
            "max_completion_length": T,
            "beta": 0.0,
        }
        | settings
    )
    ids_BT = torch.ones_like(mask_BT, dtype=torch.long)
    inputs = {
        "prompt_ids": ids_BT[:, :1],
        "prompt_mask": ids_BT[:, :1],
        "completion_ids": ids_BT,
        "completion_mask": mask_BT.long(),
        "advantages": advantages,
        "num_items_in_batch": mask_BT.sum(),
        **old,
    }
    return trainer._compute_loss(stand_in, inputs=inputs, model=None)


@given(batch=BATCHES, step=st.sampled_from([0.1, 1.0, 5.0]), beta=st.just(0.0) | st.floats(0.01, 1))
@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_their_token_mean_losses_of_groups_agree_with_the_policy_loss_and_k3(
    loss_type: str, batch: Batch, step: float, beta: float
) -> None:
    """Of log-probabilities, advantages a token, and k3 in the loss where beta is above 0."""
    old_BT, ref_BT, advantages_BT, mask_BT = batch.logprobs(), batch.logprobs(), batch.normal(), batch.mask_BT
    new_BT = (old_BT + batch.normal(step).clamp(-19, 19)).requires_grad_()
    old = {"old_per_token_logps": old_BT, "ref_per_token_logps": ref_BT}
    theirs = group_loss_of_trl(trl.GRPOTrainer, new_BT, old, advantages_BT, mask_BT, loss_type=loss_type, beta=beta)
    ours = losses.policy_loss(new_BT, old_BT, advantages_BT, mask_BT).loss
    if beta:
        ours = ours + beta * masked_mean(kl.k3(new_BT, ref_BT), mask_BT)
    assert_agree(ours, theirs)
    assert_agree(gradient(ours, new_BT), gradient(theirs, new_BT))


@given(batch=BATCHES)
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_exception_their_other_losses_of_groups_are_no_means_over_tokens(loss_type: str, batch: Batch) -> None:
    """``grpo`` is a mean over responses of means over their tokens, so that a token of a long one counts for less;
    ``dr_grpo`` divides by the longest length allowed. The standard's row 11 has the mean over tokens."""
    old_BT, advantages_BT, mask_BT = batch.logprobs(), batch.normal(), batch.mask_BT
    new_BT = old_BT + batch.normal(0.3)
    old = {"old_per_token_logps": old_BT}
    theirs = group_loss_of_trl(trl.GRPOTrainer, new_BT, old, advantages_BT, mask_BT, loss_type=loss_type)
    rows = range(len(batch.lengths))
    each = [
        losses.policy_loss(*(x_BT[b : b + 1] for x_BT in (new_BT, old_BT, advantages_BT, mask_BT))).loss for b in rows
    ]
    if loss_type == "grpo":
        assert_agree(torch.stack(each).mean(), theirs)
    else:
        total = losses.policy_loss(new_BT, old_BT, advantages_BT, mask_BT, denominator=float(mask_BT.numel()))
        assert_agree(total.loss, theirs)


@given(batch=BATCHES)
def test_exception_their_rloo_clips_the_ratio_of_whole_responses(batch: Batch) -> None:
    """Ours clips that of tokens: the same where a whole response is one."""
    old_BT, advantages_B = batch.logprobs(), batch.scores()
    new_BT = old_BT + batch.normal(0.3)
    old_B, new_B = ((x_BT * batch.mask_BT).sum(dim=1) for x_BT in (old_BT, new_BT))
    theirs = group_loss_of_trl(trl.RLOOTrainer, new_BT, {"old_logps": old_B}, advantages_B, batch.mask_BT)
    whole_B1 = torch.ones(len(old_B), 1, dtype=torch.bool)
    assert_agree(losses.policy_loss(new_B[:, None], old_B[:, None], advantages_B[:, None], whole_B1).loss, theirs)


# Advantages within groups


@given(seed=SEEDS, prompts=st.integers(1, 4), samples=st.integers(2, 5))
def test_advantages_within_groups_agree(seed: int, prompts: int, samples: int) -> None:
    """GRPO's without its division, and RLOO's, of samples of a prompt that stand together."""
    batch = Batch(seed, [1] * (prompts * samples))
    rewards_B, groups_B = batch.scores(), torch.arange(prompts).repeat_interleave(samples)
    names = {"rewards": rewards_B, "rewards_per_func": rewards_B[:, None], "num_generations": samples, "torch": torch}
    names |= {"device": rewards_B.device, "unscorable_mask": rewards_B.isnan(), "nanstd": grpo_trainer.nanstd}

    def advantages_of(statements: Any, **settings: Any) -> Tensor:
        variables = names | {"self": SimpleNamespace(**settings)}
        exec(statements, variables)
        return variables["advantages"]

    rloo_B = advantages_of(RLOO_ADVANTAGES, normalize_advantages=False)
    rewards_BT, mask_BT = torch.nn.functional.pad(rewards_B[:, None], (0, T - 1)), batch.mask_BT
    assert_agree(leave_one_out(rewards_BT, mask_BT, groups_B)[:, 0], rloo_B)
    settings = {"multi_objective_aggregation": "sum_then_normalize", "reward_weights": torch.ones(1)}
    plain_B = advantages_of(GRPO_ADVANTAGES, **settings, scale_rewards="none")
    assert_agree(group_mean_baseline(rewards_BT, mask_BT, groups_B, divide_by_std=False)[:, 0], plain_B)
    # Exception: theirs adds 1e-4 to the standard deviation, ours, as verl's, 1e-6.
    scaled_B = advantages_of(GRPO_ADVANTAGES, **settings, scale_rewards="group")
    deviation_B = rewards_B.view(prompts, samples).std(dim=1).repeat_interleave(samples)
    ours_B = group_mean_baseline(rewards_BT, mask_BT, groups_B)[:, 0]
    assert_agree(ours_B * (deviation_B + 1e-6) / (deviation_B + 1e-4), scaled_B)
