"""PPO runs against live services, through the commands a user types: trained, watched, refused."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from quartet.client import RewardClient, ScoreItem, WeightsClient
from quartet.fingerprint import safetensors_fingerprint
from quartet.model_folder import write_metadata
from tests.conftest import WORDS, LiveService, free_port, save_stock_tokenizer, train_tokenizer
from trainer.tracking import read_metrics

TRAIN = [sys.executable, "-m", "trainer"]


@pytest.fixture(scope="module")
def folders(make_policy, make_reward_model):
    """Policy and reward model of one tokenizer."""
    reward = make_reward_model()
    write_metadata(reward, kind="reward", append_eos=True, normalisation={"mean": 0.0, "std": 1.0, "count": 10})
    return make_policy(scale=0.5), reward


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """100 short prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(3 + i % 4)) + f" {i}" for i in range(100)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def start_three(start_service, folders):
    """start_three("--deterministic") starts policy (transformers engine), reward and reference."""

    def start(*flags: str, engine: str = "transformers") -> tuple[LiveService, LiveService, LiveService]:
        policy, reward = folders
        return (
            start_service("policy", policy, "--engine", engine, *flags, timeout_s=240),
            start_service("reward", reward, *flags),
            start_service("reference", policy, *flags),
        )

    return start


def addresses(policy: LiveService, reward: LiveService, reference: LiveService) -> list[str]:
    return [
        *("--policy", policy.address, "--policy-admin", policy.admin_address),
        *("--reward", reward.address, "--reference", reference.address),
    ]


def ppo(model: Path, prompts: Path, output: Path, services: list[str], *flags: str) -> list[str]:
    small = ["--steps", "4", "--prompts-per-step", "16", "--max-new-tokens", "16", "--minibatches", "2"]
    rates = ["--learning-rate", "1e-3", "--critic-learning-rate", "1e-3"]
    command = [*TRAIN, "ppo", "--model", str(model), "--prompts", str(prompts), "--output", str(output)]
    return [*command, *services, *small, *rates, *flags]


def run(command: list[str], timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def start_in_background(command: list[str], log: Path) -> subprocess.Popen[str]:
    def as_from_a_terminal() -> None:
        # A shell's background job ignores SIGINT, and hands that on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with log.open("w") as sink:
        return subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, text=True, preexec_fn=as_from_a_terminal
        )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def calls_in_flight(service: LiveService, name: str) -> float:
    with urllib.request.urlopen(f"http://{service.metrics_address}/metrics", timeout=5) as reply:
        for line in reply.read().decode().splitlines():
            if line.startswith(f"quartet_{name}_calls_in_flight "):
                return float(line.split()[1])
    raise AssertionError("the metric is gone")


async def test_a_run_trains_publishes_exports_and_reports(start_three, folders, prompts, tmp_path):
    model, _ = folders
    services = start_three()
    before = {folder: safetensors_fingerprint(folder) for folder in folders}
    # Row 8: at a temperature other than 1, engine, reference and update must divide by the same one.
    cooler = ["--temperature", "0.7"]
    done = run(ppo(model, prompts, tmp_path / "run", addresses(*services), *cooler))
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    # The live engine's log-probabilities are the trainer's own, after every weight update.
    assert 0 < max(record["rollout/logprob_max_abs_difference"] for record in records) < 1e-4
    # Row 12: at the first forward pass of an update the ratio to the trainer's own old log-probabilities is 1.
    assert max(record["policy/first_ratio_max_abs_log"] for record in records) < 1e-4
    assert max(abs(record["rollout/importance_weight_mean"] - 1) for record in records) < 1e-4
    assert min(record["rollout/ess"] for record in records) > 0.9999
    assert records[0]["kl/sequence_mean"] == pytest.approx(0.0, abs=1e-4)  # The policy starts as its reference.
    assert max(abs(record["rollout/kl_old"]) for record in records) < 1e-4
    assert [record["episodes"] for record in records] == [16, 32, 48, 64]
    assert [record["weights/version"] for record in records] == [0, 1, 2, 3]
    assert [record["learning_rate"] for record in records] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    # 4 epochs of 2 minibatches.
    assert {record["policy/optimiser_steps"] for record in records} == {8}
    # Row 22, and what is exported is what serves.
    assert {folder: safetensors_fingerprint(folder) for folder in folders} == before
    async with WeightsClient(services[0].admin_address) as weights:
        served = await weights.get_info()
    assert served.weights_version == 4
    assert served.weights_fingerprint == safetensors_fingerprint(tmp_path / "run" / "model") != before[model]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert "held-out reward: before" in done.stdout
    # The logs of all services tell the requests of a step by their ids.
    for service, method in zip(services, ("Generate", "Score", "LogProbs"), strict=True):
        lines = [line for line in service.log.read_text().splitlines() if '"request_id": "run.step2.' in line]
        assert method in {json.loads(line).get("method") for line in lines}
    # The same weights, prompts and seeds give the same answers: paired, nothing has changed.
    where = addresses(*services)
    del where[2:4]  # Evaluation publishes nothing, so it needs no admin address.
    evaluation = [*TRAIN, "evaluate", "--model", str(model), "--prompts", str(prompts), *where]
    for name, more in (("first", []), ("second", ["--against", str(tmp_path / "first.json")])):
        found = run([*evaluation, "--max-new-tokens", "16", *cooler, "--output", str(tmp_path / f"{name}.json"), *more])
        assert found.returncode == 0, found.stderr
    assert "weights version 4: reward" in found.stdout
    assert "reward 0.000 [" in found.stdout
    again = run(ppo(model, prompts, tmp_path / "run", addresses(*services)))
    assert again.returncode == 2
    assert "it already holds a run; go on with it by --resume, or choose another" in again.stderr


