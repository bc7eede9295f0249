"""Settings of the reward service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from quartet.settings import Finite, NonNegativeFloat, Port, PositiveInt
from services.hosting.serving import ForwardSettings
from services.runtime.admin import AdminSettings


class RewardSettings(AdminSettings, ForwardSettings):
    """Scores responses with a reward model, an ensemble of them, a Python function, or both, over gRPC."""

    command: ClassVar[str] = "quartet-reward"
    admin_power: ClassVar[str] = "replaces the model"
    data_power: ClassVar[str] = "score"

    model: str = Field(
        "", description="model to host: a Hugging Face folder or hub id, or a folder whose quartet.json is an ensemble"
    )
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
    ensemble_reduction: Literal["mean", "worst_case", "uncertainty"] = Field(
        "mean",
        description="how the scores of an ensemble's members become one; uncertainty: mean - lambda * variance",
    )
    ensemble_lambda: NonNegativeFloat = Field(0.5, description="price of a unit of the members' variance")
    scorer: str = Field("", description="Python function that scores too, or alone: package.module:function")
    scorer_weight: Finite = Field(1.0, description="weight of what --scorer gives in the score")
    scorer_timeout_s: NonNegativeFloat = Field(
        60.0,
        description="seconds that a call of --scorer may take; then its pairs fail, to be tried again. What is not "
        "async can't be ended: the service exits 1 to be started anew. 0: no limit but --batch-timeout-s",
    )
    golden_check: Literal["on", "off"] = Field(
        "on", description="refuse a model whose scores of the golden items kept with it are not those of its trainer"
    )
    check: str = Field(
        "", description="verify this model, whatever --model is, print a report, and exit; opens no port"
    )

    @model_validator(mode="after")
    def _has_something_to_host(self) -> Self:
        if not (self.model or self.check or self.scorer):
            raise ValueError("--model is required, or --scorer to score by a Python function alone")
        if self.scorer_weight != 1.0 and not self.scorer:
            raise ValueError(f"--scorer-weight is {self.scorer_weight}, but there is no --scorer")
        if self.scorer and 0 < self.batch_timeout_s < 4 * self.scorer_timeout_s:
            raise ValueError(
                f"--scorer-timeout-s is {self.scorer_timeout_s:g}, must be at most a quarter of --batch-timeout-s, "
                f"which is {self.batch_timeout_s:g}: a call that fails late may be followed by another, and in a swap "
                "one model waits for the other's calls"
            )
        return self
