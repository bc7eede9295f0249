"""Two processes against one: gradients, whole runs, checkpoints of either, and what happens when one of them dies.

Shapes: B sequences.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import free_port, train_tokenizer
from tests.gradients import gradients, made_up_rollout, write_preferences
from tests.processes import Group, train
from trainer import distributed, monitoring
from trainer.__main__ import main
from trainer.compiling import lacking
from trainer.evaluate import PolicyFigures
from trainer.exact_kl import Distributions, distributions
from trainer.models import TokenLogprobs, load_policy, load_tokenizer
from trainer.ppo_config import PPOSettings
from trainer.sharding import shard
from trainer.tracking import read_metrics

STAGES = ("sft", "reward", "dpo", "ppo")
WAYS = [(packing, checkpointing) for packing in ("on", "off") for checkpointing in (False, True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_preferences(tmp_path_factory.mktemp("rows") / "preferences.jsonl", 60)


# Gradients -----------------------------------------------------------------------------------------------------------


def cases(folder: Path, tied: Path, gpt2: Path) -> dict[str, tuple[str, Path, int, dict[str, Any]]]:
    """Stage, model, rows and options by name."""
    found: dict[str, tuple[str, Path, int, dict[str, Any]]] = {}
    for stage in STAGES:
        for packing, checkpointing in WAYS:
            options = {"packing": packing, "activation_checkpointing": checkpointing}
            found[f"{stage} packing {packing}, checkpointing {checkpointing}"] = (stage, folder, 7, options)
    plain = {"packing": "on", "activation_checkpointing": False}
    for stage in ("sft", "reward", "dpo", "ppo"):
        found[f"{stage} brought together once a step"] = (stage, folder, 7, {**plain, "gradient_sync": "step"})
    for stage in ("sft", "dpo"):
        found[f"{stage} with one row, of which one process has none"] = (stage, folder, 1, plain)
    found["sft with tied embeddings"] = ("sft", tied, 7, plain)
    found["sft in float32"] = ("sft", folder, 7, {**plain, "dtype": torch.float32})
    found["sft in bfloat16"] = ("sft", folder, 7, {**plain, "dtype": torch.float32, "precision": "bfloat16"})
    compiled = {"compile": True, "packing": "on", "dtype": torch.float32}
    if not lacking(torch.device("cpu")):
        for stage in ("sft", "ppo"):
            found[f"{stage} compiled in float32"] = (stage, folder, 7, {**compiled, "activation_checkpointing": True})
    other = {"packing": "auto", "activation_checkpointing": True, "dtype": torch.float32, "precision": "bfloat16"}
    found["sft of GPT-2 in bfloat16"] = ("sft", gpt2, 7, other)
    return found


def in_processes(folder: Path, tied: Path, gpt2: Path, data: str, to: Path) -> None:
    with distributed.processes():
        found = {}
        for name, (stage, model, rows, options) in cases(folder, tied, gpt2).items():
            found[name] = gradients(stage, model, data, rows, **options)
        watched = looked_at(folder, folder.parent / "other-nowhere")
        if distributed.is_first():
            torch.save((found, watched), to)


def looked_at(folder: Path, nowhere: Path) -> tuple[PolicyFigures, float]:
    """What the monitor says of a policy that is far from its reference, and the share of the latter in this process."""
    settings = PPOSettings(
        model=str(folder), prompts=("p",), output=nowhere, precision="float32", micro_batch_tokens=70
    )
    tokenizer = load_tokenizer(folder)
    policy = load_policy(folder, tokenizer)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.2)
    TokenLogprobs(policy)
    shard(policy, "float32")
    shares = []

    def seen(policy: Any, reference: Any, *args: Any, **kwargs: Any) -> Distributions:
        local = (p.to_local() if isinstance(p, DTensor) else p for p in reference.parameters())
        shares.append(sum(p.numel() for p in local) / sum(p.numel() for p in reference.parameters()))
        return distributions(policy, reference, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitoring, "distributions", seen)
        monitor = monitoring.PolicyMonitor(
            settings, policy, tokenizer, max_tokens=64, reference=folder, before=nowhere / "before", resumed_step=0
        )
        return monitor.observe(made_up_rollout(7).samples), shares[0]


@pytest.fixture(scope="module")
def models(make_policy: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    gpt2 = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(5)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=128, n_embd=32, n_layer=2, n_head=2)).save_pretrained(gpt2)
    train_tokenizer().save_pretrained(gpt2)
    return make_policy(seed=3), make_policy(seed=4, tied=True), gpt2


@pytest.fixture(scope="module")
def of_two(models: tuple[Path, ...], data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("of_two")
    Group(2, folder / "logs", in_processes, *models, data, folder / "gradients.pt").finish(480)
    found: dict[str, Any]
    found, watched = torch.load(folder / "gradients.pt", weights_only=False)
    return found | {"watched": watched}


def test_the_reference_of_the_exact_kl_is_split_among_processes_and_says_the_same(models, of_two, tmp_path):
    ours, share = of_two["watched"]
    theirs, whole = looked_at(models[0], tmp_path)
    assert whole == 1.0
    assert 0.49 < share < 0.52
    assert min(theirs.kl) > 0.01
    assert ours.kl == pytest.approx(theirs.kl, rel=1e-4)
    assert ours.entropy == pytest.approx(theirs.entropy, rel=1e-5)


@pytest.mark.parametrize("name", list(cases(Path(), Path(), Path())))
def test_gradients_of_two_processes_are_those_of_one(name, models, data, of_two):
    stage, folder, rows, options = cases(*models)[name]
    ours, figures = of_two[name]
    theirs, expected = gradients(stage, folder, data, rows, **options | {"compile": False})
    assert ours.keys() == theirs.keys()
    # In bfloat16 norms see their weight rounded, and products are of other sizes; else only sums are in another order.
    # PPO and heads of scores are float32; the others compute in float64.
    tolerance = 0.05 if "bfloat16" in name else 3e-5 if "float32" in name or stage in ("reward", "ppo") else 1e-7
    for key, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0
        assert ours[key].dtype == gradient.dtype
        assert float((ours[key].double() - gradient.double()).abs().max()) <= tolerance * scale, key
    assert figures.keys() == expected.keys()
    for key, value in expected.items():
        assert figures[key] == pytest.approx(value, rel=100 * tolerance, abs=100 * tolerance), key


# Whole runs ----------------------------------------------------------------------------------------------------------


def command(stage: str, folder: Path, data: str, output: Path, *flags: str) -> list[str]:
    options = ["--model", str(folder), "--data", data, "--output", str(output), "--learning-rate", "1e-3"]
    options += ["--batch-size", "8", "--micro-batch-tokens", "100", "--epochs", "2", "--dropout", "0.1"]
    options += ["--save-every", "2", "--keep-checkpoints", "50", "--track", "none"]
    return [stage, *options, *flags]


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model" / "model.safetensors")


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two weights."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def assert_same_bits(ours: Path, theirs: Path) -> None:
    assert (ours / "model" / "model.safetensors").read_bytes() == (theirs / "model" / "model.safetensors").read_bytes()


def told(folder: Path, *names: str) -> list[dict[str, float]]:
    """The figures of all steps that are no times."""
    times = ("elapsed_s", "tokens_per_s")
    return [{k: v for k, v in record.items() if k not in times} for record in read_metrics(folder)]


@pytest.fixture(scope="module")
def runs(models: tuple[Path, ...], data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SFT without dropout by one process and by two; and by two with dropout, the run that others break off."""
    folder = tmp_path_factory.mktemp("runs")
    for name, count, flags in (("one", 1, ("--dropout", "0")), ("two", 2, ("--dropout", "0")), ("whole", 2, ())):
        start_s = time.monotonic()
        train(count, folder / f"{name}-logs", *command("sft", models[0], data, folder / name, *flags)).finish()
    (folder / "took.json").write_text(str(time.monotonic() - start_s))
    return {name: folder / name for name in ("one", "two", "whole")}