def test_a_run_without_a_critic_loads_and_keeps_none(
    start_three, start_service, make_reward_model, folders, prompts, tmp_path
):
    model, _ = folders
    policy, _, reference = start_three()
    # A reward model of other tokens: a critic could not start from it.
    reward = start_service("reward", make_reward_model(seed=5, save_tokenizer=train_tokenizer(270)))
    flags = ["--advantage", "grpo", "--samples-per-prompt", "2", "--steps", "2", "--max-eval-prompts", "4"]
    done = run(ppo(model, prompts, tmp_path / "run", addresses(policy, reward, reference), *flags))
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "run")
    assert [record["episodes"] for record in records] == [32, 64]
    assert all(0 <= record["advantage/zero_share"] < 0.5 for record in records)
    assert not [name for name in records[0] if name.startswith("value/")]
    kept = {file.name for file in (tmp_path / "run" / "checkpoint-000002").iterdir()}
    assert "policy.safetensors" in kept
    assert not [name for name in kept if "critic" in name]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("pad", [None, "<eos>"])
async def test_a_stock_model_without_a_pad_token_of_its_own_is_trained_and_published(
    pad, start_service, make_policy, make_reward_model, prompts, tmp_path
):
    model, reward_model = make_policy(scale=0.5, with_tokenizer=False), make_reward_model()
    write_metadata(reward_model, kind="reward", append_eos=True)
    for folder in (model, reward_model):
        save_stock_tokenizer(folder, pad)
    policy = start_service("policy", model, "--engine", "transformers")
    services = addresses(policy, start_service("reward", reward_model), start_service("reference", model))
    # The critic starts from the reward model, which takes the policy's tokens.
    done = run(ppo(model, prompts, tmp_path / "run", services, "--steps", "2", "--max-eval-prompts", "4"))
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "run")
    assert [record["episodes"] for record in records] == [16, 32]
    assert max(record["rollout/logprob_max_abs_difference"] for record in records) < 1e-4
    exported = tmp_path / "run" / "model"
    async with WeightsClient(policy.admin_address) as weights:
        served = await weights.get_info()
    assert served.weights_fingerprint == safetensors_fingerprint(exported) != safetensors_fingerprint(model)
    # What was exported is hosted as it is: the same weights of the same tokenizer.
    hosted = start_service("policy", exported, "--engine", "transformers")
    async with WeightsClient(hosted.admin_address) as weights:
        again = await weights.get_info()
    assert again.weights_fingerprint == served.weights_fingerprint
    assert again.tokenizer_fingerprint == served.tokenizer_fingerprint


