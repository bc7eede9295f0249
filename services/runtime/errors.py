"""The one tree of errors that services raise, and the one table to gRPC status. An interceptor applies it."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

# Trailing metadata of more than 8 KiB is refused by clients. A message is in it up to three times: as it is, where a
# byte may take three, and in the details twice.
_LONGEST_BYTES = 1024


class ServiceError(Exception):
    """Base of every error a client may see. ``field``: the field that is wrong, if one is.

    Message and field keep their beginning and end where they are long: they may quote a request of many MiB.
    ``refused_as``: the reason under which the call is counted as refused, where whoever raises it does not count.
    """

    code = grpc.StatusCode.INTERNAL
    may_quote = False
    """Whether messages may have words of a request in them, which do not belong in a log."""

    def __init__(
        self, message: str, *, field: str = "", retry_after_ms: int | None = None, refused_as: str = ""
    ) -> None:
        self.message = shortened(message)
        super().__init__(self.message)
        self.field = shortened(field)
        self.retry_after_ms = retry_after_ms
        self.refused_as = refused_as


def shortened(text: str, most_bytes: int = _LONGEST_BYTES) -> str:
    """``text`` where it is at most so long in UTF-8, else its beginning and its end, and how much is between them."""
    if 4 * len(text) <= most_bytes or len(encoded := text.encode("utf-8", "replace")) <= most_bytes:
        return text
    kept = (most_bytes - 64) // 2
    head, tail = (part.decode("utf-8", "ignore") for part in (encoded[:kept], encoded[-kept:]))
    return f"{head} [... {len(text) - len(head) - len(tail):,} characters ...] {tail}"


class InvalidArgumentError(ServiceError):
    """The request can never succeed: the message names the field, the value and the bound."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    may_quote = True


class FailedPreconditionError(ServiceError):
    """Right in form, but not now: another tokenizer, an older version, no statistics kept."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    may_quote = True


class NotFoundError(ServiceError):
    """Nothing goes by the name that was given."""

    code = grpc.StatusCode.NOT_FOUND
    may_quote = True


class AlreadyExistsError(ServiceError):
    """The name that was given means something else already, and for good."""

    code = grpc.StatusCode.ALREADY_EXISTS
    may_quote = True


class UnauthenticatedError(ServiceError):
    """No credentials, or none that are accepted. The message never repeats them."""

    code = grpc.StatusCode.UNAUTHENTICATED


class AbortedError(ServiceError):
    """Lost to a concurrent operation of the same kind."""

    code = grpc.StatusCode.ABORTED
    may_quote = True


class OverloadedError(ServiceError):
    """Refused whole, before any work, to protect what is in hand."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(ServiceError):
    """Shutting down, or an engine is restarting."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(ServiceError):
    """Too late: the client's deadline passed before the work began, or the client let us wait for too long."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DataLossError(ServiceError):
    """Data arrived damaged."""

    code = grpc.StatusCode.DATA_LOSS
    may_quote = True


class InternalError(ServiceError):
    """Our fault; the log holds the cause under the request id."""


class StartError(Exception):
    """A service cannot start; the message says why and what to do. Printed as one line, exit code 2."""


async def refuse(context: Any, error: ServiceError, metadata: tuple[tuple[str, Any], ...] = ()) -> NoReturn:
    """Ends a call with the status of ``error``.

    gRPC keeps what is raised here in a cycle with the call, until the collector comes by, and with it the stacks of
    ``error`` and of what led to it. Requests of many MiB are among them, so they go.
    """
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            links += [link.__cause__, link.__context__]
    await context.abort(error.code, error.message, (*metadata, *status_metadata(error)))
    raise AssertionError  # That raises.


def status_metadata(error: ServiceError) -> tuple[tuple[str, Any], ...]:
    """Trailing metadata: ``google.rpc`` details, and the pushback that clients' retry policies honour."""
    metadata: list[tuple[str, Any]] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        status = status_pb2.Status(code=error.code.value[0], message=error.message, details=[detail])
        metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    if error.retry_after_ms is not None:
        metadata.append(("grpc-retry-pushback-ms", str(error.retry_after_ms)))
    return tuple(metadata)
