"""Wrong credentials are refused at the start with flag and file, at a call without a word of the secret."""

from __future__ import annotations

import dataclasses
import hmac
import os
import re
import time
from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs

pytest.importorskip("cryptography", reason="no cryptography here to make certificates with")


from quartet import token_file
from quartet.client import CallPolicy, CredentialsError, RewardClient, ScoreItem, Security
from quartet.token_file import TokenFile, read_tokens
from services.policy.config import PolicySettings
from services.reward.config import RewardSettings
from services.runtime.errors import StartError
from services.runtime.security import (
    Guard,
    ListenerSecurity,
    ServerCertificate,
    TokenCheck,
    is_loopback,
    warn_of_exposure,
)
from tests.certificates import Authority, replace

TOKEN, OTHER, THIRD = "alpha-0123456789abcdef", "beta-0123456789abcdef", "gamma-0123456789abcdef"
ITEM = ScoreItem(prompt="a", response="b")
ONCE = CallPolicy(patience_s=0.0)
SCORE = "/quartet.reward.v1.RewardService/Score"
AUTHORITY = Authority.make()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture
def looking_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "LOOK_EVERY_S", 0.0)


# Tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_are_the_lines_without_comments_and_spaces_around(tokens):
    tokens.write_text(f"# of the trainer\n  {TOKEN}  \n\n{OTHER}\r\n")
    assert read_tokens(tokens) == (TOKEN, OTHER)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: write a token into it, for example of `openssl rand -hex 32`"),
        (b"\n  \n# nothing\n", "is empty: write a token"),
        (f"{OTHER}\n{TOKEN} and more\n".encode(), "line 2: a token is visible ASCII characters without a space"),
        ("schlüssel-0123456789".encode(), "line 1: a token is visible ASCII"),
        (TOKEN.encode() + b"\x00", "line 1: a token is visible ASCII"),
        (b"x" * 5000, "line 1: 5000 characters long, at most 4096 go with every call"),
        (b"x" * (1024 * 1024 + 1), "larger than 1048576 bytes, so it holds no tokens"),
        (None, "No such file or directory"),
    ],
)
def test_a_token_file_that_holds_no_tokens_is_refused_at_the_start_without_its_content(tokens, content, said):
    tokens.unlink() if content is None else tokens.write_bytes(content)
    with pytest.raises(StartError) as refused:
        TokenCheck(tokens, "--token-file")
    message = str(refused.value)
    assert message.startswith(f"--token-file: token file '{tokens}'")
    assert said in message
    assert TOKEN not in message
    assert OTHER not in message
    with pytest.raises(CredentialsError, match=re.escape(said)):
        Security(token_file=tokens).metadata_source("127.0.0.1:1")


def test_a_token_file_is_read_again_when_it_changes_and_not_more_often_than_once_a_second(tokens, monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    file = TokenFile(tokens, on_problem=pytest.fail)
    replace(tokens, f"{OTHER}\n{TOKEN}\n".encode())
    now_s[0] += 0.9
    assert file.tokens == (TOKEN,)
    now_s[0] += 0.2
    assert file.tokens == (OTHER, TOKEN)
    tokens.write_text(THIRD)  # In place.
    now_s[0] += 1.1
    assert file.tokens == (THIRD,)


def test_a_token_file_is_followed_through_links_as_mounted_secrets_are(tmp_path, looking_always):
    for number, token in enumerate((TOKEN, OTHER)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "tokens").write_text(token)
    (tmp_path / "now").symlink_to("0")
    file = TokenFile(tmp_path / "now" / "tokens", on_problem=pytest.fail)
    assert file.tokens == (TOKEN,)
    (tmp_path / "next").symlink_to("1")
    os.replace(tmp_path / "next", tmp_path / "now")
    assert file.tokens == (OTHER,)


def test_an_unusable_file_leaves_the_last_tokens_in_force_and_is_told_once_for_each_state(tokens, looking_always):
    said: list[str] = []
    file = TokenFile(tokens, on_problem=said.append)
    replace(tokens, b"")
    assert [file.tokens, file.tokens] == [(TOKEN,), (TOKEN,)]
    tokens.unlink()
    assert [file.tokens, file.tokens] == [(TOKEN,), (TOKEN,)]
    assert [("is empty" in line, "No such file" in line) for line in said] == [(True, False), (False, True)]
    assert all(line.endswith("the tokens read before stay in force") for line in said)
    tokens.write_text(OTHER)
    assert file.tokens == (OTHER,)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ((("authorization", f"Bearer {TOKEN}"),), None),
        ((("user-agent", "x"), ("authorization", f"bEARER  {OTHER} ")), None),
        ((), "no token: send the metadata authorization: Bearer TOKEN"),
        (None, "no token: send the metadata authorization: Bearer TOKEN"),
        ((("authorization", THIRD),), "the authorization metadata is not of the form: Bearer TOKEN"),
        ((("authorization", f"Basic {TOKEN}"),), "the authorization metadata is not of the form: Bearer TOKEN"),
        ((("authorization", "Bearer "),), "the authorization metadata is not of the form: Bearer TOKEN"),
        ((("authorization", f"Bearer {THIRD}"),), "the token is not accepted: it is wrong, or has been replaced"),
        ((("authorization", f"Bearer {TOKEN[:-1]}"),), "the token is not accepted: it is wrong, or has been replaced"),
        ((("authorization", f"Bearer {TOKEN}x"),), "the token is not accepted: it is wrong, or has been replaced"),
        (
            (("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {THIRD}")),
            "2 authorization entries in the metadata: send one",
        ),
    ],
)
def test_every_token_of_the_file_is_accepted_and_nothing_else(tokens, metadata, said):
    tokens.write_text(f"{TOKEN}\n{OTHER}\n")
    assert TokenCheck(tokens, "--token-file").refusal(metadata) == said


