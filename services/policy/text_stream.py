"""Text of a completion while its tokens come: whole characters, and the stop strings found in them.

A tokenizer's decoding of a part is not a part of its decoding of the whole: characters are split over tokens, and some
decoders treat the first token in a way of their own. So each token is decoded behind a few before it (the way of
text-generation-inference and vLLM), and text is given out only when nothing that follows can change it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# What decoders write in place of bytes that are no character, or not yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens of single bytes in sentencepiece vocabularies. Their decoder takes a run of them as a whole: one byte that fits
# no character spoils the characters before it, too.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of ``token_ids`` without special tokens, spaces as they were sampled."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class TextStream:
    """Takes the tokens of one completion and gives its text piece by piece.

    ``stop`` is the stop string that ended it, or empty; from then on it takes no more tokens. ``count``: tokens taken.
    """

    def __init__(self, tokenizer: Any, *, stop_strings: Sequence[str] = (), min_tokens: int = 0) -> None:
        """``min_tokens``: stop strings that are complete with so many tokens are passed over."""
        self.stop = ""
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._min_tokens = min_tokens
        self._ids: list[int] = []
        # Tokens [prefix, read) have been decoded into text, and stand before the next when those are decoded.
        self._prefix = self._read = 0
        self._next_try = 0
        self._certain: list[str] = []  # All text that is certain, stop string and held back text included.
        self._held = ""  # The end of it that may become a stop string.
        self._passed = 0  # Characters of ``_held`` that are of the first ``min_tokens`` tokens.
        self._released: list[str] = []

    @property
    def count(self) -> int:
        return len(self._ids)

    @property
    def text(self) -> str:
        """Everything given out so far; of an ended stream, the text of the completion."""
        return "".join(self._released)

    def push(self, token_id: int, *, search: bool = True) -> str:
        """Takes a token and returns the text that it makes certain.

        ``search``: whether a stop string may be complete with it; not of a token that ends the completion itself.
        """
        self._ids.append(token_id)
        text = self._decoded()
        return self._take(text, search=search and self.count > self._min_tokens) if text else ""

    def end(self, *, search: bool = True) -> str:
        """Takes what was held back: no token follows. Returns the rest of the text."""
        if self.stop:
            return ""
        certain = "".join(self._certain)
        whole = decode(self._tokenizer, self._ids)
        if whole.startswith(certain):
            rest = whole[len(certain) :]
        else:  # A decoder that takes back what it has said: what was given out stands.
            rest = self._window()[len(self._context()) :]
        said = self._take(rest, search=search and self.count > self._min_tokens)
        if self.stop:
            return said
        rest, self._held = self._held, ""
        self._released.append(rest)
        return said + rest

    def _decoded(self) -> str:
        """Text that the tokens not yet read make certain; empty when it is not yet."""
        if self.count < self._next_try or self._leaves_open(self._ids[-1]):
            return ""
        context, window = self._context(), self._window()
        if window.endswith(_REPLACEMENT):
            # Of a long run of bytes that are no text, not every token is tried: the work stays nearly linear.
            self._next_try = self.count + (self.count - self._read) // 8
            return ""
        if len(window) <= len(context):
            return ""
        self._prefix, self._read = self._read, self.count
        return window[len(context) :]

    def _context(self) -> str:
        return decode(self._tokenizer, self._ids[self._prefix : self._read])

    def _window(self) -> str:
        return decode(self._tokenizer, self._ids[self._prefix :])

    def _leaves_open(self, token_id: int) -> bool:
        """Whether the text before this token may still change: it is a byte, or adds nothing and so ends no run."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token is None or _BYTE_TOKEN.fullmatch(token) is not None or not decode(self._tokenizer, [token_id])

    def _take(self, text: str, *, search: bool) -> str:
        """Adds certain text; returns what of it, and of what was held back, is given out."""
        self._certain.append(text)
        if not self._stop_strings:
            self._released.append(text)
            return text
        window = self._held + text
        if search and (found := self._find(window)) is not None:
            place, self.stop = found
            self._held = ""
            self._released.append(window[:place])
            return window[:place]
        if not search:
            self._passed = len(window)
        kept = max(_beginning(window, stop) for stop in self._stop_strings)
        released, self._held = window[: len(window) - kept], window[len(window) - kept :]
        self._passed = max(0, self._passed - len(released))
        self._released.append(released)
        return released

    def _find(self, window: str) -> tuple[int, str] | None:
        """Where the stop string begins that is complete first (of several that end together, the longest), and it."""
        found: list[tuple[int, int, str]] = []
        for stop in self._stop_strings:
            place = window.find(stop, max(0, self._passed - len(stop) + 1))
            if place >= 0:
                found.append((place + len(stop), place, stop))
        if not found:
            return None
        _, place, stop = min(found)
        return place, stop


def _beginning(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, short of all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