def test_two_processes_end_at_the_weights_of_one_and_say_the_same_once(runs, models):
    start = load_file(models[0] / "model.safetensors")
    ours, theirs = weights(runs["two"]), weights(runs["one"])
    assert furthest(theirs, start) > 1e-3
    assert furthest(ours, theirs) < 2e-5
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    for mine, other in zip(told(runs["two"]), told(runs["one"]), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    for file in ("evaluation.json", "settings.json", "report.html", "model/lineage.json", "model/config.json"):
        assert (runs["two"] / file).exists(), file
    config = json.loads((runs["two"] / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    for count, name in ((2, "two"), (1, "one")):
        said = [(runs[name].parent / f"{name}-logs" / f"{place}.log").read_text() for place in range(count)]
        assert "held-out perplexity: before" in said[0]
        assert said[1:] == [""] * (count - 1)


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto"])
def test_reward_models_and_dpo_end_where_one_process_does(stage, models, data, tmp_path):
    flags = ["--dropout", "0", "--held-out-fraction", "0.3", *(["--no-baselines"] if stage == "reward" else [])]
    for count in (1, 2):
        wanted = command(stage, models[0], data, tmp_path / str(count), *flags)
        train(count, tmp_path / f"logs-{count}", *wanted).finish()
    assert furthest(weights(tmp_path / "2"), weights(tmp_path / "1")) < 5e-5
    steps = [told(tmp_path / "2"), told(tmp_path / "1")]
    if stage != "reward":
        for first, *_ in steps:  # Policy and reference are one: on which side an answer is is rounding.
            first.pop("accuracy" if stage == "dpo" else "label_accuracy")
    for mine, other in zip(*steps, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)
    ours, theirs = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("2", "1"))
    assert ours.keys() == theirs.keys()
    of_model = [json.loads((tmp_path / name / "model" / "lineage.json").read_text()) for name in ("2", "1")]
    assert of_model[0].keys() == of_model[1].keys()
    if stage == "reward":
        metadata = [json.loads((tmp_path / name / "model" / "quartet.json").read_text()) for name in ("2", "1")]
        assert metadata[0]["normalisation"] == pytest.approx(metadata[1]["normalisation"], rel=1e-3)
        scores = [[item["score"] for item in own["golden"]["items"]] for own in metadata]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-4)


def resume_on_own_disks(wanted: list[str], disks: Path) -> None:
    """Each process with its own disk under one name, as two machines have them."""
    os.chdir(disks / os.environ["RANK"])
    main(wanted)


@pytest.mark.parametrize("left", ["nothing", "an older checkpoint", "a torn one"])
def test_without_a_shared_disk_a_run_does_not_go_on_and_says_why(left, runs, models, data, tmp_path):
    for disk in ("0", "1"):
        shutil.copytree(runs["whole"], tmp_path / disk / "run")
    newest = max((tmp_path / "1" / "run").glob("checkpoint-*"))
    if left == "nothing":
        shutil.rmtree(tmp_path / "1" / "run")
    elif left == "an older checkpoint":
        shutil.rmtree(newest)
    else:
        (newest / "rng.pt").write_bytes(b"")
    wanted = command("sft", models[0], data, Path("run"), "--resume")
    group = Group(2, tmp_path / "logs", resume_on_own_disks, wanted, tmp_path)
    assert group.wait() == [2, 2]
    assert "to process 1 of 2 (from 0): --output must be on a disk that all of them share" in group.said
    assert f"run/{newest.name}: " in group.said
    assert group.said.count("--output must be on a disk") == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(before, after, runs, models, data, tmp_path):
    name = {1: "one", 2: "two"}
    output = tmp_path / "run"
    output.mkdir()
    shutil.copytree(runs[name[before]] / "checkpoint-000006", output / "checkpoint-000006")
    shutil.copy(runs[name[before]] / "metrics.jsonl", output)
    flags = ("--dropout", "0", "--resume")
    train(after, tmp_path / "logs", *command("sft", models[0], data, output, *flags)).finish()
    assert [record["step"] for record in read_metrics(output)] == list(range(1, 17))
    assert furthest(weights(output), weights(runs[name[before]])) < 2e-5
    # What it wrote is as the other number of processes would have written it.
    kept = [load_file(folder / "checkpoint-000016" / "model.safetensors") for folder in (output, runs[name[after]])]
    assert furthest(*kept) < 2e-5
    states = [
        torch.load(folder / "checkpoint-000016" / "optimiser-adamw.pt", weights_only=True)["state"]
        for folder in (output, runs[name[after]])
    ]
    assert states[0].keys() == states[1].keys()
    for index, own in states[0].items():
        assert own["step"] == states[1][index]["step"]
        assert float((own["exp_avg"] - states[1][index]["exp_avg"]).abs().max()) < 1e-4
        assert own["exp_avg_sq"].shape == states[1][index]["exp_avg_sq"].shape


def test_killed_at_any_moment_and_resumed_two_processes_end_at_the_same_bits(runs, models, data, tmp_path):
    draw = random.Random(5)
    output = tmp_path / "run"
    took_s = json.loads((runs["whole"].parent / "took.json").read_text())
    flags: tuple[str, ...] = ()
    for attempt, victims in enumerate([(0,), (1,), (0, 1), (1,)]):
        group = train(2, tmp_path / f"logs-{attempt}", *command("sft", models[0], data, output, *flags))
        # From before anything is there to the end of what is left.
        time.sleep(took_s * draw.uniform(0.1, 0.9) * (1 - attempt / 8))
        group.kill(*victims)
        group.terminate()
        assert None not in group.wait(30), group.said
        flags = ("--resume",)
    train(2, tmp_path / "logs-last", *command("sft", models[0], data, output, *flags)).finish()
    assert_same_bits(output, runs["whole"])
    assert told(output) == told(runs["whole"])


def test_the_death_of_one_ends_the_other_with_a_message(models, data, tmp_path):
    output = tmp_path / "run"
    flags = ("--epochs", "500", "--save-every", "0")
    group = train(2, tmp_path / "logs", *command("sft", models[0], data, output, *flags))
    end_s = time.monotonic() + 60
    while not (output / "metrics.jsonl").exists() or len(read_metrics(output)) < 2:
        assert time.monotonic() < end_s, group.said
        time.sleep(0.05)
    group.kill(1)
    start_s = time.monotonic()
    assert group.wait(20)[0] == 2
    assert time.monotonic() - start_s < 15
    assert "quartet-train sft: process 0 of 2 has lost another one" in group.said_by(0)
    assert "--resume" in group.said_by(0)


def test_a_signal_to_one_stops_all_of_them_after_the_same_step(models, data, tmp_path):
    output = tmp_path / "run"
    flags = ("--epochs", "500", "--save-every", "0")
    group = train(2, tmp_path / "logs", *command("sft", models[0], data, output, *flags))
    end_s = time.monotonic() + 60
    while not (output / "metrics.jsonl").exists() or len(read_metrics(output)) < 2:
        assert time.monotonic() < end_s, group.said
        time.sleep(0.05)
    pid = group.processes[1].pid
    assert pid is not None
    os.kill(pid, 15)
    assert group.wait(30) == [130, 130]
    step = read_metrics(output)[-1]["step"]
    assert (output / f"checkpoint-{step:06d}").is_dir()
    assert group.said.count(f"stopped after step {step} of") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", "7"), r"--batch-size is 7, and there are 2 processes: .* a multiple of 2, such as 8"),
        (("--lora-rank", "4"), r"--lora-rank is 4, and there are 2 processes: an adapter is trained by one"),
        (("--data", "missing.jsonl"), r"missing\.jsonl"),
        (("--max-tokens", "4"), r"preferences\.jsonl, line 1.*4 tokens"),
    ],
)
def test_what_is_wrong_is_told_once(flags, message, models, data, tmp_path):
    group = train(2, tmp_path / "logs", *command("sft", models[0], data, tmp_path / "run", *flags))
    assert group.wait(60) == [2, 2]
    lines = group.said.splitlines()
    assert [line for line in lines if "quartet-train sft: " in line] == lines
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


