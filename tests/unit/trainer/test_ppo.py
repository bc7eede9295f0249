"""One step of PPO against the same step done naively in float64, and PPO against its closed form.

Shapes: N samples, T response tokens.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from quartet.client import NotReadyError, UnavailableError
from tests.conftest import llama_config
from trainer.ahead import RolloutsAhead
from trainer.checkpoint import StopRequest
from trainer.critic import Critic
from trainer.errors import CheckpointError, DivergedError, RolloutError, ServicesError, TrainerError
from trainer.experience import make_experience
from trainer.models import disable_dropout
from trainer.ppo import Learner, time_metrics, train
from trainer.ppo_config import PPOSettings
from trainer.ppo_run import PPORun
from trainer.rollout import Rollout, Sample
from trainer.shaping import explained_variance, score_metrics
from trainer.stop_rule import StopRule
from trainer.tracking import read_metrics


def settings(**changes: Any) -> PPOSettings:
    values = {"model": "m", "prompts": ("p",), "output": "o", "normalise_reward": "off", "missing_eos_value": 0.7}
    return PPOSettings(**(values | changes))


def make_learner(options: PPOSettings, *, seed: int = 0, normalisation: Any = None, **config: Any) -> Learner:
    """A learner of a tiny Llama and a critic with a head that is not zero."""
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(llama_config(**config))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    body = copy.deepcopy(policy.model)
    critic = Critic(body, nn.Linear(policy.config.hidden_size, 1))
    for model in (policy, critic):
        disable_dropout(model)
        model.train()
    run = SimpleNamespace(
        settings=options,
        device=torch.device("cpu"),
        tokenizer=SimpleNamespace(eos_token_id=1),
        normalisation=normalisation,
        policy=policy,
        critic=critic if options.has_critic else None,
    )
    return Learner(run)  # type: ignore[arg-type]


def make_samples(count: int = 6, seed: int = 1) -> tuple[Sample, ...]:
    """Samples of uneven length, with log-probabilities that are near the policy's only by chance."""
    random = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        prompt, response = random.integers(3, 300, 2 + index % 3), random.integers(3, 300, 1 + 3 * (index % 4))
        finished = index % 2 == 0
        if finished:
            response[-1] = 1
        samples.append(
            Sample(
                index=index,
                prompt_ids=tuple(prompt.tolist()),
                response_ids=tuple(response.tolist()),
                logprobs=tuple(random.normal(-6, 1.5, len(response)).tolist()),
                ref_logprobs=tuple(random.normal(-6, 1.5, len(response)).tolist()),
                score=float(random.normal()),
                finished=finished,
            )
        )
    return tuple(samples)


def naive_gradients(learner: Learner, samples: tuple[Sample, ...], options: PPOSettings) -> tuple[dict, dict, dict]:
    """The first update's gradients and figures: one sequence at a time, float64, loops, the formulas as written."""
    policy, critic = copy.deepcopy(learner.policy).double(), copy.deepcopy(learner.critic).double()
    logprobs, values, entropies = [], [], []
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        table = (policy(ids).logits[0] / options.temperature).log_softmax(-1)
        hidden = critic.body(ids).last_hidden_state[0]
        value = hidden @ critic.head.weight.double()[0] + critic.head.bias.double()
        start = len(sample.prompt_ids)
        logprobs.append([table[start + t - 1, token] for t, token in enumerate(sample.response_ids)])
        entropies += (-(table.exp() * table).sum(-1)[start - 1 : -1]).tolist()
        values.append([value[start + t - 1] for t in range(len(sample.response_ids))])
    advantages, returns, kls = [], [], []
    for sample, logps, vals in zip(samples, logprobs, values, strict=True):
        score = sample.score - (0.0 if sample.finished else options.missing_eos_value)
        kl = [a.item() - b for a, b in zip(logps, sample.ref_logprobs, strict=True)]
        rewards = [-options.kl_beta * k for k in kl]
        rewards[-1] += score
        advantage, tail = [0.0] * len(kl), 0.0
        for t in reversed(range(len(kl))):
            following = vals[t + 1].item() if t + 1 < len(kl) else 0.0
            tail = rewards[t] + following - vals[t].item() + options.lam * tail
            advantage[t] = tail
        advantages.append(advantage)
        returns.append([a + v.item() for a, v in zip(advantage, vals, strict=True)])
        kls.append(sum(kl))
    flat = np.array([a for row in advantages for a in row])
    mean, std = flat.mean(), flat.std(ddof=1)
    tokens = len(flat)
    loss_policy, loss_value = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for sample, logps, vals, advantage, ret in zip(samples, logprobs, values, advantages, returns, strict=True):
        for logp, value, a, r, rollout in zip(logps, vals, advantage, ret, sample.logprobs, strict=True):
            weight = min(math.exp(logp.item() - rollout), options.importance_cap)
            # At the old policy the ratio is 1, so clipping does nothing and the gradient is that of -A log pi.
            ratio = (logp - logp.detach()).exp()
            loss_policy = loss_policy - weight * (a - mean) / std * ratio / tokens
            loss_value = loss_value + 0.5 * (value - r) ** 2 / tokens
    loss_policy.backward()
    (options.value_coefficient * loss_value).backward()
    figures = {"kl/sequence_mean": np.mean(kls), "value/loss": loss_value.item(), "policy/loss": loss_policy.item()}
    figures["policy/entropy_mean"] = np.mean(entropies)
    return (
        {name: p.grad for name, p in policy.named_parameters()},
        {name: p.grad for name, p in critic.named_parameters()},
        figures,
    )


