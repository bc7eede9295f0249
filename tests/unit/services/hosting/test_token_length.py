"""The bound holds for whatever text, and there is none where a tokenizer can make much of a text vanish."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.hosting.token_length import characters_per_token
from tests.conftest import train_tokenizer

BYTE_LEVEL = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
FALLBACK = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "\N{LOWER ONE EIGHTH BLOCK}": 257}


def fast(model: models.Model, normalizer: object = None, pre_tokenizer: object = None) -> PreTrainedTokenizerFast:
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=made)


def byte_level(normalizer: object = None, pre_tokenizer: object = None) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen are made."""
    vocab = {**BYTE_LEVEL, "ab": 256, "abab": 257}
    merges = [("a", "b"), ("ab", "ab")]
    return fast(models.BPE(vocab, merges), normalizer, pre_tokenizer or pre_tokenizers.ByteLevel(False))


def fallback(**changes: object) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma are made."""
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    model = models.BPE(
        {**FALLBACK, "a": 258, "aa": 259},
        [("a", "a")],
        **{"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, **changes},
    )
    return fast(model, normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)]))


def split(behavior: str) -> object:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s+"), behavior), pre_tokenizers.ByteLevel(False)])


BOUNDED = {
    "bytes": (byte_level(), 4),
    "bytes-composed": (byte_level(normalizers.NFC(), split("isolated")), 16),
    "fallback": (fallback(), 6),  # <0xAB> is written with six characters.
}


@pytest.mark.parametrize("name", BOUNDED)
def test_the_longest_token_is_the_bound(name):
    tokenizer, bound = BOUNDED[name]
    assert characters_per_token(tokenizer) == bound


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text("ab \n\u0301\u0302\u0323\u00e9aA\U0001f600"), name=st.sampled_from(sorted(BOUNDED)))
def test_no_token_stands_for_more_characters(text, name):
    tokenizer, bound = BOUNDED[name]
    assert len(text) <= bound * len(tokenizer(text, add_special_tokens=False).input_ids)


GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def trained(normalizer: object = None, pattern: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer with merges of its own, and the parts of GPT-2's, Llama 3's or Qwen's around them."""
    tokenizer = train_tokenizer()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if pattern:
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, plain])
    return tokenizer


TRAINED = {"as GPT-2": trained(), "as Llama 3": trained(None, GPT4), "as Qwen": trained(normalizers.NFC(), GPT4)}
# Characters that combine, vanish or count double elsewhere, and words that are one token.
PIECES = st.sampled_from(
    [*" \n\t\0\u00e9\u1f82\ufdfa", "e\u0301", "\u03b1\u0313\u0300\u0345", "\u1100\u1161\u11a8", "<eos>", " the"]
)


@pytest.mark.parametrize("name", TRAINED)
@given(text=st.lists(st.text(max_size=5) | PIECES.map(lambda piece: piece * 9), max_size=12).map("".join))
def test_a_text_has_at_least_as_many_tokens_as_its_characters_say(name, text):
    tokenizer = TRAINED[name]
    most = characters_per_token(tokenizer)
    assert most == (20 if name == "as Qwen" else 5)  # "<eos>"
    assert len(tokenizer(text, add_special_tokens=False).input_ids) * most >= len(text)


def test_nothing_composes_more_than_four_code_points():
    assert max(len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000)) == 4


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(normalizers.Strip()),
        byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")])),
        byte_level(normalizers.Replace("  ", " ")),
        byte_level(normalizers.BertNormalizer()),
        byte_level(None, split("removed")),
        byte_level(None, pre_tokenizers.WhitespaceSplit()),
        fallback(byte_fallback=False),
        fast(models.BPE({"a": 0}, []), None, pre_tokenizers.ByteLevel(False)),  # All else is left out.
        fast(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
        fast(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
    ],
    ids=str,
)
def test_where_much_may_vanish_there_is_no_bound(tokenizer):
    assert characters_per_token(tokenizer) is None


def test_an_added_token_counts_and_one_that_strips_leaves_no_bound():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<|a token of 24 letters|>")])
    assert characters_per_token(tokenizer) == 25
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert characters_per_token(tokenizer) is None
    assert characters_per_token(object()) is None
