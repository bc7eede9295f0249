"""Forward passes of decoders without padding.

A batch is one row of tokens, sequence after sequence: linear layers, which are most of the work, never see padding, and
attention goes sequence by sequence. Sequences that begin with the same tokens (responses to one prompt, a chosen and a
rejected answer) share them: the prefix is computed once, and each tail attends to it and to itself. Only some hidden
states are asked for, the last of a sequence or those of a response: once its attention has looked at all tokens, the
last layer goes on with these alone. They are what each sequence would have alone, up to rounding.

It works with every decoder of transformers whose attention goes through its attention interface and needs nothing but
queries, keys, values and perhaps a sliding window; whether a model is one of them is found out by comparing with the
plain forward pass.

Rotary frequencies may change with the length of the longest sequence of a forward pass. Packed or padded, only
sequences that have the same frequencies alone are computed together.

Shapes: N tokens of the row, M of them asked for, H heads, K key-value heads, E head width, D hidden size, S tokens of
one sequence.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import AttentionMaskInterface

from services.hosting.prepacking import prepack
from services.runtime.errors import StartError

# Name under which transformers finds our attention.
ATTENTION = "quartet_packed"
# Fewer common tokens are not worth a piece of their own.
_MIN_SHARED = 16
# On a processor: so many tokens at a time stay in its cache, and more make no product faster.
_CPU_TOKENS = 4096
# So many queries at a time: all of a block are multiplied by all keys up to its last. A GPU's own kernel knows better.
_CPU_QUERIES, _GPU_QUERIES = 64, 1024
# Largest difference of hidden states, relative to their size, that the check lets pass, by precision.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

# What the code of a model raises, any of hundreds, that can't be run our way. It is run the plain way then.
_UNFIT = (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of the row that attend, causally, to a prefix (which may be empty) and to themselves.

    The first ``seen_only`` of them don't attend: nobody asks for what they would find.
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0
    seen_only: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, kw_only=True)
class Row:
    """A batch laid out as one row.

    ``places``: where in the row each sequence's tokens are, (S,) each. ``asked_M``: places whose last hidden states are
    asked for, in order; None for all.
    """

    ids_N: Tensor
    positions_N: Tensor
    pieces: tuple[Piece, ...]
    places: tuple[Tensor, ...] = ()
    asked_M: Tensor | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    """What attention needs in every layer alike and makes in the first."""


def lay_out(sequences: Sequence[Sequence[int]], *, share: bool) -> Row:
    """``sequences`` as one row; with ``share`` those that begin alike share their beginning. None may be empty."""
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    groups = _groups(arrays) if share else [(0, [index]) for index in range(len(arrays))]
    ids: list[np.ndarray[Any, Any]] = []
    positions: list[np.ndarray[Any, Any]] = []
    pieces: list[Piece] = []
    places: list[np.ndarray[Any, Any]] = [np.empty(0)] * len(arrays)
    end = 0

    def add(tokens: np.ndarray[Any, Any], first_position: int, prefix: tuple[int, int]) -> np.ndarray[Any, Any]:
        nonlocal end
        ids.append(tokens)
        positions.append(np.arange(first_position, first_position + len(tokens)))
        pieces.append(Piece(end, len(tokens), *prefix))
        end += len(tokens)
        return np.arange(end - len(tokens), end)

    for shared, members in groups:
        prefix_place = add(arrays[members[0]][:shared], 0, (0, 0)) if shared else np.empty(0, dtype=np.int64)
        prefix = (int(prefix_place[0]), shared) if shared else (0, 0)
        for index in members:
            places[index] = np.concatenate([prefix_place, add(arrays[index][shared:], shared, prefix)])
    return Row(
        ids_N=torch.from_numpy(np.concatenate(ids)),
        positions_N=torch.from_numpy(np.concatenate(positions)),
        pieces=tuple(pieces),
        places=tuple(torch.from_numpy(place) for place in places),
    )


def _groups(arrays: Sequence[np.ndarray[Any, Any]]) -> list[tuple[int, list[int]]]:
    """(shared tokens, indices of the sequences that share them); every sequence keeps at least one token of its own."""
    order = sorted(range(len(arrays)), key=lambda index: arrays[index].tolist())
    groups: list[tuple[int, list[int]]] = []
    for index in order:
        if groups:
            shared, members = groups[-1]
            first, own = arrays[members[0]], arrays[index]
            most = shared if len(members) > 1 else len(first) - 1
            common = _common(first[:most], own[: len(own) - 1])
            # Joining must save more than it costs those who share more already.
            if common >= _MIN_SHARED and common * len(members) >= shared * (len(members) - 1):
                groups[-1] = (common, [*members, index])
                continue
        groups.append((0, [index]))
    return groups


def _common(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> int:
    """Length of the common beginning."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def last_hidden_state(body: Any, **inputs: Any) -> Tensor:
    """(B, S, D) of the plain forward pass of ``body``, a model of transformers without its head.

    Raises:
        StartError: it gives none.
    """
    output = body(**inputs, use_cache=False)
    found = getattr(output, "last_hidden_state", None)
    if not isinstance(found, Tensor):
        raise StartError(
            f"{type(body).__name__} gives {type(output).__name__} without last_hidden_state: this architecture is not "
            "supported"
        )
    return found


