"""The one tree of errors that services raise, and the one table to gRPC status. An interceptor applies it."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2


class ServiceError(Exception):
    """Base of every error a client may see. ``field``: the field that is wrong, if one is.

    ``refused_as``: the reason under which the call is counted as refused, where whoever raises it does not count.
    """

    code = grpc.StatusCode.INTERNAL

    def __init__(
        self, message: str, *, field: str = "", retry_after_ms: int | None = None, refused_as: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms
        self.refused_as = refused_as


class InvalidArgumentError(ServiceError):
    """The request can never succeed: the message names the field, the value and the bound."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class FailedPreconditionError(ServiceError):
    """Right in form, but not now: another tokenizer, an older version, no statistics kept."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotFoundError(ServiceError):
    """Nothing goes by the name that was given."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(ServiceError):
    """The name that was given means something else already, and for good."""

    code = grpc.StatusCode.ALREADY_EXISTS


class UnauthenticatedError(ServiceError):
    """No credentials, or none that are accepted. The message never repeats them."""

    code = grpc.StatusCode.UNAUTHENTICATED


class AbortedError(ServiceError):
    """Lost to a concurrent operation of the same kind."""

    code = grpc.StatusCode.ABORTED


class OverloadedError(ServiceError):
    """Refused whole, before any work, to protect what is in hand."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(ServiceError):
    """Shutting down, or an engine is restarting."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(ServiceError):
    """The client's deadline passed before the work began."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DataLossError(ServiceError):
    """Data arrived damaged."""

    code = grpc.StatusCode.DATA_LOSS


class InternalError(ServiceError):
    """Our fault; the log holds the cause under the request id."""


class StartError(Exception):
    """A service cannot start; the message says why and what to do. Printed as one line, exit code 2."""


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
