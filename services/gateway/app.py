"""The gateway's application: routes, and what stands around them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from quartet.client.errors import QuartetError
from services.gateway import api, drop_in, exchange, operating
from services.gateway.backends import Backends
from services.gateway.config import GatewaySettings
from services.gateway.exchange import Bounds, Exchanges
from services.gateway.keys import Keys, Limits
from services.gateway.metrics import GatewayMetrics
from services.gateway.problems import Problem, ProblemError

_DESCRIPTION = """Scores, rankings and log-probabilities, from quartet's services.

Callers show their key as `Authorization: Bearer KEY`, where the gateway has keys. Errors are problem details (RFC 9457)
that name the field, or the service that is away; 429 and 503 say in `Retry-After` when to come back. A request may
bring its own `X-Request-Id`, and its deadline in seconds as `X-Request-Timeout`."""


def make_app(settings: GatewaySettings, metrics: GatewayMetrics) -> Exchanges:
    """The whole of it, as uvicorn runs it.

    Raises:
        StartError: the file of keys can't be used.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Backends(settings, metrics) as backends:
            app.state.backends = backends
            yield

    app = FastAPI(
        title="quartet gateway",
        version="1",
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # Their pages load scripts from elsewhere.
        redoc_url=None,
    )
    for router in (operating.router, api.router, drop_in.router):
        app.include_router(router)
    _tell_of_problems(app)
    limits = Limits()
    exchanges = Exchanges(
        app,
        bounds=Bounds(
            body_bytes=settings.max_body_mib * 2**20,
            held_bytes=settings.max_held_mib * 2**20,
            requests=settings.max_requests,
            arrival_s=settings.arrival_timeout_s,
            deadline_s=settings.deadline_s,
        ),
        keys=None if settings.keys is None else Keys(settings.keys),
        limits=limits,
        metrics=metrics,
    )
    app.state.settings, app.state.metrics, app.state.limits = settings, metrics, limits
    app.state.exchanges = exchanges
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key", "X-Request-Id", "X-Request-Timeout"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    return exchanges


def _tell_of_problems(app: FastAPI) -> None:
    def told(to_problem: Callable[[Any], ProblemError]) -> Callable[[Request, Any], Awaitable[JSONResponse]]:
        async def handle(_: Request, error: Any) -> JSONResponse:
            return to_problem(error).response(exchange.current().request_id)

        return handle

    app.add_exception_handler(ProblemError, told(lambda error: error))
    app.add_exception_handler(QuartetError, told(ProblemError.of))
    app.add_exception_handler(RequestValidationError, told(ProblemError.of_validation))
    app.add_exception_handler(HTTPException, told(lambda error: ProblemError(error.status_code, str(error.detail))))
    original = app.openapi

    def openapi() -> dict[str, Any]:
        """With the schema of problems, to which routes refer, and the keys."""
        known = app.openapi_schema is not None
        schema = original()
        if not known:
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {})["Problem"] = Problem.model_json_schema()
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}, {}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