def accumulated(learner: Learner, samples: tuple[Sample, ...]) -> tuple[dict, dict, dict[str, float]]:
    """The learner's own gradients of the first minibatch, the whole rollout."""
    experience = make_experience(samples, learner.device)
    targets, metrics = learner.shape(experience, learner.evaluate(experience))
    from trainer.batching import micro_batches

    tokens = float(experience.mask_NT.sum())
    sums: dict[str, float] = {}
    for rows in micro_batches(experience.lengths, learner.settings.micro_batch_tokens):
        figures, ratio = learner.accumulate(experience, targets, rows, tokens)
        assert ratio < 1e-5
        sums = {name: sums.get(name, 0.0) + value for name, value in figures.items()}
    return (
        {name: p.grad for name, p in learner.policy.named_parameters()},
        {name: p.grad for name, p in learner.critic.named_parameters()},
        metrics | sums,
    )


def assert_close(ours: dict, theirs: dict, tolerance: float) -> None:
    scale = max(float(grad.abs().max()) for grad in theirs.values() if grad is not None)
    assert scale > 1e-4
    for name, grad in theirs.items():
        if grad is None:
            assert ours[name] is None or not ours[name].any()
        else:
            assert float((ours[name].double() - grad.double()).abs().max()) < tolerance * scale, name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_and_figures_of_a_step_equal_the_naive_ones(temperature: float) -> None:
    options = settings(temperature=temperature, kl_beta=0.1)
    learner = make_learner(options)
    samples = make_samples()
    policy_naive, critic_naive, figures = naive_gradients(learner, samples, options)
    policy_ours, critic_ours, metrics = accumulated(learner, samples)
    assert_close(policy_ours, policy_naive, 1e-4)
    assert_close(critic_ours, critic_naive, 1e-4)
    for name, value in figures.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_and_entropy_in_the_loss_add_their_naive_gradients(estimator: str) -> None:
    options = settings(
        kl_in="loss", kl_estimator=estimator, kl_beta=0.3, entropy_coefficient=0.2, micro_batch_tokens=30
    )
    learner, samples = make_learner(options), make_samples()
    policy_naive, _, figures = naive_gradients(learner, samples, settings(kl_beta=0.0))
    policy, tokens = copy.deepcopy(learner.policy).double(), sum(len(sample.response_ids) for sample in samples)
    paid, entropy = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for sample in samples:
        table = policy(torch.tensor([[*sample.prompt_ids, *sample.response_ids]])).logits[0].log_softmax(-1)
        start = len(sample.prompt_ids)
        for t, token in enumerate(sample.response_ids):
            logps = table[start + t - 1]
            difference = logps[token] - sample.ref_logprobs[t]
            kl = difference**2 / 2 if estimator == "k2" else (-difference).exp() - 1 + difference
            paid = paid + min(math.exp(logps[token].item() - sample.logprobs[t]), 2.0) * kl / tokens
            entropy = entropy - (logps.exp() * logps).sum() / tokens
    (0.3 * paid - 0.2 * entropy).backward()
    expected = {name: policy_naive[name] + parameter.grad for name, parameter in policy.named_parameters()}
    ours, _, metrics = accumulated(learner, samples)
    assert_close(ours, expected, 1e-4)
    assert metrics["policy/kl_loss"] == pytest.approx(paid.item(), rel=1e-4)
    assert metrics["policy/entropy_bonus"] == pytest.approx(0.2 * entropy.item(), rel=1e-4)
    assert metrics["policy/loss"] == pytest.approx(figures["policy/loss"], rel=1e-3)
    # What it is measured by stays k1, and its price what it was.
    assert metrics["kl/sequence_mean"] == pytest.approx(figures["kl/sequence_mean"], rel=1e-4)
    assert metrics["kl/beta"] == 0.3


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 10_000])
def test_gradients_do_not_depend_on_how_a_minibatch_is_cut(micro_batch_tokens: int) -> None:
    samples = make_samples(8)
    reference = accumulated(make_learner(settings(micro_batch_tokens=40)), samples)
    ours = accumulated(make_learner(settings(micro_batch_tokens=micro_batch_tokens)), samples)
    for index in (0, 1):
        assert_close(ours[index], reference[index], 1e-5)


