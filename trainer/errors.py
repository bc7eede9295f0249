"""The trainer's exceptions: one tree, so that a command can turn any of them into one clear line."""

from __future__ import annotations

from typing import ClassVar

from quartet.client import QuartetError
from quartet.model_folder import ModelFolderError
from quartet.tracing import TracingError


class TrainerError(Exception):
    """Base of everything the trainer raises on purpose. Its message is written for the person who started the run."""

    exit_code: ClassVar[int] = 2


class DataError(TrainerError):
    """A file or a row can't be used; the message names the file, the line and the field."""


class ModelError(TrainerError):
    """A model can't be used for what it is asked to do."""


class CheckpointError(TrainerError):
    """A checkpoint can't be written, found or continued from."""


class OutputError(TrainerError):
    """The folder of the results can't be used."""


class ServicesError(TrainerError):
    """The services do not fit together, or failed more samples than the run allows."""


class RolloutError(TrainerError):
    """A rollout can't be learned from: too little of it is there, or a number in it is none."""


class DivergedError(TrainerError):
    """Training produced a number that is not finite, so going on would be senseless."""


class DistributedError(TrainerError):
    """The processes of a run can't be what they are asked to be together, or one of them is gone."""


class CollapsedError(TrainerError):
    """A reward model tells nothing apart: it gives every answer the same score."""


class DoesNotFitError(TrainerError):
    """A run that was planned needs more than the machine has."""

    exit_code: ClassVar[int] = 1


class StoppedError(TrainerError):
    """The run was asked to stop, has saved itself and can be resumed. 130 is the shell's code for Ctrl-C."""

    exit_code: ClassVar[int] = 130


TOLD = (TrainerError, ModelFolderError, QuartetError, TracingError)
"""What a command tells in one clear line."""


def exit_code(error: BaseException) -> int:
    """What a command that meets ``error`` exits with; 1, as Python does, where nobody meant it to happen."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, TrainerError):
        return error.exit_code
    return 2 if isinstance(error, TOLD) else 1
