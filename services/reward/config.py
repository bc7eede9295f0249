"""Settings of the reward service."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from quartet.settings import Port
from services.hosting.serving import ForwardSettings


class RewardSettings(ForwardSettings):
    """Scores responses with a reward model, over gRPC."""

    command: ClassVar[str] = "quartet-reward"

    port: Port = Field(50052, description="gRPC port; 0 takes a free one")
    metrics_port: Port = Field(9102, description="Prometheus port over HTTP; 0 takes a free one")
