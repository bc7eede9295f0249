"""Settings of the reward service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from quartet.settings import Port, PositiveInt
from services.hosting.serving import ForwardSettings
from services.runtime.admin import AdminSettings


class RewardSettings(AdminSettings, ForwardSettings):
    """Scores responses with a reward model, over gRPC."""

    command: ClassVar[str] = "quartet-reward"
    admin_power: ClassVar[str] = "replaces the model"
    data_power: ClassVar[str] = "score"

    port: Port = Field(50052, description="gRPC port; 0 takes a free one")
    metrics_port: Port = Field(9102, description="Prometheus port over HTTP; 0 takes a free one")
    admin_port: Port = Field(50062, description="gRPC port of model swaps and drift; 0 takes a free one")
    models_dir: Path | None = Field(
        None,
        description="folder below which the models lie that the admin port may name to take over; default none may",
    )
    allow_swap_from: tuple[str, ...] = Field(
        (), description="folders or hub ids that the admin port may name, besides those below --models-dir"
    )
    drift_window: int = Field(
        1000, ge=50, le=100_000, description="latest scores that are compared with those kept with the model"
    )
    drift_every: PositiveInt = Field(100, description="scores after which they are compared anew")
    drift_alpha: float = Field(
        0.01, gt=0, lt=1, description="level of a comparison: how often it may find a drift where there is none"
    )
