"""Settings of an admin listener: a port and credentials of its own for calls that change what a service serves."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from quartet.settings import Port
from services.runtime.config import ServiceSettings
from services.runtime.security import ListenerSecurity


class AdminSettings(ServiceSettings):
    """Settings of a service that has an admin port. Subclasses say whose port it is and what it can do.

    ``admin_power`` is what a caller of the admin port can do, ``data_power`` what one of the service's own port can;
    both stand in messages.
    """

    admin_power: ClassVar[str] = "changes what is served"
    data_power: ClassVar[str] = "call"

    admin_port: Port = Field(50061, description="gRPC port of the admin listener; 0 takes a free one")
    admin_host: str | None = Field(None, description="address that the admin port listens on; default --host")
    admin_tls_cert: Path | None = Field(
        None, description="PEM certificate chain of the admin port; default --tls-cert with its key"
    )
    admin_tls_key: Path | None = Field(None, description="PEM private key of --admin-tls-cert")
    admin_tls_client_ca: Path | None = Field(
        None, description="PEM authorities of the certificates that the admin port's clients must show"
    )
    admin_token_file: Path | None = Field(
        None, description="bearer tokens that the admin port accepts, one a line; none of them in --token-file"
    )

    @property
    def admin_security(self) -> ListenerSecurity:
        """Credentials of the admin port: its own; of the service's port only the server's certificate serves here."""
        own = self.admin_tls_cert is not None or self.admin_tls_key is not None
        return ListenerSecurity(
            tls_cert=self.admin_tls_cert if own else self.tls_cert,
            tls_key=self.admin_tls_key if own else self.tls_key,
            tls_client_ca=self.admin_tls_client_ca,
            token_file=self.admin_token_file,
            prefix="--admin-",
        )

    @model_validator(mode="after")
    def _admin_credentials_fit_together(self) -> Self:
        admin = self.admin_security
        if problem := admin.problem():
            raise ValueError(problem)
        if self.security.knows_callers and not admin.knows_callers:
            raise ValueError(
                f"the service's port asks for credentials and the admin port, which {self.admin_power}, would not: "
                "set --admin-token-file or --admin-tls-client-ca"
            )
        if self.token_file is not None and self.token_file == self.admin_token_file:
            raise ValueError(
                f"--token-file and --admin-token-file are both {str(self.token_file)!r}: whoever may {self.data_power} "
                "could use the admin port; give the admin port tokens of its own"
            )
        return self
