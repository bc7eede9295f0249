"""From a caller's arguments to protobuf: what does not fit the wire is refused by field, value and bound."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from quartet.client.errors import InvalidInputError

P = ParamSpec("P")
M = TypeVar("M", bound=Message)
V = TypeVar("V")

_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: f"an integer from {-(2**31)} to {2**31 - 1}",
    FieldDescriptor.CPPTYPE_INT64: f"an integer from {-(2**63)} to {2**63 - 1}",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "text that UTF-8 can encode",
}


def message(where: str, kind: Callable[P, M], /, *unnamed: P.args, **fields: P.kwargs) -> M:
    """``kind(**fields)``.

    ``where``: the argument that all fields together hold, such as "items[3].response"; empty, or with a dot at its end,
    it is what the name of each field follows: "sampling." makes "sampling.top_k".

    Raises:
        InvalidInputError: a value does not fit its field.
    """
    try:
        return kind(*unnamed, **fields)
    except (TypeError, ValueError, OverflowError) as error:
        # Only now is it worth to look at single values: there may be hundreds of thousands.
        for name, value in fields.items():
            _require_fits(where, cast(type[Message], kind), name, value)
        raise InvalidInputError(f"{where or 'the request'} cannot be sent: {error}", field=where.rstrip(".")) from error


def choice(name: str, value: object, choices: Mapping[Any, V]) -> V:
    """What ``value`` stands for.

    Raises:
        InvalidInputError: it is none of the choices.
    """
    try:
        return choices[value]
    except (KeyError, TypeError):  # A list, say, cannot even be looked up.
        known = ", ".join(map(str, choices))
        raise InvalidInputError(f"{name} is {_short(value)}, must be one of {known}", field=name) from None


def _require_fits(where: str, kind: type[Message], name: str, value: Any) -> None:
    if _fits(kind, name, value):
        return
    descriptor = kind.DESCRIPTOR.fields_by_name[name]
    argument = where + name if not where or where.endswith(".") else where
    if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
        key_field, value_field = (descriptor.message_type.fields_by_name[part] for part in ("key", "value"))
        for key, held in value.items() if isinstance(value, Mapping) else ():
            if not _fits(kind, name, {key: value_field.default_value}):
                raise _refusal(argument, f"a key of {argument}", key, key_field.cpp_type)
            if not _fits(kind, name, {key: held}):
                raise _refusal(argument, f"{argument}[{_short(key)}]", held, value_field.cpp_type)
        raise InvalidInputError(f"{argument} is {_short(value)}, must be a mapping", field=argument)
    if descriptor.is_repeated:
        try:
            held_values = list(value)
        except TypeError:
            raise InvalidInputError(f"{argument} is {_short(value)}, must be a sequence", field=argument) from None
        for index, held in enumerate(held_values):
            if not _fits(kind, name, [held]):
                raise _refusal(argument, f"{argument}[{index}]", held, descriptor.cpp_type)
    raise _refusal(argument, argument, value, descriptor.cpp_type)


def _fits(kind: type[Message], name: str, value: Any) -> bool:
    try:
        kind(**{name: value})
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _refusal(argument: str, subject: str, value: object, cpp_type: int) -> InvalidInputError:
    bound = _BOUNDS.get(cpp_type, "another value")
    if isinstance(value, str) and cpp_type == FieldDescriptor.CPPTYPE_STRING:
        # Which of thousands of characters it is helps more than the text, which may be private.
        at = next(i for i, character in enumerate(value) if "\ud800" <= character <= "\udfff")
        return InvalidInputError(f"{subject} has {value[at]!r} at {at}, must be {bound}", field=argument)
    return InvalidInputError(f"{subject} is {_short(value)}, must be {bound}", field=argument)


def _short(value: object) -> str:
    return reprlib.repr(value)
