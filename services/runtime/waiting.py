"""What waits for the model, and in which order it goes: a plain data structure, without threads or a clock of its own.

Callers share the model evenly, by deficit round robin (Shreedhar and Varghese 1995): each may have a batch's worth of
tokens or places, a turn, before the others have had theirs. A batch belongs to the caller whose turn it is, and the
room that is left to those who are next. So ten thousand items of one delay the others by a batch or two, all told:

- Who comes new goes first, with half a turn (as new flows do in fq_codel, RFC 8290). Who leaves and comes back while
  the others have not had their turns has what was left of its own: asking one by one is worth no more than a list.
- Calls of one caller begin its batches in turn.
- An age cap bounds the wait whatever comes later: every second batch begins with the oldest item once that has waited
  ``max_wait_s``. An item with k older ones before it goes at most 2k + 2 batches after that. Only every second one, and
  only a part of it, so that a long list that has grown old does not hold up everybody in its turn.
- A padded batch is filled with neighbours in length: of the same call while hardly any of it is padding, so that a turn
  is worth a batch; then of those who are next and have few; then whatever is nearest, while the budget lasts.
- A batch without padding costs what its tokens are, whatever their lengths: it is filled in order, from the same call
  and then from those who are next, so that items which begin alike, as neighbours in a call often do, go together.

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
# While it is filled with those who are next, this share: who is next would else wait for others of its length.
_NEXT_SHARE = 0.5
# A call has few items when it has this share of what calls have on average, or less.
_FEW = 0.25
# What of a batch that age alone began goes to the oldest call: enough that a few items which begin alike stay together.
_OLD_SHARE = 0.25
# Turns that a new caller has at once: half of one, so that turns end about where batches do.
_NEW_TURN = 0.5
# So many callers that left are remembered while the others have their turns.
_REMEMBERED = 4096
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

    def nearest(self, low: int, high: int, count: int) -> list[Entry[Payload]]:
        """About ``count`` items that wait, nearest in length to the lengths from ``low`` to ``high``."""
        if self.waiting == 1:
            return [self.first()]
        self.sweep()
        order = self.by_length
        start = bisect_left(order, low, key=_tokens_of)
        above = (entry for entry in itertools.islice(order, start, None) if entry.waiting)
        below = (entry for entry in map(order.__getitem__, range(start - 1, -1, -1)) if entry.waiting)
        found = [*itertools.islice(above, count), *itertools.islice(below, count)]
        return sorted(found, key=lambda entry: _distance(entry.tokens, low, high))[:count]

    def sweep(self) -> None:
        if 2 * self.waiting < len(self.by_length):
            self.by_length = [entry for entry in self.by_length if entry.waiting]


class _Caller(Generic[Payload]):
    """Whose calls share turns.

    ``credit``: what it may have before the next one's turn, in batches. ``tokens``: what it has waiting.
    """

    __slots__ = ("calls", "credit", "key", "tokens")

    def __init__(self, key: Hashable, credit: float) -> None:
        self.key = key
        self.credit = credit
        self.tokens = 0
        self.calls: OrderedDict[Call[Payload], None] = OrderedDict()


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
        self._callers: dict[Hashable, _Caller[Payload]] = {}
        self._new: OrderedDict[_Caller[Payload], None] = OrderedDict()  # Callers whose first turn is not over.
        self._rotation: OrderedDict[_Caller[Payload], None] = OrderedDict()  # The others.
        self._left: dict[Hashable, float] = {}  # Credit of callers that left since the others began their turns.
        self._turns = 0  # That have ended since.
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
        caller = self._callers.get(call.caller)
        if caller is None:
            caller = self._callers[call.caller] = _Caller(call.caller, self._left.pop(call.caller, _NEW_TURN))
            if caller.credit > 0:
                self._new[caller] = None
            else:
                self._end_turn(caller)
        caller.calls[call] = None
        caller.tokens += call.waiting_tokens
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
        oldest = next(iter(self._calls))
        self._oldest_began = not self._oldest_began and now_s - oldest.arrived_s >= self._max_wait_s
        call = oldest if self._oldest_began else next(self._in_turn())
        batch = [call.first()]
        self._remove(batch[0])
        share = _OLD_SHARE if self._oldest_began else 1.0
        if self._padded:
            self._fill_by_length(call, batch, share)
        else:
            self._fill_in_order(call, batch, share)
        if call.waiting and not self._oldest_began:
            self._callers[call.caller].calls.move_to_end(call)
        self._charge(batch)
        return batch

    def tokens_of(self, caller: Hashable) -> int:
        """What a caller has waiting."""
        known = self._callers.get(caller)
        return known.tokens if known is not None else 0

    def _in_turn(self) -> Iterator[Call[Payload]]:
        """Calls of those whose turn it is, then of those who are next. May be taken from meanwhile, but nothing added.

        Of few more callers, and calls of each, than a batch has items and misfits.
        """
        most = self._max_items + _MISFITS + 1
        for caller in list(itertools.islice(itertools.chain(self._new, self._rotation), most)):
            yield from list(itertools.islice(caller.calls, most))

    def _charge(self, batch: list[Entry[Payload]]) -> None:
        """Takes what the batch's items cost from the credit of their callers, and ends turns that are used up."""
        longest = max(entry.tokens for entry in batch)
        costs: dict[Hashable, float] = {}
        for entry in batch:
            # A place is a share of the batch, too.
            cost = max((longest if self._padded else entry.tokens) / self._max_tokens, 1 / self._max_items)
            costs[entry.call.caller] = costs.get(entry.call.caller, 0.0) + cost
        for key, cost in costs.items():
            caller = self._callers.get(key)
            if caller is not None:
                caller.credit -= cost
                if caller.credit <= 0:
                    self._end_turn(caller)
            elif key in self._left:
                self._left[key] -= cost

    def _end_turn(self, caller: _Caller[Payload]) -> None:
        """Behind all others, with the credit of its next turn."""
        # An item may cost several turns: it is not made to wait for all of them.
        caller.credit = max(caller.credit + 1.0, 1 / self._max_items)
        self._new.pop(caller, None)
        self._rotation[caller] = None
        self._rotation.move_to_end(caller)
        self._turns += 1
        if self._turns > len(self._rotation):
            self._turns = 0
            self._left.clear()

    def _fill_in_order(self, call: Call[Payload], batch: list[Entry[Payload]], share: float) -> None:
        """Adds what follows the batch's one item in its own call, then what is next in turn, while there is room.

        ``share``: of the batch that its own call may have before the others.
        """
        room = self._max_tokens - batch[0].tokens
        misfits = 0
        looked_through = False  # Its own call: it comes up again, in turn.
        for turn, other in enumerate(itertools.chain([call], self._in_turn())):
            if other is call and looked_through:
                continue
            for entry in other.in_order():
                if len(batch) >= self._max_items or self._lengths[0] > room or misfits > _MISFITS:
                    return
                if turn == 0 and self._exceeds(share, len(batch), self._max_tokens - room):
                    break
                if entry.tokens > room:
                    misfits += 1
                    continue
                room -= entry.tokens
                self._remove(entry)
                batch.append(entry)
            else:
                looked_through = looked_through or other is call

    def _exceeds(self, share: float, items: int, tokens: int) -> bool:
        """Whether a batch of so many is that share of a full one."""
        return items >= share * self._max_items or tokens >= share * self._max_tokens

    def _fill_by_length(self, call: Call[Payload], batch: list[Entry[Payload]], share: float) -> None:
        """Adds neighbours in length: from the one item's own call, from those who are next, and from all that waits.

        ``share``: of the batch that its own call may have before the others.
        """
        low = high = batch[0].tokens
        if call.waiting:
            low, high = self._fill_from(call, batch, share)
        low, high = self._fill_from_next(batch, low, high)
        self._fill(batch, low, high)

    def _fill_from(self, call: Call[Payload], batch: list[Entry[Payload]], share: float) -> tuple[int, int]:
        """Adds neighbours of the batch's one item from its own call; returns the least and the greatest length."""
        call.sweep()
        order = call.by_length
        low = high = batch[0].tokens
        above = bisect_left(order, high, key=_tokens_of)
        below = above - 1
        while not self._exceeds(share, len(batch), high * len(batch)):
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
        return low, high

    def _fill_from_next(self, batch: list[Entry[Payload]], low: int, high: int) -> tuple[int, int]:
        """Adds neighbours of the lengths from ``low`` to ``high``, of calls that are next and have few, nearest first.

        Calls of many fill batches of their own; and where all have about as many, whoever is nearest may be next.
        """
        room = min(self._max_items, self._max_tokens // high) - len(batch)
        few = int(_FEW * self.items / max(1, len(self._calls)))
        if room <= 0 or few == 0:
            return low, high
        in_turn = itertools.islice(self._in_turn(), self._max_items + _MISFITS + 1)
        calls = [call for call in in_turn if 0 < call.waiting <= few]
        candidates = [entry for call in calls for entry in call.nearest(low, high, max(1, room // len(calls)))]
        for entry in sorted(candidates, key=lambda entry: _distance(entry.tokens, low, high)):
            least, greatest = min(low, entry.tokens), max(high, entry.tokens)
            size = len(batch) + 1
            fits = size <= self._max_items and greatest * size <= self._max_tokens
            if fits and least >= _NEXT_SHARE * greatest:
                low, high = least, greatest
                self._remove(entry)
                batch.append(entry)
        return low, high

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
        caller = self._callers[call.caller]
        caller.tokens -= entry.tokens
        if not call.waiting:
            del self._calls[call]
            del caller.calls[call]
            if not caller.calls:
                self._leave(caller)

    def _leave(self, caller: _Caller[Payload]) -> None:
        del self._callers[caller.key]
        self._new.pop(caller, None)
        self._rotation.pop(caller, None)
        if not self._callers or len(self._left) >= _REMEMBERED:
            self._left.clear()
        elif not isinstance(caller.key, Call):  # Who is known by one call alone does not come back.
            self._left[caller.key] = caller.credit


def _distance(tokens: int, low: int, high: int) -> int:
    return max(low - tokens, tokens - high, 0)
