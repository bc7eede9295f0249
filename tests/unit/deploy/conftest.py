"""What manifests, compose file and images say, in the terms of the program: settings classes and health names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest

from quartet.policy.v1 import policy_pb2
from quartet.reference.v1 import reference_pb2
from quartet.reward.v1 import reward_pb2
from quartet.settings import Settings
from services.policy.config import PolicySettings
from services.reference.config import ReferenceSettings
from services.reward.config import RewardSettings
from services.runtime.config import ServiceSettings


@dataclass(frozen=True, kw_only=True)
class Component:
    """A service: its settings, the prefix of their environment variables, and its full gRPC name."""

    settings: type[ServiceSettings]
    env_prefix: str
    health: str

    def port(self, field: str) -> int:
        return int(self.settings.model_fields[field].default)


def _full_name(file: object, service: str) -> str:
    return str(file.services_by_name[service].full_name)  # type: ignore[attr-defined]


SERVICES = {
    "policy": Component(
        settings=PolicySettings,
        env_prefix="QUARTET_POLICY_",
        health=_full_name(policy_pb2.DESCRIPTOR, "PolicyService"),
    ),
    "reward": Component(
        settings=RewardSettings,
        env_prefix="QUARTET_REWARD_",
        health=_full_name(reward_pb2.DESCRIPTOR, "RewardService"),
    ),
    "reference": Component(
        settings=ReferenceSettings,
        env_prefix="QUARTET_REFERENCE_",
        health=_full_name(reference_pb2.DESCRIPTOR, "ReferenceService"),
    ),
}


@pytest.fixture(scope="session")
def services() -> dict[str, Component]:
    return SERVICES


@pytest.fixture
def read_settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """read_settings(cls, environment, argv): what the command makes of them, with no variable of ours besides."""

    def read(cls: type[Settings], environment: Mapping[str, str], argv: Sequence[str] = ()) -> Settings:
        for name in [name for name in os.environ if name.startswith("QUARTET_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        unknown = [
            name
            for name in environment
            if name.startswith("QUARTET_") and name.removeprefix(_prefix(cls)).lower() not in cls.model_fields
        ]
        # An unknown variable is not refused by the command: it may be another's. Here it is a mistake.
        assert not unknown, f"{unknown} are no settings of {cls.command}"
        return cls.from_command_line(list(argv))

    return read


def _prefix(cls: type[Settings]) -> str:
    return cls.command.replace("-", "_").replace(" ", "_").upper() + "_"
