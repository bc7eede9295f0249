"""Settings of the reward service."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from quartet.settings import Finite, NonNegativeFloat, Port
from services.hosting.serving import ForwardSettings


class RewardSettings(ForwardSettings):
    """Scores responses with a reward model, an ensemble of them, a Python function, or both, over gRPC."""

    command: ClassVar[str] = "quartet-reward"

    model: str = Field(
        "", description="model to host: a Hugging Face folder or hub id, or a folder whose quartet.json is an ensemble"
    )
    port: Port = Field(50052, description="gRPC port; 0 takes a free one")
    metrics_port: Port = Field(9102, description="Prometheus port over HTTP; 0 takes a free one")
    ensemble_reduction: Literal["mean", "worst_case", "uncertainty"] = Field(
        "mean",
        description="how the scores of an ensemble's members become one; uncertainty: mean - lambda * variance",
    )
    ensemble_lambda: NonNegativeFloat = Field(0.5, description="price of a unit of the members' variance")
    scorer: str = Field("", description="Python function that scores too, or alone: package.module:function")
    scorer_weight: Finite = Field(1.0, description="weight of what --scorer gives in the score")
    golden_check: Literal["on", "off"] = Field(
        "on", description="refuse a model whose scores of the golden items kept with it are not those of its trainer"
    )
    check: str = Field("", description="verify this model, print a report, and exit; opens no port")

    @model_validator(mode="after")
    def _has_something_to_host(self) -> Self:
        if self.check and self.model:
            raise ValueError(f"--check is {self.check!r} and --model {self.model!r}: give one of them")
        if not (self.model or self.check or self.scorer):
            raise ValueError("--model is required, or --scorer to score by a Python function alone")
        if self.scorer_weight != 1.0 and not self.scorer:
            raise ValueError(f"--scorer-weight is {self.scorer_weight}, but there is no --scorer")
        return self
