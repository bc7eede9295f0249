"""The record of a run while it goes on: one JSON object a step in ``metrics.jsonl``, and a progress display on stderr.

The log is what the report is made of and what a resumed run continues, so it holds each step once, in order, and only
finite numbers: a figure that is none is left out and named on stderr. On a terminal the display is a bar with the
watched figures; elsewhere it is a plain line now and then.
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn
from rich.table import Table
from rich.text import Text

from trainer.distributed import is_first
from trainer.errors import StoppedError, TrainerError
from trainer.files import replace_file, room
from trainer.track_settings import TrackSettings
from trainer.trackers import Follower, Outcome, TrackedRun, make_trackers
from trainer.wording import duration, number

METRICS_FILE = "metrics.jsonl"
# Which run this is to the trackers.
TRACKING_FILE = "tracking.json"

# Short names for the display; a figure that is not here stands under its own key.
_SHORT_NAMES = {
    "reward/score_mean": "reward",
    "kl/sequence_mean": "KL",
    "kl/beta": "beta",
    "policy/entropy_mean": "entropy",
    "policy/clip_fraction": "clipped",
    "value/loss": "value loss",
    "response/length_mean": "length",
    "response/finished_share": "finished",
    "throughput/generated_tokens_per_s": "tokens/s",
    "tokens_per_s": "tokens/s",
    "eval_loss": "eval loss",
    "margin_mean": "margin",
    "learning_rate": "lr",
}

# Steps over which the time left is estimated: long enough to even out evaluations, short enough to follow a change.
_PACE_STEPS = 20


class TrackingError(TrainerError):
    """The log of a run can't be written or read: what is wrong, and where."""


