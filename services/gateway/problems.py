"""What callers are told when something is wrong: RFC 9457's problem details, and the one table to HTTP status.

Each body also has the member ``error`` in OpenAI's shape, so that its clients tell the same.
"""

from __future__ import annotations

import math
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from quartet.client import ItemFailure
from quartet.client.errors import (
    AlreadyExistsError,
    CredentialsError,
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    PreconditionError,
    QuartetError,
    UnavailableError,
)
from services.runtime.errors import shortened

MEDIA_TYPE = "application/problem+json"
_TITLES = {
    400: "Malformed request",
    401: "No valid key",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Arrived too slowly",
    409: "Not now",
    413: "Too large",
    422: "Invalid request",
    429: "Too much",
    500: "Internal error",
    502: "A service failed",
    503: "A service is away",
    504: "Too late",
}
# The first that fits, from the most special to the most general.
_STATUS: tuple[tuple[type[QuartetError], int], ...] = (
    (NotFoundError, 404),
    (AlreadyExistsError, 409),
    (InvalidInputError, 422),
    (PreconditionError, 409),
    (CredentialsError, 502),  # The gateway's, not the caller's.
    (OverloadedError, 429),
    (UnavailableError, 503),
    (NotReadyError, 503),
    (DeadlineError, 504),
)
_RETRY_AFTER_S = 1
_VALUE_CHARACTERS = 80
# Names of alternatives, where a field takes several.
_TYPES = frozenset({"str", "int", "float", "bool"})


class ProblemError(Exception):
    """A request is refused, or has failed. ``field``: of the request, by its path; ``service``: which one failed."""

    def __init__(
        self, status: int, detail: str, *, field: str = "", service: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = shortened(detail)
        self.field = shortened(field)
        self.service = service
        self.retry_after_s = _RETRY_AFTER_S if retry_after_s is None and status in (429, 503) else retry_after_s

    @classmethod
    def of(cls, error: QuartetError) -> ProblemError:
        """What a service's refusal or failure is over HTTP."""
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 502)
        return cls(
            status,
            error.message,
            field=error.field,
            service=error.service,
            retry_after_s=error.retry_after_s if error.retry_after_s and status in (429, 503) else None,
        )

    @classmethod
    def of_item(cls, failure: ItemFailure, service: str, field: str = "") -> ProblemError:
        """The same of one item."""
        return cls(503 if failure.retryable else 422, failure.reason, field=field, service=service)

    @classmethod
    def of_validation(cls, error: RequestValidationError) -> ProblemError:
        """The first thing that is wrong, by its place in the request, its value and what is allowed."""
        problems = error.errors()
        first = problems[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", "")
            return cls(400, f"the body is not valid JSON: {reason} at character {first['loc'][-1]}")
        field = path_of(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if first["type"] in ("missing", "extra_forbidden"):
            text = f"{field}: {'is required' if first['type'] == 'missing' else 'there is no such field'}"
        else:
            text = f"{field} is {_shown(first.get('input'))}: {message}"
        more = len(problems) - 1
        return cls(422, text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""), field=field)

    def body(self, request_id: str) -> dict[str, Any]:
        """As it is sent."""
        title = _TITLES.get(self.status, "Refused")
        found: dict[str, Any] = {
            "type": "about:blank",
            "title": title,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
        if self.field:
            found["field"] = self.field
        if self.service:
            found["service"] = self.service
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        found["error"] = {"message": self.detail, "type": kind, "param": self.field or None, "code": title}
        return found

    def headers(self, request_id: str) -> dict[str, str]:
        """Of the response."""
        found = {"X-Request-Id": request_id}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):
            found["Connection"] = "close"  # What is left of the request is not read.
        return found

    def response(self, request_id: str) -> JSONResponse:
        return JSONResponse(self.body(request_id), self.status, self.headers(request_id), MEDIA_TYPE)


def path_of(location: tuple[int | str, ...]) -> str:
    """``items[0].prompt`` of where pydantic found something; names of alternatives are left out."""
    found = ""
    for part in location[1:] if location[:1] in (("body",), ("query",), ("path",), ("header",)) else location:
        if isinstance(part, int):
            found += f"[{part}]"
        elif part.isidentifier() and part not in _TYPES:
            found += f".{part}" if found else part
    return found or str(location[0] if location else "request")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_CHARACTERS else f"{text[:_VALUE_CHARACTERS]}..."


class Problem(BaseModel):
    """RFC 9457."""

    type: str = Field("about:blank", description="always about:blank")
    title: str = Field(description="of the status")
    status: int = Field(description="HTTP status")
    detail: str = Field(description="what is wrong: field, value and bound; or which service failed, and how")
    request_id: str = Field(description="under which the gateway's and the services' logs tell of the request")
    field: str | None = Field(None, description="the field of the request that is wrong")
    service: str | None = Field(None, description="the service that refused or failed")
    error: dict[str, str | None] = Field(description="the same in OpenAI's shape")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For ``responses`` of a route."""
    return {
        status: {
            "description": _TITLES[status],
            "model": Problem,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({400, 401, 403, 413, 422, 429, 502, 503, 504, *statuses})
    }
