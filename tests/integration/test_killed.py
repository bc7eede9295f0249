"""SFT, reward models and DPO: killed at random moments, asked to stop, on a disk that is full. Every one of them goes
on to the weights of the run that nothing happened to, bit for bit."""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import WORDS
from tests.kills import Launcher, Run, Unbroken, differences, survives_kills, unbroken
from trainer.checkpoint import latest_checkpoint

STAGES = ("sft", "reward", "dpo")


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as started:
        yield started


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferences, which SFT reads as demonstrations."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "preferences.jsonl"
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=3)) + f" {i}",
            "chosen": " " + " ".join(draw.choices(WORDS[:12], k=draw.randint(1, 8))),
            "rejected": " " + " ".join(draw.choices(WORDS[12:], k=draw.randint(1, 8))),
        }
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def command(make_policy: Callable[..., Path], data: Path) -> Callable[..., list[str]]:
    """command("sft", output, resume, *flags): dropout draws random numbers in every step."""
    model = make_policy(seed=4, scale=0.5)

    def make(stage: str, output: Path, resume: bool, *flags: str) -> list[str]:
        own = ["--no-baselines", "--golden-items", "2"] if stage == "reward" else []
        return [
            *(stage, "--model", str(model), "--data", str(data), "--output", str(output), "--learning-rate", "0.003"),
            *("--batch-size", "8", "--epochs", "4", "--dropout", "0.1", "--held-out-fraction", "0.1"),
            *("--save-every", "3", "--eval-every", "10", *own, *flags, *(["--resume"] if resume else [])),
        ]

    return make


@pytest.fixture(scope="module")
def start(launcher: Launcher, command: Callable[..., list[str]]) -> Callable[..., Run]:
    def make(stage: str, output: Path, resume: bool = False, *flags: str) -> Run:
        return launcher.start(command(stage, output, resume, *flags), output.with_name(f"{output.name}.log"))

    return make


@pytest.fixture(scope="module")
def whole(start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Unbroken]:
    """whole("sft") is a run of that stage that nothing happened to, the same one in every test."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda stage: unbroken(lambda output, resume: start(stage, output, resume), folder / stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_the_unbroken_one(
    stage: str, start: Callable[..., Run], whole: Callable[[str], Unbroken], tmp_path: Path
) -> None:
    survives_kills(lambda output, resume: start(stage, output, resume), tmp_path, whole(stage), seed=len(stage))


@pytest.mark.parametrize(("stage", "number"), [("sft", signal.SIGTERM), ("dpo", signal.SIGINT)])
def test_a_run_that_is_asked_to_stop_ends_its_step_saves_says_so_and_goes_on(
    stage: str,
    number: signal.Signals,
    start: Callable[..., Run],
    whole: Callable[[str], Unbroken],
    tmp_path: Path,
) -> None:
    output = tmp_path / "stopped"
    stopped = start(stage, output, False, "--save-every", "0")
    while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_bytes():
        assert stopped.poll() is None, stopped.text()
        time.sleep(0.001)
    stopped.signal(number)
    assert stopped.wait() == 130
    steps = (output / "metrics.jsonl").read_bytes().count(b"\n")
    said = f"quartet-train {stage}: stopped after step {steps} of 56, as asked; saved in "
    assert f"{said}{output}/checkpoint-{steps:06d}. To go on, give the same command again with --resume" in (
        stopped.text()
    )
    for flags, message in (
        ((False,), "it already holds a run; go on with it by --resume"),
        ((True, "--seed", "5"), "--seed was 0, is 5"),
    ):
        refused = start(stage, output, *flags)
        assert refused.wait() == 2
        assert message in refused.text()
    resumed = start(stage, output, True)
    assert resumed.wait() == 0, resumed.text()
    assert differences(output, whole(stage).output) == []


# Where the folder is a disk of its own: with ever other room on it the run breaks off, and goes on from what it has.
_ON_A_SMALL_DISK = """
import shutil, sys
from pathlib import Path
from trainer.__main__ import main
from trainer.checkpoint import latest_checkpoint

disk, copy, size, arguments = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
for share in [0, 0.04, 0.7, 1.4, 0.2, 1.15, 0.9, 0.02, 6]:  # Of a checkpoint.
    (disk / "ballast").write_bytes(bytes(max(0, int(shutil.disk_usage(disk).free - share * size))))
    before, code = latest_checkpoint(disk / "run"), 0
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code
    after = latest_checkpoint(disk / "run")
    (disk / "ballast").unlink()
    half = [path.name for path in (disk / "run").glob(".*")]
    print("END", share, code, before.name if before else "-", after.name if after else "-", half, flush=True)
shutil.copytree(disk / "run", copy)
"""


def test_a_disk_that_is_full_costs_what_was_not_saved_yet_and_nothing_else(
    command: Callable[..., list[str]], whole: Callable[[str], Unbroken], tmp_path: Path
) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=12000000 none "$0" && exec "$@"', str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    size = sum(file.stat().st_size for file in latest_checkpoint(whole("sft").output).iterdir())
    run = [_ON_A_SMALL_DISK, str(disk), str(copy), str(size), *command("sft", disk / "run", True, "--track", "none")]
    done = subprocess.run([*mount, sys.executable, "-c", *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = [line.split(maxsplit=5)[1:] for line in done.stdout.splitlines() if line.startswith("END")]
    print(done.stdout, done.stderr)
    assert [code for _, code, *_ in ends] == ["2"] * (len(ends) - 1) + ["0"]
    told = [line for line in done.stderr.splitlines() if "can't be written: " in line]
    assert len(told) == len(ends) - 1
    assert all(
        re.search(r"quartet-train sft: .*/run/\S+ can't be written: .* MB are free there\); make", t) for t in told
    )
    for _, _, before, after, half in ends:
        assert before == "-" or after >= before
        assert half == "[]"
    assert len({after for _, _, _, after, _ in ends}) >= 3  # What was saved in between was gone on from.
    assert differences(copy, whole("sft").output) == []
