"""The call that is being answered: who asked, under which request id, and what it came to.

gRPC runs every call in a task of its own, so what is set here at its beginning is seen by all that runs on its behalf,
tasks and threads that it starts included, and by no other call.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

REQUEST_ID = "quartet-request-id"
_LONGEST_REQUEST_ID = 128
# What could end a line, a quotation or an id made of several has no place in an id that others write.
_STRANGE = re.compile(r"[^\w.:/+=@-]", re.ASCII)


@dataclass(eq=False, kw_only=True)
class CallRecord:
    """What the log says of a call. ``items`` and ``tokens``: answered; ``weights_version``: of what answered."""

    request_id: str
    method: str
    caller: str = ""
    items: int = 0
    tokens: int = 0
    weights_version: int | None = None


_current: ContextVar[CallRecord | None] = ContextVar("quartet_call", default=None)
_token_checked: ContextVar[bool] = ContextVar("quartet_token_checked", default=False)


def begin(record: CallRecord) -> None:
    """The task that runs belongs to ``record`` from now on, to its end."""
    _current.set(record)


def current() -> CallRecord | None:
    """The call that this code runs for, None outside of one."""
    return _current.get()


def note(*, items: int = 0, tokens: int = 0, weights_version: int | None = None) -> None:
    """Adds to what the log will say of the current call."""
    record = _current.get()
    if record is None:
        return
    record.items += items
    record.tokens += tokens
    if weights_version is not None:
        record.weights_version = weights_version


def current_request_id() -> str:
    """Id of the current call, or a fresh one outside of a call."""
    record = _current.get()
    return uuid.uuid4().hex if record is None else record.request_id


def read_request_id(metadata: Any) -> str:
    """The id that the client gave, in characters that are safe to log; a fresh one where it gave none."""
    sent = next((str(value) for key, value in metadata or () if key == REQUEST_ID), "")
    return _STRANGE.sub("_", sent[:_LONGEST_REQUEST_ID]) or uuid.uuid4().hex


def token_checked() -> None:
    """The token that came with the current call is one of those that are accepted: from now on it says who asks."""
    _token_checked.set(True)


Identity = tuple[tuple[bytes, ...], str]
"""Names in a certificate and digest of a token."""


def identity_of(context: Any) -> Identity:
    """Who asks, by what was checked: the names in its certificate and a digest of its token, empty where it has none.

    Where nobody checks tokens, whatever came as one says nothing. Its address is no part of it: the same caller comes
    over another connection the next time.
    """
    names = tuple(sorted(context.peer_identities() or ()))
    if not _token_checked.get():
        return names, ""
    sent = next((str(value) for key, value in context.invocation_metadata() or () if key == "authorization"), "")
    token = sent.partition(" ")[2].strip()
    return names, hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest() if token else ""


def sender_of(context: Any) -> Hashable:
    """Who asks by its identity, or by its host where it has none: over however many connections it comes."""
    identity = identity_of(context)
    return identity if any(identity) else str(context.peer()).rpartition(":")[0]


def caller_of(context: Any) -> str:
    """Whose call it is: the names in the client's certificate where it showed one, and its address."""
    peer = str(context.peer())
    identities = context.peer_identities() if peer else None
    if not identities:
        return peer
    names = ",".join(_STRANGE.sub("_", name.decode("utf-8", "replace")) for name in identities)
    return f"{names[:_LONGEST_REQUEST_ID]} {peer}"
