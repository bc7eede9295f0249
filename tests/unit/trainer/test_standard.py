"""Rows and historical bugs of PPO that no other test names, at the learner as a whole.

The rest stand beside their functions: docs/correctness.md lists each row and each bug with its tests, whose docstrings
name it.
"""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.trainer.test_ppo import accumulated, make_learner, make_samples, rollout_of, settings
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.errors import ModelError
from trainer.experience import make_experience
from trainer.models import load_reward_model, load_tokenizer
from trainer.optimisation import linear_schedule


def test_rewards_of_a_response_add_up_to_its_score_less_the_price_of_its_kl() -> None:
    """Row 1, through the learner: sum over t of r_t = score - beta sum of k1, seen in undiscounted returns."""
    learner = make_learner(settings(kl_beta=0.3, lam=1.0, missing_eos="none", whiten_advantages="off"))
    samples = make_samples()
    experience = make_experience(samples, learner.device)
    before = learner.evaluate(experience)
    targets, _ = learner.shape(experience, before)
    kl_N = ((before.logprobs_NT - experience.ref_logprobs_NT) * experience.mask_NT).sum(1)
    torch.testing.assert_close(targets.returns_NT[:, 0], experience.scores_N - 0.3 * kl_N, atol=1e-4, rtol=1e-5)


def test_the_mean_of_k3_is_finite_where_a_token_is_far_likelier_under_the_reference() -> None:
    """A gap of 120 nats, of which float32 has no exponential: exp(120) - 121 beside what the other tokens have."""
    learner = make_learner(settings())
    samples = [*make_samples()]
    experience = make_experience(samples, learner.device)
    before = learner.evaluate(experience)
    experience.ref_logprobs_NT[experience.mask_NT] = before.logprobs_NT[experience.mask_NT]
    experience.ref_logprobs_NT[0, 0] += 120.0
    gap = float(experience.ref_logprobs_NT[0, 0]) - float(before.logprobs_NT[0, 0])
    _, figures = learner.shape(experience, before)
    expected = (math.exp(gap) - 1 - gap) / int(experience.mask_NT.sum())
    assert figures["kl/k3_token_mean"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("pad_id", [1, 7])
def test_an_end_token_that_is_the_pad_token_too_is_learned_from(pad_id: int) -> None:
    """Row 7. Historical: trl#5303, a mask made of ids took the real EOS for padding."""
    samples = make_samples()
    assert any(sample.response_ids[-1] == 1 for sample in samples)
    experience = make_experience(samples, torch.device("cpu"))
    assert experience.mask_NT.sum(1).tolist() == [len(sample.response_ids) for sample in samples]
    reference, learner = make_learner(settings()), make_learner(settings())
    learner.pad_id = pad_id
    for ours, theirs in zip(accumulated(learner, samples)[:2], accumulated(reference, samples)[:2], strict=True):
        for name, gradient in theirs.items():
            if gradient is not None:
                torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_entropy_and_approx_kl_do_not_change_with_what_shares_the_batch() -> None:
    """Rows 13 and 14: a longer companion makes pads, which count for nothing."""
    learner, samples = make_learner(settings(entropy_coefficient=0.1)), make_samples()
    short, long = samples[1:2] * 2, samples[3:4]
    figures = []
    for rows in (short, (*short, *long)):
        experience = make_experience(rows, learner.device)
        entropies_NT = learner.evaluate(experience).entropies_NT
        assert not entropies_NT[~experience.mask_NT].any()
        figures.append(entropies_NT[0][experience.mask_NT[0]])
    torch.testing.assert_close(*figures, atol=1e-5, rtol=0)


def test_the_learning_rate_falls_linearly_to_zero_after_the_last_step() -> None:
    """Row 19."""
    assert [linear_schedule(step, 4, 0.0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [linear_schedule(step, 10, 0.2) for step in range(4)] == [0.5, 1.0, 1.0, 0.875]
    learner = make_learner(settings(steps=4, learning_rate=8e-3, critic_learning_rate=4e-3))
    for step, share in ((0, 1.0), (3, 0.25)):
        learner.step(rollout_of(*make_samples()), step)
        for name, rate in (("policy", 8e-3), ("critic", 4e-3)):
            assert {group["lr"] for group in learner.optimisers[name].param_groups} == {share * rate}


@pytest.mark.parametrize("how", [{"kl": "adaptive"}, {"advantage": "rloo", "samples_per_prompt": 2}])
def test_a_resumed_learner_has_its_optimisers_controller_and_statistics(how: dict[str, Any], tmp_path: Path) -> None:
    """Row 20, saved in the checkpoint. Historical: NeMo-RL#3171, the optimiser silently re-initialised on resume."""
    options = settings(steps=9, learning_rate=1e-3, critic_learning_rate=1e-3, scale_scores=True, **how)
    learner = make_learner(options)
    for step in range(2):
        learner.step(rollout_of(*make_samples(8, seed=step)), step)
    kept = learner.trained
    state = {name: part.state_dict() for name, part in kept.states.items()}
    path = save_checkpoint(tmp_path, step=2, modules=kept.modules, optimisers=kept.optimisers, state=state)
    unbroken = learner.step(rollout_of(*make_samples(8, seed=2)), 2)

    random.seed(0)
    np.random.seed(0)
    other = make_learner(options, seed=5)
    restored = load_checkpoint(path, modules=other.trained.modules, optimisers=other.trained.optimisers)
    for name, part in other.trained.states.items():
        part.load_state_dict(restored.state[name])
    for name, optimiser in other.optimisers.items():
        assert optimiser.state_dict()["state"], name
    resumed = other.step(rollout_of(*make_samples(8, seed=2)), 2)
    timed = {name for name in unbroken if name.startswith("time/")}
    assert {n: v for n, v in resumed.items() if n not in timed} == {n: v for n, v in unbroken.items() if n not in timed}
    for name, module in learner.trained.modules.items():
        for ours, theirs in zip(other.trained.modules[name].parameters(), module.parameters(), strict=True):
            assert ours.equal(theirs)


def test_a_reward_head_of_two_labels_is_refused_and_never_read_as_one(make_reward_model: Any) -> None:
    """Historical: OpenRLHF#1039, a reward head loaded with num_labels = 2."""
    folder = make_reward_model(num_labels=2)
    with pytest.raises(ModelError):
        load_reward_model(folder, load_tokenizer(folder))


def test_a_step_leaves_what_the_services_said_untouched() -> None:
    """Row 22, of what reaches the trainer: reference log-probabilities and scores."""
    learner, rollout = make_learner(settings()), rollout_of(*make_samples())
    before = copy.deepcopy(rollout)
    learner.step(rollout, 0)
    assert rollout == before
