"""Facts about PPO's losses and its importance weights.

Shapes: B sequences, T response tokens, D features.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from trainer.losses import (
    OffPolicyCorrection,
    importance_weights,
    old_policy,
    policy_loss,
    value_loss,
)

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
LOGPROBS = torch.tensor([[-1, -0.5, -2, -0.3, -0.7], [-0.9, -1.5, -0.2, 0, 0]], dtype=torch.float64)
STEP = torch.tensor([[0.3, -0.1, 0.05, -0.4, 0], [0.25, -0.3, 0.1, 0, 0]], dtype=torch.float64)
VALUES = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5], [-0.1, 0, 0.1, 0, 0]], dtype=torch.float64)
VALUE_STEP = torch.tensor([[0.5, -0.1, 0.05, -0.4, 0], [0.25, -0.3, 0.1, 0, 0]], dtype=torch.float64)
RETURNS = torch.tensor(
    [[1.295684, 1.374404, 1.420425, 1.4215, 1.47], [-0.5201, -0.558, -0.54, 0, 0]], dtype=torch.float64
)
WHITENED = torch.tensor(
    [[0.836620, 0.811640, 0.748275, 0.632149, 0.571694], [-1.060121, -1.222000, -1.318258, 0, 0]], dtype=torch.float64
)
SEEDS = st.integers(0, 2**31)
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)


def _ragged(seed: int, lengths: list[int], count: int, padding: float = math.nan) -> tuple[Tensor, ...]:
    """``count`` random (B, 6) tensors with ``padding`` on padding, then the mask."""
    tensors = torch.randn(
        count, len(lengths), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).unbind()
    mask_BT = torch.arange(6) < torch.tensor(lengths)[:, None]
    return *(x_BT.masked_fill(~mask_BT, padding) for x_BT in tensors), mask_BT


def _cells(lengths: list[int]) -> list[tuple[int, int]]:
    return [(b, t) for b, length in enumerate(lengths) for t in range(length)]


# The policy's loss


def test_policy_loss_of_the_reference_vector() -> None:
    result = policy_loss(LOGPROBS + STEP, LOGPROBS, WHITENED, MASK)
    assert result.loss.item() == pytest.approx(0.0344125, abs=1e-6)
    assert result.clip_fraction.item() == 0.25
    assert result.mean_old_minus_new.item() == pytest.approx(0.0125, abs=1e-9)
    assert result.approx_kl.item() == pytest.approx(0.5 * (STEP**2).sum().item() / 8, abs=1e-12)


@settings(deadline=None)
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    clip_range=st.floats(0.05, 0.5),
    weighted=st.booleans(),
    denominator=st.none() | st.integers(1, 50),
    dual_clip=st.none() | st.floats(1.01, 2),
)
def test_policy_loss_and_its_gradient_equal_the_token_by_token_definition(
    seed: int, lengths: list[int], clip_range: float, weighted: bool, denominator: int | None, dual_clip: float | None
) -> None:
    new_BT, old_BT, advantages_BT, raw_BT, mask_BT = _ragged(seed, lengths, 4)
    new_BT = (old_BT + 0.3 * new_BT).requires_grad_()
    weights_BT = raw_BT.abs() if weighted else None
    result = policy_loss(new_BT, old_BT, advantages_BT, mask_BT, clip_range, weights_BT, denominator, dual_clip)
    (gradient_BT,) = torch.autograd.grad(result.loss, new_BT)

    n = denominator or sum(lengths)
    loss = clipped = approx_kl = drift = 0.0
    expected_BT = torch.zeros_like(gradient_BT)
    for b, t in _cells(lengths):
        delta, a = (new_BT[b, t] - old_BT[b, t]).item(), advantages_BT[b, t].item()
        w = weights_BT[b, t].item() if weights_BT is not None else 1.0
        ratio = math.exp(delta)
        free = -a * ratio
        held = -a * min(max(ratio, 1 - clip_range), 1 + clip_range)
        most = -a * dual_clip if dual_clip is not None and a < 0 else math.inf
        loss += w * min(max(free, held), most) / n
        clipped += (held > free or free > most) / n
        approx_kl += delta**2 / 2 / n
        drift -= delta / n
        expected_BT[b, t] = w * free / n if held <= free <= most else 0.0
    assert result.loss.item() == pytest.approx(loss, abs=1e-10)
    assert result.clip_fraction.item() == pytest.approx(clipped, abs=1e-6)
    assert result.approx_kl.item() == pytest.approx(approx_kl, abs=1e-10)
    assert result.mean_old_minus_new.item() == pytest.approx(drift, abs=1e-10)
    torch.testing.assert_close(gradient_BT, expected_BT, atol=1e-10, rtol=0)


def test_before_the_first_update_the_gradient_is_the_plain_policy_gradient() -> None:
    """Row 12: ratio 1 everywhere, so nothing is clipped and d loss / d log pi = -A / n."""
    new_BT = LOGPROBS.clone().requires_grad_()
    result = policy_loss(new_BT, LOGPROBS, WHITENED, MASK)
    (gradient_BT,) = torch.autograd.grad(result.loss, new_BT)
    torch.testing.assert_close(gradient_BT, -WHITENED / 8, atol=1e-12, rtol=0)
    assert result.loss.item() == pytest.approx(-WHITENED.sum().item() / 8)
    assert result.clip_fraction.item() == result.approx_kl.item() == result.mean_old_minus_new.item() == 0


def test_the_eos_counts_and_the_first_pad_does_not() -> None:
    """Historical: trlx#509, the ratio's mask off by one."""
    base = policy_loss(LOGPROBS + STEP, LOGPROBS, WHITENED, MASK).loss
    last, first_pad = torch.zeros(2, 5), torch.zeros(2, 5)
    last[1, 2] = first_pad[1, 3] = 0.05
    assert policy_loss(LOGPROBS + STEP + last, LOGPROBS, WHITENED, MASK).loss != base
    assert policy_loss(LOGPROBS + STEP + first_pad, LOGPROBS, WHITENED, MASK).loss == base


