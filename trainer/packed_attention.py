"""Attention within a row of sequences: each token looks at its own sequence, or at a beginning that several share.

Shapes: N tokens of the row, M of them asked for, H heads, K key-value heads, E head width, F all heads side by side, S
tokens of a piece, P places of a grid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trainer.fast_linear import needs_float32

# Name under which transformers finds it.
ATTENTION = "quartet_training_row"
# So many queries at a time where a mask says who sees whom: it has that many rows.
_MASKED_QUERIES = 1024
# Pieces of fewer tokens on average are too little work to be worth a call each.
_SHORT = 512
# Pieces that differ by more are not padded to one length.
_ALIKE = 0.75

_packing: ContextVar[bool] = ContextVar("_packing", default=False)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of the row that attend, causally, to an earlier piece, if any, and to themselves."""

    length: int
    prefix: int | None = None
    """Index of the piece that they attend to."""


@dataclass(kw_only=True, eq=False)
class Row:
    """How a row of N tokens is made up. Not to be changed; of frozen ones torch.compile looks at every part, and
    compiles for each anew."""

    pieces: tuple[Piece, ...]
    asked_M: Tensor
    """Places whose last hidden states are asked for, ascending."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """What attention needs in every layer alike and makes in the first."""


@dataclass(frozen=True, slots=True)
class Window:
    """In place of a layer's mask: a token looks at ``tokens`` tokens at most, itself the last of them."""

    tokens: int


@contextlib.contextmanager
def making_row() -> Iterator[None]:
    """Within it masks are a row's, and attention without a row is an error; outside they are as for any batch."""
    token = _packing.set(True)
    try:
        yield
    finally:
        _packing.reset(token)


