"""How much text a token may stand for: what is plainly too long is refused by its characters, without being tokenised.

A bound holds for byte-level BPE alone, where every byte of the text is in one token or another. Other tokenizers drop
spaces, or make one unknown token of a word of any length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

# Characters of which NFC may make one: no character's full canonical decomposition is longer.
_NFC_SHRINKS = 4


def characters_per_token(tokenizer: Any) -> int | None:
    """Most characters of a text that become one token; None where there is no such bound, or none that we can prove."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    parts = json.loads(backend.to_str())
    shrinks = _shrinks(parts["normalizer"])
    if shrinks is None or not _is_byte_level(parts["pre_tokenizer"]) or not _covers_bytes(parts["model"]):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"]):
        return None  # It takes all the spaces beside it.
    # In the alphabet of a byte-level BPE a character is a byte, and no character of a text is less.
    longest = max(map(len, parts["model"]["vocab"]))
    added = max((len(token["content"]) for token in parts["added_tokens"]), default=0)
    return shrinks * max(longest, added)


def _shrinks(normalizer: Mapping[str, Any] | None) -> int | None:
    if normalizer is None:
        return 1
    return _NFC_SHRINKS if normalizer["type"] == "NFC" else None


def _is_byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether all of the text goes on to the model, as bytes."""
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = steps
    keeps = all(
        step["type"] == "Digits" or (step["type"] == "Split" and step["behavior"] != "Removed") for step in before
    )
    return keeps and last["type"] == "ByteLevel"


def _covers_bytes(model: Mapping[str, Any]) -> bool:
    """Whether every byte has a token: what has none is dropped."""
    plain = model["type"] == "BPE" and not model["continuing_subword_prefix"] and not model["end_of_word_suffix"]
    return plain and model["vocab"].keys() >= set(ByteLevel.alphabet())
