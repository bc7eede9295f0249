"""Demonstrations, preferences and prompts: the shapes of their rows, and how some rows are set apart.

The shapes are those that users of TRL know; where rows come from and how fields are read is in ``trainer.rows``:

========================================  ==================================================================
fields                                    read as
========================================  ==================================================================
prompt, completion                        a demonstration
messages                                  a demonstration: the last message, of the assistant, is the response
instruction, (input), output              a demonstration: the first two make one message of the user
text                                      a demonstration without a prompt
prompt, chosen, rejected                  a preference; as a demonstration, its chosen answer
instruction, (input), chosen, rejected    the same
chosen, rejected                          a preference without a prompt; of two conversations, the shared
                                          beginning is the prompt
prompt, completion, label                 a judged answer: good where the label is true, bad where it is false
the shapes of a preference                two judged answers: the chosen one good, the rejected one bad
prompt; instruction, (input); messages    a prompt
the shapes of a preference                its prompt
========================================  ==================================================================

A prompt is text or a list of chat messages. Fields besides these are left alone. All rows of a source have one shape.
Nothing is dropped: the first row that doesn't fit stops the run, with its file, line and field.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from quartet.fingerprint import derive_seed
from trainer.errors import DataError
from trainer.rows import (
    Fields,
    Message,
    Prompt,
    Row,
    RowT,
    has,
    kind_of,
    load_rows,
    no_shape,
    not_empty,
    present,
    read_answer,
    read_instruction,
    read_messages,
    read_prompt,
    read_prompt_if_any,
    read_text,
)


@dataclass(frozen=True, kw_only=True)
class PromptRow(Row):
    """A prompt to answer."""


@dataclass(frozen=True, kw_only=True)
class Demonstration(Row):
    """A prompt and the answer to learn."""

    completion: str

    @property
    def group_key(self) -> str:
        return super().group_key or self.completion


@dataclass(frozen=True, kw_only=True)
class JudgedAnswer(Demonstration):
    """A prompt and an answer that was judged by itself."""

    desirable: bool


@dataclass(frozen=True, kw_only=True)
class Preference(Row):
    """A prompt and two answers, of which the first was preferred."""

    chosen: str
    rejected: str

    @property
    def group_key(self) -> str:
        # Without a prompt nothing but the texts themselves tells rows apart; whichever of the two was preferred.
        return super().group_key or json.dumps(sorted([self.chosen, self.rejected]))


def load_demonstrations(sources: Sequence[str], *, split_by: str | None = None) -> list[Demonstration]:
    """The demonstrations of all ``sources``, in order.

    Args:
        sources: files or hub names.
        split_by: name of the field whose value is the row's group.

    Raises:
        DataError: a source can't be read or has no row, or a row doesn't fit; with file, line and field.
    """
    return load_rows(sources, _demonstration, split_by, ("completion", "messages", "chosen", "instruction", "text"))


def load_preferences(sources: Sequence[str], *, split_by: str | None = None) -> list[Preference]:
    """The preferences of all ``sources``; arguments and errors as ``load_demonstrations`` has them."""
    return load_rows(sources, read_preference, split_by, ("chosen",))


def load_judged(sources: Sequence[str], *, split_by: str | None = None) -> list[JudgedAnswer]:
    """The judged answers of all ``sources``, two of a preference; arguments and errors as ``load_demonstrations``."""
    judged = []
    for row in load_rows(sources, _judged, split_by, ("chosen", "completion")):
        if isinstance(row, JudgedAnswer):
            judged.append(row)
            continue
        for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
            where, good = f"{row.where} ({name})", name == "chosen"
            judged.append(
                JudgedAnswer(prompt=row.prompt, completion=answer, desirable=good, where=where, group=row.group)
            )
    return judged


def load_prompts(sources: Sequence[str], *, split_by: str | None = None) -> list[PromptRow]:
    """The prompts of all ``sources``; arguments and errors as ``load_demonstrations`` has them."""
    return load_rows(sources, _prompt_row, split_by, ("chosen", "prompt", "messages", "instruction"))


def split_held_out(rows: Sequence[RowT], fraction: float, *, seed: int) -> tuple[list[RowT], list[RowT]]:
    """Sets about ``fraction`` of the rows apart so that no group, by default no prompt, stands on both sides.

    Which groups are held out depends on ``seed`` and their keys alone: not on the order of rows, nor, but for the
    last ones, on which other rows there are.

    Returns:
        Training rows and held-out rows, each in the order given.

    Raises:
        DataError: one of the two sides would be empty.
    """
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.group_key] = sizes.get(row.group_key, 0) + 1
    wanted = round(fraction * len(rows))
    named = ", ".join(dict.fromkeys(row.where.rpartition(", ")[0] for row in rows if row.where))
    held_out: set[str] = set()
    held_rows = 0
    for key in sorted(sizes, key=lambda key: derive_seed("held-out", seed, key)):
        if held_rows >= wanted:
            break
        held_out.add(key)
        held_rows += sizes[key]
    if wanted > 0 and (held_rows == 0 or held_rows == len(rows)):
        raise DataError(
            f"{named or 'the data'}: {len(rows)} rows of {len(sizes)} groups (prompts, or values of --split-by) can't "
            f"be split: a held-out fraction of {fraction:g} leaves one side empty; name held-out rows in a file of "
            "their own, or bring more"
        )
    train = [row for row in rows if row.group_key not in held_out]
    return train, [row for row in rows if row.group_key in held_out]


def shared_groups(train: Sequence[Row], held_out: Sequence[Row]) -> int:
    """How many held-out rows share their group (by default their prompt) with a training row."""
    seen = {row.group_key for row in train}
    return sum(row.group_key in seen for row in held_out)


# Shapes ------------------------------------------------------------------------------------------------------------


def _demonstration(fields: Fields, where: str) -> Demonstration:
    if has(fields, "completion") or (has(fields, "prompt") and not has(fields, "chosen")):
        prompt = read_prompt(fields, where)
        completion = read_answer(present(fields, "completion", where, "the answer"), "completion", where)
        return Demonstration(prompt=prompt, completion=completion, where=where)
    if has(fields, "messages"):
        messages = read_messages(fields["messages"], "messages", where)
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: field 'messages' must end with the assistant's, ends with {messages[-1]['role']}'s"
            )
        not_empty(messages[-1]["content"], "messages", where)
        return Demonstration(prompt=messages[:-1] or "", completion=messages[-1]["content"], where=where)
    if has(fields, "chosen"):
        preference = read_preference(fields, where)
        return Demonstration(prompt=preference.prompt, completion=preference.chosen, where=where)
    if has(fields, "instruction"):
        prompt = read_instruction(fields, where)
        output = read_answer(present(fields, "output", where, "the answer"), "output", where)
        return Demonstration(prompt=prompt, completion=output, where=where)
    if has(fields, "text"):
        return Demonstration(prompt="", completion=read_text(fields, "text", where), where=where)
    raise no_shape(
        fields, where, "a demonstration needs prompt and completion, messages, instruction and output, or text"
    )


def read_preference(fields: Fields, where: str) -> Preference:
    """The preference in a row that stands at ``where``.

    Raises:
        DataError: there is none, or a field of it is wrong.
    """
    needs = "a preference needs chosen and rejected, and may have prompt or instruction"
    if not has(fields, "chosen") and not has(fields, "rejected"):
        raise no_shape(fields, where, needs)
    chosen, rejected = (present(fields, name, where, needs) for name in ("chosen", "rejected"))
    prompt = read_prompt_if_any(fields, where)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return Preference(
            prompt=prompt,
            chosen=not_empty(chosen, "chosen", where),
            rejected=not_empty(rejected, "rejected", where),
            where=where,
        )
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list):
            raise DataError(f"{where}: field {name!r} must be text or a list of messages, is {kind_of(value)}")
    if isinstance(chosen, str) or isinstance(rejected, str):
        text, talk = ("chosen", "rejected") if isinstance(chosen, str) else ("rejected", "chosen")
        raise DataError(f"{where}: field {text!r} is text and {talk!r} a list of messages: write both in one way")
    return _preferred_conversation(prompt, chosen, rejected, where)


def _judged(fields: Fields, where: str) -> JudgedAnswer | Preference:
    row: JudgedAnswer | Preference
    if has(fields, "chosen") or has(fields, "rejected"):
        row = read_preference(fields, where)
    elif has(fields, "completion") or has(fields, "label"):
        needs = "a judged answer needs prompt, completion and label"
        completion = read_answer(present(fields, "completion", where, needs), "completion", where)
        label = present(fields, "label", where, needs)
        if not isinstance(label, bool):
            raise DataError(f"{where}: field 'label' must be true or false, is {kind_of(label)}")
        prompt = read_prompt_if_any(fields, where)
        row = JudgedAnswer(prompt=prompt, completion=completion, desirable=label, where=where)
    else:
        raise no_shape(fields, where, "a judged answer needs prompt, completion and label, or chosen and rejected")
    if not row.prompt:
        raise DataError(
            f"{where}: field 'prompt' is missing or empty: KTO measures how far the policy has gone by answers to "
            "other prompts"
        )
    return row


def _preferred_conversation(prompt: Prompt, chosen: object, rejected: object, where: str) -> Preference:
    """Two lists of messages that differ in their last, the assistant's. Given whole, they may repeat the prompt."""
    conversations = []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        messages = read_messages(value, name, where)
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: field {name!r} must end with the assistant's message, ends with {messages[-1]['role']}'s"
            )
        not_empty(messages[-1]["content"], name, where)
        conversations.append(messages)
    before_chosen, before_rejected = (messages[:-1] for messages in conversations)
    if before_chosen != before_rejected:
        raise DataError(
            f"{where}: fields 'chosen' and 'rejected' differ before their last message: such answers can't be compared"
        )
    if isinstance(prompt, str):
        # A prompt in words stands for the user's message, which whole conversations repeat.
        opening: list[Message] = [] if before_chosen or not prompt else [{"role": "user", "content": prompt}]
    else:
        opening = [] if before_chosen[: len(prompt)] == prompt else prompt
    return Preference(
        prompt=opening + before_chosen or "",
        chosen=conversations[0][-1]["content"],
        rejected=conversations[1][-1]["content"],
        where=where,
    )


