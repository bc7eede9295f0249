"""``quartet-policy``: hosts the policy that is being trained."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import grpc

from quartet.common.v1 import common_pb2
from quartet.model_folder import find_model
from quartet.policy.v1 import adapters_pb2_grpc, policy_pb2_grpc, weights_pb2_grpc
from quartet.text_tokens import opening_ids
from services.policy.config import PolicySettings
from services.policy.engine import Engine, EngineFailedError
from services.runtime.errors import StartError
from services.runtime.server import Listener, ServiceRuntime, run_service
from services.runtime.telemetry import ServiceMetrics

SERVICE = "quartet.policy.v1.PolicyService"
WEIGHTS_SERVICE = "quartet.policy.v1.WeightsService"
ADAPTER_SERVICE = "quartet.policy.v1.AdapterService"
_CHECK_EVERY_S = 1.0


def main(argv: list[str] | None = None) -> None:
    settings = PolicySettings.from_command_line(argv)
    run_service(PolicySettings.command, settings, lambda: serve(settings))


async def serve(settings: PolicySettings) -> int:
    """Binds, loads, warms up, and serves until told to stop or the engine dies."""
    # Before anything heavy is imported, so that a wrong folder is refused at once.
    folder = find_model(settings.model, revision=settings.revision, with_code=settings.trust_remote_code)
    from services.hosting import model as hosting_model
    from services.hosting import serving
    from services.hosting.token_length import characters_per_token
    from services.policy.adapters import AdapterRegistry
    from services.policy.adapters_servicer import AdapterServicer
    from services.policy.hosted import HostedPolicy
    from services.policy.servicer import PolicyServicer
    from services.policy.staging import read_layout, staging_parent
    from services.policy.watched_engine import watched
    from services.policy.weights_servicer import WeightsServicer

    staging = staging_parent(settings.staging_dir)
    metrics = ServiceMetrics("policy", batches=False)
    async with ServiceRuntime(name="policy", settings=settings, metrics=metrics) as runtime:
        policy = PolicyServicer(
            metrics,
            limits=settings.budget_limits,
            stop=runtime.stop,
            keep=settings.keep_limits,
            retry_grace_s=settings.retry_grace_s,
        )
        weights = WeightsServicer(
            metrics,
            staging=staging,
            max_bytes=int(settings.max_update_gib * 2**30),
            stop=runtime.stop,
            wait_s=settings.update_wait_s,
        )
        adapters = AdapterServicer(staging=staging, stop=runtime.stop)

        def add_admin(server: grpc.aio.Server) -> None:
            weights_pb2_grpc.add_WeightsServiceServicer_to_server(weights, server)
            adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, server)

        await runtime.bind(
            Listener(
                name="the policy service",
                port=settings.port,
                services=(SERVICE,),
                add=lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(policy, server),
                refusal=policy.refusal,
            ),
            Listener(
                name="weight updates and adapters (--admin-port)",
                host=settings.admin_host,
                port=settings.admin_port,
                services=(WEIGHTS_SERVICE, ADAPTER_SERVICE),
                security=settings.admin_security,
                add=add_admin,
            ),
        )
        runtime.serve_metrics()
        slots = 1 if settings.deterministic else settings.max_concurrent
        timeout_s = settings.engine_timeout_s or math.inf
        engine = watched(choose_engine(folder, settings), metrics, slots=slots, timeout_s=timeout_s)
        try:
            # First what is quick to load and refuse: a large engine takes minutes.
            tokenizer = await asyncio.to_thread(
                hosting_model.load_tokenizer, folder, trust_remote_code=settings.trust_remote_code
            )
            layout = read_layout(folder)
            await engine.start()
            model = await asyncio.to_thread(_describe, folder, settings, engine, tokenizer)
            policy.hosted = weights.hosted = adapters.hosted = HostedPolicy(
                engine=engine,
                tokenizer=tokenizer,
                model=model,
                layout=layout,
                characters_per_token=characters_per_token(tokenizer),
                opening=opening_ids(tokenizer),
                adapters=AdapterRegistry(max_adapters=settings.max_adapters, max_rank=settings.max_lora_rank),
            )
            watch = asyncio.create_task(_watch(engine, runtime))
            code = await runtime.run()
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        except BaseException:
            await engine.stop()
            raise
        return await serving.end_in_grace(runtime, engine.stop(), code)


def choose_engine(folder: Path, settings: PolicySettings) -> Engine:
    """vLLM where it is installed, unless told otherwise.

    Raises:
        StartError: the engine asked for is not installed.
    """
    vllm_is_here = importlib.util.find_spec("vllm") is not None
    if settings.engine == "vllm" and not vllm_is_here:
        raise StartError("--engine is vllm, which is not installed here; install it, or choose --engine transformers")
    if settings.engine == "transformers" or not vllm_is_here:
        from services.policy.transformers_engine import TransformersEngine

        return TransformersEngine(folder, settings)
    from services.policy.vllm_engine import VllmEngine

    return VllmEngine(folder, settings)


def _describe(folder: Path, settings: PolicySettings, engine: Engine, tokenizer: Any) -> common_pb2.ModelInfo:
    import transformers

    from services.hosting import model as hosting_model

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    end_tokens = hosting_model.end_tokens(folder, config, tokenizer)
    if not end_tokens:
        raise StartError(f"model {str(folder)!r}: neither configuration nor tokenizer names an end token")
    return hosting_model.describe(
        model_id=settings.model,
        folder=folder,
        engine=engine.name,
        dtype=engine.dtype,
        tokenizer=tokenizer,
        max_sequence_tokens=engine.max_sequence_tokens,
        vocab_size=engine.vocab_size,
        eos_token_ids=end_tokens,
        deterministic=settings.deterministic,
    )


async def _watch(engine: Engine, runtime: ServiceRuntime) -> None:
    """Ends the service when its engine dies between requests, too."""
    while True:
        await asyncio.sleep(_CHECK_EVERY_S)
        try:
            await engine.check()
        except EngineFailedError as error:
            runtime.stop(str(error))
            return


if __name__ == "__main__":
    main()
