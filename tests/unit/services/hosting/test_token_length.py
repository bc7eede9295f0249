"""No text has fewer tokens than its characters say, and where that can't be known nothing is said."""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.hosting.token_length import characters_per_token
from tests.conftest import train_tokenizer

GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def changed(*, normalizer: Any = None, pre_tokenizer: Any = None, lstrip: bool = False) -> Any:
    tokenizer = train_tokenizer()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    if lstrip:
        from tokenizers import AddedToken

        tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def split(behaviour: str) -> Any:
    from tokenizers import Regex

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT4), behaviour), plain])


KNOWN = {
    "as GPT-2": changed(),
    "as Llama 3": changed(pre_tokenizer=split("isolated")),
    "as Qwen": changed(normalizer=normalizers.NFC(), pre_tokenizer=split("isolated")),
}
# Characters that combine, vanish or count double elsewhere, and words that are one token.
SINGLE = [
    " ",
    "\n",
    "\t",
    "\0",
    "\u00e9",
    "e\u0301",
    "\u1f82",
    "\u03b1\u0313\u0300\u0345",
    "\u1100\u1161\u11a8",
    "\ufdfa",
]
PIECES = st.sampled_from([*SINGLE, "\U0001f469\u200d\U0001f469", "<eos>", " the"])


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.text(max_size=5) | PIECES.map(lambda piece: piece * 9), max_size=12).map("".join))
def test_a_text_has_at_least_as_many_tokens_as_its_characters_say(name, text):
    tokenizer = KNOWN[name]
    most = characters_per_token(tokenizer)
    assert most == (20 if name == "as Qwen" else 5)  # "<eos>"
    assert len(tokenizer(text, add_special_tokens=False).input_ids) * most >= len(text)


def test_no_character_is_composed_of_more_than_four():
    decomposed = [unicodedata.normalize("NFD", chr(code)) for code in range(sys.maxunicode + 1)]
    assert max(map(len, decomposed)) == 4


def bare(model: Any, pre_tokenizer: Any = None) -> Any:
    backend = Tokenizer(model)
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


@pytest.mark.parametrize(
    "tokenizer",
    [
        changed(normalizer=normalizers.NFKC()),
        changed(normalizer=normalizers.Strip()),
        changed(pre_tokenizer=split("removed")),
        changed(pre_tokenizer=pre_tokenizers.Whitespace()),
        changed(lstrip=True),
        bare(models.WordPiece({"?": 0}, unk_token="?"), pre_tokenizers.ByteLevel()),
        bare(models.WordLevel({"?": 0}, unk_token="?"), pre_tokenizers.WhitespaceSplit()),
        bare(models.BPE({"a": 0, "?": 1}, [], unk_token="?"), pre_tokenizers.ByteLevel()),
        bare(models.BPE({"a": 0, "?": 1}, [])),
        object(),
    ],
)
def test_where_text_may_shrink_without_bound_none_is_given(tokenizer):
    assert characters_per_token(tokenizer) is None
