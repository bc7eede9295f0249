"""From rows to token ids, the same way in training and in the services.

Prompt and response are encoded apart, without special tokens, and joined; the end token closes the response.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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

        Raises:
            ModelError: the tokenizer has no end token.
        """
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token (eos_token), so no response could ever end; give it one")
        self._tokenizer = tokenizer
        self._end_id = int(tokenizer.eos_token_id)
        self._max_tokens = max_tokens
        self._truncation = truncation
        self._advice = advice

    def prompts(self, rows: Sequence[PromptRow]) -> list[Ids]:
        """Token ids of each prompt, at least one. With truncation ``left`` or ``right`` the beginning or the end goes.

        Raises:
            DataError: prompts are too long, have no token, or need a chat template where there is none.
        """
        encoded = self._encode([self._prompt_text(row.prompt, row.where) for row in rows])
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
        encoded = iter(self._responses(others, [row.completion for row in others], "prompt and completion"))
        return [next(encoded_talks if place in talks else encoded) for place in range(len(rows))]

    def preferences(self, rows: Sequence[Preference]) -> list[EncodedPreference]:
        """Both answers of each row.

        Raises:
            DataError: rows are too long, or need a chat template where there is none.
        """
        chosen = self._responses(rows, [row.chosen for row in rows], "prompt and chosen")
        rejected = self._responses(rows, [row.rejected for row in rows], "prompt and rejected")
        return [EncodedPreference(chosen=c, rejected=r) for c, r in zip(chosen, rejected, strict=True)]

    def comparisons(self, rows: Sequence[Comparison]) -> list[EncodedComparison]:
        """All answers of each row.

        Raises:
            DataError: rows are too long, or need a chat template where there is none.
        """
        flat = [(row, answer) for row in rows for answer in row.answers]
        encoded = iter(self._responses([row for row, _ in flat], [answer for _, answer in flat], "prompt and answer"))
        return [
            EncodedComparison(
                answers=tuple(itertools.islice(encoded, len(row.answers))),
                judgements=row.judgements,
                ranked=row.ranked,
            )
            for row in rows
        ]

    def _responses(self, rows: Sequence[Row], responses: Sequence[str], what: str) -> list[EncodedResponse]:
        prompts = self._encode([self._prompt_text(row.prompt, row.where) for row in rows])
        answers = self._encode(responses)
        whole = [
            (prompt, np.concatenate([prompt, answer, np.array([self._end_id], dtype=np.int32)]))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        self._refuse_long([(row, len(ids)) for row, (_, ids) in zip(rows, whole, strict=True)], what)
        encoded = []
        for row, (prompt, ids) in zip(rows, whole, strict=True):
            excess = max(0, len(ids) - self._max_tokens)
            prompt_tokens = max(0, len(prompt) - excess) if self._truncation == "left" else len(prompt)
            if prompt_tokens >= self._max_tokens:
                raise DataError(
                    f"{row.where}: the prompt alone has {len(prompt)} tokens of the {self._max_tokens} allowed, so "
                    "truncation right would leave nothing of the response"
                )
            encoded.append(
                EncodedResponse(ids=self._cut(ids), prompt_tokens=prompt_tokens, truncated=len(ids) > self._max_tokens)
            )
        return encoded

    def _conversations(self, rows: Sequence[tuple[Row, list[Message]]]) -> list[EncodedResponse]:
        places = [(messages, row.where) for row, messages in rows]
        found = encode_conversations(self._tokenizer, places, "choose --train-on last-turn")
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
