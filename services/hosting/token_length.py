"""How many characters of a text one token can stand for, where the tokenizer's parts allow to say it.

A text of more characters than that times the tokens that fit can't fit, and need not be tokenised to see it. What a
tokenizer does is told by its parts: a normaliser that deletes, a pre-tokenizer that drops spaces, or an unknown token
for stretches of any length let a short list of tokens stand for a text without bound. So only parts are taken here that
are known to keep every character, and others give no bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

# At most four code points of a text become one by composition: U+1F82 and a few more decompose into so many.
_MOST_COMPOSED = 4
_BYTES = 256


def characters_per_token(tokenizer: Any) -> int | None:
    """Most characters of a text that become one token; None where there is no such bound, or none that is known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # One with code of its own may do anything to a text before it comes to the parts.
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    parts = json.loads(backend.to_str())
    added = parts["added_tokens"]
    shrinks = _shrinking(parts["normalizer"])
    # An added token that strips takes the spaces beside it along, however many.
    strips = any(token["lstrip"] or token["rstrip"] for token in added)
    if not shrinks or strips or not _keeps_all(parts["pre_tokenizer"]) or not _knows_all(parts):
        return None
    longest = max(map(len, (*parts["model"]["vocab"], *(token["content"] for token in added))))
    return shrinks * longest


def _shrinking(normalizer: dict[str, Any] | None) -> int:
    """Most characters that a normaliser makes one of; 0: unknown."""
    if normalizer is None:
        return 1
    match normalizer["type"]:
        case "Sequence":
            product = 1
            for part in normalizer["normalizers"]:
                product *= _shrinking(part)
            return product
        case "NFC" | "NFKC":
            return _MOST_COMPOSED
        case "NFD" | "NFKD" | "Prepend":
            return 1
        case "Replace" if len(normalizer["pattern"].get("String", "")) == 1 and normalizer["content"]:
            return 1
        case _:
            return 0


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether all that a pre-tokenizer is given is in its pieces."""
    if pre_tokenizer is None:
        return True
    match pre_tokenizer["type"]:
        case "Sequence":
            return all(map(_keeps_all, pre_tokenizer["pretokenizers"]))
        case "Split" | "Punctuation":
            return bool(pre_tokenizer["behavior"] != "Removed")
        case "ByteLevel" | "Digits" | "Metaspace":
            return True
        case _:
            return False


def _knows_all(parts: dict[str, Any]) -> bool:
    """Whether a byte-pair model has a token for every byte, so that nothing is unknown to it or left out."""
    model = parts["model"]
    if model["type"] != "BPE":
        return False
    vocab = model["vocab"]
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocab for byte in range(_BYTES))
    return _any_part(parts["pre_tokenizer"], lambda part: part["type"] == "ByteLevel") and _byte_letters() <= set(vocab)


def _any_part(pre_tokenizer: dict[str, Any] | None, is_so: Callable[[dict[str, Any]], bool]) -> bool:
    if pre_tokenizer is None:
        return False
    return is_so(pre_tokenizer) or any(_any_part(part, is_so) for part in pre_tokenizer.get("pretokenizers", ()))


def _byte_letters() -> set[str]:
    """The characters that stand for bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())