def test_a_step_goes_over_every_sample_once_an_epoch_and_takes_a_fresh_order() -> None:
    """Row 19."""
    learner = make_learner(settings(minibatches=3, epochs=4))
    batches = list(learner.minibatches(10, step=5))
    assert [len(batch) for batch in batches] == [4, 3, 3] * 4
    epochs = [[*itertools.chain(*batches[i : i + 3])] for i in range(0, 12, 3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert batches == list(learner.minibatches(10, step=5)) != list(learner.minibatches(10, step=6))


def test_adams_epsilon_is_1e_5_unless_told_otherwise() -> None:
    """Row 18."""
    for options, eps in ((settings(), 1e-5), (settings(adam_eps=1e-8), 1e-8)):
        optimisers = make_learner(options).optimisers
        assert set(optimisers) == {"policy", "critic"}
        assert {group["eps"] for optimiser in optimisers.values() for group in optimiser.param_groups} == {eps}


def test_scores_are_normalised_then_clipped_then_penalised() -> None:
    stats = SimpleNamespace(mean=2.0, std=0.5)
    samples = make_samples(4)
    raw = [sample.score for sample in samples]
    for mode, value, expected in (
        ("none", 0.7, lambda x, done: x),
        ("subtract", 0.7, lambda x, done: x if done else x - 0.7),
        ("replace", -5.0, lambda x, done: x if done else -5.0),
    ):
        learner = make_learner(settings(missing_eos=mode, missing_eos_value=value, score_clip=3.0), normalisation=stats)
        final = learner.shaping.final_scores(make_experience(samples, learner.device)).tolist()
        clipped = [min(max((score - 2.0) / 0.5, -3.0), 3.0) for score in raw]
        assert final == pytest.approx([expected(x, s.finished) for x, s in zip(clipped, samples, strict=True)])


def test_bypass_takes_the_engines_log_probabilities_as_the_old_ones() -> None:
    samples = make_samples()
    learner = make_learner(settings(correction="bypass"))
    experience = make_experience(samples, learner.device)
    targets, metrics = learner.shape(experience, learner.evaluate(experience))
    assert targets.weights is None
    assert "rollout/ess" not in metrics
    assert torch.equal(targets.old_logprobs_NT, experience.rollout_logprobs_NT)


def test_a_step_lowers_its_own_loss_and_steers_the_price_of_kl_after_using_it() -> None:
    options = settings(kl="adaptive", kl_beta=0.15, learning_rate=1e-3, critic_learning_rate=1e-3, steps=10)
    learner = make_learner(options)
    rollout = Rollout(samples=make_samples(16), failures=(), weights_version=0, duration_s=2.0, service_work_s=1.5)
    metrics = learner.step(rollout, 0)
    assert metrics["kl/beta"] == 0.15
    kl = metrics["kl/sequence_mean"]
    assert learner.kl.beta == pytest.approx(0.15 * (1 + max(-0.2, min(0.2, kl / 6 - 1)) * 16 / 10_000))
    assert metrics["policy/first_ratio_max_abs_log"] < 1e-5
    assert metrics["policy/optimiser_steps"] == 4
    assert learner.step(rollout, 1)["value/loss"] < metrics["value/loss"]


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.1])
@pytest.mark.parametrize("correction", ["decoupled", "bypass"])
@pytest.mark.parametrize(("micro_batch_tokens", "minibatches", "spared"), [(10_000, 1, 1), (40, 1, 1), (10_000, 2, 0)])
def test_a_step_of_one_minibatch_learns_its_first_micro_batch_from_the_pass_that_evaluated_it(
    micro_batch_tokens: int, minibatches: int, spared: int, correction: str, entropy_coefficient: float
) -> None:
    options = settings(
        micro_batch_tokens=micro_batch_tokens,
        minibatches=minibatches,
        correction=correction,
        entropy_coefficient=entropy_coefficient,
        epochs=3,
        learning_rate=1e-3,
    )
    found = []
    for keeps in (True, False):
        learner, passes = make_learner(options), 0
        own_pass, evaluate = learner._pass, learner.evaluate

        def counted(*arguments: Any, own_pass: Any = own_pass, **named: Any) -> Any:
            nonlocal passes
            passes += 1
            return own_pass(*arguments, **named)

        learner._pass = counted
        if not keeps:
            learner.evaluate = lambda experience, keep_first, evaluate=evaluate: evaluate(experience)
        metrics = learner.step(rollout_of(*make_samples(8)), 0)
        assert learner._kept is None
        times = {name: metrics.pop(name) for name in ("time/forward_s", "time/update_s")}
        assert min(times.values()) > 0
        found.append((passes, metrics, learner.policy.state_dict()))
    (passes, metrics, weights), (plain_passes, plain_metrics, plain_weights) = found
    assert plain_passes - passes == spared
    assert metrics == pytest.approx(plain_metrics, rel=1e-5, abs=1e-7)
    for name, value in weights.items():
        torch.testing.assert_close(value, plain_weights[name], rtol=0, atol=1e-6)


