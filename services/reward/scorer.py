"""A reward model behind a small interface: token ids in, raw scores of its heads out.

Shapes: B sequences, S tokens, D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from quartet.model_folder import METADATA_FILE
from quartet.text_tokens import opening_ids, turn_end_id
from services.hosting.model import Hosting, longest_sequence, pad_right
from services.hosting.packed import HiddenStates
from services.hosting.prepacking import float32_linear, prepack
from services.hosting.token_length import characters_per_token
from services.reward.combining import Head
from services.reward.metadata import read_reward_metadata
from services.runtime.errors import StartError


@dataclass(frozen=True, slots=True)
class ScorerItem:
    """Token ids of one item, used exactly as they are.

    ``segments``: of a sentence pair, 0 for each token of the first text and 1 for each of the second, as the tokenizer
    tells them; None where it tells none.
    """

    token_ids: Sequence[int]
    segments: Sequence[int] | None = None


class Scorer(Protocol):
    """What the servicer needs of a reward model. ``score`` runs in one thread alone.

    ``device``: its type. ``padded``: whether a batch costs as many tokens as its longest item has, times its items.
    """

    vocab_size: int
    max_sequence_tokens: int
    device: str
    padded: bool

    def score(self, items: Sequence[ScorerItem]) -> list[list[float]]:
        """Raw scores (H,) of each item, one a head."""
        ...


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How text becomes the token ids that the model was trained on.

    ``pair``: prompt and response as a sentence pair with special tokens (encoders such as BERT and DeBERTa).
    Otherwise both are encoded apart, without special tokens, and joined. A prompt in plain text begins with
    ``opening``. ``end_token_id`` is appended to a finished response unless it is None; to messages ``turn_end_id``
    instead, unless that is None: the token by which the chat template ends turns. ``characters_per_token``: most
    characters of a text that become one token, None where nothing is known of it.
    """

    pair: bool
    end_token_id: int | None
    characters_per_token: int | None = None
    opening: tuple[int, ...] = ()
    turn_end_id: int | None = None

    def end_of(self, *, is_chat: bool) -> int | None:
        """What closes a finished response to messages (``is_chat``) or to plain text; None: nothing does."""
        if self.end_token_id is None or self.turn_end_id is None or not is_chat:
            return self.end_token_id
        return self.turn_end_id


class TransformersScorer:
    """A sequence-classification model with a label for each head, of any architecture that transformers loads.

    Decoders are run packed, without padding, and the heads see only the last token. Encoders are called as they are,
    padded. Heads compute in float32 whatever the precision of the rest.
    """

    def __init__(self, folder: Path, *, hosting: Hosting, tokenizer: Any, heads: Sequence[Head] = ()) -> None:
        """Loads and checks the model.

        Args:
            heads: names of its labels, in order; none for a model with one.

        Raises:
            StartError: it does not load, its head is missing from the checkpoint, it has not a label for each head, or
                it is a decoder that gives no last hidden states.
        """
        self.hosting = hosting
        try:
            model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, output_loading_info=True, **hosting.loading
            )
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise StartError(f"model {str(folder)!r} does not load as a sequence classifier: {error}") from error
        if missing := sorted(loading["missing_keys"]):
            raise StartError(
                f"model {str(folder)!r} is not a reward model: its checkpoint lacks {', '.join(missing[:3])}; "
                "train one with quartet-train reward"
            )
        labels = model.config.num_labels
        if labels != (len(heads) or 1):
            named = (
                f"as many as {METADATA_FILE} names heads ({len(heads)})"
                if heads
                else f'1; or name the heads in {METADATA_FILE}: "heads": [{{"name": "safety", "weight": 0.3}}, ...]'
            )
            raise StartError(f"model {str(folder)!r}: num_labels is {labels}, must be {named}")
        # Counted before the weights are laid out anew.
        self.parameters = int(model.num_parameters())
        self.model = model.to(hosting.device).eval().requires_grad_(False)
        self.head = getattr(model, "score", None)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.max_sequence_tokens = longest_sequence(model.config, tokenizer)
        pad_id = model.config.pad_token_id
        self.pad_id = int(pad_id if pad_id is not None else tokenizer.pad_token_id or 0)
        self.is_decoder = isinstance(self.head, torch.nn.Linear)
        # Some encoders tell the texts of a pair apart by more than the token between them.
        self.has_segments = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1
        self.device = hosting.device.type
        self.padded = True
        if self.is_decoder:
            self.hidden_states = HiddenStates(self.model, pad_id=self.pad_id)
            self.padded = not self.hidden_states.packed
        else:
            _widen_head(self.model)
            if hosting.device.type == "cpu":
                prepack(self.model.base_model)

    def encoding(self, folder: Path, tokenizer: Any) -> Encoding:
        """How this model was trained to see text: quartet.json's word, else the custom of its architecture.

        Raises:
            StartError: the end token is to be appended but the tokenizer has none.
        """
        metadata = read_reward_metadata(folder)
        pair = not self.is_decoder if metadata.pair is None else metadata.pair
        most = characters_per_token(tokenizer)
        if pair:  # The tokenizer puts all around a pair.
            return Encoding(pair=True, end_token_id=None, characters_per_token=most)
        opening = opening_ids(tokenizer)
        if not metadata.append_eos:
            return Encoding(pair=False, end_token_id=None, characters_per_token=most, opening=opening)
        if tokenizer.eos_token_id is None:
            raise StartError(
                f"model {str(folder)!r}: its tokenizer has no end token to append to responses; give it one, or set "
                f'"append_eos": false in {METADATA_FILE} if the model was trained without'
            )
        return Encoding(
            pair=False,
            end_token_id=int(tokenizer.eos_token_id),
            characters_per_token=most,
            opening=opening,
            turn_end_id=turn_end_id(tokenizer),
        )

    @torch.inference_mode()
    def score(self, items: Sequence[ScorerItem]) -> list[list[float]]:
        scores_BH = self._decoder([item.token_ids for item in items]) if self.is_decoder else self._encoder(items)
        scores: list[list[float]] = scores_BH.tolist()
        return scores

    def _decoder(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        hidden_BD = self.hidden_states(sequences, [range(len(tokens) - 1, len(tokens)) for tokens in sequences])
        assert self.head is not None
        return float32_linear(hidden_BD, self.head.weight, self.head.bias)

    def _encoder(self, items: Sequence[ScorerItem]) -> Tensor:
        ids_BS, mask_BS = pad_right([item.token_ids for item in items], self.pad_id, self.hosting.device)
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS.long()}
        if self.has_segments:
            segments = [item.segments or [0] * len(item.token_ids) for item in items]
            inputs["token_type_ids"] = pad_right(segments, 0, self.hosting.device)[0]
        logits_BH: Tensor = self.model(**inputs).logits
        return logits_BH.float()


def _widen_head(model: Any) -> None:
    """Turns what stands beside the body of an encoder, which is its head, to float32 for good."""
    if model.base_model is model:
        return  # Nothing tells its head from its body.
    for part in model.children():
        if part is not model.base_model:
            part.float().register_forward_pre_hook(_widen_inputs)


def _widen_inputs(part: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
