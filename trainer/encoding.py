"""From rows to token ids, the same way in training and in the services.

Prompt and response are encoded apart, without special tokens, and joined. A prompt in plain text begins with what the
tokenizer puts before text by itself; the end token closes the response, or to chat messages the token by which the chat
template ends the assistant's turns (``quartet.text_tokens``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quartet.text_tokens import opened, opening_ids, turn_end_id
from trainer.comparisons import Comparison, Judgement
from trainer.conversations import encode_conversations, render
from trainer.data import Demonstration, Preference, PromptRow
from trainer.errors import DataError, ModelError
from trainer.rows import Message, Prompt, Row

Ids = npt.NDArray[np.int32]

# How many of the rows that don't fit a message names.
_NAMED_ROWS = 5


# What happens to sequences that are too long.
#   refuse: they stop the run, with file and line.
#   left: the beginning goes, so the end of the response is always seen; as the reward service does it.
#   right: the end goes, and with it the end token, as in a response that was cut off.
Truncation = Literal["refuse", "left", "right"]


@dataclass(frozen=True, kw_only=True)
class EncodedResponse:
    """Token ids of prompt and response, where the response begins, and whether anything was cut off.

    ``turns``: of a conversation learned from in every turn, where each of the assistant's begins and ends.
    """

    ids: Ids
    prompt_tokens: int
    truncated: bool
    turns: tuple[tuple[int, int], ...] = ()

    @property
    def learned(self) -> tuple[tuple[int, int], ...]:
        """Where what is learned begins and ends: never the very first token, which nothing predicts."""
        spans = self.turns or ((self.prompt_tokens, len(self.ids)),)
        return tuple((max(1, start), end) for start, end in spans)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class EncodedPreference:
    """Both answers to one prompt, each with the prompt before it."""

    chosen: EncodedResponse
    rejected: EncodedResponse

    def __len__(self) -> int:
        """Tokens of the longer one, which is what it is padded to."""
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, kw_only=True)
class EncodedComparison:
    """The answers to one prompt, each with the prompt before it, and what was said of pairs of them."""

    answers: tuple[EncodedResponse, ...]
    judgements: tuple[Judgement, ...]
    ranked: bool

    def __len__(self) -> int:
        """Tokens of the longest one, which is what all are padded to."""
        return max(map(len, self.answers))


class Encoder:
    """Encodes rows of at most ``max_tokens`` tokens, prompt, response and end token together."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_tokens: int,
        truncation: Truncation = "refuse",
        advice: str = "raise --max-tokens if the model allows, or choose --truncation left or right",
    ) -> None:
        """``advice``: what the message about rows that are too long says beside shortening them.

        ``other_end_id``, once rows were encoded: what closes answers to messages among them besides the end token.

        Raises:
            ModelError: the tokenizer has no end token.
        """
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token (eos_token), so no response could ever end; give it one")
        self._tokenizer = tokenizer
        self._end_id = int(tokenizer.eos_token_id)
        self._opening = opening_ids(tokenizer)
        self._turn_end_id = turn_end_id(tokenizer)
        self.other_end_id: int | None = None
        self._max_tokens = max_tokens
        self._truncation = truncation
        self._advice = advice

    def prompts(self, rows: Sequence[PromptRow]) -> list[Ids]:
        """Token ids of each prompt, at least one. With truncation ``left`` or ``right`` the beginning or the end goes.

        Raises:
            DataError: prompts are too long, have no token, or need a chat template where there is none.
        """
        encoded = self._encode_prompts(rows)
        for row, ids in zip(rows, encoded, strict=True):
            if len(ids) == 0:
                raise DataError(f"{row.where}: field 'prompt' has no tokens: there is nothing to answer")
        self._refuse_long([(row, len(ids)) for row, ids in zip(rows, encoded, strict=True)], "prompt")
        return [self._cut(ids) for ids in encoded]

    def demonstrations(self, rows: Sequence[Demonstration], *, every_turn: bool = False) -> list[EncodedResponse]:
        """Prompt and completion of each row. ``every_turn``: of messages, the whole conversation as the chat template
        writes it, to be learned from in all turns of the assistant.

        Raises:
            DataError: rows are too long, or need a chat template where there is none; their roles are out of order, or
                the template doesn't tell their turns apart.
        """
        talks: dict[int, list[Message]] = {
            place: [*row.prompt, {"role": "assistant", "content": row.completion}]
            for place, row in enumerate(rows)
            if every_turn and isinstance(row.prompt, list)
        }
        others = [row for place, row in enumerate(rows) if place not in talks]
        encoded_talks = iter(self._conversations([(rows[place], messages) for place, messages in talks.items()]))
        answers = self._answers(others, [(row.completion,) for row in others], "prompt and completion")
        encoded = (answer for (answer,) in answers)
        return [next(encoded_talks if place in talks else encoded) for place in range(len(rows))]

    def preferences(self, rows: Sequence[Preference]) -> list[EncodedPreference]:
        """Both answers of each row, behind the same tokens of the prompt wherever one of them has to be cut.

        Raises:
            DataError: rows are too long, or need a chat template where there is none.
        """
        encoded = self._answers(rows, [(row.chosen, row.rejected) for row in rows], "prompt and chosen or rejected")
        _warn_of_equal(rows, [c.ids.tobytes() == r.ids.tobytes() for c, r in encoded])
        return [EncodedPreference(chosen=c, rejected=r) for c, r in encoded]

    def comparisons(self, rows: Sequence[Comparison]) -> list[EncodedComparison]:
        """All answers of each row, behind the same tokens of the prompt wherever one of them has to be cut.

        Raises:
            DataError: rows are too long, or need a chat template where there is none.
        """
        encoded = self._answers(rows, [row.answers for row in rows], "prompt and answer")
        equal = [
            any(j.decided and answers[j.first].ids.tobytes() == answers[j.second].ids.tobytes() for j in row.judgements)
            for row, answers in zip(rows, encoded, strict=True)
        ]
        _warn_of_equal(rows, equal)
        return [
            EncodedComparison(answers=answers, judgements=row.judgements, ranked=row.ranked)
            for row, answers in zip(rows, encoded, strict=True)
        ]

    def _answers(
        self, rows: Sequence[Row], answers: Sequence[Sequence[str]], what: str
    ) -> list[tuple[EncodedResponse, ...]]:
        """All ``answers`` of each row, each behind its prompt."""
        prompts, flat = self._encode_prompts(rows), iter(self._encode([text for own in answers for text in own]))
        whole = [
            [np.concatenate([prompt, next(flat), [self._end_of(row)]], dtype=np.int32) for _ in own]
            for row, prompt, own in zip(rows, prompts, answers, strict=True)
        ]
        self._refuse_long([(row, max(map(len, own))) for row, own in zip(rows, whole, strict=True)], what)
        encoded = []
        for row, prompt, own in zip(rows, prompts, whole, strict=True):
            gone = 0
            if self._truncation == "left":
                # What differs between answers is what they say, never how much of the prompt is left before them.
                gone = min(len(prompt), max(0, *(len(ids) - self._max_tokens for ids in own)))
            elif len(prompt) >= self._max_tokens:
                raise DataError(
                    f"{row.where}: the prompt alone has {len(prompt)} tokens of the {self._max_tokens} allowed, so "
                    "truncation right would leave nothing of the response"
                )
            encoded.append(
                tuple(
                    EncodedResponse(
                        ids=self._cut(ids[gone:]),
                        prompt_tokens=len(prompt) - gone,
                        truncated=gone > 0 or len(ids) > self._max_tokens,
                    )
                    for ids in own
                )
            )
        return encoded

    def _end_of(self, row: Row) -> int:
        """The token that closes an answer to ``row``'s prompt."""
        if isinstance(row.prompt, str) or self._turn_end_id is None:
            return self._end_id
        self._tell_end(self._turn_end_id)
        return self._turn_end_id

    def _tell_end(self, end_id: int) -> None:
        """Says, once, that answers to messages end by another token than the tokenizer's end token."""
        if end_id == self._end_id or self.other_end_id is not None:
            return
        self.other_end_id = end_id
        named = self._tokenizer.convert_ids_to_tokens(end_id)
        sys.stderr.write(
            f"warning: the chat template ends the assistant's turns by {named!r}, so answers to messages do, the "
            f"tokenizer's end token is {self._tokenizer.eos_token!r}: generation has to stop at both (--stop-token-ids "
            f"{end_id}, unless the model's generation_config.json names it)\n"
        )

    def _conversations(self, rows: Sequence[tuple[Row, list[Message]]]) -> list[EncodedResponse]:
        places = [(messages, row.where) for row, messages in rows]
        found = encode_conversations(self._tokenizer, places, self._turn_end_id, "choose --train-on last-turn")
        if found and self._turn_end_id is not None:
            self._tell_end(self._turn_end_id)
        self._refuse_long([(row, len(talk.ids)) for (row, _), talk in zip(rows, found, strict=True)], "messages")
        encoded = []
        for (row, _), talk in zip(rows, found, strict=True):
            excess = max(0, len(talk.ids) - self._max_tokens)
            gone = excess if self._truncation == "left" else 0
            cut = ((max(0, start - gone), min(end - gone, self._max_tokens)) for start, end in talk.turns)
            turns = tuple((start, end) for start, end in cut if end > max(1, start))
            if not turns:
                raise DataError(
                    f"{row.where}: before the assistant's first answer there are {talk.turns[0][0]} tokens of the "
                    f"{self._max_tokens} allowed, so truncation right would leave nothing to learn"
                )
            ids = np.array(talk.ids, dtype=np.int32)
            encoded.append(
                EncodedResponse(ids=self._cut(ids), prompt_tokens=turns[0][0], truncated=excess > 0, turns=turns)
            )
        return encoded

    def _cut(self, ids: Ids) -> Ids:
        return ids[-self._max_tokens :] if self._truncation == "left" else ids[: self._max_tokens]

    def _encode_prompts(self, rows: Sequence[Row]) -> list[Ids]:
        encoded = self._encode([self._prompt_text(row.prompt, row.where) for row in rows])
        if not self._opening:
            return encoded
        return [
            np.array(opened(ids.tolist(), self._opening), dtype=np.int32) if isinstance(row.prompt, str) else ids
            for row, ids in zip(rows, encoded, strict=True)
        ]

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def _prompt_text(self, prompt: Prompt, where: str) -> str:
        if isinstance(prompt, str):
            return prompt
        return render(self._tokenizer, prompt, where)

    def _refuse_long(self, lengths: Sequence[tuple[Row, int]], what: str) -> None:
        if self._truncation != "refuse":
            return
        long = [(row, length) for row, length in lengths if length > self._max_tokens]
        if long:
            named = "; ".join(f"{row.where} ({length} tokens)" for row, length in long[:_NAMED_ROWS])
            more = f"; and {len(long) - _NAMED_ROWS} more" if len(long) > _NAMED_ROWS else ""
            raise DataError(
                f"{len(long)} of {len(lengths)} rows have more than {self._max_tokens} tokens of {what}: {named}"
                f"{more}. Shorten them; {self._advice}"
            )


def _warn_of_equal(rows: Sequence[Row], equal: Sequence[bool]) -> None:
    """Says on stderr how many rows prefer an answer to the very same one, and which is the first."""
    if any(equal):
        sys.stderr.write(
            f"warning: {sum(equal)} of {len(rows)} rows prefer an answer to itself, token by token (the first: "
            f"{rows[list(equal).index(True)].where}): nothing is learned from such a pair, which counts as half right\n"
        )
