"""Facts about log-probabilities and entropies.

Shapes: B sequences, T response tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import fast_linear
from trainer.losses import chunked_selective_logprobs, entropy_from_logits, selective_logprobs

SEEDS = st.integers(0, 2**31)


def _head(
    seed: int, batch: int = 3, tokens: int = 5, width: int = 4, vocabulary: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, projection, bias and ids; the first three as leaves that need gradients."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    ids_BT = torch.randint(vocabulary, (batch, tokens), generator=generator)
    return leaf(batch, tokens, width), leaf(vocabulary, width), leaf(vocabulary), ids_BT


# From logits


@given(seed=SEEDS, temperature=st.floats(0.1, 5))
def test_selective_logprobs_equal_log_of_the_softmax_at_the_temperature(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = 4 * torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    ids_BT = torch.randint(6, (2, 3), generator=generator)
    result_BT = selective_logprobs(logits_BTV, ids_BT, temperature)
    for b in range(2):
        for t in range(3):
            scaled = [x / temperature for x in logits_BTV[b, t].tolist()]
            total = sum(math.exp(x - max(scaled)) for x in scaled)
            expected = scaled[int(ids_BT[b, t])] - max(scaled) - math.log(total)
            assert result_BT[b, t].item() == pytest.approx(expected, abs=1e-10)


def test_equal_policies_have_no_kl_when_both_divide_by_the_same_temperature() -> None:
    """Row 8: at T = .7 on one side alone, a policy would seem to differ from itself."""
    generator = torch.Generator().manual_seed(1)
    logits_BTV = 3 * torch.randn(4, 8, 20, generator=generator)
    ids_BT = torch.randint(20, (4, 8), generator=generator)
    sampled_BT = selective_logprobs(logits_BTV, ids_BT, 0.7)
    assert (sampled_BT - selective_logprobs(logits_BTV, ids_BT, 0.7)).abs().max() == 0
    assert (sampled_BT - selective_logprobs(logits_BTV, ids_BT, 1.0)).abs().mean() > 0.3


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits_BTV = torch.randn(2, 3, 5000, generator=torch.Generator().manual_seed(2)).bfloat16()
    ids_BT = torch.tensor([[0, 1, 2], [3, 4, 4999]])
    result_BT = selective_logprobs(logits_BTV, ids_BT)
    assert result_BT.dtype == torch.float32
    torch.testing.assert_close(result_BT.double(), selective_logprobs(logits_BTV.double(), ids_BT), atol=1e-5, rtol=0)


@given(seed=SEEDS, scale=st.floats(0.01, 20))
def test_entropy_equals_its_definition(seed: int, scale: float) -> None:
    logits = scale * torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = logits.softmax(-1).tolist()
    expected = -sum(x * math.log(x) for x in p if x > 0)
    assert entropy_from_logits(logits).item() == pytest.approx(expected, abs=1e-9)


def test_entropy_is_log_v_when_uniform_and_counts_excluded_tokens_as_nothing() -> None:
    assert entropy_from_logits(torch.zeros(50)).item() == pytest.approx(math.log(50), rel=1e-6)
    logits = torch.tensor([1.0, -math.inf, 0.5], dtype=torch.float64, requires_grad=True)
    entropy = entropy_from_logits(logits)
    kept = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    kept_entropy = entropy_from_logits(kept)
    assert entropy.item() == pytest.approx(kept_entropy.item(), abs=1e-15)
    entropy.backward()
    kept_entropy.backward()
    assert logits.grad is not None
    assert kept.grad is not None
    torch.testing.assert_close(logits.grad[[0, 2]], kept.grad)
    assert logits.grad[1] == 0


# From hidden states, in chunks


@settings(deadline=None)
@given(
    seed=SEEDS,
    chunk_tokens=st.integers(1, 20),
    part_size=st.none() | st.integers(1, 20),
    temperature=st.floats(0.3, 3),
    with_bias=st.booleans(),
    want_entropy=st.booleans(),
)
def test_chunks_have_the_value_and_the_gradient_of_the_naive_computation(
    seed: int, chunk_tokens: int, part_size: int | None, temperature: float, with_bias: bool, want_entropy: bool
) -> None:
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(seed)
    used_bias_V = bias_V if with_bias else None
    coefficients_BT, entropy_coefficients_BT = torch.randn(
        2, 3, 5, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    leaves = [hidden_BTD, weight_VD, *([bias_V] if with_bias else [])]

    logits_BTV = functional.linear(hidden_BTD, weight_VD, used_bias_V)
    naive_BT = (logits_BTV / temperature).log_softmax(-1).gather(-1, ids_BT[..., None])[..., 0]
    naive = (naive_BT * coefficients_BT).sum()
    if want_entropy:
        p_BTV = (logits_BTV / temperature).softmax(-1)
        naive_entropy_BT = -(p_BTV * p_BTV.log()).sum(-1)
        naive = naive + (naive_entropy_BT * entropy_coefficients_BT).sum()
    expected = torch.autograd.grad(naive, leaves)

    logprobs_BT, entropy_BT = chunked_selective_logprobs(
        hidden_BTD,
        weight_VD,
        used_bias_V,
        ids_BT,
        temperature,
        chunk_tokens,
        part_size=part_size,
        want_entropy=want_entropy,
    )
    torch.testing.assert_close(logprobs_BT, naive_BT, atol=1e-10, rtol=0)
    chunked = (logprobs_BT * coefficients_BT).sum()
    if want_entropy:
        assert entropy_BT is not None
        torch.testing.assert_close(entropy_BT, naive_entropy_BT, atol=1e-10, rtol=0)
        chunked = chunked + (entropy_BT * entropy_coefficients_BT).sum()
    else:
        assert entropy_BT is None
    for ours, theirs in zip(torch.autograd.grad(chunked, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_chunked_gradients_equal_finite_differences() -> None:
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(3, batch=2, tokens=3, vocabulary=5)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return chunked_selective_logprobs(hidden, weight, bias, ids_BT, 0.7, 2, part_size=3, want_entropy=True)

    assert torch.autograd.gradcheck(both, (hidden_BTD, weight_VD, bias_V))


def test_a_gradient_of_the_entropy_alone_is_right() -> None:
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(4)
    _, entropy_BT = chunked_selective_logprobs(hidden_BTD, weight_VD, bias_V, ids_BT, 1.0, 4, want_entropy=True)
    assert entropy_BT is not None
    naive_BT = entropy_from_logits(functional.linear(hidden_BTD, weight_VD, bias_V))
    leaves = (hidden_BTD, weight_VD, bias_V)
    for ours, theirs in zip(
        torch.autograd.grad(entropy_BT.sum(), leaves), torch.autograd.grad(naive_BT.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_tokens_that_a_bias_excludes_count_for_nothing_in_whichever_part_they_are() -> None:
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(7, vocabulary=12)
    excluded_V = torch.zeros(12, dtype=torch.bool)
    excluded_V[:5] = True
    ids_BT = ids_BT % 7 + 5
    bias_V = bias_V.detach().masked_fill(excluded_V, -math.inf)
    logprobs_BT, entropy_BT = chunked_selective_logprobs(
        hidden_BTD, weight_VD, bias_V, ids_BT, 1.0, 4, part_size=4, want_entropy=True
    )
    assert entropy_BT is not None
    logits_BTV = functional.linear(hidden_BTD, weight_VD[5:], bias_V[5:])
    torch.testing.assert_close(logprobs_BT, selective_logprobs(logits_BTV, ids_BT - 5), atol=1e-10, rtol=0)
    torch.testing.assert_close(entropy_BT, entropy_from_logits(logits_BTV), atol=1e-10, rtol=0)
    (logprobs_BT.sum() + entropy_BT.sum()).backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad.isfinite().all()


def test_float32_logprobs_and_gradients_are_near_those_of_float64() -> None:
    """At a size at which the faster products are used."""
    leaves = [leaf.detach() for leaf in _head(8, batch=4, tokens=40, vocabulary=5000)[:3]]
    ids_BT = torch.randint(0, 5000, (4, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for dtype, part_size in ((torch.float64, None), (torch.float32, 4096)):
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        logprobs_BT, _ = chunked_selective_logprobs(*own, ids_BT, 1.0, 100, part_size=part_size)
        found.append([logprobs_BT, *torch.autograd.grad(logprobs_BT.sum(), own)])
    for exact, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


class _LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return result


def test_no_tensor_larger_than_a_chunk_of_logits_or_the_weight_is_ever_made() -> None:
    """Forwards and backwards, in 64 x 2000 logits, chunks of 4 and a weight of 2000 x 4."""
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(5, batch=8, tokens=8, vocabulary=2000)
    with _LargestTensor() as chunked:
        logprobs_BT, entropy_BT = chunked_selective_logprobs(
            hidden_BTD, weight_VD, bias_V, ids_BT, 1.0, 4, want_entropy=True
        )
        assert entropy_BT is not None
        (logprobs_BT.sum() + entropy_BT.sum()).backward()
    assert chunked.elements == 4 * 2000
    with _LargestTensor() as naive:
        selective_logprobs(functional.linear(hidden_BTD, weight_VD, bias_V), ids_BT).sum().backward()
    assert naive.elements == 64 * 2000


@settings(deadline=None)
@given(seed=SEEDS, lengths=st.lists(st.integers(0, 5), min_size=3, max_size=3), chunk_tokens=st.integers(1, 9))
def test_masked_chunks_skip_padding_in_value_and_gradient(seed: int, lengths: list[int], chunk_tokens: int) -> None:
    """Whatever padding holds: NaN hidden states and ids of -100 included."""
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(seed)
    mask_BT = torch.arange(5) < torch.tensor(lengths)[:, None]
    leaves = (hidden_BTD, weight_VD, bias_V)
    naive_BT = selective_logprobs(functional.linear(hidden_BTD, weight_VD, bias_V), ids_BT)
    expected = torch.autograd.grad(naive_BT[mask_BT].sum(), leaves)

    dirty_BTD = hidden_BTD.detach().masked_fill(~mask_BT[..., None], math.nan).requires_grad_()
    dirty_ids_BT = ids_BT.masked_fill(~mask_BT, -100)
    logprobs_BT, entropy_BT = chunked_selective_logprobs(
        dirty_BTD, weight_VD, bias_V, dirty_ids_BT, 1.0, chunk_tokens, mask_BT=mask_BT, want_entropy=True
    )
    assert entropy_BT is not None
    torch.testing.assert_close(logprobs_BT, naive_BT.masked_fill(~mask_BT, 0.0), atol=1e-10, rtol=0)
    assert (entropy_BT[~mask_BT] == 0).all()
    for ours, theirs in zip(
        torch.autograd.grad(logprobs_BT.sum(), (dirty_BTD, weight_VD, bias_V)), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_a_frozen_projection_gets_no_gradient_and_hidden_states_still_do() -> None:
    hidden_BTD, weight_VD, _bias_V, ids_BT = _head(6)
    frozen_VD = weight_VD.detach()
    logprobs_BT, _ = chunked_selective_logprobs(hidden_BTD, frozen_VD, None, ids_BT, 1.0, 4)
    naive_BT = selective_logprobs(hidden_BTD @ frozen_VD.T, ids_BT)
    torch.testing.assert_close(
        torch.autograd.grad(logprobs_BT.sum(), hidden_BTD), torch.autograd.grad(naive_BT.sum(), hidden_BTD)
    )


def test_under_autocast_no_logit_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the processor has products of bfloat16, which it would round."""
    monkeypatch.setattr(fast_linear, "multiplies_bfloat16", lambda: True)
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(9, width=32, vocabulary=100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_BT, entropy_BT = chunked_selective_logprobs(
            hidden_BTD, weight_VD, bias_V, ids_BT, 0.7, 4, part_size=30, want_entropy=True
        )
    assert entropy_BT is not None
    logits_BTV = functional.linear(*(x.detach().bfloat16().double() for x in (hidden_BTD, weight_VD, bias_V)))
    for ours_BT, of in ((found_BT, lambda z: selective_logprobs(z, ids_BT)), (entropy_BT, entropy_from_logits)):
        exact_BT = of(logits_BTV / 0.7)
        assert (ours_BT - exact_BT).abs().max() < 1e-5
        assert (of(logits_BTV.bfloat16().double() / 0.7) - exact_BT).abs().max() > 1e-3


def test_under_autocast_values_and_gradients_are_those_of_the_naive_computation_there() -> None:
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(7, width=32, vocabulary=100, dtype=torch.float32)
    leaves = (hidden_BTD, weight_VD, bias_V)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        naive_BT = selective_logprobs(functional.linear(hidden_BTD, weight_VD, bias_V), ids_BT)
        chunked_BT, _ = chunked_selective_logprobs(hidden_BTD, weight_VD, bias_V, ids_BT, 1.0, 4)
    assert chunked_BT.dtype == torch.float32
    torch.testing.assert_close(chunked_BT, naive_BT, atol=0.05, rtol=0)
    exact_BT = selective_logprobs(functional.linear(hidden_BTD, weight_VD, bias_V), ids_BT)
    assert (chunked_BT - exact_BT).abs().max() > 0  # bfloat16 was used.
    for ours, theirs in zip(
        torch.autograd.grad(chunked_BT.sum(), leaves), torch.autograd.grad(exact_BT.sum(), leaves), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_bfloat16_weight_gradient_is_summed_in_float32_over_chunks() -> None:
    """Adding 512 chunks in bfloat16 would stall once the sum is 256 times a summand."""
    hidden_BTD, weight_VD, _, ids_BT = _head(8, batch=1, tokens=512, vocabulary=8, dtype=torch.bfloat16)
    hidden_BTD = hidden_BTD.detach().abs()
    logprobs_BT, _ = chunked_selective_logprobs(hidden_BTD, weight_VD, None, torch.zeros_like(ids_BT), 1.0, 1)
    (ours,) = torch.autograd.grad(logprobs_BT.sum(), weight_VD)
    exact_VD = weight_VD.detach().double().requires_grad_()
    exact_BT = selective_logprobs(hidden_BTD.double() @ exact_VD.T, torch.zeros_like(ids_BT))
    (exact,) = torch.autograd.grad(exact_BT.sum(), exact_VD)
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - exact).norm() / exact.norm()).item() < 0.005