def test_advantages_old_policy_and_weights_receive_no_gradient() -> None:
    new_BT, old_BT, advantages_BT, weights_BT = (
        x.clone().requires_grad_() for x in (LOGPROBS + STEP, LOGPROBS, WHITENED, torch.ones(2, 5))
    )
    policy_loss(new_BT, old_BT, advantages_BT, MASK, weights_BT=weights_BT).loss.backward()
    assert new_BT.grad is not None
    assert old_BT.grad is None
    assert advantages_BT.grad is None
    assert weights_BT.grad is None


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_beyond_float32_has_a_finite_loss_and_gradient(advantage: float) -> None:
    """exp(200) is inf, and inf * 0 in the backward pass of the clip would be NaN."""
    new_BT = torch.tensor([[200.0]], requires_grad=True)
    loss = policy_loss(new_BT, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool)).loss
    loss.backward()
    assert loss.isfinite()
    assert new_BT.grad is not None
    assert new_BT.grad.isfinite().all()


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, math.inf, math.nan])
def test_impossible_dual_clips_are_refused(dual_clip: float) -> None:
    with pytest.raises(ValueError, match="it must be finite and above 1"):
        policy_loss(LOGPROBS, LOGPROBS, WHITENED, MASK, dual_clip=dual_clip)


@pytest.mark.parametrize("clip_range", [0.0, -0.2, 1.0, math.nan])
def test_impossible_policy_clip_ranges_are_refused(clip_range: float) -> None:
    with pytest.raises(ValueError, match="clip_range is"):
        policy_loss(LOGPROBS, LOGPROBS, WHITENED, MASK, clip_range)


# The critic's loss


def test_value_loss_of_the_reference_vector() -> None:
    result = value_loss(VALUES + VALUE_STEP, VALUES, RETURNS, MASK)
    assert result.loss.item() == pytest.approx(0.4904788, abs=1e-6)
    assert result.clip_fraction.item() == 0.25


@settings(deadline=None)
@given(seed=SEEDS, lengths=LENGTHS, clip_range=st.floats(0.05, 2), denominator=st.none() | st.integers(1, 50))
def test_value_loss_and_its_gradient_equal_the_token_by_token_definition(
    seed: int, lengths: list[int], clip_range: float, denominator: int | None
) -> None:
    values_BT, old_BT, returns_BT, mask_BT = _ragged(seed, lengths, 3)
    values_BT.requires_grad_()
    result = value_loss(values_BT, old_BT, returns_BT, mask_BT, clip_range, denominator)
    (gradient_BT,) = torch.autograd.grad(result.loss, values_BT)
    n = denominator or sum(lengths)
    loss = clipped = 0.0
    expected_BT = torch.zeros_like(gradient_BT)
    for b, t in _cells(lengths):
        v, v_old, r = values_BT[b, t].item(), old_BT[b, t].item(), returns_BT[b, t].item()
        held = min(max(v, v_old - clip_range), v_old + clip_range)
        loss += max((v - r) ** 2, (held - r) ** 2) / 2 / n
        clipped += ((held - r) ** 2 > (v - r) ** 2) / n
        expected_BT[b, t] = 0.0 if (held - r) ** 2 > (v - r) ** 2 else (v - r) / n
    assert result.loss.item() == pytest.approx(loss, abs=1e-10)
    assert result.clip_fraction.item() == pytest.approx(clipped, abs=1e-6)
    torch.testing.assert_close(gradient_BT, expected_BT, atol=1e-10, rtol=0)


