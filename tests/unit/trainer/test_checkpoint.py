"""Checkpoints: whole or not there, and everything comes back."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from trainer import checkpoint
from trainer.checkpoint import latest_checkpoint, load_checkpoint, read_state, save_checkpoint, stop_on_signal
from trainer.errors import CheckpointError
from trainer.files import remove_leftovers, replace_file, replace_folder
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


def test_whichever_call_finds_the_disk_full_the_older_one_stays_and_no_half_of_a_new_one(tmp_path, monkeypatch):
    """Every call that writes fails in its turn, until none of them is left to fail."""
    calls, fail_at = 0, -1
    saved: dict[int, torch.Tensor] = {}

    def failing(function):  # type: ignore[no-untyped-def]
        def call(*arguments, **more):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **more)

        return call

    model, optimiser = make()

    def save(number: int) -> None:
        step(model, optimiser)
        saved[number] = next(model.parameters()).detach().clone()
        save_checkpoint(tmp_path, step=number, modules={"m": model}, optimisers={"o": optimiser}, state={}, keep=1)

    save(1)
    for owner, name in (
        *((Path, name) for name in ("mkdir", "write_text", "rename")),
        *((torch, "save"), (safetensors.torch, "save_file"), (os, "fsync")),
    ):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    while True:
        number = max(saved) + 1
        calls, fail_at = 0, fail_at + 1 if fail_at > 0 else 1
        told = ""
        try:
            save(number)
        except CheckpointError as error:
            told = str(error)
        assert not told or f"checkpoint-{number:06d} can't be written: [Errno 28] No space left on device (" in told
        assert bool(told) == (" MB are free there); make room" in told)
        if calls < fail_at:
            break
        newest = latest_checkpoint(tmp_path)
        assert not list(tmp_path.glob(".*.partial"))
        other, other_optimiser = make(seed=9)
        restored = load_checkpoint(newest, modules={"m": other}, optimisers={"o": other_optimiser})
        assert next(other.parameters()).equal(saved[restored.step])
        saved = {restored.step: saved[restored.step], number: saved[number]}
    assert fail_at > 15
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{number:06d}"]


def test_weights_that_are_not_finite_are_never_the_newest_checkpoint(tmp_path):
    model, optimiser = make()
    save_checkpoint(tmp_path, step=1, modules={"m": model}, optimisers={"o": optimiser}, state={})
    with torch.no_grad():
        model[0].weight[1, 2] = torch.inf
    refused = (
        r"checkpoint-000002 is not written: weight 0\.weight of m is not finite, .* the last good checkpoint is "
        r".*checkpoint-000001\."
    )
    with pytest.raises(CheckpointError, match=refused):
        save_checkpoint(tmp_path, step=2, modules={"m": model}, optimisers={"o": optimiser}, state={})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_what_a_kill_left_of_writing_and_removing_is_removed_and_nothing_else(tmp_path):
    for name in (".checkpoint-000002.partial", ".checkpoint-000001.removed", "checkpoint-000001", ".model.old", "a.b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
    (tmp_path / ".file.json.partial").write_text("{")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.old", "a.b", "checkpoint-000001"]
    remove_leftovers(tmp_path / "absent")


# In a process of its own, since its files are to be cut for good: as on a disk that is full.
_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from transformers import LlamaForCausalLM
from tests.conftest import llama_config, train_tokenizer
from trainer.checkpoint import save_checkpoint
from trainer.errors import TrainerError
from trainer.saving import save_model
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