def test_a_token_is_compared_in_constant_time_with_all_of_them_whichever_fits(tokens, monkeypatch):
    tokens.write_text(f"{TOKEN}\n{OTHER}\n{THIRD}\n")
    check = TokenCheck(tokens, "--token-file")
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    assert check.refusal((("authorization", f"Bearer {TOKEN}"),)) is None
    assert check.refusal((("authorization", "Bearer x"),)) is not None
    assert compared == [(32, 32)] * 6  # Digests, so that lengths tell nothing either.


def test_short_tokens_are_warned_of_without_being_shown(tokens):
    tokens.write_text(f"{TOKEN}\nhunter2\n")
    with capture_logs() as events:
        TokenCheck(tokens, "--token-file")
    assert [(e["event"], e["log_level"], e["tokens"]) for e in events] == [("tokens_short", "warning", 1)]
    assert "hunter2" not in str(events)


# Certificates -----------------------------------------------------------------------------------------------------


@pytest.fixture
def security(tmp_path: Path) -> ListenerSecurity:
    cert, key = AUTHORITY.sign("service").write(tmp_path, "service")
    authority = tmp_path / "clients.crt"
    authority.write_bytes(AUTHORITY.certificate_pem)
    return ListenerSecurity(tls_cert=cert, tls_key=key, tls_client_ca=authority)


def test_a_whole_set_of_files_is_taken(security):
    assert isinstance(ServerCertificate(security).credentials(), grpc.ServerCredentials)


