"""Structured logs: one event a line, with units in its keys, on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from services.runtime import tracebacks

Event = MutableMapping[str, Any]


def configure_logging(level: str, log_format: str) -> None:
    """Logs of our own events, and of warnings of the libraries below, in one form: JSON objects or, for people, text.

    Exceptions lose messages that may quote a request, unless ``level`` is debug.
    """
    console = sys.stderr.isatty() if log_format == "auto" else log_format == "console"
    number = getattr(logging, level.upper())

    def stack(_: Any, __: str, event: Event) -> Event:
        """``exc_info`` as text, without what people wrote."""
        given = event.pop("exc_info", None)
        if given is True:
            given = sys.exc_info()
        error = given[1] if isinstance(given, tuple) else given
        if isinstance(error, BaseException):
            event["exception"] = tracebacks.render(error, messages=number <= logging.DEBUG)
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        stack,
    ]
    renderer = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            keep_exc_info=True,
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[libraries], force=True)
