"""What a service takes in hand: requests whole or not at all, by bytes before any work and by tokens before the model.

Refusing must be cheap, or overload costs the throughput that it threatens. A request's size in bytes is known as it
arrives: by the measured tokens of a byte it is refused then, not after it was tokenised, when the queue will have no
room for it. The exact count decides once it is known.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from services.runtime.errors import InvalidArgumentError, OverloadedError
from services.runtime.telemetry import ServiceMetrics

# Seconds of the model's work, and bytes of requests, after which a measurement counts half.
_RATE_HALF_LIFE_S = 10.0
_RATIO_HALF_LIFE_BYTES = 1e6
# A caller who has something waiting may hold so many times what it leaves free: alone 8/9 of the queue, so that the
# rest is there for others. The rule of shared buffers in switches: Choudhury & Hahne 1998, "Dynamic Queue Length
# Thresholds for Shared-Memory Packet Switches".
_SHARE = 8
# Whoever wants no more than this part of the queue is waited for before the door opens again: a larger request is not
# worth an emptier queue.
_WAITED_FOR = 1 / 8
# So many callers that were refused for their share are known as such: who is forgotten has its next request read.
_REMEMBERED = 4096
# Asked for while nothing has been measured yet, and the least and most that is ever asked for.
_UNMEASURED_MS, _LEAST_MS, _MOST_MS = 1000, 10, 60_000


class MovingRatio:
    """Sum of one thing over the sum of another, where older ones fade."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._above = 0.0
        self._below = 0.0

    def add(self, above: float, below: float) -> None:
        kept = 0.5 ** (below / self._half_life)
        self._above = self._above * kept + above
        self._below = self._below * kept + below

    @property
    def value(self) -> float:
        """0 while nothing is known."""
        return self._above / self._below if self._below > 0 else 0.0


@dataclass(eq=False)
class Hold:
    """A request in hand: its bytes, and the tokens that it is expected to queue until they are counted."""

    size_bytes: int
    expected_tokens: int


