"""What stages share around their algorithms: the run's folder, going on where it stopped, the supervised loop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.batching import BatchPlan
from trainer.checkpoint import (
    Restored,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    odd_weight,
    read_state,
    save_checkpoint,
    stop_on_signal,
)
from trainer.config import TrainingSettings
from trainer.data import shared_groups, split_held_out
from trainer.distributed import anywhere, led, require_divisible, seed_step
from trainer.divergence import diverged
from trainer.encoding import EncodedResponse, Ids
from trainer.errors import CheckpointError, DataError, DivergedError, ModelError, OutputError
from trainer.files import remove_leftovers, replace_file, require_folder
from trainer.lineage import Origin, origin
from trainer.models import longest_sequence, set_dropout
from trainer.optimisation import apply_gradients, linear_schedule, make_adamw, set_learning_rate
from trainer.rows import RowT
from trainer.sharding import finite_everywhere
from trainer.tracking import METRICS_FILE, run_tracker

SETTINGS_FILE = "settings.json"
EVALUATION_FILE = "evaluation.json"
MODEL_FOLDER = "model"
# Checkpoints of a run that says nothing of them: who is killed loses a tenth of it.
_CHECKPOINTS = 10


@led
def open_output(
    output: Path, *, resume: bool, decisive: dict[str, object], leftovers: Iterable[str] = ()
) -> Restored | None:
    """The state of the newest checkpoint to go on from; None for a start from the beginning.

    Args:
        output: folder of the run.
        resume: whether to go on with what is in it. A run that stopped before its first checkpoint starts again.
        decisive: settings that decide the result; they must be those that the checkpoint was written under.
        leftovers: files besides the log that such a run leaves, removed before it starts again.

    Raises:
        OutputError: the folder holds a run and ``resume`` is not set, or it can't be one.
        CheckpointError: the checkpoint was written under other settings.
    """
    require_folder("--output", output)
    newest = latest_checkpoint(output)
    if not resume:
        if newest is not None or (output / METRICS_FILE).exists():
            raise OutputError(
                f"--output is {str(output)!r}: it already holds a run; go on with it by --resume, or choose another"
            )
        return None
    remove_leftovers(output)
    if newest is None:
        for name in (METRICS_FILE, *leftovers):
            (output / name).unlink(missing_ok=True)
        return None
    restored = read_state(newest)
    saved = restored.state["settings"]
    other = [name for name in decisive if saved.get(name) != decisive[name]]
    if other:
        named = "; ".join(f"--{n.replace('_', '-')} was {saved.get(n)!r}, is {decisive[n]!r}" for n in other)
        raise CheckpointError(f"{newest} was written under other settings: {named}")
    return restored


def rows_digest(*parts: Iterable[EncodedResponse]) -> str:
    """``ids_digest`` of prompts and responses, and of where the one ends and the other begins, turn by turn."""
    return ids_digest(*((ids for row in part for ids in (_places(row), row.ids)) for part in parts))


def _places(row: EncodedResponse) -> tuple[int, ...]:
    return (row.prompt_tokens, *(place for turn in row.turns for place in turn))


def ids_digest(*parts: Iterable[Sequence[int] | Ids]) -> str:
    """SHA-256 of token ids: of sequences in their order, training rows in one part and held-out rows in another."""
    digest = hashlib.sha256()
    for part in parts:
        for ids in part:
            digest.update(np.asarray(ids, dtype="<i4").tobytes())
            digest.update(b"\xff\xff\xff\xff")  # No token id: ends a sequence.
        digest.update(b"\xfe\xff\xff\xff")  # Ends a part.
    return digest.hexdigest()


def require_same_data(output: Path, checkpoint: Restored | None, digest: str, flags: str) -> None:
    """A run goes on with the rows that it began with: its place in them would mean nothing in others.

    Args:
        output: folder of the run.
        checkpoint: which it goes on from; None: it begins.
        digest: ``ids_digest`` of the rows as they are now.
        flags: that name the files.

    Raises:
        CheckpointError: the rows are others.
    """
    if checkpoint is not None and checkpoint.state.get("data") != digest:
        raise CheckpointError(
            f"{checkpoint_path(output, checkpoint.step)} was written with other rows than {flags} holds now, or they "
            "are cut otherwise: restore the files, or begin another run in another --output"
        )


def stage_origin(stage: str, settings: TrainingSettings, data: str) -> Origin:
    """Where the model of a supervised stage comes from; ``data`` is the digest of its rows.

    Raises:
        ModelFolderError, ModelError: as ``lineage.origin``.
    """
    return origin(
        stage,
        settings.model_dump(mode="json"),
        parent=settings.model,
        sources=(*settings.data, *settings.eval_data),
        digest=data,
    )


@led
def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` whole or not at all.

    Raises:
        OutputError: it can't be written.
    """
    replace_file(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def train_and_held_out(settings: TrainingSettings, load: Callable[..., list[RowT]]) -> tuple[list[RowT], list[RowT]]:
    """Rows to train on and rows to evaluate on; prompts (or the groups of --split-by) are in one of them alone.

    Raises:
        DataError: a row can't be used; names file, line and field.
        DistributedError: a batch can't be shared out evenly.
    """
    require_divisible("--batch-size", settings.batch_size)
    rows = load(settings.data, split_by=settings.split_by)
    if settings.eval_data:
        held_out = load(settings.eval_data, split_by=settings.split_by)
        if shared := shared_groups(rows, held_out):
            sys.stderr.write(
                f"warning: {shared} of {len(held_out)} held-out rows share their prompt with training rows\n"
            )
        return rows, held_out
    train, held_out = split_held_out(rows, settings.held_out_fraction, seed=settings.seed)
    if settings.held_out_fraction and not held_out:
        raise DataError(
            f"{', '.join(settings.data)}: --held-out-fraction {settings.held_out_fraction:g} of {len(rows)} rows is "
            "none: raise it, name --eval-data, or set it to 0 to train without an evaluation"
        )
    return train, held_out


def token_limit(settings: TrainingSettings, model: Any) -> int:
    """Tokens of the longest sequence.

    Raises:
        DataError: --max-tokens is beyond what the model takes.
    """
    longest = longest_sequence(model)
    if settings.max_tokens is not None and settings.max_tokens > longest:
        raise DataError(
            f"--max-tokens is {settings.max_tokens}, must be at most {longest}, the model's longest sequence"
        )
    return settings.max_tokens or longest


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is particular to one supervised stage.

    ``accumulate`` takes the rows of one optimiser step, adds their gradients and returns the figures of the step, a
    ``tokens`` count among them; ``evaluate`` returns figures on held-out rows; ``after_step`` may touch the weights.
    Each process is given all rows of a step, goes through its share of them, and has the figures of the whole.
    """

    name: str
    model: Any
    data: str  # ``ids_digest`` of training and held-out rows.
    where: Sequence[str]  # File and line of each training row.
    accumulate: Callable[[list[int]], dict[str, float]]
    evaluate: Callable[[], dict[str, float]]
    watch: Sequence[str]
    after_step: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Best:
    """The step of the evaluation with the lowest loss so far, and that loss."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What came of ``fit``: the step of the model that the stage now has, and its figures on held-out rows."""

    step: int
    evaluation: dict[str, float]


def planned_batches(settings: TrainingSettings, rows: int) -> Iterator[list[int]]:
    """The rows of every step that ``fit`` will take of so many rows."""
    plan, steps = _plan(settings, rows)
    return (plan.rows(step) for step in range(steps))


def _plan(settings: TrainingSettings, rows: int) -> tuple[BatchPlan, int]:
    """Batches, and how many steps there are."""
    plan = BatchPlan(rows, settings.batch_size, seed=settings.seed)
    steps = settings.epochs * plan.steps_per_epoch
    return plan, min(steps, settings.max_steps) if settings.max_steps else steps


def fit(settings: TrainingSettings, stage: Stage, checkpoint: Restored | None) -> Fitted:
    """The loop of every supervised stage: batches in a seeded order, AdamW, a linear schedule, checkpoints.

    Raises:
        StoppedError: someone asked it to stop; it has saved itself.
        DivergedError: a loss, a gradient or a weight is not finite; names the rows, and nothing of them is kept.
        CheckpointError: it can't be saved or continued, such as with other rows.
        ModelError: --dropout is set, and the model has none.
    """
    require_same_data(settings.output, checkpoint, stage.data, "--data or --eval-data")
    if settings.dropout:
        _tell_dropout(stage.model, settings.dropout)
    plan, steps = _plan(settings, len(stage.where))
    optimiser = make_adamw(
        stage.model,
        learning_rate=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )
    torch.manual_seed(settings.seed)
    save_every = math.ceil(steps / _CHECKPOINTS) if settings.save_every is None else settings.save_every
    done = 0
    best: Best | None = None
    if checkpoint is not None:
        path = checkpoint_path(settings.output, checkpoint.step)
        load_checkpoint(path, modules={"model": stage.model}, optimisers={"adamw": optimiser})
        done = checkpoint.step
        if (kept := checkpoint.state.get("best")) is not None:
            best = Best(**kept)

    def save() -> Path:
        state = {"settings": settings.decisive, "data": stage.data, "best": best and asdict(best)}
        return save_checkpoint(
            settings.output,
            step=done,
            modules={"model": stage.model},
            optimisers={"adamw": optimiser},
            state=state,
            keep=settings.keep_checkpoints,
        )

    resumed = None if checkpoint is None else done
    tracker = run_tracker(settings.output, steps, stage.watch, stage.name, resumed, settings=settings)
    started_s = time.monotonic()
    with stop_on_signal() as stop, tracker:
        while done < steps:
            start_s = time.perf_counter()
            rate = settings.learning_rate * linear_schedule(done, steps, settings.warmup_fraction)
            set_learning_rate(optimiser, rate)
            seed_step(settings.seed, done)
            rows = plan.rows(done)
            with training_mode(stage.model, settings.dropout):
                metrics = stage.accumulate(rows)
            try:
                if not math.isfinite(metrics["loss"]):
                    raise DivergedError(f"the loss is {metrics['loss']}")
                metrics["grad_norm"] = apply_gradients(optimiser, settings.max_grad_norm)
            except DivergedError as error:
                bad = [stage.where[row] for row in rows if not _is_finite(settings, stage, row)]
                raise diverged(f"step {done + 1}: {error}", bad, len(rows), settings.output) from error
            if stage.after_step is not None:
                stage.after_step()
            done += 1
            metrics |= {
                "learning_rate": rate,
                "epoch": done / plan.steps_per_epoch,
                "elapsed_s": time.monotonic() - started_s,
                "tokens_per_s": metrics.pop("tokens") / (time.perf_counter() - start_s),
            }
            if settings.eval_every and done % settings.eval_every == 0 and done < steps:
                metrics |= stage.evaluate()
                if settings.keep_best and (best is None or metrics["eval_loss"] < best.loss):
                    best = Best(step=done, loss=metrics["eval_loss"])
            tracker.log(done, metrics)
            if anywhere(stop.requested) and done < steps:
                raise stop.stopped(step=done, total_steps=steps, checkpoint=save())
            if (save_every and done % save_every == 0) or (best is not None and best.step == done):
                save()
        if (odd := odd_weight(stage.model)) is not None:
            raise diverged(f"after step {done} the weight {odd} is not finite", None, 0, settings.output)
        evaluation = stage.evaluate()
        tracker.also(done, evaluation)
        if best is not None and best.loss <= evaluation["eval_loss"]:
            sys.stdout.write(
                f"the model is that of step {best.step}, whose held-out loss is the lowest, {best.loss:.4f}; "
                f"after step {done} it is {evaluation['eval_loss']:.4f}\n"
            )
            load_checkpoint(checkpoint_path(settings.output, best.step), modules={"model": stage.model}, optimisers={})
            done, evaluation = best.step, stage.evaluate()
    return Fitted(step=done, evaluation=evaluation)


def _tell_dropout(model: Any, dropout: float) -> None:
    """Says where ``dropout`` acts, which the architecture decides: Llama and its like have it in attention alone.

    Raises:
        ModelError: nowhere.
    """
    places = set_dropout(model, 0.0)
    if not places:
        raise ModelError(
            f"--dropout is {dropout:g}, and {type(model).__name__} has no dropout anywhere, so it would do nothing: "
            "leave it out"
        )
    named = ", ".join(f"{count} x {name}" for name, count in places.items())
    sys.stdout.write(f"dropout {dropout:g} acts at: {named}\n")


def _is_finite(settings: TrainingSettings, stage: Stage, row: int) -> bool:
    """Whether loss and gradient of one row by itself are finite."""
    stage.model.zero_grad(set_to_none=True)
    with training_mode(stage.model, settings.dropout):
        loss = stage.accumulate([row])["loss"]
    gradients = [parameter.grad for parameter in stage.model.parameters() if parameter.grad is not None]
    return math.isfinite(loss) and finite_everywhere(*gradients)


@contextlib.contextmanager
def training_mode(model: Any, dropout: float) -> Any:
    """Train mode with ``dropout`` inside; evaluation mode without any outside."""
    set_dropout(model, dropout)
    model.train()
    try:
        yield
    finally:
        set_dropout(model, 0.0)
        model.eval()
