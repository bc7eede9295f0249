"""Rows of training data: reading them, checking them, setting some of them apart.

A source is a JSON Lines, JSON or Parquet file, or the name of a data set on the Hugging Face hub (``name`` or
``name:split``). The shapes are those that users of TRL know:

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
prompt; instruction, (input); messages    a prompt
the shapes of a preference                its prompt
========================================  ==================================================================

A prompt is text or a list of chat messages. Fields besides these are left alone. Nothing is dropped: the first row
that doesn't fit stops the run, with its file, line and field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from quartet.fingerprint import derive_seed
from trainer.errors import DataError

Message = dict[str, str]
Prompt = str | list[Message]
Fields = Mapping[str, Any]

_JSON_LINES = (".jsonl", ".ndjson")
_SUFFIXES = (*_JSON_LINES, ".json", ".parquet")
_DEFAULT_SPLIT = "train"
_TEXT_FIELDS = (
    *("prompt", "completion", "messages", "instruction", "input", "output", "text", "chosen", "rejected"),
    *("first", "second", "ranking", "answers"),  # Those of ``trainer.comparisons``.
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every kind of row has. ``prompt`` is "" where the source has none."""

    prompt: Prompt
    where: str = field(default="", compare=False)
    """File and line, for messages."""
    group: str | None = field(default=None, compare=False)
    """Rows of one group never stand on both sides of a split; None: rows of one prompt are a group."""

    @property
    def group_key(self) -> str:
        """What must not stand on both sides of a split."""
        if self.group is not None:
            return self.group
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, sort_keys=True)


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
class Preference(Row):
    """A prompt and two answers, of which the first was preferred."""

    chosen: str
    rejected: str

    @property
    def group_key(self) -> str:
        # Without a prompt nothing but the texts themselves tells rows apart; whichever of the two was preferred.
        return super().group_key or json.dumps(sorted([self.chosen, self.rejected]))


RowT = TypeVar("RowT", bound=Row)


def load_demonstrations(sources: Sequence[str], *, split_by: str | None = None) -> list[Demonstration]:
    """The demonstrations of all ``sources``, in order.

    Args:
        sources: files or hub names.
        split_by: name of the field whose value is the row's group.

    Raises:
        DataError: a source can't be read or has no row, or a row doesn't fit; with file, line and field.
    """
    return _load(sources, _demonstration, split_by)


def load_preferences(sources: Sequence[str], *, split_by: str | None = None) -> list[Preference]:
    """The preferences of all ``sources``; arguments and errors as ``load_demonstrations`` has them."""
    return _load(sources, _preference, split_by)


def load_prompts(sources: Sequence[str], *, split_by: str | None = None) -> list[PromptRow]:
    """The prompts of all ``sources``; arguments and errors as ``load_demonstrations`` has them."""
    return _load(sources, _prompt_row, split_by)


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
    held_out: set[str] = set()
    held_rows = 0
    for key in sorted(sizes, key=lambda key: derive_seed("held-out", seed, key)):
        if held_rows >= wanted:
            break
        held_out.add(key)
        held_rows += sizes[key]
    if wanted > 0 and (held_rows == 0 or held_rows == len(rows)):
        raise DataError(
            f"{len(rows)} rows of {len(sizes)} groups (prompts, or values of --split-by) can't be split: a held-out "
            f"fraction of {fraction} leaves one side empty"
        )
    train = [row for row in rows if row.group_key not in held_out]
    return train, [row for row in rows if row.group_key in held_out]


def shared_groups(train: Sequence[Row], held_out: Sequence[Row]) -> int:
    """How many held-out rows share their group (by default their prompt) with a training row."""
    seen = {row.group_key for row in train}
    return sum(row.group_key in seen for row in held_out)


# Reading -----------------------------------------------------------------------------------------------------------


