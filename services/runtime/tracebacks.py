"""Exceptions for the log: type and stack, and no message that may quote somebody's text."""

from __future__ import annotations

import sys
import threading
import traceback

from services.runtime.errors import ServiceError, StartError

# Their messages tell of files, memory and settings. A KeyError or ValueError quotes what it was given.
_TALK_OF_THE_MACHINE = (OSError, MemoryError, ServiceError, StartError)
_WITHHELD = "(message withheld, it may quote a request; --log-level debug shows it)"


def render(error: BaseException, *, messages: bool = False) -> str:
    """Stacks of ``error`` and of what caused it, causes first, without the values of variables.

    ``messages``: all messages, too; else only of exceptions that tell of the machine, torch's among them.
    """
    parts: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        stack = "".join(traceback.format_tb(link.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{stack}{_last_line(link, messages)}")
        link = link.__cause__ if link.__cause__ is not None or link.__suppress_context__ else link.__context__
    return "\n\nwhich led to:\n\n".join(reversed(parts))


def stack_of(thread: threading.Thread) -> str:
    """Where ``thread`` is now, without the values of variables; empty where it has ended."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "" if frame is None else "".join(traceback.format_stack(frame))


def _last_line(error: BaseException, messages: bool) -> str:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    quotes = isinstance(error, ServiceError) and error.may_quote
    if (
        messages
        or (isinstance(error, _TALK_OF_THE_MACHINE) and not quotes)
        or kind.__module__.partition(".")[0] == "torch"
    ):
        return f"{name}: {error}"
    return f"{name} {_WITHHELD}" if str(error) else name
