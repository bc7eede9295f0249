"""The log of a run: each step once, finite numbers only, whatever kills it; and the display that goes with it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from trainer.errors import TrainerError
from trainer.tracking import METRICS_FILE, RunTracker, TrackingError, read_metrics
from trainer.wording import brief, decimals_of_intervals, duration, fixed, number, percent

WATCH = ("reward/score_mean", "kl/sequence_mean")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def tracker(folder: Path, total_steps: int = 10, resume_step: int | None = None, **options) -> RunTracker:
    options.setdefault("console", Console(file=io.StringIO(), force_terminal=False))
    return RunTracker(folder, total_steps, WATCH, "PPO", resume_step, **options)


def write_steps(folder: Path, steps: range, total_steps: int = 10, resume_step: int | None = None) -> None:
    with tracker(folder, total_steps, resume_step) as t:
        for step in steps:
            t.log(step, {"reward/score_mean": step / 8})


# The log


def test_each_step_is_one_line_of_json_on_disk_before_log_returns(tmp_path):
    with tracker(tmp_path / "new" / "run") as t:
        for step in (1, 2, 5):
            t.log(step, {"reward/score_mean": 0.1 * step, "samples/failed": 0})
            lines = (tmp_path / "new" / "run" / METRICS_FILE).read_text().splitlines()
            assert json.loads(lines[-1]) == {"step": step, "reward/score_mean": 0.1 * step, "samples/failed": 0}
    assert [record["step"] for record in read_metrics(tmp_path / "new" / "run")] == [1, 2, 5]


def test_values_come_back_bit_for_bit(tmp_path):
    values = {"a": 1 / 3, "b": -1e-300, "c": 5e-324, "d": 1.7976931348623157e308, "e": 12345678901234567890}
    with tracker(tmp_path) as t:
        t.log(1, values)
    assert read_metrics(tmp_path) == [{"step": 1, **values}]


def test_numpy_numbers_are_taken_and_tensors_are_refused_by_key(tmp_path):
    with tracker(tmp_path) as t:
        t.log(1, {"a": np.float32(0.1), "b": np.int64(7), "c": np.float64(2.5)})
        with pytest.raises(TrackingError, match=r"policy/loss is tensor\(1\.\) \(Tensor\) at step 2"):
            t.log(2, {"policy/loss": torch.tensor(1.0)})
    assert read_metrics(tmp_path) == [{"step": 1, "a": float(np.float32(0.1)), "b": 7, "c": 2.5}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_a_figure_that_is_not_finite_is_left_out_and_told_when_it_becomes_so(tmp_path, value, capsys):
    """A diagnostic must not end a run, nor be written as a number that it is not."""
    told = f"warning: step {{}}: kl/k3 is {float(value)}: left out of metrics.jsonl until it is finite again\n"
    with tracker(tmp_path) as t:
        with t.recording() as metrics:
            metrics |= {"step": 1, "kl/k3": value, "loss": 0.5}
        assert told.format(1) in capsys.readouterr().err
        t.log(2, {"kl/k3": value, "loss": 0.4})
        t.log(3, {"loss": 0.3})
        t.also(3, {"kl/k3": 0.25})
        t.log(4, {"kl/k3": 0.5})
        assert "warning" not in capsys.readouterr().err
        t.also(4, {"kl/k3": value})
        assert told.format(4) in capsys.readouterr().err
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.4},
        {"step": 3, "loss": 0.3},
        {"step": 4, "kl/k3": 0.5},
    ]
    assert issubclass(TrackingError, TrainerError)


@pytest.mark.parametrize("step", [0, 3, 2, 11])
def test_a_step_that_does_not_rise_or_leaves_the_run_is_refused(tmp_path, step):
    with tracker(tmp_path, resume_step=0) as t:
        t.log(3, {})
        with pytest.raises(TrackingError, match=rf"step is {step}: it must be above the last logged step, 3, .* 10$"):
            t.log(step, {})


def test_a_step_among_the_metrics_must_agree_with_the_call(tmp_path):
    with tracker(tmp_path) as t:
        t.log(1, {"step": 1, "loss": 2.0})
        with pytest.raises(TrackingError, match="step is 3 among the metrics and 2 in the call"):
            t.log(2, {"step": 3})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    ("total", "resume", "field"), [(0, None, "total_steps"), (5, -1, "resume_"), (5, 6, "resume_")]
)
def test_impossible_bounds_are_refused(tmp_path, total, resume, field):
    with pytest.raises(TrackingError, match=field):
        tracker(tmp_path, total, resume)


def test_logging_after_the_end_is_refused(tmp_path):
    t = tracker(tmp_path)
    t.close()
    t.close()
    with pytest.raises(TrackingError, match="closed"):
        t.log(1, {})


# Resume


def test_resume_drops_what_comes_after_the_checkpoint_and_goes_on(tmp_path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(5, 11), resume_step=4)
    assert read_metrics(tmp_path) == [{"step": step, "reward/score_mean": step / 8} for step in range(1, 11)]


def test_resume_from_step_zero_starts_over(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 3), resume_step=0)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_new_run_does_not_add_to_another_runs_log(tmp_path):
    write_steps(tmp_path, range(1, 4))
    with pytest.raises(TrackingError, match="already holds a run of 3 records"):
        tracker(tmp_path)
    assert len(read_metrics(tmp_path)) == 3


def test_a_new_run_may_use_a_log_in_which_no_step_was_finished(tmp_path):
    write_steps(tmp_path, range(0))
    assert read_metrics(tmp_path) == []
    write_steps(tmp_path, range(1, 3))
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("cut", [1, 2, 7, 20])
def test_a_torn_last_line_is_left_out_and_written_over(tmp_path, cut):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / METRICS_FILE
    last = path.read_bytes().splitlines(keepends=True)[-1]
    with path.open("ab") as file:
        file.write(last.replace(b'"step":3', b'"step":4')[:-cut])
    complete = 4 if cut == 1 else 3  # Without its newline alone the record is whole.
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, complete + 1))
    write_steps(tmp_path, range(4, 6), resume_step=3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert path.read_bytes().endswith(b"}\n")


def test_zeros_after_a_power_cut_count_as_torn(tmp_path):
    write_steps(tmp_path, range(1, 3))
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b"\0" * 512)
    assert len(read_metrics(tmp_path)) == 2


def test_a_kill_while_the_log_is_cut_leaves_the_old_log(tmp_path, monkeypatch):
    write_steps(tmp_path, range(1, 8))
    before = (tmp_path / METRICS_FILE).read_bytes()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tracker(tmp_path, resume_step=4)
    monkeypatch.undo()
    assert (tmp_path / METRICS_FILE).read_bytes() == before
    write_steps(tmp_path, range(5, 8), resume_step=4)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_killed_with_sigkill_keeps_every_logged_step(tmp_path):
    script = f"""
        import os, signal
        from pathlib import Path
        from trainer.tracking import RunTracker
        with RunTracker(Path({str(tmp_path)!r}), 10, (), "PPO") as t:
            for step in range(1, 7):
                t.log(step, {{"loss": 1.0 / step}})
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path) == [{"step": step, "loss": 1.0 / step} for step in range(1, 7)]
    with tracker(tmp_path, resume_step=4) as t:
        for step in range(5, 11):
            t.log(step, {"loss": 2.0 / step})
    assert [record["loss"] for record in read_metrics(tmp_path)] == [
        (1.0 if step <= 4 else 2.0) / step for step in range(1, 11)
    ]