def test_a_step_ends_before_the_minibatch_at_which_the_policy_has_gone_too_far() -> None:
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 1e-3, "epochs": 6, "minibatches": 2}
    free = make_learner(settings(**rates))
    whole = free.step(rollout_of(*make_samples(16)), 0)
    assert (whole["policy/optimiser_steps"], whole["policy/stopped_early"]) == (12, 0)
    bound = 0.3 * whole["policy/approx_kl"]
    held = make_learner(settings(**rates, max_update_kl=bound))
    found = held.step(rollout_of(*make_samples(16)), 0)
    taken = int(found["policy/optimiser_steps"])
    assert 1 <= taken < 12
    assert found["policy/stopped_early"] == 1
    # As if it had stopped after so many of them: the minibatch that went too far left no gradient behind.
    cut = make_learner(settings(**rates))
    batches = list(cut.minibatches(16, 0))[:taken]
    cut.minibatches = lambda count, step: iter(batches)  # type: ignore[method-assign]
    cut.step(rollout_of(*make_samples(16)), 0)
    for name, parameter in held.policy.named_parameters():
        assert parameter.equal(dict(cut.policy.named_parameters())[name])
        assert parameter.grad is None
    # It had indeed gone too far.
    experience = make_experience(make_samples(16), held.device)
    targets, _ = cut.shape(experience, make_learner(settings()).evaluate(experience))
    rows = list(held.minibatches(16, 0))[taken]
    figures, _ = cut.accumulate(experience, targets, rows, float(experience.mask_NT[rows].sum()))
    assert figures["policy/approx_kl"] > bound


def test_an_update_that_has_gone_too_far_before_it_began_learns_nothing() -> None:
    learner = make_learner(settings(correction="bypass", max_update_kl=1e-4))
    before = copy.deepcopy(learner.policy.state_dict())
    metrics = learner.step(rollout_of(*make_samples()), 0)
    assert (metrics["policy/optimiser_steps"], metrics["policy/stopped_early"]) == (0, 1)
    assert all(value.equal(before[name]) for name, value in learner.policy.state_dict().items())


