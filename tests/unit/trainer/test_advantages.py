"""Facts about advantages, returns and whitening. Shapes: B sequences, T response tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.advantages import (
    combine_moments,
    gae,
    group_mean_baseline,
    leave_one_out,
    masked_mean,
    masked_moments,
    masked_var,
    rewards_to_go,
    whiten,
)

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
REWARDS = torch.tensor([[-0.02, 0.01, 0.05, 0, 1.47], [0.01, -0.05, -0.54, 0, 0]], dtype=torch.float64)
VALUES = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [-0.1, 0, 0.1, 0, 0]], dtype=torch.float64)
ADVANTAGES = torch.tensor(
    [[1.195684, 1.174404, 1.120425, 1.0215, 0.97], [-0.4201, -0.558, -0.64, 0, 0]], dtype=torch.float64
)
RETURNS = torch.tensor(
    [[1.295684, 1.374404, 1.420425, 1.4215, 1.47], [-0.5201, -0.558, -0.54, 0, 0]], dtype=torch.float64
)
WHITENED = torch.tensor(
    [[0.836620, 0.811640, 0.748275, 0.632149, 0.571694], [-1.060121, -1.222000, -1.318258, 0, 0]], dtype=torch.float64
)
SEEDS = st.integers(0, 2**31)
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5)
UNIT = st.floats(0, 1)


def _ragged(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards and values with rubbish on padding, and the mask."""
    rewards_BT, values_BT = torch.randn(
        2, len(lengths), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    mask_BT = torch.arange(6) < torch.tensor(lengths)[:, None]
    rewards_BT[~mask_BT], values_BT[~mask_BT] = math.nan, 1e30
    return rewards_BT, values_BT, mask_BT


# GAE


def test_advantages_and_returns_of_the_reference_vector() -> None:
    """Row 9."""
    advantages_BT, returns_BT = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages_BT, ADVANTAGES, atol=1e-6, rtol=0)
    torch.testing.assert_close(returns_BT, RETURNS, atol=1e-6, rtol=0)


@given(seed=SEEDS, lengths=LENGTHS, gamma=UNIT, lam=UNIT)
def test_gae_equals_the_discounted_sum_of_its_definition(
    seed: int, lengths: list[int], gamma: float, lam: float
) -> None:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, written out one token at a time."""
    rewards_BT, values_BT, mask_BT = _ragged(seed, lengths)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma, lam)
    for b, length in enumerate(lengths):
        r, v = rewards_BT[b].tolist(), values_BT[b].tolist()
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < length else 0.0) - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages_BT[b, t].item() == pytest.approx(expected, abs=1e-9)
            assert returns_BT[b, t].item() == pytest.approx(expected + v[t], abs=1e-9)
        assert (advantages_BT[b, length:] == 0).all()
        assert (returns_BT[b, length:] == 0).all()


@given(seed=SEEDS, lengths=LENGTHS)
def test_undiscounted_returns_at_lambda_one_are_the_rewards_to_go(seed: int, lengths: list[int]) -> None:
    rewards_BT, values_BT, mask_BT = _ragged(seed, lengths)
    _, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=1.0)
    for b, length in enumerate(lengths):
        for t in range(length):
            assert returns_BT[b, t].item() == pytest.approx(sum(rewards_BT[b, t:length].tolist()), abs=1e-9)


@pytest.mark.parametrize("padding", [1e6, math.nan, math.inf])
def test_values_on_padding_reach_no_advantage(padding: float) -> None:
    """Row 9. Historical: verl#50, values unmasked before GAE; the first pad's value stood for the terminal state's."""
    values_BT = VALUES.masked_fill(~MASK, padding)
    rewards_BT = REWARDS.masked_fill(~MASK, padding)
    for clean, dirty in zip(gae(REWARDS, VALUES, MASK), gae(rewards_BT, values_BT, MASK), strict=True):
        assert torch.equal(clean, dirty)


def test_returns_do_not_depend_on_how_advantages_are_whitened_later() -> None:
    """Row 9."""
    advantages_BT, returns_BT = gae(REWARDS, VALUES, MASK)
    whiten(advantages_BT, MASK)
    torch.testing.assert_close(returns_BT, (advantages_BT + VALUES) * MASK, atol=1e-12, rtol=0)


