"""What a command exits with by what it met."""

from __future__ import annotations

import pytest

from quartet.client import DeadlineError, UnavailableError
from quartet.model_folder import ModelFolderError
from trainer.errors import DataError, DoesNotFitError, StoppedError, exit_code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("a row"), 2),
        (DoesNotFitError("too large"), 1),
        (StoppedError("as asked"), 130),
        (KeyboardInterrupt(), 130),
        (UnavailableError("away"), 2),
        (DeadlineError("late"), 2),
        (ModelFolderError("no folder"), 2),
        (ValueError("nobody meant it"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_exit_code_is_the_same_whoever_meets_the_error(error: BaseException, code: int) -> None:
    assert exit_code(error) == code
