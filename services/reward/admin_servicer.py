"""Replaces the reward model while it serves, and tells how its scores have moved.

The new model is loaded, checked and warmed up in a thread of its own beside the old one. Until it is whole nothing has
changed; then, on the event loop and with nothing in between, new calls get the new one. The old one goes when the last
call that it began has been answered. So there are two models in memory for a while, and never three.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import structlog

from quartet.common.v1 import common_pb2
from quartet.model_folder import ModelFolderError, find_model
from quartet.reward.v1 import admin_pb2, admin_pb2_grpc
from services.hosting import memory, serving
from services.hosting.model import choose_hosting
from services.reward.config import RewardSettings
from services.reward.metadata import ensemble_members
from services.reward.score_watch import WatchState
from services.reward.servicer import HostedReward, RewardServicer, statistics
from services.reward.swap import SwapSources
from services.runtime.errors import AbortedError, FailedPreconditionError, StartError, UnavailableError

log = structlog.get_logger()

_PROGRESS_EVERY_S = 15.0
_LONGEST_REASON = 1500
_ENDING = "the service is ending; the model was not swapped"


class RewardAdminServicer(admin_pb2_grpc.RewardAdminServiceServicer):
    """Administration of the one reward model that this process serves."""

    def __init__(
        self, reward: RewardServicer, settings: RewardSettings, *, load: Callable[[RewardSettings], HostedReward]
    ) -> None:
        """``load`` makes a model of settings that name it, as at the start; runs in a thread.

        Raises:
            StartError: the settings name no usable source of models.
        """
        self.reward = reward
        self.settings = settings
        self.sources = SwapSources.of(settings)
        self._load = load
        self._ending = asyncio.Event()
        self._swapping = False
        self._loading: asyncio.Future[HostedReward] | None = None
        self._retiring: asyncio.Task[None] | None = None

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded, wanted or not."""
        return self._loading is not None

    async def SwapModel(self, request: admin_pb2.SwapModelRequest, context: Any) -> admin_pb2.SwapModelResponse:
        if self.reward.hosted is None:
            raise UnavailableError("the reward model is still loading; try again later")
        if self._ending.is_set():
            raise UnavailableError(_ENDING)
        if self._swapping or self.loading:
            raise AbortedError("another swap is under way, or one that was given up is still ending; try again later")
        self._swapping = True
        try:
            return await self._swap(request.model, request.revision)
        finally:
            self._swapping = False

    async def _swap(self, model: str, revision: str) -> admin_pb2.SwapModelResponse:
        if self._retiring is not None:
            # It answers its last calls: a third model has to wait until its memory is free.
            await self._unless_ending(self._retiring)
        start_s = time.monotonic()
        log.info("swap_begun", model=model[:200], revision=revision[:200])
        loading = self._loading = asyncio.ensure_future(serving.in_own_thread(self._load_beside, model, revision))
        waited = False
        try:
            await self._unless_ending(loading, progress=lambda: log.info("swap_loading", seconds=_since(start_s)))
            waited = True
        finally:
            if waited:
                self._loading = None
            else:  # The client left or the service ends: what comes of it is thrown away.
                loading.add_done_callback(self._discard)
        # Nothing is awaited from here on: the swap can't be ended halfway.
        new = loading.result()
        replaced = self._switch(new)
        load_s = time.monotonic() - start_s
        served_by = new.model.served_by
        log.info(
            "model_swapped",
            model=served_by.model_id,
            version=served_by.weights_version,
            fingerprint=served_by.weights_fingerprint[:12],
            seconds=round(load_s, 2),
        )
        return admin_pb2.SwapModelResponse(
            model=new.model, normalisation=statistics(new.normalisation), replaced=replaced, load_seconds=load_s
        )

    async def _unless_ending(self, work: asyncio.Future[Any], *, progress: Callable[[], None] = lambda: None) -> None:
        """Waits for ``work`` without taking its outcome, and without ending it when the waiting is ended.

        Raises:
            UnavailableError: the service ends first.
        """
        ending = asyncio.create_task(self._ending.wait())
        try:
            while not work.done():
                await asyncio.wait({work, ending}, timeout=_PROGRESS_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                if ending.done():
                    raise UnavailableError(_ENDING)
                if not work.done():
                    progress()
        finally:
            ending.cancel()

    def _load_beside(self, model: str, revision: str) -> HostedReward:
        """In the loader's thread: the new model, whole and warm.

        Raises:
            FailedPreconditionError: it can't be hosted, or there is no memory for it.
            InvalidArgumentError: the name is not allowed.
        """
        serving = "; the model that served goes on serving"
        try:
            name, wanted = self.sources.resolve(model, revision)
            settings = self.settings.model_copy(update={"model": name, "revision": wanted})
            names = ensemble_members(name) or (name,)
            folders = [find_model(one, revision=wanted, with_code=settings.trust_remote_code) for one in names]
            hosting = choose_hosting(settings)
            if short := memory.shortage(folders, hosting.dtype, hosting.device):
                raise FailedPreconditionError(
                    f"model {model!r}: {short}: both are in memory during a swap; start the service anew with "
                    f"--model instead{serving}",
                    field="model",
                )
            return self._load(settings)
        except (StartError, ModelFolderError) as error:
            raise FailedPreconditionError(f"{_cut(error)}{serving}", field="model") from error
        except (RuntimeError, MemoryError, OSError) as error:
            # Of torch: out of memory, a shape that does not fit. The log has all of it.
            log.error("swap_failed", model=name, exc_info=error)
            reason = f"{type(error).__name__}: {_cut(error)}"
            raise FailedPreconditionError(f"model {model!r} does not load: {reason}{serving}", field="model") from error

    def _switch(self, new: HostedReward) -> common_pb2.ServedBy:
        """From here on new calls are answered by ``new``. Returns what answered before."""
        old = self.reward.hosted
        assert old is not None
        new.model.served_by.weights_version = old.model.served_by.weights_version + 1
        self.reward.host(new)
        self._retiring = asyncio.create_task(self._retire(old, "model_retired"))
        replaced = common_pb2.ServedBy()
        replaced.CopyFrom(old.model.served_by)
        return replaced

    def _discard(self, loading: asyncio.Future[HostedReward]) -> None:
        """Ends a model that nobody waits for any more."""
        self._loading = None
        if (error := loading.exception()) is not None:
            log.info("swap_given_up", reason=str(error))
        else:
            self._retiring = asyncio.create_task(self._retire(loading.result(), "swap_given_up"))

    async def _retire(self, hosted: HostedReward, event: str) -> None:
        """Closes a model when it has answered its last call, and gives its memory back."""
        start_s, served_by = time.monotonic(), hosted.model.served_by
        await hosted.batcher.drained()
        # The thread takes the last reference with it: an idle thread of a pool may hold what it was given a moment
        # longer than its result is known, and memory is given back of what nobody holds.
        last = [hosted]
        del hosted
        await asyncio.to_thread(_end, last)
        log.info(event, model=served_by.model_id, version=served_by.weights_version, seconds=_since(start_s))

    def give_up(self) -> None:
        """The service ends: whoever waits for a swap is told that there is none."""
        self._ending.set()

    async def close(self) -> None:
        """Ends the models when all calls are answered; what is still being loaded is left behind, see ``loading``."""
        self.give_up()
        if self._retiring is not None:
            await self._retiring
        if self.reward.hosted is not None:
            await asyncio.to_thread(self.reward.hosted.close)

    async def GetDrift(self, request: admin_pb2.GetDriftRequest, context: Any) -> admin_pb2.GetDriftResponse:
        hosted = self.reward.hosted
        if hosted is None:
            raise UnavailableError("the reward model is still loading; try again later")
        return _drift_message(hosted.model.served_by, self.reward.watch.state())


def _end(last: list[HostedReward]) -> None:
    """Closes the model that ``last`` holds, drops it and gives its memory back."""
    last.pop().close()
    memory.release()


def _cut(error: BaseException) -> str:
    """Its message, short enough for the headers in which a status travels: libraries list all that they know."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def _since(start_s: float) -> float:
    return round(time.monotonic() - start_s, 2)


def _drift_message(served_by: common_pb2.ServedBy, state: WatchState) -> admin_pb2.GetDriftResponse:
    drift = state.drift
    report = None
    if drift is not None:
        report = admin_pb2.DriftReport(
            drifted=drift.drifted,
            alpha=drift.alpha,
            p_value=drift.p,
            psi=drift.psi,
            psi_p_value=drift.psi_p,
            ks=drift.ks,
            ks_p_value=drift.ks_p,
            shift_stds=drift.shift_stds,
            z=drift.z,
            z_p_value=drift.z_p,
            score_count=drift.score_count,
            baseline_count=drift.baseline_count,
            compared_unix_ns=state.compared_unix_ns,
        )
    return admin_pb2.GetDriftResponse(
        served_by=served_by,
        window=admin_pb2.ScoreWindow(
            score_count=state.score_count,
            mean=state.mean,
            std=state.std,
            truncated_share=state.truncated_share,
            invalid_share=state.invalid_share,
        ),
        report=report,
        not_compared=state.not_compared,
    )
