"""Log-probabilities of given tokens, and entropies, from logits or straight from hidden states.

Shapes: B sequences, T response tokens, D hidden size, V vocabulary, N tokens of any number of sequences laid end to
end, C tokens of one chunk, U tokens of the vocabulary in one part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from trainer import fast_linear
from trainer.masked import check_batch


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits) over the last dimension, at least float32; -inf logits count for nothing."""
    log_p = torch.log_softmax(_wide(logits), dim=-1)
    # p log p is 0 where p is, not 0 * -inf.
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1)


def selective_logprobs(logits_BTV: Tensor, ids_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, T) log-probability of each id under softmax(logits / temperature), at least float32.

    Raises:
        ValueError: shapes do not fit, an id lies outside the vocabulary, or ``temperature`` is not positive.
    """
    if logits_BTV.shape[:-1] != ids_BT.shape:
        raise ValueError(f"ids_BT has shape {tuple(ids_BT.shape)}, logits_BTV has {tuple(logits_BTV.shape)}")
    _check_ids_and_temperature(ids_BT, logits_BTV.shape[-1], temperature)
    logits_BTV = _wide(logits_BTV) / temperature
    return logits_BTV.gather(-1, ids_BT[..., None])[..., 0] - logits_BTV.logsumexp(dim=-1)


def chunked_selective_logprobs(
    hidden_BTD: Tensor,
    lm_head_weight_VD: Tensor,
    bias_V: Tensor | None,
    ids_BT: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 64,
    *,
    part_size: int | None = None,
    mask_BT: Tensor | None = None,
    want_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``selective_logprobs`` of ``hidden @ weight.T + bias`` without the (B, T, V) logits, forwards or backwards.

    Logits exist for ``chunk_tokens`` tokens and a part of the vocabulary at a time and are computed again in the
    backward pass; gradients reach the hidden states, the weight and the bias.

    Args:
        hidden_BTD: (B, T, D) the last hidden state at the positions that predict ``ids_BT``.
        lm_head_weight_VD: (V, D) the output projection.
        bias_V: (V,) its bias, or None.
        ids_BT: (B, T) the tokens asked for.
        temperature: divides the logits, above 0.
        chunk_tokens: tokens whose logits exist at once.
        part_size: tokens of the vocabulary whose logits exist at once; None: all of it. On a processor, what stays in
            its cache, so that many tokens can share each reading of the weights.
        mask_BT: (B, T) True on valid tokens; padding is then not computed, and is 0 in the result. None: all are.
        want_entropy: whether the entropy of each token's distribution is asked for, too.

    Returns:
        logprobs_BT and entropy_BT (None unless wanted), at least float32, both differentiable.

    Raises:
        ValueError: shapes do not fit, an id lies outside the vocabulary, ``temperature`` is not positive, or
            ``chunk_tokens`` or ``part_size`` is below 1.
    """
    if hidden_BTD.shape[:-1] != ids_BT.shape:
        raise ValueError(f"ids_BT has shape {tuple(ids_BT.shape)}, hidden_BTD has {tuple(hidden_BTD.shape)}")
    vocabulary, width = lm_head_weight_VD.shape
    if hidden_BTD.shape[-1] != width or (bias_V is not None and bias_V.shape != (vocabulary,)):
        bias_shape = None if bias_V is None else tuple(bias_V.shape)
        raise ValueError(
            f"hidden_BTD has shape {tuple(hidden_BTD.shape)} and bias_V {bias_shape}: they do not fit "
            f"lm_head_weight_VD of shape {(vocabulary, width)}"
        )
    for name, size in (("chunk_tokens", chunk_tokens), ("part_size", vocabulary if part_size is None else part_size)):
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    if mask_BT is not None:
        check_batch(mask_BT, ids_BT=ids_BT)
    valid_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT
    ids_N = ids_BT[valid_BT]
    _check_ids_and_temperature(ids_N, vocabulary, temperature)
    hidden_ND = hidden_BTD.reshape(-1, width) if mask_BT is None else hidden_BTD[mask_BT]
    weight_VD = lm_head_weight_VD
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        # Cast here, where autograd sees it: inside a Function, autocast holds forwards but not backwards.
        half = torch.get_autocast_dtype(device)
        hidden_ND, weight_VD = hidden_ND.to(half), weight_VD.to(half)
        bias_V = None if bias_V is None else bias_V.to(half)
    with torch.autocast(device, enabled=False):
        apply = cast(Any, _ChunkedLogprobs.apply)
        sizes = (chunk_tokens, vocabulary if part_size is None else part_size)
        logprobs_N, entropy_N = apply(hidden_ND, weight_VD, bias_V, ids_N, temperature, sizes, want_entropy)

    def laid_out(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(ids_BT.shape).masked_scatter(valid_BT, x_N)

    return laid_out(logprobs_N), laid_out(entropy_N) if want_entropy else None


class _Running:
    """Sums over the vocabulary that grow part by part, relative to the largest logit so far, so that none overflows.

    (C, 1) each. ``weighted``: logits weighted by their share, for the entropy.
    """

    def __init__(self, ids_C: Tensor, dtype: torch.dtype) -> None:
        self.ids_C1 = ids_C[:, None]
        zeros_C1 = torch.zeros(len(ids_C), 1, dtype=dtype, device=ids_C.device)
        self.largest_C1 = torch.full_like(zeros_C1, -math.inf)
        self.total_C1, self.weighted_C1, self.chosen_C1 = zeros_C1, zeros_C1.clone(), zeros_C1.clone()

    def add(self, logits_CU: Tensor, part: slice, want_entropy: bool) -> None:
        """Takes in the logits of one part of the vocabulary, and writes over them."""
        inside_C1 = (self.ids_C1 >= part.start) & (self.ids_C1 < part.stop)
        places_C1 = (self.ids_C1 - part.start).clamp(0, logits_CU.shape[1] - 1)
        self.chosen_C1 = torch.where(inside_C1, logits_CU.gather(1, places_C1), self.chosen_C1)
        largest_C1 = torch.maximum(self.largest_C1, logits_CU.amax(dim=1, keepdim=True))
        base_C1 = largest_C1.masked_fill(largest_C1 == -math.inf, 0.0)  # Nothing but excluded tokens so far.
        shrink_C1 = (self.largest_C1 - base_C1).exp()
        if want_entropy:
            shares_CU = (logits_CU - base_C1).exp_()
            # p log p is 0 where p is, not 0 * -inf.
            logits_CU.masked_fill_(logits_CU == -math.inf, 0.0)
            own_C1 = shares_CU.sum(dim=1, keepdim=True)
            self.weighted_C1 = self.weighted_C1 * shrink_C1 + logits_CU.mul_(shares_CU).sum(dim=1, keepdim=True)
        else:
            own_C1 = logits_CU.sub_(base_C1).exp_().sum(dim=1, keepdim=True)
        self.total_C1 = self.total_C1 * shrink_C1 + own_C1
        self.largest_C1 = largest_C1

    @property
    def log_total_C(self) -> Tensor:
        """(C,) logarithm of the sum of all exponentials."""
        return (self.largest_C1 + self.total_C1.log())[:, 0]

    @property
    def entropy_C(self) -> Tensor:
        return self.log_total_C - (self.weighted_C1 / self.total_C1)[:, 0]


class _ChunkedLogprobs(torch.autograd.Function):
    """Log-probability and entropy of N tokens, keeping two numbers a token for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_N: Tensor,
        temperature: float,
        sizes: tuple[int, int],
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        logprobs_N = hidden_ND.new_empty(len(ids_N), dtype=dtype)
        log_totals_N = torch.empty_like(logprobs_N)
        entropy_N = torch.empty_like(logprobs_N) if want_entropy else None
        for chunk in _slices(len(ids_N), sizes[0]):
            running = _Running(ids_N[chunk], dtype)
            for part in _slices(len(weight_VD), sizes[1]):
                running.add(_logits(hidden_ND[chunk], weight_VD, bias_V, part, temperature), part, want_entropy)
            log_totals_N[chunk] = running.log_total_C
            logprobs_N[chunk] = running.chosen_C1[:, 0] - running.log_total_C
            if entropy_N is not None:
                entropy_N[chunk] = running.entropy_C
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_N, log_totals_N, entropy_N)
        ctx.temperature, ctx.sizes = temperature, sizes
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, ids_N, log_totals_N, entropy_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Summed over parts and chunks in at least float32: hundreds of bfloat16 additions would lose the small ones.
        dtype = log_totals_N.dtype
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=dtype) if needs_bias else None
        for chunk in _slices(len(ids_N), ctx.sizes[0]):
            hidden_CD, log_total_C1 = hidden_ND[chunk], log_totals_N[chunk, None]
            for part in _slices(len(weight_VD), ctx.sizes[1]):
                log_p_CU = _logits(hidden_CD, weight_VD, bias_V, part, ctx.temperature).sub_(log_total_C1)
                p_CU = log_p_CU.exp()
                grad_CU = torch.zeros_like(p_CU)
                if grad_logprobs_N is not None:  # d log p_i / d z_j = [i = j] - p_j
                    grad_C1, own_C1 = grad_logprobs_N[chunk, None], ids_N[chunk, None] - part.start
                    inside_C1 = (own_C1 >= 0) & (own_C1 < grad_CU.shape[1])
                    grad_CU.addcmul_(p_CU, grad_C1, value=-1.0)
                    grad_CU.scatter_add_(1, own_C1.clamp(0, grad_CU.shape[1] - 1), grad_C1 * inside_C1)
                if grad_entropy_N is not None:  # dH / d z_j = -p_j (log p_j + H)
                    surprise_CU = log_p_CU.masked_fill_(log_p_CU == -math.inf, 0.0).add_(entropy_N[chunk, None])
                    grad_CU.addcmul_(p_CU.mul_(surprise_CU), grad_entropy_N[chunk, None], value=-1.0)
                grad_CU = (grad_CU / ctx.temperature).to(hidden_ND.dtype)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[chunk] += _product(grad_CU, weight_VD[part].t())
                if grad_weight_VD is not None:
                    grad_weight_VD[part] += _product(grad_CU.t(), hidden_CD.t())
                if grad_bias_V is not None:
                    grad_bias_V[part] += grad_CU.sum(dim=0, dtype=dtype)
        return (
            None if grad_hidden_ND is None else grad_hidden_ND.to(hidden_ND.dtype),
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *(None,) * 4,
        )


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, part: slice, temperature: float) -> Tensor:
    """(C, U) logits of one part of the vocabulary, at least float32, nobody else's.

    In half precision products are added up and kept in float32, as the reference service has it: logits that were
    rounded would be off by hundredths, and ratios of probabilities with them.
    """
    weight_UD = weight_VD[part]
    if hidden_CD.dtype.itemsize >= 4:
        logits_CU = _product(hidden_CD, weight_UD)
    elif hidden_CD.is_cuda:
        logits_CU = torch.mm(hidden_CD, weight_UD.t(), out_dtype=torch.float32)
    else:
        logits_CU = _product(hidden_CD.float(), weight_UD.float())  # A product of two numbers is exact in float32.
    if bias_V is not None:
        logits_CU = logits_CU + bias_V[part]
    return logits_CU.div_(temperature) if temperature != 1.0 else logits_CU


def _product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """(N, O) ``x @ weight.T``."""
    if fast_linear.helps(x_NI) and weight_OI.dtype == torch.float32:
        return fast_linear.product(x_NI, weight_OI)
    if fast_linear.needs_float32(x_NI):
        return functional.linear(x_NI.float(), weight_OI.float())
    return functional.linear(x_NI, weight_OI)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_ids_and_temperature(ids: Tensor, vocabulary: int, temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be finite and above 0")
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"ids_BT holds values from {low} to {high}: they must be at least 0 and below the vocabulary's {vocabulary}"
            "; fill padding with any valid id"
        )
