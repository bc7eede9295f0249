"""What the trainer asks of every service that it calls, and how it says that one does not fit or is too slow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from quartet.client import ModelInfo
from quartet.client.errors import DeadlineError
from trainer.errors import ServicesError


def require_same_tokenizer(service: str, info: ModelInfo, fingerprint: str) -> None:
    """
    Args:
        service: "policy" or "reference".
        info: of what it hosts.
        fingerprint: of the trainer's own tokenizer.

    Raises:
        ServicesError: the two are not the same.
    """
    if info.served_by.tokenizer_fingerprint != fingerprint:
        raise ServicesError(
            f"the {service} service hosts {info.served_by.model_id!r}, whose tokenizer is another one than that of "
            "--model: token ids would mean something else there; start it with a model of that tokenizer"
        )


@contextlib.contextmanager
def deadline_explained(call_deadline_s: float) -> Iterator[None]:
    """
    Raises:
        ServicesError: a call within took longer than --call-deadline-s; says what to do.
    """
    try:
        yield
    except DeadlineError as error:
        raise ServicesError(
            f"{error}: one call took longer than --call-deadline-s, which is {call_deadline_s:g}; raise it, or give "
            "the service more capacity"
        ) from error
