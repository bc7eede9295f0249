"""A reward model behind a small interface: token ids in, raw scores out.

Shapes: B sequences, S tokens, N tokens of all sequences, D hidden size.
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
from torch.nn import functional as F

from quartet.model_folder import METADATA_FILE, read_metadata
from services.hosting.model import Hosting, longest_sequence, pad_right
from services.hosting.packed import HiddenStates, prepack
from services.runtime.errors import StartError


class Scorer(Protocol):
    """What the servicer needs of a reward model. ``score`` runs in one thread alone."""

    vocab_size: int
    max_sequence_tokens: int

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Raw score of each sequence of token ids, used exactly as they are."""
        ...


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How text becomes the token ids that the model was trained on.

    ``pair``: prompt and response as a sentence pair with special tokens (encoders such as BERT and DeBERTa).
    Otherwise both are encoded apart, without special tokens, and joined. ``end_token_id`` is appended to a finished
    response unless it is None.
    """

    pair: bool
    end_token_id: int | None


class TransformersScorer:
    """A sequence-classification model with one label, of any architecture that transformers loads.

    Decoders are run packed, without padding, and the float32 head sees only the last token. Encoders are called as
    they are, padded.
    """

    def __init__(self, folder: Path, *, hosting: Hosting, tokenizer: Any) -> None:
        """Loads and checks the model.

        Raises:
            StartError: it does not load, its head is missing from the checkpoint, or it has not exactly one label.
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
        if model.config.num_labels != 1:
            raise StartError(f"model {str(folder)!r}: num_labels is {model.config.num_labels}, must be 1")
        self.model = model.to(hosting.device).eval().requires_grad_(False)
        self.head = getattr(model, "score", None)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.max_sequence_tokens = longest_sequence(model.config, tokenizer)
        pad_id = model.config.pad_token_id
        self.pad_id = int(pad_id if pad_id is not None else tokenizer.pad_token_id or 0)
        self.is_decoder = isinstance(self.head, torch.nn.Linear)
        if self.is_decoder:
            self.hidden_states = HiddenStates(self.model, pad_id=self.pad_id)
        elif hosting.device.type == "cpu":
            prepack(self.model.base_model)

    def encoding(self, folder: Path, tokenizer: Any) -> Encoding:
        """How this model was trained to see text: quartet.json's word, else the custom of its architecture.

        Raises:
            StartError: the end token is to be appended but the tokenizer has none.
        """
        metadata = read_metadata(folder)
        pair = metadata.get("encoding", "concatenate" if self.is_decoder else "pair") == "pair"
        if pair or not metadata.get("append_eos", True):
            return Encoding(pair=pair, end_token_id=None)
        if tokenizer.eos_token_id is None:
            raise StartError(
                f"model {str(folder)!r}: its tokenizer has no end token to append to responses; give it one, or set "
                f'"append_eos": false in {METADATA_FILE} if the model was trained without'
            )
        return Encoding(pair=False, end_token_id=int(tokenizer.eos_token_id))

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        scores_B = self._decoder(sequences) if self.is_decoder else self._encoder(sequences)
        scores: list[float] = scores_B.tolist()
        return scores

    def _decoder(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        hidden_ND, places = self.hidden_states(sequences)
        hidden_BD = hidden_ND[torch.stack([place[-1] for place in places])]
        assert self.head is not None
        bias = self.head.bias.float() if self.head.bias is not None else None
        return F.linear(hidden_BD.float(), self.head.weight.float(), bias).squeeze(1)

    def _encoder(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        ids_BS, mask_BS = pad_right(sequences, self.pad_id, self.hosting.device)
        logits_B1: Tensor = self.model(input_ids=ids_BS, attention_mask=mask_BS.long()).logits
        return logits_B1.float().squeeze(1)
