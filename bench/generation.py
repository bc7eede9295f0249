"""Generation through the policy service against vLLM's AsyncLLM called in process.

    python -m bench.generation

``bench.generate`` sets more sides beside these two. Both run the same vLLM with the same model, prompts, sampling,
seeds and number of concurrent requests, and give the caller token ids and their log-probabilities, as a trainer needs
them. The service's side is all that stands between a trainer and the engine: client, gRPC, protobuf, the service's
event loop, and the process it runs in.

- The sides take turns, and who goes first alternates, so that a drift of the machine hits both. The figure is the
  median over the rounds of service / in process, two turns that lie seconds apart; other load on the machine moves
  single rounds, so the spread is printed beside it.
- Both engines are up all the time. Starting one takes half a minute, and turns that far apart would compare two states
  of a shared machine. An idle engine waits on a socket; what the idle side takes of the processor while the other is
  measured is printed, so that nobody has to believe this.
- The first rounds warm both up and are not counted: first batches allocate and compile. Besides, every turn begins with
  a part of its load that is not counted: an engine that stood idle while the other worked is slower at first, which
  would favour whoever had the turn before, too.
- Prompts are new in every round, so that no side answers from its prefix cache.
- The share of responses that are the same token for token is printed: the sides do the same work.
- Processor time a thousand tokens is of the whole side, engine, service and client: it depends less on what else the
  machine does than the clock's time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # vLLM needs it too.

from bench.models import END, VOCABULARY, make_models
from bench.outcome import log_of
from bench.turns import family, free_port
from quartet.client import Completion, PolicyClient, Sampling
from quartet.fingerprint import derive_seeds

TARGET = 0.90
SERVICE = "policy service"
IN_PROCESS = "AsyncLLM in process"
_WARM_UP = 2
_READY_S = 300.0
# Share of the load that a turn begins with, uncounted.
_REWARM = 0.25
# Of one core. More, and the idle side slows the other down.
_IDLE_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one turn asks for; by default about as much as a step of PPO."""

    prompts: int = 128
    prompt_tokens: int = 32
    new_tokens: int = 64
    rounds: int = 16
    dtype: str = "float32"
    compile: bool = False
    """Of the engines: slower to start, faster to run. vLLM's own default, the service's on a GPU."""

    def prompt_ids(self, name: str) -> list[list[int]]:
        """Prompts of a round by its name, the same for both sides."""
        draw = random.Random(name)
        return [[draw.randrange(2, VOCABULARY) for _ in range(self.prompt_tokens)] for _ in range(self.prompts)]

    def seeds(self, name: str) -> list[int]:
        """One a prompt, as the trainer sends them."""
        return derive_seeds([("bench", name, p) for p in range(self.prompts)])


