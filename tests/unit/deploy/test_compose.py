"""deploy/compose.yaml against the program: settings, ports, health names, and what is exposed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.ppo_config import PPOSettings

ROOT = Path(__file__).resolve().parents[3]
GIVEN = {"QUARTET_MODELS": "/srv/models"}

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def interpolate(value: Any) -> Any:
    """Variables as Compose fills them in when only ``GIVEN`` are set."""
    if isinstance(value, dict):
        return {key: interpolate(item) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if name in GIVEN:
            return GIVEN[name]
        assert kind == "-", f"{name} has no default"
        return str(rest)

    return _VARIABLE.sub(fill, value)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return interpolate(yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text()))


def seconds(duration: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([smh])", duration).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60, "h": 3600}[unit]


def test_three_services_and_a_trainer_that_is_started_on_purpose_alone(compose):
    assert sorted(compose["services"]) == ["policy", "reference", "reward", "trainer"]
    assert [name for name, service in compose["services"].items() if "profiles" in service] == ["trainer"]
    assert compose["services"]["trainer"]["restart"] == "no"


@pytest.mark.parametrize("component", ["policy", "reward", "reference"])
def test_the_environment_is_settings_that_the_service_accepts(compose, component, services, read_settings):
    service = compose["services"][component]
    settings = read_settings(services[component].settings, service["environment"])
    assert settings.model.startswith("/models/")
    assert seconds(service["stop_grace_period"]) > settings.grace_s


@pytest.mark.parametrize("component", ["policy", "reward", "reference"])
def test_ports_are_published_on_loopback_and_never_one_of_administration(compose, component, services):
    expected = {services[component].port("port"), services[component].port("metrics_port")}
    published = [entry.rsplit(":", 2) for entry in compose["services"][component]["ports"]]
    assert all(host == "127.0.0.1" and outer == inner for host, outer, inner in published)
    assert {int(inner) for _, _, inner in published} == expected
    assert not {services[name].port("admin_port") for name in ("policy", "reward")} & expected
    assert "ports" not in compose["services"]["trainer"]


@pytest.mark.parametrize("component", ["policy", "reward", "reference"])
def test_health_is_asked_of_the_service_by_name(compose, component, services):
    check = compose["services"][component]["healthcheck"]
    address = f"127.0.0.1:{services[component].port('port')}"
    assert check["test"] == ["CMD", "python", "-m", "services.runtime.probe", address, services[component].health]
    # The probe itself gives up after three seconds; starting Python comes on top.
    assert seconds(check["timeout"]) >= 5


def test_containers_are_confined(compose):
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"] is True
        (tmp,) = service["tmpfs"]
        path, options = tmp.split(":")
        assert path == "/tmp"
        # Docker mounts noexec unless told otherwise, and then no compiled kernel loads.
        assert "exec" in options.split(",")
        assert "/srv/models:/models:ro" in service["volumes"]


def test_reward_and_reference_share_no_network_with_the_policy(compose):
    networks = {name: set(service["networks"]) for name, service in compose["services"].items()}
    assert not networks["policy"] & (networks["reward"] | networks["reference"])
    assert all(networks["trainer"] & networks[name] for name in ("policy", "reward", "reference"))
    assert set(compose["networks"]) == set.union(*networks.values())


def test_images_are_targets_of_the_dockerfile(compose):
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    arguments = set(re.findall(r"^ARG (\w+)", text, flags=re.MULTILINE))
    for name, service in compose["services"].items():
        build = service["build"]
        assert build["target"] == name
        assert re.search(rf"^FROM \S+ AS {name}$", text, flags=re.MULTILINE)
        assert set(build["args"]) <= arguments
        folder = (ROOT / "deploy" / build["context"]).resolve()
        assert (folder / build["dockerfile"]).samefile(ROOT / "deploy" / "Dockerfile")


def test_the_trainer_waits_for_ready_services_and_goes_on_from_its_last_checkpoint(compose, services, read_settings):
    trainer = compose["services"]["trainer"]
    assert trainer["depends_on"] == {name: {"condition": "service_healthy"} for name in services}
    assert trainer["command"][0] == "ppo"
    settings = read_settings(PPOSettings, trainer["environment"], trainer["command"][1:])
    assert settings.resume is True
    addresses = {name: f"{name}:{service.port('port')}" for name, service in services.items()}
    assert {name: getattr(settings, name) for name in addresses} == addresses
    assert settings.policy_admin == (f"policy:{services['policy'].port('admin_port')}",)
    policy, reference = (compose["services"][name]["environment"] for name in ("policy", "reference"))
    # PPO starts from the weights that the policy service has loaded, and is held near those of the reference.
    assert settings.model == policy["QUARTET_POLICY_MODEL"] == reference["QUARTET_REFERENCE_MODEL"]
    for path in (settings.model, settings.critic, *settings.prompts, *settings.eval_prompts):
        assert str(path).startswith("/models/")
    assert str(settings.output).startswith("/runs/")
    assert "runs:/runs" in trainer["volumes"]
