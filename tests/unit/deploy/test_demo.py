"""The demo: what it says at its end, which folder it goes on in, and how it ends when it is told to."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import demo
from deploy.demo import claim, content_sha256, has_risen, ingredients, next_folder, run_stages, stage

ROOT = Path(__file__).resolve().parent.parent.parent.parent
# Stands for a stage that needs seconds to save what it has; notes how often it was interrupted.
STAGE = """
import signal, sys, time
interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
signal.signal(signal.SIGTERM, lambda *_: interrupts.append(1))
open("up", "w").close()
while not interrupts:
    time.sleep(0.02)
time.sleep(2.0)
open("saved", "w").write(str(len(interrupts)))
sys.exit(130)
"""
DEMO = f"import sys\nfrom deploy.demo import run\nrun(sys.executable, '-c', {STAGE!r})\nprint('the next stage')\n"


@pytest.mark.parametrize(("after", "risen"), [((3.0, 0.9), True), ((3.0, 1.1), False), ((0.0, 0.1), False)])
def test_the_reward_has_risen_where_the_intervals_are_disjoint_and_the_later_one_is_above(after, risen, tmp_path):
    for name, (mean, half_width) in (("before", (1.0, 1.0)), ("after", after)):
        figures = {"score_mean": mean, "score_ci95": half_width}
        (tmp_path / f"evaluation_{name}.json").write_text(json.dumps(figures))
    assert has_risen(tmp_path) is risen


# Being told to end ----------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def start(folder: Path, stdin: int) -> subprocess.Popen[str]:
    """A demo of one stage, in the foreground of its own terminal, once the stage runs."""

    def as_from_a_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [sys.executable, "-c", DEMO],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos")])},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_from_a_terminal,
    )
    end = time.monotonic() + 60
    while not (folder / "up").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="tells signals apart by who sent them")
@pytest.mark.parametrize(
    ("how", "code", "interrupts"),
    [("terminal", 130, {"1"}), ("group", 130, {"1", "2"}), ("demo alone", 130, {"1"}), ("SIGTERM", 143, {"1"})],
)
def test_a_stage_saves_what_it_has_before_the_demo_ends(how, code, interrupts, tmp_path, terminal):
    process = start(tmp_path, terminal[1])
    if how == "terminal":
        os.write(terminal[0], b"\x03")
    elif how == "group":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert (tmp_path / "saved").read_text() in interrupts
    assert "stopped, as asked; the same command goes on from there" in stderr
    assert "Traceback" not in stderr
    assert "the next stage" not in stdout


def test_a_stage_that_fails_ends_the_demo_and_is_named(capsys):
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero exit status 3"):
        demo.run(sys.executable, "-c", "raise SystemExit(3)")
    demo.run(sys.executable, "-c", "pass")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM} == set()


# Folders --------------------------------------------------------------------------------------------------------------


def finish(folder: Path) -> None:
    (folder / "ppo").mkdir(parents=True)
    (folder / "ppo" / "report.html").touch()


def test_a_demo_goes_on_only_in_a_folder_of_the_same_data_model_and_steps(tmp_path):
    runs, file = tmp_path / "runs", tmp_path / "preferences.jsonl"
    file.write_text('{"chosen": "a", "rejected": "b"}\n')
    own, of_file = ingredients(None, None, "24"), ingredients(str(file), None, "24")
    assert next_folder(runs, own) == runs / "demo"
    claim(runs / "demo", own)
    assert next_folder(runs, own) == runs / "demo"  # Begun, not finished.
    assert next_folder(runs, of_file) == runs / "demo-2"
    claim(runs / "demo-2", of_file)
    assert next_folder(runs, ingredients(str(file), "another/model", "24")) == runs / "demo-3"
    assert next_folder(runs, ingredients(str(file), None, "25")) == runs / "demo-3"
    finish(runs / "demo")
    assert next_folder(runs, own) == runs / "demo-3"
    assert next_folder(runs, of_file) == runs / "demo-2"
    file.write_text('{"chosen": "b", "rejected": "a"}\n')  # The same name, other rows.
    assert next_folder(runs, ingredients(str(file), None, "24")) == runs / "demo-3"


def test_models_of_nobody_knows_what_are_not_used(tmp_path, capsys):
    own = ingredients(None, None, "24")
    (tmp_path / "demo" / "sft" / "model").mkdir(parents=True)
    (tmp_path / "demo-2").mkdir()
    (tmp_path / "demo-2" / "demo.json").write_text("{")
    assert next_folder(tmp_path, own) == tmp_path / "demo-3"
    for folder in ("demo", "demo-2", "demo-2/demo.json", "demo-2/demo.json/x"):
        with pytest.raises(SystemExit) as end:
            claim(tmp_path / folder, own)
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"demo: --output is '{tmp_path / folder}': ")


def test_a_model_folder_is_known_by_its_files(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"1")
    first = content_sha256(model)
    assert first == content_sha256(model)
    (model / "model.safetensors").write_bytes(b"2")
    assert first != content_sha256(model)
    assert content_sha256(tmp_path / "owner/name") is None


def test_a_stage_is_run_unless_its_model_stands(tmp_path, monkeypatch):
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo, "run", lambda *command: asked.append(command[1:]))
    stage(tmp_path / "sft", "sft", "--data", "d")
    (tmp_path / "sft" / "checkpoint-000003").mkdir(parents=True)
    stage(tmp_path / "sft", "sft", "--data", "d")
    (tmp_path / "sft" / "model").mkdir()
    stage(tmp_path / "sft", "sft", "--data", "d")
    assert asked == [("sft", "--data", "d", "--output", str(tmp_path / "sft"), "--resume")] * 2


def test_data_of_which_a_row_has_no_prompt_is_refused_before_anything_is_trained(tmp_path, capfd):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": "b", "rejected": "c"}]
    file = tmp_path / "preferences.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(subprocess.CalledProcessError):
        run_stages(tmp_path / "demo", str(file), None, "24")
    assert f"{file}, line 2: this row has 'chosen', line 1 has 'prompt' and 'chosen': " in capfd.readouterr().err
    assert not (tmp_path / "demo" / "init").exists()