def _load(sources: Sequence[str], parse: Callable[[Fields, str], RowT], split_by: str | None) -> list[RowT]:
    rows: list[RowT] = []
    for source in sources:
        before = len(rows)
        for where, fields in read_rows(source):
            row = parse(fields, where)
            if split_by is not None:
                value = _present(fields, split_by, where, "the field named by --split-by")
                row = _with_group(row, json.dumps(value, sort_keys=True))
            rows.append(row)
        if len(rows) == before:
            raise DataError(f"{source}: holds no rows")
    if not rows:
        raise DataError("no data was named")
    return rows


def _with_group(row: RowT, group: str) -> RowT:
    return type(row)(**(row.__dict__ | {"group": group}))


def read_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file or hub name, each with where it stands.

    Raises:
        DataError: there is no such file or data set, its kind is not known, or a line is not a JSON object.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{source}: is a folder; name the file in it")
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"{source}: files must end in one of {', '.join(_SUFFIXES)}")
        return _read_parquet(path) if path.suffix == ".parquet" else _read_json(path)
    if path.suffix in _SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"{source}: there is no such file")
    return _read_hub(source)


def row_texts(fields: Fields) -> Iterator[str]:
    """All texts in the fields that some shape reads, messages included: what a tokenizer is trained on."""
    for name in _TEXT_FIELDS:
        value = fields.get(name)
        for part in value if isinstance(value, list) else [value]:
            text = part.get("content") if isinstance(part, dict) else part
            if isinstance(text, str) and text:
                yield text


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Read here rather than by ``datasets``, which forgets line numbers and fills missing fields with null.
    try:
        if path.suffix in _JSON_LINES:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _object(f"{path}, line {number}", line)
            return
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error} (one object a line? then name it .jsonl)") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: must hold a JSON array of objects, is a {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: must be a JSON object, is a {type(row).__name__}")
        yield where, row


def _object(where: str, line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # UnicodeDecodeError is one, too.
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object, is a {type(row).__name__}")
    return where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _read_hub(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name, _, split = source.partition(":")
    split = split or _DEFAULT_SPLIT
    try:
        dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source}: there is no such file, and the hub gave: {reason}") from error
    for number, row in enumerate(dataset, start=1):
        yield f"{name}:{split}, row {number}", dict(row)


# Shapes ------------------------------------------------------------------------------------------------------------


def _demonstration(fields: Fields, where: str) -> Demonstration:
    if _has(fields, "completion") or (_has(fields, "prompt") and not _has(fields, "chosen")):
        prompt = _prompt(fields, where)
        return Demonstration(prompt=prompt, completion=_response(fields, "completion", where), where=where)
    if _has(fields, "messages"):
        messages = _messages(fields["messages"], "messages", where)
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: field 'messages' must end with the assistant's, ends with {messages[-1]['role']}'s"
            )
        _not_empty(messages[-1]["content"], "messages", where)
        return Demonstration(prompt=messages[:-1] or "", completion=messages[-1]["content"], where=where)
    if _has(fields, "chosen"):
        preference = _preference(fields, where)
        return Demonstration(prompt=preference.prompt, completion=preference.chosen, where=where)
    if _has(fields, "instruction"):
        return Demonstration(
            prompt=_instruction(fields, where), completion=_response(fields, "output", where), where=where
        )
    if _has(fields, "text"):
        return Demonstration(prompt="", completion=_text(fields, "text", where), where=where)
    raise _no_shape(
        fields, where, "a demonstration needs prompt and completion, messages, instruction and output, or text"
    )


def _preference(fields: Fields, where: str) -> Preference:
    needs = "a preference needs chosen and rejected, and may have prompt or instruction"
    if not _has(fields, "chosen") and not _has(fields, "rejected"):
        raise _no_shape(fields, where, needs)
    chosen, rejected = (_present(fields, name, where, needs) for name in ("chosen", "rejected"))
    prompt: Prompt = ""
    if _has(fields, "prompt"):
        prompt = _prompt(fields, where)
    elif _has(fields, "instruction"):
        prompt = _instruction(fields, where)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return Preference(
            prompt=prompt,
            chosen=_not_empty(chosen, "chosen", where),
            rejected=_not_empty(rejected, "rejected", where),
            where=where,
        )
    return _preferred_conversation(prompt, chosen, rejected, where)


