"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from quartet.settings import NonNegativeFloat, NonNegativeInt, Port, PositiveFloat, PositiveInt, UnitFloat
from services.policy.budget import BudgetLimits
from services.policy.kept_requests import KeepLimits
from services.runtime.admin import AdminSettings


class PolicySettings(AdminSettings):
    """Generates from a language model whose weights a trainer may replace, over gRPC."""

    command: ClassVar[str] = "quartet-policy"
    admin_power: ClassVar[str] = "replaces the weights"
    data_power: ClassVar[str] = "generate"

    port: Port = Field(50051, description="gRPC port; 0 takes a free one")
    admin_port: Port = Field(50061, description="gRPC port of weight updates and adapters; 0 takes a free one")
    metrics_port: Port = Field(9101, description="Prometheus port over HTTP; 0 takes a free one")
    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vLLM where it is installed, else transformers"
    )
    max_concurrent: PositiveInt = Field(256, description="most completions generated at the same time")
    max_batch_tokens: NonNegativeInt = Field(
        0,
        description="most tokens of a pass: transformers, of the prompts it reads, with their padding (0: 4,096 on a "
        "processor, 16,384 on a GPU); vLLM, max_num_batched_tokens (0: what vLLM chooses)",
    )
    max_queued: PositiveInt = Field(
        16384, description="most completions in hand, waiting ones included; a request beyond is refused whole"
    )
    max_queued_tokens: PositiveInt = Field(
        20_000_000,
        description="most tokens that they may come to, prompts and max_new_tokens; a request beyond is refused whole. "
        "Online: what is generated in the seconds that a caller may wait",
    )
    max_held_mib: PositiveInt = Field(
        256, description="most MiB of requests in hand; a request that would exceed it is refused before any work"
    )
    retry_cache_requests: NonNegativeInt = Field(
        1024, description="requests whose finished completions are kept for a retry of the same id; 0 keeps none"
    )
    retry_cache_mib: PositiveInt = Field(64, description="most memory for them, MiB")
    retry_cache_s: PositiveFloat = Field(300.0, description="seconds that they are kept after the last call has left")
    retry_grace_s: NonNegativeFloat = Field(
        0.0,
        description="seconds that the work of a request with an id goes on after its last call has left, for a retry "
        "to join it; 0: it ends and frees its slots at once",
    )
    max_sequence_tokens: NonNegativeInt = Field(
        0, description="longest sequence, prompt and response; 0: what the model's configuration says"
    )
    kv_cache_gib: PositiveInt = Field(2, description="memory for keys and values on a CPU, whole GiB")
    gpu_memory_share: UnitFloat = Field(0.9, description="share of the GPU's memory that vLLM may take")
    tensor_parallel: PositiveInt = Field(1, description="GPUs that one replica is spread over")
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compile the model and record CUDA graphs (vLLM): slower to start, faster to run. auto: on a GPU",
    )
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
    engine_timeout_s: NonNegativeFloat = Field(
        600.0,
        description="seconds without a token, while there are completions or a weight update to work on, after which "
        "the engine never gives one: who waits is told, and the service exits 1 to be started anew; 0: no limit",
    )
    update_wait_s: PositiveFloat = Field(
        600.0,
        description="longest that a weight update waits for requests in flight to finish, within its own deadline; "
        "then the old weights go on serving",
    )

    @property
    def budget_limits(self) -> BudgetLimits:
        """What may be in hand."""
        return BudgetLimits(
            max_completions=self.max_queued,
            max_tokens=self.max_queued_tokens,
            max_bytes=self.max_held_mib * 2**20,
        )

    @property
    def keep_limits(self) -> KeepLimits:
        """Bounds of what is kept for retries."""
        return KeepLimits(
            count=self.retry_cache_requests, max_bytes=self.retry_cache_mib * 2**20, age_s=self.retry_cache_s
        )
