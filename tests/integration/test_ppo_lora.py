"""PPO of an adapter against live services: the adapter alone goes over the wire, and the engine samples with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quartet.client import AdapterClient, Completion, PolicyClient, Sampling, WeightsClient
from quartet.client.adapters import read_adapter
from quartet.fingerprint import adapter_fingerprint, safetensors_fingerprint, tokenizer_fingerprint
from quartet.model_folder import write_metadata
from tests.conftest import WORDS, LiveService
from tests.lora import Lora, furthest, merged_model
from trainer.tracking import read_metrics

pytest.importorskip("peft")

ROOM = ["--max-adapters", "4", "--max-lora-rank", "8"]


@pytest.fixture(scope="module")
def folders(make_policy, make_reward_model) -> tuple[Path, Path]:
    """Policy and reward model of one tokenizer."""
    reward = make_reward_model()
    write_metadata(reward, kind="reward", append_eos=True, normalisation={"mean": 0.0, "std": 1.0, "count": 10})
    return make_policy(scale=0.5), reward


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(3 + i % 4)) + f" {i}" for i in range(60)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def judges(start_service, folders) -> tuple[LiveService, LiveService]:
    """Reward and reference service."""
    model, reward = folders
    return start_service("reward", reward, "--deterministic"), start_service("reference", model, "--deterministic")


@pytest.fixture(scope="module")
def policy(start_service, folders) -> LiveService:
    """The policy service, with room for adapters."""
    flags = ["--engine", "transformers", "--deterministic", "--log-level", "debug", *ROOM]
    service: LiveService = start_service("policy", folders[0], *flags)
    return service


def ppo(
    model: Path, prompts: Path, output: Path, policy: LiveService, judges: tuple[LiveService, ...], *flags: str
) -> list[str]:
    reward, reference = judges
    where = ["--policy", policy.address, "--policy-admin", policy.admin_address]
    where += ["--reward", reward.address, "--reference", reference.address]
    small = ["--prompts-per-step", "16", "--max-new-tokens", "16", "--minibatches", "2", "--max-eval-prompts", "6"]
    adapter = ["--lora-rank", "4", "--lora-alpha", "8", "--learning-rate", "1e-2", "--critic-learning-rate", "1e-2"]
    command = [sys.executable, "-m", "trainer", "ppo", "--model", str(model), "--prompts", str(prompts)]
    return [*command, "--output", str(output), *where, *small, *adapter, "--track", "none", *flags]


def run(command: list[str], timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def saved_adapter(folder: Path) -> tuple[Lora, str]:
    """What peft saved, and the fingerprint that the service has of it."""
    config, tensors = read_adapter(folder)
    fingerprint = adapter_fingerprint([tensor.digest() for tensor in tensors], **vars(config))
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return Lora(content, load_file(folder / "adapter_model.safetensors")), fingerprint


def events(service: LiveService, since: int = 0) -> list[dict[str, Any]]:
    lines = service.log.read_text().splitlines()[since:]
    return [json.loads(line) for line in lines if line.startswith("{")]


async def require_served(policy: LiveService, name: str, lora: Lora, base: Path, tokenizer: Any) -> None:
    """What the service samples with the adapter is what the merged model says in float64."""
    prompts = [[5, 6, 7 + i] for i in range(6)]
    async with PolicyClient(policy.address) as client:
        fingerprint = tokenizer_fingerprint(tokenizer)
        sampling = Sampling(max_new_tokens=12, seed=3)
        stream = client.generate(prompts, sampling, tokenizer_fingerprint=fingerprint, adapter=name)
        found = [item async for item in stream if isinstance(item, Completion)]
    assert len(found) == 6
    for item in found:
        assert furthest(base, lora, prompts[item.prompt_index], item.token_ids, item.logprobs) < 1e-4
        assert furthest(base, None, prompts[item.prompt_index], item.token_ids, item.logprobs) > 1e-3


def require_rounding(records: list[dict[str, float]]) -> None:
    """After every publication the engine's distribution is the trainer's own."""
    assert all(0 < record["rollout/logprob_max_abs_difference"] < 1e-4 for record in records)
    assert all(abs(record["rollout/kl_old"]) < 1e-4 for record in records)
    assert all(abs(record["rollout/importance_weight_mean"] - 1) < 1e-4 for record in records)
    assert all(record["policy/first_ratio_max_abs_log"] < 1e-4 for record in records)
    assert records[0]["kl/sequence_mean"] == pytest.approx(0.0, abs=1e-4)  # The adapter begins as nothing.
    assert records[-1]["kl/sequence_mean"] > 1e-3
    assert [record["weights/version"] for record in records] == list(range(len(records)))


async def test_a_run_trains_publishes_and_keeps_its_adapter_alone(
    policy, judges, folders, prompts, tmp_path, tokenizer
):
    model, _ = folders
    base = safetensors_fingerprint(model)
    output = tmp_path / "run"
    done = run(ppo(model, prompts, output, policy, judges, "--steps", "4", "--eval-every", "1", "--save-every", "2"))
    assert done.returncode == 0, done.stderr
    require_rounding(read_metrics(output))
    # The weights were never replaced; five versions of the adapter were, each taken out when the next was there.
    async with WeightsClient(policy.admin_address) as weights, AdapterClient(policy.admin_address) as adapters:
        served = await weights.get_info()
        assert (served.weights_version, served.weights_fingerprint) == (0, base)
        listed = (await adapters.list_adapters()).adapters
        (left,) = [info for info in listed if info.name.startswith("run-")]
    kinds = ("adapter_loaded", "adapter_unloaded")
    happened = [e for e in events(policy) if e["event"] in kinds and e["adapter"].startswith("run-")]
    names = [event["adapter"] for event in happened if event["event"] == "adapter_loaded"]
    assert [name.rpartition("@")[2] for name in names] == ["0", "1", "2", "3", "4"]
    assert [event["adapter"] for event in happened if event["event"] == "adapter_unloaded"] == names[:-1]
    assert left.name == names[-1]
    assert f"in the policy service {left.name}" in done.stdout
    # What serves is what is exported: as peft has it, and merged, which is W + s B A.
    lora, fingerprint = saved_adapter(output / "adapter")
    assert left.fingerprint == fingerprint
    await require_served(policy, left.name, lora, model, tokenizer)
    exact = merged_model(model, lora).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    assert exported.keys() == exact.keys()
    assert all(float((tensor.double() - exact[name]).abs().max()) < 1e-6 for name, tensor in exported.items())
    assert safetensors_fingerprint(output / "model") != base
    # Checkpoints hold what is trained; the best model is an adapter, too.
    for checkpoint in output.glob("checkpoint-*"):
        assert all(".lora_" in name for name in load_file(checkpoint / "policy.safetensors"))
        critic = load_file(checkpoint / "critic.safetensors")
        assert {name for name in critic if ".lora_" not in name} == {"head.weight", "head.bias"}
        kept = torch.load(checkpoint / "optimiser-policy.pt", weights_only=True)
        assert len(kept["state"]) == 2 * 2 * 7
    for best in output.glob("best-*"):
        step = int(best.name.removeprefix("best-"))
        assert saved_adapter(best)[1].startswith(names[step].partition(".")[2].partition("@")[0])
        lineage = json.loads((best / "lineage.json").read_text())["chain"][0]
        assert (lineage["step"], lineage["parent"]["weights"]) == (step, base)
    # KL over the whole vocabulary is to what is below the adapter, and near to what sampling says of it.
    after = json.loads((output / "evaluation_after.json").read_text())
    assert after["weights_version"] == 4
    before = json.loads((output / "evaluation_before.json").read_text())
    assert before["kl_exact_mean"] == pytest.approx(0.0, abs=1e-4)
    assert abs(after["kl_exact_mean"] - after["kl_sequence_mean"]) < after["kl_ci95"] + after["kl_exact_ci95"]
    assert after["kl_exact_mean"] > 1e-3


@pytest.mark.slow
async def test_vllm_samples_with_each_version_of_the_adapter(
    start_service, judges, folders, prompts, tmp_path, tokenizer
):
    pytest.importorskip("vllm")
    model, _ = folders
    service = start_service("policy", model, "--engine", "vllm", "--kv-cache-gib", "1", *ROOM, timeout_s=240)
    done = run(ppo(model, prompts, tmp_path / "run", service, judges, "--steps", "3", "--advantage", "reinforce++"))
    assert done.returncode == 0, done.stderr
    require_rounding(read_metrics(tmp_path / "run"))
    lora, fingerprint = saved_adapter(tmp_path / "run" / "adapter")
    async with AdapterClient(service.admin_address) as adapters:
        (left,) = (await adapters.list_adapters()).adapters
    assert left.fingerprint == fingerprint
    await require_served(service, left.name, lora, model, tokenizer)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits_and_takes_out_what_it_left_behind(
    policy, judges, folders, prompts, tmp_path
):
    model, _ = folders
    flags = ["--steps", "5", "--save-every", "1", "--staleness", "1", "--kl", "adaptive", "--max-eval-prompts", "4"]
    whole = run(ppo(model, prompts, tmp_path / "whole", policy, judges, *flags))
    assert whole.returncode == 0, whole.stderr
    command = ppo(model, prompts, tmp_path / "broken", policy, judges, *flags)
    with (tmp_path / "log").open("w") as sink:
        trainer = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    end_s = time.monotonic() + 120
    while not (tmp_path / "broken" / "checkpoint-000002" / "state.json").exists():
        assert trainer.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end_s
        time.sleep(0.002)
    trainer.kill()
    trainer.wait()
    mark = len(policy.log.read_text().splitlines())
    resumed = run([*command, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    for file in ("policy.safetensors", "critic.safetensors"):
        ours, theirs = (load_file(tmp_path / name / "checkpoint-000005" / file) for name in ("broken", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    stale = [record["weights/staleness"] for record in read_metrics(tmp_path / "broken")]
    assert stale == [0, 1, 1, 1, 1]
    # As many were taken out as were loaded, and the one that the killed run had.
    happened = [event["event"] for event in events(policy, mark)]
    assert happened.count("adapter_unloaded") >= happened.count("adapter_loaded") - 1
    names = [event["adapter"] for event in events(policy) if event["event"] == "adapter_loaded"]
    gone = [event["adapter"] for event in events(policy) if event["event"] == "adapter_unloaded"]
    own = {name for name in names if name.startswith("broken-")}
    assert len(own - set(gone)) == 1


def test_services_that_an_adapter_does_not_belong_to_are_refused_by_name(
    policy, judges, start_service, make_policy, folders, prompts, tmp_path
):
    """Historical: trl#495, an SFT model that was an adapter, with the base beneath it as the reference."""
    model, _ = folders
    reward, _ = judges
    other = make_policy(seed=7, scale=0.5)
    sft = ppo(other, prompts, tmp_path / "a", policy, judges)  # The reference has what the SFT model began as.
    done = run(sft)
    assert done.returncode == 2
    assert "the reference service hosts" in done.stderr
    assert "whose weights are not those of --model" in done.stderr
    assert "least of all the base of that model" in done.stderr
    own_reference = start_service("reference", other)
    done = run(ppo(other, prompts, tmp_path / "b", policy, (reward, own_reference)))
    assert done.returncode == 2
    assert "and the adapter that is trained belongs to those of --model" in done.stderr
    without = start_service("policy", model, "--engine", "transformers")
    done = run(ppo(model, prompts, tmp_path / "c", without, judges))
    assert done.returncode == 2
    assert "LoRA is off: start it with --max-adapters 2 --max-lora-rank 4" in done.stderr
    done = run(ppo(model, prompts, tmp_path / "d", policy, judges, "--lora-rank", "16"))
    assert (
        "adapters may have rank 8 (--max-lora-rank): start it with --max-adapters 2 --max-lora-rank 16" in done.stderr
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    done = run(ppo(adapter, prompts, tmp_path / "e", policy, judges))
    assert "the folder holds a LoRA adapter (adapter_config.json), not a whole model" in done.stderr
    assert not list(tmp_path.glob("*/model"))
