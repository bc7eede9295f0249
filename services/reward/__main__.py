"""``quartet-reward``: hosts a reward model."""

from __future__ import annotations

import asyncio
import os

from quartet.model_folder import METADATA_FILE, find_model, read_metadata
from quartet.reward.v1 import admin_pb2_grpc, reward_pb2, reward_pb2_grpc
from services.reward.admin_servicer import RewardAdminServicer
from services.reward.config import RewardSettings
from services.reward.drift import read_baseline
from services.reward.score_watch import ScoreWatch
from services.reward.servicer import HostedReward, RewardServicer
from services.runtime.batcher import Batcher
from services.runtime.errors import StartError
from services.runtime.server import Listener, ServiceRuntime, run_service
from services.runtime.telemetry import ServiceMetrics

SERVICE = "quartet.reward.v1.RewardService"
ADMIN_SERVICE = "quartet.reward.v1.RewardAdminService"


def main(argv: list[str] | None = None) -> None:
    settings = RewardSettings.from_command_line(argv)
    run_service(RewardSettings.command, settings, lambda: serve(settings))


async def serve(settings: RewardSettings) -> int:
    """Binds, loads, warms up, and serves until told to stop."""
    metrics = ServiceMetrics("reward")
    watch = ScoreWatch(metrics, window=settings.drift_window, every=settings.drift_every, alpha=settings.drift_alpha)
    servicer = RewardServicer(metrics, watch)
    admin = RewardAdminServicer(servicer, settings, load=lambda changed: load(changed, metrics))
    listener = Listener(
        name="the reward service",
        port=settings.port,
        services=(SERVICE,),
        add=lambda server: reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server),
    )
    admin_listener = Listener(
        name="model swaps (--admin-port)",
        port=settings.admin_port,
        services=(ADMIN_SERVICE,),
        security=settings.admin_security,
        add=lambda server: admin_pb2_grpc.add_RewardAdminServiceServicer_to_server(admin, server),
    )
    async with ServiceRuntime(name="reward", settings=settings, metrics=metrics) as runtime:
        await runtime.bind(listener, admin_listener)
        runtime.serve_metrics()
        servicer.host(await asyncio.to_thread(load, settings, metrics))
        runtime.at_drain.append(admin.give_up)
        code = await runtime.run()
    await admin.close()
    if admin.loading:
        # Nothing waits for the model that is still being loaded; a thread that loads can't be told to stop.
        os._exit(code)
    return code


def load(settings: RewardSettings, metrics: ServiceMetrics) -> HostedReward:
    """Loads and checks the model, scores once to warm it up.

    Raises:
        StartError, ModelFolderError: it cannot be hosted; the message says why.
    """
    # Before torch is imported, so that a wrong folder is refused at once.
    folder = find_model(settings.model, revision=settings.revision, with_code=settings.trust_remote_code)
    normalisation = read_normalisation(read_metadata(folder), str(folder))
    baseline = read_baseline(read_metadata(folder), str(folder))

    import torch

    from services.hosting import model as hosting_model
    from services.reward.scorer import ScorerItem, TransformersScorer

    if settings.threads:
        torch.set_num_threads(settings.threads)
    hosting = hosting_model.choose_hosting(settings)
    tokenizer = hosting_model.load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    scorer = TransformersScorer(folder, hosting=hosting, tokenizer=tokenizer)
    encoding = scorer.encoding(folder, tokenizer)
    scorer.score([ScorerItem([0, 0]), ScorerItem([0])])
    end_tokens = hosting_model.end_tokens(folder, scorer.model.config, tokenizer)
    return HostedReward(
        scorer=scorer,
        encoding=encoding,
        tokenizer=tokenizer,
        model=hosting_model.describe(
            model_id=settings.model,
            folder=folder,
            engine=hosting.engine,
            dtype=hosting.dtype_name,
            tokenizer=tokenizer,
            max_sequence_tokens=scorer.max_sequence_tokens,
            vocab_size=scorer.vocab_size,
            eos_token_ids=end_tokens,
            deterministic=settings.deterministic,
        ),
        normalisation=normalisation,
        batcher=Batcher(scorer.score, limits=settings.batch_limits, metrics=metrics),
        baseline=baseline,
    )


def read_normalisation(metadata: dict[str, object], folder: str) -> reward_pb2.Normalisation | None:
    """The statistics kept with the model, None when there are none.

    Raises:
        StartError: they are not usable.
    """
    kept = metadata.get("normalisation")
    if kept is None:
        return None
    try:
        normalisation = reward_pb2.Normalisation(mean=kept["mean"], std=kept["std"], count=kept["count"])  # type: ignore[index]
    except (KeyError, TypeError) as error:
        raise StartError(
            f"{folder}/{METADATA_FILE}: normalisation needs numbers mean, std and count: {error}"
        ) from error
    if not normalisation.std > 0:
        raise StartError(f"{folder}/{METADATA_FILE}: normalisation.std is {normalisation.std}, must be greater than 0")
    return normalisation


if __name__ == "__main__":
    main()
