"""Facts about schedule, optimiser, and what is done to gradients and weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.errors import DivergedError
from trainer.optimisation import apply_gradients, clip_weights, linear_schedule, make_adamw


def test_the_learning_rate_falls_linearly_to_zero() -> None:
    """Row 19."""
    assert [linear_schedule(step, 4, 0.0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_warm_up_rises_linearly_to_the_peak() -> None:
    assert [linear_schedule(step, 8, 0.5) for step in range(9)] == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0]


@given(total=st.integers(1, 200), warmup=st.floats(0, 1))
def test_no_step_is_without_a_learning_rate_and_one_has_all_of_it(total: int, warmup: float) -> None:
    shares = [linear_schedule(step, total, warmup) for step in range(total)]
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) == 1


def _layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def test_weight_decay_shrinks_matrices_and_leaves_biases_and_norms() -> None:
    model = _layers()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_adamw(model, learning_rate=0.1, weight_decay=0.5).step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.ndim == 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-7, rtol=0)
    assert {name for name, parameter in model.named_parameters() if parameter.ndim == 2} == {"0.weight", "2.weight"}


@pytest.mark.parametrize(("max_norm", "step"), [(1.0, 1.0), (100.0, 5.0)])
def test_a_gradient_is_scaled_down_to_the_norm_and_never_up(max_norm: float, step: float) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert apply_gradients(torch.optim.SGD([parameter], lr=1.0), max_norm) == pytest.approx(5.0)
    assert parameter.detach().tolist() == pytest.approx([-0.6 * step, -0.8 * step], abs=1e-5)
    assert parameter.grad is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(broken: float) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, broken])
    with pytest.raises(DivergedError, match=r"^the gradient's norm is (nan|inf)$"):
        apply_gradients(torch.optim.SGD([parameter], lr=1.0), 1.0)
    assert parameter.detach().tolist() == [1.0, 1.0]


def test_clipped_weights_keep_within_the_bound() -> None:
    parameter = nn.Parameter(torch.tensor([-3.0, -0.01, 0.02, 5.0]))
    clip_weights([parameter], 0.02)
    assert parameter.detach().tolist() == pytest.approx([-0.02, -0.01, 0.02, 0.02])
