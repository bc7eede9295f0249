"""JSON as rows are read: what a lenient reader takes and changes in silence is an error here, which says what to do."""

from __future__ import annotations

import json
from typing import Any


class BadJsonError(ValueError):
    """Bytes are no JSON; ``line``, from 1, is where."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.line = line


class _Doubled(dict[str, Any]):
    """An object in which a field stands twice; of such a field a dictionary keeps the last."""

    field: str


def read_json(content: bytes) -> Any:
    """One JSON value in UTF-8, with or without a byte order mark.

    Raises:
        BadJsonError: it is none.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        bad, line = error.object[error.start], error.object.count(b"\n", 0, error.start) + 1
        raise BadJsonError(f"not UTF-8 text ({error.reason}, 0x{bad:02x}): save the file as UTF-8", line) from error
    except json.JSONDecodeError as error:
        raise BadJsonError(f"not valid JSON: {error.msg} at column {error.colno}", error.lineno) from error
    except (ValueError, RecursionError) as error:  # A number of thousands of digits; thousands of brackets.
        raise BadJsonError(f"not valid JSON: {error}", 1) from error


def objection(value: Any) -> str | None:
    """What of a value of ``read_json`` would be lost or could not be written again, and what to do; None: nothing."""
    if isinstance(value, str):
        return None if value.isascii() else _unpaired(value)
    if isinstance(value, _Doubled):
        return f"field {value.field!r} stands twice in one object: leave one of them"
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for part in parts if (found := objection(part)) is not None), None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    doubled = _Doubled(found)
    names = [name for name, _ in pairs]
    doubled.field = next(name for name in names if names.count(name) > 1)
    return doubled


def _unpaired(text: str) -> str | None:
    """JSON may write half of a character (``\\ud83d``), which is no text: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        return (
            f"half of a surrogate pair, \\u{ord(half):04x}, stands in {text[:40]!r}: it is no character; mend the text"
        )
    return None