@pytest.mark.parametrize("clip_range", [0.0, -0.2, math.inf, math.nan])
def test_impossible_value_clip_ranges_are_refused(clip_range: float) -> None:
    with pytest.raises(ValueError, match="clip_range is"):
        value_loss(VALUES, VALUES, RETURNS, MASK, clip_range)


# Cutting a minibatch up


def _gradient_of_cut(cuts: int, global_denominator: bool) -> tuple[Tensor, list[float]]:
    """Gradient and summed figures of both losses over 8 sequences in ``cuts`` parts."""
    generator = torch.Generator().manual_seed(6)
    features_BTD = torch.randn(8, 6, 4, generator=generator, dtype=torch.float64)
    old_BT, advantages_BT, old_values_BT, returns_BT = torch.randn(4, 8, 6, generator=generator, dtype=torch.float64)
    mask_BT = torch.arange(6) < torch.tensor([6, 1, 3, 2, 6, 5, 1, 4])[:, None]
    weight = torch.randn(2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    figures = torch.zeros(6, dtype=torch.float64)
    tokens = float(mask_BT.sum())
    for part in torch.arange(8).chunk(cuts):
        denominator = tokens if global_denominator else None
        new_BT, values_BT = (features_BTD[part] @ weight.T).unbind(-1)
        new_BT = old_BT[part] + 0.2 * new_BT
        mask = mask_BT[part]
        policy = policy_loss(new_BT, old_BT[part], advantages_BT[part], mask, denominator=denominator)
        value = value_loss(values_BT, old_values_BT[part], returns_BT[part], mask, denominator=denominator)
        loss = policy.loss + 0.1 * value.loss
        (loss if global_denominator else loss / cuts).backward()
        figures += torch.stack(
            [
                policy.loss.detach(),
                policy.clip_fraction,
                policy.approx_kl,
                policy.mean_old_minus_new,
                value.loss.detach(),
                value.clip_fraction,
            ]
        )
    assert weight.grad is not None
    return weight.grad, figures.tolist()


@pytest.mark.parametrize("cuts", [2, 8])
def test_gradients_and_figures_do_not_depend_on_micro_batches(cuts: int) -> None:
    """Row 11. Historical: trl#6024, the loss scaled wrongly under accumulation."""
    whole, whole_figures = _gradient_of_cut(1, global_denominator=True)
    cut, cut_figures = _gradient_of_cut(cuts, global_denominator=True)
    torch.testing.assert_close(cut, whole, atol=1e-12, rtol=0)
    assert cut_figures == pytest.approx(whole_figures, abs=1e-6)
    mean_of_means, _ = _gradient_of_cut(cuts, global_denominator=False)
    assert (mean_of_means - whole).norm() > 0.05 * whole.norm()  # The bug would be seen here.


def test_gradients_averaged_over_two_processes_equal_those_of_one() -> None:
    """With the denominator divided by the number of processes, as an averaging all-reduce needs it."""
    new_BT, old_BT, advantages_BT, mask_BT = _ragged(7, [6, 1, 3, 5], 3)
    new_BT = (old_BT + 0.1 * new_BT).requires_grad_()
    (whole_BT,) = torch.autograd.grad(policy_loss(new_BT, old_BT, advantages_BT, mask_BT).loss, new_BT)
    averaged_BT = torch.zeros_like(whole_BT)
    for rank in (slice(0, 2), slice(2, 4)):
        loss = policy_loss(new_BT[rank], old_BT[rank], advantages_BT[rank], mask_BT[rank], denominator=15 / 2).loss
        averaged_BT += torch.autograd.grad(loss, new_BT)[0] / 2
    torch.testing.assert_close(averaged_BT, whole_BT, atol=1e-12, rtol=0)


def test_a_micro_batch_without_a_valid_token_adds_nothing() -> None:
    new_BT = torch.full((2, 5), math.nan, requires_grad=True)
    empty_BT = torch.zeros(2, 5, dtype=torch.bool)
    policy_loss(new_BT, new_BT.detach(), new_BT.detach(), empty_BT, denominator=8).loss.backward()
    assert new_BT.grad is not None
    assert (new_BT.grad == 0).all()
    with pytest.raises(ValueError, match="mask_BT has no valid token"):
        policy_loss(new_BT, new_BT, new_BT, empty_BT)


@pytest.mark.parametrize("denominator", [0, -8, math.nan, torch.tensor(0)])
def test_impossible_denominators_are_refused(denominator: Any) -> None:
    with pytest.raises(ValueError, match="denominator is"):
        value_loss(VALUES, VALUES, RETURNS, MASK, denominator=denominator)


# Padding


def _all_figures(padding: float, extra: int) -> tuple[list[float], list[Tensor]]:
    """Every figure of these losses, and the gradients on valid tokens, with ``extra`` more pads holding ``padding``."""

    def widened(x_BT: Tensor) -> Tensor:
        return pad(x_BT.masked_fill(~MASK, padding), (0, extra), value=padding)

    mask_BT = pad(MASK, (0, extra))
    new_BT, values_BT = (widened(x_BT).requires_grad_() for x_BT in (LOGPROBS + STEP, VALUES + VALUE_STEP))
    policy = policy_loss(new_BT, widened(LOGPROBS), widened(WHITENED), mask_BT, weights_BT=widened(WHITENED.abs()))
    value = value_loss(values_BT, widened(VALUES), widened(RETURNS), mask_BT)
    weights = importance_weights(widened(LOGPROBS), widened(LOGPROBS - STEP), mask_BT, cap=1.2)
    gradients = list(torch.autograd.grad(policy.loss + value.loss, (new_BT, values_BT)))
    for gradient_BT in gradients:
        assert (gradient_BT[~mask_BT] == 0).all()
    assert (weights.weights_BT[~mask_BT] == 0).all()
    figures = [
        *(policy.loss, policy.clip_fraction, policy.approx_kl, policy.mean_old_minus_new),
        *(value.loss, value.clip_fraction),
        *(weights.mean, weights.ess, weights.kl, weights.truncated_fraction),
    ]
    return [figure.item() for figure in figures], [*(g[mask_BT] for g in gradients), weights.weights_BT[mask_BT]]


@pytest.mark.parametrize("padding", [0.0, 7.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_more_pads_and_whatever_they_hold_change_no_figure_and_no_gradient(padding: float, extra: int) -> None:
    """Rows 13 and 14. Historical: OpenRLHF#1240, NaN * 0 is NaN."""
    expected_figures, expected_tensors = _all_figures(0.0, 0)
    figures, tensors = _all_figures(padding, extra)
    assert figures == pytest.approx(expected_figures, abs=1e-12)
    for ours, theirs in zip(tensors, expected_tensors, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("odd", ["old_logprobs_BT", "advantages_BT", "weights_BT"])
def test_shapes_that_differ_are_refused_by_name(odd: str) -> None:
    inputs = dict.fromkeys(("logprobs_BT", "old_logprobs_BT", "advantages_BT", "weights_BT"), torch.zeros(2, 5))
    inputs[odd] = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=rf"{odd} has shape \(2, 1\), mask_BT has \(2, 5\)"):
        policy_loss(**inputs, mask_BT=MASK)


# Three policies


@given(seed=SEEDS, lengths=LENGTHS, cap=st.floats(0.5, 5))
def test_importance_weights_and_their_figures_equal_their_definitions(
    seed: int, lengths: list[int], cap: float
) -> None:
    old_BT, rollout_BT, mask_BT = _ragged(seed, lengths, 2)
    result = importance_weights(old_BT, rollout_BT, mask_BT, cap)
    deltas = [(old_BT[b, t] - rollout_BT[b, t]).item() for b, t in _cells(lengths)]
    weights = [min(math.exp(delta), cap) for delta in deltas]
    n = len(deltas)
    assert result.weights_BT[mask_BT].tolist() == pytest.approx(weights)
    assert result.mean.item() == pytest.approx(sum(map(math.exp, deltas)) / n)
    assert result.ess.item() == pytest.approx(sum(weights) ** 2 / (n * sum(w**2 for w in weights)))
    assert result.kl.item() == pytest.approx(-sum(deltas) / n, abs=1e-12)
    assert result.truncated_fraction.item() == pytest.approx(sum(math.exp(d) > cap for d in deltas) / n)


def test_an_engine_that_agrees_has_mean_weight_1_full_ess_and_no_kl() -> None:
    result = importance_weights(LOGPROBS, LOGPROBS, MASK)
    assert result.mean.item() == result.ess.item() == 1
    assert result.kl.item() == result.truncated_fraction.item() == 0


def test_weights_of_real_samples_average_1_and_their_kl_is_the_exact_one() -> None:
    """100,000 tokens sampled from a rollout policy beside the trainer's own."""
    generator = torch.Generator().manual_seed(8)
    log_rollout, log_old = (0.5 * torch.randn(2, 40, generator=generator, dtype=torch.float64)).log_softmax(-1)
    ids_BT = torch.multinomial(log_rollout.exp(), 100_000, replacement=True, generator=generator)[None]
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    result = importance_weights(log_old[ids_BT], log_rollout[ids_BT], mask_BT, cap=1000)
    exact_ess = 1 / (log_rollout.exp() * (log_old - log_rollout).mul(2).exp()).sum().item()
    assert result.mean.item() == pytest.approx(1, abs=0.01)
    assert result.ess.item() == pytest.approx(exact_ess, abs=0.02)
    exact_kl = (log_rollout.exp() * (log_rollout - log_old)).sum().item()
    assert result.kl.item() == pytest.approx(exact_kl, abs=0.01)


def test_weights_are_capped_and_carry_no_gradient() -> None:
    old_BT = (LOGPROBS + 5).requires_grad_()
    result = importance_weights(old_BT, LOGPROBS, MASK, cap=2.0)
    assert (result.weights_BT[MASK] == 2).all()
    assert result.truncated_fraction.item() == 1
    assert not result.weights_BT.requires_grad
    with pytest.raises(ValueError, match=r"cap is 0\.0"):
        importance_weights(LOGPROBS, LOGPROBS, MASK, cap=0.0)
    with pytest.raises(ValueError, match="0 valid tokens"):
        importance_weights(LOGPROBS, LOGPROBS, torch.zeros_like(MASK))


def test_bypass_counts_the_engines_difference_once_and_decoupled_once() -> None:
    """Unclipped and uncapped, both give -A pi / pi_rollout; with both corrections at once it would be counted twice."""
    rollout_BT, old_BT, new_BT = LOGPROBS, LOGPROBS + 0.05, LOGPROBS + 0.08
    truth = (-WHITENED * 0.08 * 0 - WHITENED * math.exp(0.08))[MASK].mean().item()
    for correction in OffPolicyCorrection:
        chosen_BT, weights = old_policy(correction, old_BT, rollout_BT, MASK)
        result = policy_loss(
            new_BT, chosen_BT, WHITENED, MASK, weights_BT=None if weights is None else weights.weights_BT
        )
        assert result.loss.item() == pytest.approx(truth, abs=1e-12)


def test_with_equal_weights_in_float32_both_corrections_agree_to_1e_4() -> None:
    """The engine's numbers differ from the trainer's by rounding alone, as measured, 1e-6."""
    generator = torch.Generator().manual_seed(9)
    rollout_BT = -3 * torch.rand(16, 32, generator=generator)
    recomputed_BT = rollout_BT + 1e-6 * torch.randn(16, 32, generator=generator)
    advantages_BT, step_BT = torch.randn(2, 16, 32, generator=generator)
    mask_BT = torch.arange(32) < torch.randint(1, 33, (16, 1), generator=generator)
    found = []
    for correction in OffPolicyCorrection:
        new_BT = (recomputed_BT + 0.1 * step_BT).requires_grad_()
        old_BT, weights = old_policy(correction, recomputed_BT, rollout_BT, mask_BT)
        loss = policy_loss(
            new_BT, old_BT, advantages_BT, mask_BT, weights_BT=None if weights is None else weights.weights_BT
        ).loss
        found.append((loss, *torch.autograd.grad(loss, new_BT)))
    (decoupled, decoupled_BT), (bypass, bypass_BT) = found
    assert abs((decoupled - bypass).item()) < 1e-4
    assert (decoupled_BT - bypass_BT).norm() < 1e-4 * bypass_BT.norm()


def test_decoupled_needs_the_trainers_own_log_probabilities() -> None:
    assert old_policy(OffPolicyCorrection.BYPASS, None, LOGPROBS, MASK)[1] is None
    with pytest.raises(ValueError, match="'decoupled' needs recomputed_logprobs_BT"):
        old_policy(OffPolicyCorrection.DECOUPLED, None, LOGPROBS, MASK)