def test_advantages_carry_no_gradient_into_the_critic() -> None:
    advantages_BT, returns_BT = gae(REWARDS, VALUES.clone().requires_grad_(), MASK)
    assert not advantages_BT.requires_grad
    assert not returns_BT.requires_grad


@pytest.mark.parametrize(("gamma", "lam"), [(-0.1, 0.9), (1.01, 0.9), (math.nan, 0.9), (1.0, -0.1), (1.0, math.nan)])
def test_discounts_outside_the_unit_interval_are_refused(gamma: float, lam: float) -> None:
    with pytest.raises(ValueError, match=r"(gamma|lam) is .* must lie in \[0, 1\]"):
        gae(REWARDS, VALUES, MASK, gamma, lam)


def test_gae_refuses_shapes_that_differ_and_left_padding() -> None:
    with pytest.raises(ValueError, match=r"values_BT has shape \(2, 4\), mask_BT has \(2, 5\)"):
        gae(REWARDS, VALUES[:, :4], MASK)
    with pytest.raises(ValueError, match="in rows 1 a valid token follows padding"):
        gae(REWARDS, VALUES, MASK.flip(1))


# Without a critic


GROUPED = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=9)


@given(seed=SEEDS, samples=GROUPED)
def test_comparisons_of_samples_equal_their_definitions_whatever_the_sizes_and_order_of_groups(
    seed: int, samples: list[tuple[int, int]]
) -> None:
    """Groups that failed samples left smaller are those of fewer members; of one there is no signal, and no NaN."""
    groups, lengths = [group for group, _ in samples], [length for _, length in samples]
    rewards_BT, _, mask_BT = _ragged(seed, lengths)
    groups_B = torch.tensor(groups) * 7 - 3  # Any numbers will do.
    totals = [sum(rewards_BT[b, :length].tolist()) for b, length in enumerate(lengths)]
    found = {
        "rloo": leave_one_out(rewards_BT, mask_BT, groups_B),
        "grpo": group_mean_baseline(rewards_BT, mask_BT, groups_B),
        "dr": group_mean_baseline(rewards_BT, mask_BT, groups_B, divide_by_std=False),
    }
    for b, length in enumerate(lengths):
        members = [totals[i] for i, group in enumerate(groups) if group == groups[b]]
        others = [totals[i] for i, group in enumerate(groups) if group == groups[b] and i != b]
        expected = dict.fromkeys(found, 0.0)
        if others:
            centred = totals[b] - np.mean(members)
            scaled = centred / (np.std(members, ddof=1) + 1e-6)
            expected = {"rloo": totals[b] - np.mean(others), "grpo": scaled, "dr": centred}
        for name, advantages_BT in found.items():
            assert advantages_BT[b, :length].tolist() == pytest.approx([expected[name]] * length, abs=1e-9)
            assert (advantages_BT[b, length:] == 0).all()


@given(seed=SEEDS, lengths=LENGTHS, gamma=UNIT)
def test_rewards_to_go_are_the_discounted_sums(seed: int, lengths: list[int], gamma: float) -> None:
    rewards_BT, _, mask_BT = _ragged(seed, lengths)
    found_BT = rewards_to_go(rewards_BT, mask_BT, gamma)
    for b, length in enumerate(lengths):
        r = rewards_BT[b].tolist()
        for t in range(length):
            assert found_BT[b, t].item() == pytest.approx(sum(gamma ** (k - t) * r[k] for k in range(t, length)))
        assert (found_BT[b, length:] == 0).all()


def test_a_group_of_equal_rewards_gives_no_signal_and_is_not_blown_up_by_its_rounding() -> None:
    rewards_BT = torch.full((3, 2), 0.1)
    rewards_BT[2] = torch.tensor([0.2, 0.0])  # The same sum.
    mask_BT = torch.ones(3, 2, dtype=torch.bool)
    for advantages_BT in (
        leave_one_out(rewards_BT, mask_BT, torch.zeros(3, dtype=torch.long)),
        group_mean_baseline(rewards_BT, mask_BT, torch.zeros(3, dtype=torch.long)),
    ):
        assert float(advantages_BT.abs().max()) < 0.02


