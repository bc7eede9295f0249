"""Settings that every service has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quartet.settings import NonNegativeFloat, Port, PositiveInt, Settings


class ServiceSettings(Settings):
    """Settings of a quartet service."""

    model: str = Field(description="model to host: a Hugging Face folder or hub id")
    revision: str | None = Field(None, description="revision of a hub model; default its main branch")
    host: str = Field("127.0.0.1", description="address to listen on; loopback unless told otherwise")
    port: Port = Field(50051, description="gRPC port; 0 takes a free one")
    metrics_port: Port = Field(9101, description="Prometheus port over HTTP; 0 takes a free one")
    grace_s: NonNegativeFloat = Field(30.0, description="seconds that work in flight may take to finish on SIGTERM")
    reflection: bool = Field(False, description="serve gRPC server reflection")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the weights; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    deterministic: bool = Field(
        False, description="an item's result does not depend on its batch companions, bit for bit; slower"
    )
    max_message_mib: PositiveInt = Field(64, description="largest message accepted or sent, MiB")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, else one JSON object a line"
    )
