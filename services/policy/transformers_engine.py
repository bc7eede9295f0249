"""The transformers engine: generates where vLLM is not installed, behind the same protocol.

One thread owns the model. Batching is continuous: requests join and leave between two tokens, at a time no more of them
than one pass may read; their keys and values stand in one left-padded cache. Weights change between two tokens, too,
and kept requests then start again from the tokens they have, so that no cache outlives its weights.

Shapes: B requests in the batch, S cached positions, V vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers.cache_utils import DynamicCache

from services.hosting.model import choose_hosting, longest_sequence
from services.policy.adapter_config import AdapterConfig
from services.policy.config import PolicySettings
from services.policy.drawing import draw
from services.policy.engine import (
    EngineFailedError,
    Finish,
    Generated,
    GenerationTask,
    InFlight,
    Piece,
    Sampling,
    StillRunningError,
    cut_spans,
)
from services.policy.low_rank import LowRankAdapter, RowAdapters, read_adapter, row_wise_modules
from services.policy.running_batch import Batch, Row, is_plain, join, keep, positions
from services.policy.staging import WEIGHTS_FILE
from services.runtime.errors import StartError

_POSSIBLE_ERRORS = (
    SafetensorError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    OSError,
    AttributeError,
)


@dataclass(kw_only=True)
class _Update:
    """A weight update waiting for its moment."""

    path: Path
    version: int
    in_flight: InFlight
    future: Future[float]
    begun: bool = False


class TransformersEngine:
    """Any causal language model of transformers whose attention keeps all positions."""

    def __init__(self, folder: Path, settings: PolicySettings) -> None:
        self.folder = folder
        self.settings = settings
        self.hosting = choose_hosting(settings)
        self.name = self.hosting.engine
        self.dtype = self.hosting.dtype_name
        self.vocab_size = 0
        self.max_sequence_tokens = 0
        self.max_temperature = math.inf
        self.version = 0
        # Alone in its batch a row is never padded, so its sums do not depend on companions.
        self._slots = 1 if settings.deterministic else settings.max_concurrent
        self._pass_tokens = settings.max_batch_tokens or (4096 if self.hosting.device.type == "cpu" else 16384)
        self.adapter_modules: Mapping[str, tuple[int, int]] = {}
        self._adapters: dict[int, LowRankAdapter] = {}
        self._row_adapters = RowAdapters()
        self._model: Any = None
        self._waiting: deque[Row] = deque()
        self._joining: list[Row] = []  # No longer waiting, and not in the batch yet.
        self._batch: Batch | None = None
        self._update: _Update | None = None
        self._steps = 0
        self._left = False  # Somebody cancelled since the last step.
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    async def start(self) -> None:
        await asyncio.to_thread(self._load)
        self._thread.start()
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=2, min_new_tokens=0, stop_token_ids=())
        try:
            await self.generate(GenerationTask(prompt_ids=[0, 0], sampling=sampling, seed=0, request_id="warm-up"))
        except EngineFailedError as error:
            raise StartError(f"transformers does not generate from {str(self.folder)!r}: {error}") from error

    def _load(self) -> None:
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        try:
            self._model = self._read_model(self.folder)
        except _POSSIBLE_ERRORS as error:
            raise StartError(f"transformers does not load {str(self.folder)!r}: {error}") from error
        self.vocab_size = int(self._model.get_input_embeddings().weight.shape[0])
        self.max_sequence_tokens = self.settings.max_sequence_tokens or longest_sequence(self._model.config, None)
        with torch.inference_mode():
            probe = self._model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.hosting.device))
        if not is_plain(probe.past_key_values):
            raise StartError(
                f"{type(self._model).__name__} keeps something else than the keys and values of all positions "
                "(a sliding window, a state): the transformers engine can't batch it; use --engine vllm"
            )

        if self.settings.max_adapters:
            self.adapter_modules = row_wise_modules(self._model, self.hosting.device)
            self._row_adapters.attach(self._model, self.adapter_modules)

    def _read_model(self, folder: Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **self.hosting.loading)
        model = model.eval().to(self.hosting.device)
        self._row_adapters.attach(model, self.adapter_modules)
        return model

    async def generate(self, task: GenerationTask) -> Generated:
        # Cancelling the wrapper cancels the future, which the thread notices before the next token.
        return await asyncio.wrap_future(self._enter(task, None).future)

    async def stream(self, task: GenerationTask) -> AsyncGenerator[Piece, None]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            # The loop may be gone when the process ends: then nobody reads along.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(news.set)

        row = self._enter(task, tell)
        answer = asyncio.wrap_future(row.future)
        answer.add_done_callback(lambda _: news.set())
        sent = 0
        try:
            while not answer.done():
                await news.wait()
                news.clear()
                # The thread appends a token first and counts it in a span last: what is counted is there.
                spans = [(version, count) for version, count in list(row.spans)]
                if not answer.done() and (end := sum(count for _, count in spans)) > sent:
                    yield _piece(row.token_ids, row.logprobs, spans, sent, end)
                    sent = end
            done = answer.result()
            count = len(done.token_ids)
            yield _piece(done.token_ids, done.logprobs, done.version_spans, sent, count, done.finish)
        finally:
            answer.cancel()

    def _enter(self, task: GenerationTask, on_token: Callable[[], None] | None) -> Row:
        row = Row(
            task=task,
            adapter=self._adapters[task.adapter] if task.adapter else None,
            future=Future(),
            generator=torch.Generator().manual_seed(task.seed),
            start_unix_ns=time.time_ns(),
            on_token=on_token,
        )
        row.future.add_done_callback(self._note_cancelled)
        with self._changed:
            self._require_alive()
            self._waiting.append(row)
            self._changed.notify()
        return row

    def _note_cancelled(self, future: Future[Generated]) -> None:
        if future.cancelled():
            self._left = True

    @property
    def counts(self) -> tuple[int, int]:
        """How many requests are being generated, and how many wait for a slot."""
        with self._changed:
            return len(self._batch.rows if self._batch is not None else ()), len(self._waiting) + len(self._joining)

    async def update_weights(self, safetensors: Path, version: int, in_flight: InFlight, wait_s: float) -> float:
        update = _Update(path=safetensors, version=version, in_flight=in_flight, future=Future())
        with self._changed:
            self._require_alive()
            self._update = update
            self._changed.notify()
        done = asyncio.wrap_future(update.future)
        await asyncio.wait([done], timeout=wait_s)
        with self._changed:
            if in_vain := not (update.begun or update.future.done()):
                self._update = None
                self._changed.notify()
        if in_vain:
            raise StillRunningError(f"requests in flight did not come to rest within {wait_s:.0f} s")
        return await done

    async def load_adapter(self, number: int, safetensors: Path, config: AdapterConfig) -> None:
        self._require_alive()
        self._adapters[number] = await asyncio.to_thread(read_adapter, safetensors, config, self.hosting.device)

    async def unload_adapter(self, number: int) -> None:
        self._require_alive()
        del self._adapters[number]

    async def check(self) -> None:
        self._require_alive()

    @property
    def progress(self) -> object:
        return self._steps, self.version

    def give_up(self, reason: str) -> None:
        self._stopping = True
        self._fail(reason)

    async def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _require_alive(self) -> None:
        if self._failure is not None:
            raise EngineFailedError(self._failure)

    # The thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._step()
        finally:
            # Whatever ended the thread, nobody may wait for it for ever, and health must not stay green.
            error = sys.exc_info()[1]
            self._fail("the engine was stopped" if error is None else f"generation failed: {error!r}")

    def _fail(self, reason: str) -> None:
        """Answers everybody who waits, so that nobody waits for ever."""
        with self._changed:
            self._failure = self._failure or reason
            waiting: list[Future[Any]] = [row.future for row in (*self._waiting, *self._joining)]
            if self._batch is not None:
                waiting += [row.future for row in self._batch.rows]
            if self._update is not None:
                waiting.append(self._update.future)
        for future in waiting:
            with contextlib.suppress(InvalidStateError):  # Answered or cancelled, maybe just now.
                future.set_exception(EngineFailedError(reason))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._stopping or self._waiting or self._batch or self._update):
                self._changed.wait()
            return not self._stopping

    def _step(self) -> None:
        """Drops who left, changes weights, admits newcomers, and samples one token for everybody."""
        if self._left:
            self._left = False
            self._keep(lambda row: not row.future.cancelled())
            with self._changed:
                self._waiting = deque(row for row in self._waiting if not row.future.cancelled())
        self._maybe_update()
        self._admit()
        if self._batch is not None:
            logits_BV = self._forward(self._batch)
            self._sample(self._batch.rows, logits_BV)
            self._finish()

    def _admit(self) -> None:
        """Reads the prompts of those who are next, as many as there are slots for and one pass may have tokens."""
        rows: list[Row] = []
        longest = 0
        with self._changed:
            free = self._slots - (len(self._batch.rows) if self._batch else 0)
            while self._waiting and len(rows) < free:
                row = self._waiting[0]
                if row.future.cancelled():  # Who has left takes no place of those who wait behind him.
                    self._waiting.popleft()
                    continue
                # An update that waits for the running ones to finish must not be starved by newcomers.
                if self._update is not None and not row.token_ids:
                    break
                # The others wait for the next step, so that whoever is running gets a token meanwhile.
                if rows and max(longest, row.length) * (len(rows) + 1) > self._pass_tokens:
                    break
                longest = max(longest, row.length)
                rows.append(self._waiting.popleft())
            self._joining = rows
        if not rows:
            return
        prompts = [row.task.prompt_ids + row.token_ids for row in rows]
        device = self.hosting.device
        ids_BS = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
        starts_B = torch.tensor([longest - len(ids) for ids in prompts], device=device)
        mask_BS = torch.arange(longest, device=device)[None, :] >= starts_B[:, None]
        with self._row_adapters.applied([row.adapter for row in rows], device):
            output = self._model(
                input_ids=ids_BS,
                attention_mask=mask_BS.long(),
                position_ids=positions(mask_BS),
                use_cache=True,
                past_key_values=DynamicCache(),
                logits_to_keep=1,
            )
        self._sample(rows, output.logits[:, -1])
        joined = Batch(rows=rows, cache=output.past_key_values, mask_BS=mask_BS)
        self._batch = joined if self._batch is None else join(self._batch, joined)
        self._joining = []
        self._finish()

    def _forward(self, batch: Batch) -> Tensor:
        """(B, V) logits after the newest token of each row."""
        device = self.hosting.device
        newest_B1 = torch.tensor([[row.token_ids[-1]] for row in batch.rows], device=device)
        batch.mask_BS = torch.cat([batch.mask_BS, torch.ones_like(batch.mask_BS[:, :1])], dim=1)
        with self._row_adapters.applied([row.adapter for row in batch.rows], device):
            output = self._model(
                input_ids=newest_B1,
                attention_mask=batch.mask_BS.long(),
                position_ids=positions(batch.mask_BS)[:, -1:],
                use_cache=True,
                past_key_values=batch.cache,
            )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def _sample(self, rows: list[Row], logits_BV: Tensor) -> None:
        """Draws a token for every row and notes its log-probability and the version that drew it."""
        chosen, logprobs = draw(logits_BV, rows, self.vocab_size)
        for row, token, logprob in zip(rows, chosen, logprobs, strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            if row.spans and row.spans[-1][0] == self.version:
                row.spans[-1][1] += 1
            else:
                row.spans.append([self.version, 1])
            if row.on_token is not None:
                row.on_token()
        self._steps += 1

    def _finish(self) -> None:
        """Answers the rows that are done and closes their places in the batch."""
        if self._batch is None:
            return
        for row in self._batch.rows:
            if (finish := _finish_of(row)) is not None:
                _answer(row, finish)
        self._keep(lambda row: not row.future.done())

    def _keep(self, wanted: Callable[[Row], bool]) -> None:
        if self._batch is not None:
            self._batch = keep(self._batch, wanted)

    def _has_begun(self) -> bool:
        """Whether any request has some of its tokens: those that an update before has kept wait before all others."""
        return self._batch is not None or any(row.token_ids for row in self._waiting)

    def _maybe_update(self) -> None:
        aborted: list[Row] = []
        with self._changed:
            update = self._update
            if update is None or (update.in_flight is InFlight.FINISH and self._has_begun()):
                return
            update.begun = True
            # At the head of those who wait, where they are answered whatever happens; who comes meanwhile stays last.
            self._waiting.extendleft(reversed(self._batch.rows if self._batch is not None else []))
            self._batch = None
            if update.in_flight is InFlight.ABORT:
                aborted = list(self._waiting)
                self._waiting.clear()
        for row in aborted:
            _answer(row, Finish.ABORTED)
        start_s = time.monotonic()
        try:
            # transformers reads folders: give it the configuration beside the weights. The old model serves until
            # the new one stands whole.
            shutil.copy(self.folder / "config.json", update.path.parent / "config.json")
            assert update.path.name == WEIGHTS_FILE
            model = self._read_model(update.path.parent)
        except _POSSIBLE_ERRORS as error:
            self._fail(f"the update to version {update.version} failed: {error}")
            raise
        self._model, self.version = model, update.version
        with self._changed:
            self._update = None
        with contextlib.suppress(InvalidStateError):  # Cancelled, maybe just now.
            update.future.set_result(time.monotonic() - start_s)


def _finish_of(row: Row) -> Finish | None:
    if len(row.token_ids) > 0 and row.token_ids[-1] in row.sampling.stop_token_ids:
        return Finish.STOP
    return Finish.LENGTH if len(row.token_ids) >= row.sampling.max_new_tokens else None


def _piece(
    token_ids: list[int],
    logprobs: list[float],
    spans: list[tuple[int, int]],
    start: int,
    end: int,
    finish: Finish | None = None,
) -> Piece:
    """Tokens [start, end) of a completion."""
    return Piece(
        token_ids=token_ids[start:end],
        logprobs=logprobs[start:end],
        version_spans=cut_spans(spans, start, end),
        finish=finish,
    )


def _answer(row: Row, finish: Finish) -> None:
    with contextlib.suppress(InvalidStateError):  # Answered or cancelled, maybe just now.
        row.future.set_result(
            Generated(
                token_ids=row.token_ids,
                logprobs=row.logprobs,
                finish=finish,
                version_spans=[(version, count) for version, count in row.spans],
                start_unix_ns=row.start_unix_ns,
                end_unix_ns=time.time_ns(),
            )
        )