def _preferred_conversation(prompt: Prompt, chosen: object, rejected: object, where: str) -> Preference:
    """Two lists of messages that differ in their last, the assistant's. Given whole, they may repeat the prompt."""
    conversations = []
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        messages = _messages(value, name, where)
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: field {name!r} must end with the assistant's message, ends with {messages[-1]['role']}'s"
            )
        _not_empty(messages[-1]["content"], name, where)
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
    if _has(fields, "chosen") and _has(fields, "rejected"):
        # Read as the reward model's training reads it, so that both mean the same prompt.
        preference = _preference(fields, where)
        if not preference.prompt:
            raise DataError(
                f"{where}: field 'prompt' is missing or empty, and 'chosen' and 'rejected' do not begin with the "
                "same messages: there is nothing to answer"
            )
        return PromptRow(prompt=preference.prompt, where=where)
    if _has(fields, "prompt"):
        prompt = _prompt(fields, where)
        if not prompt:
            raise DataError(f"{where}: field 'prompt' is empty: there is nothing to answer")
        return PromptRow(prompt=prompt, where=where)
    if _has(fields, "messages"):
        messages = _messages(fields["messages"], "messages", where)
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not asked:
            raise DataError(f"{where}: field 'messages' holds only the assistant's: there is nothing to answer")
        return PromptRow(prompt=asked, where=where)
    if _has(fields, "instruction"):
        return PromptRow(prompt=_instruction(fields, where), where=where)
    raise _no_shape(fields, where, "a prompt needs prompt, instruction, messages, or chosen and rejected")


# Fields ------------------------------------------------------------------------------------------------------------


def _has(fields: Fields, name: str) -> bool:
    # Parquet and the hub write null for what a row doesn't have.
    return fields.get(name) is not None


def _present(fields: Fields, name: str, where: str, needs: str) -> Any:
    if not _has(fields, name):
        raise DataError(f"{where}: field {name!r} is missing ({needs}); the row has {_names(fields)}")
    return fields[name]


def _no_shape(fields: Fields, where: str, needs: str) -> DataError:
    return DataError(f"{where}: {needs}; the row has {_names(fields)}")


def _names(fields: Fields) -> str:
    return ", ".join(repr(name) for name in fields if _has(fields, name)) or "no fields"


def _text(fields: Fields, name: str, where: str) -> str:
    value = _present(fields, name, where, "it must be text")
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} must be text, is {_kind(value)}")
    return _not_empty(value, name, where)


def _not_empty(text: str, name: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: field {name!r} is empty")
    return text


def _prompt(fields: Fields, where: str) -> Prompt:
    value = _present(fields, "prompt", where, "it must be text or messages")
    if isinstance(value, str):
        return value
    return _messages(value, "prompt", where)


def _response(fields: Fields, name: str, where: str) -> str:
    """Text, or a list of one message of the assistant."""
    value = _present(fields, name, where, "the answer")
    if isinstance(value, str):
        return _not_empty(value, name, where)
    messages = _messages(value, name, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"{where}: field {name!r} must be text or one message of the assistant")
    return _not_empty(messages[0]["content"], name, where)


def _instruction(fields: Fields, where: str) -> list[Message]:
    instruction = _text(fields, "instruction", where)
    details = fields.get("input")
    if details is not None and not isinstance(details, str):
        raise DataError(f"{where}: field 'input' must be text, is {_kind(details)}")
    return [{"role": "user", "content": f"{instruction}\n\n{details}" if details else instruction}]


def _messages(value: object, name: str, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise DataError(f"{where}: field {name!r} must be text or a list of messages, is {_kind(value)}")
    if not value:
        raise DataError(f"{where}: field {name!r} is empty")
    messages = []
    for number, message in enumerate(value, start=1):
        part = f"{where}: field {name!r}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{part}: must be an object with 'role' and 'content', is {_kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{part}: field {key!r} must be text, is {_kind(message.get(key))}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _kind(value: object) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
