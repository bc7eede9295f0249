"""Who may call: TLS, the authorities of clients, bearer tokens.

All files are read at the start, where a wrong one is refused, and again when they change: a certificate or a token is
rotated by replacing its file. A file that becomes unusable changes nothing and is logged as an error.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import ipaddress
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc
import structlog

from quartet.token_file import Stamp, TokenFile, TokenFileError, stamp_of
from services.runtime.errors import StartError

log = structlog.get_logger()

_SCHEME = "bearer"
_SHORT_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class ListenerSecurity:
    """Credentials of one listener. Without any it is open to whoever reaches its port.

    ``tls_cert`` (a PEM chain) and ``tls_key`` turn TLS on, ``tls_client_ca`` asks clients for a certificate of one of
    its authorities, ``token_file`` for a bearer token. ``prefix`` stands before the names of the flags in messages.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    prefix: str = "--"

    def problem(self) -> str | None:
        """What of these does not go together, None when all does."""
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("cert", "key") if self.tls_key is None else ("key", "cert")
            return f"{self.prefix}tls-{given} is set without {self.prefix}tls-{missing}: TLS needs both"
        if self.tls_client_ca is not None and self.tls_cert is None:
            return f"{self.prefix}tls-client-ca is set without {self.prefix}tls-cert and {self.prefix}tls-key"
        return None

    @property
    def encrypted(self) -> bool:
        return self.tls_cert is not None

    @property
    def knows_callers(self) -> bool:
        """Whether a caller must show a token or a certificate."""
        return self.token_file is not None or self.tls_client_ca is not None


def warn_of_exposure(host: str, port: int, listener: str, security: ListenerSecurity) -> None:
    """Says in the log what is open on an address that is not loopback."""
    if is_loopback(host):
        return
    where = {"listener": listener, "host": host, "port": port}
    if not security.knows_callers:
        log.warning(
            "listener_open_to_anyone",
            **where,
            encrypted=security.encrypted,
            advice=f"whoever reaches the port may call: set {security.prefix}token-file or "
            f"{security.prefix}tls-client-ca, and {security.prefix}tls-cert with {security.prefix}tls-key",
        )
    elif not security.encrypted:
        log.warning(
            "tokens_in_clear_text",
            **where,
            advice=f"whoever sees the traffic sees the tokens: set {security.prefix}tls-cert and "
            f"{security.prefix}tls-key",
        )


def is_loopback(host: str) -> bool:
    """Whether an address to bind reaches this machine alone. A name other than localhost is taken not to."""
    bare = host.strip("[]")
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


class ServerCertificate:
    """The certificate of a listener, and the authorities of its clients; both as their files are now."""

    def __init__(self, security: ListenerSecurity) -> None:
        """
        Raises:
            StartError: a file is missing or not PEM, or the key belongs to another certificate.
        """
        assert security.tls_cert is not None
        assert security.tls_key is not None
        self.security = security
        self.cert, self.key, self.client_ca = security.tls_cert, security.tls_key, security.tls_client_ca
        self._apart_from: ServerCertificate | None = None
        self._stamp = self._refused = self._stamp_now()
        self._first, self.authorities = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For ``add_secure_port``; looks at the files at every handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._changed,  # type: ignore[arg-type]  # None means no change, which the stubs leave out.
            require_client_authentication=self.client_ca is not None,
        )

    def _stamp_now(self) -> Stamp | None:
        return stamp_of([path for path in (self.cert, self.key, self.client_ca) if path is not None])

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, None where nothing changed; called by gRPC in a thread of its own, must not raise."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return None
        try:
            configuration, authorities = self._read()
            self._require_apart(authorities)
        except StartError as error:
            # Else it is being replaced, and the next handshake sees it whole.
            if stamp == self._stamp_now() and stamp != self._refused:
                self._refused = stamp
                log.error("certificate_not_rotated", reason=str(error), serving="the one read before")
            return None
        if stamp != self._stamp_now():
            return None
        self._stamp = stamp
        self.authorities = authorities
        log.info("certificate_rotated", certificate=str(self.cert))
        return configuration

    def keep_apart_from(self, other: ServerCertificate) -> None:
        """From now on takes no authority of clients that ``other`` has.

        Raises:
            StartError: it has one already.
        """
        self._apart_from = other
        self._require_apart(self.authorities)

    def _require_apart(self, authorities: frozenset[bytes]) -> None:
        other = self._apart_from
        if other is not None and authorities & other.authorities:
            raise StartError(
                f"{self.security.prefix}tls-client-ca {str(self.client_ca)!r} and {other.security.prefix}tls-client-ca "
                f"{str(other.client_ca)!r} have an authority in common: its clients could use both ports; give each "
                "port authorities of its own, or the admin port --admin-token-file"
            )

    def _read(self) -> tuple[grpc.ServerCertificateConfiguration, frozenset[bytes]]:
        """What the files say now, and digests of the authorities of clients."""
        flag = self.security.prefix
        key = _bytes_of(f"{flag}tls-key", self.key)
        chain = _bytes_of(f"{flag}tls-cert", self.cert)
        _require_pair(flag, self.cert, self.key)
        authorities = None
        if self.client_ca is not None:
            authorities = _bytes_of(f"{flag}tls-client-ca", self.client_ca)
            _require_authorities(f"{flag}tls-client-ca", self.client_ca, authorities)
        return grpc.ssl_server_certificate_configuration([(key, chain)], authorities), _digests(authorities or b"")


