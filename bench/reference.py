"""Log-probabilities of given tokens at a large vocabulary: the reference service against what others do.

    make bench-reference

- full logits: transformers, then log_softmax over [B, S, V] and a gather; the textbook.
- selective: transformers' full logits, then a log-sum-exp row by row, as TRL's selective_log_softmax does.
- chunks: transformers' hidden states, then the logits of some positions at a time, in one product each.
- vLLM: prompt_logprobs of its engine, in process, compiled where there is a C++ compiler.
- reference service: through gRPC, in a process of its own.

All in one precision, the same model and sequences; sides take turns (see ``bench.turns``). Memory is above what the
loaded model takes, of the process that holds it. What the sides found is compared: they did the same work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench.outcome import Verdict, conclude, log_of
from bench.turns import (
    Side,
    compiles,
    end_at_once,
    free_port,
    serve_turns,
    set_threads,
    set_vllm_environment,
    start_sides,
)

FULL = "full logits"
SERVICE = "reference service"
SPEED_TARGET = 0.95
"""Of the fastest peer's tokens/s."""
AGREEMENT = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest difference of a log-probability from that of the full logits, nats, by precision."""
_BATCH = 8
"""Sequences at a time where full logits are made."""
_CHUNK = 1024
"""Positions at a time of the side that makes logits in chunks."""
_READY_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one turn asks for."""

    sequences: int = 32
    tokens: int = 512
    vocabulary: int = 131_072
    rounds: int = 3
    dtype: str = "float32"

    def ids(self) -> list[list[int]]:
        draw = random.Random(0)
        return [[draw.randrange(2, self.vocabulary) for _ in range(self.tokens)] for _ in range(self.sequences)]


def make_model(folder: Path, vocabulary: int) -> Path:
    """A Llama of width 256 and 4 layers with a tied embedding of ``vocabulary`` tokens, and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.models import save_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def measure(load: Load) -> list[Side]:
    """Starts all sides and measures them in turns; the first turn of each warms it up and is not kept."""
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name), load.vocabulary)
        shape = [str(load.sequences), str(load.tokens), str(load.vocabulary)]
        command = ["-m", "bench.reference", "--dtype", load.dtype, "--side"]
        commands = {side: [*command, side, str(model), *shape] for side in _SIDES}
        with start_sides(commands) as sides:
            for number in range(-1, load.rounds):
                for side in sides if number % 2 == 0 else reversed(sides):
                    turn = side.turn()
                    if number < 0:
                        side.turns.clear()
                        continue
                    rate = load.sequences * (load.tokens - 1) / turn.seconds
                    print(f"round {number + 1}: {side.name:<18} {rate:>8,.0f} tokens/s", flush=True)
    return sides


def lines(load: Load, sides: list[Side]) -> list[str]:
    """The table."""
    count = load.sequences * (load.tokens - 1)
    errors = _errors(sides)
    found = [f"{'':<20}{'tokens/s':>10}{'seconds':>10}{'peak MiB':>10}{'above model':>13}{'largest difference':>20}"]
    found += [
        f"{side.name:<20}{count / _seconds(side):>10,.0f}{_seconds(side):>10.2f}"
        f"{side.model_mib + _memory(side):>10,.0f}{_memory(side):>13,.0f}{errors[side.name]:>20.1e}"
        for side in sides
    ]
    return found


def verdicts(sides: list[Side], dtype: str) -> list[Verdict]:
    """What is asked of us, and whether it holds."""
    ours = next(side for side in sides if side.name == SERVICE)
    peers = [side for side in sides if side.name != SERVICE]
    speed = min(map(_seconds, peers)) / _seconds(ours)
    least = min(map(_memory, peers))
    error = max(_errors(sides).values())
    return [
        Verdict(speed >= SPEED_TARGET, f"speed / the fastest peer's: {speed:.2f}, target at least {SPEED_TARGET:.2f}"),
        Verdict(
            _memory(ours) <= least,
            f"memory: {_memory(ours):,.0f} MiB, target at most the smallest peer's {least:,.0f} MiB",
        ),
        Verdict(
            error <= AGREEMENT[dtype],
            f"all log-probabilities agree: {error:.1e}, target at most {AGREEMENT[dtype]:.0e}",
        ),
    ]


def _seconds(side: Side) -> float:
    return statistics.median(turn.seconds for turn in side.turns)


def _memory(side: Side) -> float:
    """MiB above the model."""
    return max(turn.peak_mib for turn in side.turns)


def _errors(sides: list[Side]) -> dict[str, float]:
    """Largest difference of each side's log-probabilities from those of the full logits."""
    truth = next(side.turns[0].found for side in sides if side.name == FULL)
    return {
        side.name: max(abs(a - b) for turn in side.turns for a, b in zip(turn.found, truth, strict=True))
        for side in sides
    }


# Sides -------------------------------------------------------------------------------------------------------------


def _full_logits(model: Path, ids: list[list[int]], dtype: str) -> None:
    def logprobs(policy: Any, ids_BS: Any) -> Any:
        return policy(input_ids=ids_BS).logits[:, :-1].float().log_softmax(-1).gather(2, ids_BS[:, 1:, None])

    _transformers(model, ids, dtype, logprobs)


