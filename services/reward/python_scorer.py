"""A function of the user's as a scorer: rules and verifiable rewards, beside a model or instead of one.

    def score(pairs):
        '''(prompt, response) pairs: a score each, a dict of named scores, or None where there is none to give.'''
        return [float(response.strip().endswith("42")) for prompt, response in pairs]

The prompt is text, or a list of {"role", "content"} where chat messages were sent; the response is text without its
end token. It may be ``async``. Named scores (attributes) have weight 1 each, or those that the function declares as
``score.weights = {"correct": 1.0, "format": 0.2}``.

It is imported once, and called in one thread of its own (and one event loop), one batch at a time, whatever models come
and go beside it: connections that it opens when it is called stay usable. A batch that it fails is halved, and halved
again, so that only the pair that it can't score fails; after 16 failed calls, or ``--scorer-timeout-s``, the rest of
the batch fails, too. Senders are told the type of an exception and not its message, which may quote a pair of somebody
else (``--log-level debug`` logs it).

A call may take ``--scorer-timeout-s``: then an ``async`` function is cancelled, and its pairs fail, to be tried again.
One that is not, or that does not let itself be cancelled, occupies its thread for good: the service is started anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import structlog

from services.reward.combining import Head
from services.runtime import tracebacks
from services.runtime.batcher import ItemError
from services.runtime.errors import StartError

log = structlog.get_logger()

# Calls that may fail in one batch: one bad item of 256 fails 9. Beyond it the function itself is broken, or what it
# asks is away, and each further call might take as long as its own timeout.
_MOST_FAILED_CALLS = 16
# For a coroutine to end that was cancelled, also where it, or the machine, is busy at that moment.
_CANCEL_S = 5.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a rule sees of an item."""

    prompt: str | list[dict[str, str]]
    response: str


class _WrongNumberError(Exception):
    """Its message is ours, and tells nothing of the items."""


class _TimedOutError(Exception):
    """The function has not returned in its time. The message is ours."""


