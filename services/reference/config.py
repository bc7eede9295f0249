"""Settings of the reference service."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from quartet.settings import NonNegativeInt, Port
from services.hosting.serving import ForwardSettings


class ReferenceSettings(ForwardSettings):
    """Gives log-probabilities of tokens under a frozen reference model, over gRPC."""

    command: ClassVar[str] = "quartet-reference"

    port: Port = Field(50053, description="gRPC port; 0 takes a free one")
    metrics_port: Port = Field(9103, description="Prometheus port over HTTP; 0 takes a free one")
    chunk_mib: NonNegativeInt = Field(
        0,
        description="most memory for logits at a time, MiB; 0: 16 on a processor, to stay in its cache, 1024 on a GPU",
    )
