"""Addresses, and what the trainer shows to services and asks of them: for their ports, and for weight updates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from quartet.client import Security
from quartet.client.channel import target_of
from quartet.settings import Settings


def _target(addresses: str) -> str:
    target_of(addresses)  # ValueError: it is none.
    return addresses


Address = Annotated[str, AfterValidator(_target)]


class ServiceCredentials(Settings):
    """TLS and token of the services; without any, the connections are plain text."""

    tls: bool = Field(False, description="speak TLS, checking against the system's authorities; --tls-ca implies it")
    tls_ca: Path | None = Field(None, description="PEM authorities of the services' certificates: turns TLS on")
    tls_cert: Path | None = Field(None, description="PEM certificate chain to show to the services (mTLS)")
    tls_key: Path | None = Field(None, description="PEM private key of --tls-cert")
    tls_server_name: str | None = Field(None, description="name in the services' certificates, where addresses differ")
    token_file: Path | None = Field(
        None, description="bearer token of the services: the first line; read again when it changes"
    )

    @property
    def security(self) -> Security:
        """Of policy, reward and reference service."""
        return Security(
            tls=self.tls,
            ca_file=self.tls_ca,
            cert_file=self.tls_cert,
            key_file=self.tls_key,
            server_name=self.tls_server_name,
            token_file=self.token_file,
        )

    @model_validator(mode="after")
    def _credentials_fit_together(self) -> Self:
        encrypted = self.tls or self.tls_ca is not None
        _require_fit("--", self.tls_cert, self.tls_key, self.tls_server_name, encrypted)
        return self


class AdminCredentials(ServiceCredentials):
    """The same of the admin port. What is known of the server carries over; what is shown to it never does."""

    admin_tls_ca: Path | None = Field(
        None, description="PEM authorities of the admin port's certificate; default as --tls and --tls-ca"
    )
    admin_tls_cert: Path | None = Field(None, description="PEM certificate chain to show to the admin port (mTLS)")
    admin_tls_key: Path | None = Field(None, description="PEM private key of --admin-tls-cert")
    admin_tls_server_name: str | None = Field(
        None, description="name in the admin port's certificate; default --tls-server-name"
    )
    admin_token_file: Path | None = Field(None, description="bearer token of weight updates, as --token-file")

    @property
    def admin_security(self) -> Security:
        """Of weight updates."""
        return Security(
            tls=self.tls,
            ca_file=self.admin_tls_ca or self.tls_ca,
            cert_file=self.admin_tls_cert,
            key_file=self.admin_tls_key,
            server_name=self.admin_tls_server_name or self.tls_server_name,
            token_file=self.admin_token_file,
        )

    @model_validator(mode="after")
    def _admin_credentials_fit_together(self) -> Self:
        encrypted = self.tls or self.tls_ca is not None or self.admin_tls_ca is not None
        _require_fit("--admin-", self.admin_tls_cert, self.admin_tls_key, self.admin_tls_server_name, encrypted)
        return self


def _require_fit(prefix: str, cert: Path | None, key: Path | None, name: str | None, encrypted: bool) -> None:
    """In the words of the flags; ``Security`` would refuse the same in its own."""
    if (cert is None) != (key is None):
        given, missing = ("cert", "key") if key is None else ("key", "cert")
        raise ValueError(f"{prefix}tls-{given} is set without {prefix}tls-{missing}: a certificate needs both")
    if not encrypted and (cert is not None or name is not None):
        given = "cert" if cert is not None else "server-name"
        raise ValueError(
            f"{prefix}tls-{given} is set without TLS: set {prefix}tls-ca, or --tls for the system's authorities"
        )
