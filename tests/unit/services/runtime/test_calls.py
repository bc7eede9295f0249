"""A caller is known by what it shows, and not by where it comes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest

from services.runtime.calls import identity_of


@dataclass
class Context:
    names: list[bytes] | None = None
    authorization: str = ""

    def peer_identities(self) -> list[bytes] | None:
        return self.names

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", self.authorization),) if self.authorization else ()


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.mark.parametrize(
    ("context", "identity"),
    [
        (Context(), ((), "")),
        (Context([b"trainer", b"10.0.0.1"]), ((b"10.0.0.1", b"trainer"), "")),
        (Context(authorization="Bearer secret"), ((), digest("secret"))),
        (Context(authorization="bearer  secret "), ((), digest("secret"))),
        (Context([b"trainer"], "Bearer secret"), ((b"trainer",), digest("secret"))),
    ],
)
def test_an_identity_is_the_names_of_the_certificate_and_the_digest_of_the_token(context, identity):
    assert identity_of(context) == identity
