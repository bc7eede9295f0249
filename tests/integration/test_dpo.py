"""DPO with its reference served: asked before training or at every step, it is the model that training starts from."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import WORDS, train_tokenizer


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> str:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "preferences.jsonl"
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=3)) + f" {i}",
            "chosen": " " + " ".join(draw.choices(WORDS[:12], k=draw.randint(1, 8))),
            "rejected": " " + " ".join(draw.choices(WORDS[12:], k=draw.randint(1, 8))),
        }
        for i in range(160)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(folder: Path, preferences: str, output: Path, *flags: str) -> list[str]:
    options = ["--model", str(folder), "--data", preferences, "--output", str(output), "--learning-rate", "0.001"]
    options += ["--batch-size", "16", "--epochs", "2", "--beta", "0.3"]
    return [sys.executable, "-m", "trainer", "dpo", *options, *flags]


def test_a_served_reference_is_the_model_that_training_starts_from(make_policy, preferences, start_service, tmp_path):
    folder = make_policy(seed=6, scale=0.5)
    service = start_service("reference", folder)
    weights = {}
    for name, flags in (
        ("own", ()),
        ("asked before", ("--reference", service.address)),
        ("live", ("--reference", service.address, "--reference-live")),
    ):
        done = subprocess.run(
            command(folder, preferences, tmp_path / name, *flags), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        weights[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    start = load_file(folder / "model.safetensors")
    moved = max(float((weights["own"][name] - start[name]).abs().max()) for name in start)
    for name in ("asked before", "live"):
        for key, tensor in weights["own"].items():
            torch.testing.assert_close(weights[name][key], tensor, rtol=0, atol=1e-3 * moved)
        identity = json.loads((tmp_path / name / "evaluation.json").read_text())["reference"]
        assert "(weights " in identity


def test_a_killed_run_resumes_to_the_same_bits_with_the_service_gone_and_back(
    make_policy, preferences, start_service, tmp_path
):
    folder = make_policy(seed=6)
    # Each run asks it anew: without this its answers depend, by their last bits, on who else is in the batch.
    service = start_service("reference", folder, "--deterministic")
    flags = ("--reference", service.address, "--dropout", "0.1", "--save-every", "3", "--epochs", "6")
    whole = subprocess.run(command(folder, preferences, tmp_path / "whole", *flags), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "killed"
    process = subprocess.Popen(command(folder, preferences, output, *flags), stdout=subprocess.DEVNULL)
    while not (output / "checkpoint-000003" / "state.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert service.stop() == 0
    away = subprocess.run(
        [*command(folder, preferences, output, *flags), "--resume", "--ready-timeout-s", "1"],
        capture_output=True,
        text=True,
    )
    assert away.returncode == 2
    assert "reference service" in away.stderr
    assert service.address in away.stderr
    start_service("reference", folder, "--deterministic", like=service)
    resumed = subprocess.run(
        [*command(folder, preferences, output, *flags), "--resume"], capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (output, tmp_path / "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_reference_of_another_tokenizer_is_refused(make_policy, preferences, start_service, tmp_path):
    other = shutil.copytree(make_policy(seed=7), tmp_path / "other")
    train_tokenizer(vocab_size=290).save_pretrained(other)
    service = start_service("reference", other)
    done = subprocess.run(
        command(make_policy(seed=6), preferences, tmp_path / "run", "--reference", service.address),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "whose tokenizer is another one than that of --model" in done.stderr
    assert not (tmp_path / "run" / "model").exists()
