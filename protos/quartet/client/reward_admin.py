"""Client of the reward service's admin listener: another model, and the drift of scores."""

from __future__ import annotations

from dataclasses import dataclass

from quartet.client import types
from quartet.client.arguments import message
from quartet.client.channel import ServiceClient
from quartet.client.reward import Normalisation
from quartet.client.types import ModelInfo, ServedBy
from quartet.reward.v1 import admin_pb2, admin_pb2_grpc

# A model of tens of gigabytes is read and checked byte for byte.
SWAP_DEADLINE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class ModelSwap:
    """A model that took over, and the one that answered before."""

    model: ModelInfo
    normalisation: Normalisation | None
    replaced: ServedBy
    load_s: float


@dataclass(frozen=True, kw_only=True)
class ScoreWindow:
    """The latest items of one model. None where there is nothing to take a figure of."""

    score_count: int
    mean: float | None
    std: float | None
    truncated_share: float | None
    invalid_share: float | None


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """A window of raw scores beside the baseline kept with the model; ``drifted`` is ``p_value <= alpha``.

    ``p_value`` is the smallest of the three by Holm's correction. A drift of scores is not a failure of the reward
    model, which reinforcement learning moves by design: it is a reason to gather fresh human comparisons.
    """

    drifted: bool
    alpha: float
    p_value: float
    psi: float
    psi_p_value: float
    ks: float
    ks_p_value: float
    shift_stds: float
    z: float
    z_p_value: float
    score_count: int
    baseline_count: int
    compared_unix_ns: int


@dataclass(frozen=True, kw_only=True)
class ScoreDrift:
    """The scores since a model began to serve. ``not_compared`` says why there is no ``report``."""

    served_by: ServedBy
    window: ScoreWindow
    report: DriftReport | None
    not_compared: str


class RewardAdminClient(ServiceClient):
    """Administers one replica of the reward service, on its admin listener."""

    health_service = "quartet.reward.v1.RewardAdminService"
    name = "reward admin service"

    async def swap_model(self, model: str, *, revision: str = "", deadline_s: float = SWAP_DEADLINE_S) -> ModelSwap:
        """Lets another model take over; no request is dropped. Returns when it answers. Never repeated by itself.

        Cancelled, or past ``deadline_s``, it swaps nothing, unless the model was taking over at that very moment: ask
        ``RewardClient.get_model_info`` which one serves.

        Args:
            model: a folder below the service's models directory, relative to it, or a name that the operator allowed.
            revision: of a hub id.

        Raises:
            InvalidInputError: the name is not allowed.
            PreconditionError: the model can't be hosted, another swap is under way, or swapping is not allowed at all.
                The old model serves on.
            QuartetError: see quartet.client.errors.
        """
        stub = admin_pb2_grpc.RewardAdminServiceStub(self._channel)
        request = message("", admin_pb2.SwapModelRequest, model=model, revision=revision)
        async with self._stream(method="SwapModel") as metadata:
            reply: admin_pb2.SwapModelResponse = await stub.SwapModel(request, timeout=deadline_s, metadata=metadata)
        kept = reply.normalisation
        return ModelSwap(
            model=types.model_info(reply.model),
            normalisation=Normalisation(mean=kept.mean, std=kept.std, count=kept.count) if kept.count else None,
            replaced=types.served_by(reply.replaced),
            load_s=reply.load_seconds,
        )

    async def get_drift(self) -> ScoreDrift:
        """How the scores of the model that serves now compare with those kept with it.

        Raises:
            QuartetError: see quartet.client.errors.
        """
        stub = admin_pb2_grpc.RewardAdminServiceStub(self._channel)
        reply: admin_pb2.GetDriftResponse = await self._call(stub.GetDrift, admin_pb2.GetDriftRequest())
        window = reply.window
        return ScoreDrift(
            served_by=types.served_by(reply.served_by),
            window=ScoreWindow(
                score_count=window.score_count,
                mean=window.mean if window.HasField("mean") else None,
                std=window.std if window.HasField("std") else None,
                truncated_share=window.truncated_share if window.HasField("truncated_share") else None,
                invalid_share=window.invalid_share if window.HasField("invalid_share") else None,
            ),
            report=_report(reply.report) if reply.HasField("report") else None,
            not_compared=reply.not_compared,
        )


def _report(report: admin_pb2.DriftReport) -> DriftReport:
    return DriftReport(
        drifted=report.drifted,
        alpha=report.alpha,
        p_value=report.p_value,
        psi=report.psi,
        psi_p_value=report.psi_p_value,
        ks=report.ks,
        ks_p_value=report.ks_p_value,
        shift_stds=report.shift_stds,
        z=report.z,
        z_p_value=report.z_p_value,
        score_count=report.score_count,
        baseline_count=report.baseline_count,
        compared_unix_ns=report.compared_unix_ns,
    )
