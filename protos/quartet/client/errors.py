"""The one tree of errors a client raises, and the table that gRPC status codes come through."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class QuartetError(Exception):
    """A call failed. ``service``: what was called, ``code``: the gRPC status, ``field``: the bad field if named.

    ``request_id``: under which the service's log tells of the call; empty where it was not made.
    ``retry_after_s``: after which the service asked to be called again; 0 where it did not.
    """

    def __init__(
        self,
        message: str,
        *,
        service: str = "",
        code: grpc.StatusCode | None = None,
        field: str = "",
        request_id: str = "",
        retry_after_s: float = 0.0,
    ) -> None:
        text = f"{service}: {message}" if service else message
        super().__init__(f"{text} (request id {request_id})" if request_id and request_id not in message else text)
        self.message = message
        self.service = service
        self.code = code
        self.field = field
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidInputError(QuartetError):
    """The request can never succeed as it is."""


class NotFoundError(InvalidInputError):
    """Nothing goes by that name there."""


class AlreadyExistsError(InvalidInputError):
    """That name means something else there, and for good: take another."""


class PreconditionError(QuartetError):
    """The service is not in the state the request needs: another tokenizer, a newer version, an update under way."""


class CredentialsError(QuartetError):
    """The service does not accept the credentials, or they cannot be used here; the message never has a token."""


class UnavailableError(QuartetError):
    """The service cannot be reached, or is shutting down; the same call may succeed later."""


class OverloadedError(UnavailableError):
    """The service refused the request to protect itself."""


class DeadlineError(QuartetError):
    """The deadline passed first."""


class DamagedError(QuartetError):
    """Data arrived damaged: a checksum differs."""


class ServiceFailedError(QuartetError):
    """The service itself failed; its log, under the request id, says why."""


class NotReadyError(QuartetError):
    """A service did not become ready in the time set."""


ERROR_BY_CODE: dict[grpc.StatusCode, type[QuartetError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInputError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.UNIMPLEMENTED: InvalidInputError,
    grpc.StatusCode.UNAUTHENTICATED: CredentialsError,
    grpc.StatusCode.PERMISSION_DENIED: CredentialsError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.ABORTED: PreconditionError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    # Who cancels a call himself sees asyncio.CancelledError. This is what gRPC says of calls that reach a server in the
    # moment in which it stops.
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.DATA_LOSS: DamagedError,
}

# What gRPC itself, at either end, refuses for its size says RESOURCE_EXHAUSTED as overload does, but will never pass.
_TOO_LARGE = re.compile(r"larger than max|metadata size exceeds", re.IGNORECASE)


def translate(error: grpc.aio.AioRpcError, service: str, request_id: str = "") -> QuartetError:
    """The typed error of a failed call, with the field that ``google.rpc.BadRequest`` details name."""
    field = ""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status is not None else ():
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request) and bad_request.field_violations:
            field = bad_request.field_violations[0].field
    kind = ERROR_BY_CODE.get(error.code(), ServiceFailedError)
    message = error.details() or error.code().name
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE.search(message):
        kind = InvalidInputError
        message += "; send less at a time, or raise --max-message-mib of the service and max_message_mib of CallPolicy"
    if error.code() is grpc.StatusCode.CANCELLED and message == "CANCELLED":
        message = "the service ended the call without an answer: it is stopping"
    return kind(
        message,
        service=service,
        code=error.code(),
        field=field,
        request_id=request_id,
        retry_after_s=pushback_s(error),
    )


def pushback_s(error: grpc.aio.AioRpcError) -> float:
    """How long the service asked to wait before the next try, 0 when it did not say."""
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-retry-pushback-ms":
            with contextlib.suppress(ValueError):
                return max(0.0, int(value) / 1000)
    return 0.0