OTHERS = AUTHORITY.sign("another service")
DAMAGES: dict[str, tuple[str, bytes | None, str]] = {
    "no certificate": ("tls_cert", None, "--tls-cert is '{path}': No such file or directory"),
    "no key": ("tls_key", None, "--tls-key is '{path}': No such file or directory"),
    "no authorities": ("tls_client_ca", None, "--tls-client-ca is '{path}': No such file or directory"),
    "an empty certificate": ("tls_cert", b"", "--tls-cert is '{path}': not a PEM certificate"),
    "a key as certificate": ("tls_cert", OTHERS.key_pem(), "--tls-cert is '{path}': not a PEM certificate"),
    "a cut certificate": ("tls_cert", OTHERS.certificate_pem[:200], "--tls-cert is '{path}': not a PEM certificate"),
    "a certificate as key": ("tls_key", OTHERS.certificate_pem, "--tls-key is '{path}': not a PEM private key"),
    "a cut key": ("tls_key", OTHERS.key_pem()[:100], "--tls-key is '{path}': not a PEM private key"),
    "another key": ("tls_key", OTHERS.key_pem(), "the key does not belong to the certificate"),
    "a locked key": ("tls_key", OTHERS.key_pem(b"secret"), "--tls-key is '{path}': encrypted; give a key without"),
    "authorities that are none": ("tls_client_ca", b"x", "--tls-client-ca is '{path}': no PEM certificates"),
    "authorities that are a key": ("tls_client_ca", OTHERS.key_pem(), "--tls-client-ca is '{path}': no PEM cert"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_its_flag_and_name(security, damage):
    field, content, said = DAMAGES[damage]
    path: Path = getattr(security, field)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(StartError) as refused:
        ServerCertificate(security)
    assert said.format(path=path) in str(refused.value)
    assert "BEGIN" not in str(refused.value)


def test_files_that_change_are_taken_once_and_a_wrong_pair_is_never_taken(security, tmp_path):
    held = ServerCertificate(security)
    assert held._changed() is None
    AUTHORITY.sign("service").write(tmp_path, "service")
    with capture_logs() as events:
        assert isinstance(held._changed(), grpc.ServerCertificateConfiguration)
        assert held._changed() is None
    assert [e["event"] for e in events] == ["certificate_rotated"]
    replace(tmp_path / "service.key", OTHERS.key_pem())
    with capture_logs() as events:
        assert held._changed() is None
        assert held._changed() is None
    assert [(e["event"], e["log_level"]) for e in events] == [("certificate_not_rotated", "error")]
    assert "does not belong" in events[0]["reason"]
    (tmp_path / "service.key").unlink()
    assert held._changed() is None
    OTHERS.write(tmp_path, "service")
    assert isinstance(held._changed(), grpc.ServerCertificateConfiguration)


# Two ports --------------------------------------------------------------------------------------------------------


def test_an_admin_port_does_not_start_with_a_token_of_the_services_port(tokens, tmp_path):
    (tmp_path / "link").symlink_to("tokens")
    (tmp_path / "both").write_text(f"# the admin's\n{OTHER}\n{TOKEN}\n")
    for name, shared in (("link", "1 of its 1 tokens"), ("both", "1 of its 2 tokens")):
        service = Guard(ListenerSecurity(token_file=tokens))
        admin = Guard(ListenerSecurity(token_file=tmp_path / name, prefix="--admin-"))
        with pytest.raises(StartError) as refused:
            admin.keep_apart_from(service)
        said = str(refused.value)
        assert said.startswith(f"--admin-token-file: token file '{tmp_path / name}': {shared} stand in --token-file")
        assert f"'{tokens}' as well, and would open both ports" in said
        assert TOKEN not in said


def test_a_token_that_the_other_port_has_is_never_rotated_in_and_told_once(tokens, tmp_path, looking_always):
    admin_tokens = tmp_path / "admin"
    admin_tokens.write_text(OTHER)
    service = Guard(ListenerSecurity(token_file=tokens))
    admin = Guard(ListenerSecurity(token_file=admin_tokens, prefix="--admin-"))
    admin.keep_apart_from(service)
    assert service.tokens is not None
    assert admin.tokens is not None

    def opened(check: TokenCheck) -> set[str]:
        return {x for x in (TOKEN, OTHER, THIRD) if check.refusal((("authorization", f"Bearer {x}"),)) is None}

    for path, content in ((tokens, f"{THIRD}\n{OTHER}"), (admin_tokens, TOKEN)):
        with capture_logs() as events:
            replace(path, content.encode())
            for _ in range(3):
                assert (opened(service.tokens), opened(admin.tokens)) == ({TOKEN}, {OTHER})
        assert [(e["event"], e["log_level"]) for e in events] == [("tokens_not_rotated", "error")]
        assert "and would open both ports" in events[0]["reason"]
        assert not {TOKEN, OTHER, THIRD} & set(re.findall(r"[\w-]+", events[0]["reason"]))
        replace(path, {tokens: TOKEN, admin_tokens: OTHER}[path].encode())
        assert (opened(service.tokens), opened(admin.tokens)) == ({TOKEN}, {OTHER})
    # What has left the one file may come into the other; also where the files change in the other order.
    replace(tokens, THIRD.encode())
    replace(admin_tokens, TOKEN.encode())
    assert (opened(admin.tokens), opened(service.tokens)) == ({TOKEN}, {THIRD})
    with capture_logs():
        replace(tokens, TOKEN.encode())
        assert opened(service.tokens) == {THIRD}
        replace(admin_tokens, OTHER.encode())
        assert (opened(service.tokens), opened(admin.tokens)) == ({TOKEN}, {OTHER})


def test_an_admin_port_without_tokens_does_not_start_with_an_authority_of_the_services_port(security, tokens, tmp_path):
    admin = dataclasses.replace(security, prefix="--admin-", tls_client_ca=tmp_path / "admin-ca")
    service = Guard(dataclasses.replace(security, token_file=tokens))
    mine = AUTHORITY.certificate_pem
    for content in (mine, b"# ours\n" + mine.replace(b"\n", b"\r\n"), Authority.make().certificate_pem + mine):
        (tmp_path / "admin-ca").write_bytes(content)
        with pytest.raises(StartError) as refused:
            Guard(admin).keep_apart_from(service)
        assert str(refused.value) == (
            f"--admin-tls-client-ca '{tmp_path / 'admin-ca'}' and --tls-client-ca '{security.tls_client_ca}' have an "
            "authority in common: its clients could use both ports; give each port authorities of its own, or the "
            "admin port --admin-token-file"
        )
    (tmp_path / "admin-tokens").write_text(OTHER)
    Guard(dataclasses.replace(admin, token_file=tmp_path / "admin-tokens")).keep_apart_from(service)
    (tmp_path / "admin-ca").write_bytes(Authority.make().certificate_pem)
    Guard(admin).keep_apart_from(service)


def test_an_authority_that_the_other_port_has_is_never_rotated_in_and_told_once(security, tmp_path):
    own = Authority.make().certificate_pem
    (tmp_path / "admin-ca").write_bytes(own)
    service = Guard(security).certificate
    guard = Guard(dataclasses.replace(security, prefix="--admin-", tls_client_ca=tmp_path / "admin-ca"))
    guard.keep_apart_from(Guard(security))
    admin = guard.certificate
    assert service is not None
    assert admin is not None
    admin.keep_apart_from(service)
    service.keep_apart_from(admin)
    with capture_logs() as events:
        replace(tmp_path / "admin-ca", own + AUTHORITY.certificate_pem)
        assert [admin._changed(), admin._changed()] == [None, None]
        replace(Path(str(security.tls_client_ca)), own)
        assert [service._changed(), service._changed()] == [None, None]
    assert [(e["event"], e["log_level"]) for e in events] == [("certificate_not_rotated", "error")] * 2
    assert all("have an authority in common" in e["reason"] for e in events)
    # The service's port is to have the admin's from now on: when that has another, it may.
    replace(tmp_path / "admin-ca", Authority.make().certificate_pem)
    assert isinstance(admin._changed(), grpc.ServerCertificateConfiguration)
    assert isinstance(service._changed(), grpc.ServerCertificateConfiguration)


# Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "flags", "said"),
    [
        (RewardSettings, "--tls-cert a", "--tls-cert is set without --tls-key: TLS needs both"),
        (RewardSettings, "--tls-key a", "--tls-key is set without --tls-cert: TLS needs both"),
        (RewardSettings, "--tls-client-ca a", "--tls-client-ca is set without --tls-cert and --tls-key"),
        (PolicySettings, "--admin-tls-cert a", "--admin-tls-cert is set without --admin-tls-key: TLS needs both"),
        (PolicySettings, "--admin-tls-client-ca a", "--admin-tls-client-ca is set without --admin-tls-cert"),
        (PolicySettings, "--token-file a", "the admin port, which replaces the weights, would not: set --admin-token"),
        (PolicySettings, "--tls-cert a --tls-key b --tls-client-ca c", "set --admin-token-file or --admin-tls-client"),
        (PolicySettings, "--token-file a --admin-token-file a", "--token-file and --admin-token-file are both 'a'"),
        (RewardSettings, "--token-file a", "the admin port, which replaces the model, would not: set --admin-token"),
        (RewardSettings, "--token-file a --admin-token-file a", "whoever may score could use the admin port; give"),
        (RewardSettings, "--admin-tls-key a", "--admin-tls-key is set without --admin-tls-cert: TLS needs both"),
        (RewardSettings, "--drift-window 49", "--drift-window is '49': Input should be greater than or equal to 50"),
        (RewardSettings, "--drift-alpha 1", "--drift-alpha is '1': Input should be less than 1"),
        (RewardSettings, "--max-connections 0", "--max-connections is '0': Input should be greater than or equal to 1"),
        (RewardSettings, "--request-timeout-s 0", "--request-timeout-s is '0': Input should be greater than 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(settings, flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        settings.from_command_line(["--model", "m", *flags.split()])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("of", [PolicySettings, RewardSettings])
def test_the_admin_port_takes_over_the_certificate_and_never_who_may_call(of):
    flags = "--tls-cert a --tls-key b --tls-client-ca c --token-file d --admin-token-file e"
    settings = of.from_command_line(["--model", "m", *flags.split()])
    assert settings.admin_security == ListenerSecurity(
        tls_cert=Path("a"), tls_key=Path("b"), token_file=Path("e"), prefix="--admin-"
    )
    own = "--admin-tls-cert f --admin-tls-key g --admin-tls-client-ca h"
    settings = of.from_command_line(["--model", "m", *flags.split(), *own.split()])
    assert settings.admin_security == ListenerSecurity(
        tls_cert=Path("f"), tls_key=Path("g"), tls_client_ca=Path("h"), token_file=Path("e"), prefix="--admin-"
    )


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.8.8.8", "localhost", "[::1]", "::1")],
        *[(host, False) for host in ("0.0.0.0", "[::]", "10.0.0.1", "example.org", "")],
    ],
)
def test_loopback_is_told_from_the_rest(host, loopback):
    assert is_loopback(host) is loopback


PEM, TOKENS = Path("x.pem"), Path("tokens")
TLS = ListenerSecurity(tls_cert=PEM, tls_key=PEM)


@pytest.mark.parametrize(
    ("host", "security", "events"),
    [
        ("127.0.0.1", ListenerSecurity(), []),
        ("127.0.0.1", ListenerSecurity(token_file=TOKENS), []),
        ("0.0.0.0", ListenerSecurity(), ["listener_open_to_anyone"]),
        ("0.0.0.0", TLS, ["listener_open_to_anyone"]),
        ("0.0.0.0", ListenerSecurity(token_file=TOKENS), ["tokens_in_clear_text"]),
        ("0.0.0.0", ListenerSecurity(tls_cert=PEM, tls_key=PEM, token_file=TOKENS), []),
        ("0.0.0.0", ListenerSecurity(tls_cert=PEM, tls_key=PEM, tls_client_ca=PEM), []),
    ],
)
def test_what_is_open_to_a_network_is_warned_of(host, security, events):
    with capture_logs() as logged:
        warn_of_exposure(host, 50052, "the reward service", security)
    assert [event["event"] for event in logged] == events
    assert all(event["log_level"] == "warning" and "--t" in event["advice"] for event in logged)


# The client's side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tls": True, "cert_file": PEM}, "cert_file is set without key_file"),
        ({"tls": True, "key_file": PEM}, "key_file is set without cert_file"),
        ({"cert_file": PEM, "key_file": PEM}, "cert_file is set without TLS: set ca_file, or tls"),
        ({"server_name": "reward"}, "server_name is set without TLS"),
        ({"token": TOKEN, "token_file": TOKENS}, "token and token_file are both set"),
        ({"token": ""}, "token is empty, or has something else than visible ASCII"),
        ({"token": f"{TOKEN}\n"}, "token is empty, or has something else than visible ASCII"),
    ],
)
def test_client_credentials_that_do_not_go_together_are_refused_without_the_token(fields, said):
    with pytest.raises(CredentialsError, match=re.escape(said)) as refused:
        Security(**fields)
    assert TOKEN not in str(refused.value)


