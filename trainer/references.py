"""Log-probabilities of answers under the policy that training must stay near, which never changes.

They come from a reference service, or from the model that training starts from before its first step. Either way they
are asked for once, before training, so that no second model stays in memory, and kept with the run, so that one that
is resumed goes on with the very same numbers. A service may be asked anew at every step instead.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quartet.client import CallPolicy, ReferenceClient, Security
from quartet.client.reference import LogProbs, TokenSequence
from quartet.fingerprint import tokenizer_fingerprint
from trainer.answers import Answers
from trainer.checkpoint import latest_checkpoint
from trainer.distributed import active, led
from trainer.divergence import diverged
from trainer.encoding import EncodedResponse
from trainer.errors import CheckpointError, ServicesError
from trainer.runs import write_json
from trainer.service_checks import deadline_explained, require_same_tokenizer

REFERENCE_FILE = "reference.json"
# Of one call: large enough that the service batches by length, small enough for every service's limits.
_CALL_TOKENS, _CALL_ITEMS = 32_768, 64
_CALLS_AT_ONCE = 4
# Calls one after the other before processes meet: by the default deadline 20 minutes, within the hour that they wait.
_ROUNDS = 2
_PROGRESS_EVERY_S = 10.0

Sums = npt.NDArray[np.float64]


class Reference(Protocol):
    """Whoever knows the reference's log-probabilities. ``identity`` tells two of them apart, in words."""

    identity: str

    def sums(self, rows: Sequence[EncodedResponse]) -> Sums:
        """Log-probability of each answer, summed over its tokens."""


class ModelReference:
    """The model in hand, as it is now: to be asked before its first update."""

    def __init__(self, answers: Answers, micro_batch_tokens: int, identity: str) -> None:
        self.identity = identity
        self._answers = answers
        self._micro_batch_tokens = micro_batch_tokens

    def sums(self, rows: Sequence[EncodedResponse]) -> Sums:
        found: Sums = self._answers.all_sums(rows, self._micro_batch_tokens).numpy()
        return found


class ServiceReference:
    """A reference service; ``close`` ends its connections."""

    def __init__(
        self, address: str, tokenizer: Any, *, security: Security, ready_timeout_s: float, call_deadline_s: float
    ) -> None:
        """Waits until the service is ready.

        Raises:
            QuartetError: it did not become ready in time, or refuses us.
            ServicesError: its tokenizer is another one than ours.
        """
        self._fingerprint = tokenizer_fingerprint(tokenizer)
        self._call_deadline_s = call_deadline_s
        self._loop = asyncio.Runner()
        self._client = self._loop.run(
            _connect(address, CallPolicy(deadline_s=call_deadline_s, patience_s=ready_timeout_s), security)
        )
        try:
            self._loop.run(self._client.wait_ready(ready_timeout_s))
            info = self._loop.run(self._client.get_model_info())
            require_same_tokenizer("reference", info, self._fingerprint)
        except BaseException:
            self.close()
            raise
        self.identity = f"{info.served_by.model_id} (weights {info.served_by.weights_fingerprint})"

    def sums(self, rows: Sequence[EncodedResponse], told: int = 0, of: int | None = None) -> Sums:
        """
        Args:
            rows: answers.
            told: how many answers were asked about before these, for the lines that say how far it is.
            of: how many there are together; None: these are all.

        Raises:
            QuartetError: the service stayed away or refused a call.
            ServicesError: it failed at an answer, or took longer than a call may.
        """
        with deadline_explained(self._call_deadline_s):
            return self._loop.run(self._sums(rows, told, len(rows) if of is None else of))

    def close(self) -> None:
        """Closes the connections."""
        self._loop.run(self._client.close())
        self._loop.close()

    async def _sums(self, rows: Sequence[EncodedResponse], told: int, of: int) -> Sums:
        found = np.zeros(len(rows))
        parts = _calls([len(row) for row in rows])
        free = asyncio.Semaphore(_CALLS_AT_ONCE)
        done, told_s = told, time.monotonic()

        async def ask(part: Sequence[int]) -> None:
            nonlocal done, told_s
            items = [
                TokenSequence(token_ids=rows[i].ids.tolist(), response_start=max(1, rows[i].prompt_tokens))
                for i in part
            ]
            async with free:
                reply = await self._client.logprobs(items, tokenizer_fingerprint=self._fingerprint)
            for index, result in zip(part, reply.results, strict=True):
                if not isinstance(result, LogProbs):
                    raise ServicesError(f"the reference service failed at answer {index + 1}: {result.reason}")
                found[index] = float(np.sum(np.array(result.logprobs, dtype=np.float64)))
            done += len(part)
            if time.monotonic() > told_s + _PROGRESS_EVERY_S:
                told_s = time.monotonic()
                sys.stdout.write(f"reference log-probabilities: {done:,} of {of:,} answers\n")
                sys.stdout.flush()

        try:
            async with asyncio.TaskGroup() as group:
                for part in parts:
                    group.create_task(ask(part))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return found