@pytest.mark.slow
def test_a_step_is_one_trace_from_its_phases_to_the_services(start_three, folders, prompts, tmp_path):
    from tests.otlp_collector import inside, start_collector  # Skips without the extra otel.

    model, _ = folders
    with start_collector() as (collector, endpoint):
        services = start_three()
        flags = ["--otlp-endpoint", endpoint, "--steps", "2", "--max-eval-prompts", "4"]
        done = run(ppo(model, prompts, tmp_path / "run", addresses(*services), *flags))
        assert done.returncode == 0, done.stderr
        spans = [span for _, span in collector.spans()]
    steps = [span for span in spans if span.name == "step"]
    assert [{x.key: x.value.int_value for x in step.attributes}["quartet.step"] for step in steps] == [1, 2]
    assert len({step.trace_id for step in steps}) == 2
    for step in steps:
        assert not step.parent_span_id
        phases = {span.name: span for span in spans if inside(span, step)}
        assert list(phases) == ["rollout", "learn", "publish"]
        assert [span.name for span in spans if inside(span, phases["learn"])] == ["forward", "update"]
        asked = {span.name.rpartition("/")[2] for span in spans if inside(span, phases["rollout"])}
        assert asked >= {"Generate", "Score", "LogProbs"}
        assert "UpdateWeights" in {span.name.rpartition("/")[2] for span in spans if inside(span, phases["publish"])}


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
async def test_a_run_outlives_the_death_of_reward_and_policy_service(
    engine, start_three, start_service, folders, prompts, tmp_path
):
    if engine == "vllm":
        pytest.importorskip("vllm")
    model, reward_folder = folders
    policy, reward, reference = start_three("--log-level", "debug", engine=engine)
    # Long responses, so that a step lasts long enough to be hit in its middle.
    flags = ["--prompts-per-step", "64", "--max-new-tokens", "100", "--steps", "6", "--missing-eos", "none"]
    command = ppo(model, prompts, tmp_path / "run", addresses(policy, reward, reference), *flags)
    trainer = start_in_background(command, tmp_path / "log")

    def steps() -> int:
        return len(read_metrics(tmp_path / "run")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0

    wait_for(lambda: steps() >= 1, trainer)
    wait_for(lambda: calls_in_flight(reward, "reward") > 0, trainer)
    reward.process.kill()
    reward.process.wait()
    reward = start_service("reward", reward_folder, like=reward)
    after_reward = steps()
    wait_for(lambda: steps() > after_reward, trainer)
    wait_for(lambda: calls_in_flight(policy, "policy") > 0, trainer)
    policy.process.kill()
    policy.process.wait()
    killed_at = steps()
    policy = start_service("policy", model, "--engine", engine, "--log-level", "debug", like=policy, timeout_s=240)
    assert trainer.wait(timeout=240) == 0, (tmp_path / "log").read_text()[-3000:]

    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for record in records for value in record.values())
    # Nothing failed, nothing was made up: every step learned from all 64 responses, of the right version.
    assert [record["episodes"] for record in records] == [64 * step for step in range(1, 7)]
    assert {record["samples/failed"] for record in records} == {0}
    assert all(record["rollout/ess"] > 0.9999 for record in records)
    assert all(record["policy/first_ratio_max_abs_log"] < 1e-4 for record in records)
    assert all(0 < record["rollout/logprob_max_abs_difference"] < 1e-4 for record in records)
    assert killed_at < 6
    # The restarted policy got the current weights before it generated anything for the run.
    events = [json.loads(line) for line in policy.log.read_text().splitlines() if line.startswith("{")]
    what = [e["event"] if e["event"] == "weights_updated" else e.get("method") for e in events]
    assert "weights_updated" in what
    assert what.index("weights_updated") < what.index("Generate")
    async with WeightsClient(policy.admin_address) as weights:
        served = await weights.get_info()
    assert served.weights_fingerprint == safetensors_fingerprint(tmp_path / "run" / "model")
    assert served.weights_version >= 6


def test_ctrl_c_saves_and_says_how_to_go_on(start_three, folders, prompts, tmp_path):
    model, _ = folders
    services = addresses(*start_three())
    command = ppo(model, prompts, tmp_path / "run", services, "--steps", "200", "--save-every", "0")
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, trainer)  # A step is done.
    trainer.send_signal(signal.SIGINT)
    _, stderr = trainer.communicate(timeout=60)
    assert trainer.returncode == 130
    done = len(read_metrics(tmp_path / "run"))
    assert f"stopped after step {done} of 200, as asked" in stderr
    assert "give the same command again with --resume" in stderr
    assert (tmp_path / "run" / f"checkpoint-{done:06d}" / "state.json").exists()


