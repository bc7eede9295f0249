"""Facts about reductions over valid tokens. Shapes: B sequences, T response tokens."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.masked import (
    Moments,
    check_batch,
    check_right_padded,
    combine_moments,
    fill_padding,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_var,
    rows,
)

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) >= 2)
SEEDS = st.integers(0, 2**31)


def _batch(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor, list[float]]:
    """Random numbers with NaN on padding, their mask, and the valid ones as a plain list."""
    x_BT = 3 + 2 * torch.randn(len(lengths), 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask_BT = torch.arange(6) < torch.tensor(lengths)[:, None]
    x_BT[~mask_BT] = math.nan
    return x_BT, mask_BT, [x_BT[b, t].item() for b in range(len(lengths)) for t in range(lengths[b])]


@given(seed=SEEDS, lengths=LENGTHS)
def test_sum_mean_and_bessels_variance_are_those_of_the_valid_numbers(seed: int, lengths: list[int]) -> None:
    x_BT, mask_BT, valid = _batch(seed, lengths)
    assert masked_sum(x_BT, mask_BT).item() == pytest.approx(sum(valid))
    assert masked_mean(x_BT, mask_BT).item() == pytest.approx(statistics.fmean(valid))
    assert masked_var(x_BT, mask_BT).item() == pytest.approx(statistics.variance(valid))


@given(seed=SEEDS, lengths=LENGTHS)
def test_gradients_are_zero_on_padding_and_finite_elsewhere(seed: int, lengths: list[int]) -> None:
    x_BT, mask_BT, _ = _batch(seed, lengths)
    x_BT.requires_grad_()
    (masked_mean(x_BT, mask_BT) + masked_var(x_BT, mask_BT) + masked_sum(x_BT, mask_BT)).backward()
    assert x_BT.grad is not None
    assert (x_BT.grad[~mask_BT] == 0).all()
    assert x_BT.grad.isfinite().all()


@given(parts=st.lists(st.tuples(SEEDS, st.lists(st.integers(0, 6), min_size=1, max_size=4)), min_size=1, max_size=4))
def test_moments_of_processes_combine_into_those_of_all_their_tokens(parts: list[tuple[int, list[int]]]) -> None:
    batches = [_batch(seed, lengths) for seed, lengths in parts]
    together = combine_moments([masked_moments(x_BT, mask_BT) for x_BT, mask_BT, _ in batches])
    valid = [number for _, _, numbers in batches for number in numbers]
    assert together.count == len(valid)
    if len(valid) >= 2:
        assert together.mean == pytest.approx(statistics.fmean(valid))
        assert together.variance == pytest.approx(statistics.variance(valid))


def test_moments_far_from_zero_keep_their_digits() -> None:
    """The mean of squares minus the squared mean would lose all of them at 1e9."""
    parts = [
        Moments(count=2, mean=1e9 + 1, squared_deviations=2.0),
        Moments(count=2, mean=1e9 + 5, squared_deviations=2.0),
    ]
    assert combine_moments(parts).variance == pytest.approx(statistics.variance([0.0, 2.0, 4.0, 6.0]))


def test_nothing_valid_has_a_sum_of_zero_and_no_mean_or_variance() -> None:
    x_BT, mask_BT = torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(x_BT, mask_BT).item() == 0
    assert masked_moments(x_BT, mask_BT) == Moments(count=0, mean=0.0, squared_deviations=0.0)
    assert combine_moments([]) == Moments(count=0, mean=0.0, squared_deviations=0.0)
    with pytest.raises(ValueError, match="0 valid tokens"):
        masked_mean(x_BT, mask_BT)
    mask_BT[0, 0] = True
    with pytest.raises(ValueError, match="at least 2 valid tokens, mask_BT has 1"):
        masked_var(x_BT, mask_BT)
    with pytest.raises(ValueError, match="there are 1"):
        _ = Moments(count=1, mean=0.0, squared_deviations=0.0).variance


def test_filling_padding_cuts_nan_from_value_and_gradient_where_multiplying_does_not() -> None:
    """Historical: OpenRLHF#1240, NaN * 0 is NaN; and selecting after exp is no better, in the backward pass."""
    mask_BT = torch.tensor([[True, False]])
    for padding in (math.nan, math.inf, 1e6):
        x_BT = torch.tensor([[1.0, padding]], requires_grad=True)
        fill_padding(x_BT, mask_BT).exp().sum().backward()
        assert x_BT.grad is not None
        assert x_BT.grad.tolist() == [[pytest.approx(math.e), 0.0]]
        late_BT = torch.tensor([[1.0, padding]], requires_grad=True)
        late_BT.exp().masked_fill(~mask_BT, 0.0).sum().backward()
        assert late_BT.grad is not None
        assert late_BT.grad[0, 1].isnan()


@pytest.mark.parametrize(
    ("mask_BT", "message"),
    [
        (torch.ones(2, 3), r"mask_BT has dtype torch.float32: it must be torch.bool"),
        (torch.ones(3, dtype=torch.bool), r"mask_BT has shape \(3,\)"),
        (torch.ones(0, 3, dtype=torch.bool), r"mask_BT has shape \(0, 3\): .* both at least 1"),
        (torch.ones(2, 4, dtype=torch.bool), r"x_BT has shape \(2, 3\), mask_BT has \(2, 4\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name(mask_BT: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch(mask_BT, x_BT=torch.zeros(2, 3))


def test_a_row_that_is_not_right_padded_is_refused_by_number() -> None:
    check_right_padded(torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool))
    with pytest.raises(ValueError, match="in rows 1, 2 a valid token follows padding"):
        check_right_padded(torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=torch.bool))


def test_of_many_rows_the_first_eight_are_named() -> None:
    assert rows(torch.ones(11, dtype=torch.bool)) == "rows 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
