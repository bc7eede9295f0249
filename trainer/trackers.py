"""Trackers: TensorBoard, MLflow and Weights & Biases behind three calls, each in a thread of its own.

A tracker is a copy for looking at; the record of a run is ``metrics.jsonl``. So nothing that happens to a tracker ends,
slows or changes a run: what it did not take is kept and offered again, and what it never took is in the log, from which
a resumed run brings it up to date.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from trainer.track_settings import TrackSettings

Outcome = Literal["finished", "stopped", "failed"]

TENSORBOARD_FOLDER = "tensorboard"
MLFLOW_FILE = "mlflow.db"

# So long is a tracker that failed left alone; twice as long after each further failure, up to the latter.
_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 300.0
# So long does the end of a run wait for a tracker that has not taken everything yet.
_PATIENCE_S = 30.0
# What MLflow takes in one request, and characters of one value.
_MLFLOW_PARAMS, _MLFLOW_CHARACTERS = 100, 6000


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What trackers are told of a run. ``run_id`` is the same for all of them, and for the run once it is resumed.

    ``resume_step``: of the checkpoint that it goes on from; None: it begins.
    """

    run_id: str
    stage: str
    output: Path
    settings: Mapping[str, Any]
    resume_step: int | None

    @property
    def name(self) -> str:
        return self.output.resolve().name


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one step. ``time_s``: when they were measured, seconds since 1970."""

    step: int
    time_s: float
    values: Mapping[str, float]
    more: bool = False
    """Whether ``step`` has other figures already."""


class Tracker(Protocol):
    """Where figures go. Any call may raise anything; it is then made again."""

    name: str

    def start(self, run: TrackedRun) -> int:
        """Begins the run, or goes on with it. Returns the last step whose figures it has already."""

    def log(self, figures: Figures) -> None:
        """Takes the figures of one step."""

    def finish(self, outcome: Outcome) -> None:
        """Ends the run."""


class TensorBoard:
    """Event files in OUTPUT/tensorboard. What a resumed run does again hides what was logged of it before."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, run: TrackedRun) -> int:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run.output / TENSORBOARD_FOLDER))
        first_step = (run.resume_step or 0) + 1
        start = SessionLog(status=SessionLog.SessionStatus.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))
        return run.resume_step or 0

    def log(self, figures: Figures) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in figures.values.items()]
        self._writer.add_event(Event(wall_time=figures.time_s, step=figures.step, summary=Summary(value=values)))
        self._writer.flush()

    def finish(self, outcome: Outcome) -> None:
        self._writer.close()