def _digests(pem: bytes) -> frozenset[bytes]:
    """SHA-256 of each certificate, however it is written down."""
    found = re.findall(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", pem, re.DOTALL)
    return frozenset(hashlib.sha256(binascii.a2b_base64(body)).digest() for body in found)


def _bytes_of(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{flag} is {str(path)!r}: {error.strerror}") from error


def _require_pair(flag: str, cert: Path, key: Path) -> None:
    """gRPC would refuse a wrong pair as well, but without a word about what is wrong with it."""
    named = f"{flag}tls-cert is {str(cert)!r}, {flag}tls-key is {str(key)!r}"

    def encrypted() -> NoReturn:
        raise StartError(
            f"{flag}tls-key is {str(key)!r}: encrypted; give a key without a password, readable by us alone"
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(cafile=cert)
    except (ssl.SSLError, OSError) as error:
        raise StartError(f"{flag}tls-cert is {str(cert)!r}: not a PEM certificate") from error
    try:
        context.load_cert_chain(cert, key, password=encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartError(f"{named}: the key does not belong to the certificate") from error
        raise StartError(f"{flag}tls-key is {str(key)!r}: not a PEM private key for {str(cert)!r}") from error
    except OSError as error:
        raise StartError(f"{named}: {error.strerror}") from error


def _require_authorities(flag: str, path: Path, content: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=content.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
        raise StartError(f"{flag} is {str(path)!r}: no PEM certificates") from error


class TokenCheck:
    """Which bearer tokens are accepted."""

    def __init__(self, path: Path, flag: str) -> None:
        """
        Raises:
            StartError: the file is missing, empty, or not made of tokens.
        """
        try:
            self._file = TokenFile(path, on_problem=lambda problem: log.error("tokens_not_rotated", reason=problem))
        except TokenFileError as error:
            raise StartError(f"{flag}: {error}") from error
        self.flag = flag
        self._of: tuple[str, ...] = ()
        self._digests: list[bytes] = []
        if short := sum(len(token) < _SHORT_TOKEN for token in self._file.tokens):
            log.warning("tokens_short", file=str(path), tokens=short, characters_advised=_SHORT_TOKEN)

    @property
    def digests(self) -> list[bytes]:
        """SHA-256 of every token accepted now."""
        tokens = self._file.tokens
        if tokens is not self._of:
            self._of, self._digests = tokens, [_digest(token) for token in tokens]
        return self._digests

    def keep_apart_from(self, other: TokenCheck) -> None:
        """From now on takes no token of ``other``.

        Raises:
            StartError: it has one already.
        """

        def require_apart(tokens: tuple[str, ...]) -> None:
            known = set(other.digests)
            if shared := sum(_digest(token) in known for token in tokens):
                raise TokenFileError(
                    f"token file {str(self._file.path)!r}: {shared} of its {len(tokens)} tokens stand in {other.flag} "
                    f"{str(other._file.path)!r} as well, and would open both ports; give each port tokens of its own"
                )

        self._file.check = require_apart
        try:
            require_apart(self._file.tokens)
        except TokenFileError as error:
            raise StartError(f"{self.flag}: {error}") from error

    def refusal(self, metadata: Any) -> str | None:
        """Why a call with this metadata is refused, None when it is accepted. Never tells what was sent."""
        sent = [value for key, value in metadata or () if key == "authorization"]
        if not sent:
            return "no token: send the metadata authorization: Bearer TOKEN"
        if len(sent) > 1:
            return f"{len(sent)} authorization entries in the metadata: send one"
        scheme, _, token = str(sent[0]).partition(" ")
        if scheme.lower() != _SCHEME or not token.strip():
            return "the authorization metadata is not of the form: Bearer TOKEN"
        digest = _digest(token.strip())
        # Against all of them, whichever fits: the time says nothing about where a token differs.
        fits = [hmac.compare_digest(digest, known) for known in self.digests]
        return None if any(fits) else "the token is not accepted: it is wrong, or has been replaced"


class Guard:
    """Whom a listener lets in, as its files are now."""

    def __init__(self, security: ListenerSecurity) -> None:
        """
        Raises:
            StartError: a certificate, key or token file is not usable.
        """
        self.security = security
        self.certificate = ServerCertificate(security) if security.encrypted else None
        self.tokens: TokenCheck | None = None
        if security.token_file is not None:
            self.tokens = TokenCheck(security.token_file, f"{security.prefix}token-file")

    def keep_apart_from(self, service: Guard) -> None:
        """As the guard of an admin port: whom ``service`` lets in gets in here with other credentials alone, whatever
        the files of either come to say.

        Raises:
            StartError: they have a token in common, or an authority of clients and there are no tokens here.
        """
        if self.tokens is not None and service.tokens is not None:
            self.tokens.keep_apart_from(service.tokens)
            service.tokens.keep_apart_from(self.tokens)
        if self.tokens is None and self.certificate is not None and service.certificate is not None:
            self.certificate.keep_apart_from(service.certificate)
            service.certificate.keep_apart_from(self.certificate)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