def test_groups_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"groups_B has shape \(3,\): mask_BT has 2 rows, one group each"):
        leave_one_out(REWARDS, MASK, torch.zeros(3, dtype=torch.long))


# Whitening


def test_whitened_advantages_of_the_reference_vector() -> None:
    torch.testing.assert_close(whiten(ADVANTAGES, MASK), WHITENED, atol=2e-6, rtol=0)


def test_whitening_keeps_padding_out_of_mean_and_variance() -> None:
    """Row 10. Historical: SkyRL#1305, the advantage mean taken over padding."""
    for padding in (0.0, 1e6, math.nan):
        dirty_BT = ADVANTAGES.masked_fill(~MASK, padding)
        assert torch.equal(whiten(dirty_BT, MASK), whiten(ADVANTAGES, MASK))
    whitened_BT = whiten(ADVANTAGES, MASK)
    assert masked_mean(whitened_BT, MASK).item() == pytest.approx(0, abs=1e-12)
    assert masked_var(whitened_BT, MASK).item() == pytest.approx(1, abs=1e-6)
    wider = torch.nn.functional.pad(ADVANTAGES, (0, 7)), torch.nn.functional.pad(MASK, (0, 7))
    torch.testing.assert_close(whiten(*wider)[:, :5], whitened_BT, atol=1e-12, rtol=0)


def test_whitening_spans_the_batch_so_that_a_row_keeps_its_signal() -> None:
    """Historical: OpenRLHF#1250, ROLL#475. Along the wrong axis each row has mean 0, and a row of one token is 0."""
    advantages_BT = torch.tensor([[5.0, 0, 0], [1, 2, 3], [-1, -2, -3], [2, 2, 0]])
    mask_BT = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    whitened_BT = whiten(advantages_BT, mask_BT)
    valid = advantages_BT[mask_BT]
    expected = (advantages_BT - valid.mean()) / valid.std()
    torch.testing.assert_close(whitened_BT[mask_BT], expected[mask_BT])
    assert whitened_BT[0, 0] > 1
    assert whitened_BT[1].sum() > 0 > whitened_BT[2].sum()


def test_whitening_rewards_keeps_their_mean() -> None:
    """Row 10."""
    whitened_BT = whiten(REWARDS, MASK, shift_mean=False)
    assert masked_mean(whitened_BT, MASK).item() == pytest.approx(masked_mean(REWARDS, MASK).item(), abs=1e-12)
    assert masked_var(whitened_BT, MASK).item() == pytest.approx(1, abs=1e-6)
    assert (whitened_BT[~MASK] == 0).all()


@given(seed=SEEDS, lengths=st.lists(st.integers(4, 6), min_size=4, max_size=8), shift_mean=st.booleans())
def test_processes_that_share_moments_whiten_as_one_would(seed: int, lengths: list[int], shift_mean: bool) -> None:
    x_BT, _, mask_BT = _ragged(seed, lengths)
    whole_BT = whiten(x_BT, mask_BT, shift_mean)
    halves = (slice(0, 2), slice(2, None))
    moments = combine_moments([masked_moments(x_BT[half], mask_BT[half]) for half in halves])
    parts_BT = torch.cat([whiten(x_BT[half], mask_BT[half], shift_mean, moments) for half in halves])
    torch.testing.assert_close(parts_BT, whole_BT, atol=1e-9, rtol=0)


def test_equal_advantages_whiten_to_zero_and_not_to_nan() -> None:
    assert (whiten(torch.full((2, 5), 0.7, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)).abs() < 1e-9).all()


def test_fewer_than_eight_tokens_are_refused() -> None:
    """Row 10."""
    mask_BT = MASK.clone()
    mask_BT[0, 4] = False
    with pytest.raises(ValueError, match="at least 8 valid tokens, there are 7"):
        whiten(ADVANTAGES, mask_BT)
    assert whiten(ADVANTAGES, MASK).isfinite().all()