class RunTracker:
    """Appends a run's figures to ``metrics.jsonl`` and shows how far it is.

    Use it as a context manager. ``log`` may be called once a step, in rising order; steps may be skipped.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        watch: Sequence[str],
        description: str,
        resume_step: int | None = None,
        *,
        settings: TrackSettings | None = None,
        console: Console | None = None,
        line_every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            output_dir: folder of the run; made if it is missing.
            total_steps: the last step this run will log.
            watch: keys of the figures to show, most important first.
            description: what runs, as in "PPO".
            resume_step: the step of the checkpoint that the run goes on from (0: from the start). Records after it are
                dropped from the log, since those steps will be done again. None: a new run, whose log must not exist.
            settings: those of the run: where else figures go, and what trackers are told of the run. None: nowhere.
            console: where the display goes; stderr by default.
            line_every_s: least seconds between two plain lines, where stderr is no terminal.
            clock: seconds, monotonic.

        Raises:
            TrackingError: a bound of the steps is impossible, a new run would add to another one's log, or the log to
                be continued is damaged.
        """
        if total_steps < 1:
            raise TrackingError(f"total_steps is {total_steps}: a run has at least 1 step")
        if resume_step is not None and not 0 <= resume_step <= total_steps:
            raise TrackingError(f"resume_step is {resume_step}: it must be within 0 and total_steps, {total_steps}")
        self._path = output_dir / METRICS_FILE
        self._total_steps = total_steps
        self._last_step = resume_step or 0
        self._line_every_s = line_every_s
        self._clock = clock
        self._description = description
        self._figures: dict[str, float | None] = dict.fromkeys(watch)
        self._pace = _Pace(clock, self._last_step, total_steps)
        self._next_line_s = -math.inf
        self._odd: set[str] = set()
        self._file, kept = _open_log(self._path, resume_step)
        self._followers = _follow(output_dir, description, resume_step, settings, kept) if settings else []
        self._console = console if console is not None else Console(stderr=True)
        self._progress: _Display | None = None

    def __enter__(self) -> Self:
        self._pace.start()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._progress = _Display(self._console, self._pace)
            self._progress.add_task(
                self._description, total=self._total_steps, completed=self._last_step, figures=_shown(self._figures)
            )
            self._progress.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopped = exc_type is not None and issubclass(exc_type, (StoppedError, KeyboardInterrupt))
        self.close("finished" if exc_type is None else "stopped" if stopped else "failed")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records ``metrics`` as those of ``step`` and moves the display on.

        Raises:
            TrackingError: a figure is not a number (the message names its key), or ``step`` is not above the last one
                or beyond the run's end, and nothing is written; or the file can't be written.
        """
        if self._file.closed:
            raise TrackingError(f"step {step} can't be logged: {self._path} is closed")
        if not self._last_step < step <= self._total_steps:
            raise TrackingError(
                f"step is {step}: it must be above the last logged step, {self._last_step}, "
                f"and at most total_steps, {self._total_steps}"
            )
        record = self._record(step, metrics)
        # Unbuffered: what a kill or a full disk can tear is at most the last line, which reading leaves out.
        line = _line(record)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._last_step = step
        self._pace.step(step)
        self._figures.update((key, record.get(key)) for key in self._figures if key in metrics)
        for follower in self._followers:
            follower.put(step, record)
        self._show(step)

    def also(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows trackers what is in no step's record: evaluations before the first step and after the last.

        Raises:
            TrackingError: a figure is not a number.
        """
        record = self._record(step, metrics)
        for follower in self._followers if metrics else ():
            follower.put(step, record, more=True)

    @contextlib.contextmanager
    def recording(self) -> Iterator[dict[str, float]]:
        """Gives a dictionary to fill. When the block ends, by an error or not, its figures are logged as those of their
        ``step``; nothing is without one.

        Raises:
            TrackingError: as ``log``.
        """
        metrics: dict[str, float] = {}
        try:
            yield metrics
        finally:
            if "step" in metrics:
                self.log(int(metrics["step"]), metrics)

    def close(self, outcome: Outcome = "finished") -> None:
        """Ends the display, the trackers and the log. Calling it again does nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._file.close()
        while self._followers:
            self._followers.pop().close(outcome)

    def _record(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """``metrics`` as Python's numbers, without those that are not finite, which are named when they become so.

        What a run lives by (losses, gradients, weights, evaluations) its stage looks at itself, and ends by name. What
        is left here tells of the run alone: it must neither end it nor be taken for a number.
        """
        record, odd = _record(step, metrics), {}
        for key in [key for key, value in record.items() if not math.isfinite(value)]:
            odd[key] = record.pop(key)
        if new := {key: value for key, value in odd.items() if key not in self._odd}:
            named = ", ".join(f"{key} is {value}" for key, value in new.items())
            sys.stderr.write(f"warning: step {step}: {named}: left out of {METRICS_FILE} until it is finite again\n")
        self._odd = {key for key in self._odd if key not in metrics} | odd.keys()
        return record

    def _show(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, figures=_shown(self._figures))
            return
        now_s = self._clock()
        if now_s < self._next_line_s and step < self._total_steps:
            return
        self._next_line_s = now_s + self._line_every_s
        parts = [f"{self._description} step {step}/{self._total_steps}", *_shown(self._figures)]
        if step < self._total_steps:
            parts.append(_time_left(self._pace.left_s()))
        self._console.file.write("  ".join(part for part in parts if part) + "\n")
        self._console.file.flush()


class NoTracker:
    """A tracker that keeps nothing: the first of several processes logs for all of them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def also(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    @contextlib.contextmanager
    def recording(self) -> Iterator[dict[str, float]]:
        yield {}


def run_tracker(
    output_dir: Path,
    total_steps: int,
    watch: Sequence[str],
    description: str,
    resume_step: int | None,
    *,
    settings: TrackSettings,
) -> RunTracker | NoTracker:
    """The ``RunTracker`` of a run in the process that logs, ``NoTracker`` in others."""
    if not is_first():
        return NoTracker()
    return RunTracker(output_dir, total_steps, watch, description, resume_step, settings=settings)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The records of a run in order, each with its ``step``. A torn last line, as a kill leaves it, is left out.

    Raises:
        TrackingError: there is no log in ``run_dir``, or a line of it is not such a record (file and line are named).
    """
    path = run_dir / METRICS_FILE
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise TrackingError(f"{run_dir} holds no run: there is no {METRICS_FILE} in it") from None
    except OSError as error:
        raise TrackingError(f"{path} can't be read: {error.strerror}") from error
    return _parse(path, raw)


def _open_log(path: Path, resume_step: int | None) -> tuple[FileIO, list[dict[str, float]]]:
    """Opens the log for appending; what is already in it ends with the step to resume from, and is returned, too."""
    kept: list[dict[str, float]] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            records = read_metrics(path.parent)
            if resume_step is None and records:
                raise TrackingError(
                    f"{path} already holds a run of {len(records)} records: resume that run, or choose another folder"
                )
            kept = [record for record in records if record["step"] <= (resume_step or 0)]
            _replace(path, kept)
        return path.open("ab", buffering=0), kept
    except OSError as error:
        raise _unwritable(path, error) from error


def _follow(
    output: Path,
    stage: str,
    resume_step: int | None,
    settings: TrackSettings,
    kept: Sequence[Mapping[str, float]],
) -> list[Follower]:
    """Starts the trackers; a resumed run is the run that it was."""
    path = output / TRACKING_FILE
    run_id = uuid.uuid4().hex[:12]
    if resume_step is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            run_id = str(json.loads(path.read_text(encoding="utf-8"))["run"])
    replace_file(path, json.dumps({"run": run_id}) + "\n")
    run = TrackedRun(
        run_id=run_id,
        stage=stage,
        output=output,
        settings=settings.model_dump(mode="json"),
        resume_step=resume_step,
    )
    return [Follower(tracker, run, kept) for tracker in make_trackers(settings)]


def _unwritable(path: Path, error: OSError) -> TrackingError:
    return TrackingError(
        f"{path} can't be written: {error.strerror}{room(path)}; make room or mend the cause, then give the same "
        "command again with --resume"
    )


def _replace(path: Path, records: Iterable[Mapping[str, float]]) -> None:
    """Rewrites the log in one step: a kill in between leaves the old one, which the next resume cuts again."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.writelines(_line(record) for record in records)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _line(record: Mapping[str, float]) -> bytes:
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _record(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    record: dict[str, float] = {"step": step}
    for key, value in metrics.items():
        if not isinstance(value, numbers.Real):
            raise TrackingError(f"{key} is {value!r} ({type(value).__name__}) at step {step}: it must be a number")
        if key == "step" and value != step:
            raise TrackingError(f"step is {value} among the metrics and {step} in the call: they must agree")
        # numpy's numbers are no JSON; Python's are.
        record[key] = int(value) if isinstance(value, numbers.Integral) else float(value)
    return record


def _parse(path: Path, raw: bytes) -> list[dict[str, float]]:
    lines = raw.split(b"\n")
    records: list[dict[str, float]] = []
    for index, line in enumerate(lines):
        last = index == len(lines) - 1
        if last and not line:
            break  # What follows the final newline.
        where = f"{path}, line {index + 1}"
        try:
            record = json.loads(line)
        except ValueError as error:
            if last:
                break  # Torn: it has no newline, and half an object never parses.
            raise TrackingError(f"{where}: not JSON ({error})") from error
        records.append(_check_record(where, record, records[-1]["step"] if records else None))
    return records


def _check_record(where: str, record: object, last_step: float | None) -> dict[str, float]:
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise TrackingError(f"{where}: not a record: it must be an object with a whole number 'step'")
    for key, value in record.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise TrackingError(f"{where}: {key} is {value!r}: it must be a finite number")
    if last_step is not None and record["step"] <= last_step:
        raise TrackingError(f"{where}: step is {record['step']}: it must be above the one before, {last_step}")
    return record


class _Pace:
    """Time left, from the durations of the last steps."""

    def __init__(self, clock: Callable[[], float], first_step: int, total_steps: int) -> None:
        self._clock = clock
        self._total_steps = total_steps
        self._marks: deque[tuple[float, int]] = deque([(clock(), first_step)], maxlen=_PACE_STEPS + 1)
        self._logged = 0

    def start(self) -> None:
        self._marks[-1] = (self._clock(), self._marks[-1][1])

    def step(self, step: int) -> None:
        if self._logged == 1:
            # The first interval held warm-up and first evaluations: it goes as soon as there is another.
            self._marks.popleft()
        self._marks.append((self._clock(), step))
        self._logged += 1

    def left_s(self) -> float | None:
        """Seconds; None before the first step is done."""
        (first_s, first_step), (last_s, last_step) = self._marks[0], self._marks[-1]
        if last_step == first_step:
            return None
        step_s = (last_s - first_s) / (last_step - first_step)
        return max(0.0, step_s * (self._total_steps - last_step) - (self._clock() - last_s))


class _Display(Progress):
    """Two lines: how far and how long, then the figures, so that neither pushes the other off a narrow terminal."""

    def __init__(self, console: Console, pace: _Pace) -> None:
        self._pace = pace
        super().__init__(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            console=console,
            refresh_per_second=4,
            # Standard output goes through the display only where both are the same screen: never into a pipe.
            redirect_stdout=_is_terminal(sys.stdout),
            expand=True,
        )

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, justify="right")
        for task in tasks:
            left = Text("done" if task.finished else _time_left(self._pace.left_s()), style="cyan")
            table.add_row(*(column(task) for column in self.columns if not isinstance(column, str)), left)
        return table

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield from _wrap(task.fields["figures"], self.console.width)


def _wrap(figures: Sequence[str], width: int) -> Iterable[Text]:
    """Lines of whole figures: a name is not parted from its value while the terminal is wide enough for both."""
    line = ""
    for figure in figures:
        if line and len(line) + 2 + len(figure) > width:
            yield Text(line)
            line = ""
        line += ("  " if line else "") + figure
    if line:
        yield Text(line)


def _is_terminal(stream: object) -> bool:
    with contextlib.suppress(AttributeError, ValueError):  # Closed, or replaced by something with no isatty.
        return bool(stream.isatty())  # type: ignore[attr-defined]
    return False


def _shown(figures: Mapping[str, float | None]) -> list[str]:
    """Each watched figure under its short name; a dash until it was first logged."""
    return [f"{_SHORT_NAMES.get(key, key)} {'-' if value is None else number(value)}" for key, value in figures.items()]


def _time_left(left_s: float | None) -> str:
    return "" if left_s is None else f"{duration(left_s)} left"