class PythonScorer:
    """Calls the function, and checks what it returns. The process has one, which outlives the models beside it."""

    def __init__(
        self,
        spec: str,
        function: Callable[[list[tuple[Any, str]]], Any],
        *,
        source: Path | None = None,
        timeout_s: float = math.inf,
        on_hang: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """
        Args:
            spec: how the settings name it.
            source: file of its module, read here and not again: what runs is what was imported.
            timeout_s: longest that a call may take.
            on_hang: called once, with the reason, when a call has not ended then and can't be ended. Nothing is scored
                any more.

        Raises:
            StartError: the weights that the function declares are not usable.
        """
        self.spec = spec
        self.name = spec.rpartition(":")[2]
        self.declared = _declared(spec, getattr(function, "weights", None))
        content = source.read_bytes() if source is not None else spec.encode()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        """SHA-256 of the module that the function stands in, of its name where that has no file."""
        self._function = function
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._hangs = False
        self._runner: asyncio.Runner | None = None
        # What it opens may be usable in the thread that opened it alone.
        self._threads = ThreadPoolExecutor(1, "scorer")
        self._thread: threading.Thread | None = None
        # During a swap two models call it. The time of a call does not begin before its turn.
        self._turn = threading.Lock()

    def require_other_names(self, taken: Iterable[str]) -> None:
        """
        Raises:
            StartError: it has declared one of ``taken``, the names of a model's heads, or bears it itself.
        """
        own = [head.name for head in self.declared] or [self.name]
        if twice := sorted(set(taken).intersection(own)):
            raise StartError(
                f"--scorer is {self.spec!r}: its {twice[0]!r} is the name of a head of the model; give it another"
            )

    def score(
        self, exchanges: Sequence[Exchange], *, taken: Set[str] = frozenset()
    ) -> list[Mapping[str, float] | ItemError]:
        """Attributes of each, or why it has none; a failure of the function is a passing one. From any thread.

        Args:
            taken: names that no attribute may have: those of the model's heads.
        """
        with self._turn:
            return self._score(exchanges, taken)

    def close(self) -> None:
        """Ends the thread, and the event loop of an ``async`` function. Nothing may be scored any more.

        Returns when they have ended: never, where a call hangs.
        """
        if self._runner is not None:
            self._threads.submit(self._runner.close).result()
        self._threads.shutdown()

    def _score(self, exchanges: Sequence[Exchange], taken: Set[str]) -> list[Mapping[str, float] | ItemError]:
        end_s = time.monotonic() + self._timeout_s
        answers: list[Any] = [None] * len(exchanges)
        # Breadth first: where the calls run out, all parts have come equally far.
        parts, failed_calls = deque([(0, len(exchanges))]), 0
        while parts:
            start, end = parts.popleft()
            try:
                answers[start:end] = self._call_in_time(exchanges[start:end], taken)
            except BaseException as error:  # Also cancellation and sys.exit: one bad batch must not end a service.
                log.error("scorer_failed", scorer=self.spec, items=end - start, exc_info=error)
                # Stays the answer of whatever is not called again.
                answers[start:end] = [self._failure(error)] * (end - start)
                failed_calls += 1
                if failed_calls == _MOST_FAILED_CALLS or not isinstance(error, Exception):
                    break
                if isinstance(error, _TimedOutError) or time.monotonic() > end_s:
                    break
                if end - start > 1:
                    middle = (start + end) // 2
                    parts += [(start, middle), (middle, end)]
        return answers

    def _call_in_time(
        self, exchanges: Sequence[Exchange], taken: Set[str]
    ) -> Sequence[Mapping[str, float] | ItemError]:
        """
        Raises:
            _TimedOutError: it takes longer than it may. Or whatever the function raises.
        """
        late = f"it has not returned within {self._timeout_s:g} s (scorer_timeout_s)"
        if self._hangs:
            raise _TimedOutError(late)
        called = self._threads.submit(self._call, exchanges, taken)
        wait([called], None if self._timeout_s == math.inf else self._timeout_s + _CANCEL_S)
        if called.done():
            return called.result()
        self._hangs = True
        assert self._thread is not None
        log.error("scorer_hangs", scorer=self.spec, items=len(exchanges), stack=tracebacks.stack_of(self._thread))
        self._on_hang(f"the scorer {self.spec} hangs: {late}")
        raise _TimedOutError(late)

    def _call(self, exchanges: Sequence[Exchange], taken: Set[str]) -> list[Mapping[str, float] | ItemError]:
        self._thread = threading.current_thread()
        values = self._function([(exchange.prompt, exchange.response) for exchange in exchanges])
        if inspect.isawaitable(values):
            values = self._await(values)
        values = list(values)
        if len(values) != len(exchanges):
            raise _WrongNumberError(f"it returned {len(values)} scores for {len(exchanges)} pairs")
        return [self._checked(value, taken) for value in values]

    def _failure(self, error: BaseException) -> ItemError:
        # An exception's message may quote the item of another sender.
        told = str(error) if isinstance(error, _WrongNumberError | _TimedOutError) else type(error).__name__
        return ItemError(f"the scorer {self.spec} failed: {told}", retryable=True)

    def _await(self, values: Any) -> Any:
        async def in_time() -> Any:
            try:
                async with asyncio.timeout(None if self._timeout_s == math.inf else self._timeout_s) as limit:
                    return await values
            except TimeoutError as error:
                if not limit.expired():
                    raise  # Its own.
                raise _TimedOutError(
                    f"it has not returned within {self._timeout_s:g} s (scorer_timeout_s) and was cancelled"
                ) from error

        # One loop for all batches, so that connections which the function keeps stay usable.
        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(in_time())

    def _checked(self, value: object, taken: Set[str]) -> Mapping[str, float] | ItemError:
        try:
            return self._attributes(value, taken)
        except BaseException as error:  # A number or a dict of the user's may do anything when it is read.
            log.error("scorer_failed", scorer=self.spec, items=1, exc_info=error)
            return self._refuse(f"gave what can't be read, a {type(value).__name__}: {type(error).__name__}")

    def _attributes(self, value: object, taken: Set[str]) -> Mapping[str, float] | ItemError:
        if value is None:
            return ItemError(f"the scorer {self.spec} gave no score", retryable=False)
        if isinstance(value, Mapping):
            named = dict(value)
        elif self.declared:
            names = ", ".join(head.name for head in self.declared)
            return self._refuse(f"gave {value!r}, but declares weights of {names}: it must give a dict of these")
        else:
            named = {self.name: value}
        if self.declared and named.keys() != {head.name for head in self.declared}:
            names = ", ".join(head.name for head in self.declared)
            return self._refuse(f"gave {', '.join(map(repr, named)) or 'nothing'}, but declares weights of {names}")
        if not named:
            return ItemError(f"the scorer {self.spec} gave no score", retryable=False)
        for name, number in named.items():
            if not isinstance(name, str) or not name:
                return self._refuse(f"named a score {name!r}, must be text")
            if name in taken:
                return self._refuse(f"named a score {name!r}, which is the name of a head of the model")
            if not isinstance(number, Real):
                return self._refuse(
                    f"gave {number!r} for {name!r}, a {type(number).__name__}: must be a number, a dict of numbers, or "
                    "None where there is no score"
                )
            if not math.isfinite(number):
                return self._refuse(f"gave {float(number)} for {name!r}, not a finite number")
        return {name: float(number) for name, number in named.items()}

    def _refuse(self, problem: str) -> ItemError:
        return ItemError(f"the scorer {self.spec} {problem}", retryable=False)


def load_python_scorer(
    spec: str, *, timeout_s: float = math.inf, on_hang: Callable[[str], None] = lambda reason: None
) -> PythonScorer:
    """The function ``package.module:function``, found as Python finds modules, then in the working directory.

    ``timeout_s`` and ``on_hang``: see ``PythonScorer``.

    Raises:
        StartError: there is no such module or function, it is no function, or the weights it declares are no weights.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise StartError(f"--scorer is {spec!r}, must be package.module:function")
    if os.getcwd() not in sys.path:
        # Last, so that nothing there hides an installed module.
        sys.path.append(os.getcwd())
    try:
        module: Any = importlib.import_module(module_name)
        found = module
        for part in function_name.split("."):
            found = getattr(found, part)
    except (ImportError, SyntaxError, AttributeError, ValueError) as error:
        raise StartError(f"--scorer is {spec!r}: cannot be loaded: {error}") from error
    if not callable(found):
        raise StartError(f"--scorer is {spec!r}: it is a {type(found).__name__}, must be a function")
    file = getattr(module, "__file__", None)
    return PythonScorer(spec, found, source=Path(file) if file else None, timeout_s=timeout_s, on_hang=on_hang)


def _declared(spec: str, weights: object) -> tuple[Head, ...]:
    if weights is None:
        return ()
    if not isinstance(weights, Mapping) or not weights:
        raise StartError(f"--scorer is {spec!r}: its weights are {weights!r}, must be a dict of numbers by name")
    for name, weight in weights.items():
        if not isinstance(name, str) or not name:
            raise StartError(f"--scorer is {spec!r}: its weights name {name!r}, must be text")
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise StartError(f"--scorer is {spec!r}: its weight of {name!r} is {weight!r}, must be a finite number")
    return tuple(Head(name=name, weight=float(weight)) for name, weight in weights.items())
