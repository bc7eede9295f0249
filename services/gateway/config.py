"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from quartet.client import Security
from quartet.client.channel import target_of
from quartet.settings import NonNegativeFloat, Port, PositiveFloat, PositiveInt, Settings
from services.runtime.security import ListenerSecurity


def _target(addresses: str) -> str:
    target_of(addresses)  # ValueError: it is none.
    return addresses


Address = Annotated[str, AfterValidator(_target)]


class GatewaySettings(Settings):
    """Serves scores, rankings and log-probabilities over HTTP, from the services over gRPC.

    Keys of callers are made by quartet-gateway new-key; see quartet-gateway new-key --help.
    """

    command: ClassVar[str] = "quartet-gateway"

    reward: Address | None = Field(None, description="address of the reward service, as the clients take it: host:port")
    policy: Address | None = Field(None, description="address of the policy service")
    reference: Address | None = Field(None, description="address of the reference service")
    host: str = Field("127.0.0.1", description="address to listen on; loopback unless told otherwise")
    port: Port = Field(8080, description="HTTP port; 0 takes a free one")
    metrics_port: Port = Field(9104, description="Prometheus port over HTTP; 0 takes a free one")
    metrics_host: str | None = Field(None, description="address that the Prometheus port listens on; default --host")
    keys: Path | None = Field(
        None,
        description="TOML file of the keys that are accepted, hashed; read again when it changes; none: open to all",
    )
    tls_cert: Path | None = Field(None, description="PEM certificate chain; with --tls-key turns HTTPS on")
    tls_key: Path | None = Field(None, description="PEM private key of --tls-cert, without a password")
    service_tls: bool = Field(
        False,
        description="speak TLS to the services, checking against the system's authorities; --service-ca implies it",
    )
    service_ca: Path | None = Field(None, description="PEM authorities of the services' certificates: turns TLS on")
    service_cert: Path | None = Field(None, description="PEM certificate chain to show to the services (mTLS)")
    service_key: Path | None = Field(None, description="PEM private key of --service-cert")
    service_name: str | None = Field(None, description="name in the services' certificates, where addresses differ")
    service_token_file: Path | None = Field(
        None, description="bearer token of the services: the first line; read again when it changes"
    )
    deadline_s: PositiveFloat = Field(
        120.0, description="seconds that a request may take; callers lower it by the header X-Request-Timeout"
    )
    patience_s: NonNegativeFloat = Field(
        0.5, description="seconds that a service may be away before callers are told; 0: told at once"
    )
    max_body_mib: PositiveInt = Field(8, description="largest request, MiB")
    max_held_mib: PositiveInt = Field(256, description="most of all requests in hand together, MiB; more are refused")
    max_requests: PositiveInt = Field(2048, description="most requests in hand; more are refused")
    max_connections: PositiveInt = Field(4096, description="most connections; more are closed")
    max_items: PositiveInt = Field(1024, description="most items of one request to score")
    max_candidates: PositiveInt = Field(64, description="most responses of one request to rank")
    arrival_timeout_s: PositiveFloat = Field(
        20.0, description="seconds that head or body of a request may take to arrive"
    )
    idle_timeout_s: PositiveInt = Field(75, description="seconds until a connection without a request is closed")
    grace_s: NonNegativeFloat = Field(30.0, description="seconds that requests in hand may take to finish on SIGTERM")
    cors_origins: tuple[str, ...] = Field((), description="origins whose pages may call from a browser; default none")
    otlp_endpoint: str | None = Field(None, description="collector that traces are sent to, OTLP over gRPC")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, else one JSON object a line"
    )

    @property
    def security(self) -> ListenerSecurity:
        """Of the HTTP port, as far as listeners of services have the same."""
        return ListenerSecurity(tls_cert=self.tls_cert, tls_key=self.tls_key)

    @property
    def service_security(self) -> Security:
        """What the services are shown."""
        return Security(
            tls=self.service_tls,
            ca_file=self.service_ca,
            cert_file=self.service_cert,
            key_file=self.service_key,
            server_name=self.service_name,
            token_file=self.service_token_file,
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.reward is self.policy is self.reference is None:
            raise ValueError("no service is given: set --reward, --policy or --reference to its address")
        if problem := self.security.problem():
            raise ValueError(problem)
        if (self.service_cert is None) != (self.service_key is None):
            given, missing = ("cert", "key") if self.service_key is None else ("key", "cert")
            raise ValueError(f"--service-{given} is set without --service-{missing}: a certificate needs both")
        encrypted = self.service_tls or self.service_ca is not None
        if not encrypted and (self.service_cert is not None or self.service_name is not None):
            given = "cert" if self.service_cert is not None else "name"
            raise ValueError(f"--service-{given} is set without TLS: set --service-ca, or --service-tls")
        return self
