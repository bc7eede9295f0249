"""Training without padding: the sequences of a micro-batch as one row of tokens.

Linear layers, norms and feed-forward layers work token by token, so they never see padding; attention goes sequence by
sequence (``packed_attention``). Sequences that begin alike (a chosen and a rejected answer, responses to one prompt)
share their beginning: it is computed once, each tail attends to it and to itself, and its gradient is the sum of
theirs. Hidden states and gradients are what each sequence would have alone, up to rounding; with dropout, sequences
that share a beginning share what is dropped of it.

It is right for decoders whose attention goes through transformers' attention interface and needs nothing but queries,
keys, values and perhaps a sliding window. Whether a model is one of them is measured once, on the model itself.

Shapes: B sequences, S tokens of prompt and response, N tokens of the row, M of them asked for, D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trainer.batching import micro_batches
from trainer.compiling import is_compiled
from trainer.config import Packing
from trainer.encoding import Ids
from trainer.errors import ModelError
from trainer.optimisation import Precision, autocast
from trainer.packed_attention import ATTENTION, Piece, Row, go_on, making_row, stop_early
from trainer.sharding import is_sharded

Places = npt.NDArray[np.int64]

# Fewer common tokens are not worth a piece of their own.
MIN_SHARED = 16
# Largest difference of hidden states and gradients, relative to their size, that the check lets pass, by precision.
# In float64, too, transformers computes norms and rotary embeddings in float32.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
# What the code of a model raises, any of hundreds, that can't be run our way.
_UNFIT = (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError)


# Choosing ----------------------------------------------------------------------------------------------------------


def pack(model: Any, choice: Packing, precision: Precision) -> bool:
    """Whether ``model`` is trained packed from now on; ``is_packed`` tells it afterwards.

    Args:
        model: with a body of transformers, on the device that it is trained on.
        choice: what the user wants.
        precision: of its forward passes.

    Raises:
        ModelError: packing is ``on``, and what the model computes packed is not what it computes alone.
    """
    body = model.base_model
    # A split model was tried when it was whole, a compiled one when it was not.
    if choice == "off" or is_packed(body) or is_sharded(model) or is_compiled(model):
        return is_packed(body)
    if reason := _turn_on(body, precision):
        told = f"{type(body).__name__} can't be packed: {reason}"
        if choice == "on":
            raise ModelError(f"--packing is on, but {told}; choose --packing auto or off")
        sys.stdout.write(f"trained with padding: {told}\n")
    return not reason


def is_packed(model: Any) -> bool:
    """Whether sequences of ``model`` are computed as one row."""
    return bool(model.base_model.config._attn_implementation == ATTENTION)


def _turn_on(body: Any, precision: Precision) -> str:
    """Turns our attention on, and says why it can't stay, in which case it does not; empty: it does."""
    if changing := sorted(_rotary_kinds(body.config.get_text_config()) & {"dynamic", "longrope"}):
        return f"its rotary frequencies change with the longest sequence computed together ({changing[0]})"
    before, was_training, layers = body.config._attn_implementation, body.training, getattr(body, "layers", None)
    body.eval()  # Dropout would make any two passes differ.
    # What a GPU does in half precision is another kernel's work than in the weights' own.
    precisions: set[Precision] = {"float32", precision} if body.device.type == "cuda" else {"float32"}
    try:
        expected = {own: _probe(body, own, packed=False) for own in precisions}
        body.set_attn_implementation(ATTENTION)
        if isinstance(layers, nn.ModuleList):
            stop_early(layers[-1])
            if not _difference(body, expected):
                return ""
            go_on(layers[-1])
        if not (reason := _difference(body, expected)):
            return ""
    except _UNFIT as error:
        reason = _told(error)
    finally:
        body.train(was_training)
    body.set_attn_implementation(before)
    return reason


def _difference(body: Any, expected: Mapping[Precision, tuple[Tensor, Tensor]]) -> str:
    """In which way packed passes differ from what is expected, by precision; empty: in none."""
    for precision, plain in expected.items():
        try:
            found = _probe(body, precision, packed=True)
        except _UNFIT as error:
            return _told(error)
        tolerance = max(_TOLERANCE[body.dtype], _TOLERANCE[_half(body, precision) or body.dtype])
        for what, ours, theirs in zip(("hidden states", "gradients"), found, plain, strict=True):
            share = float((ours - theirs).abs().max() / theirs.abs().max())
            if not share <= tolerance:
                return f"its {what} differ by {share:.1e} of their size, at most {tolerance:.0e} is rounding"
    return ""


def _told(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _rotary_kinds(config: Any) -> set[str]:
    """Types of rotary scaling that a configuration names, for all layers or for each kind of them."""
    declared = getattr(config, "rope_parameters", None) or {}
    parameters = [declared, *(own for own in declared.values() if isinstance(own, dict))]
    return {str(own.get("rope_type", own.get("type"))) for own in parameters}


def _half(body: Any, precision: Precision) -> torch.dtype | None:
    """What products are computed in, where it is not the weights' own precision."""
    device = body.device.type
    with autocast(body.device, precision):
        found: torch.dtype | None = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return found


def _probe(body: Any, precision: Precision, *, packed: bool) -> tuple[Tensor, Tensor]:
    """Hidden states of three sequences, two of which begin alike, and the gradient of a random sum of them.

    The gradient is with respect to the embedded tokens, laid out as in the row.
    """
    embeddings = body.get_input_embeddings()
    draw = np.random.default_rng(0)
    first, second = (draw.integers(0, embeddings.weight.shape[0], size) for size in (2 * MIN_SHARED, 5))
    layout = lay_out([first, second, np.concatenate([first[: MIN_SHARED + 3], second])])
    # All of the first, the last of the second, and of the third, which begins like the first, the second half.
    first, second, third = layout.places
    asked_M = np.concatenate([first, second[-1:], third[len(third) // 2 :]])
    embedded: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = embeddings.register_forward_hook(keep)
    try:
        with torch.enable_grad(), autocast(body.device, precision):
            if packed:
                hidden_MD = forward(body, layout, asked_M)
            else:
                ids = torch.from_numpy(layout.ids_N).to(body.device)
                alone = [body(input_ids=ids[own][None], use_cache=False).last_hidden_state[0] for own in layout.places]
                hidden_MD = torch.cat([alone[0], alone[1][-1:], alone[2][len(third) // 2 :]])
    finally:
        handle.remove()
    weights_MD = torch.from_numpy(draw.standard_normal(hidden_MD.shape)).to(hidden_MD)
    gradients = torch.autograd.grad((hidden_MD * weights_MD).sum(), embedded)
    gradient = torch.cat([own.flatten(0, 1) for own in gradients])
    if not packed:
        places = torch.from_numpy(np.concatenate(layout.places)).to(body.device)
        gradient = gradient.new_zeros(len(layout.ids_N), gradient.shape[1]).index_add_(0, places, gradient)
    return hidden_MD.detach().float(), gradient.float()


# Forward passes ----------------------------------------------------------------------------------------------------


def packed_outputs(model: Any, ids_BS: Tensor, mask_BS: Tensor, wanted_BS: Tensor) -> Tensor:
    """(M, D) last hidden states, or of a model with a head (M, V) logits, at the true places of ``wanted_BS``.

    Args:
        model: one that ``is_packed``, or its body.
        ids_BS: (B, S) token ids.
        mask_BS: (B, S) True on real tokens, at least one of each sequence, padded on either side.
        wanted_BS: (B, S) True where outputs are wanted, on real tokens alone.
    """
    ids, mask, wanted = (x.cpu().numpy() for x in (ids_BS, mask_BS, wanted_BS))
    layout = lay_out([own[real] for own, real in zip(ids, mask, strict=True)])
    asked = [place[own[real]] for place, own, real in zip(layout.places, wanted, mask, strict=True)]
    return forward(model, layout, np.concatenate(asked))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sequences laid out as one row. ``places``: where in it each one's tokens are, (S,)."""

    ids_N: Places
    positions_N: Places
    pieces: tuple[Piece, ...]
    places: tuple[Places, ...]


def forward(model: Any, layout: Layout, asked_M: Places) -> Tensor:
    """(M, D or V) outputs for the row's places ``asked_M``, in any order, repeated where sequences share them."""
    device = model.device
    each, where_M = np.unique(asked_M, return_inverse=True)
    row = Row(pieces=layout.pieces, asked_M=torch.from_numpy(each).to(device))
    with making_row():
        output = model(
            input_ids=torch.from_numpy(layout.ids_N)[None].to(device),
            position_ids=torch.from_numpy(layout.positions_N)[None].to(device),
            use_cache=False,
            quartet_row=row,
        )
    outputs: Tensor = (output.logits if hasattr(output, "logits") else output.last_hidden_state)[0]
    if len(outputs) != len(each):
        outputs = outputs.index_select(0, row.asked_M)
    if np.array_equal(where_M, np.arange(len(each))):
        return outputs
    return outputs.index_select(0, torch.from_numpy(where_M).to(device))


def lay_out(sequences: Sequence[npt.NDArray[Any]]) -> Layout:
    """``sequences``, none of them empty, as one row, in which those that begin alike share their beginning."""
    ids: list[npt.NDArray[Any]] = []
    positions: list[Places] = []
    pieces: list[Piece] = []
    places: list[Places] = [np.empty(0, dtype=np.int64)] * len(sequences)
    end = 0

    def add(tokens: npt.NDArray[Any], first_position: int, prefix: int | None) -> Places:
        nonlocal end
        ids.append(tokens)
        positions.append(np.arange(first_position, first_position + len(tokens)))
        pieces.append(Piece(len(tokens), prefix))
        end += len(tokens)
        return np.arange(end - len(tokens), end)

    for shared, members in families(sequences):
        prefix = len(pieces) if shared else None
        begin = add(sequences[members[0]][:shared], 0, None) if shared else np.empty(0, dtype=np.int64)
        for index in members:
            places[index] = np.concatenate([begin, add(sequences[index][shared:], shared, prefix)])
    return Layout(
        ids_N=np.concatenate(ids).astype(np.int64),
        positions_N=np.concatenate(positions),
        pieces=tuple(pieces),
        places=tuple(places),
    )


def families(sequences: Sequence[npt.NDArray[Any]]) -> list[tuple[int, list[int]]]:
    """(shared tokens, indices of the sequences that share them); every sequence keeps at least one token of its own."""
    found: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sequences)), key=lambda index: sequences[index].tolist()):
        if found:
            shared, members = found[-1]
            first, own = sequences[members[0]], sequences[index]
            most = shared if len(members) > 1 else len(first) - 1
            common = common_tokens(first[:most], own[: len(own) - 1])
            # Joining must save more than it costs those who share more already.
            if common >= MIN_SHARED and common * len(members) >= shared * (len(members) - 1):
                found[-1] = (common, [*members, index])
                continue
        found.append((0, [index]))
    return found


def group_micro_batches(groups: Sequence[Sequence[Ids]], max_tokens: int, *, packed: bool) -> list[list[int]]:
    """``micro_batches`` of sequences that stay together, such as answers to one prompt. Indices refer to ``groups``.

    Packed, what those of a group begin with in common counts once; else each is padded to the longest of its group.
    """
    if not packed:
        return micro_batches([len(group) * max(map(len, group)) for group in groups], max_tokens)
    counts = [
        sum(map(len, group)) - sum(shared * (len(members) - 1) for shared, members in families(group))
        for group in groups
    ]
    return micro_batches(counts, max_tokens, packed=True)


def common_tokens(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> int:
    """Length of the common beginning."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length