class Admission:
    """Counts what is in hand, refuses what would exceed it, and says when to come back. Safe for threads."""

    def __init__(
        self, *, max_queued_tokens: int, max_held_bytes: int, metrics: ServiceMetrics, max_queue_s: float = math.inf
    ) -> None:
        """``max_queue_s``: longest that the model may have to work on what waits, by the rate measured so far.

        A request that finds nothing before it is taken whatever it needs itself.
        """
        self._max_queue_s = max_queue_s
        self._max_tokens = max_queued_tokens
        self._max_bytes = max_held_bytes
        self._metrics = metrics
        self._lock = threading.Lock()
        self._expected_tokens = 0
        self._rate = MovingRatio(_RATE_HALF_LIFE_S)
        self._tokens_per_byte = MovingRatio(_RATIO_HALF_LIFE_BYTES)
        # By the last one refused for want of room, and by each caller's last refused for its share, until there is as
        # much.
        self._wanted_tokens = 0
        self._wanted_of_share: OrderedDict[Hashable, int] = OrderedDict()
        self.queued_tokens = 0
        self.held_bytes = 0
        self.holds = 0

    @contextlib.contextmanager
    def hold(self, size_bytes: int) -> Iterator[Hold]:
        """Holds a request of ``size_bytes`` on the wire from its arrival until it is answered, or refuses it whole.

        Raises:
            InvalidArgumentError: it is larger than everything that may be held.
            OverloadedError: there is no room for it now.
        """
        with self._lock:
            if size_bytes > self._max_bytes:
                self._metrics.refused.labels("too_large").inc()
                raise InvalidArgumentError(
                    f"the request has {size_bytes} bytes, at most {self._max_bytes} are held at a time "
                    "(max_held_mib); split it"
                )
            if self.held_bytes + size_bytes > self._max_bytes:
                raise self.overloaded(
                    "queue_bytes",
                    f"requests of {self.held_bytes} bytes are in hand, {size_bytes} more would exceed "
                    f"{self._max_bytes}; try again later",
                )
            # At most the limit, so that an estimate refuses nothing while nothing waits.
            expected = min(math.ceil(size_bytes * self._tokens_per_byte.value), self._max_tokens)
            ahead = self.queued_tokens + self._expected_tokens
            if ahead + expected > self._max_tokens:
                self._wanted_tokens = self._waited_for(expected)
                raise self.overloaded(
                    "queue_tokens",
                    f"{ahead} tokens are waiting or being read, about {expected} more would exceed "
                    f"{self._max_tokens}; try again later",
                )
            self._refuse_long_wait(ahead, expected)
            hold = Hold(size_bytes, expected)
            self.held_bytes += size_bytes
            self.holds += 1
            self._expected_tokens += expected
        try:
            yield hold
        finally:
            with self._lock:
                self.held_bytes -= size_bytes
                self.holds -= 1
                self._expected_tokens -= hold.expected_tokens

    def enqueue(
        self, tokens: int, hold: Hold | None = None, *, caller: Hashable | None = None, own_tokens: int = 0
    ) -> None:
        """Counts ``tokens`` as waiting, in place of what was expected of ``hold``, or refuses them whole.

        ``own_tokens``: what the same ``caller`` has waiting already.

        Raises:
            InvalidArgumentError: they are more than may ever wait.
            OverloadedError: there is no room for them now.
        """
        with self._lock:
            if hold is not None:
                self._expected_tokens -= hold.expected_tokens
                hold.expected_tokens = 0
                self._tokens_per_byte.add(tokens, hold.size_bytes)
            if tokens > self._max_tokens:
                self._metrics.refused.labels("too_large").inc()
                raise InvalidArgumentError(
                    f"the request has {tokens} tokens, at most {self._max_tokens} may wait at a time "
                    "(max_queued_tokens); split it"
                )
            if self.queued_tokens + tokens > self._max_tokens:
                self._wanted_tokens = self._waited_for(tokens)
                raise self.overloaded(
                    "queue_tokens",
                    f"{self.queued_tokens} tokens are waiting, {tokens} more would exceed {self._max_tokens}; "
                    "try again later",
                )
            if self._exceeds_share(own_tokens, tokens):
                self._wanted_of_share[caller] = self._waited_for(tokens)
                self._wanted_of_share.move_to_end(caller)
                if len(self._wanted_of_share) > _REMEMBERED:
                    self._wanted_of_share.popitem(last=False)
                raise self._share_taken(own_tokens, tokens)
            self._refuse_long_wait(self.queued_tokens, tokens)
            self.queued_tokens += tokens

    def refusal(self, *, caller: Hashable | None = None, own_tokens: int = 0) -> OverloadedError | None:
        """Why one who comes now is refused unread: since the last one was for want of room, as much has not come free.

        So refusing costs next to nothing where it is done most. It may meet one that is smaller than that, and would
        have found room: it is told when to come back, as all are. Who was refused for its share shuts out itself alone.

        Args:
            caller: who comes.
            own_tokens: what it has waiting already.
        """
        with self._lock:
            if self._wanted_tokens:
                ahead, room = self.queued_tokens + self._expected_tokens, self._room
                if ahead and ahead + self._wanted_tokens > room:
                    return self.overloaded(
                        "queue_tokens" if room == self._max_tokens else "queue_seconds",
                        f"{ahead} tokens are waiting or being read of at most {room}; try again later",
                    )
                self._wanted_tokens = 0
            if wanted := self._wanted_of_share.get(caller):
                if self._exceeds_share(own_tokens, wanted):
                    return self._share_taken(own_tokens, wanted)
                del self._wanted_of_share[caller]
            return None

    def _exceeds_share(self, own_tokens: int, tokens: int) -> bool:
        """Whether a caller who has ``own_tokens`` waiting would hold more than its share with ``tokens`` more."""
        return bool(own_tokens) and own_tokens + tokens > _SHARE * (self._max_tokens - self.queued_tokens - tokens)

    def _share_taken(self, own_tokens: int, tokens: int) -> OverloadedError:
        free = max(0, self._max_tokens - self.queued_tokens - tokens)
        return self.overloaded(
            "caller_tokens",
            f"{own_tokens} tokens of this caller are waiting, {tokens} more would leave only {free} of "
            f"{self._max_tokens} to others; try again later",
        )

    @property
    def _room(self) -> int:
        """Tokens that may wait, by their number and by the time that the model would need for them."""
        rate = self.tokens_per_s
        return self._max_tokens if not rate else int(min(self._max_tokens, rate * self._max_queue_s))

    def _waited_for(self, tokens: int) -> int:
        """What must come free before one like that which wanted ``tokens`` is read again."""
        return max(1, min(tokens, int(_WAITED_FOR * self._max_tokens)))

    def _refuse_long_wait(self, ahead: int, tokens: int) -> None:
        if ahead and self.tokens_per_s > 0 and (wait_s := (ahead + tokens) / self.tokens_per_s) > self._max_queue_s:
            self._wanted_tokens = self._waited_for(tokens)
            raise self.overloaded(
                "queue_seconds",
                f"{ahead} tokens are waiting; with {tokens} more the model would need {wait_s:.0f} s for them, at most "
                f"{self._max_queue_s:g} s may wait (max_queue_s); try again later",
            )

    def leave(self, tokens: int) -> None:
        """Counts ``tokens`` as waiting no more: they go to the model, or nobody wants them."""
        with self._lock:
            self.queued_tokens -= tokens

    def served(self, tokens: int, seconds: float) -> None:
        """The model took ``seconds`` for a batch with ``tokens`` tokens, padding not counted."""
        with self._lock:
            self._rate.add(tokens, seconds)

    @property
    def tokens_per_s(self) -> float:
        """What the model does while it works; 0 until the first batch is done."""
        return self._rate.value

    def overloaded(self, reason: str, message: str) -> OverloadedError:
        """Counts a refusal; to be raised. It says to come back when what is in hand now will be done."""
        self._metrics.refused.labels(reason).inc()
        return OverloadedError(message, retry_after_ms=self._drained_ms())

    def _drained_ms(self) -> int:
        """How long the model will work on what waits or is being read now."""
        if self.tokens_per_s <= 0:
            return _UNMEASURED_MS
        ahead = self.queued_tokens + self._expected_tokens
        return round(min(max(1000 * ahead / self.tokens_per_s, _LEAST_MS), _MOST_MS))
