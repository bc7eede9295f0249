"""A caller is known by what it has shown and we have checked, and not by where it comes from."""

from __future__ import annotations

import hashlib
from contextvars import copy_context
from dataclasses import dataclass

import pytest

from services.runtime.calls import identity_of, sender_of, token_checked


@dataclass
class Context:
    names: list[bytes] | None = None
    authorization: str = ""
    address: str = "ipv4:10.0.0.7:4321"

    def peer(self) -> str:
        return self.address

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
def test_an_identity_is_the_names_of_the_certificate_and_the_digest_of_a_token_that_was_checked(context, identity):
    call = copy_context()
    call.run(token_checked)
    assert call.run(identity_of, context) == identity
    assert identity_of(context) == (identity[0], "")  # Outside of that call nobody has looked at it.


@pytest.mark.parametrize(
    ("context", "sender"),
    [
        (Context(), "ipv4:10.0.0.7"),
        (Context(address="ipv4:10.0.0.7:5432", authorization="Bearer forged"), "ipv4:10.0.0.7"),
        (Context(address="ipv6:%5B::1%5D:4321"), "ipv6:%5B::1%5D"),
        (Context(address="unix:/run/quartet.sock"), "unix"),
        (Context([b"trainer"]), ((b"trainer",), "")),
    ],
)
def test_who_has_shown_nothing_is_its_host(context, sender):
    assert sender_of(context) == sender