class RotaryLengths:
    """Which sequences have the same rotary frequencies, of a model where these change with the length.

    With longrope there are two sets of them, for sequences up to the original length and for longer ones. With dynamic
    scaling every length beyond the original one has its own. transformers goes by the longest sequence of a forward
    pass (``modeling_rope_utils.dynamic_rope_update``).
    """

    def __init__(self, body: nn.Module, config: Any) -> None:
        """``config``: of the text model ``body``, which has seen no sequence beyond the original length yet."""
        declared = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        self._long = self._dynamic = math.inf
        # Layers of several types have parameters each.
        for parameters in (declared, *(own for own in declared.values() if isinstance(own, dict))):
            if any(name.startswith("long_") for name in parameters):
                original = parameters.get("original_max_position_embeddings")
                original = original or getattr(config, "original_max_position_embeddings", None)
                self._long = min(self._long, original or config.max_position_embeddings)
            if "dynamic" in str(parameters.get("rope_type", parameters.get("type"))):
                self._dynamic = config.max_position_embeddings
        self._growing = [module for module in body.modules() if hasattr(module, "original_max_seq_len")]

    def group(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of the sequences that may be computed together."""
        groups: dict[tuple[bool, int], list[int]] = {}
        for index, length in enumerate(map(len, sequences)):
            alike = (length > self._long, length if length > self._dynamic else 0)
            groups.setdefault(alike, []).append(index)
        return list(groups.values())

    def forget(self) -> None:
        """Undoes what longer sequences have left: dynamic frequencies stay those of the longest so far.

        transformers does so itself for shorter ones than the original length, but for none of just that or more.
        """
        if self._dynamic == math.inf:
            return
        for module in self._growing:
            for name, value in {**vars(module), **dict(module.named_buffers(recurse=False))}.items():
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, module.original_max_seq_len)
                elif name.endswith("original_inv_freq"):
                    setattr(module, name.replace("original_", ""), value)


class HiddenStates:
    """Last hidden states of a decoder's sequences, packed where that is exact for the model, else padded."""

    def __init__(self, model: Any, *, pad_id: int) -> None:
        """Lays the weights out and finds out which way is exact.

        Args:
            model: of transformers, on its device and in its precision, in evaluation mode; its linear layers below
                ``base_model`` are replaced on a processor, and its last layer may be.
            pad_id: of the padded way.

        Raises:
            StartError: it gives no last hidden states.
        """
        self.body = model.base_model
        self.device: torch.device = model.device
        self.pad_id = pad_id
        self.rotary = RotaryLengths(self.body, self.body.config.get_text_config())
        plain = self._probe()
        if self.device.type == "cpu":
            prepack(self.body)
        self.packed = self._agrees(plain, model)

    def __call__(
        self, sequences: Sequence[Sequence[int]], asked: Sequence[range] | None = None, *, share: bool = True
    ) -> Tensor:
        """Hidden states (M, D), sequence after sequence.

        Args:
            sequences: token ids, none without any.
            asked: of each sequence, the tokens whose hidden states are wanted, at least one; all of all without it.
            share: whether sequences that begin alike are computed together.
        """
        asked = [range(len(sequence)) for sequence in sequences] if asked is None else asked
        groups = self.rotary.group(sequences)
        if len(groups) == 1:
            return self._together(sequences, asked, share=share)
        found = [torch.empty(0)] * len(sequences)
        for members in groups:
            own = [asked[index] for index in members]
            hidden_MD = self._together([sequences[index] for index in members], own, share=share)
            for index, part in zip(members, torch.split(hidden_MD, list(map(len, own))), strict=True):
                found[index] = part
        return torch.cat(found)

    def _together(self, sequences: Sequence[Sequence[int]], asked: Sequence[range], *, share: bool) -> Tensor:
        """(M, D) of sequences that have the same rotary frequencies."""
        self.rotary.forget()
        if not self.packed:
            return self._padded(sequences, asked)
        row = lay_out(sequences, share=share)
        wanted = [place[tokens.start : tokens.stop] for place, tokens in zip(row.places, asked, strict=True)]
        # Ascending, and each once: sequences may ask for the same token of their common beginning.
        places_M, where = torch.unique(torch.cat(wanted), return_inverse=True)
        limit = _CPU_TOKENS if self.device.type == "cpu" else len(row.ids_N)
        found = [self._forward(part) for part in _parts(row, places_M, limit)]
        return torch.cat(found)[where.to(self.device)]

    def _forward(self, row: Row) -> Tensor:
        """(M, D) of what is asked for of the row."""
        asked_M = row.asked_M
        assert asked_M is not None
        output = self.body(
            input_ids=row.ids_N[None].to(self.device),
            position_ids=row.positions_N[None].to(self.device),
            use_cache=False,
            quartet_row=row,
        )
        hidden_ND: Tensor = output.last_hidden_state[0]
        return hidden_ND if len(hidden_ND) == len(asked_M) else hidden_ND[asked_M.to(self.device)]

    def _padded(self, sequences: Sequence[Sequence[int]], asked: Sequence[range]) -> Tensor:
        longest = max(map(len, sequences))
        ids_BS = torch.full((len(sequences), longest), self.pad_id)
        for index, sequence in enumerate(sequences):
            ids_BS[index, : len(sequence)] = torch.tensor(sequence)
        lengths_B = torch.tensor([len(sequence) for sequence in sequences])
        mask_BS = torch.arange(longest)[None, :] < lengths_B[:, None]
        output = self.body(
            input_ids=ids_BS.to(self.device), attention_mask=mask_BS.long().to(self.device), use_cache=False
        )
        hidden_BSD: Tensor = output.last_hidden_state
        return torch.cat([hidden_BSD[index, tokens.start : tokens.stop] for index, tokens in enumerate(asked)])

    @torch.inference_mode()
    def _probe(self) -> list[Tensor]:
        """Each sequence of the check alone, by the plain forward pass."""
        found = []
        for sequence in _probe_sequences(self._vocabulary()):
            self.rotary.forget()
            found.append(last_hidden_state(self.body, input_ids=torch.tensor([sequence], device=self.device))[0])
        return found

    def _vocabulary(self) -> int:
        return int(self.body.get_input_embeddings().weight.shape[0])

    @torch.inference_mode()
    def _agrees(self, plain: Sequence[Tensor], model: Any) -> bool:
        """Turns our attention on, and the last layer that stops early, and keeps of both what is exact."""
        before = self.body.config._attn_implementation
        layers = getattr(self.body, "layers", None)
        try:
            model.set_attn_implementation(ATTENTION)
        except _UNFIT:
            return False
        self.packed = True
        if isinstance(layers, nn.ModuleList):
            whole = layers[-1]
            layers[-1] = LastLayer(whole)
            if self._agrees_now(plain):
                return True
            layers[-1] = whole
        if self._agrees_now(plain):
            return True
        model.set_attn_implementation(before)
        return False

    def _agrees_now(self, plain: Sequence[Tensor]) -> bool:
        # All of the first, the last of the second, and of the third, which begins like the first, the second half.
        lengths = [len(own) for own in plain]
        asked = [range(lengths[0]), range(lengths[1] - 1, lengths[1]), range(lengths[2] // 2, lengths[2])]
        expected = [own[tokens.start :] for own, tokens in zip(plain, asked, strict=True)]
        try:
            hidden_MD = self(_probe_sequences(self._vocabulary()), asked)
        except _UNFIT:
            return False
        found = torch.split(hidden_MD, [len(own) for own in expected])
        errors = [
            float((a - b).float().abs().max() / b.float().abs().max()) for a, b in zip(found, expected, strict=True)
        ]
        return max(errors) <= _TOLERANCE[self.body.dtype]


@lru_cache(maxsize=8)
def _probe_sequences(vocabulary: int) -> list[list[int]]:
    """Three sequences, two of which begin alike."""
    draw = np.random.default_rng(0)
    first, second = (draw.integers(0, vocabulary, size).tolist() for size in (2 * _MIN_SHARED, 5))
    return [first, second, [*first[: _MIN_SHARED + 3], *second]]


def _parts(row: Row, asked_M: Tensor, limit: int) -> Iterator[Row]:
    """The row in parts of about ``limit`` tokens, cut where no prefix is cut off from those who share it."""
    pending: list[Piece] = []

    def part() -> Row:
        start, end = pending[0].start, pending[-1].end
        first, last = torch.searchsorted(asked_M, torch.tensor([start, end])).tolist()
        moved = [replace(p, start=p.start - start, prefix_start=max(0, p.prefix_start - start)) for p in pending]
        pending.clear()
        return Row(
            ids_N=row.ids_N[start:end],
            positions_N=row.positions_N[start:end],
            pieces=tuple(moved),
            asked_M=asked_M[first:last] - start,
        )

    for group in _families(row.pieces):
        if pending and group[-1].end - pending[0].start > limit:
            yield part()
        pending.extend(group)
    yield part()


def _attending(pieces: Sequence[Piece], asked_M: Tensor) -> tuple[Piece, ...]:
    """Pieces without the tokens at either end that are not asked for, and that none that is asked for looks at."""
    places_M = asked_M.tolist()
    found = []
    for piece in pieces:
        first, end = (bisect.bisect_left(places_M, place) for place in (piece.start, piece.end))
        if first < end:
            length = places_M[end - 1] + 1 - piece.start
            found.append(replace(piece, length=length, seen_only=places_M[first] - piece.start))
    return tuple(found)


def _families(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that hang together, in order: a prefix and its tails, or one alone."""
    families: list[list[Piece]] = []
    for piece in pieces:
        if piece.prefix_length:
            families[-1].append(piece)
        else:
            families.append([piece])
    return families


# Attention ---------------------------------------------------------------------------------------------------------


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


class LastLayer(nn.Module):
    """A decoder's last layer, which goes on from attention with the tokens alone that are asked for.

    Right for a layer of the usual kind, which adds attention, and then the feed-forward network, of the normalised sum
    so far; of another it raises or computes something else. Without a row it is the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def __getattr__(self, name: str) -> Any:
        """The decoder may want to know what kind of layer it is."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *arguments: Any, quartet_row: Row | None = None, **others: Any) -> Any:
        if quartet_row is None or quartet_row.asked_M is None:
            return self.layer(hidden_states, *arguments, **others)
        asked_M = quartet_row.asked_M.to(hidden_states.device)
        if not hidden_states.is_cuda:
            quartet_row = replace(quartet_row, pieces=_attending(quartet_row.pieces, quartet_row.asked_M))
        normalised = self.layer.input_layernorm(hidden_states)
        attended, *_ = self.layer.self_attn(normalised, *arguments, quartet_row=quartet_row, **others)
        kept = hidden_states[:, asked_M] + attended[:, asked_M]
        return kept + self.layer.mlp(self.layer.post_attention_layernorm(kept))
