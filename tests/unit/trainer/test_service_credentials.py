"""The trainer's flags become the credentials of its clients: what is shown to one port is never shown to the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from quartet.client import Security
from trainer.ppo_config import EvaluateSettings, PPOSettings

PLACES = "--model m --prompts p.jsonl --output o".split()


def test_without_flags_everything_is_plain_text():
    settings = PPOSettings.from_command_line(PLACES)
    assert settings.security == settings.admin_security == Security()


FLAGS = "--tls-ca ca --tls-cert c --tls-key k --tls-server-name n --token-file t"


@pytest.mark.parametrize("kind", [PPOSettings, EvaluateSettings])
def test_every_flag_reaches_the_clients(kind):
    settings = kind.from_command_line([*PLACES, *FLAGS.split()])
    assert settings.security == Security(
        ca_file=Path("ca"), cert_file=Path("c"), key_file=Path("k"), server_name="n", token_file=Path("t")
    )


def test_authorities_and_name_carry_over_to_the_admin_port_and_secrets_do_not():
    settings = PPOSettings.from_command_line([*PLACES, *FLAGS.split()])
    assert settings.admin_security == Security(ca_file=Path("ca"), server_name="n")
    own = "--admin-tls-ca ca2 --admin-tls-cert c2 --admin-tls-key k2 --admin-tls-server-name n2 --admin-token-file t2"
    settings = PPOSettings.from_command_line([*PLACES, *FLAGS.split(), *own.split()])
    assert settings.admin_security == Security(
        ca_file=Path("ca2"), cert_file=Path("c2"), key_file=Path("k2"), server_name="n2", token_file=Path("t2")
    )


def test_the_environment_names_them_as_well(monkeypatch):
    monkeypatch.setenv("QUARTET_TRAIN_PPO_ADMIN_TOKEN_FILE", "/run/secrets/admin")
    monkeypatch.setenv("QUARTET_TRAIN_PPO_TLS", "true")
    settings = PPOSettings.from_command_line(PLACES)
    assert settings.admin_security == Security(tls=True, token_file=Path("/run/secrets/admin"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tls --tls-cert c", "--tls-cert is set without --tls-key: a certificate needs both"),
        ("--tls --admin-tls-key k", "--admin-tls-key is set without --admin-tls-cert: a certificate needs both"),
        ("--tls-cert c --tls-key k", "--tls-cert is set without TLS: set --tls-ca, or --tls for the system's"),
        ("--tls-server-name n", "--tls-server-name is set without TLS: set --tls-ca, or --tls"),
        ("--admin-tls-server-name n", "--admin-tls-server-name is set without TLS: set --admin-tls-ca, or --tls"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        PPOSettings.from_command_line([*PLACES, *flags.split()])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_credentials_may_change_when_a_run_goes_on():
    changed = PPOSettings.from_command_line([*PLACES, "--token-file", "t", "--tls-ca", "ca", "--admin-token-file", "a"])
    assert changed.decisive == PPOSettings.from_command_line(PLACES).decisive
