"""What a route asks of its caller: a scope, and room within its limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, Request

from services.gateway import exchange
from services.gateway.backends import Backends
from services.gateway.config import GatewaySettings
from services.gateway.keys import Limits, Scope
from services.gateway.metrics import GatewayMetrics
from services.gateway.problems import ProblemError

# Of English, about. It is settled when the tokens are known.
_CHARACTERS_PER_TOKEN = 4


def _backends(request: Request) -> Backends:
    found: Backends = request.app.state.backends
    return found


TheBackends = Annotated[Backends, Depends(_backends)]


def _settings(request: Request) -> GatewaySettings:
    found: GatewaySettings = request.app.state.settings
    return found


TheSettings = Annotated[GatewaySettings, Depends(_settings)]


def require_at_most(count: int, most: int, field: str) -> None:
    """Raises ProblemError: there are more."""
    if count > most:
        raise ProblemError(422, f"{field} has {count} entries, at most {most} are taken at a time", field=field)


def needs(*scopes: Scope) -> Any:
    """A dependency that refuses callers whose key has none of ``scopes`` or has used up its limits, and settles
    afterwards what the request took."""

    async def admitted(request: Request) -> AsyncIterator[None]:
        own = exchange.current()
        metrics: GatewayMetrics = request.app.state.metrics
        if own.caller.scopes.isdisjoint(scopes):
            metrics.refused.labels("scope").inc()
            has, wanted = ", ".join(sorted(own.caller.scopes)), " or ".join(scopes)
            raise ProblemError(403, f"key {own.caller.name!r} has the scopes {has}: {wanted} is needed here")
        limits: Limits = request.app.state.limits
        about = own.body_bytes // _CHARACTERS_PER_TOKEN
        if refused := limits.admit(own.caller, about):
            metrics.refused.labels("limit").inc()
            raise ProblemError(429, refused.detail, retry_after_s=refused.retry_after_s)
        try:
            yield
        finally:
            # What it really took, less what was taken for it before.
            limits.settle(own.caller, own.tokens - about)
            metrics.tokens.labels(own.caller.name).inc(own.tokens)

    return Depends(admitted)