# Refusals


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(9)
    with pytest.raises(ValueError, match="temperature is"):
        selective_logprobs(hidden_BTD @ weight_VD.T, ids_BT, temperature)
    with pytest.raises(ValueError, match="temperature is"):
        chunked_selective_logprobs(hidden_BTD, weight_VD, bias_V, ids_BT, temperature, 4)


@pytest.mark.parametrize("bad", [-100, 11])
def test_ids_outside_the_vocabulary_are_refused_with_their_range(bad: int) -> None:
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(10)
    ids_BT[1, 2] = bad
    for call in (
        lambda: selective_logprobs(hidden_BTD @ weight_VD.T, ids_BT),
        lambda: chunked_selective_logprobs(hidden_BTD, weight_VD, bias_V, ids_BT),
    ):
        with pytest.raises(ValueError, match=rf"{bad}.*below the vocabulary's 11"):
            call()


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden_BTD, weight_VD, bias_V, ids_BT = _head(11)
    with pytest.raises(ValueError, match=r"ids_BT has shape \(3, 4\), logits_BTV has \(3, 5, 11\)"):
        selective_logprobs(hidden_BTD @ weight_VD.T, ids_BT[:, :4])
    with pytest.raises(ValueError, match=r"ids_BT has shape \(3, 4\), hidden_BTD has \(3, 5, 4\)"):
        chunked_selective_logprobs(hidden_BTD, weight_VD, bias_V, ids_BT[:, :4])
    with pytest.raises(ValueError, match=r"do not fit lm_head_weight_VD of shape \(11, 3\)"):
        chunked_selective_logprobs(hidden_BTD, weight_VD[:, :3], bias_V, ids_BT)
    with pytest.raises(ValueError, match=r"bias_V \(10,\)"):
        chunked_selective_logprobs(hidden_BTD, weight_VD, bias_V[:10], ids_BT)
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        chunked_selective_logprobs(hidden_BTD, weight_VD, bias_V, ids_BT, chunk_tokens=0)
