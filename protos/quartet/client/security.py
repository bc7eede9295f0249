"""Credentials of a client: TLS, its own certificate, a bearer token."""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from quartet.client.errors import CredentialsError
from quartet.token_file import TokenFile, TokenFileError

Metadata = tuple[tuple[str, str], ...]

_log = logging.getLogger("quartet.client")


@dataclass(frozen=True, kw_only=True)
class Security:
    """What a client shows to a service, and what it asks of the service. By default nothing: plain text.

    ``tls``: encrypt, and check the service's certificate against the system's authorities, or against those in
    ``ca_file`` (PEM), which turns TLS on by itself.
    ``cert_file`` and ``key_file``: the client's own certificate chain and key (PEM) where the service asks for one.
    ``server_name``: the name to look for in the service's certificate, where the address has another or is a list.
    ``token_file``: the first token in it goes with every call; read again when the file changes. ``token`` is one
    that does not change. Certificates are read when a client is made.
    """

    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            given, missing = ("cert_file", "key_file") if self.key_file is None else ("key_file", "cert_file")
            raise CredentialsError(f"{given} is set without {missing}: a client's certificate needs both")
        if not self.encrypted and (self.cert_file is not None or self.server_name is not None):
            given = "cert_file" if self.cert_file is not None else "server_name"
            raise CredentialsError(f"{given} is set without TLS: set ca_file, or tls for the system's authorities")
        if self.token is not None and self.token_file is not None:
            raise CredentialsError("token and token_file are both set: give one of them")
        if self.token is not None and (not self.token or not re.fullmatch(r"[!-~]+", self.token)):
            raise CredentialsError("token is empty, or has something else than visible ASCII characters")

    @property
    def encrypted(self) -> bool:
        return self.tls or self.ca_file is not None

    def for_channel(self) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, str]]]:
        """Credentials of a channel, None for plain text, and its options.

        Raises:
            CredentialsError: a file cannot be read or is not PEM.
        """
        if not self.encrypted:
            return None, []
        options = [("grpc.ssl_target_name_override", self.server_name)] if self.server_name is not None else []
        authorities, chain, key = (
            _pem(name, path)
            for name, path in (("ca_file", self.ca_file), ("cert_file", self.cert_file), ("key_file", self.key_file))
        )
        return grpc.ssl_channel_credentials(authorities, key, chain), options

    def open_channel(self, target: str, options: list[tuple[str, object]]) -> grpc.aio.Channel:
        """A channel to ``target`` with these credentials.

        Raises:
            CredentialsError: see ``for_channel``.
        """
        if self.encrypted and self.server_name is None and target.startswith(("ipv4:", "ipv6:")) and "," in target:
            raise CredentialsError(
                f"{target.partition(':')[2]} are several addresses: set server_name to the name that their "
                "certificates share"
            )
        credentials, own = self.for_channel()
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=options)
        return grpc.aio.secure_channel(target, credentials, options=[*options, *own])

    def metadata_source(self, addresses: str) -> Callable[[], Metadata]:
        """Gives the metadata with the token as it is now, for every call anew. Warns of a token in clear text.

        Raises:
            CredentialsError: the token file cannot be used.
        """
        if self.token is None and self.token_file is None:
            return lambda: ()
        if not self.encrypted and not _is_loopback(addresses):
            _log.warning("the token goes to %s in clear text: use TLS (ca_file, or tls)", addresses)
        if self.token_file is None:
            constant = (("authorization", f"Bearer {self.token}"),)
            return lambda: constant
        try:
            file = TokenFile(self.token_file, on_problem=_log.error)
        except TokenFileError as error:
            raise CredentialsError(str(error)) from error
        return lambda: (("authorization", f"Bearer {file.tokens[0]}"),)


def _pem(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{name} is {str(path)!r}: {error.strerror}") from error
    if b"-----BEGIN " not in content:
        raise CredentialsError(f"{name} is {str(path)!r}: not a PEM file")
    return content


def _is_loopback(addresses: str) -> bool:
    """Whether every address is of this machine, as far as their spelling tells."""
    path = re.sub(r"^(dns|ipv4|ipv6):(//[^/]*/)?", "", addresses)
    if path.startswith("unix:"):
        return True
    for part in path.split(","):
        host = part.strip().rpartition(":")[0].strip("[]") or part.strip()
        try:
            if not ipaddress.ip_address(host).is_loopback:
                return False
        except ValueError:
            if host != "localhost":
                return False
    return True