async def test_client_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(CredentialsError, match=r"ca_file is '.*nothing': No such file or directory"):
        RewardClient("127.0.0.1:1", security=Security(ca_file=tmp_path / "nothing"))
    (tmp_path / "text").write_text("no certificate")
    with pytest.raises(CredentialsError, match=r"ca_file is '.*text': not a PEM file"):
        RewardClient("127.0.0.1:1", security=Security(ca_file=tmp_path / "text"))


def test_a_token_is_no_part_of_what_security_looks_like_printed():
    assert TOKEN not in repr(Security(token=TOKEN))


@pytest.mark.parametrize(
    ("addresses", "warned"),
    [
        *[(name, False) for name in ("127.0.0.1:1,localhost:2", "dns:///localhost:1", "[::1]:1", "unix:/tmp/x")],
        *[(name, True) for name in ("reward:1", "dns:///quartet-reward:1", "127.0.0.1:1,10.0.0.1:1")],
    ],
)
def test_a_token_that_leaves_the_machine_in_clear_text_is_warned_of(addresses, warned, caplog):
    Security(token=TOKEN).metadata_source(addresses)
    assert ("clear text" in caplog.text) is warned
    assert TOKEN not in caplog.text
    caplog.clear()
    Security(token=TOKEN, tls=True).metadata_source(addresses)
    assert caplog.text == ""
