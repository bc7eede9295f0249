"""Log-probabilities of given tokens, and entropies, from logits or straight from hidden states.

Shapes: B sequences, T response tokens, D hidden size, V vocabulary, N tokens of any number of sequences laid end to
end, C tokens of one chunk.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

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
    mask_BT: Tensor | None = None,
    want_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``selective_logprobs`` of ``hidden @ weight.T + bias`` without the (B, T, V) logits, forwards or backwards.

    Logits exist for ``chunk_tokens`` tokens at a time and are computed again in the backward pass; gradients reach
    the hidden states, the weight and the bias.

    Args:
        hidden_BTD: (B, T, D) the last hidden state at the positions that predict ``ids_BT``.
        lm_head_weight_VD: (V, D) the output projection.
        bias_V: (V,) its bias, or None.
        ids_BT: (B, T) the tokens asked for.
        temperature: divides the logits, above 0.
        chunk_tokens: tokens whose logits exist at once; small chunks stay in cache.
        mask_BT: (B, T) True on valid tokens; padding is then not computed, and is 0 in the result. None: all are.
        want_entropy: whether the entropy of each token's distribution is asked for, too.

    Returns:
        logprobs_BT and entropy_BT (None unless wanted), at least float32, both differentiable.

    Raises:
        ValueError: shapes do not fit, an id lies outside the vocabulary, ``temperature`` is not positive or
            ``chunk_tokens`` below 1.
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
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: it must be at least 1")
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
        logprobs_N, entropy_N = apply(hidden_ND, weight_VD, bias_V, ids_N, temperature, chunk_tokens, want_entropy)

    def laid_out(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(ids_BT.shape).masked_scatter(valid_BT, x_N)

    return laid_out(logprobs_N), laid_out(entropy_N) if want_entropy else None


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
        chunk_tokens: int,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        logprobs_N = hidden_ND.new_empty(len(ids_N), dtype=dtype)
        log_totals_N = torch.empty_like(logprobs_N)
        entropy_N = torch.empty_like(logprobs_N) if want_entropy else None
        for start in range(0, len(ids_N), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CV = _wide(functional.linear(hidden_ND[chunk], weight_VD, bias_V)) / temperature
            log_totals_N[chunk] = logits_CV.logsumexp(dim=-1)
            logprobs_N[chunk] = logits_CV.gather(-1, ids_N[chunk, None])[:, 0] - log_totals_N[chunk]
            if entropy_N is not None:
                entropy_N[chunk] = entropy_from_logits(logits_CV)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_N, log_totals_N, entropy_N)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, ids_N, log_totals_N, entropy_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.zeros_like(hidden_ND) if needs_hidden else None
        # Summed over chunks in at least float32: hundreds of bfloat16 additions would lose the small ones.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=log_totals_N.dtype) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=log_totals_N.dtype) if needs_bias else None
        for start in range(0, len(ids_N), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            logits_CV = _wide(functional.linear(hidden_ND[chunk], weight_VD, bias_V)) / ctx.temperature
            log_p_CV = logits_CV - log_totals_N[chunk, None]
            p_CV = log_p_CV.exp()
            grad_CV = torch.zeros_like(p_CV)
            if grad_logprobs_N is not None:  # d log p_i / d z_j = [i = j] - p_j
                grad_C = grad_logprobs_N[chunk, None]
                grad_CV.addcmul_(p_CV, grad_C, value=-1.0).scatter_add_(1, ids_N[chunk, None], grad_C)
            if grad_entropy_N is not None:  # dH / d z_j = -p_j (log p_j + H)
                surprise_CV = log_p_CV.masked_fill(log_p_CV == -math.inf, 0.0) + entropy_N[chunk, None]
                grad_CV.addcmul_(p_CV * surprise_CV, grad_entropy_N[chunk, None], value=-1.0)
            grad_CV = (grad_CV / ctx.temperature).to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[chunk] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.T @ hidden_ND[chunk]
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(dim=0, dtype=grad_bias_V.dtype)
        return (
            grad_hidden_ND,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            *(None,) * 4,
        )


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
