"""Checkpoints: whole or not there, and everything comes back."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from trainer import checkpoint
from trainer.checkpoint import latest_checkpoint, load_checkpoint, read_state, save_checkpoint, stop_on_signal
from trainer.errors import CheckpointError
from trainer.files import replace_file, replace_folder
from trainer.tracking import read_metrics


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    model(torch.randn(8, 4)).square().sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def test_weights_buffers_optimiser_and_random_numbers_come_back_bit_for_bit(tmp_path):
    model, optimiser = make()
    step(model, optimiser)
    save_checkpoint(tmp_path, step=1, modules={"m": model}, optimisers={"o": optimiser}, state={"a": [1, "b"]})
    draws = (random.random(), np.random.rand(), torch.rand(1).item())
    step(model, optimiser)
    expected = [value.clone() for value in model.state_dict().values()]

    other, other_optimiser = make(seed=9)
    restored = load_checkpoint(latest_checkpoint(tmp_path), modules={"m": other}, optimisers={"o": other_optimiser})
    assert (restored.step, restored.state) == (1, {"a": [1, "b"]})
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws
    step(other, other_optimiser)
    assert all(ours.equal(theirs) for ours, theirs in zip(other.state_dict().values(), expected, strict=True))


def test_only_whole_checkpoints_count_and_the_newest_stay(tmp_path, capsys):
    model, optimiser = make()
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, step=number, modules={"m": model}, optimisers={"o": optimiser}, state={}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000002", "checkpoint-000003"]
    file = tmp_path / "checkpoint-000003" / "m.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-000002"
    assert "passing over" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"m\.safetensors is missing or not of its \d+ bytes"):
        read_state(tmp_path / "checkpoint-000003")


def test_a_write_that_breaks_off_leaves_the_older_one(tmp_path, monkeypatch):
    model, optimiser = make()
    save_checkpoint(tmp_path, step=1, modules={"m": model}, optimisers={"o": optimiser}, state={})

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-000002 can't be written: .*No space left"):
        save_checkpoint(tmp_path, step=2, modules={"m": model}, optimisers={"o": optimiser}, state={})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


# In a process of its own, since its files are to be cut for good: as on a disk that is full.
_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from transformers import LlamaForCausalLM
from tests.conftest import llama_config, train_tokenizer
from trainer.checkpoint import save_checkpoint
from trainer.errors import TrainerError
from trainer.models import save_model
from trainer.runs import write_json
from trainer.tracking import RunTracker

folder, what, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model, tokenizer = torch.nn.Linear(64, 64), train_tokenizer()
policy = LlamaForCausalLM(llama_config())
optimiser = torch.optim.AdamW(model.parameters())
model(torch.zeros(1, 64)).sum().backward()
optimiser.step()

def save(step):
    save_checkpoint(folder, step=step, modules={"m": model}, optimisers={"o": optimiser}, state={})

save(1)
write_json(folder / "file.json", [1])
tracker = RunTracker(folder, 9, (), "test")
tracker.log(1, {"loss": 1.0})
do = {
    "checkpoint": lambda: save(2),
    "json": lambda: write_json(folder / "file.json", list(range(2000))),
    "log": lambda: tracker.log(2, {f"figure/{i}": float(i) for i in range(500)}),
    "model": lambda: save_model(policy, tokenizer, folder / "model"),
}[what]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    with tracker:
        do()
except TrainerError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("what", "limit", "named"),
    [
        ("checkpoint", 4000, "CheckpointError .*checkpoint-000002"),  # The module's file breaks off,
        ("checkpoint", 20000, "CheckpointError .*checkpoint-000002"),  # the optimiser's,
        ("json", 4000, r"OutputError .*file\.json"),
        ("log", 4000, r"TrackingError .*metrics\.jsonl"),
        ("model", 4000, "OutputError .*model"),
        ("model", 100_000, "OutputError .*model"),
    ],
)
def test_a_full_disk_is_one_clear_message_and_leaves_what_was_there(what, limit, named, tmp_path):
    command = [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path), what, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.match(rf"{named} can't be written: .+; make room or mend the cause, .* --resume", done.stdout)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-000001"
    assert json.loads((tmp_path / "file.json").read_text()) == [1]
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001", "file.json", "metrics.jsonl"]


def test_another_model_is_refused(tmp_path):
    model, optimiser = make()
    path = save_checkpoint(tmp_path, step=1, modules={"m": model}, optimisers={"o": optimiser}, state={})
    other = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    with pytest.raises(CheckpointError, match=r"0\.weight is \(3, 4\) torch\.float32, the model's is \(5, 4\)"):
        load_checkpoint(path, modules={"m": other}, optimisers={})


def test_the_first_signal_asks_to_stop_and_only_a_later_one_ends_at_once(monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "_SAME_REQUEST_S", 0.2)
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as stop:
        assert not stop.requested
        for _ in range(3):  # One Ctrl-C, as it reaches the group and is handed on by launchers.
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capsys.readouterr().err.count("this step is finished and saved first") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_folders_and_files_are_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with replace_folder(target) as partial:
        (partial / "a").write_text("1")
    with contextlib.suppress(RuntimeError), replace_folder(target) as partial:
        (partial / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    replace_file(tmp_path / "file.json", json.dumps([1]))
    replace_file(tmp_path / "file.json", json.dumps([2]))
    assert json.loads((tmp_path / "file.json").read_text()) == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "folder"]
