"""Generation through the policy service against vLLM's AsyncLLM called in process, on the same prompts.

    python -m bench.generation

Both sides run the same vLLM with the same model, sampling and number of concurrent requests, and return tokens and
their log-probabilities with a seed a prompt, as a trainer needs them. Rounds alternate; whoever is not measured is
idle, and an idle engine waits without using the processor. The figure is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.models import make_models
from quartet.client import Completion, PolicyClient, Sampling

TARGET = 0.90


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one round asks for."""

    prompts: int = 128
    prompt_tokens: int = 32
    new_tokens: int = 128
    rounds: int = 5

    def prompt_ids(self) -> list[list[int]]:
        return [[2 + (7 * p + 13 * t) % 4000 for t in range(self.prompt_tokens)] for p in range(self.prompts)]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Tokens a second of each round, of the service and of the engine in process."""

    service: tuple[float, ...]
    in_process: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.service) / statistics.median(self.in_process)

    def lines(self) -> list[str]:
        def line(name: str, values: Sequence[float]) -> str:
            return f"{name:<24} {statistics.median(values):>8,.0f} tokens/s  ({min(values):,.0f} to {max(values):,.0f})"

        return [
            line("policy service", self.service),
            line("AsyncLLM in process", self.in_process),
            f"{'ratio':<24} {self.ratio:>8.3f}",
        ]


def measure(load: Load) -> Result:
    """Starts both sides and measures them in turns."""
    with tempfile.TemporaryDirectory() as folder:
        policy, _ = make_models(Path(folder))
        return asyncio.run(_measure(policy, load))


async def _measure(model: Path, load: Load) -> Result:
    prompts = load.prompt_ids()
    async with _service(model) as client, _engine(model) as engine:
        fingerprint = (await client.get_model_info()).served_by.tokenizer_fingerprint
        sampling = Sampling(max_new_tokens=load.new_tokens, min_new_tokens=load.new_tokens)
        rates: tuple[list[float], list[float]] = ([], [])
        for number in range(-1, load.rounds):  # The first round warms both up.
            for side in (0, 1):
                start_s = time.perf_counter()
                if side == 0:
                    tokens = 0
                    stream = client.generate(
                        prompts, sampling, tokenizer_fingerprint=fingerprint, prompt_seeds=range(len(prompts))
                    )
                    async for item in stream:
                        assert isinstance(item, Completion)
                        tokens += len(item.logprobs)
                else:
                    tokens = sum(
                        await asyncio.gather(*(_generate(engine, p, i, number, load) for i, p in enumerate(prompts)))
                    )
                seconds = time.perf_counter() - start_s
                assert tokens == load.prompts * load.new_tokens
                if number >= 0:
                    rates[side].append(tokens / seconds)
                    print(
                        f"round {number + 1} {('service', 'in process')[side]}: {tokens / seconds:,.0f} tokens/s",
                        flush=True,
                    )
    return Result(service=tuple(rates[0]), in_process=tuple(rates[1]))


async def _generate(engine: Any, prompt: list[int], index: int, number: int, load: Load) -> int:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=1.0,
        max_tokens=load.new_tokens,
        min_tokens=load.new_tokens,
        stop_token_ids=[1],
        seed=index,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    final = None
    async for output in engine.generate({"prompt_token_ids": prompt}, params, f"{number}-{index}"):
        final = output
    assert final is not None
    assert len(final.outputs[0].logprobs) == load.new_tokens
    return len(final.outputs[0].token_ids)


@contextlib.asynccontextmanager
async def _service(model: Path) -> AsyncIterator[PolicyClient]:
    """A policy service as ``quartet-policy`` starts it, and its client."""
    ports = [_free_port() for _ in range(3)]
    flags = [f"--{name}={port}" for name, port in zip(("port", "admin-port", "metrics-port"), ports, strict=True)]
    process = subprocess.Popen(  # noqa: ASYNC220 - it only starts.
        [
            sys.executable,
            "-m",
            "services.policy",
            "--model",
            str(model),
            "--engine",
            "vllm",
            *flags,
            "--log-level",
            "warning",
        ]
    )
    try:
        async with PolicyClient(f"127.0.0.1:{ports[0]}") as client:
            await client.wait_ready(240.0)
            yield client
    finally:
        process.terminate()
        process.wait()


@contextlib.asynccontextmanager
async def _engine(model: Path) -> AsyncIterator[Any]:
    """AsyncLLM as its users start it, with what the service sets too: all cores, eager, float32."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        enable_chunked_prefill=False,
        max_num_seqs=256,
        disable_log_stats=True,
    )
    engine = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
    try:
        yield engine
    finally:
        engine.shutdown()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=Load.prompts)
    parser.add_argument("--prompt-tokens", type=int, default=Load.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=Load.new_tokens)
    parser.add_argument("--rounds", type=int, default=Load.rounds)
    options = parser.parse_args()
    print("\n".join(measure(Load(**vars(options))).lines()))


if __name__ == "__main__":
    main()
