"""Where rows come from, and how their fields are read and refused, whatever shape they have.

A source is a JSON Lines, JSON or Parquet file, or the name of a data set on the Hugging Face hub (``name`` or
``name:split``). All rows of a source have one shape. Nothing is dropped: the first row that doesn't fit stops the run,
with its file, line and field. The shapes are in ``trainer.data`` and ``trainer.comparisons``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import DataError
from trainer.strict_json import BadJsonError, objection, read_json

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


RowT = TypeVar("RowT", bound=Row)


# Reading -----------------------------------------------------------------------------------------------------------


def load_rows(
    sources: Sequence[str], parse: Callable[[Fields, str], RowT], split_by: str | None, told_by: Sequence[str] = ()
) -> list[RowT]:
    """The rows of all ``sources``, in order.

    Args:
        sources: files or hub names.
        parse: makes a row of its fields and of where it stands; raises DataError where it doesn't fit.
        split_by: name of the field whose value is the row's group; None: it has none of its own.
        told_by: the fields that tell the shapes of these rows apart, in the order in which ``parse`` looks for them.

    Raises:
        DataError: a source can't be read or has no row, or a row doesn't fit; with file, line and field.
    """
    rows: list[RowT] = []
    for source in sources:
        before = len(rows)
        first: tuple[str, str] | None = None
        for where, fields in read_rows(source):
            row = parse(fields, where)
            shape = _shape(fields, told_by)
            first = first or (where, shape)
            if shape != first[1]:
                raise DataError(
                    f"{where}: this row has {shape}, {first[0].removeprefix(f'{source}, ')} has {first[1]}: all rows "
                    "of a file have one shape; mend it, or put the others into a file of their own"
                )
            if split_by is not None:
                value = present(fields, split_by, where, "the field named by --split-by")
                row = _with_group(row, json.dumps(value, sort_keys=True))
            rows.append(row)
        if len(rows) == before:
            raise DataError(f"{source}: holds no rows")
    if not rows:
        raise DataError("no data was named")
    return rows


def _shape(fields: Fields, told_by: Sequence[str]) -> str:
    """By which fields a row is read, and whether they are text: what all rows of a source have in common."""
    own = next((name for name in told_by if has(fields, name)), None)
    if own is None:
        return ""
    # A conversation, a document, an instruction and a prompt alone have nothing before them.
    opened = own not in ("messages", "text", "instruction", "prompt")
    opening = next((name for name in ("prompt", "instruction") if opened and has(fields, name)), None)
    names = [own] if opening is None else [opening, own]
    return " and ".join(f"{name!r}{'' if isinstance(fields[name], str) else ' as a list'}" for name in names)


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
        content = read_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    except BadJsonError as error:
        raise DataError(f"{path}, line {error.line}: {error} (one object a line? then name it .jsonl)") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: must hold a JSON array of objects, is a {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        where = f"{path}, row {number}"
        yield where, _require_object(where, row, "")


def _object(where: str, line: bytes) -> tuple[str, dict[str, Any]]:
    array = " (an array of objects? then name the file .json)" if line.lstrip().startswith(b"[") else ""
    try:
        row = read_json(line.rstrip(b"\r\n"))
    except BadJsonError as error:
        hint = array or " (each line holds one whole object)"
        raise DataError(f"{where}: {error}{hint if 'UTF-8' not in str(error) else ''}") from error
    return where, _require_object(where, row, array)


def _require_object(where: str, row: object, hint: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object, is a {type(row).__name__}{hint}")
    if (problem := objection(row)) is not None:
        raise DataError(f"{where}: {problem}")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if doubled := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path}: column {doubled[0]!r} stands twice: leave one of them")
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in _rows_of_batch(batch, str(path), number):
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _rows_of_batch(batch: Any, path: str, before: int) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        # Whoever wrote the file need not have looked at the bytes of its texts: which ones are they?
        for number in range(len(batch)):
            for name in batch.schema.names:
                try:
                    batch.column(name)[number].as_py()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, row {before + number + 1}: field {name!r} is not UTF-8 text ({error.reason}): write "
                        "the column anew from text"
                    ) from error
        raise


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


# Fields ------------------------------------------------------------------------------------------------------------


def has(fields: Fields, name: str) -> bool:
    """Whether a row has the field ``name``."""
    # Parquet and the hub write null for what a row doesn't have.
    return fields.get(name) is not None


def present(fields: Fields, name: str, where: str, needs: str) -> Any:
    """The value of the field ``name``.

    Raises:
        DataError: the row does not have it; ``needs`` says what it is wanted for.
    """
    if not has(fields, name):
        raise DataError(f"{where}: field {name!r} is missing ({needs}); the row has {_names(fields)}")
    return fields[name]


def no_shape(fields: Fields, where: str, needs: str) -> DataError:
    """The error of a row that has none of the shapes which ``needs`` tells."""
    return DataError(f"{where}: {needs}; the row has {_names(fields)}")


def _names(fields: Fields) -> str:
    return ", ".join(repr(name) for name in fields if has(fields, name)) or "no fields"


def read_text(fields: Fields, name: str, where: str) -> str:
    """The text in the field ``name``, which must not be empty."""
    value = present(fields, name, where, "it must be text")
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} must be text, is {kind_of(value)}")
    return not_empty(value, name, where)


def not_empty(text: str, name: str, where: str) -> str:
    """``text``, of the field ``name``, unless there is nothing but spaces in it: then DataError."""
    if not text.strip():
        raise DataError(f"{where}: field {name!r} is empty: write what it should hold, or take the row out")
    return text


def read_prompt(fields: Fields, where: str) -> Prompt:
    """The field ``prompt``: text, which may be empty, or messages."""
    value = present(fields, "prompt", where, "it must be text or messages")
    if isinstance(value, str):
        return value
    return read_messages(value, "prompt", where)


def read_prompt_if_any(fields: Fields, where: str) -> Prompt:
    """The prompt of a row that has ``prompt``, ``instruction``, or none: then it is ""."""
    if has(fields, "prompt"):
        return read_prompt(fields, where)
    return read_instruction(fields, where) if has(fields, "instruction") else ""


def read_answer(value: object, name: str, where: str) -> str:
    """The answer in the field ``name``: text, or a list of one message of the assistant."""
    if isinstance(value, str):
        return not_empty(value, name, where)
    messages = read_messages(value, name, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"{where}: field {name!r} must be text or one message of the assistant")
    return not_empty(messages[0]["content"], name, where)


def read_instruction(fields: Fields, where: str) -> list[Message]:
    """``instruction`` and ``input`` as one message of the user."""
    instruction = read_text(fields, "instruction", where)
    details = fields.get("input")
    if details is not None and not isinstance(details, str):
        raise DataError(f"{where}: field 'input' must be text, is {kind_of(details)}")
    return [{"role": "user", "content": f"{instruction}\n\n{details}" if details else instruction}]


def read_messages(value: object, name: str, where: str) -> list[Message]:
    """The messages in the field ``name``, at least one, each with its role and content alone."""
    if not isinstance(value, list):
        raise DataError(f"{where}: field {name!r} must be text or a list of messages, is {kind_of(value)}")
    if not value:
        raise DataError(f"{where}: field {name!r} is empty")
    messages = []
    for number, message in enumerate(value, start=1):
        part = f"{where}: field {name!r}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{part}: must be an object with 'role' and 'content', is {kind_of(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{part}: field {key!r} must be text, is {kind_of(message.get(key))}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def kind_of(value: object) -> str:
    """What a wrong ``value`` is, for messages: its type, and how it begins."""
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
