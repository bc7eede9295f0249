"""Trackers read back from what they wrote, and a run that none of them can hurt."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

import trainer.tracking
from trainer import track_settings
from trainer.config import SftSettings
from trainer.errors import StoppedError
from trainer.track_settings import TrackSettings
from trainer.trackers import Figures, Follower, TrackedRun, WandB, make_trackers
from trainer.tracking import RunTracker, read_metrics

# Tests call nobody.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["WANDB_ERROR_REPORTING"] = "false"


def sft(output: Path, *names: str) -> SftSettings:
    return SftSettings(model="m", data=("d.jsonl",), output=output, track=names, learning_rate=0.25)


def tracker(output: Path, settings: TrackSettings | None, total: int = 6, resume_step: int | None = None) -> RunTracker:
    quiet = Console(file=io.StringIO(), force_terminal=False)
    return RunTracker(output, total, (), "SFT", resume_step, settings=settings, console=quiet)


def log(t: RunTracker, *steps: int, scale: float = 1.0) -> None:
    for step in steps:
        t.log(step, {"loss": scale / step, "eval/score_mean": 0.5 * step})


def run_of(output: Path, resume_step: int | None = None) -> TrackedRun:
    return TrackedRun(run_id="abc", stage="PPO", output=output, settings={"a": 1}, resume_step=resume_step)


class Fake:
    """Fails as often as it is told, and remembers what it took."""

    name = "fake"

    def __init__(self, failures: int = 0, *, has: int = 0, start_fails: bool = False, error: Exception | None = None):
        self.failures, self.has, self.start_fails = failures, has, start_fails
        self.error = error or ConnectionError("no route\nto host")
        self.taken: list[tuple[int, dict[str, float]]] = []
        self.outcome: str | None = None
        self.times: list[float] = []

    def fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise self.error

    def start(self, run: TrackedRun) -> int:
        if self.start_fails:
            self.fail()
        return self.has

    def log(self, figures: Figures) -> None:
        self.fail()
        self.taken.append((figures.step, dict(figures.values)))
        self.times.append(figures.time_s)

    def finish(self, outcome: str) -> None:
        self.outcome = outcome


# One tracker and its thread


@pytest.mark.parametrize("start_fails", [True, False])
def test_what_a_tracker_did_not_take_is_kept_in_order_and_it_is_said_once(tmp_path, capsys, start_fails):
    fake = Fake(3, start_fails=start_fails)
    follower = Follower(fake, run_of(tmp_path), pause_s=0.01, patience_s=20)
    for step in range(1, 8):
        follower.put(step, {"loss": step / 8, "step": step})
    end_s = time.monotonic() + 30
    while fake.failures and time.monotonic() < end_s:
        time.sleep(0.005)
    follower.close("finished")
    assert fake.taken == [(step, {"loss": step / 8}) for step in range(1, 8)]
    assert fake.outcome == "finished"
    assert capsys.readouterr().err == (
        "tracking: fake failed and is tried again now and then (ConnectionError: no route); the run goes on, and "
        "metrics.jsonl has every figure\ntracking: fake is well again and has every figure\n"
    )


def test_a_tracker_that_never_works_is_told_with_the_steps_that_it_lacks(tmp_path, capsys):
    fake = Fake(10**6, error=ValueError())
    follower = Follower(fake, run_of(tmp_path), pause_s=30)
    for step in (1, 2, 3):
        follower.put(step, {"loss": 1.0})
    follower.close("failed")
    assert fake.taken == []
    assert fake.outcome is None
    first, last = capsys.readouterr().err.splitlines()
    assert "failed and is tried again now and then (ValueError);" in first
    assert last == "tracking: fake lacks figures of 3 steps; metrics.jsonl has them, and --resume brings them"


def test_a_tracker_that_hangs_holds_nobody_up(tmp_path, capsys):
    release = threading.Event()

    class Hanging(Fake):
        def log(self, figures: Figures) -> None:
            release.wait(60)

    follower = Follower(Hanging(), run_of(tmp_path), patience_s=0.2)
    for step in range(1, 1001):
        follower.put(step, {"loss": 1.0})
    follower.close("finished")
    assert "lacks figures of 1,000 steps" in capsys.readouterr().err
    release.set()


def test_a_resumed_run_brings_what_the_tracker_lacks_and_repeats_nothing_that_it_has(tmp_path):
    kept = [{"step": step, "loss": float(step)} for step in range(1, 5)]
    behind, ahead = Fake(has=2), Fake(has=6)
    for fake in (behind, ahead):
        follower = Follower(fake, run_of(tmp_path, resume_step=4), kept)
        for step in (5, 6, 7):
            follower.put(step, {"loss": float(step)})
        follower.put(7, {"eval/score_mean": 1.0}, more=True)
        follower.close("finished")
    after = [(7, {"loss": 7.0}), (7, {"eval/score_mean": 1.0})]
    assert behind.taken == [(step, {"loss": float(step)}) for step in (3, 4, 5, 6)] + after
    assert ahead.taken == after


# A run


def test_a_run_ends_the_same_whatever_its_trackers_do(tmp_path, capsys, monkeypatch):
    broken, well = Fake(10**6, start_fails=True), Fake()
    monkeypatch.setattr(trainer.tracking, "make_trackers", lambda settings: [broken, well])
    state = torch.get_rng_state()
    with tracker(tmp_path, sft(tmp_path, "none")) as t:
        t.also(0, {"eval/score_mean": 0.0})
        log(t, 1, 2, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert well.taken == [(0, {"eval/score_mean": 0.0})] + [
        (step, {"loss": 1 / step, "eval/score_mean": 0.5 * step}) for step in (1, 2, 3)
    ]
    assert capsys.readouterr().err.count("tracking: fake failed") == 1


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(None, "finished"), (StoppedError("s"), "stopped"), (KeyboardInterrupt(), "stopped"), (OSError(), "failed")],
)
def test_trackers_learn_how_the_run_ended(tmp_path, monkeypatch, error, outcome):
    fake = Fake()
    monkeypatch.setattr(trainer.tracking, "make_trackers", lambda settings: [fake])
    try:
        with tracker(tmp_path, sft(tmp_path, "none")) as t:
            log(t, 1)
            if error is not None:
                raise error
    except (StoppedError, KeyboardInterrupt, OSError):
        pass
    assert fake.outcome == outcome


def test_a_resumed_run_is_the_same_run_to_trackers_and_a_new_one_is_another(tmp_path, monkeypatch):
    seen: list[TrackedRun] = []

    class Seeing(Fake):
        def start(self, run: TrackedRun) -> int:
            seen.append(run)
            return 0

    monkeypatch.setattr(trainer.tracking, "make_trackers", lambda settings: [Seeing()])
    for folder, resume_step in (("a", None), ("a", 1), ("a", 2), ("b", None), ("a", 0)):
        with tracker(tmp_path / folder, sft(tmp_path / folder, "none"), resume_step=resume_step) as t:
            log(t, (resume_step or 0) + 1)
    ids = [run.run_id for run in seen]
    assert ids[0] == ids[1] == ids[2] == ids[4] != ids[3]
    assert [run.resume_step for run in seen] == [None, 1, 2, None, 0]
    assert (seen[0].name, seen[0].stage, seen[0].settings["learning_rate"]) == ("a", "SFT", 0.25)


# TensorBoard


def tensorboard_points(output: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_files_hold_every_figure_of_every_step(tmp_path):
    pytest.importorskip("tensorboard")
    with tracker(tmp_path, sft(tmp_path, "tensorboard")) as t:
        t.also(0, {"eval/score_mean": -1.0})
        log(t, 1, 2, 4)
        t.also(4, {"eval/after": 7.0})
    points = tensorboard_points(tmp_path)
    assert points == {
        "loss": [(1, 1.0), (2, 0.5), (4, 0.25)],
        "eval/score_mean": [(0, -1.0), (1, 0.5), (2, 1.0), (4, 2.0)],
        "eval/after": [(4, 7.0)],
    }


def test_what_a_resumed_run_does_again_replaces_it_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with tracker(tmp_path, sft(tmp_path, "tensorboard")) as t:
        log(t, 1, 2, 3, 4)
    with tracker(tmp_path, sft(tmp_path, "tensorboard"), resume_step=2) as t:
        log(t, 3, 4, 5, scale=3.0)
    assert tensorboard_points(tmp_path)["loss"] == [(1, 1.0), (2, 0.5), (3, 1.0), (4, 0.75), (5, pytest.approx(0.6))]


# MLflow, on its SQLite


def mlflow_run(database: Path, project: str = "quartet") -> tuple[Any, Any]:
    client = pytest.importorskip("mlflow").MlflowClient(tracking_uri=f"sqlite:///{database}")
    (run,) = client.search_runs([client.get_experiment_by_name(project).experiment_id])
    return client, run


def test_mlflow_keeps_figures_settings_and_how_the_run_ended_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = tmp_path / "runs" / "sft"
    with contextlib.suppress(StoppedError), tracker(output, sft(output, "mlflow")) as t:
        log(t, 1, 2, 3)
        raise StoppedError("enough")
    client, run = mlflow_run(tmp_path / "runs" / "mlflow.db")
    assert (run.info.status, run.data.tags["mlflow.runName"], run.data.tags["quartet.stage"]) == (
        "KILLED",
        "sft",
        "SFT",
    )
    assert (run.data.params["learning_rate"], run.data.params["track"]) == ("0.25", "['mlflow']")
    with tracker(output, sft(output, "mlflow"), resume_step=2) as t:
        log(t, 3, 4)
    client, again = mlflow_run(tmp_path / "runs" / "mlflow.db")
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    history = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss"))
    assert history == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]


def test_an_mlflow_that_was_away_is_brought_up_to_date_by_the_resumed_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    output = tmp_path / "sft"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:////{tmp_path}/nowhere/mlflow.db")
    (tmp_path / "nowhere").write_text("")  # A file where a folder should be.
    with tracker(output, sft(output, "mlflow")) as t:
        log(t, 1, 2)
    err = capsys.readouterr().err
    assert err.count("tracking: mlflow failed") == 1
    assert "tracking: mlflow lacks figures of 2 steps" in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with tracker(output, sft(output, "mlflow"), resume_step=2) as t:
        log(t, 3)
    client, run = mlflow_run(tmp_path / "mlflow.db")
    assert sorted(m.step for m in client.get_metric_history(run.info.run_id, "loss")) == [1, 2, 3]


# W&B, offline, read from its own files


def wandb_records(output: Path) -> list[Any]:
    """The records of its transaction logs: blocks of 32 KiB, in them a header of 7 bytes and a piece of a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(output.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                found.append(Record.FromString(parts))
                parts = b""
    return found


def history_of(records: list[Any]) -> list[tuple[int, dict[str, float]]]:
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((int(row["_step"]), {k: v for k, v in row.items() if not k.startswith("_")}))
    return rows


@pytest.mark.slow
def test_wandb_offline_keeps_figures_and_settings_and_a_resumed_run_has_the_same_id(tmp_path):
    pytest.importorskip("wandb")
    # Its own process: the library changes the interpreter that it is in.
    script = f"""
        import os
        os.environ["WANDB_MODE"] = "offline"
        os.environ.pop("WANDB_API_KEY", None)
        from pathlib import Path
        from tests.unit.trainer.test_trackers import sft, tracker, log
        output = Path({str(tmp_path)!r})
        with tracker(output, sft(output, "wandb")) as t:
            log(t, 1, 2, 3)
        with tracker(output, sft(output, "wandb"), resume_step=2) as t:
            log(t, 3, 4)
            t.also(4, {{"eval/after": 7.0}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    records = wandb_records(tmp_path)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    run_id = json.loads((tmp_path / "tracking.json").read_text())["run"]
    assert {run.run_id for run in runs} == {run_id}
    assert {run.project for run in runs} == {"quartet"}
    config = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    assert config["learning_rate"] == 0.25
    assert history_of(records) == [
        *((step, {"loss": 1 / step, "eval/score_mean": 0.5 * step}) for step in (1, 2, 3, 3)),
        (4, {"loss": 0.25, "eval/score_mean": 2.0, "eval/after": 7.0}),
    ]
    exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert exits == [0, 0]


def test_a_resumed_wandb_run_goes_on_after_the_step_that_it_has(tmp_path, monkeypatch):
    """Online, which needs an account: through the documented arguments of init and fields of a run alone."""

    class Run:
        step = 8  # The next one.

        def __init__(self) -> None:
            self.rows: list[tuple[int | None, Mapping[str, float]]] = []
            self.exit_code: int | None = None

        def log(self, data: Mapping[str, float], step: int | None = None) -> None:
            self.rows.append((step, data))

        def finish(self, exit_code: int | None = None) -> None:
            self.exit_code = exit_code

    class Library:
        asked: dict[str, Any]
        run = Run()

        @staticmethod
        def Settings(**values: Any) -> dict[str, Any]:
            return values

        def init(self, **asked: Any) -> Run:
            self.asked = asked
            return self.run

    library = Library()
    monkeypatch.setitem(sys.modules, "wandb", library)  # type: ignore[arg-type]
    follower = Follower(WandB("project"), run_of(tmp_path, resume_step=5), [{"step": 5, "loss": 0.5}])
    for step in (6, 7, 8):
        follower.put(step, {"loss": 1 / step})
    follower.close("stopped")
    assert {key: library.asked[key] for key in ("id", "project", "resume", "config")} == {
        "id": "abc", "project": "project", "resume": "allow", "config": {"a": 1},
    }  # fmt: skip
    assert library.run.rows == [(8, {"loss": 0.125})]
    assert library.run.exit_code == 1


# Settings


def test_tensorboard_is_the_default_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(track_settings, "installed", lambda name: name == "tensorboard")
    assert TrackSettings().trackers == ("tensorboard",)
    assert [t.name for t in make_trackers(TrackSettings())] == ["tensorboard"]
    assert TrackSettings(track=("none",)).trackers == ()
    monkeypatch.setattr(track_settings, "installed", lambda name: False)
    assert TrackSettings().trackers == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("mlflow",), r"mlflow is not installed: pip install 'quartet\[mlflow\]'"),
        (("wandb",), r"wandb is not installed: pip install 'quartet\[wandb\]'"),
        (("tensorboard",), r"tensorboard is not installed: pip install 'quartet\[train\]'"),
        (("none", "mlflow"), "none stands alone"),
        (("none", "none"), "each may be named once"),
        (("comet",), "Input should be 'auto', 'tensorboard', 'mlflow', 'wandb' or 'none'"),
    ],
)
def test_a_tracker_that_can_not_be_used_is_refused_with_what_to_install(monkeypatch, names, message):
    monkeypatch.setattr(track_settings, "installed", lambda name: False)
    with pytest.raises(ValidationError, match=message):
        TrackSettings(track=names)


def test_every_extra_that_is_named_exists():
    import tomllib

    root = Path(__file__).parents[3]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for library, extra in track_settings._LIBRARIES.values():
        assert any(requirement.startswith(library) for requirement in extras[extra])


def test_where_figures_go_decides_nothing():
    assert "track" not in sft(Path("o"), "none").decisive