def _mask(*arguments: Any, local_size: int | None = None, config: Any = None, **others: Any) -> Any:
    """What transformers calls to make a mask. A row says who sees whom; only a window is the mask's to tell.

    Raises:
        NotImplementedError: the mask cuts attention into chunks.
    """
    if not _packing.get():
        return sdpa_mask(*arguments, local_size=local_size, config=config, **others)
    if local_size is not None and getattr(config, "attention_chunk_size", None) is not None:
        raise NotImplementedError("it attends in chunks")
    return None if local_size is None else Window(local_size)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    quartet_row: Row | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every layer: (1, N, H, E) from ``query`` (1, H, N, E), the others (1, K, N, E).

    ``attention_mask``: what ``_mask`` has made of it.

    Raises:
        NotImplementedError: the model's attention needs more than we know of.
    """
    if quartet_row is None and not _packing.get():
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if not isinstance(attention_mask, Window | None):
        unknown.append("a mask of its own making")
    window = attention_mask.tokens if isinstance(attention_mask, Window) else None
    if sliding_window not in (None, window):
        unknown.append("a window that its mask does not have")
    if not getattr(module, "is_causal", True):
        unknown.append("both directions")
    if quartet_row is None:
        unknown.append("no row: it keeps arguments from its layers")
    if unknown or quartet_row is None:
        raise NotImplementedError(f"its attention has {', '.join(unknown)}")
    if query.is_cuda and value.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _varlen(quartet_row, query, key, value, scaling, window), None
    if needs_float32(value):
        with torch.autocast("cpu", enabled=False):
            wide = _by_piece(quartet_row, query.float(), key.float(), value.float(), dropout, scaling, window)
            return wide.to(value.dtype), None
    return _by_piece(quartet_row, query, key, value, dropout, scaling, window), None


def _by_piece(
    row: Row, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """(1, N, H, E) by torch's own attention: short pieces together, others one after the other."""
    if key.shape[1] != query.shape[1]:
        # Without a mask kernels take fewer keys than queries as they are; with one, and on processors, they don't.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if (grid := _grid_of(row, window, query.device)) is not None:
        return _by_grid(grid, query, key, value, dropout, scaling)
    lengths = [piece.length for piece in row.pieces]
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    found = []
    for index, piece in enumerate(row.pieces):
        own_keys, own_values, before = keys[index], values[index], 0
        if piece.prefix is not None:
            before = lengths[piece.prefix]
            own_keys = torch.cat([keys[piece.prefix], own_keys], dim=2)
            own_values = torch.cat([values[piece.prefix], own_values], dim=2)
        total = before + piece.length
        if before == 0 and (window is None or window >= total):
            found.append(
                functional.scaled_dot_product_attention(
                    queries[index], own_keys, own_values, dropout_p=dropout, scale=scaling, is_causal=piece.length > 1
                )
            )
            continue
        for first, queries_S in enumerate(torch.split(queries[index], _MASKED_QUERIES, dim=2)):
            end = min(before + (first + 1) * _MASKED_QUERIES, total)
            found.append(
                functional.scaled_dot_product_attention(
                    queries_S,
                    own_keys[:, :, :end],
                    own_values[:, :, :end],
                    attn_mask=_seen(row, end - queries_S.shape[2], end, window, query),
                    dropout_p=dropout,
                    scale=scaling,
                )
            )
    return torch.cat(found, dim=2).transpose(1, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Grid:
    """Pieces of like length under one another, padded on the right, where causality keeps padding out of sight.

    ``blocks``: pieces and tokens of each such block, which stand one after the other.
    """

    blocks: tuple[tuple[int, int], ...]
    places_P: Tensor
    """Which token of the row stands at each place; padding repeats the last of its piece."""
    back_N: Tensor
    """At which place each token of the row stands."""
    padded: bool


def _grid_of(row: Row, window: int | None, device: torch.device) -> _Grid | None:
    """How short pieces without a prefix are laid out; None where the pieces are others."""
    if "grid" not in row.memo:
        lengths = [piece.length for piece in row.pieces]
        lone = all(piece.prefix is None for piece in row.pieces)
        row.memo["grid"] = _lay_out(lengths, device) if lone and 1 < len(lengths) >= sum(lengths) / _SHORT else None
    short = window is None or window >= max(piece.length for piece in row.pieces)
    grid: _Grid | None = row.memo["grid"] if short else None
    return grid


def _lay_out(lengths: Sequence[int], device: torch.device) -> _Grid:
    starts = np.cumsum([0, *lengths])
    blocks: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if blocks and lengths[index] >= _ALIKE * lengths[blocks[-1][0]]:
            blocks[-1].append(index)
        else:
            blocks.append([index])
    places, back, end = [], np.empty(starts[-1], dtype=np.int64), 0
    for block in blocks:
        longest = lengths[block[0]]
        for index in block:
            places.append(starts[index] + np.minimum(np.arange(longest), lengths[index] - 1))
            back[starts[index] : starts[index + 1]] = end + np.arange(lengths[index])
            end += longest
    return _Grid(
        blocks=tuple((len(block), lengths[block[0]]) for block in blocks),
        places_P=torch.from_numpy(np.concatenate(places)).to(device),
        back_N=torch.from_numpy(back).to(device),
        padded=end > starts[-1],
    )


def _by_grid(grid: _Grid, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """(1, N, H, E) by torch's own attention, block by block."""
    heads = query.shape[1]
    laid_out = [cast(Tensor, _ToGrid.apply(x[0].transpose(0, 1).flatten(1), grid)) for x in (query, key, value)]  # type: ignore[no-untyped-call]
    found, first = [], 0
    for pieces, tokens in grid.blocks:
        own = slice(first, first + pieces * tokens)
        q_GHSE, k_GHSE, v_GHSE = (x_PF[own].view(pieces, tokens, heads, -1).transpose(1, 2) for x_PF in laid_out)
        out_GHSE = functional.scaled_dot_product_attention(
            q_GHSE, k_GHSE, v_GHSE, dropout_p=dropout, scale=scaling, is_causal=tokens > 1
        )
        found.append(out_GHSE.transpose(1, 2).reshape(pieces * tokens, -1))
        first = own.stop
    out_NF = cast(Tensor, _FromGrid.apply(torch.cat(found), grid))  # type: ignore[no-untyped-call]
    return out_NF.view(1, len(out_NF), heads, -1)


class _ToGrid(torch.autograd.Function):
    """(P, F) from (N, F). Padding is looked at by nobody and asked for nothing, so its gradient is 0 and left out."""

    @staticmethod
    def forward(ctx: Any, x_NF: Tensor, grid: _Grid) -> Tensor:
        ctx.grid = grid
        return x_NF.index_select(0, grid.places_P)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_PF: Tensor) -> tuple[Tensor, None]:
        return grad_PF.index_select(0, ctx.grid.back_N), None


class _FromGrid(torch.autograd.Function):
    """(N, F) from (P, F)."""

    @staticmethod
    def forward(ctx: Any, x_PF: Tensor, grid: _Grid) -> Tensor:
        ctx.grid = grid
        return x_PF.index_select(0, grid.back_N)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, None]:
        grid = ctx.grid
        if not grid.padded:
            return grad_NF.index_select(0, grid.places_P), None
        return grad_NF.new_zeros(len(grid.places_P), grad_NF.shape[1]).index_copy_(0, grid.back_N, grad_NF), None


