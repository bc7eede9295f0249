"""Facts about rewards per token. Shapes: B sequences, T response tokens."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.rewards import (
    MissingEos,
    RunningScale,
    apply_length_penalty,
    apply_missing_eos,
    clip_scores,
    last_token_index,
    normalise,
    place_scores,
    shape_rewards,
)

EOS, PAD = 2, 0
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
LOGPROBS = torch.tensor([[-1, -0.5, -2, -0.3, -0.7], [-0.9, -1.5, -0.2, 0, 0]], dtype=torch.float64)
REF = torch.tensor([[-1.2, -0.4, -1.5, -0.3, -1], [-0.8, -2, -0.6, 0, 0]], dtype=torch.float64)
SCORES = torch.tensor([1.5, -0.5], dtype=torch.float64)

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**31)


def _mask(lengths: list[int], width: int = 6) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


# Where the score sits


def test_the_score_sits_on_the_eos_and_not_on_the_first_pad() -> None:
    """Row 5. Historical: trl#1893, trl#3750."""
    ids_BT = torch.tensor([[5, 6, EOS, PAD, PAD]])
    mask_BT = torch.tensor([[True, True, True, False, False]])
    assert last_token_index(mask_BT).tolist() == [2]
    assert ids_BT[0, last_token_index(mask_BT)[0]] == EOS
    assert place_scores(torch.tensor([1.5]), mask_BT).tolist() == [[0, 0, 1.5, 0, 0]]


def test_the_score_sits_on_the_last_column_of_a_response_that_fills_it() -> None:
    assert place_scores(torch.tensor([1.5]), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0, 0, 1.5]]


@given(lengths=LENGTHS)
def test_last_token_index_is_the_largest_valid_one(lengths: list[int]) -> None:
    mask_BT = _mask(lengths)
    expected = [max(t for t in range(6) if mask_BT[b, t]) for b in range(len(lengths))]
    assert last_token_index(mask_BT).tolist() == expected


def test_responses_without_a_token_are_refused_by_row() -> None:
    with pytest.raises(ValueError, match="rows 1, 3 of mask_BT have no valid response token"):
        last_token_index(_mask([2, 0, 1, 0]))


def test_a_failed_score_is_refused_by_row() -> None:
    with pytest.raises(ValueError, match="scores_B is not finite in rows 1"):
        place_scores(torch.tensor([0.5, math.nan]), MASK)


def test_one_score_a_row_is_needed() -> None:
    with pytest.raises(ValueError, match=r"scores_B has shape \(3,\): mask_BT has 2 rows"):
        place_scores(torch.zeros(3), MASK)


def test_padding_after_a_response_without_eos_is_not_response() -> None:
    """Historical: verl#3805. Score on the last real token, no KL on pads."""
    mask_BT = _mask([2, 4], 4)
    logprobs_BT = torch.full((2, 4), -1.0)
    rewards_BT, kl_BT = shape_rewards(torch.tensor([1.0, 1.0]), logprobs_BT, logprobs_BT - 0.5, mask_BT, beta=1.0)
    assert rewards_BT[0].tolist() == [-0.5, 0.5, 0, 0]
    assert kl_BT[0].tolist() == [0.5, 0.5, 0, 0]


# Penalty, normalisation, clipping


def test_a_missing_eos_is_subtracted_from_or_replaces_the_score() -> None:
    """Row 6."""
    scores_B, finished_B = torch.tensor([2.0, -3.0, 0.5]), torch.tensor([True, False, False])
    assert apply_missing_eos(scores_B, finished_B, "subtract", 1.0).tolist() == [2.0, -4.0, -0.5]
    assert apply_missing_eos(scores_B, finished_B, "replace", -1.0).tolist() == [2.0, -1.0, -1.0]


def test_impossible_penalties_are_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'add'"):
        MissingEos(mode="add", value=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"value is -1\.0: subtracted, it must be at least 0"):
        MissingEos(mode="subtract", value=-1.0)
    with pytest.raises(ValueError, match="value is nan"):
        MissingEos(mode="replace", value=math.nan)
    with pytest.raises(ValueError, match=r"finished_B is torch.bool of shape \(2,\)"):
        apply_missing_eos(torch.zeros(3), torch.ones(2, dtype=torch.bool), "subtract", 1.0)
    with pytest.raises(ValueError, match=r"finished_B is torch\.float32"):
        apply_missing_eos(torch.zeros(2), torch.ones(2), "subtract", 1.0)


def test_scores_normalised_by_their_own_moments_have_mean_0_and_deviation_1() -> None:
    scores_B = 4 + 3 * torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    normalised_B = normalise(scores_B, scores_B.mean().item(), scores_B.std().item())
    assert normalised_B.mean().item() == pytest.approx(0, abs=1e-12)
    assert normalised_B.std().item() == pytest.approx(1, abs=1e-12)
    assert normalise(torch.tensor([5.0]), 3.0, 4.0).item() == 0.5


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (0.0, math.nan), (0.0, math.inf), (math.nan, 1.0)])
def test_normalising_by_nothing_is_refused(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match=r"(mean|std) is"):
        normalise(torch.zeros(2), mean, std)


def test_clipped_scores_keep_within_the_limit() -> None:
    assert clip_scores(torch.tensor([-12.0, -3.0, 10.0, 99.0]), 10.0).tolist() == [-10, -3, 10, 10]
    with pytest.raises(ValueError, match=r"limit is 0\.0"):
        clip_scores(torch.zeros(2), 0.0)


# Shaping