def test_a_run_is_watched_on_its_held_out_prompts(
    start_three, start_service, folders, make_reward_model, prompts, tmp_path
):
    model, reward = folders
    services = start_three()
    gold = make_reward_model(seed=31, save_tokenizer=train_tokenizer(270))  # Reads text: the same words, other ids.
    judge = start_service("reward", gold)
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text(
        "".join(json.dumps({"prompt": f"hello {i}", "completion": " thanks"}) + "\n" for i in range(9))
    )
    output = tmp_path / "run"
    watched = ["--judge", judge.address, "--monitor-demonstrations", str(demonstrations), "--eval-every", "2"]
    command = ppo(model, prompts, output, addresses(*services), *watched, "--eval-samples", "2", "--track", "none")
    done = run([*command, "--alarm-kl", "1e-6"])
    assert done.returncode == 0, done.stderr
    before, between, after = (
        json.loads((output / name).read_text())
        for name in ("evaluation_before.json", "evaluations/000002.json", "evaluation_after.json")
    )
    # The policy starts as its reference, and leaves it; what sampling says of it is near.
    assert before["kl_exact_mean"] == pytest.approx(0.0, abs=1e-4)
    assert after["kl_exact_mean"] > 1e-3
    for found in (between, after):
        assert abs(found["kl_exact_mean"] - found["kl_sequence_mean"]) < found["kl_ci95"] + found["kl_exact_ci95"]
        assert found["demonstration_perplexity"] != before["demonstration_perplexity"]
    # Two answers a prompt, so there is a correlation within prompts.
    assert (before["n"], before["prompts"]) == (20, 10)
    assert -1 <= before["length_correlation_within"] <= 1
    # The exact entropy of the trainer's own policy is what the engine's samples show on average.
    assert before["entropy_mean"] == pytest.approx(math.log(300), abs=1.0)
    records = read_metrics(output)
    assert records[1]["eval/judge_mean"] == between["judge_mean"]
    assert (records[1]["alarm/kl"], records[1]["alarm/count"] >= 1) == (1.0, True)
    assert "eval/judge_mean" not in records[0]
    assert "alarm: The KL to the reference: " in done.stderr
    assert "in the held-out evaluation at step 2, above 1e-6" in done.stderr
    assert f"judge {before['judge_mean']:.3f} +- " in done.stdout
    figures = json.loads((output / "report.json").read_text())
    assert "evaluation_after/kl_exact_mean" in [alarm["key"] for alarm in figures["alarms"]]
    assert figures["settings"]["services.judge.weights"] == safetensors_fingerprint(gold)
    lineage = json.loads((output / "model" / "lineage.json").read_text())["chain"]
    assert lineage[0]["judges"]["reward"]["weights"] == safetensors_fingerprint(reward)
    assert (lineage[0]["step"], lineage[0]["parent"]["weights"]) == (4, safetensors_fingerprint(model))
    # The judge's scores are those that it gives to the texts.
    sample = after["samples"][0]

    async def ask() -> float:
        async with RewardClient(judge.address) as client:
            item = ScoreItem(prompt=sample["prompt"], response=sample["response"], finished=sample["finished"])
            return (await client.score([item])).results[0].score

    assert asyncio.run(ask()) == pytest.approx(sample["judge"], abs=1e-3)
    # The same by the command, of what the service serves now.
    where = addresses(*services)
    del where[2:4]
    held_out = tmp_path / "held_out.jsonl"
    texts = dict.fromkeys(sample["prompt"] for sample in before["samples"])
    held_out.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    again = [*TRAIN, "evaluate", "--model", str(model), "--prompts", str(held_out), *where, "--max-new-tokens", "16"]
    against = ["--against", str(output / "evaluation_before.json"), "--alarm-score-shift", "1e-9"]
    as_judge = ["--judge", services[1].address]  # The reward service itself: token ids, and the same scores.
    done = run([*again, *as_judge, *against, "--samples-per-prompt", "2", "--output", str(tmp_path / "e.json")])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "e.json").read_text())
    assert [s["judge"] for s in found["samples"]] == pytest.approx([s["score"] for s in found["samples"]], abs=1e-4)
    assert "alarm: The shift of the mean score, in standard deviations of before: " in done.stderr
    assert (found["kl_exact_mean"], found["n"]) == (None, 20)


