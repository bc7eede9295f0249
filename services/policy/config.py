"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from quartet.settings import NonNegativeInt, Port, PositiveFloat, PositiveInt, UnitFloat
from services.runtime.config import ServiceSettings
from services.runtime.security import ListenerSecurity


class PolicySettings(ServiceSettings):
    """Generates from a language model whose weights a trainer may replace, over gRPC."""

    command: ClassVar[str] = "quartet-policy"

    port: Port = Field(50051, description="gRPC port; 0 takes a free one")
    admin_port: Port = Field(50061, description="gRPC port of weight updates and adapters; 0 takes a free one")
    admin_tls_cert: Path | None = Field(
        None, description="PEM certificate chain of the admin port; default --tls-cert with its key"
    )
    admin_tls_key: Path | None = Field(None, description="PEM private key of --admin-tls-cert")
    admin_tls_client_ca: Path | None = Field(
        None, description="PEM authorities of the certificates that the admin port's clients must show"
    )
    admin_token_file: Path | None = Field(
        None, description="bearer tokens that may replace the weights, one a line; none of them in --token-file"
    )
    metrics_port: Port = Field(9101, description="Prometheus port over HTTP; 0 takes a free one")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vLLM where it is installed, else transformers"
    )
    max_concurrent: PositiveInt = Field(256, description="most completions generated at the same time")
    max_queued: PositiveInt = Field(
        16384, description="most completions in hand, waiting ones included; a request beyond is refused whole"
    )
    max_sequence_tokens: NonNegativeInt = Field(
        0, description="longest sequence, prompt and response; 0: what the model's configuration says"
    )
    kv_cache_gib: PositiveInt = Field(2, description="memory for keys and values on a CPU, whole GiB")
    gpu_memory_share: UnitFloat = Field(0.9, description="share of the GPU's memory that vLLM may take")
    tensor_parallel: PositiveInt = Field(1, description="GPUs that one replica is spread over")
    compile: bool = Field(False, description="compile the model (vLLM): slower to start, faster to run")
    threads: NonNegativeInt = Field(0, description="processor threads on a CPU; 0: all cores")
    staging_dir: Path | None = Field(
        None, description="where incoming weights are staged; default /dev/shm where it can be written, else temporary"
    )
    max_adapters: NonNegativeInt = Field(
        0, description="most LoRA adapters loaded at the same time; 0: LoRA is off, and no memory is kept for it"
    )
    max_lora_rank: PositiveInt = Field(
        16, description="largest rank of a LoRA adapter; with vLLM every adapter takes memory and time of this rank"
    )
    max_update_gib: PositiveFloat = Field(1024.0, description="largest weight update accepted, GiB")

    @property
    def admin_security(self) -> ListenerSecurity:
        """Credentials of the admin port: its own; of the service's port only the server's certificate serves here."""
        own = self.admin_tls_cert is not None or self.admin_tls_key is not None
        return ListenerSecurity(
            tls_cert=self.admin_tls_cert if own else self.tls_cert,
            tls_key=self.admin_tls_key if own else self.tls_key,
            tls_client_ca=self.admin_tls_client_ca,
            token_file=self.admin_token_file,
            prefix="--admin-",
        )

    @model_validator(mode="after")
    def _admin_credentials_fit_together(self) -> Self:
        admin = self.admin_security
        if problem := admin.problem():
            raise ValueError(problem)
        if self.security.knows_callers and not admin.knows_callers:
            raise ValueError(
                "the service's port asks for credentials and the admin port, which replaces the weights, would not: "
                "set --admin-token-file or --admin-tls-client-ca"
            )
        if self.token_file is not None and self.token_file == self.admin_token_file:
            raise ValueError(
                f"--token-file and --admin-token-file are both {str(self.token_file)!r}: whoever may generate could "
                "replace the weights; give the admin port tokens of its own"
            )
        return self
