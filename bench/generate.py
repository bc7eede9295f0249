"""``make bench-generate``: generation with log-probabilities, through the policy service and as others do it.

- policy service and AsyncLLM in process: see ``bench.generation``.
- vLLM HTTP server: its OpenAI-compatible one with the same engine settings, a request a prompt, all at once.
- transformers generate: one batch, left-padded, as a trainer without an engine does it; it samples other tokens.

All in one precision with the same Llama of 29 M parameters. The three engines are compiled, as vLLM has it by default,
where there is a C++ compiler; that takes some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench import generation
from bench.generation import Load, Response, Side
from bench.models import END, make_larger_policy
from bench.outcome import Verdict, conclude
from bench.turns import compiles, family, free_port, set_threads
from quartet.fingerprint import derive_seeds

TARGET = 0.97
_READY_S = 300.0


@contextlib.asynccontextmanager
async def _http_server(model: Path, load: Load) -> AsyncIterator[Side]:
    import aiohttp

    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", load.dtype),
        *("--host", "127.0.0.1", "--port", str(port), "--no-enable-chunked-prefill"),
        *(() if load.compile else ("--enforce-eager",)),
        *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--max-num-seqs", "256"),
        *("--disable-log-stats", "--uvicorn-log-level", "warning", "--served-model-name", "policy"),
    )
    try:
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout, connector=connector) as session:
            await _wait_healthy(session, process)

            async def one(prompt: list[int], seed: int) -> Response:
                asked = {
                    "model": "policy",
                    "prompt": prompt,
                    "max_tokens": load.new_tokens,
                    "temperature": 1.0,
                    "seed": seed,
                    "logprobs": 0,
                    "stop_token_ids": [END],
                    "return_token_ids": True,
                }
                async with session.post("/v1/completions", json=asked) as reply:
                    found = await reply.json()
                    if reply.status != 200:
                        raise SystemExit(f"the HTTP server answered {reply.status}: {found}")
                choice = found["choices"][0]
                return choice["token_ids"], choice["logprobs"]["token_logprobs"]

            async def generate(prompts: list[list[int]], seeds: list[int]) -> list[Response]:
                drawn = derive_seeds([("prompt", seed, 0) for seed in seeds])
                return await asyncio.gather(*map(one, prompts, drawn))

            root = psutil.Process(process.pid)
            yield Side(name="vLLM HTTP server", generate=generate, processes=lambda: family(root))
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _wait_healthy(session: Any, process: asyncio.subprocess.Process) -> None:
    import aiohttp

    async with asyncio.timeout(_READY_S):
        while True:
            if process.returncode is not None:
                raise SystemExit(f"vLLM's HTTP server ended with {process.returncode} before it was ready")
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with session.get("/health") as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def _transformers(model: Path, load: Load) -> AsyncIterator[Side]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.generate", "--dtype", load.dtype, "--transformers", str(model)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**26,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    reader, writer = process.stdout, process.stdin
    try:

        async def generate(prompts: list[list[int]], seeds: list[int]) -> list[Response]:
            writer.write((json.dumps([prompts, seeds[0] % 2**32, load.new_tokens]) + "\n").encode())
            line = await reader.readline()
            if not line:
                raise SystemExit(f"transformers' generate ended with {await process.wait()}")
            return [(ids, logprobs) for ids, logprobs in json.loads(line)]

        await generate([[2]], [0])
        root = psutil.Process(process.pid)
        yield Side(name="transformers generate", generate=generate, processes=lambda: family(root))
    finally:
        writer.close()
        await process.wait()


def _serve_transformers(folder: str, dtype: str) -> None:
    """Answers each line of the input, prompts of equal length, with token ids and their log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    set_threads()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for line in sys.stdin:
        prompts, seed, new_tokens = json.loads(line)
        torch.manual_seed(seed)
        with torch.inference_mode():
            ids_BT = torch.tensor(prompts)
            output = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=new_tokens,
                eos_token_id=END,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            new_BT = output.sequences[:, ids_BT.shape[1] :]
            logprobs_BT = torch.stack(
                [
                    torch.log_softmax(logits_BV.float(), -1).gather(1, new_BT[:, t, None])[:, 0]
                    for t, logits_BV in enumerate(output.logits)
                ],
                dim=1,
            )
        found = []
        for ids, logprobs in zip(new_BT.tolist(), logprobs_BT.tolist(), strict=True):
            length = ids.index(END) + 1 if END in ids else len(ids)
            found.append((ids[:length], logprobs[:length]))
        print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="concurrent requests")
    parser.add_argument("--prompt-tokens", type=int, default=Load.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=Load.new_tokens)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=Load.dtype, help="of all sides")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=compiles(), help="the engines")
    parser.add_argument("--transformers", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if (folder := options.pop("transformers")) is not None:
        _serve_transformers(folder, options["dtype"])
        return
    load = Load(**options)
    result = generation.measure(load, make_model=make_larger_policy, others=(_http_server, _transformers))
    print("\n" + "\n".join(result.lines()))
    how = "compiled" if load.compile else "eager"
    text = f"policy service / AsyncLLM in process, both {how}: {result.ratio:.3f}, target at least {TARGET:.2f}"
    conclude("generate", (Verdict(result.ratio >= TARGET, text),), {"load": asdict(load)} | result.figures())


if __name__ == "__main__":
    main()
