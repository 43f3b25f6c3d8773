"""What an Outbox holds of transfers that are not live: who came too early, and how the ended ones ended."""

from collections import OrderedDict
from dataclasses import dataclass, field

from transfer.errors import Failure, FailureKind
from transfer.session.vocabulary import DoneHeard, FetchAsked, TransferId


@dataclass(frozen=True, slots=True)
class Early:
    """A fetch or a release that came before its transfer was opened.

    Attributes:
        until_s: when it is no longer waited for.
    """

    event: FetchAsked | DoneHeard
    until_s: float


@dataclass(slots=True)
class EarlyBook:
    """Fetches and releases that wait for Opened, at most `count_max` of them."""

    count_max: int
    _by_transfer: dict[TransferId, list[Early]] = field(default_factory=dict)
    _count: int = 0

    def __len__(self) -> int:
        return self._count

    @property
    def deadline_s(self) -> float | None:
        return min((e.until_s for waiting in self._by_transfer.values() for e in waiting), default=None)

    def add(self, early: Early) -> Failure | None:
        """Hold it, or say why not. A release takes the place of its consumer's fetch."""
        event = early.event
        waiting = self._by_transfer.get(event.transfer, [])
        same = [e for e in waiting if e.event.consumer == event.consumer]
        if isinstance(event, FetchAsked) and same:
            return Failure(FailureKind.REPLAYED_TICKET, "this rank has fetched it already")
        self._drop(event.transfer, same)
        if self._count >= self.count_max:
            return Failure(FailureKind.OVERLOADED, f"{self.count_max} wait for transfers not yet opened")
        self._by_transfer.setdefault(event.transfer, []).append(early)
        self._count += 1
        return None

    def take(self, transfer: TransferId) -> list[FetchAsked | DoneHeard]:
        """What waits for a transfer, in order of arrival; it is held no more."""
        waiting = self._by_transfer.pop(transfer, [])
        self._count -= len(waiting)
        return [e.event for e in waiting]

    def expire(self, now_s: float) -> list[FetchAsked]:
        """Drop what has waited long enough; return the fetches among it."""
        late = [e for waiting in self._by_transfer.values() for e in waiting if e.until_s <= now_s]
        for early in late:
            self._drop(early.event.transfer, [early])
        return [e.event for e in late if isinstance(e.event, FetchAsked)]

    def forget(self, consumer: str) -> None:
        """Drop the fetches of a consumer that is gone; its releases stay, they are still true."""
        gone = [
            e
            for waiting in self._by_transfer.values()
            for e in waiting
            if e.event.consumer == consumer and isinstance(e.event, FetchAsked)
        ]
        for early in gone:
            self._drop(early.event.transfer, [early])

    def _drop(self, transfer: TransferId, which: list[Early]) -> None:
        for early in which:
            self._by_transfer[transfer].remove(early)
            self._count -= 1
        if not self._by_transfer.get(transfer, True):
            del self._by_transfer[transfer]

    def validate(self) -> None:
        assert self._count == sum(map(len, self._by_transfer.values())), "the count is what is held"
        assert self._count <= self.count_max, "what waits is bounded"
        assert all(self._by_transfer.values()), "a transfer nobody waits for is not held"


@dataclass(slots=True)
class EndedBook:
    """How transfers ended: the last `count_max` of them."""

    count_max: int
    _ended: OrderedDict[TransferId, Failure | None] = field(default_factory=OrderedDict)

    def __contains__(self, transfer: TransferId) -> bool:
        return transfer in self._ended

    def add(self, transfer: TransferId, failure: Failure | None) -> None:
        self._ended[transfer] = failure
        self._ended.move_to_end(transfer)
        while len(self._ended) > self.count_max:
            self._ended.popitem(last=False)

    def answer(self, transfer: TransferId) -> Failure:
        """What a fetch of an ended transfer is told: how it failed, or that it was taken already."""
        taken = Failure(FailureKind.REPLAYED_TICKET, "every reader of this transfer was done")
        return self._ended[transfer] or taken

    def validate(self) -> None:
        assert len(self._ended) <= self.count_max, "memory of ended transfers is bounded"
