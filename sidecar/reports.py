"""What this sidecar tells coordinators of its requests: a journal that every stream reads at its own pace."""

from collections import deque
from dataclasses import replace

from pdcoord.protocol.control import (
    EVENTS_MAX,
    REQUESTS_MAX,
    ControlLegKind,
    Events,
    LegBegan,
    LegEnded,
    LoadEvent,
    OutputBegan,
    PathFacts,
    RequestBegan,
    RequestEnded,
    Snapshot,
)
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathsReport
from pdcoord.protocol.plans import DialectName, PlannedLoad
from sidecar.legs import Legs
from sidecar.vocabulary import LegKind, Order

JOURNAL_MAX = 16_384
"""Events that are kept for slow streams; one that is further behind starts anew with a snapshot."""
NO_LOAD = PlannedLoad()
MOVED = "moved"
"""Outcome of a request whose stream goes on at another decode endpoint."""


class Journal:
    """Live requests, and the latest events about them.

    Events are numbered. A stream asks for those from a number on; where they are no longer kept it gets a
    snapshot instead, so that nobody ever waits for a slow stream and memory is bounded.

    Attributes:
        left_out: requests that are not told of for want of room.
    """

    def __init__(self, events_max: int = JOURNAL_MAX, requests_max: int = REQUESTS_MAX) -> None:
        self._events: deque[LoadEvent] = deque(maxlen=events_max)
        self._requests_max = requests_max
        self._live: dict[int, tuple[RequestBegan, float]] = {}
        self._next = 0
        self._ordinal = 0
        self.left_out = 0

    @property
    def end(self) -> int:
        """The number of the next event."""
        return self._next

    @property
    def live_count(self) -> int:
        return len(self._live)

    def begin(self, told: RequestBegan, now_s: float) -> int:
        """A request is being served; its ordinal, or 0 where there is no room to tell of it."""
        if len(self._live) >= self._requests_max:
            self.left_out += 1
            return 0
        self._ordinal += 1
        told = replace(told, ordinal=self._ordinal)
        self._live[self._ordinal] = told, now_s
        self.note(told)
        return self._ordinal

    def note(self, event: LoadEvent) -> None:
        """Something happened to a request that has begun and has not ended."""
        self._events.append(event)
        self._next += 1
        match event:
            case OutputBegan(ordinal):
                told, began_s = self._live[ordinal]
                self._live[ordinal] = replace(told, has_output=True), began_s
            case RequestEnded(ordinal):
                del self._live[ordinal]
            case RequestBegan() | LegBegan() | LegEnded():
                pass

    def keeps(self, number: int) -> bool:
        """Whether all events from this number on are kept."""
        return number >= self._next - len(self._events)

    def since(self, number: int) -> tuple[Events, int]:
        """The next events from that number on, at most EVENTS_MAX, and the number after them."""
        assert self.keeps(number), "events that are no longer kept"
        first = number - (self._next - len(self._events))
        count = min(len(self._events) - first, EVENTS_MAX)
        return Events(tuple(self._events[first + index] for index in range(count))), number + count

    def snapshot(self, now_s: float) -> tuple[Snapshot, int]:
        """All live requests, oldest first, and the number of the next event."""
        requests = tuple(
            replace(told, age_s=max(now_s - began_s, 0.0)) for told, began_s in self._live.values()
        )
        return Snapshot(requests), self._next

    def validate(self) -> None:
        """Assert that everything is within its bounds."""
        assert len(self._live) <= self._requests_max, "too many live requests"
        assert list(self._live) == sorted(self._live), "live requests are out of order"
        assert len(self._events) <= self._next, "more events than there were"


