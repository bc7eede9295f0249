"""Runs that are killed: started as processes, ended by SIGKILL at random moments, resumed, and compared bit for bit.

Importing what a run needs takes far longer than the small runs of tests. So a run is the fork of a process which has
imported everything and computed nothing (this module as a command): a process of its own, with its own files and
connections, whom SIGKILL ends as any other. There are two to fork from, in turn, so that a run and what it is compared
with differ in what is drawn for a process alone: the order of sets, and random numbers that nobody seeded.

``QUARTET_KILLS`` says how often a kind of run is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLS = int(os.environ.get("QUARTET_KILLS", "2"))
# Times, rates, and the version of the served weights, which rises as long as a service lives.
_NOT_COMPARED = ("time/", "throughput/", "elapsed_s", "tokens_per_s", "eval/tokens_per_s", "weights/version")

Start = Callable[[Path, bool], "Run"]
"""Starts the run of a folder, from its beginning or, if it is True, with --resume."""


class Launcher:
    """Starts ``quartet-train`` commands. Use it as a context manager: what still runs at its end is killed."""

    def __enter__(self) -> Launcher:
        self._parents = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.kills"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).resolve().parent.parent,
                env=os.environ | {"PYTHONHASHSEED": str(seed)},
            )
            for seed in (1, 2)
        ]
        for parent in self._parents:
            assert parent.stdout is not None
            assert json.loads(parent.stdout.readline()) == "ready"
        return self

    def __exit__(self, *exception: object) -> None:
        for parent in self._parents:
            assert parent.stdin is not None
            parent.stdin.close()
            parent.wait(timeout=60)

    def start(self, arguments: Sequence[str], log: Path) -> Run:
        """``quartet-train ARGUMENTS``, what it prints appended to ``log``."""
        parent = self._parents[0]
        self._parents.reverse()
        pid = _ask(parent, {"start": list(arguments), "log": str(log)})
        return Run(pid=pid, parent=parent, log=log, start_s=time.monotonic())


def _ask(parent: subprocess.Popen[str], request: object) -> Any:
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(json.dumps(request) + "\n")
    parent.stdin.flush()
    return json.loads(parent.stdout.readline())


@dataclass(kw_only=True)
class Run:
    """A process. ``code``: how it ended, below 0 for the signal that ended it, once that is known."""

    pid: int
    parent: subprocess.Popen[str]
    log: Path
    start_s: float
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = _ask(self.parent, {"poll": self.pid})
        return self.code

    def wait(self, timeout_s: float = 240.0) -> int:
        end_s = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            assert time.monotonic() < end_s, f"it goes on and on: {self.text()[-3000:]}"
            time.sleep(0.005)
        return code

    def signal(self, number: signal.Signals) -> None:
        # It is reaped by ``poll`` alone, so its number is its own until then.
        if self.code is None:
            os.kill(self.pid, number)

    def text(self) -> str:
        return self.log.read_text()


# Killing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Unbroken:
    """A run that nothing happened to: what the others are compared with."""

    output: Path
    duration_s: float

    @property
    def last_step(self) -> int:
        return int(read_log(self.output)[-1]["step"])


def unbroken(start: Start, output: Path) -> Unbroken:
    run = start(output, False)
    assert run.wait() == 0, run.text()[-3000:]
    return Unbroken(output=output, duration_s=time.monotonic() - run.start_s)


def kill_and_resume(
    start: Start, output: Path, whole: Unbroken, *, at_most: int, draw: random.Random
) -> tuple[Run, list[str]]:
    """Starts a run and kills it until it ends by itself or was killed ``at_most`` times, resuming it each time.

    Every other kill falls at a moment drawn uniformly from the duration of an unbroken run; the others amid the writing
    of a checkpoint.

    Args:
        start: starts it.
        output: its folder.
        whole: an unbroken one.
        at_most: kills.
        draw: decides when.

    Returns:
        The run that ended by itself, and what each of those killed was at.
    """
    at: list[str] = []
    run = start(output, False)
    while len(at) < at_most:
        moment_s = draw.uniform(0.0, whole.duration_s)
        if len(at) % 2 == 0:
            alive = _alive_until(run, lambda end_s=run.start_s + moment_s: time.monotonic() >= end_s)
        else:
            not_before_s = run.start_s + moment_s / 2
            alive = _alive_until(run, lambda s=not_before_s: time.monotonic() >= s and _is_written(output), 0.0005)
            time.sleep(draw.uniform(0.0, 0.01))
        run.signal(signal.SIGKILL)
        if not alive or run.wait() != -signal.SIGKILL:
            break
        at.append(what_it_was_at(output, whole.last_step))
        run = start(output, True)
    run.wait()
    return run, at


def what_it_was_at(output: Path, last_step: int) -> str:
    """What a killed run was at, by what it left."""
    if _is_written(output):
        return "writing a checkpoint"
    if list(output.glob(".checkpoint-*.removed")):
        return "removing a checkpoint"
    log = output / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]] if log.exists() else []
    if not records:
        return "before its first step"
    return "training" if records[-1]["step"] < last_step else "after its last step"


def _is_written(output: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(output)
        return any(name.startswith(".checkpoint-") and name.endswith(".partial") for name in names)
    return False


def _alive_until(run: Run, condition: Callable[[], bool], pause_s: float = 0.002) -> bool:
    """Waits; whether the run still ran when ``condition`` came true."""
    while not condition():
        if run.poll() is not None:
            return False
        time.sleep(pause_s)
    return run.poll() is None


def survives_kills(start: Start, folder: Path, whole: Unbroken, *, kills: int = KILLS, seed: int = 0) -> Counter[str]:
    """Asserts that runs which are killed ``kills`` times in all end as the unbroken one: weights, optimisers, log.

    Args:
        start: starts one.
        folder: for all of them.
        whole: the unbroken one.
        kills: in all; each broken run is killed until it ends.
        seed: of the moments.

    Returns:
        How often a run was killed at what.
    """
    draw = random.Random(seed)
    at: Counter[str] = Counter()
    broken = 0
    while at.total() < kills:
        output = folder / f"broken-{broken}"
        run, killed_at = kill_and_resume(start, output, whole, at_most=kills - at.total(), draw=draw)
        assert run.code == 0, run.text()[-3000:]
        at.update(killed_at)
        broken += 1
        assert differences(output, whole.output) == []
        left = [path.name for path in output.iterdir() if path.name.startswith(".")]
        assert left == [], "what a kill left is removed"
    print(f"{at.total()} kills of {broken} runs, which take {whole.duration_s:.1f} s: {dict(at)}")
    return at


# Comparing -----------------------------------------------------------------------------------------------------------


def differences(output: Path, whole: Path) -> list[str]:
    """What tells the results of two runs apart: tensors by their bits, the log by its steps and figures."""
    ours, theirs = _digests(output), _digests(whole)
    found = [f"{name} differs" for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    logs = read_log(output), read_log(whole)
    if (steps := [record["step"] for record in logs[0]]) != [record["step"] for record in logs[1]]:
        return [*found, f"the log has the steps {steps}"]
    for own, other in zip(*logs, strict=True):
        odd = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
        found += [f"step {own['step']}: {name} is {own.get(name)}, was {other.get(name)}" for name in odd]
    return found


def read_log(output: Path) -> list[dict[str, float]]:
    """Every record of the log with what is compared of it; whole lines alone."""
    content = (output / "metrics.jsonl").read_bytes()
    assert content.endswith(b"\n")
    records = [json.loads(line) for line in content.splitlines()]
    return [{name: value for name, value in record.items() if not name.startswith(_NOT_COMPARED)} for record in records]


def _digests(output: Path) -> dict[str, str]:
    """SHA-256 of every tensor of the exported models and of the last checkpoint, optimisers included."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, str] = {}
    newest = sorted(output.glob("checkpoint-*"))[-1:]
    for file in [*output.glob("model/**/*.safetensors"), *(file for folder in newest for file in folder.iterdir())]:
        if file.suffix == ".safetensors":
            tensors: object = load_file(file)
        elif file.suffix == ".pt":
            tensors = torch.load(file, weights_only=True)
            if file.name == "rng.pt":  # Python's and numpy's are of the process: nobody seeds them, and nothing draws.
                tensors = tensors["torch"]
        else:
            continue
        found |= {f"{file.relative_to(output)}{name}": digest for name, digest in _leaves(tensors, "")}
    assert found
    return found


def _leaves(value: object, name: str) -> Iterator[tuple[str, str]]:
    import torch

    if isinstance(value, torch.Tensor):
        content = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _leaves(part, f"{name}/{place}")
    else:
        yield name, repr(value)


# The process that runs are forked from -------------------------------------------------------------------------------


def _serve() -> None:
    for name in ("__main__", "sft", "reward_model", "dpo", "ppo", "report"):
        importlib.import_module(f"trainer.{name}")
    importlib.import_module("tensorboard.summary.writer.event_file_writer")
    transformers = importlib.import_module("transformers")
    # Imported when they are first asked for.
    for name in ("LlamaForCausalLM", "LlamaForSequenceClassification", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    alive: set[int] = set()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                _become(request["start"], request["log"])
            alive.add(pid)
            print(pid, flush=True)
            continue
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        alive.discard(pid)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _become(arguments: list[str], log: str) -> None:
    """Runs the command in this process, which ends with it."""
    import numpy as np

    from trainer.__main__ import main

    # As of a process that was started alone.
    random.seed()
    np.random.seed()
    nothing, sink = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for own, name in ((nothing, 0), (sink, 1), (sink, 2)):
        os.dup2(own, name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