def _selective(model: Path, ids: list[list[int]], dtype: str) -> None:
    import torch

    def logprobs(policy: Any, ids_BS: Any) -> Any:
        logits_BSV = policy(input_ids=ids_BS).logits[:, :-1]
        normalisers_BS = torch.stack([logits_SV.logsumexp(-1) for logits_SV in logits_BSV])
        return logits_BSV.gather(2, ids_BS[:, 1:, None])[..., 0] - normalisers_BS

    _transformers(model, ids, dtype, logprobs)


def _chunks(model: Path, ids: list[list[int]], dtype: str) -> None:
    import torch
    from torch.nn import functional as F

    def logprobs(policy: Any, ids_BS: Any) -> Any:
        hidden_ND = policy.model(input_ids=ids_BS).last_hidden_state[:, :-1].flatten(0, 1)
        targets_N = ids_BS[:, 1:].flatten()
        found = []
        for start in range(0, len(targets_N), _CHUNK):
            hidden_CD, targets_C = hidden_ND[start : start + _CHUNK], targets_N[start : start + _CHUNK]
            logits_CV = F.linear(hidden_CD, policy.lm_head.weight).float()
            found.append(logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(-1))
        return torch.cat(found)

    _transformers(model, ids, dtype, logprobs)


def _transformers(model: Path, ids: list[list[int]], dtype: str, logprobs: Callable[[Any, Any], Any]) -> None:
    """``logprobs``: of a batch of sequences by the model, in order."""
    import torch
    from transformers import AutoModelForCausalLM

    set_threads()
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def work(task: str) -> tuple[float, list[float]]:
        start_s = time.perf_counter()
        found: list[float] = []
        for first in range(0, len(ids), _BATCH):
            found += logprobs(policy, torch.tensor(ids[first : first + _BATCH])).flatten().tolist()
        return time.perf_counter() - start_s, found[:: len(found) // 500]

    serve_turns(work)


def _vllm(model: Path, ids: list[list[int]], dtype: str) -> None:
    set_vllm_environment()
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model),
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=not compiles(),
        generation_config="vllm",
        enable_prefix_caching=False,
    )
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, flat_logprobs=True)

    def work(task: str) -> tuple[float, list[float]]:
        start_s = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        found: list[float] = []
        for row, output in zip(ids, outputs, strict=True):
            table: Any = output.prompt_logprobs
            found += [table[place][token].logprob for place, token in enumerate(row) if place]
        return time.perf_counter() - start_s, found[:: len(found) // 500]

    serve_turns(work)
    end_at_once()


def _service(model: Path, ids: list[list[int]], dtype: str) -> None:
    from quartet.client import ItemFailure, ReferenceClient, TokenSequence

    ports = [free_port() for _ in range(2)]
    with log_of("reference-service") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "services.reference", "--model", str(model), "--dtype", dtype),
                *("--port", str(ports[0]), "--metrics-port", str(ports[1])),
            ],
            stdout=sys.stderr,
            stderr=log,
        )

    async def ask() -> list[float]:
        async with ReferenceClient(f"127.0.0.1:{ports[0]}") as client:
            await client.wait_ready(_READY_S)
            fingerprint = (await client.get_model_info()).served_by.tokenizer_fingerprint
            batch = await client.logprobs(
                [TokenSequence(token_ids=row, response_start=1) for row in ids], tokenizer_fingerprint=fingerprint
            )
        found: list[float] = []
        for result in batch.results:
            if isinstance(result, ItemFailure):
                raise SystemExit(result.reason)
            found += result.logprobs
        return found

    def work(task: str) -> tuple[float, list[float]]:
        start_s = time.perf_counter()
        found = asyncio.run(ask())
        return time.perf_counter() - start_s, found[:: len(found) // 500]

    async def ready() -> None:
        async with ReferenceClient(f"127.0.0.1:{ports[0]}") as client:
            await client.wait_ready(_READY_S)

    try:
        asyncio.run(ready())
        serve_turns(work, psutil.Process(process.pid))
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)


_SIDES: dict[str, Callable[[Path, list[list[int]], str], None]] = {
    FULL: _full_logits,
    "selective": _selective,
    "chunks": _chunks,
    "vLLM": _vllm,
    SERVICE: _service,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=Load.sequences)
    parser.add_argument("--tokens", type=int, default=Load.tokens, help="of each sequence")
    parser.add_argument("--vocabulary", type=int, default=Load.vocabulary)
    parser.add_argument("--rounds", type=int, default=Load.rounds)
    parser.add_argument("--dtype", choices=list(AGREEMENT), default=Load.dtype, help="of all sides")
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if (side := options.pop("side")) is not None:
        name, model, sequences, tokens, vocabulary = side
        load = Load(sequences=int(sequences), tokens=int(tokens), vocabulary=int(vocabulary))
        _SIDES[name](Path(model), load.ids(), options["dtype"])
        return
    load = Load(**options)
    sides = measure(load)
    print("\n".join(lines(load, sides)))
    turns = {side.name: [[turn.seconds, side.model_mib, turn.peak_mib] for turn in side.turns] for side in sides}
    conclude(
        "reference", verdicts(sides, load.dtype), {"dtype": load.dtype, "seconds_and_mib_of_model_and_above": turns}
    )


if __name__ == "__main__":
    main()