def _seen(row: Row, before: int, end: int, window: int | None, query: Tensor) -> Tensor:
    """(end - before, end) added to the scores of the tokens from ``before``: 0 where they look, else -inf."""
    name = (before, end, window)
    if name not in row.memo:
        distance = torch.arange(before, end, device=query.device)[:, None] - torch.arange(end, device=query.device)
        unseen = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        row.memo[name] = query.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
    mask: Tensor = row.memo[name]
    return mask


def _varlen(row: Row, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """(1, N, H, E), all pieces in one call of the GPU's kernel, whose causality is aligned to the end of the keys."""
    from torch.nn.attention.varlen import varlen_attn

    if "varlen" not in row.memo:
        row.memo["varlen"] = _ends(row.pieces, query.device)
    ends_q, ends_k, longest_q, longest_k, looked_at = row.memo["varlen"]
    # Norms of queries and keys may have made them float32 again.
    query_NHE, key_NKE, value_NKE = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    if looked_at is not None:
        key_NKE, value_NKE = key_NKE[looked_at], value_NKE[looked_at]
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


def _ends(pieces: Sequence[Piece], device: torch.device) -> tuple[Tensor, Tensor, int, int, Tensor | None]:
    """Where the queries and the keys of each piece end, the most of both, and the places of all keys; None: as is."""
    lengths = [piece.length for piece in pieces]
    starts = np.cumsum([0, *lengths])
    places = [np.arange(starts[index], starts[index + 1]) for index in range(len(pieces))]
    looked_at = [
        places[index] if piece.prefix is None else np.concatenate([places[piece.prefix], places[index]])
        for index, piece in enumerate(pieces)
    ]
    counts = [len(own) for own in looked_at]
    ends_q, ends_k = (torch.tensor([0, *np.cumsum(own)], dtype=torch.int32, device=device) for own in (lengths, counts))
    shared = any(piece.prefix is not None for piece in pieces)
    keys = torch.from_numpy(np.concatenate(looked_at)).to(device) if shared else None
    return ends_q, ends_k, max(lengths), max(counts), keys


class LastLayer:
    """Mixed into a decoder's last layer: after attention it goes on with the tokens alone that are asked for.

    Right for a layer of the usual kind, which adds attention, and then the feed-forward network, of the normalised sum
    so far; of another it raises or computes something else. Without a row it is the layer.
    """

    def forward(self, hidden_states: Tensor, *arguments: Any, quartet_row: Row | None = None, **others: Any) -> Any:
        layer: Any = self
        if quartet_row is None:
            return super().forward(hidden_states, *arguments, **others)  # type: ignore[misc]
        normalised = layer.input_layernorm(hidden_states)
        attended, *_ = layer.self_attn(normalised, *arguments, quartet_row=quartet_row, **others)
        asked_M = quartet_row.asked_M
        kept = hidden_states.index_select(1, asked_M) + attended.index_select(1, asked_M)
        return kept + layer.mlp(layer.post_attention_layernorm(kept))


def stop_early(layer: nn.Module) -> None:
    """Makes ``layer`` a ``LastLayer``, in place; weights, names and hooks stay."""
    kind = type(layer)
    layer.__class__ = type(kind.__name__, (LastLayer, kind), {"__module__": kind.__module__})


def go_on(layer: nn.Module) -> None:
    """Undoes ``stop_early``."""
    layer.__class__ = type(layer).__bases__[1]


transformers.AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