Response = tuple[Sequence[int], Sequence[float]]
"""Token ids and log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to generate. ``processes``: those that are this side's alone; this process works for all."""

    name: str
    generate: Callable[[list[list[int]], list[int]], Awaitable[list[Response]]]
    processes: Callable[[], list[psutil.Process]]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side did in one round. ``idle_share``: of one core, taken by the other side meanwhile."""

    tokens: int
    seconds: float
    cpu_s: float
    idle_share: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_ms_per_token(self) -> float:
        return 1000 * self.cpu_s / self.tokens


@dataclass(frozen=True, kw_only=True)
class Result:
    """The counted rounds of each side, and the share of responses that were the same on the first two sides."""

    turns: dict[str, tuple[Turn, ...]]
    same_share: float

    def ratios(self, peer: str) -> list[float]:
        """Service / ``peer`` of each round."""
        pairs = zip(self.turns[SERVICE], self.turns[peer], strict=True)
        return [ours.rate / theirs.rate for ours, theirs in pairs]

    @property
    def ratio(self) -> float:
        """Service / in process: the median of the rounds."""
        return statistics.median(self.ratios(IN_PROCESS))

    def lines(self) -> list[str]:
        """The table."""

        def row(name: str, turns: Sequence[Turn]) -> str:
            rates = [turn.rate for turn in turns]
            cpu_s = statistics.median(turn.cpu_ms_per_token for turn in turns)
            return f"{name:<22}{statistics.median(rates):>9,.0f}{min(rates):>9,.0f}{max(rates):>9,.0f}{cpu_s:>20.3f}"

        idle = max(turn.idle_share for turns in self.turns.values() for turn in turns)
        found = [f"{'tokens/s':<28}{'median':>9}{'least':>9}{'most':>9}{'CPU s/1,000 tokens':>20}"]
        found += [row(name, turns) for name, turns in self.turns.items()]
        for peer in list(self.turns)[1:]:
            ratios = self.ratios(peer)
            low, middle, high = statistics.quantiles(ratios, n=4)
            found.append(
                f"{'service / ' + peer:<28}{middle:>9.3f}{min(ratios):>9.3f}{max(ratios):>9.3f}"
                f"   middle half of {len(ratios)} rounds {low:.3f} to {high:.3f}"
            )
        found.append(
            f"responses the same through the service and in process: {self.same_share:.1%}; "
            f"idle sides: at most {idle:.1%} of one core"
        )
        if idle > _IDLE_SHARE:
            found.append(f"warning: the idle sides took more than {_IDLE_SHARE:.0%} of a core; the ratio is not clean")
        return found

    def figures(self) -> dict[str, Any]:
        """What a program wants to know of it."""
        turns = {
            name: [asdict(turn) | {"tokens_per_s": turn.rate} for turn in turns] for name, turns in self.turns.items()
        }
        ratios = {peer: self.ratios(peer) for peer in list(self.turns)[1:]}
        return {"ratio": self.ratio, "ratios": ratios, "same_share": self.same_share, **turns}


Starts = Callable[[Path, Load], contextlib.AbstractAsyncContextManager[Side]]
"""Starts a side with a model."""


def measure(
    load: Load,
    *,
    make_model: Callable[[Path], Path] = lambda folder: make_models(folder)[0],
    others: Sequence[Starts] = (),
) -> Result:
    """Starts the sides, the service and in process first, and measures them in turns."""
    # Before vLLM is imported; the sides inherit them.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    import uvloop  # As vLLM's own servers run it.

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        result: Result = uvloop.run(_measure(model, load, (_service, _in_process, *others)))
    return result


async def _measure(model: Path, load: Load, starts: Sequence[Starts]) -> Result:
    async with contextlib.AsyncExitStack() as stack:
        sides = [await stack.enter_async_context(start(model, load)) for start in starts]
        turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
        same: list[bool] = []
        for number in range(-_WARM_UP, load.rounds):
            answers: dict[str, list[Response]] = {}
            taken: dict[str, Turn] = {}
            for side in sides if number % 2 == 0 else reversed(sides):
                others = [other for other in sides if other is not side]
                answers[side.name], taken[side.name] = await _turn(side, others, load, number)
            if number < 0:
                continue
            for name, turn in taken.items():
                turns[name].append(turn)
            pairs = zip(answers[SERVICE], answers[IN_PROCESS], strict=True)
            same += [list(ours[0]) == list(theirs[0]) for ours, theirs in pairs]
            rates = ", ".join(f"{side.name} {taken[side.name].rate:,.0f}" for side in sides)
            ratio = taken[SERVICE].rate / taken[IN_PROCESS].rate
            print(f"round {number + 1:>2}: tokens/s: {rates}; ratio {ratio:.3f}", flush=True)
        return Result(turns={name: tuple(kept) for name, kept in turns.items()}, same_share=sum(same) / len(same))


async def _turn(side: Side, others: Sequence[Side], load: Load, number: int) -> tuple[list[Response], Turn]:
    part = max(1, int(_REWARM * load.prompts))
    await side.generate(load.prompt_ids(f"rewarm {number}")[:part], load.seeds(f"rewarm {number}")[:part])
    prompts, seeds = load.prompt_ids(f"round {number}"), load.seeds(f"round {number}")
    here = psutil.Process()
    own, idle = [here, *side.processes()], [process for other in others for process in other.processes()]
    gc.collect()  # The garbage of one turn is not collected in the next.
    own_s, idle_s, start_s = _cpu_s(own), _cpu_s(idle), time.perf_counter()
    responses = await side.generate(prompts, seeds)
    seconds = time.perf_counter() - start_s
    for ids, logprobs in responses:
        if len(ids) != len(logprobs) or not (len(ids) == load.new_tokens or ids[-1] == END):
            raise SystemExit(
                f"{side.name}: {len(ids)} tokens with {len(logprobs)} log-probabilities: not what was asked"
            )
    turn = Turn(
        tokens=sum(len(ids) for ids, _ in responses),
        seconds=seconds,
        cpu_s=_cpu_s(own) - own_s,
        idle_share=(_cpu_s(idle) - idle_s) / seconds,
    )
    return responses, turn


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(t.user + t.system for t in times))


@contextlib.asynccontextmanager
async def _service(model: Path, load: Load) -> AsyncIterator[Side]:
    """A policy service as ``quartet-policy`` starts it, and its client."""
    ports = [free_port() for _ in range(3)]
    flags = [f"--{name}={port}" for name, port in zip(("port", "admin-port", "metrics-port"), ports, strict=True)]
    with log_of("policy-service") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.policy", "--model", str(model), "--engine", "vllm"),
            *("--dtype", load.dtype, "--compile", "on" if load.compile else "off", *flags),
            stderr=log,
        )
    ended = asyncio.create_task(process.wait())
    try:
        async with PolicyClient(f"127.0.0.1:{ports[0]}") as client:
            ready = asyncio.create_task(client.wait_ready(_READY_S))
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ready.cancel()
                raise SystemExit(f"the policy service ended with {process.returncode} before it was ready")
            await ready
            fingerprint = (await client.get_model_info()).served_by.tokenizer_fingerprint
            sampling = Sampling(max_new_tokens=load.new_tokens)

            async def generate(prompts: list[list[int]], seeds: list[int]) -> list[Response]:
                responses: dict[int, Response] = {}
                stream = client.generate(prompts, sampling, tokenizer_fingerprint=fingerprint, prompt_seeds=seeds)
                async for item in stream:
                    if not isinstance(item, Completion):
                        raise SystemExit(f"prompt {item.prompt_index} failed: {item.failure.reason}")
                    responses[item.prompt_index] = (item.token_ids, item.logprobs)
                return [responses[p] for p in range(len(prompts))]

            root = psutil.Process(process.pid)
            yield Side(name=SERVICE, generate=generate, processes=lambda: family(root))
    finally:
        if not ended.done():
            process.terminate()
        await ended


@contextlib.asynccontextmanager
async def _in_process(model: Path, load: Load) -> AsyncIterator[Side]:
    """AsyncLLM as a trainer would hold it: what the service sets for a CPU, all cores, is set here too."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(model),
        dtype=load.dtype,
        enforce_eager=not load.compile,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        enable_chunked_prefill=False,
        max_num_seqs=256,
        disable_log_stats=True,
    )
    before = {process.pid for process in family(psutil.Process())}
    engine = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
    own = [process for process in family(psutil.Process()) if process.pid not in before]

    asked = itertools.count()

    async def one(prompt: list[int], seed: int, request_id: str) -> Response:
        final = None
        async for output in engine.generate(
            {"prompt_token_ids": prompt}, sampling_params(seed, load.new_tokens), request_id
        ):
            final = output
        if final is None:
            raise SystemExit("AsyncLLM ended a request without an answer")
        completion = final.outputs[0]
        flat: Any = completion.logprobs
        return completion.token_ids, [flat.logprobs[start] for start in flat.start_indices]

    async def generate(prompts: list[list[int]], seeds: list[int]) -> list[Response]:
        # Those that the service derives from what the trainer sends.
        drawn = derive_seeds([("prompt", seed, 0) for seed in seeds])
        numbered = enumerate(zip(prompts, drawn, strict=True), start=next(asked) * load.prompts)
        return await asyncio.gather(*(one(prompt, seed, str(i)) for i, (prompt, seed) in numbered))

    try:
        yield Side(name=IN_PROCESS, generate=generate, processes=lambda: own)
    finally:
        await asyncio.to_thread(engine.shutdown)
        # Its __del__ calls this again, at the interpreter's end, when the modules it needs are gone.
        engine.shutdown = lambda timeout=None: None


def sampling_params(seed: int, new_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=1.0,
        max_tokens=new_tokens,
        stop_token_ids=[END],
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=Load.prompts, help="concurrent requests")
    parser.add_argument("--prompt-tokens", type=int, default=Load.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=Load.new_tokens)
    parser.add_argument("--rounds", type=int, default=Load.rounds)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=Load.dtype, help="of all sides")
    parser.add_argument("--compile", action="store_true", help="the engines' models; takes a C++ compiler and minutes")
    options = parser.parse_args()
    print("\n".join(measure(Load(**vars(options))).lines()))


if __name__ == "__main__":
    main()
