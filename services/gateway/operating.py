"""Health, load, and what callers have used."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from services.gateway.access import TheBackends, needs
from services.gateway.exchange import Exchanges
from services.gateway.keys import Limits, Scope
from services.gateway.problems import ProblemError, documented

router = APIRouter()

_MINUTE_S = 60.0


class Alive(BaseModel):
    """It answers."""

    status: Literal["ok"] = "ok"


@router.get("/healthz", summary="Whether the gateway is alive")
async def healthz() -> Alive:
    """Asks no service."""
    return Alive()


@router.get("/readyz", summary="Whether its services are ready", responses={503: documented()[503]})
async def readyz(backends: TheBackends) -> Alive:
    """Fails while one of them is away: by its name."""
    if away := await backends.away():
        name, reason = next(iter(away.items()))
        raise ProblemError(503, f"{name}: {reason}", service=name)
    return Alive()


class Status(BaseModel):
    """How the gateway does."""

    requests_in_hand: int
    waiting_items: int = Field(description="to be sent to the reward service")
    answered_last_minute: int
    p50_ms: float | None = Field(None, description="of requests answered in the last minute")
    p99_ms: float | None = Field(None, description="of requests answered in the last minute")


@router.get(
    "/v1/status",
    summary="Load and latency now",
    responses=documented(),
    dependencies=[needs(Scope.SCORE, Scope.GENERATE)],
    response_model_exclude_none=True,
)
async def status(request: Request, backends: TheBackends) -> Status:
    """For people to watch; machines read the Prometheus port."""
    exchanges: Exchanges = request.app.state.exchanges
    latencies = exchanges.latencies_s(_MINUTE_S)

    def percentile_ms(share: float) -> float | None:
        return 1e3 * latencies[min(len(latencies) - 1, int(share * len(latencies)))] if latencies else None

    return Status(
        requests_in_hand=exchanges.in_hand,
        waiting_items=backends.single.waiting,
        answered_last_minute=len(latencies),
        p50_ms=percentile_ms(0.5),
        p99_ms=percentile_ms(0.99),
    )


class KeyUsage(BaseModel):
    """What goes by one name."""

    requests: int = Field(description="admitted since the gateway started")
    tokens: int = Field(description="used since then; of requests in hand by estimate")
    tokens_today: int = Field(description="since midnight, UTC")


@router.get(
    "/v1/usage",
    summary="What keys have used",
    responses=documented(),
    dependencies=[needs(Scope.ADMIN)],
)
async def usage(request: Request) -> dict[str, KeyUsage]:
    """By their names, since this process started."""
    limits: Limits = request.app.state.limits
    found: dict[str, Any] = limits.usage
    return {
        name: KeyUsage(requests=own.requests, tokens=own.tokens, tokens_today=own.tokens_today)
        for name, own in found.items()
    }
