"""Attention within a row: sequence by sequence, and never to what another does not share.

Shapes: N tokens of the row, M of them looked at, H heads, K key-value heads, E head width, S a side of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import AttentionMaskInterface

from services.hosting.row import Row

# Name under which transformers finds it.
ATTENTION = "quartet_packed"
# So many queries at a time: all of a block are multiplied by all keys up to its last. A GPU's own kernel knows better.
_CPU_QUERIES, _GPU_QUERIES = 64, 1024


@dataclass(frozen=True, slots=True)
class Window:
    """In place of a layer's mask: a token looks at ``tokens`` tokens at most, itself the last of them."""

    tokens: int


def _window(*_: Any, local_size: int | None = None, config: Any = None, **__: Any) -> Window | None:
    """What transformers calls to make a mask. The row says who sees whom; only a window is the mask's to tell.

    Attention without a mask of ours goes by the mask, too, and many a model tells its window nowhere else.

    Raises:
        NotImplementedError: the mask cuts attention into chunks.
    """
    if local_size is not None and getattr(config, "attention_chunk_size", None) is not None:
        raise NotImplementedError("attention in chunks")
    return None if local_size is None else Window(local_size)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    quartet_row: Row | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer. ``query`` (1, H, N, E), ``key`` and ``value`` (1, K, N, E).

    ``attention_mask``: what ``_window`` has made of it.

    Raises:
        NotImplementedError: the model's attention needs more than we know of.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if not isinstance(attention_mask, Window | None):
        unknown.append("a mask of the model's own making")
    window = attention_mask.tokens if isinstance(attention_mask, Window) else None
    if sliding_window not in (None, window):
        unknown.append("a window that its mask does not have")
    if quartet_row is None or unknown or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"attention with {unknown or 'no row, or both directions'}")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(quartet_row, query, key, value, scaling, window), None
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    block = _GPU_QUERIES if query.is_cuda else _CPU_QUERIES
    for piece in quartet_row.pieces:
        own = slice(piece.start, piece.end)
        keys, values = key[:, :, own], value[:, :, own]
        if piece.prefix_length:
            prefix = slice(piece.prefix_start, piece.prefix_start + piece.prefix_length)
            keys = torch.cat([key[:, :, prefix], keys], dim=2)
            values = torch.cat([value[:, :, prefix], values], dim=2)
        for first in range(piece.seen_only, piece.length, block):
            end = min(first + block, piece.length)
            before, total = piece.prefix_length + first, piece.prefix_length + end
            mask = _mask(quartet_row, before, total, window, block, query)
            own = slice(piece.start + first, piece.start + end)
            out[:, own] = F.scaled_dot_product_attention(
                query[:, :, own],
                keys[:, :, :total],
                values[:, :, :total],
                attn_mask=mask,
                is_causal=mask is None and end - first > 1,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
    return out, None


def _mask(row: Row, before: int, total: int, window: int | None, block: int, query: Tensor) -> Tensor | None:
    """(total - before, total) of ``query``'s precision, added to the scores: 0 where a token may look, else -inf.

    None where plain causality says it all, or one token looks at all.

    Args:
        before: tokens before the first that looks.
        total: tokens that are looked at.
        block: at most so many tokens look.
    """
    slides = window is not None and window < total
    if not slides and (before == 0 or before == total - 1):
        return None
    # Who sees whom depends on how far apart they are: all masks are parts of one.
    name = f"mask {window}"
    if name not in row.memo:
        longest = max(piece.prefix_length + piece.length for piece in row.pieces)
        distance_SS = torch.arange(block, device=query.device)[:, None] + longest
        distance_SS = distance_SS - torch.arange(longest + block, device=query.device)[None, :]
        unseen_SS = (distance_SS < 0) if window is None else (distance_SS < 0) | (distance_SS >= window)
        row.memo[name] = longest, query.new_zeros(unseen_SS.shape).masked_fill_(unseen_SS, -torch.inf)
    longest, whole_SS = row.memo[name]
    mask: Tensor = whole_SS[: total - before, longest - before : longest - before + total]
    return mask


def _varlen(row: Row, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """All pieces in one call of the GPU's kernel, whose causality is aligned to the end of the keys."""
    from torch.nn.attention.varlen import varlen_attn

    if "varlen" not in row.memo:
        wanted = [
            torch.cat(
                [
                    torch.arange(p.prefix_start, p.prefix_start + p.prefix_length),
                    torch.arange(p.start, p.start + p.length),
                ]
            )
            for p in row.pieces
        ]
        counts = [[p.length for p in row.pieces], [len(w) for w in wanted]]
        ends = [torch.tensor([0, *np.cumsum(c)], dtype=torch.int32, device=query.device) for c in counts]
        shared = any(p.prefix_length for p in row.pieces)
        row.memo["varlen"] = (*ends, *map(max, counts), torch.cat(wanted).to(query.device) if shared else None)
    ends_q, ends_k, longest_q, longest_k, wanted_M = row.memo["varlen"]
    query_NHE, key_NKE, value_NKE = (x[0].transpose(0, 1) for x in (query, key, value))
    if wanted_M is not None:
        key_NKE, value_NKE = key_NKE[wanted_M], value_NKE[wanted_M]
    out_NHE = varlen_attn(
        query_NHE.contiguous(),
        key_NKE.contiguous(),
        value_NKE.contiguous(),
        ends_q,
        ends_k,
        longest_q,
        longest_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out_NHE, Tensor)
    return out_NHE[None]


transformers.AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _window)
