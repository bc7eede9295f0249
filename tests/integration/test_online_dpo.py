"""Online DPO against live services, through the command a user types: it learns a rule, and is killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from quartet.client import WeightsClient
from quartet.fingerprint import safetensors_fingerprint
from tests.conftest import WORDS
from tests.integration.test_ppo import TRAIN, addresses, run, start_in_background, wait_for
from trainer.tracking import read_metrics


@pytest.fixture(scope="module")
def policy_folder(make_policy):
    return make_policy(seed=2, scale=0.5)


@pytest.fixture(scope="module")
def services(start_service, policy_folder):
    """A policy, a rule as its reward (the share of small letters), and the reference."""
    return (
        start_service("policy", policy_folder, "--engine", "transformers", "--deterministic", timeout_s=240),
        start_service("reward", "", "--scorer", "tests.letter_share:score"),
        start_service("reference", policy_folder, "--deterministic"),
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(3 + i % 4)) + f" {i}" for i in range(100)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def command(model: Path, prompts: Path, output: Path, services: list[str], *flags: str) -> list[str]:
    small = ["--steps", "8", "--prompts-per-step", "16", "--samples-per-prompt", "4", "--max-new-tokens", "12"]
    how = ["--learning-rate", "1e-2", "--epochs", "2", "--missing-eos", "none", "--save-every", "1"]
    watched = ["--max-eval-prompts", "16", "--held-out-fraction", "0.3", "--eval-samples", "4", "--track", "none"]
    start = [*TRAIN, "online-dpo", "--model", str(model), "--prompts", str(prompts), "--output", str(output)]
    return [*start, *services, *small, *how, *watched, *flags]


async def test_it_learns_the_rule_and_a_killed_run_resumes_to_the_same_bits(services, policy_folder, prompts, tmp_path):
    where = addresses(*services)
    before = safetensors_fingerprint(policy_folder)
    whole = run(command(policy_folder, prompts, tmp_path / "whole", where))
    assert whole.returncode == 0, whole.stderr
    records = read_metrics(tmp_path / "whole")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert {record["episodes"] for record in records} == {64 * step for step in range(1, 9)}
    assert {record["samples/failed"] for record in records} == {0}
    # The engine's log-probabilities are the trainer's own, and policy and reference begin as one.
    assert max(record["rollout/logprob_difference"] for record in records) < 1e-3
    assert records[0]["kl/sequence_mean"] == pytest.approx(0.0, abs=1e-3)
    assert all(record["pairs/count"] + record["pairs/tied"] == 16 for record in records)
    assert all(record["policy/optimiser_steps"] == 2 for record in records)
    # Held-out prompts: the intervals are apart.
    first, last = (
        json.loads((tmp_path / "whole" / f"evaluation_{name}.json").read_text()) for name in ("before", "after")
    )
    assert last["score_mean"] - last["score_ci95"] > first["score_mean"] + first["score_ci95"]
    assert last["kl_exact_mean"] > 0.05
    assert safetensors_fingerprint(policy_folder) == before
    async with WeightsClient(services[0].admin_address) as weights:
        served = await weights.get_info()
    assert served.weights_fingerprint == safetensors_fingerprint(tmp_path / "whole" / "model")
    assert "online DPO run" in (tmp_path / "whole" / "report.html").read_text()
    lineage = json.loads((tmp_path / "whole" / "model" / "lineage.json").read_text())["chain"]
    assert (lineage[0]["stage"], lineage[0]["step"]) == ("online-dpo", 8)

    trainer = start_in_background(command(policy_folder, prompts, tmp_path / "broken", where), tmp_path / "log")
    wait_for(lambda: (tmp_path / "broken" / "checkpoint-000002" / "state.json").exists(), trainer)
    trainer.kill()
    trainer.wait()
    assert not (tmp_path / "broken" / "model").exists()
    other = run(command(policy_folder, prompts, tmp_path / "broken", where, "--resume", "--beta", "0.2"))
    assert other.returncode == 2
    assert "--beta was 0.1, is 0.2" in other.stderr
    resumed = run(command(policy_folder, prompts, tmp_path / "broken", where, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (
        load_file(tmp_path / name / "checkpoint-000008" / "policy.safetensors") for name in ("broken", "whole")
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    kept = ("reward/score_mean", "kl/sequence_mean", "loss", "accuracy", "pairs/count", "chosen_logprob_mean")
    figures = [[[r[name] for name in kept] for r in read_metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert figures[0] == figures[1]


def test_a_reward_that_tells_nothing_apart_is_told_and_ends_the_run(
    services, start_service, policy_folder, prompts, tmp_path
):
    flat = start_service("reward", "", "--scorer", "tests.letter_share:nothing")
    where = addresses(services[0], flat, services[2])
    tied = run(command(policy_folder, prompts, tmp_path / "run", where, "--max-tied-steps", "2"))
    assert tied.returncode == 2
    assert "warning: step 1 teaches nothing: to each of its prompts all responses have one score (16 are tied" in (
        tied.stderr
    )
    assert "step 2 teaches nothing: " in tied.stderr
    assert "that is 2 steps in a row, --max-tied-steps is 2: see whether the reward tells answers apart" in tied.stderr
    assert "stopped after step 1 of 8; saved in" in tied.stderr
    assert [record["pairs/tied_share"] for record in read_metrics(tmp_path / "run")] == [1.0]