# Damaged logs


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken}", "line 2: not JSON"),
        ("", "line 2: not JSON"),
        ("[1]", "line 2: not a record"),
        ('{"loss": 1}', "line 2: not a record"),
        ('{"step": 2.0}', "line 2: not a record"),
        ('{"step": 1}', "line 2: step is 1: it must be above the one before, 1"),
        ('{"step": 2, "loss": "low"}', "line 2: loss is 'low'"),
        ('{"step": 2, "loss": NaN}', "line 2: loss is nan: it must be a finite number"),
        ('{"step": 2, "loss": 1e999}', "line 2: loss is inf"),
        ('{"step": 2, "loss": true}', "line 2: loss is True"),
        ('{"step": 2, "loss": null}', "line 2: loss is None"),
    ],
)
def test_damage_that_no_kill_leaves_is_named_with_file_and_line(tmp_path, line, reason):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(TrackingError, match=reason) as caught:
        read_metrics(tmp_path)
    assert str(tmp_path / METRICS_FILE) in str(caught.value)
    with pytest.raises(TrackingError, match=reason):
        tracker(tmp_path, resume_step=1)


def test_a_folder_without_a_log_is_no_run(tmp_path):
    with pytest.raises(TrackingError, match=r"holds no run: there is no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match=r"can't be (written|read)"):
        tracker(tmp_path / "file")


# The display


def test_elsewhere_than_on_a_terminal_a_plain_line_comes_now_and_then_and_at_the_end(tmp_path):
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=False, width=40)
    with tracker(tmp_path, console=console, clock=clock, line_every_s=5.0) as t:
        clock.now_s += 30.0  # Warm-up: it must not count as the pace of a step.
        for step in range(1, 11):
            clock.now_s += 2.0
            t.log(step, {"reward/score_mean": step / 7, "kl/sequence_mean": -0.00001234})
        before_close = out.getvalue()
    assert out.getvalue() == before_close
    # Seconds 32 + 2 k: lines at steps 1, 4, 7 and 10, none nearer than 5 s but the last.
    assert out.getvalue().splitlines() == [
        "PPO step 1/10  reward 0.143  KL -1.23e-5  4 min 48 s left",
        "PPO step 4/10  reward 0.571  KL -1.23e-5  12 s left",
        "PPO step 7/10  reward 1.00  KL -1.23e-5  6.0 s left",
        "PPO step 10/10  reward 1.43  KL -1.23e-5",
    ]


