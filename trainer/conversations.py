"""Conversations of several turns as token ids: which of them are the assistant's, the end of each turn included.

The chat template is rendered up to where each answer of the assistant begins, and up to where it ends. Where all of
these are what the whole begins with, an answer is what lies between the two. It is encoded apart from what stands
around it, as a response is from its prompt, for a model begins its answer after the tokens of the prompt. A template
that writes the same messages otherwise once others follow (some leave out the thoughts of earlier answers) must say
itself what the assistant says, by {% generation %}; any other one is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from trainer.errors import DataError
from trainer.rows import Message

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Token ids up to the end of the last answer, and where each answer begins and ends, its end token included."""

    ids: tuple[int, ...]
    turns: tuple[tuple[int, int], ...]


def render(tokenizer: Any, messages: Sequence[Message], where: str, *, to_answer: bool = True) -> str:
    """The messages as the chat template writes them; ``to_answer``: up to where the assistant's answer begins.

    Raises:
        DataError: there is no template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: the prompt is chat messages, but the model's tokenizer has no chat template; "
            "give it one (quartet-train sft takes --chat-template FILE)"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_answer)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"{where}: the model's chat template refuses the messages of the prompt: {error}") from error
    return text


def encode_conversations(
    tokenizer: Any, rows: Sequence[tuple[Sequence[Message], str]], end_id: int | None, advice: str
) -> list[Conversation]:
    """Every conversation, each with the place that messages name; the last message is the assistant's.

    ``end_id``: of the token by which the template ends the assistant's turns, ``quartet.text_tokens.turn_end_id``.

    Raises:
        DataError: roles are out of order, the template refuses the messages, or it doesn't tell which tokens are the
            assistant's; ``advice`` says what to do about that.
    """
    parts = []
    for messages, where in rows:
        _refuse_disorder(messages, where)
        parts.append(_parts(tokenizer, messages, where))
    texts = [text for row in parts for text in row or ()]
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    return [
        _marked(tokenizer, messages, where, end_id, advice)
        if row is None
        else _joined([next(encoded) for _ in row], where, end_id, advice)
        for (messages, where), row in zip(rows, parts, strict=True)
    ]


def _refuse_disorder(messages: Sequence[Message], where: str) -> None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise DataError(
                f"{where}: message {number + 1 + len(messages) - len(turns)} has the role {message['role']!r}, "
                f"must be {expected!r}: after the system's, where there is one, user and assistant take turns"
            )


def _parts(tokenizer: Any, messages: Sequence[Message], where: str) -> list[str] | None:
    """In turn what the template writes around an answer, and the answer; None: that depends on what follows."""
    whole = render(tokenizer, messages, where, to_answer=False)
    parts: list[str] = []
    done = 0
    for place in (number for number, message in enumerate(messages) if message["role"] == "assistant"):
        before = render(tokenizer, messages[:place], where)
        through = render(tokenizer, messages[: place + 1], where, to_answer=False)
        if len(before) < done or not (through.startswith(before) and whole.startswith(through)):
            return None
        parts += [whole[done : len(before)], whole[len(before) : len(through)]]
        done = len(through)
    return parts


def _joined(parts: Sequence[Sequence[int]], where: str, end_id: int | None, advice: str) -> Conversation:
    """Of the token ids of ``_parts``. What stands behind an answer's end token, such as a line break, is not said."""
    ids: list[int] = []
    turns = []
    for around, answer in zip(parts[::2], parts[1::2], strict=True):
        ids += around
        said = max((place + 1 for place, token in enumerate(answer) if token == end_id), default=0)
        if not said:
            raise DataError(
                f"{where}: the model's chat template closes the assistant's turns by no end token, so they could not "
                f"be learned to their end; {advice}"
            )
        turns.append((len(ids), len(ids) + said))
        ids += answer
    return Conversation(ids=tuple(ids[: turns[-1][1]]), turns=tuple(turns))


def _marked(tokenizer: Any, messages: Sequence[Message], where: str, end_id: int | None, advice: str) -> Conversation:
    """By the template's own marks, as transformers reads them."""
    if not _MARKED.search(tokenizer.get_chat_template()):
        raise DataError(
            f"{where}: the model's chat template writes messages otherwise once others follow them, and doesn't mark "
            f"what the assistant says by {{% generation %}}, so the turns can't be told apart; {advice}"
        )
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, place = list(encoded["input_ids"]), 0
    turns: list[tuple[int, int]] = []
    for said, tokens in itertools.groupby(encoded["assistant_masks"]):
        end = place + len(list(tokens))
        if said:
            # Marks often leave the end token out.
            end_said = end + (ids[end - 1] != end_id and ids[end : end + 1] == [end_id])
            turns.append((place, end_said))
        place = end
    answers = sum(message["role"] == "assistant" for message in messages)
    if len(turns) != answers or not all(ids[end - 1] == end_id for _, end in turns):
        raise DataError(
            f"{where}: the model's chat template marks {len(turns)} turns by {{% generation %}} of the assistant's "
            f"{answers}, or no end token closes one of them; {advice}"
        )
    return Conversation(ids=tuple(ids[: turns[-1][1]]), turns=tuple(turns))
