"""Where a run's figures go besides its own log. Nothing here imports a tracking library: it only looks for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from quartet.settings import Settings

# The library of each tracker, and the extra that brings it.
_LIBRARIES: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "train"),
    "mlflow": ("mlflow", "mlflow"),
    "wandb": ("wandb", "wandb"),
}

TrackerName = Literal["auto", "tensorboard", "mlflow", "wandb", "none"]


def installed(tracker: str) -> bool:
    """Whether the library of ``tracker`` is there; it is not imported."""
    return importlib.util.find_spec(_LIBRARIES[tracker][0]) is not None


def _usable(names: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
    if len(set(names)) < len(names):
        raise ValueError("each may be named once")
    if len(names) > 1 and (alone := [name for name in names if name in ("auto", "none")]):
        raise ValueError(f"{alone[0]} stands alone")
    for name in names:
        if name in _LIBRARIES and not installed(name):
            raise ValueError(f"{name} is not installed: pip install 'quartet[{_LIBRARIES[name][1]}]'")
    return names


class TrackSettings(Settings):
    """Trackers that a run's figures are sent to as they come."""

    track: Annotated[tuple[TrackerName, ...], AfterValidator(_usable)] = Field(
        ("auto",),
        description="where figures go besides metrics.jsonl: tensorboard (OUTPUT/tensorboard), mlflow, wandb, several "
        "of them, or none; auto: tensorboard where it is installed",
        min_length=1,
    )
    track_project: str = Field("quartet", description="experiment of MLflow, project of W&B", min_length=1)

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers in use."""
        if self.track == ("auto",):
            return ("tensorboard",) if installed("tensorboard") else ()
        return tuple(name for name in self.track if name != "none")
