"""The ways to score texts that ``bench.reward`` sets against each other, each a process that takes turns.

- one by one: a transformers classifier, a text at a time.
- padded batches: the same in batches of 32, in the order of arrival, padded to the longest.
- pipeline: transformers' pipeline("text-classification"), batches of 32; it tokenises, too.
- vLLM: its pooling runner's classify, in process, as it is by default: compiled where there is a C++ compiler, and with
  its prefix cache, which is emptied before each turn.
- vLLM HTTP server: the same through its own server, all texts in one request.
- own scorer: what the reward service runs, called in process; tells what gRPC and the runtime cost.
- reward service: through gRPC, in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench.reward_servers import SERVICE, VLLM_SERVER, client, running
from bench.turns import compiles, end_at_once, serve_turns, set_threads, set_vllm_environment

SCORER = "own scorer"
NAIVE = ("one by one", "padded batches")
SAMPLED = (*NAIVE, "pipeline")
"""Far slower than the others, and without anything to warm up: turns with a sample, in the first rounds."""
WARM_UP = "warm-up"
"""A task: the sample of the first load."""
_SAMPLE = 8
"""One text of so many, but not less than a batch."""
_BATCH = 32
_LOADS = "loads.json"


@dataclass(frozen=True)
class Text:
    """Token ids, and the same as text."""

    prompt: list[int]
    response: list[int]
    text: str

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.response


def sample(texts: Sequence[Text]) -> list[int]:
    """Places of an eighth of ``texts``, at least a batch, whose lengths are distributed as those of all; in order."""
    by_length = sorted(range(len(texts)), key=lambda place: len(texts[place].ids))
    count = min(len(texts), max(_BATCH, len(texts) // _SAMPLE))
    return sorted(by_length[(2 * k + 1) * len(texts) // (2 * count)] for k in range(count))


Tasks = dict[str, list[Text]]
"""Texts of each load, as the side is to score them."""


def write_loads(loads: dict[str, list[Text]], folder: Path) -> None:
    """For the sides to read."""
    content = {name: [[text.prompt, text.response, text.text] for text in texts] for name, texts in loads.items()}
    (folder / _LOADS).write_text(json.dumps(content))


def _read_tasks(folder: Path, *, sampled: bool) -> Tasks:
    tasks = {load: [Text(*row) for row in rows] for load, rows in json.loads((folder / _LOADS).read_text()).items()}
    found = {load: [texts[place] for place in sample(texts)] if sampled else texts for load, texts in tasks.items()}
    first = next(iter(tasks.values()))
    return found | {WARM_UP: [first[place] for place in sample(first)]}


def _classifier(model: Path, dtype: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    set_threads()
    return AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).eval()


def _batches(model: Path, tasks: Tasks, dtype: str, size: int) -> None:
    import torch

    classifier = _classifier(model, dtype)

    @torch.inference_mode()
    def work(task: str) -> tuple[float, list[float]]:
        start_s = time.perf_counter()
        found: list[float] = []
        texts = tasks[task]
        for first in range(0, len(texts), size):
            rows = [text.ids for text in texts[first : first + size]]
            longest = max(map(len, rows))
            ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            mask_BS = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            found += classifier(input_ids=ids_BS, attention_mask=mask_BS).logits[:, 0].tolist()
        return time.perf_counter() - start_s, found

    serve_turns(work)


def _pipeline(model: Path, tasks: Tasks, dtype: str) -> None:
    import transformers

    set_threads()
    scorer = transformers.pipeline("text-classification", model=str(model), dtype=dtype, device="cpu")

    def work(task: str) -> tuple[float, list[float]]:
        start_s = time.perf_counter()
        rows = [text.text for text in tasks[task]]
        found = scorer(rows, batch_size=_BATCH, function_to_apply="none", truncation=True)
        return time.perf_counter() - start_s, [one["score"] for one in found]

    serve_turns(work)


def _vllm(model: Path, tasks: Tasks, dtype: str) -> None:
    set_vllm_environment()
    from vllm import LLM, PoolingParams

    engine = LLM(
        str(model),
        runner="pooling",
        dtype=dtype,
        enforce_eager=not compiles(),
    )
    params = PoolingParams(use_activation=False)

    def work(task: str) -> tuple[float, list[float]]:
        engine.reset_prefix_cache()
        start_s = time.perf_counter()
        prompts: Any = [{"prompt_token_ids": text.ids} for text in tasks[task]]
        outputs = engine.classify(prompts, pooling_params=params, use_tqdm=False)
        return time.perf_counter() - start_s, [float(output.outputs.probs[0]) for output in outputs]

    serve_turns(work)
    end_at_once()


def _scorer(model: Path, tasks: Tasks, dtype: str) -> None:
    import torch

    from services.hosting.model import Hosting, load_tokenizer
    from services.reward.scorer import ScorerItem, TransformersScorer
    from services.runtime import allocator

    set_threads()
    allocator.keep_freed()  # As the service has it.
    hosting = Hosting(device=torch.device("cpu"), dtype=getattr(torch, dtype))
    scorer = TransformersScorer(model, hosting=hosting, tokenizer=load_tokenizer(model))

    def work(task: str) -> tuple[float, list[float]]:
        rows = [ScorerItem(text.ids) for text in tasks[task]]
        start_s = time.perf_counter()
        found = [score for first in range(0, len(rows), 256) for (score,) in scorer.score(rows[first : first + 256])]
        return time.perf_counter() - start_s, found

    serve_turns(work)


def _server(name: str) -> Callable[[Path, Tasks, str], None]:
    def serve(model: Path, tasks: Tasks, dtype: str) -> None:
        async def ask(pairs: list[tuple[list[int], list[int]]]) -> tuple[float, list[float]]:
            async with client(name, port) as asks:
                start_s = time.perf_counter()
                found = await asks(pairs)
                return time.perf_counter() - start_s, found

        def work(task: str) -> tuple[float, list[float]]:
            return asyncio.run(ask([(text.prompt, text.response) for text in tasks[task]]))

        with running(name, model, dtype) as (process, port):
            serve_turns(work, psutil.Process(process.pid))

    return serve


SIDES: dict[str, Callable[[Path, Tasks, str], None]] = {
    NAIVE[0]: lambda model, tasks, dtype: _batches(model, tasks, dtype, 1),
    NAIVE[1]: lambda model, tasks, dtype: _batches(model, tasks, dtype, _BATCH),
    "pipeline": _pipeline,
    "vLLM": _vllm,
    VLLM_SERVER: _server(VLLM_SERVER),
    SCORER: _scorer,
    SERVICE: _server(SERVICE),
}
"""How each is served, by its name."""


def main() -> None:
    name, model, folder, dtype = sys.argv[1:]
    SIDES[name](Path(model), _read_tasks(Path(folder), sampled=name in SAMPLED), dtype)


if __name__ == "__main__":
    main()