def _prompt_row(fields: Fields, where: str) -> PromptRow:
    if has(fields, "chosen") and has(fields, "rejected"):
        # Read as the reward model's training reads it, so that both mean the same prompt.
        preference = read_preference(fields, where)
        if not preference.prompt:
            raise DataError(
                f"{where}: field 'prompt' is missing or empty, and 'chosen' and 'rejected' do not begin with the "
                "same messages: there is nothing to answer"
            )
        return PromptRow(prompt=preference.prompt, where=where)
    if has(fields, "prompt"):
        prompt = read_prompt(fields, where)
        if not (prompt if isinstance(prompt, list) else prompt.strip()):
            raise DataError(f"{where}: field 'prompt' is empty: there is nothing to answer; take the row out")
        return PromptRow(prompt=_asked(prompt, "prompt", where), where=where)
    if has(fields, "messages"):
        messages = read_messages(fields["messages"], "messages", where)
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not asked:
            raise DataError(f"{where}: field 'messages' holds only the assistant's: there is nothing to answer")
        return PromptRow(prompt=_asked(asked, "messages", where), where=where)
    if has(fields, "instruction"):
        return PromptRow(prompt=read_instruction(fields, where), where=where)
    raise no_shape(fields, where, "a prompt needs prompt, instruction, messages, or chosen and rejected")


def _asked(prompt: Prompt, name: str, where: str) -> Prompt:
    """The prompt, whose last message, if it is one of messages, says something."""
    if not isinstance(prompt, str) and not prompt[-1]["content"].strip():
        raise DataError(f"{where}: field {name!r}, message {len(prompt)} is empty: there is nothing to answer")
    return prompt
