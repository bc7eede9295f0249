"""Settings that every service has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from quartet.settings import NonNegativeFloat, Port, PositiveFloat, PositiveInt, Settings
from services.runtime.security import ListenerSecurity


class ServiceSettings(Settings):
    """Settings of a quartet service."""

    model: str = Field(description="model to host: a Hugging Face folder or hub id")
    revision: str | None = Field(None, description="revision of a hub model; default its main branch")
    host: str = Field("127.0.0.1", description="address to listen on; loopback unless told otherwise")
    port: Port = Field(50051, description="gRPC port; 0 takes a free one")
    metrics_port: Port = Field(9101, description="Prometheus port over HTTP; 0 takes a free one")
    metrics_host: str | None = Field(
        None,
        description="address that the Prometheus port listens on; default --host. Nobody is asked who they are there",
    )
    grace_s: NonNegativeFloat = Field(
        30.0, description="seconds that work in flight may take to finish on SIGTERM; the rest then ends as UNAVAILABLE"
    )
    reflection: bool = Field(False, description="serve gRPC server reflection")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the weights; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    deterministic: bool = Field(
        False, description="an item's result does not depend on its batch companions, bit for bit; slower"
    )
    max_message_mib: PositiveInt = Field(
        16, description="largest message accepted, MiB; of many empty parts it takes 30 times as much memory to be read"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; only for models whose authors you trust"
    )
    tls_cert: Path | None = Field(
        None, description="PEM certificate chain; with --tls-key turns TLS on. All these files are read again on change"
    )
    tls_key: Path | None = Field(None, description="PEM private key of --tls-cert, without a password")
    tls_client_ca: Path | None = Field(
        None, description="PEM authorities: clients must show a certificate of one of them (mTLS)"
    )
    token_file: Path | None = Field(
        None, description="bearer tokens that are accepted, one a line; health checks need none"
    )
    health_port: Port | None = Field(
        None,
        description="a further gRPC port, of health alone and without TLS: for probes that speak none; 0: a free one",
    )
    max_connections: PositiveInt = Field(1024, description="most connections of a listener; more are refused")
    max_connection_calls: PositiveInt = Field(1024, description="most calls of one connection at a time; more wait")
    max_calls: PositiveInt = Field(8192, description="most calls of a listener at a time; more are refused")
    max_slow_requests: PositiveInt = Field(
        8,
        description="most requests of a listener that may take longer than a moment to arrive, of one caller half of "
        "them; more are refused. Each may come to --max-message-mib",
    )
    request_timeout_s: PositiveFloat = Field(60.0, description="seconds that a request may take to arrive whole")
    reader_timeout_s: PositiveFloat = Field(
        300.0, description="seconds that a reply of a stream may wait for its reader; then the call is ended"
    )
    handshake_timeout_s: PositiveFloat = Field(20.0, description="seconds that a client may take to open a connection")
    max_connection_age_s: NonNegativeFloat = Field(
        0.0, description="seconds until clients are asked to connect anew, with rotated certificates; 0: never"
    )
    otlp_endpoint: str | None = Field(
        None,
        description="collector that traces are sent to, OTLP over gRPC (http://127.0.0.1:4317); default "
        "OTEL_EXPORTER_OTLP_ENDPOINT, and no traces without it. Needs the extra otel",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, else one JSON object a line"
    )

    @property
    def security(self) -> ListenerSecurity:
        """Credentials of the service's own port."""
        return ListenerSecurity(
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            tls_client_ca=self.tls_client_ca,
            token_file=self.token_file,
        )

    @model_validator(mode="after")
    def _credentials_fit_together(self) -> Self:
        if problem := self.security.problem():
            raise ValueError(problem)
        return self
