"""Which parts wait to be read, are busy, or were given up while a transport still writes to their landing."""

from collections import Counter, deque
from collections.abc import Iterable

from transfer.session.arena import Share
from transfer.session.loads import Load, Part, PartState
from transfer.session.vocabulary import SendDone, TransferId

_Feed = tuple[str, TransferId]


class Reads:
    """The parts of all loads, by what is done for them.

    Attributes:
        busy_count: parts that are read or unpacked.
        is_waiting_for_late: a read that was given up still keeps its landing.
    """

    def __init__(self, in_flight_max: int, per_source_max: int, share: Share) -> None:
        self.busy_count = 0
        self._in_flight_max = in_flight_max
        self._per_source_max = per_source_max
        self._share = share
        self._queues: dict[str, deque[tuple[Load, Part]]] = {}
        self._busy_of: Counter[str] = Counter()
        self._number = 0
        self._abandoned: dict[int, tuple[int, _Feed]] = {}
        self._late_of: Counter[_Feed] = Counter()
        self._owed: dict[_Feed, SendDone] = {}

    @property
    def is_waiting_for_late(self) -> bool:
        return bool(self._abandoned)

    def queue(self, load: Load, part: Part) -> None:
        self._queues.setdefault(part.feed.source.id, deque()).append((load, part))

    def sources(self) -> list[str]:
        """Those that have parts waiting, in order of their first offer."""
        return list(self._queues)

    def next(self, source: str) -> tuple[Load, Part] | None:
        """The next part to read from a source, if there may be one more; it stays first in its queue."""
        queue = self._queues.get(source, deque())
        while queue and queue[0][1].state is not PartState.WAITING:
            queue.popleft()
        if not queue:
            self._queues.pop(source, None)
            return None
        is_full = self.busy_count >= self._in_flight_max or self._busy_of[source] >= self._per_source_max
        return None if is_full else queue[0]

    def begin(self, load: Load, part: Part, landing: int) -> None:
        """The first part of a source's queue is read into this place."""
        source = part.feed.source.id
        self._queues[source].popleft()
        self._number += 1
        part.state, part.landing, part.read = PartState.READING, landing, self._number
        load.busy_count += 1
        self.busy_count += 1
        self._busy_of[source] += 1

    def finish(self, load: Load, part: Part) -> None:
        """Nothing reads or writes for this part any more."""
        self._share.free(part.landing)
        self._settle(load, part)

    def abandon(self, load: Load, part: Part) -> None:
        """A read may go on for longer than its load: its landing and its source's release wait for it."""
        feed = (part.feed.source.id, load.asked.transfer)
        self._abandoned[part.read] = (part.landing, feed)
        self._late_of[feed] += 1
        part.feed.unread_count -= 1
        self._settle(load, part)

    def release(self, done: SendDone) -> list[SendDone]:
        """The release of a source, now or when its last late read has ended."""
        feed = (done.source, done.transfer)
        if not self._late_of[feed]:
            return [done]
        self._owed[feed] = done
        return []

    def end_late(self, number: int) -> list[SendDone] | None:
        """A read has ended: what is owed to its source by now, if it had been given up; else None."""
        found = self._abandoned.pop(number, None)
        if found is None:
            return None
        landing, feed = found
        self._share.free(landing)
        self._late_of[feed] -= 1
        if self._late_of[feed]:
            return []
        del self._late_of[feed]
        owed = self._owed.pop(feed, None)
        return [] if owed is None else [owed]

    def _settle(self, load: Load, part: Part) -> None:
        source = part.feed.source.id
        part.state, part.landing = PartState.OVER, -1
        load.busy_count -= 1
        self.busy_count -= 1
        self._busy_of[source] -= 1
        if not self._busy_of[source]:
            del self._busy_of[source]

    def validate(self, loads: Iterable[Load]) -> None:
        """Assert what holds between any two events."""
        parts = [part for load in loads for part in load.parts]
        assert self.busy_count <= self._in_flight_max, "reads in flight are bounded"
        assert self.busy_count == sum(self._busy_of.values()), "busy parts are counted by source"
        assert max(self._busy_of.values(), default=0) <= self._per_source_max, "reads of a source are bounded"
        busy_bytes = sum(self._share.rounded(p.offered.length_bytes) for p in parts if p.landing >= 0)
        assert busy_bytes <= self._share.used_bytes, "busy parts land"
        assert busy_bytes == self._share.used_bytes or self._abandoned, "only busy and late reads land"
        assert self._late_of.total() == len(self._abandoned), "late reads are counted by source"
        assert self._owed.keys() <= self._late_of.keys(), "a release waits for late reads only"
        waiting = sum(part.state is PartState.WAITING for part in parts)
        queued = sum(part.state is PartState.WAITING for own in self._queues.values() for _, part in own)
        assert waiting == queued, "every part that waits is queued"
