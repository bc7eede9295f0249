"""A function of the user's as a scorer: rules and verifiable rewards, beside a model or instead of one.

    def score(pairs):
        '''(prompt, response) pairs: a score each, a dict of named scores, or None where there is none to give.'''
        return [float(response.strip().endswith("42")) for prompt, response in pairs]

The prompt is text, or a list of {"role", "content"} where chat messages were sent; the response is text without its
end token. It may be ``async``. It runs in the service's model thread, one batch at a time. Named scores (attributes)
have weight 1 each, or those that the function declares as ``score.weights = {"correct": 1.0, "format": 0.2}``.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import structlog

from services.reward.combining import Head
from services.runtime.batcher import ItemError
from services.runtime.errors import StartError

log = structlog.get_logger()

# Of an exception's message, which becomes the status of every item of the batch.
_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a rule sees of an item."""

    prompt: str | list[dict[str, str]]
    response: str


class PythonScorer:
    """Calls the function, and checks what it returns. ``score`` runs in one thread alone."""

    def __init__(
        self, spec: str, function: Callable[[list[tuple[Any, str]]], Any], *, source: Path | None = None
    ) -> None:
        """
        Args:
            spec: how the settings name it.
            source: file of its module.

        Raises:
            StartError: the weights that the function declares are not usable.
        """
        self.spec = spec
        self.name = spec.rpartition(":")[2]
        self.declared = _declared(spec, getattr(function, "weights", None))
        self._function = function
        self._taken: frozenset[str] = frozenset()
        self._source = source
        self._runner: asyncio.Runner | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the module that the function stands in, of its name where that has no file."""
        content = self._source.read_bytes() if self._source is not None else self.spec.encode()
        return hashlib.sha256(content).hexdigest()

    def reserve(self, names: Iterable[str]) -> None:
        """Keeps ``names``, of the model's heads, from being given to its own scores.

        Raises:
            StartError: it has declared one of them, or bears it itself.
        """
        self._taken = frozenset(names)
        own = [head.name for head in self.declared] or [self.name]
        if twice := sorted(self._taken.intersection(own)):
            raise StartError(
                f"--scorer is {self.spec!r}: its {twice[0]!r} is the name of a head of the model; give it another"
            )

    def score(self, exchanges: Sequence[Exchange]) -> list[Mapping[str, float] | ItemError]:
        """Attributes of each, or why it has none. A failure of the function is one of the whole batch, and passing."""
        try:
            values = self._function([(exchange.prompt, exchange.response) for exchange in exchanges])
            if inspect.isawaitable(values):
                values = self._await(values)
            values = list(values)
            if len(values) != len(exchanges):
                raise ValueError(f"it returned {len(values)} scores for {len(exchanges)} pairs")
        except BaseException as error:  # Also cancellation and sys.exit: one bad batch must not end a service.
            log.error("scorer_failed", scorer=self.spec, items=len(exchanges), exc_info=error)
            message = f"{type(error).__name__}: {error}"[:_MESSAGE_CHARACTERS]
            return [ItemError(f"the scorer {self.spec} failed: {message}", retryable=True)] * len(exchanges)
        return [self._checked(value) for value in values]

    def close(self) -> None:
        """Ends the event loop of an ``async`` function."""
        if self._runner is not None:
            self._runner.close()

    def _await(self, values: Any) -> Any:
        async def wait() -> Any:
            return await values

        # One loop for all batches, so that connections which the function keeps stay usable.
        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(wait())

    def _checked(self, value: object) -> Mapping[str, float] | ItemError:
        try:
            return self._attributes(value)
        except BaseException as error:  # A number or a dict of the user's may do anything when it is read.
            log.error("scorer_failed", scorer=self.spec, items=1, exc_info=error)
            return self._refuse(f"gave what can't be read, a {type(value).__name__}: {type(error).__name__}")

    def _attributes(self, value: object) -> Mapping[str, float] | ItemError:
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
            if name in self._taken:
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


def load_python_scorer(spec: str) -> PythonScorer:
    """The function ``package.module:function``, found as Python finds modules, then in the working directory.

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
    return PythonScorer(spec, found, source=Path(file) if file else None)


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