class LedReference:
    """A service that the first of several processes asks, for all of them."""

    def __init__(self, connect: Callable[[], ServiceReference]) -> None:
        """
        Raises:
            QuartetError, ServicesError: as ``ServiceReference``.
        """
        self._service: ServiceReference | None = None
        self.identity = self._open(connect)

    @led
    def _open(self, connect: Callable[[], ServiceReference]) -> str:
        self._service = connect()
        return self._service.identity

    def sums(self, rows: Sequence[EncodedResponse]) -> Sums:
        """Asked in parts: after each the processes meet, or the others would give up the first, which asks for hours.

        Raises:
            QuartetError, ServicesError: as ``ServiceReference.sums``.
        """
        found = np.zeros(len(rows))
        calls = _calls([len(row) for row in rows])
        size = _CALLS_AT_ONCE * _ROUNDS if active() else max(1, len(calls))
        done = 0
        for first in range(0, len(calls), size):
            part = [index for call in calls[first : first + size] for index in call]
            found[part] = self._ask([rows[index] for index in part], done, len(rows))
            done += len(part)
        return found

    @led
    def _ask(self, rows: Sequence[EncodedResponse], told: int, of: int) -> Sums:
        assert self._service is not None
        return self._service.sums(rows, told, of)

    def close(self) -> None:
        """Closes the connections."""
        if self._service is not None:
            self._service.close()


async def _connect(address: str, policy: CallPolicy, security: Security) -> ReferenceClient:
    # Within the loop: a channel belongs to that which it is made in.
    return ReferenceClient(address, policy=policy, security=security)


def _calls(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of like length together, as many as one call takes."""
    parts: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if not parts or tokens + lengths[index] > _CALL_TOKENS or len(parts[-1]) >= _CALL_ITEMS:
            parts.append([])
            tokens = 0
        parts[-1].append(index)
        tokens += lengths[index]
    return parts


def known_sums(
    output: Path, digest: str, reference: Reference, rows: Sequence[EncodedResponse], names: Sequence[str] = ()
) -> Sums:
    """The reference's sums of ``rows``: those that this run asked for before, or asked for now and kept.

    Args:
        output: folder of the run.
        digest: of the rows.
        reference: is asked, unless the run has asked it before.
        rows: answers.
        names: file and line of each, for messages.

    Raises:
        CheckpointError: the run has taken steps with another reference.
        DivergedError: a sum is not finite; names the rows.
        QuartetError, TrainerError: the reference can't be asked, or the numbers not be kept.
    """
    path = output / REFERENCE_FILE
    kept = _read_kept(path)
    if kept.get("data") == digest and len(kept.get("logprobs", ())) == len(rows):
        if kept["reference"] == reference.identity:
            return np.array(kept["logprobs"], dtype=np.float64)
        if led(latest_checkpoint)(output) is not None:
            raise CheckpointError(
                f"{path} is of the reference {kept['reference']}, and this one is {reference.identity}: begin another "
                "run in another --output"
            )
    found = reference.sums(rows)
    if bad := np.flatnonzero(~np.isfinite(found)).tolist():
        what = f"the log-probability under the reference {reference.identity} is {found[bad[0]]}"
        raise diverged(what, [names[place] if names else f"answer {place + 1}" for place in bad], len(rows), output)
    write_json(path, {"data": digest, "reference": reference.identity, "logprobs": found.tolist()})
    return found


@led
def _read_kept(path: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept
