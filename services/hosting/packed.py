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

Shapes: N tokens of the row, M of them asked for, D hidden size, S tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.hosting.prepacking import prepack
from services.hosting.rotary import RotaryLengths
from services.hosting.row import MIN_SHARED, Row, attending, cut, lay_out
from services.hosting.row_attention import ATTENTION
from services.runtime.errors import StartError

# On a processor: so many tokens at a time stay in its cache, and more make no product faster.
_CPU_TOKENS = 4096
# Largest difference of hidden states, relative to their size, that the check lets pass, by precision.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

# What the code of a model raises, any of hundreds, that can't be run our way. It is run the plain way then.
_UNFIT = (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError)


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
        found = [self._forward(part) for part in cut(row, places_M, limit)]
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
    first, second = (draw.integers(0, vocabulary, size).tolist() for size in (2 * MIN_SHARED, 5))
    return [first, second, [*first[: MIN_SHARED + 3], *second]]


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
            quartet_row = replace(quartet_row, pieces=attending(quartet_row.pieces, quartet_row.asked_M))
        normalised = self.layer.input_layernorm(hidden_states)
        attended, *_ = self.layer.self_attn(normalised, *arguments, quartet_row=quartet_row, **others)
        kept = hidden_states[:, asked_M] + attended[:, asked_M]
        return kept + self.layer.mlp(self.layer.post_attention_layernorm(kept))
