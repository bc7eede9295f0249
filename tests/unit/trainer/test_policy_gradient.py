"""What estimators of the policy gradient are in expectation, where every rollout can be enumerated.

Shapes: V actions, two tokens a response, N responses of one prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.advantages import group_mean_baseline, leave_one_out, rewards_to_go
from trainer.losses import policy_loss
from trainer.rewards import shape_rewards

V, N, BETA = 3, 2, 0.3
RESPONSES = list(itertools.product(range(V), repeat=2))
Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Parameters of a policy over two tokens (the second depends on the first), a reference, a reward a response."""
    random = torch.Generator().manual_seed(5)
    theta = torch.randn(V + 1, V, generator=random, dtype=torch.float64)
    reference = torch.randn(V + 1, V, generator=random, dtype=torch.float64)
    return theta.requires_grad_(), reference, torch.randn(len(RESPONSES), generator=random, dtype=torch.float64)


def token_logprobs(theta: Tensor) -> Tensor:
    """(V * V, 2) log-probability of both tokens of every response."""
    table = theta.log_softmax(-1)
    return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in RESPONSES])


def true_gradient() -> Tensor:
    theta, reference, r = problem()
    logp, ref = token_logprobs(theta).sum(1), token_logprobs(reference).sum(1)
    (logp.exp() * (r - BETA * (logp - ref))).sum().backward()
    assert theta.grad is not None
    return theta.grad


def expected_gradient(estimate: Estimator) -> Tensor:
    """Of what the policy loss climbs, over all rollouts of N responses, each weighted by its probability."""
    theta, reference, r = problem()
    mask_BT, groups_B = torch.ones(N, 2, dtype=torch.bool), torch.zeros(N, dtype=torch.long)
    logp_BT, ref_BT = token_logprobs(theta), token_logprobs(reference)
    expected = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(len(RESPONSES)), repeat=N):
        chosen = list(drawn)
        own_BT = logp_BT[chosen]
        rewards_BT, _ = shape_rewards(r[chosen], own_BT.detach(), ref_BT[chosen], mask_BT, BETA)
        advantages_BT = estimate(rewards_BT, mask_BT, groups_B)
        # A mean over responses: two tokens each, so that token mean and response mean differ by that factor alone.
        loss = policy_loss(own_BT, own_BT.detach(), advantages_BT, mask_BT, denominator=N)
        expected = expected - own_BT.detach().sum().exp() * loss.loss
    expected.backward()
    assert theta.grad is not None
    return theta.grad


@pytest.mark.parametrize(
    ("estimate", "factor"),
    [
        (leave_one_out, 1.0),
        (lambda r, mask, groups: group_mean_baseline(r, mask, groups, divide_by_std=False), (N - 1) / N),
        (lambda r, mask, groups: rewards_to_go(r, mask), 1.0),
    ],
    ids=["rloo", "dr-grpo", "reinforce"],
)
def test_the_expected_gradient_is_that_of_reward_less_kl(estimate: Estimator, factor: float) -> None:
    torch.testing.assert_close(expected_gradient(estimate), factor * true_gradient(), atol=1e-12, rtol=1e-10)


def test_dividing_by_the_deviation_of_the_group_changes_the_direction() -> None:
    found, true = expected_gradient(group_mean_baseline).flatten(), true_gradient().flatten()
    cosine = torch.nn.functional.cosine_similarity(found, true, dim=0)
    assert 0.5 < cosine < 0.99
