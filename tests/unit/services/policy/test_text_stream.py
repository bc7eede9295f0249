"""Text that comes token by token: whole characters, the same text as decoded at once, stop strings found exactly."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from services.policy.text_stream import TextStream, decode

TEXTS = [
    "hello please, my phone is broken",
    "naïve café — déjà vu",
    "你好世界。",
    "🙂🙃 family: 👨‍👩‍👧‍👦 flag: 🇫🇷",
    "العربية\n\n日本語 ok",
    "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}",
    " ",
]


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """A vocabulary like Llama 2's: pieces with a mark for the space before, and single bytes for what is not in it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁hello", "▁world", "lo", "▁lo", "a", "b", "é"]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def stream(tokenizer: Any, ids: Sequence[int], **options: Any) -> tuple[TextStream, list[str]]:
    """The stream after all tokens or its stop string, and what it gave at each."""
    reader, given = TextStream(tokenizer, **options), []
    for token in ids:
        given.append(reader.push(token))
        if reader.stop:
            return reader, given
    given.append(reader.end())
    return reader, given


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_whole_characters_and_joined_the_whole_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    reader, given = stream(tokenizer, ids)
    assert "".join(given) == reader.text == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in given)
    # A token after which the text stands whole is not waited for.
    for place in range(len(ids)):
        if (so_far := decode(tokenizer, ids[: place + 1])) and not so_far.endswith("\N{REPLACEMENT CHARACTER}"):
            assert "".join(given[: place + 1]) == so_far


def test_any_tokens_at_all_give_the_text_that_they_have_decoded_at_once(tokenizer, sentencepiece):
    draw = random.Random(5)
    for vocabulary, size in ((tokenizer, 300), (sentencepiece, len(sentencepiece))):
        for _ in range(300):
            # Short runs of plain bytes among pieces, and special tokens, and ids that stand for nothing.
            ids = [draw.choice((draw.randrange(size), draw.randrange(3, 259), size + 7)) for _ in range(24)]
            reader, given = stream(vocabulary, ids)
            assert "".join(given) == reader.text == decode(vocabulary, ids)


def test_a_byte_that_spoils_the_run_before_it_is_waited_for(sentencepiece):
    byte = {value: 3 + value for value in range(256)}
    good, bad = [byte[0xC3], byte[0xA9]], byte[0xFF]
    word = sentencepiece.convert_tokens_to_ids("▁hello")
    assert stream(sentencepiece, [word, *good, word])[1] == ["hello", "", "", "é hello", ""]
    # The decoder gives up the whole run, the character that was complete included.
    assert stream(sentencepiece, [word, *good, bad, word])[0].text == decode(sentencepiece, [word, *good, bad, word])
    assert "é" not in decode(sentencepiece, [word, *good, bad, word])


def test_the_space_before_a_word_is_kept_in_the_middle_and_behind_special_tokens(sentencepiece):
    hello, world, end = (sentencepiece.convert_tokens_to_ids(piece) for piece in ("▁hello", "▁world", "</s>"))
    assert stream(sentencepiece, [hello, world])[1] == ["hello", " world", ""]
    assert stream(sentencepiece, [hello, end, world])[0].text == "hello world"


def test_a_long_run_of_bytes_that_are_no_text_costs_no_quadratic_time(tokenizer):
    lone = tokenizer.convert_tokens_to_ids("©")  # Byte 0xA9, which begins no character.
    spent_s = []
    for count in (2_000, 16_000):
        start_s = time.process_time()
        reader, _ = stream(tokenizer, [lone] * count)
        spent_s.append(time.process_time() - start_s)
        assert reader.text == "\N{REPLACEMENT CHARACTER}" * count
    assert spent_s[1] < 8 * 4 * spent_s[0]


# Stop strings -----------------------------------------------------------------------------------------------------


def truth(tokenizer: Any, ids: Sequence[int], stops: Sequence[str], least: int) -> tuple[str, str, int]:
    """(text, stop, tokens): decodes every beginning of ``ids`` and searches it with str.find."""
    for count in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:count])
        if count < len(ids) and text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        passed = len(decode(tokenizer, ids[:least]).rstrip("\N{REPLACEMENT CHARACTER}"))
        found = []
        for stop in stops:
            place = text.find(stop)
            while place >= 0 and place + len(stop) <= passed:
                place = text.find(stop, place + 1)
            if place >= 0 and count > least:
                found.append((place + len(stop), place, stop))
        if found:
            _, place, stop = min(found)
            return text[:place], stop, count
    return decode(tokenizer, ids), "", len(ids)


@pytest.mark.parametrize("least", [0, 9])
def test_the_first_stop_string_to_be_complete_ends_the_text_before_it(tokenizer, least):
    draw = random.Random(7)
    alphabet = tokenizer("abé🙂 \n", add_special_tokens=False).input_ids
    matched = 0
    for _ in range(2000):
        ids = [draw.choice(alphabet) for _ in range(20)]
        stops = draw.sample(["ab", "ba", "aba", "bb", "é", "🙂", " \n", "aab", "a a", "bab\n"], k=3)
        reader, given = stream(tokenizer, ids, stop_strings=stops, min_tokens=least)
        assert (reader.text, reader.stop, reader.count) == truth(tokenizer, ids, stops, least), (ids, stops)
        assert "".join(given) == reader.text
        matched += bool(reader.stop)
        if least == 0:
            assert not any(stop in reader.text for stop in stops)
    assert 200 < matched < 1800


def test_only_what_may_become_a_stop_string_is_held_back(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "xENxENDy"]
    reader, given = stream(tokenizer, ids, stop_strings=["END"])
    assert given == ["x", "", "", "ENx", "", "", ""]
    assert (reader.text, reader.stop, reader.count) == ("xENx", "END", 7)
    held, given = stream(tokenizer, ids[:3], stop_strings=["END"])
    assert given == ["x", "", "", "EN"]  # It ended by itself: nothing is lost.
    assert (held.text, held.stop) == ("xEN", "")


def test_the_token_that_ends_a_completion_completes_no_stop_string(tokenizer):
    reader = TextStream(tokenizer, stop_strings=["ab"])
    a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
    assert reader.push(a) == ""
    assert reader.push(b, search=False) + reader.end(search=False) == "ab"
    assert (reader.stop, reader.text) == ("", "ab")
