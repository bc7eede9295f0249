"""Servers that score texts, each a process of its own, and clients of theirs: what ``bench.reward`` sets against ours.

- reward service: ``quartet-reward``, through gRPC.
- vLLM HTTP server: its OpenAI-compatible one with the pooling runner, at ``/classify``.
- one-by-one server: scores a request inside the handler that received it, as OpenRLHF's ``serve_rm`` does; requests
  that come meanwhile wait for their turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.outcome import log_of
from bench.turns import compiles, free_port, set_threads, vllm_environment

SERVICE = "reward service"
VLLM_SERVER = "vLLM HTTP server"
ONE_BY_ONE_SERVER = "one-by-one server"

Ids = list[int]
Ask = Callable[[Sequence[tuple[Ids, Ids]]], Awaitable[list[float]]]
"""Scores of (prompt, response) pairs, asked for in one request."""
_READY_S = 300.0


def command(name: str, model: Path, port: int, dtype: str) -> list[str]:
    """How the server is started."""
    if name == SERVICE:
        return [
            *("-m", "services.reward", "--model", str(model), "--dtype", dtype),
            *("--port", str(port), "--metrics-port", str(free_port()), "--admin-port", "0"),
        ]
    if name == VLLM_SERVER:
        return [
            *("-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--runner", "pooling"),
            *("--dtype", dtype, "--disable-log-stats", *(() if compiles() else ("--enforce-eager",))),
            *("--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "warning"),
            *("--served-model-name", "reward"),
        ]
    return ["-m", "bench.reward_servers", str(model), str(port), dtype]


@contextlib.contextmanager
def running(name: str, model: Path, dtype: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The server's process and its port; ready, and ended afterwards."""
    port = free_port()
    ours = log_of("reward-service") if name == SERVICE else contextlib.nullcontext(None)
    with ours as log:
        process = subprocess.Popen(
            [sys.executable, *command(name, model, port, dtype)], stdout=sys.stderr, stderr=log, env=vllm_environment()
        )
    try:
        asyncio.run(_wait_ready(name, process, port))
        yield process, port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _wait_ready(name: str, process: subprocess.Popen[bytes], port: int) -> None:
    """Until a first score came."""
    import aiohttp
    import grpc

    from quartet.client import QuartetError

    give_up_s = time.monotonic() + _READY_S
    while True:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with {process.returncode} before it was ready")
        try:
            async with asyncio.timeout(60), client(name, port) as ask:
                await ask([([2, 3], [4, 1])])
                return
        except (TimeoutError, aiohttp.ClientError, grpc.RpcError, QuartetError):
            if time.monotonic() > give_up_s:
                raise
        await asyncio.sleep(0.5)


def client(name: str, port: int) -> contextlib.AbstractAsyncContextManager[Ask]:
    """How the server is asked. Connected and, where it keeps what it has computed, emptied of it."""
    return _grpc_client(port) if name == SERVICE else _http_client(port, classify=name == VLLM_SERVER)


@contextlib.asynccontextmanager
async def _grpc_client(port: int) -> AsyncIterator[Ask]:
    from quartet.client import ItemFailure, RewardClient, ScoreItem

    async with RewardClient(f"127.0.0.1:{port}") as reward:
        await reward.wait_ready(_READY_S)
        fingerprint = (await reward.get_model_info())[0].served_by.tokenizer_fingerprint

        async def ask(pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
            items = [ScoreItem(prompt=prompt, response=response) for prompt, response in pairs]
            found = await reward.score(items, tokenizer_fingerprint=fingerprint)
            scores = []
            for result in found.results:
                if isinstance(result, ItemFailure):
                    raise SystemExit(result.reason)
                scores.append(result.score)
            return scores

        yield ask


@contextlib.asynccontextmanager
async def _http_client(port: int, *, classify: bool) -> AsyncIterator[Ask]:
    import aiohttp

    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout, connector=connector) as session:
        if classify:  # Texts come again in every turn, as they would not from people.
            async with session.post("/reset_prefix_cache") as reply:
                reply.raise_for_status()

        async def ask(pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
            rows = [prompt + response for prompt, response in pairs]
            body = {"model": "reward", "input": rows, "use_activation": False} if classify else {"input": rows}
            async with session.post("/classify", json=body) as reply:
                found: Any = await reply.json()
                if reply.status != 200:
                    raise SystemExit(f"the HTTP server answered {reply.status}: {found}")
            return [float(row["probs"][0]) for row in sorted(found["data"], key=lambda row: row["index"])]

        yield ask


def _serve_one_by_one(model: str, port: int, dtype: str) -> None:
    """The one-by-one server's main loop."""
    import torch
    import uvicorn
    from transformers import AutoModelForSequenceClassification

    set_threads()
    classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def score(ids: list[int]) -> float:
        return float(classifier(input_ids=torch.tensor([ids])).logits[0, 0])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        data = [{"index": i, "probs": [score(ids)]} for i, ids in enumerate(json.loads(body)["input"])]
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"data": data}).encode()})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    _serve_one_by_one(sys.argv[1], int(sys.argv[2]), sys.argv[3])