def test_ppo_max_scales_and_clips_scores_and_clips_advantages_and_keeps_its_statistics() -> None:
    options = settings(
        scale_scores=True, score_clip=0.9, advantage_clip=0.5, missing_eos="none", length_penalty=0.1,
        length_penalty_after=4,
    )  # fmt: skip
    learner = make_learner(options)
    rollouts = [make_samples(6, seed=1), make_samples(8, seed=2)]
    seen: list[float] = []
    for samples in rollouts:
        experience = make_experience(samples, learner.device)
        targets, metrics = learner.shape(experience, learner.evaluate(experience))
        seen += [sample.score for sample in samples]
        std = np.std(seen, ddof=1)
        expected = [min(max(s.score / std, -0.9), 0.9) - 0.1 * max(0, len(s.response_ids) - 4) for s in samples]
        assert metrics["reward/final_mean"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert float(targets.advantages_NT.abs().max()) == 0.5
    other = make_learner(options)
    for name, state in learner.trained.states.items():
        other.trained.states[name].load_state_dict(state.state_dict())
    assert other.shaping.scale.moments == learner.shaping.scale.moments


def test_the_time_of_a_step_adds_up() -> None:
    rollout = Rollout(samples=make_samples(4), failures=("x",), weights_version=3, duration_s=2.0, service_work_s=1.5)
    work = {"time/forward_s": 0.5, "time/update_s": 1.0}
    found = time_metrics(rollout, work, waited_s=2.0, publish_s=0.25, step_s=4.0)
    assert found["time/other_s"] == pytest.approx(0.25)
    assert found["time/rpc_s"] == pytest.approx(0.75)
    # Ahead of training, 1.4 of its 2 seconds passed while the trainer was at work.
    ahead = time_metrics(rollout, work, waited_s=0.6, publish_s=0.25, step_s=2.6)
    assert ahead["time/other_s"] == pytest.approx(0.25)
    assert ahead["time/service_work_s"] == pytest.approx(0.1)
    assert ahead["time/rpc_s"] == pytest.approx(0.75)
    assert found["throughput/generated_tokens_per_s"] == rollout.generated_tokens / 2.0


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"advantage": "rloo", "samples_per_prompt": 4, "whiten_advantages": "off"},
    ],
    ids=["gae", "rloo"],
)
def test_ppo_reaches_the_closed_form_optimum(how: dict[str, Any]) -> None:
    """pi*(y) = ref(y) exp(r(y) / beta) / Z has the value beta log Z; all 36 responses of two tokens are enumerated."""
    beta, tokens = 0.3, 6
    options = settings(
        kl_beta=beta, learning_rate=4e-3, critic_learning_rate=4e-3, missing_eos="none", steps=200, minibatches=2,
        correction="bypass", **how,
    )  # fmt: skip
    learner = make_learner(options, seed=3, vocab_size=tokens, num_hidden_layers=1, hidden_size=32)
    policy = learner.policy
    reference = copy.deepcopy(policy)
    responses = list(itertools.product(range(tokens), repeat=2))
    reward_of = dict(zip(responses, np.random.default_rng(0).normal(size=len(responses)).tolist(), strict=True))
    # Two tokens: after `a` and after `a a` one layer with rotary positions is in the same state, and could not choose.
    prompt = (2, 3)

    @torch.no_grad()
    def distribution(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(36, 2) log-probabilities of both tokens of every response, and (36,) of the response."""
        ids = torch.tensor([[*prompt, *response] for response in responses])
        table = model(ids).logits.double().log_softmax(-1)
        logp = torch.stack([table[:, t + 1].gather(1, ids[:, t + 2 : t + 3])[:, 0] for t in range(2)], dim=1)
        return logp, logp.sum(dim=1)

    ref_tokens, ref = distribution(reference)
    r = torch.tensor([reward_of[response] for response in responses], dtype=torch.float64)
    optimum = float(beta * torch.logsumexp(ref + r / beta, dim=0))

    def value() -> float:
        logp = distribution(policy)[1]
        return float((logp.exp() * (r - beta * (logp - ref))).sum())

    assert value() < 0.5 * optimum
    random = np.random.default_rng(1)
    for step in range(options.steps):
        logp_tokens, logp = distribution(policy)
        drawn = random.choice(len(responses), size=512, p=logp.exp().numpy() / logp.exp().sum().item())
        samples = tuple(
            Sample(
                index=i,
                prompt_ids=prompt,
                response_ids=responses[y],
                logprobs=tuple(logp_tokens[y].tolist()),
                ref_logprobs=tuple(ref_tokens[y].tolist()),
                score=reward_of[responses[y]],
                finished=True,
            )
            for i, y in enumerate(drawn)
        )
        learner.step(Rollout(samples=samples, failures=(), weights_version=0, duration_s=1, service_work_s=1), step)
    assert value() == pytest.approx(optimum, rel=0.02)
    assert value() <= optimum + 1e-9


def test_the_interval_of_the_reward_is_over_prompts() -> None:
    samples = tuple(
        replace(sample, prompt_ids=(5, 6 + index // 4), score=float(index // 4) + 0.01 * (index % 4))
        for index, sample in enumerate(make_samples(12))
    )
    found = score_metrics(make_experience(samples, torch.device("cpu")))
    means = np.array([0.015, 1.015, 2.015])
    assert found["reward/score_mean"] == pytest.approx(1.015, abs=1e-6)
    assert found["reward/score_ci95"] == pytest.approx(4.302653 * means.std(ddof=1) / 3**0.5, rel=1e-5)


def rollout_of(*samples: Sample) -> Rollout:
    return Rollout(samples=samples, failures=(), weights_version=0, duration_s=1.0, service_work_s=1.0)


def test_a_rollout_of_fewer_than_8_tokens_is_refused_with_advice_and_nothing_is_learned() -> None:
    learner = make_learner(settings())
    before = copy.deepcopy(learner.policy.state_dict())
    short = Sample(
        index=0, prompt_ids=(5, 6), response_ids=(1,), logprobs=(-1.0,), ref_logprobs=(-1.2,), score=0.1, finished=True
    )
    with pytest.raises(RolloutError, match=r"the 7 responses .* have 7 tokens together, .*--prompts-per-step"):
        learner.step(rollout_of(*[short] * 7), 0)
    assert all(value.equal(before[name]) for name, value in learner.policy.state_dict().items())
    assert math.isfinite(learner.step(rollout_of(*[short] * 8), 0)["policy/loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": (-1.0, math.nan)}, "the policy service gave the log-probability nan for a response of 2 tokens"),
        ({"ref_logprobs": (-math.inf, -1.0)}, "the reference service gave the log-probability -inf"),
        ({"score": math.nan}, "the reward service gave the score nan"),
    ],
)
def test_a_number_of_a_service_that_is_none_is_named(changes: dict[str, Any], message: str) -> None:
    whole = {
        "index": 0, "prompt_ids": (5,), "response_ids": (7, 1), "logprobs": (-1.0, -1.0),
        "ref_logprobs": (-1.0, -1.0), "score": 0.5, "finished": True,
    }  # fmt: skip
    samples = [Sample(**whole)] * 5 + [Sample(**(whole | changes))]
    with pytest.raises(RolloutError, match=message):
        make_learner(settings()).step(rollout_of(*samples), 0)


def test_a_policy_that_holds_nan_has_diverged() -> None:
    learner = make_learner(settings())
    with torch.no_grad():
        learner.policy.lm_head.weight[7] = math.nan
    with pytest.raises(DivergedError, match=r"^step 4: a log-probability .* every one of its 6 rows \(sample 1 of"):
        learner.step(rollout_of(*make_samples()), 3)


@pytest.mark.parametrize("correction", ["decoupled", "bypass"])
def test_the_largest_difference_between_engine_and_trainer_is_a_figure_of_the_step(correction: str) -> None:
    learner = make_learner(settings(correction=correction))
    samples = make_samples()
    experience = make_experience(samples, learner.device)
    own_NT = learner.evaluate(experience).logprobs_NT
    exact = [
        Sample(**(vars(sample) | {"logprobs": tuple(row[: len(sample.response_ids)].tolist())}))
        for sample, row in zip(samples, own_NT, strict=True)
    ]
    off = Sample(**(vars(exact[3]) | {"logprobs": (*exact[3].logprobs[:-1], exact[3].logprobs[-1] - 0.25)}))
    for given, expected in ((exact, 0.0), ([*exact[:3], off, *exact[4:]], 0.25)):
        experience = make_experience(given, learner.device)
        _, metrics = learner.shape(experience, learner.evaluate(experience))
        assert metrics["rollout/logprob_max_abs_difference"] == pytest.approx(expected, abs=1e-6)


class ScriptedRun:
    """What ``train`` needs of a run, without services; publishing fails at the step ``fail_at``."""

    def __init__(self, output: Path, *, fail_at: int | None = None, resumed_step: int | None = None) -> None:
        learner = make_learner(settings())
        self.settings = settings(steps=4, output=str(output))
        self.device, self.normalisation = learner.device, None
        self.tokenizer = SimpleNamespace(eos_token_id=1)
        self.policy, self.critic = learner.policy, learner.critic
        self.step, self.resumed_step = resumed_step or 0, resumed_step
        self.fail_at = fail_at
        self.saved: list[int] = []
        self.stop_rule = StopRule()
        self.evaluations = SimpleNamespace(
            before=lambda step: {}, between=lambda step: {"eval/score_mean": 1.0}, after=lambda step: {}
        )

    def restore(self, trained: Any) -> None: ...

    def as_step(self) -> Any:
        return contextlib.nullcontext()

    def collect(self) -> Rollout:
        return rollout_of(*make_samples(8))

    def finish_rollout(self) -> float:
        return 0.0

    def advance(self, rollout: Rollout) -> dict[str, float]:
        self.step += 1
        return {"step": self.step, "episodes": 8 * self.step}

    def publish(self, weights: Any) -> None:
        if self.step == self.fail_at:
            raise NotReadyError("gone", service="policy weights service")

    def save(self, trained: Any) -> float:
        self.saved.append(self.step)
        return 0.0

    def save_when_due(self, trained: Any) -> float:
        return 0.0

    def interrupted(self, error: Exception, trained: Any) -> ServicesError:
        self.save(trained)
        return ServicesError(str(error))


def test_a_step_whose_publication_fails_is_in_the_log_as_it_is_in_the_checkpoint(tmp_path: Path) -> None:
    broken = ScriptedRun(tmp_path, fail_at=2)
    with pytest.raises(ServicesError, match="policy weights service: gone"):
        train(broken, StopRequest())  # type: ignore[arg-type]
    assert broken.saved == [2]
    train(ScriptedRun(tmp_path, resumed_step=2), StopRequest())  # type: ignore[arg-type]
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["episodes"] for record in records] == [8, 16, 24, 32]
    assert all("policy/loss" in record for record in records)
    # How long it took is not known of the second.
    assert ["time/publish_s" in record for record in records] == [True, False, True, True]


def test_a_rollout_that_can_not_be_learned_from_ends_the_run_saved_and_not_logged(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path)
    rollouts = [run.collect(), rollout_of(*make_samples(1))]
    run.collect = lambda: rollouts.pop(0)  # type: ignore[method-assign]
    with pytest.raises(ServicesError, match="have 1 tokens together"):
        train(run, StopRequest())  # type: ignore[arg-type]
    assert run.saved == [1]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_only_errors_that_pass_are_waited_out_and_a_disk_that_is_full_hides_none_of_them() -> None:
    def save(trained: Any) -> float:
        raise CheckpointError("checkpoint-000003 can't be written: No space left")

    ahead = RolloutsAhead(Future, steps=9, staleness=0)  # type: ignore[arg-type]
    run = SimpleNamespace(step=0, settings=settings(steps=9, output="none"), save=save, _ahead=ahead)
    gone = str(PPORun.interrupted(run, UnavailableError("gone"), None))  # type: ignore[arg-type]
    assert gone == (
        "gone\nstopped after step 0 of 9. When the services are well, give the same command again with --resume"
    )
    run.step = 3
    refused = str(PPORun.interrupted(run, ServicesError("it is refused"), None))  # type: ignore[arg-type]
    assert refused == (
        "it is refused\nstopped after step 3 of 9; checkpoint-000003 can't be written: No space left. When that is "
        "mended, give the same command again with --resume"
    )
    # With the weights that it was to be sampled with a rollout ahead is lost, so what is done can't be gone on from.
    run._ahead = RolloutsAhead(Future, steps=9, staleness=1)  # type: ignore[arg-type]
    lost = str(PPORun.interrupted(run, UnavailableError("gone"), None))  # type: ignore[arg-type]
    assert "after step 3 of 9; a rollout that was ahead is missing, so the run goes on from its beginning." in lost


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_per_step": 7, "max_new_tokens": 1}, "at most 7 response tokens, a rollout needs at least 8"),
        ({"policy": "127.0.0.1:1,127.0.0.1:2"}, "--policy names 2 replicas and --policy-admin 1"),
        ({"seed": 2**63}, "less than 9223372036854775808"),
    ],
)
def test_settings_that_can_not_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)
    settings(seed=2**63 - 1, prompts_per_step=8, max_new_tokens=1, policy="dns:///policy:50051")


def test_one_sample_has_no_interval_and_is_refused() -> None:
    learner = make_learner(settings())
    rollout = Rollout(samples=make_samples(1), failures=(), weights_version=0, duration_s=1.0, service_work_s=1.0)
    with pytest.raises((ValueError, TrainerError)):
        learner.step(rollout, 0)


def test_explained_variance_is_one_less_the_unexplained_share() -> None:
    values_NT = torch.tensor([[1.0, 2.0], [3.5, 9.0]])
    returns_NT = torch.tensor([[1.5, 2.0], [3.0, 7.0]])
    mask_NT = torch.tensor([[True, True], [True, False]])
    returns, errors = np.array([1.5, 2.0, 3.0]), np.array([0.5, 0.0, -0.5])
    expected = 1.0 - errors.var(ddof=1) / returns.var(ddof=1)
    assert explained_variance(values_NT, returns_NT, mask_NT) == pytest.approx(expected, abs=1e-6)
    assert explained_variance(values_NT, torch.ones(2, 2), mask_NT) == 0.0


def without_critic(advantage: str, **changes: Any) -> PPOSettings:
    return settings(advantage=advantage, samples_per_prompt=4, kl_beta=0.1, **changes)


def grouped_samples() -> tuple[Sample, ...]:
    """Of prompts with 4, 3 and 1 samples left: the others failed."""
    left = [(0, 4), (1, 3), (2, 1)]
    prompts = [prompt for prompt, count in left for _ in range(count)]
    return tuple(
        replace(sample, prompt_ids=(5, 6 + prompt)) for sample, prompt in zip(make_samples(8), prompts, strict=True)
    )


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr-grpo", "reinforce++", "reinforce++-baseline"])
def test_advantages_without_a_critic_equal_the_naive_ones_also_where_samples_failed(advantage: str) -> None:
    options = without_critic("grpo", group_std=False) if advantage == "dr-grpo" else without_critic(advantage)
    learner, samples = make_learner(options), grouped_samples()
    experience = make_experience(samples, learner.device)
    before = learner.evaluate(experience)
    assert not before.values_NT.any()
    targets, metrics = learner.shape(experience, before)
    token_rewards = []
    for row, sample in enumerate(samples):
        kl = before.logprobs_NT[row, : len(sample.response_ids)].double().numpy() - np.array(sample.ref_logprobs)
        # Of GRPO it is in the loss.
        rewards = 0.0 * kl if options.advantage == "grpo" else -0.1 * kl
        rewards[-1] += sample.score - (0.0 if sample.finished else 0.7)
        token_rewards.append(rewards)
    totals = np.array([rewards.sum() for rewards in token_rewards])
    naive = []
    for row, sample in enumerate(samples):
        members = totals[[s.prompt_ids == sample.prompt_ids for s in samples]]
        alone, length = len(members) == 1, len(sample.response_ids)
        if advantage == "rloo":
            value = 0.0 if alone else totals[row] - (members.sum() - totals[row]) / (len(members) - 1)
        elif advantage == "grpo":
            value = 0.0 if alone else (totals[row] - members.mean()) / (members.std(ddof=1) + 1e-6)
        else:
            value = totals[row] - members.mean()
        to_go = token_rewards[row][::-1].cumsum()[::-1]
        naive.append(to_go if advantage == "reinforce++" else np.full(length, value))
    flat = np.concatenate(naive)
    if advantage.startswith("reinforce++"):
        flat = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-8)
    assert targets.advantages_NT[experience.mask_NT].numpy() == pytest.approx(flat, abs=2e-5)
    if advantage == "reinforce++":
        assert "advantage/zero_share" not in metrics
    else:
        assert metrics["advantage/zero_share"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("kl_beta", [1e-4, 0.05, 1.0])
def test_of_grpo_samples_that_score_alike_teach_nothing_but_their_kl_in_the_loss(kl_beta: float) -> None:
    """DeepSeekMath, eq. 3: the deviation that divides is of scores alone, and KL is k3 in the loss."""
    options = settings(advantage="grpo", samples_per_prompt=8, kl_beta=kl_beta, missing_eos="none")
    learner = make_learner(options)
    samples = tuple(replace(sample, prompt_ids=(5, 6), score=0.3) for sample in make_samples(8))
    experience = make_experience(samples, learner.device)
    before = learner.evaluate(experience)
    assert (before.logprobs_NT - experience.ref_logprobs_NT).abs().max() > 0.1
    targets, metrics = learner.shape(experience, before)
    assert not targets.advantages_NT.any()
    assert metrics["advantage/zero_share"] == 1.0
    tokens = float(experience.mask_NT.sum())
    figures, _ = learner.accumulate(experience, targets, list(range(8)), tokens)
    own, rollout, ref = (
        grid_NT[experience.mask_NT].double()
        for grid_NT in (before.logprobs_NT, experience.rollout_logprobs_NT, experience.ref_logprobs_NT)
    )
    k3_paid = (own - rollout).exp().clamp(max=options.importance_cap) * ((ref - own).exp() - 1 - (ref - own))
    assert figures["policy/kl_loss"] == pytest.approx(float(k3_paid.mean()), rel=1e-4)
    assert figures["policy/loss"] == 0.0


def test_where_kl_is_paid_follows_the_advantages_unless_it_is_said() -> None:
    grouped = {"samples_per_prompt": 2}
    chosen = {
        name: (options.kl_placement, options.kl_used)
        for name, options in {
            "gae": settings(),
            "gae, loss": settings(kl_in="loss"),
            "rloo": settings(advantage="rloo", **grouped),
            "grpo": settings(advantage="grpo", **grouped),
            "grpo, k2": settings(advantage="grpo", kl_estimator="k2", **grouped),
            "dr grpo, reward": settings(advantage="grpo", group_std=False, kl_in="reward", **grouped),
        }.items()
    }
    assert chosen == {
        "gae": ("reward", "k1"),
        "gae, loss": ("loss", "k2"),
        "rloo": ("reward", "k1"),
        "grpo": ("loss", "k3"),
        "grpo, k2": ("loss", "k2"),
        "dr grpo, reward": ("reward", "k1"),
    }


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce++", "reinforce++-baseline"])
def test_without_gae_no_critic_is_optimised_or_kept(advantage: str) -> None:
    learner = make_learner(without_critic(advantage, learning_rate=1e-3))
    assert learner.critic is None
    assert set(learner.trained.modules) == set(learner.trained.optimisers) == {"policy"}
    weight = learner.policy.lm_head.weight.detach().clone()
    metrics = learner.step(rollout_of(*grouped_samples()), 0)
    assert not learner.policy.lm_head.weight.equal(weight)
    assert not [name for name in metrics if name.startswith("value/")]
    assert metrics["policy/optimiser_steps"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_estimator": "k3"}, "--kl-estimator is k3 and --kl-in reward: .*use k1 in the reward"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "--kl-estimator is k1 and --kl-in loss: .* expected gradient is 0"),
        (
            {"advantage": "grpo", "samples_per_prompt": 2, "kl_in": "reward"},
            "--kl-in is reward and --advantage grpo: .*choose --kl-in loss, as GRPO has it, or --no-group-std",
        ),
        ({"length_penalty_after": 3}, "--length-penalty-after is 3 without --length-penalty"),
        ({"dual_clip": 1.0}, "greater than 1"),
        ({"advantage": "rloo"}, "--samples-per-prompt is 1: --advantage rloo compares the samples"),
        ({"advantage": "reinforce++-baseline"}, r"--samples-per-prompt is 1: --advantage reinforce\+\+-baseline"),
        ({"advantage": "grpo", "samples_per_prompt": 2, "gamma": 0.9}, "--gamma is 0.9: --advantage grpo judges whole"),
        ({"advantage": "reinforce++", "whiten_rewards": True}, "--whiten-rewards is set: it is of --advantage gae"),
    ],
)
def test_choices_that_give_no_signal_or_have_no_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)
    settings(advantage="reinforce++", gamma=0.9)