async def test_text_goes_over_the_wire_where_the_reward_model_reads_other_tokens(
    start_service, make_policy, make_reward_model, prompts, tmp_path
):
    other = train_tokenizer(270)  # Fewer merges: the same text, other ids.
    policy_folder, reward_folder = make_policy(scale=0.5), make_reward_model(seed=5, save_tokenizer=other)
    policy = start_service("policy", policy_folder, "--engine", "transformers")
    reward, reference = start_service("reward", reward_folder), start_service("reference", make_policy(seed=3))
    services = addresses(policy, reward, reference)
    refused = run(ppo(policy_folder, prompts, tmp_path / "run", services))
    assert refused.returncode == 2
    assert "reads other tokens than the policy writes: choose --critic policy" in refused.stderr
    flags = ["--critic", "policy", "--steps", "1", "--resume"]
    done = run(ppo(policy_folder, prompts, tmp_path / "run", services, *flags))
    assert done.returncode == 0, done.stderr
    assert "weights are not those of --model" in done.stderr  # The reference is another model here.
    samples = json.loads((tmp_path / "run" / "evaluation_after.json").read_text())["samples"]
    async with RewardClient(reward.address) as client:
        reply = await client.score(
            [ScoreItem(prompt=s["prompt"], response=s["response"], finished=s["finished"]) for s in samples]
        )
    assert [s["score"] for s in samples] == pytest.approx([r.score for r in reply.results], abs=1e-4)


def test_a_service_that_never_comes_up_is_named_after_the_set_wait(folders, prompts, tmp_path, start_service):
    model, _ = folders
    policy = start_service("policy", model, "--engine", "transformers")
    reference = start_service("reference", model)
    nowhere = LiveService(policy.process, f"127.0.0.1:{free_port()}", "", "", policy.log)
    services = addresses(policy, nowhere, reference)
    waiting = start_in_background(ppo(model, prompts, tmp_path / "run", services), tmp_path / "log")
    wait_for(lambda: "waiting for policy" in (tmp_path / "log").read_text(), waiting)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(timeout=60) == 130  # There is nothing to save yet, so nothing to wait for.
    assert "quartet-train ppo: interrupted" in (tmp_path / "log").read_text()
    start = time.monotonic()
    done = run(ppo(model, prompts, tmp_path / "run", services, "--ready-timeout-s", "3"))
    assert done.returncode == 2
    assert f"reward service: not ready at {nowhere.address} after 3 s" in done.stderr
    assert time.monotonic() - start < 40