def test_a_watched_figure_shows_its_last_value_and_a_dash_before_its_first(tmp_path):
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=False)
    with RunTracker(tmp_path, 3, ("loss", "eval_loss"), "SFT", console=console, clock=clock, line_every_s=0) as t:
        t.log(1, {"loss": 3.0})
        t.log(2, {"loss": 2.0, "eval_loss": 2.5})
        t.log(3, {"loss": 1.0})
    assert [line.split("  ")[1:3] for line in out.getvalue().splitlines()] == [
        ["loss 3.00", "eval loss -"],
        ["loss 2.00", "eval loss 2.50"],
        ["loss 1.00", "eval loss 2.50"],
    ]


def test_a_resumed_run_starts_its_count_and_its_pace_at_the_checkpoint(tmp_path):
    write_steps(tmp_path, range(1, 7))
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=False)
    with tracker(tmp_path, resume_step=6, console=console, clock=clock) as t:
        clock.now_s += 4.0
        t.log(7, {})
    assert out.getvalue() == "PPO step 7/10  reward -  KL -  12 s left\n"


SHOW = """
    from pathlib import Path
    from trainer.tracking import RunTracker
    import sys
    with RunTracker(Path(sys.argv[1]), 4, ("reward/score_mean", "throughput/generated_tokens_per_s"), "PPO [b]") as t:
        for step in range(1, 5):
            t.log(step, {"reward/score_mean": step / 7, "throughput/generated_tokens_per_s": 4012.3})
            print(f"result of step {step}")
"""


@pytest.mark.parametrize("width", [100, 30])
def test_a_terminal_shows_a_bar_with_the_figures_and_keeps_standard_output_apart(tmp_path, width):
    pty = pytest.importorskip("pty", reason="pseudo-terminals exist on Unix only")
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    shown = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SHOW), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(slave)
    screen = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux ends a closed terminal with EIO.
            break
        if not chunk:
            break
        screen += chunk
    assert shown.stdout is not None
    assert shown.stdout.read().decode() == "".join(f"result of step {step}\n" for step in range(1, 5))
    assert shown.wait(timeout=60) == 0
    os.close(master)
    text = screen.decode()
    assert "PPO [b]" in text
    assert "4/4" in text
    assert "done" in text
    assert "reward 0.571" in text
    assert "tokens/s 4,012" in text
    assert "━" in text


# How figures are written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.12345, "0.123"),
        (-1.5, "-1.50"),
        (12.345, "12.3"),
        (999.96, "1,000"),
        (4012.3, "4,012"),
        (0.001, "0.00100"),
        (2.1e-5, "2.10e-5"),
        (1.234e12, "1.23e12"),
        (1234567, "1,234,567"),
        (7, "7"),
    ],
)
def test_numbers_are_written_to_three_digits_and_whole_ones_whole(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(20.0, "20"), (0.3, "0.3"), (0.0566, "0.0566"), (1e-5, "1e-5"), (1200.0, "1,200"), (0.0, "0")]
)
def test_bounds_are_written_without_trailing_zeros(value, text):
    assert brief(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.04, "40 ms"),
        (0.9996, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (680, "11 min 20 s"),
        (3600, "1 h 00 min"),
        (11100, "3 h 05 min"),
        (187200, "2 d 4 h"),
    ],
)
def test_durations_are_written_in_their_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_shares_and_fixed_decimals():
    assert [percent(share) for share in (0, 0.004, 0.0994, 0.0996, 0.5, 1, -0.02)] == [
        "0 %",
        "0.4 %",
        "9.9 %",
        "10 %",
        "50 %",
        "100 %",
        "-2.0 %",
    ]
    assert fixed(-0.0004, 3) == "0.000"
    assert fixed(-0.0006, 3) == "-0.001"
    assert fixed(1234.5, 1) == "1,234.5"


@pytest.mark.parametrize(("widths", "decimals"), [((0.072, 0.4), 3), ((1.0,), 1), ((12.0,), 0), ((0.0,), 3), ((), 3)])
def test_intervals_are_written_with_two_digits_of_their_narrowest_half_width(widths, decimals):
    assert decimals_of_intervals(*widths) == decimals