class Reader:
    """How far one stream has read a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._number: int | None = None
        self._lost_count = 0

    def take_lost(self) -> int:
        """Events that a snapshot had to stand for since this was last asked."""
        count, self._lost_count = self._lost_count, 0
        return count

    def next(self, now_s: float) -> Snapshot | Events | None:
        """What to send next; None if there is nothing new. A stream begins with a snapshot."""
        journal = self._journal
        if self._number is not None and journal.keeps(self._number):
            if self._number == journal.end:
                return None
            events, self._number = journal.since(self._number)
            return events
        if self._number is not None:
            self._lost_count += journal.end - self._number
        snapshot, self._number = journal.snapshot(now_s)
        return snapshot


class RequestReport:
    """Tells a journal of one request, by looking at its legs after whatever happened to it."""

    def __init__(self, journal: Journal, order: Order, load: PlannedLoad | None, now_s: float) -> None:
        prefill = order.prefills[0].address if order.prefills else None
        told = RequestBegan(
            ordinal=0,
            load=load if load is not None else NO_LOAD,
            prefill=prefill if load is not None else None,
            is_streamed=order.is_stream,
            is_sequential=order.dialect is DialectName.NIXLV2,
        )
        self._journal = journal
        self._ordinal = journal.begin(told, now_s)
        self._seen_count = 0
        self._live: list[int] = []
        self._has_output = False

    def look(self, legs: Legs, now_s: float) -> bool:
        """Tell what is new of its legs and its output; whether there was something."""
        if not self._ordinal:
            return False
        before = self._journal.end
        for number in [number for number in self._live if not legs.legs[number].is_live]:
            self._live.remove(number)
            self._end_leg(legs, number, now_s)
        while self._seen_count < len(legs.legs):
            self._seen_count += 1
            leg = legs.legs[self._seen_count]
            if leg.kind is LegKind.DECODE and leg.target != legs.order.engine:
                # The sidecar there tells of it from now on: here it is no load any more.
                self._journal.note(RequestEnded(self._ordinal, MOVED))
                self._ordinal = 0
                return True
            prefill = _prefill_of(legs, leg.attempt)
            kind = _KINDS[leg.kind]
            self._journal.note(LegBegan(self._ordinal, leg.number, kind, prefill))
            if leg.is_live:
                self._live.append(leg.number)
            else:
                self._end_leg(legs, leg.number, now_s)
        if legs.first_output_s is not None and not self._has_output:
            self._has_output = True
            self._journal.note(OutputBegan(self._ordinal, legs.served()))
        return self._journal.end != before

    def end(self, legs: Legs, outcome: str, now_s: float) -> None:
        """It is over, however it ended; legs that still ran were cancelled with it."""
        if not self._ordinal:
            return
        self.look(legs, now_s)
        for number in self._live:
            self._end_leg(legs, number, now_s)
        served = None if self._has_output else legs.served()
        self._journal.note(RequestEnded(self._ordinal, outcome, served))
        self._ordinal = 0

    def _end_leg(self, legs: Legs, number: int, now_s: float) -> None:
        leg = legs.legs[number]
        ended_s = now_s if leg.ended_s is None else leg.ended_s
        self._journal.note(
            LegEnded(
                self._ordinal,
                number,
                _KINDS[leg.kind],
                _prefill_of(legs, leg.attempt),
                leg.outcome or "cancelled",
                max(ended_s - leg.began_s, 0.0),
            )
        )


_KINDS = {LegKind.PREFILL: ControlLegKind.PREFILL, LegKind.DECODE: ControlLegKind.DECODE}


def _prefill_of(legs: Legs, attempt: int) -> HostPort | None:
    """The prefill target of an attempt; None if it was colocated."""
    same = (leg for leg in legs.legs.values() if leg.attempt == attempt and leg.kind is LegKind.PREFILL)
    leg = next(same, None)
    return None if leg is None else leg.target


class PathNews:
    """Which probe of each path one stream has been told of."""

    def __init__(self) -> None:
        self._told: dict[HostPort, int] = {}
        self._is_agent_up: bool | None = None

    def news(self, report: PathsReport) -> PathFacts | None:
        """The probes that were not told yet; None if there is nothing new."""
        fresh = [p for p in report.paths if p.probe_count and self._told.get(p.target) != p.probe_count]
        if not fresh and report.is_agent_up == self._is_agent_up:
            return None
        self._told = {path.target: path.probe_count for path in report.paths}
        self._is_agent_up = report.is_agent_up
        return PathFacts(report.interval_s, report.is_agent_up, tuple(fresh))
