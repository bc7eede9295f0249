"""Loading and unloading adapters: receive, verify, then load. Until the commit is verified nothing is loaded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from quartet.client.policy import UPDATE_ACCEPTED
from quartet.fingerprint import TensorDigest
from quartet.policy.v1 import adapters_pb2, adapters_pb2_grpc
from services.policy.adapter_config import ADAPTER_FILE, AdapterConfig, check_adapter, check_name
from services.policy.adapters import Adapter, AdapterState
from services.policy.engine import EngineFailedError
from services.policy.hosted import HostedPolicy
from services.policy.staging import StagedCheckpoint, TensorSpec
from services.policy.weights_servicer import in_thread
from services.runtime.errors import DataLossError, InvalidArgumentError, ServiceError, UnavailableError

log = structlog.get_logger()


class StagedAdapter(StagedCheckpoint):
    """One incoming adapter: its tensors in a file and its configuration in PEFT's form beside it."""

    what = "adapter's tensors"
    folder_prefix = "quartet-adapter-"
    file_name = ADAPTER_FILE
    fingerprint_field = "commit.fingerprint"
    otherwise = "nothing was loaded"

    def __init__(self, name: str, config: AdapterConfig, specs: Sequence[TensorSpec], parent: Path) -> None:
        """``config`` and ``specs`` were checked before."""
        super().__init__(specs, parent)
        self.name = name
        self.config = config

    def finish(self, expected_fingerprint: str) -> str:
        fingerprint = super().finish(expected_fingerprint)
        self.config.write(self.folder)
        return fingerprint

    def _fingerprint(self, digests: Sequence[TensorDigest]) -> str:
        return self.config.fingerprint(digests)


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """Loads adapters beside the one policy this process hosts. ``hosted`` is None until it is loaded."""

    def __init__(self, *, staging: Path, stop: Callable[[str], None]) -> None:
        """
        Args:
            staging: folder that incoming adapters are staged in.
            stop: ends the service with a reason, when the engine has died.
        """
        self.staging = staging
        self.stop = stop
        self.hosted: HostedPolicy | None = None

    def _hosted(self) -> HostedPolicy:
        if self.hosted is None:
            raise UnavailableError("the policy is still loading; try again later")
        return self.hosted

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Any
    ) -> adapters_pb2.ListAdaptersResponse:
        adapters = self._hosted().adapters
        return adapters_pb2.ListAdaptersResponse(
            adapters=[_info(state) for state in adapters.states.values()],
            max_adapters=adapters.max_adapters,
            max_rank=adapters.max_rank,
        )

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Any
    ) -> adapters_pb2.UnloadAdapterResponse:
        hosted = self._hosted()
        hosted.adapters.require_on()
        check_name(request.name, "name")
        try:
            adapter = await hosted.adapters.unload(hosted.engine, request.name)
        except EngineFailedError as error:
            raise self._died(error) from error
        return adapters_pb2.UnloadAdapterResponse(adapter=_info(AdapterState(adapter=adapter)))

    async def LoadAdapter(
        self, request_iterator: AsyncIterator[adapters_pb2.LoadAdapterRequest], context: Any
    ) -> adapters_pb2.LoadAdapterResponse:
        hosted = self._hosted()
        staged: StagedAdapter | None = None
        with contextlib.ExitStack() as opened:
            try:
                async for step in request_iterator:
                    kind = step.WhichOneof("step")
                    if (kind == "begin") != (staged is None):
                        raise InvalidArgumentError(
                            f"step is {kind or 'not set'}: an adapter is one begin, then chunks, then one commit",
                            field="step",
                        )
                    if kind == "begin":
                        staged = await self._open(hosted, step.begin, opened)
                        await context.send_initial_metadata(((UPDATE_ACCEPTED, "1"),))
                    elif kind == "chunk" and staged is not None:
                        await in_thread(staged.write, step.chunk.tensor_index, step.chunk.data)
                    elif kind == "commit" and staged is not None:
                        fingerprint = await in_thread(staged.finish, step.commit.fingerprint)
                        # From here on it runs to its end though the client leaves; what is open, it closes.
                        loading = asyncio.create_task(self._load(hosted, staged, fingerprint, opened.pop_all()))
                        loading.add_done_callback(_note_failure)
                        return await asyncio.shield(loading)
                    else:
                        raise InvalidArgumentError("step is not set: give begin, chunk or commit", field="step")
            except ServiceError:
                if staged is not None:
                    # A status that overtakes a client still sending would reach it as a broken pipe: take the rest in.
                    async for _ in request_iterator:
                        pass
                raise
        raise DataLossError("the stream ended before its commit; nothing was loaded")

    async def _open(
        self, hosted: HostedPolicy, begin: adapters_pb2.BeginAdapter, opened: contextlib.ExitStack
    ) -> StagedAdapter:
        """Checks what is announced, and makes room for it that ``opened`` gives back."""
        hosted.adapters.require_on()
        check_name(begin.name, "begin.name")
        config = AdapterConfig(
            rank=begin.config.rank,
            alpha=begin.config.alpha,
            target_modules=tuple(begin.config.target_modules),
            use_rslora=begin.config.use_rslora,
            module_ranks=dict(begin.config.module_ranks),
            module_alphas=dict(begin.config.module_alphas),
        )
        specs = [TensorSpec(name=t.name, dtype=t.dtype, shape=tuple(t.shape)) for t in begin.tensors]
        check_adapter(config, specs, hosted.engine.adapter_modules, hosted.adapters.max_rank)
        opened.enter_context(hosted.adapters.reserve(begin.name))
        return await in_thread(lambda: opened.enter_context(StagedAdapter(begin.name, config, specs, self.staging)))

    async def _load(
        self, hosted: HostedPolicy, staged: StagedAdapter, fingerprint: str, opened: contextlib.ExitStack
    ) -> adapters_pb2.LoadAdapterResponse:
        with opened:
            try:
                adapter, already_loaded = await hosted.adapters.load(
                    hosted.engine, staged.name, staged.config, fingerprint, staged.path
                )
            except EngineFailedError as error:
                raise self._died(error) from error
        return adapters_pb2.LoadAdapterResponse(
            adapter=_info(hosted.adapters.states.get(adapter.name, AdapterState(adapter=adapter))),
            already_loaded=already_loaded,
            received_bytes=staged.received_bytes,
        )

    def _died(self, error: EngineFailedError) -> UnavailableError:
        self.stop(str(error))
        return UnavailableError(f"{error}; the service restarts without adapters")


def _note_failure(task: asyncio.Task[adapters_pb2.LoadAdapterResponse]) -> None:
    """The caller may be gone: its failure must be in the log."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("adapter_not_loaded", reason=str(error))


def _info(state: AdapterState) -> adapters_pb2.AdapterInfo:
    adapter: Adapter = state.adapter
    config = adapter.config
    return adapters_pb2.AdapterInfo(
        name=adapter.name,
        fingerprint=adapter.fingerprint,
        config=adapters_pb2.AdapterConfig(
            rank=config.rank,
            alpha=config.alpha,
            target_modules=config.target_modules,
            use_rslora=config.use_rslora,
            module_ranks=config.module_ranks,
            module_alphas=config.module_alphas,
        ),
        running_requests=state.running,
        unloading=state.unloading is not None,
    )
