"""What may be in hand: completions, the tokens that they may come to, and bytes of requests.

A completion counts with the tokens of its prompt and the most that it may generate, from before its text is tokenised
until it is finished: what is promised, for nobody knows where it will end. So the rate at which these go tells how long
what is in hand will take, however early completions end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from quartet.common.v1 import common_pb2
from services.runtime.admission import Admission, Hold, MovingRatio
from services.runtime.errors import InvalidArgumentError, OverloadedError
from services.runtime.telemetry import ServiceMetrics

# Bytes of prompts after which their measured tokens count half.
_RATIO_HALF_LIFE_BYTES = 1e6


@dataclass(frozen=True, kw_only=True)
class BudgetLimits:
    """Most completions in hand, tokens that they may come to, and bytes of their requests."""

    max_completions: int
    max_tokens: int = 20_000_000
    max_bytes: int = 256 * 2**20


class Budget:
    """Counts what is in hand, and refuses what would exceed it. For one event loop."""

    def __init__(
        self, limits: BudgetLimits, metrics: ServiceMetrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.completions = 0
        self._admission = Admission(
            max_queued_tokens=limits.max_tokens, max_held_bytes=limits.max_bytes, metrics=metrics
        )
        self._tokens_per_byte = MovingRatio(_RATIO_HALF_LIFE_BYTES)
        self._clock = clock
        self._since_s = 0.0  # When the last completion was finished, or the first one admitted after idleness.

    @property
    def tokens(self) -> int:
        """In hand, prompts and what may be generated."""
        return self._admission.queued_tokens

    @property
    def held_bytes(self) -> int:
        """Of the requests in hand."""
        return self._admission.held_bytes

    def check(self, completions: int) -> None:
        """Refuses a request for more than may ever be in hand.

        Raises:
            InvalidArgumentError: it is.
        """
        most = self.limits.max_completions
        if completions > most:
            raise InvalidArgumentError(
                f"prompts times n is {completions}, at most {most} completions may be asked for at once",
                field="prompts",
            )

    def hold(self, size_bytes: int) -> AbstractContextManager[Hold]:
        """Holds a request of ``size_bytes`` until it is answered. See ``Admission.hold``."""
        return self._admission.hold(size_bytes)

    def refusal(self) -> OverloadedError | None:
        """Why whoever comes now is refused unread. See ``Admission.refusal``."""
        return self._admission.refusal()

    def expect(self, prompts: Sequence[common_pb2.Prompt], *, samples: int, new_tokens: int, longest: int) -> list[int]:
        """Tokens of each prompt: counted where it is tokens, else by its bytes and the measured tokens of a byte.

        Args:
            prompts: of the request.
            samples: completions of each.
            new_tokens: most that each completion generates.
            longest: no prompt counts more; one that has more is refused by itself.
        """
        known, expected = [], []
        for prompt in prompts:
            is_tokens = prompt.WhichOneof("content") == "token_ids"
            known.append(min(len(prompt.token_ids.ids), longest) if is_tokens else 0)
            guess = math.ceil(prompt.ByteSize() * self._tokens_per_byte.value)
            expected.append(known[-1] if is_tokens else min(guess, longest))
        together = samples * (sum(expected) + len(prompts) * new_tokens)
        # What is only guessed makes no request too large.
        return expected if together <= self.limits.max_tokens else known

    def learn(self, tokens: int, size_bytes: int) -> None:
        """A prompt of ``size_bytes`` that was not tokens had ``tokens``."""
        self._tokens_per_byte.add(tokens, size_bytes)

    def admit(self, completions: int, tokens: int) -> None:
        """Takes places for completions of ``tokens`` tokens in all, or refuses all of them.

        Raises:
            InvalidArgumentError: there are more tokens than may ever be in hand.
            OverloadedError: there is no room for them now.
        """
        most = self.limits.max_completions
        if self.completions + completions > most:
            raise self._admission.overloaded(
                "completions",
                f"{self.completions} completions are in hand and {completions} more were asked for, at most {most} "
                "are taken; try again later",
            )
        was_idle = not self.tokens
        self._admission.enqueue(tokens)
        self.completions += completions
        if was_idle:
            self._since_s = self._clock()

    def recount(self, expected: int, tokens: int) -> None:
        """Counts ``tokens`` in place of what was expected. When it raises, neither is counted any more.

        Raises:
            InvalidArgumentError, OverloadedError: see ``admit``.
        """
        self._admission.leave(expected)
        self._admission.enqueue(tokens)

    def finished(self, tokens: int) -> None:
        """A completion that counted ``tokens`` was generated."""
        now_s = self._clock()
        self._admission.leave(tokens)
        self._admission.served(tokens, now_s - self._since_s)
        self._since_s = now_s

    def dropped(self, tokens: int) -> None:
        """Completions that counted ``tokens`` will not be generated."""
        self._admission.leave(tokens)

    def release(self, completions: int) -> None:
        """Gives places back: nothing of the completions is held any more."""
        self.completions -= completions
