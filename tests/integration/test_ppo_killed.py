"""PPO against live services: the trainer and each of the services killed, and what a run goes on to after it.

The services are deterministic, so a run that is killed or waits for a service ends with the bits of one that nothing
happened to.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from quartet.model_folder import write_metadata
from tests.conftest import WORDS, LiveService
from tests.kills import Launcher, Run, Unbroken, differences, survives_kills, unbroken
from trainer.tracking import read_metrics

StartService = Callable[..., LiveService]


@dataclass(kw_only=True)
class House:
    """The three services, which may be killed and come back on their ports, and what runs against them."""

    start_service: StartService
    launcher: Launcher
    models: dict[str, Path]
    prompts: Path
    live: dict[str, LiveService]

    def open(self, name: str) -> None:
        """Starts a service, on its former ports if it was there before."""
        engine = ["--engine", "transformers"] if name == "policy" else []
        self.live[name] = self.start_service(
            name, self.models[name], "--deterministic", *engine, like=self.live.get(name), timeout_s=240
        )

    def kill(self, name: str) -> None:
        self.live[name].process.kill()
        self.live[name].process.wait()

    def start(self, output: Path, resume: bool, *flags: str) -> Run:
        policy, reward, reference = (self.live[name] for name in ("policy", "reward", "reference"))
        return self.launcher.start(
            [
                *("ppo", "--model", str(self.models["policy"]), "--prompts", str(self.prompts)),
                *("--output", str(output), "--policy", policy.address, "--policy-admin", policy.admin_address),
                *("--reward", reward.address, "--reference", reference.address, "--steps", "6", "--minibatches", "2"),
                *("--prompts-per-step", "16", "--max-new-tokens", "12", "--max-eval-prompts", "4"),
                *("--learning-rate", "1e-3", "--critic-learning-rate", "1e-3", "--kl", "adaptive", "--scale-scores"),
                *("--save-every", "1", "--eval-every", "2", *flags, *(["--resume"] if resume else [])),
            ],
            output.with_name(f"{output.name}.log"),
        )


@pytest.fixture(scope="module")
def shared_house(
    start_service: StartService,
    make_policy: Callable[..., Path],
    make_reward_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    policy, reward = make_policy(scale=0.5), make_reward_model()
    write_metadata(reward, kind="reward", append_eos=True, normalisation={"mean": 0.0, "std": 1.0, "count": 10})
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(3 + i % 4)) + f" {i}" for i in range(100)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    with Launcher() as launcher:
        models = {"policy": policy, "reward": reward, "reference": policy}
        made = House(start_service=start_service, launcher=launcher, models=models, prompts=prompts, live={})
        for name in models:
            made.open(name)
        yield made


@pytest.fixture
def house(shared_house: House) -> House:
    """Services that another test started anew ended with it."""
    for name, service in shared_house.live.items():
        if service.process.poll() is not None:
            shared_house.open(name)
    return shared_house


@pytest.fixture(scope="module")
def whole(shared_house: House, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Unbroken]:
    """whole(1) is a run with staleness 1 that nothing happened to, the same one in every test."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def of(staleness: int) -> Unbroken:
        return unbroken(functools.partial(_start, shared_house, staleness), folder / str(staleness))

    return of


def _start(house: House, staleness: int, output: Path, resume: bool) -> Run:
    return house.start(output, resume, "--staleness", str(staleness))


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_the_unbroken_one(
    staleness: int, house: House, whole: Callable[[int], Unbroken], tmp_path: Path
) -> None:
    """Historical: NeMo-RL#3171, the optimiser begun anew on resume; OpenRLHF and verl, the price of KL."""
    survives_kills(functools.partial(_start, house, staleness), tmp_path, whole(staleness), seed=staleness)
    records = read_metrics(whole(staleness).output)
    # The adaptive price moved in every step, so it was restored.
    assert len({record["kl/beta"] for record in records}) == len(records) == 6
    assert [record["weights/staleness"] for record in records] == [min(step, staleness) for step in range(6)]
    # From the second step on, samples that are ahead are of an older policy, which the weights make up for.
    for step, record in enumerate(records):
        assert (record["rollout/ess"] < 0.9999) == (staleness > 0 and step > 0)
    first = records[0]["weights/version"]
    expected = [first + max(0, step - staleness) for step in range(6)]
    assert [record["weights/version"] for record in records] == expected


def test_a_run_does_not_go_on_under_other_settings_services_or_prompts(
    house: House, whole: Callable[[int], Unbroken], make_reward_model: Callable[..., Path]
) -> None:
    output = whole(0).output
    exchanged = house.start_service("reward", make_reward_model(seed=9))
    rows = house.prompts.read_text()
    for flags, changed, messages in (
        (["--lam", "0.9"], rows, ["--lam was 0.95, is 0.9"]),
        (
            ["--reward", exchanged.address],
            rows,
            [
                "checkpoint-000006 was written with other models behind the services (reward: was ",
                "normalisation: was {'mean': 0.0, 'std': 1.0, 'count': 10}, is None",
            ],
        ),
        ([], rows.replace("hello", "thanks"), ["was written with other rows than --prompts or --eval-prompts holds"]),
    ):
        house.prompts.write_text(changed)
        refused = house.start(output, True, "--staleness", "0", *flags)
        assert refused.wait() == 2
        house.prompts.write_text(rows)
        for message in messages:
            assert message in refused.text()


@pytest.mark.slow
def test_services_killed_amid_a_run_are_waited_for_and_change_no_bit(
    house: House, whole: Callable[[int], Unbroken], tmp_path: Path
) -> None:
    run = _start(house, 1, tmp_path / "run", False)
    for step, name in ((1, "reference"), (2, "policy"), (3, "reward")):
        _wait_for_step(run, tmp_path / "run", step)
        house.kill(name)
        house.open(name)
    assert run.wait() == 0, run.text()[-3000:]
    assert differences(tmp_path / "run", whole(1).output) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "title"),
    [("policy", "policy service"), ("reward", "reward service"), ("reference", "reference service")],
)
def test_a_service_that_stays_away_ends_the_run_which_goes_on_when_it_is_back(
    name: str, title: str, house: House, whole: Callable[[int], Unbroken], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = house.start(output, False, "--staleness", "1", "--ready-timeout-s", "2")
    _wait_for_step(run, output, 2)
    house.kill(name)
    try:
        assert run.wait() == 2, run.text()[-3000:]
    finally:
        house.open(name)
    told = run.text()
    assert f"quartet-train ppo: {title}" in told or "quartet-train ppo: policy weights service" in told
    assert house.live[name].address in told or house.live[name].admin_address in told
    assert "give the same command again with --resume" in told
    assert "Traceback" not in told
    resumed = _start(house, 1, output, True)
    assert resumed.wait() == 0, resumed.text()[-3000:]
    assert differences(output, whole(1).output) == []


def _wait_for_step(run: Run, output: Path, step: int) -> None:
    while not (output / "metrics.jsonl").exists() or len(read_metrics(output)) < step:
        assert run.poll() is None, run.text()[-3000:]
        time.sleep(0.005)
