"""``quartet-reference``: hosts a frozen reference model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from quartet.model_folder import find_model
from quartet.reference.v1 import reference_pb2_grpc
from services.hosting import serving
from services.reference.config import ReferenceSettings
from services.runtime import allocator
from services.runtime.batcher import Batcher
from services.runtime.server import Listener, ServiceRuntime, run_service
from services.runtime.telemetry import ServiceMetrics

SERVICE = "quartet.reference.v1.ReferenceService"


def main(argv: list[str] | None = None) -> None:
    settings = ReferenceSettings.from_command_line(argv)
    allocator.share_one_arena()
    run_service(ReferenceSettings.command, settings, lambda: serve(settings))


async def serve(settings: ReferenceSettings) -> int:
    """Binds, loads, warms up, and serves until told to stop."""
    # Before torch is imported, so that a wrong folder is refused at once.
    folder = find_model(settings.model, revision=settings.revision, with_code=settings.trust_remote_code)
    from services.reference.servicer import HostedReference, ReferenceServicer

    metrics = ServiceMetrics("reference")
    servicer = ReferenceServicer(metrics, max_request_items=settings.max_request_items)
    listener = Listener(
        name="the reference service",
        port=settings.port,
        services=(SERVICE,),
        add=lambda server: reference_pb2_grpc.add_ReferenceServiceServicer_to_server(servicer, server),
        refusal=servicer.refusal,
    )

    def load(on_death: Callable[[str], None]) -> HostedReference:
        import torch

        from services.hosting import model as hosting_model
        from services.hosting.memory import watch_gpu
        from services.hosting.warm_up import warm_up
        from services.reference.logprobs import ReferenceItem, ReferenceModel

        if settings.threads:
            torch.set_num_threads(settings.threads)
        hosting = hosting_model.choose_hosting(settings)
        tokenizer = hosting_model.load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
        chunk_mib = settings.chunk_mib or (16 if hosting.device.type == "cpu" else 1024)
        reference = ReferenceModel(folder, hosting=hosting, tokenizer=tokenizer, chunk_bytes=chunk_mib * 2**20)
        watch_gpu(metrics, hosting.device.type)
        limits = settings.batch_limits(hosting.device.type, padded=not reference.hidden_states.packed)
        warm_up(
            lambda sequences: reference.logprobs([ReferenceItem(ids, 1, 1.0, True) for ids in sequences]),
            device=hosting.device.type,
            limits=limits,
            longest=reference.max_sequence_tokens,
            vocabulary=reference.vocab_size,
        )
        return HostedReference(
            reference=reference,
            model=hosting_model.describe(
                model_id=settings.model,
                folder=folder,
                engine=hosting.engine,
                dtype=hosting.dtype_name,
                tokenizer=tokenizer,
                max_sequence_tokens=reference.max_sequence_tokens,
                vocab_size=reference.vocab_size,
                eos_token_ids=hosting_model.end_tokens(folder, reference.model.config, tokenizer),
                deterministic=settings.deterministic,
            ),
            batcher=Batcher(reference.logprobs, limits=limits, metrics=metrics, on_death=on_death),
        )

    async with ServiceRuntime(name="reference", settings=settings, metrics=metrics) as runtime:
        await runtime.bind(listener)
        runtime.serve_metrics()
        hosted = servicer.hosted = await serving.in_own_thread(load, serving.ending(runtime))
        code = await runtime.run()
    return await serving.end_in_grace(runtime, asyncio.to_thread(hosted.batcher.close), code)


if __name__ == "__main__":
    main()