class MLflow:
    """A run of an MLflow experiment: of MLFLOW_TRACKING_URI, or of mlflow.db beside the run's folder."""

    name = "mlflow"

    def __init__(self, project: str) -> None:
        self._project = project
        self._client: Any = None
        self._run_id = ""

    def start(self, run: TrackedRun) -> int:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        # That it makes its tables it would say amid the display.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.output.resolve().parent / MLFLOW_FILE}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment_id = self._experiment()
        found = self._client.search_runs([experiment_id], filter_string=f"tags.`quartet.run` = '{run.run_id}'")
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return int(found[0].data.metrics.get("step", 0))
        tags = {"mlflow.runName": run.name, "quartet.run": run.run_id, "quartet.stage": run.stage}
        self._run_id = self._client.create_run(experiment_id, tags=tags).info.run_id
        params = [Param(key, str(value)[:_MLFLOW_CHARACTERS]) for key, value in run.settings.items()]
        for at in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(self._run_id, params=params[at : at + _MLFLOW_PARAMS])
        return 0

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._project)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(self._project))
        except Exception:
            # Another run was first.
            found = self._client.get_experiment_by_name(self._project)
            if found is None:
                raise
            return str(found.experiment_id)

    def log(self, figures: Figures) -> None:
        from mlflow.entities import Metric

        values = {**figures.values, "step": figures.step}
        stamp_ms = int(1000 * figures.time_s)
        metrics = [Metric(key, float(value), stamp_ms, figures.step) for key, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self._client.set_terminated(self._run_id, status=status)


class WandB:
    """A run of a Weights & Biases project; account, server and mode are those of its own WANDB_... variables."""

    name = "wandb"

    def __init__(self, project: str) -> None:
        self._project = project
        self._run: Any = None

    def start(self, run: TrackedRun) -> int:
        import wandb

        self._run = wandb.init(
            project=self._project,
            id=run.run_id,
            name=run.name,
            job_type=run.stage,
            config=dict(run.settings),
            dir=str(run.output),
            resume="allow",
            # Quiet, and never asking at the terminal: the display of the run is there.
            settings=wandb.Settings(console="off", silent=True, login_timeout=1),
        )
        # Its next step: 0 of a new run, and offline, where it knows nothing of an earlier part.
        return int(self._run.step) - 1 if self._run.step else run.resume_step or 0

    def log(self, figures: Figures) -> None:
        self._run.log(dict(figures.values), step=figures.step)

    def finish(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


def make_trackers(settings: TrackSettings) -> list[Tracker]:
    """Those that the settings ask for."""
    made: dict[str, Callable[[], Tracker]] = {
        "tensorboard": TensorBoard,
        "mlflow": lambda: MLflow(settings.track_project),
        "wandb": lambda: WandB(settings.track_project),
    }
    return [made[name]() for name in settings.trackers]


class Follower:
    """Brings figures to one tracker, in order, from a thread: a tracker that hangs or fails holds nobody up."""

    def __init__(
        self,
        tracker: Tracker,
        run: TrackedRun,
        kept: Sequence[Mapping[str, float]] = (),
        *,
        pause_s: float = _PAUSE_S,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """
        Args:
            tracker: is started in the thread.
            run: what it is told.
            kept: records of the log of a resumed run; those that the tracker lacks are sent first.
            pause_s: before a tracker that failed is tried again; doubled each time.
            patience_s: that ``close`` waits.
        """
        self._tracker = tracker
        self._run = run
        self._kept = kept
        self._pause_s = pause_s
        self._patience_s = patience_s
        self._arrived: queue.SimpleQueue[Figures | Outcome] = queue.SimpleQueue()
        self._waiting: deque[Figures] = deque()
        self._last_step: int | None = None  # That the tracker had when it was started.
        self._given = self._taken = 0
        self._complained = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{tracker.name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: Mapping[str, float], *, more: bool = False) -> None:
        """Hands figures over and returns at once. ``more``: beside those that ``step`` has already."""
        own = {key: float(value) for key, value in values.items() if key != "step"}
        self._given += 1
        self._arrived.put(Figures(step=step, time_s=time.time(), values=own, more=more))

    def close(self, outcome: Outcome) -> None:
        """Waits a while until the tracker has everything, and says what it does not have."""
        self._arrived.put(outcome)
        self._thread.join(self._patience_s)
        if missing := self._given - self._taken:
            self._say(f"lacks figures of {missing:,d} steps; metrics.jsonl has them, and --resume brings them")
        elif self._complained:
            self._say("is well again and has every figure")

    def _work(self) -> None:
        well, pause_s = self._deliver(), self._pause_s  # At once: trackers show a run from its beginning.
        outcome: Outcome | None = None
        while outcome is None:
            outcome = self._receive(None if well else pause_s)
            well = self._deliver()
            pause_s = self._pause_s if well else min(2 * pause_s, _LONGEST_PAUSE_S)
        if well:
            ended = outcome
            self._guarded(lambda: self._tracker.finish(ended))

    def _receive(self, pause_s: float | None) -> Outcome | None:
        """Takes what arrives: one thing, or everything within ``pause_s``. The outcome is the last to come."""
        end_s = math.inf if pause_s is None else time.monotonic() + pause_s
        with contextlib.suppress(queue.Empty):
            while (left_s := end_s - time.monotonic()) > 0:
                item = self._arrived.get(timeout=None if pause_s is None else left_s)
                if isinstance(item, str):
                    return item
                self._waiting.append(item)
                if pause_s is None:
                    break
        return None

    def _deliver(self) -> bool:
        """Offers everything that waits; whether it was taken."""
        if self._last_step is None and not self._guarded(self._start):
            return False
        while self._waiting:
            if not self._is_known(self._waiting[0]) and not self._guarded(lambda: self._tracker.log(self._waiting[0])):
                return False
            self._waiting.popleft()
            self._taken += 1
        return True

    def _start(self) -> None:
        self._last_step = self._tracker.start(self._run)
        kept = [
            Figures(
                step=int(record["step"]), time_s=time.time(), values={k: v for k, v in record.items() if k != "step"}
            )
            for record in self._kept
        ]
        self._given += len(kept)
        self._waiting.extendleft(reversed(kept))

    def _is_known(self, figures: Figures) -> bool:
        """A resumed run does steps again that the tracker has of the one that was killed: the same figures."""
        return not figures.more and figures.step <= (self._last_step or 0)

    def _guarded(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever a tracking library raises, the run goes on.
            if not self._complained:
                self._complained = True
                reason = (str(error).strip().splitlines() or [""])[0]
                self._say(
                    f"failed and is tried again now and then ({type(error).__name__}{': ' if reason else ''}{reason}); "
                    "the run goes on, and metrics.jsonl has every figure"
                )
            return False
        return True

    def _say(self, what: str) -> None:
        sys.stderr.write(f"tracking: {self._tracker.name} {what}\n")