def test_rewards_of_the_reference_vector() -> None:
    rewards_BT, kl_BT = shape_rewards(SCORES, LOGPROBS, REF, MASK, beta=0.1)
    expected = torch.tensor([[-0.02, 0.01, 0.05, 0, 1.47], [0.01, -0.05, -0.54, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(rewards_BT, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(kl_BT, (LOGPROBS - REF) * MASK, atol=1e-12, rtol=0)


@given(seed=SEEDS, lengths=LENGTHS, beta=st.floats(0, 5))
def test_rewards_equal_the_token_by_token_definition_whatever_padding_holds(
    seed: int, lengths: list[int], beta: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lp_BT, ref_BT = -torch.rand(2, len(lengths), 6, generator=generator, dtype=torch.float64) * 5
    scores_B = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    mask_BT = _mask(lengths)
    lp_BT[~mask_BT], ref_BT[~mask_BT] = math.nan, math.inf
    rewards_BT, kl_BT = shape_rewards(scores_B, lp_BT, ref_BT, mask_BT, beta)
    for b, length in enumerate(lengths):
        for t in range(6):
            if t >= length:
                assert rewards_BT[b, t] == 0 == kl_BT[b, t]
                continue
            kl = lp_BT[b, t].item() - ref_BT[b, t].item()
            score = scores_B[b].item() if t == length - 1 else 0.0
            assert kl_BT[b, t].item() == pytest.approx(kl, abs=1e-12)
            assert rewards_BT[b, t].item() == pytest.approx(score - beta * kl, abs=1e-12)
        total = scores_B[b].item() - beta * sum(kl_BT[b].tolist())
        assert sum(rewards_BT[b].tolist()) == pytest.approx(total, abs=1e-9)


def test_nan_and_infinity_on_padding_leave_rewards_untouched() -> None:
    """Historical: OpenRLHF#1240, NaN * 0 is NaN."""
    clean = shape_rewards(SCORES, LOGPROBS, REF, MASK, beta=0.1)
    for padding in (math.nan, math.inf, -math.inf):
        dirty = shape_rewards(
            SCORES, LOGPROBS.masked_fill(~MASK, padding), REF.masked_fill(~MASK, padding), MASK, beta=0.1
        )
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_leaving_the_reference_costs_and_returning_pays() -> None:
    """Historical: verl a65c9157, the sign of the KL."""
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    rewards_BT, _ = shape_rewards(
        torch.zeros(1), torch.tensor([[-0.1, -3.0]]), torch.tensor([[-1.1, -1.0]]), mask_BT, beta=0.5
    )
    assert rewards_BT[0].tolist() == pytest.approx([-0.5, 1.0])


def test_rewards_carry_no_gradient() -> None:
    lp_BT = LOGPROBS.clone().requires_grad_()
    rewards_BT, kl_BT = shape_rewards(SCORES.clone().requires_grad_(), lp_BT, REF, MASK, beta=0.1)
    assert not rewards_BT.requires_grad
    assert not kl_BT.requires_grad


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_an_impossible_price_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta is"):
        shape_rewards(SCORES, LOGPROBS, REF, MASK, beta)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_log_probability_that_is_no_number_is_refused_by_name_and_row(broken: float) -> None:
    ref_BT = REF.clone()
    ref_BT[1, 2] = broken
    with pytest.raises(ValueError, match="ref_logprobs_BT is not finite on valid tokens of rows 1"):
        shape_rewards(SCORES, LOGPROBS, ref_BT, MASK, beta=0.1)


# PPO-max, length


def test_scores_are_divided_by_the_deviation_of_all_so_far_also_after_a_restart() -> None:
    random = np.random.default_rng(0)
    batches = [random.normal(3.0, 2.0, size).astype(np.float32) for size in (1, 4, 7, 2)]
    scale, seen = RunningScale(), np.array([])
    for batch in batches:
        seen = np.concatenate([seen, batch])
        std = seen.std(ddof=1) if len(seen) > 1 else 1.0  # One score has no deviation: it is left as it is.
        found = scale.scale(torch.from_numpy(batch))
        assert found.tolist() == pytest.approx((batch / std).tolist(), rel=1e-6)
        again = RunningScale()
        again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
        assert again.moments == scale.moments  # Bit for bit, through JSON.
        scale = again


def test_scores_that_were_all_alike_are_left_as_they_are() -> None:
    assert RunningScale().scale(torch.full((5,), 0.3)).tolist() == pytest.approx([0.3] * 5)


def test_statistics_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the saved statistics of the scores hold \['beta'\]"):
        RunningScale().load_state_dict({"beta": 1.0})


@given(lengths=LENGTHS, free=st.integers(0, 7))
def test_each_token_beyond_the_free_ones_costs_its_price(lengths: list[int], free: int) -> None:
    mask_BT = torch.arange(6) < torch.tensor(lengths)[:, None]
    scores_B = torch.linspace(-1, 1, len(lengths), dtype=torch.float64)
    found = apply_length_penalty(scores_B, mask_BT, 0.25, free).tolist()
    assert found == pytest.approx(
        [s - 0.25 * max(0, n - free) for s, n in zip(scores_B.tolist(), lengths, strict=True)]
    )


@pytest.mark.parametrize(("price", "free"), [(-0.1, 0), (math.nan, 0), (0.1, -1)])
def test_impossible_length_penalties_are_refused(price: float, free: int) -> None:
    with pytest.raises(ValueError, match="both must be finite and at least 0"):
        apply_length_penalty(SCORES, MASK, price, free)
