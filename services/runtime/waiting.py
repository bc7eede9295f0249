"""What waits for the model, and in which order it goes: a plain data structure, without threads or a clock of its own.

A batch begins with one item, whose turn it is, and is filled with neighbours in length:

- Turns go round the callers, so that ten thousand items of one delay nobody else by more than a batch. Who had no turn
  since it came goes first (as new flows do in fq_codel, RFC 8290); a caller's calls take its turns one after another.
- An age cap bounds the wait whatever comes later: every second batch begins with the oldest item once that has waited
  ``max_wait_s``. An item with k older ones before it goes at most 2k + 2 batches after that. Only every second one,
  so that a long list that has grown old does not hold up everybody in its turn.
- A padded batch is filled first from the same call while hardly any of it is padding, so that a turn is worth a batch,
  then with whatever is nearest in length, while the budget lasts.
- A batch without padding costs what its tokens are, whatever their lengths: it is filled in order, from the same call
  and then from the oldest, so that items which begin alike, as neighbours in a call often do, go together.

Nothing is sorted anew for a batch: items lie in buckets of equal length, and each costs O(log of the lengths waiting).
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Generic, TypeVar

# While it is filled from one call, no item of a padded batch is shorter than this share of the longest.
_OWN_SHARE = 0.75
# So many items may be passed over, as too long for the room that is left, before a batch without padding goes.
_MISFITS = 16

_tokens_of = attrgetter("tokens")


Payload = TypeVar("Payload")


class Entry(Generic[Payload]):
    """One item of a call: its length in tokens and its place in the call."""

    __slots__ = ("call", "index", "tokens", "waiting")

    def __init__(self, call: Call[Payload], index: int, tokens: int) -> None:
        self.call = call
        self.index = index
        self.tokens = tokens
        self.waiting = True


class Call(Generic[Payload]):
    """A list of at least one item that arrived together, and the ``payload`` of whoever made it.

    ``tokens``: length of each item. ``caller``: with whom it shares turns; None: with nobody.
    """

    def __init__(
        self,
        payload: Payload,
        tokens: Sequence[int],
        *,
        arrived_s: float,
        caller: Hashable | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self.payload = payload
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.caller: Hashable = self if caller is None else caller
        self.entries = [Entry(self, index, count) for index, count in enumerate(tokens)]
        # Sorted once; what has gone is skipped, and swept out when it is the larger part.
        self.by_length = sorted(self.entries, key=_tokens_of)
        self.waiting = len(self.entries)
        self.waiting_tokens = sum(tokens)
        self._first = 0

    def first(self) -> Entry[Payload]:
        """The first item that still waits."""
        while not self.entries[self._first].waiting:
            self._first += 1
        return self.entries[self._first]

    def in_order(self) -> Iterator[Entry[Payload]]:
        """The items that still wait, which may be taken meanwhile."""
        if self.waiting:
            self.first()  # What has gone before it is passed over once.
        return (entry for entry in itertools.islice(self.entries, self._first, None) if entry.waiting)

    def sweep(self) -> None:
        if 2 * self.waiting < len(self.by_length):
            self.by_length = [entry for entry in self.by_length if entry.waiting]


class WaitingLine(Generic[Payload]):
    """Calls whose items wait. Not safe for threads: whoever shares it holds a lock.

    ``padded``: whether every item of a batch counts as many tokens as its longest.
    """

    def __init__(self, *, max_batch_tokens: int, max_batch_items: int, max_wait_s: float, padded: bool = True) -> None:
        self._padded = padded
        self._max_tokens = max_batch_tokens
        self._max_items = max_batch_items
        self._max_wait_s = max_wait_s
        self.items = 0
        self.tokens = 0
        self._calls: OrderedDict[Call[Payload], None] = OrderedDict()  # In order of arrival.
        self._callers: dict[Hashable, OrderedDict[Call[Payload], None]] = {}
        self._new: OrderedDict[Hashable, None] = OrderedDict()  # Callers that had no turn yet.
        self._rotation: OrderedDict[Hashable, None] = OrderedDict()  # The others.
        self._buckets: dict[int, OrderedDict[Entry[Payload], None]] = {}  # By length; each in order of arrival.
        self._lengths: list[int] = []  # Those of the buckets, sorted.
        self._deadlines: list[
            tuple[float, int, Call[Payload]]
        ] = []  # A heap; calls that have gone are swept out now and then.
        self._numbers = itertools.count()
        self._oldest_began = False  # Whether age alone began the last batch.

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call[Payload]) -> None:
        """Takes in a call that nothing has been taken from."""
        self._calls[call] = None
        if call.caller not in self._callers:
            self._callers[call.caller] = OrderedDict()
            self._new[call.caller] = None
        self._callers[call.caller][call] = None
        for entry in call.entries:
            bucket = self._buckets.get(entry.tokens)
            if bucket is None:
                bucket = self._buckets[entry.tokens] = OrderedDict()
                insort(self._lengths, entry.tokens)
            bucket[entry] = None
        self.items += call.waiting
        self.tokens += call.waiting_tokens
        if call.deadline_s is not None:
            if len(self._deadlines) > 2 * len(self._calls) + 64:
                self._deadlines = [kept for kept in self._deadlines if kept[2] in self._calls]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (call.deadline_s, next(self._numbers), call))

    def drop(self, call: Call[Payload]) -> int:
        """Removes what still waits of ``call``; returns how many tokens that were."""
        tokens = call.waiting_tokens
        for entry in call.entries if call.waiting else ():
            if entry.waiting:
                self._remove(entry)
        return tokens

    def expire(self, now_s: float) -> list[Call[Payload]]:
        """Drops the calls whose deadline has passed while some of their items waited, and returns them."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            call = heapq.heappop(self._deadlines)[2]
            if call in self._calls:
                self.drop(call)
                expired.append(call)
        return expired

    def oldest_s(self) -> float | None:
        """When the oldest waiting item arrived."""
        return next(iter(self._calls)).arrived_s if self._calls else None

    def take(self, now_s: float) -> list[Entry[Payload]]:
        """Removes the next batch; empty when nothing waits. It is within budget, or a single item that never can be."""
        if not self._calls:
            return []
        call = self._whose_turn(now_s)
        first = call.first()
        self._remove(first)
        if call.waiting:
            self._callers[call.caller].move_to_end(call)
        if call.caller in self._callers:
            self._new.pop(call.caller, None)
            self._rotation[call.caller] = None
            self._rotation.move_to_end(call.caller)
        batch = [first]
        if not self._padded:
            self._fill_in_order(call, batch)
            return batch
        low = high = first.tokens
        if call.waiting:
            low, high = self._fill_from(call, batch)
        self._fill(batch, low, high)
        return batch

    def _whose_turn(self, now_s: float) -> Call[Payload]:
        oldest = next(iter(self._calls))
        self._oldest_began = not self._oldest_began and now_s - oldest.arrived_s >= self._max_wait_s
        if self._oldest_began:
            return oldest
        caller = next(iter(self._new or self._rotation))
        return next(iter(self._callers[caller]))

    def _fill_in_order(self, call: Call[Payload], batch: list[Entry[Payload]]) -> None:
        """Adds to the batch's one item what follows it in its own call, then what came first, while there is room."""
        room = self._max_tokens - batch[0].tokens
        misfits = 0
        oldest = list(itertools.islice(self._calls, self._max_items + _MISFITS + 1))  # Each gives an item or a misfit.
        for other in itertools.chain([call], (other for other in oldest if other is not call)):
            for entry in other.in_order():
                if len(batch) >= self._max_items or self._lengths[0] > room or misfits > _MISFITS:
                    return
                if entry.tokens > room:
                    misfits += 1
                    continue
                room -= entry.tokens
                self._remove(entry)
                batch.append(entry)

    def _fill_from(self, call: Call[Payload], batch: list[Entry[Payload]]) -> tuple[int, int]:
        """Adds neighbours of the batch's one item from its own call; returns the least and the greatest length."""
        call.sweep()
        order = call.by_length
        low = high = batch[0].tokens
        above = bisect_left(order, high, key=_tokens_of)
        below = above - 1
        while True:
            while above < len(order) and not order[above].waiting:
                above += 1
            while below >= 0 and not order[below].waiting:
                below -= 1
            length = self._nearest(
                low,
                high,
                order[below].tokens if below >= 0 else None,
                order[above].tokens if above < len(order) else None,
                len(batch) + 1,
                share=_OWN_SHARE,
            )
            if length is None:
                return low, high
            entry = order[above] if length >= high else order[below]
            low, high = min(low, length), max(high, length)
            self._remove(entry)
            batch.append(entry)

    def _fill(self, batch: list[Entry[Payload]], low: int, high: int) -> None:
        """Adds whatever is nearest to the lengths from ``low`` to ``high``, the earlier first among equals."""
        while True:
            above = bisect_right(self._lengths, high)
            length = self._nearest(
                low,
                high,
                self._lengths[above - 1] if above > 0 else None,  # It may lie between low and high.
                self._lengths[above] if above < len(self._lengths) else None,
                len(batch) + 1,
                share=0.0,
            )
            if length is None:
                return
            low, high = min(low, length), max(high, length)
            room = min(self._max_items, self._max_tokens // high) - len(batch)
            for entry in list(itertools.islice(self._buckets[length], room)):
                self._remove(entry)
                batch.append(entry)

    def _nearest(
        self, low: int, high: int, below: int | None, above: int | None, size: int, *, share: float
    ) -> int | None:
        """Which of the two lengths a batch of lengths ``low`` to ``high`` takes to be ``size`` items; None for neither.

        ``share``: least length in the batch over the greatest.
        """
        if size > self._max_items:
            return None
        fits_above = above is not None and above * size <= self._max_tokens and low >= share * above
        fits_below = below is not None and high * size <= self._max_tokens and min(low, below) >= share * high
        if fits_above and fits_below:
            assert above is not None
            assert below is not None
            return above if above - high <= max(0, low - below) else below
        return above if fits_above else below if fits_below else None

    def _remove(self, entry: Entry[Payload]) -> None:
        entry.waiting = False
        bucket = self._buckets[entry.tokens]
        del bucket[entry]
        if not bucket:
            del self._buckets[entry.tokens]
            del self._lengths[bisect_left(self._lengths, entry.tokens)]
        self.items -= 1
        self.tokens -= entry.tokens
        call = entry.call
        call.waiting -= 1
        call.waiting_tokens -= entry.tokens
        if not call.waiting:
            del self._calls[call]
            calls = self._callers[call.caller]
            del calls[call]
            if not calls:
                del self._callers[call.caller]
                self._new.pop(call.caller, None)
                self._rotation.pop(call.caller, None)