def test_a_service_that_is_away_ends_both_alike_and_is_told_once(models, data, tmp_path):
    """The first alone asks it; what it met is no error of the trainer's own."""
    away = f"127.0.0.1:{free_port()}"
    flags = ("--reference", away, "--ready-timeout-s", "1")
    group = train(2, tmp_path / "logs", *command("dpo", models[0], data, tmp_path / "run", *flags))
    assert group.wait(60) == [2, 2]
    assert group.said.count("quartet-train dpo: ") == 1
    assert away in group.said


def test_torchrun_starts_them_and_a_command_for_one_process_says_so(models, data, tmp_path):
    """What the README has a user type."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", "trainer"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    wanted = command("sft", models[0], data, tmp_path / "run", "--max-steps", "2")
    done = subprocess.run([*launch, *wanted], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out perplexity: before") == 1
    assert math.isfinite(read_metrics(tmp_path / "run")[-1]["loss"])
    alone = environment | {"RANK": "0", "WORLD_SIZE": "2"}
    for wanted, message in (
        (["report", str(tmp_path / "run")], "WORLD_SIZE is 2, and report runs in one process: torchrun is for sft"),
        (command("sft", models[0], data, tmp_path / "other"), "start them by torchrun, or unset RANK and WORLD_SIZE"),
    ):
        refused = subprocess.run(
            [sys.executable, "-m", "trainer", *wanted], capture_output=True, text=True, timeout=120, env=alone
        )
        assert refused.returncode == 2
        assert message in refused.stderr
