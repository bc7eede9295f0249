"""Certificates for tests: authorities, and what they sign, written as PEM files."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Pair:
    """A certificate with its key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(_PEM)

    def key_pem(self, password: bytes | None = None) -> bytes:
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        return self.key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, encryption)

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """The files of certificate and key; those there are replaced at once, as a rotation does."""
        cert, key = folder / f"{name}.crt", folder / f"{name}.key"
        replace(key, self.key_pem())
        replace(cert, self.certificate_pem)
        return cert, key


class Authority(Pair):
    """Signs certificates."""

    @classmethod
    def make(cls, name: str = "an authority") -> Authority:
        return cls(*_sign(name, issuer=None, ends_in_s=3600))

    def sign(self, name: str, *, host: str = "localhost", ends_in_s: float = 3600) -> Pair:
        """A certificate for ``host`` and 127.0.0.1; one that has ended where ``ends_in_s`` is negative."""
        return Pair(*_sign(name, issuer=self, ends_in_s=ends_in_s, host=host))


def replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _sign(
    name: str, *, issuer: Pair | None, ends_in_s: float, host: str = ""
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(seconds=ends_in_s))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return key, builder.sign(issuer.key if issuer else key, hashes.SHA256())