def test_prompts_that_leave_no_room_are_named(start_three, folders, tmp_path):
    model, _ = folders
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": f"hello {i}"} for i in range(20)] + [{"prompt": "hello please " * 200}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    services = addresses(*start_three())
    done = run(ppo(model, path, tmp_path / "run", services, "--seed", "1"))
    assert done.returncode == 2
    assert f"{path}, line 21" in done.stderr
    assert "have more than 112 tokens of prompt" in done.stderr  # 128 of the model less 16 new ones.
    done = run(ppo(model, path, tmp_path / "run", services, "--max-new-tokens", "128"))
    assert "--max-new-tokens is 128, and the models take 128 tokens of prompt and response" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kl-beta", "-0.1"], "--kl-beta is '-0.1': Input should be greater than or equal to 0"),
        (["--learning-rate", "nan"], "--learning-rate is 'nan'"),
        (["--top-k", "5"], "--top-p is 1 and --top-k 5: training samples from the whole distribution"),
        (["--minibatches", "17"], "--minibatches is 17, a rollout has 16 responses: at most as many"),
        (["--kl", "adaptive", "--kl-horizon", "3"], "--kl-horizon is 3: it must be above .2 times the 16 responses"),
        (["--clip-range", "1"], "--clip-range is '1': Input should be less than 1"),
        (["--seed", "99999999999999999999"], "--seed is '99999999999999999999': Input should be less than 92233720368"),
        (
            ["--prompts-per-step", "2", "--max-new-tokens", "3"],
            "together at most 6 response tokens, a rollout needs at",
        ),
        (
            ["--policy", "127.0.0.1:1,127.0.0.1:2"],
            "--policy names 2 replicas and --policy-admin 1: every replica needs",
        ),
        (["--policy", "foo"], "--policy is 'foo': address 'foo' must be host:port"),
    ],
)
def test_settings_are_refused_with_name_value_and_bound(flags, message, folders, prompts, tmp_path):
    done = run(ppo(folders[0], prompts, tmp_path / "run", [], *flags))
    assert done.returncode == 2
    assert message in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_end_where_one_does_and_killed_at_the_same_bits(start_three, folders, prompts, tmp_path):
    from tests.processes import train  # Its server of processes is started for those who need it.

    model, _ = folders
    services = start_three("--deterministic")
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text(
        "".join(json.dumps({"prompt": f"hello {i}", "completion": " thanks"}) + "\n" for i in range(9))
    )
    flags = ["--kl", "adaptive", "--save-every", "1", "--scale-scores", "--staleness", "1", "--eval-every", "2"]
    flags += ["--max-eval-prompts", "5", "--monitor-demonstrations", str(demonstrations), "--track", "none"]
    flags += ["--keep-checkpoints", "9", "--micro-batch-tokens", "100"]

    def start(count: int, name: str, logs: str, *more: str):  # type: ignore[no-untyped-def]
        command = ppo(model, prompts, tmp_path / name, addresses(*services), *flags, *more)[len(TRAIN) :]
        return train(count, tmp_path / logs, *command)

    for count, name in ((1, "one"), (2, "two")):
        start(count, name, f"{name}-logs").finish(240)
    broken = start(2, "broken", "broken-logs")
    end_s = time.monotonic() + 120
    while not (tmp_path / "broken" / "checkpoint-000002" / "state.json").exists():
        assert time.monotonic() < end_s, broken.said
        time.sleep(0.01)
    broken.kill(1)
    assert broken.wait(60)[0] == 2
    assert "quartet-train ppo: process 0 of 2 has lost another one" in broken.said_by(0)
    start(2, "broken", "resumed-logs", "--resume").finish(240)

    def kept(name: str, step: int = 4) -> dict[str, dict[str, Tensor]]:
        folder = tmp_path / name / f"checkpoint-{step:06d}"
        return {file: load_file(folder / f"{file}.safetensors") for file in ("policy", "critic")}

    begun = load_file(model / "model.safetensors")
    for file, theirs in kept("two").items():
        ours, alone = kept("broken")[file], kept("one")[file]
        assert ours.keys() == theirs.keys() == alone.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
        assert max(float((alone[name] - theirs[name]).abs().max()) for name in theirs) < 2e-5
    assert max(float((kept("two")["policy"][name] - begun[name]).abs().max()) for name in begun) > 1e-3
    # How long it took, and how many versions the policy service had seen before.
    of_services = ("time/", "throughput/", "elapsed", "weights/version")
    figures = {
        name: [
            {
                key: value
                for key, value in record.items()
                if not key.startswith(of_services) and "tokens_per_s" not in key
            }
            for record in read_metrics(tmp_path / name)
        ]
        for name in ("one", "two", "broken")
    }
    assert figures["broken"] == figures["two"]
    for ours, theirs in zip(figures["two"], figures["one"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert len({record["kl/beta"] for record in figures["two"]}) == 4
    evaluations = [json.loads((tmp_path / name / "evaluation_after.json").read_text()) for name in ("two", "one")]
    for name in ("kl_exact_mean", "entropy_mean", "demonstration_perplexity", "score_mean"):
        assert evaluations[0][name] == pytest.approx(evaluations[1][name], rel=1e-3, abs=1e-4), name
    # Without a service both end, what is done is saved, and it is told once.
    away = start(2, "away", "away-logs", "--steps", "90", "--ready-timeout-s", "2")
    while not (tmp_path / "away" / "checkpoint-000001" / "state.json").exists():
        assert time.monotonic() < end_s + 240, away.said
        time.sleep(0.05)
    services[1].stop()
    assert away.wait(90) == [2, 2]
    assert away.said.count("quartet-train ppo: stopped after step") == 1
