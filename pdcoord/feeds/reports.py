"""What sidecars tell over their control streams, as events of the core, and what they are told."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from structlog.typing import FilteringBoundLogger

from pdcoord.core.events import PathProbed, SidecarLost, SidecarReported
from pdcoord.core.fleet import Endpoint, EndpointId
from pdcoord.core.ports import Handler
from pdcoord.core.targets import TargetLists, changes
from pdcoord.feeds.paths import probe_of
from pdcoord.protocol.control import (
    HEARTBEAT_S,
    REQUESTS_MAX,
    ControlError,
    Events,
    LoadEvent,
    PathFacts,
    RequestBegan,
    RequestEnded,
    SidecarHello,
    Snapshot,
    Target,
    Targets,
)
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PATHS_MAX, PathReport

STREAMS_MAX = 4_096
"""Sidecars at a time; one more is turned away by name."""
GRACE_S = 5.0
"""How long what a sidecar told stays in force after its stream was lost: it may only be reconnecting."""
NOTICE_S = 0.1
"""Between two looks for targets that changed; changes within it are told as one."""


class TooManyStreamsError(Exception):
    """There is no room for another sidecar."""


@dataclass(slots=True, eq=False)
class Session:
    """One sidecar whose stream is up.

    Attributes:
        heard_s: when it last told something, a sign of life included.
        has_news: set when it is worth looking for targets to tell of.
        is_replaced: another stream of the same address counts instead; this one is to be ended.
        own: its requests that this coordinator has planned; they are in the ledger already.
        parts: of a snapshot whose last part has not come.
        facts: its last probes, for endpoints that are discovered later.
        told_ids: the endpoints whose paths they were told as.
    """

    hello: SidecarHello
    heard_s: float
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    is_replaced: bool = False
    own: set[int] = field(default_factory=set)
    parts: list[RequestBegan] = field(default_factory=list)
    facts: dict[HostPort, tuple[PathReport, float]] = field(default_factory=dict)
    interval_s: float = 0.0
    told_ids: tuple[EndpointId, ...] = ()
    targets: dict[HostPort, Target] = field(default_factory=dict)
    decodes: frozenset[HostPort] = frozenset()
    generation: int = -1
    was_troubled: bool = False
    told_s: float = 0.0

    @property
    def address(self) -> HostPort:
        return self.hello.address


class ReportsFeed:
    """Turns what sidecars tell into events of the core.

    Requests that this coordinator planned are left out: they are in its ledger since they were planned.

    Args:
        at: the endpoints with that address.
        replica: this process, as its plans name it.

    Attributes:
        reports: what was told, by kind.
    """

    def __init__(
        self,
        handler: Handler,
        targets: TargetLists,
        *,
        at: Callable[[HostPort], Sequence[Endpoint]],
        replica: str,
        clock: Callable[[], float],
        log: FilteringBoundLogger,
    ) -> None:
        self.reports: Counter[str] = Counter()
        self._handler = handler
        self._targets = targets
        self._at = at
        self._replica = replica
        self._clock = clock
        self._log = log
        self._sessions: dict[HostPort, Session] = {}
        self._lost: dict[HostPort, float] = {}

    @property
    def stream_count(self) -> int:
        return len(self._sessions)

    @property
    def unknown_count(self) -> int:
        """Sidecars whose address no endpoint has: their load counts nowhere."""
        return sum(not self._at(address) for address in self._sessions)

    @property
    def report_age_s(self) -> float:
        """Since the connected sidecar that was silent longest told something; 0.0 without one."""
        oldest_s = min((session.heard_s for session in self._sessions.values()), default=None)
        return 0.0 if oldest_s is None else max(self._clock() - oldest_s, 0.0)

    def tells_paths(self, address: HostPort) -> bool:
        """Whether a sidecar tells of its probes by itself, so that it need not be asked."""
        session = self._sessions.get(address)
        return session is not None and session.interval_s > 0.0

    async def run(self) -> None:
        """Look after what changes with time until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(NOTICE_S)

    def look(self) -> None:
        """Let go of sidecars that stay away, and see who is to be told something."""
        now_s = self._clock()
        for address in [address for address, at_s in self._lost.items() if now_s >= at_s + GRACE_S]:
            del self._lost[address]
            self._handler.handle(SidecarLost(address))
        self._targets.look()
        for session in self._sessions.values():
            ids = tuple(endpoint.id for endpoint in self._at(session.address))
            if ids != session.told_ids:
                session.told_ids = ids
                self._tell_paths(session, session.facts.values())
            is_troubled = self._targets.is_troubled(session.address)
            if is_troubled or session.was_troubled or session.generation != self._targets.generation:
                session.was_troubled = is_troubled
                session.has_news.set()

    # Of one stream.

    def open(self, hello: SidecarHello) -> Session:
        """A sidecar has proved itself; an older stream of its address counts no more, and is to be ended.

        The newer one wins, since the older may be of a sidecar that is gone without a word.

        Raises:
            TooManyStreamsError: if there is no room for it.
        """
        if len(self._sessions) >= STREAMS_MAX and hello.address not in self._sessions:
            raise TooManyStreamsError(f"there are {STREAMS_MAX} control streams already")
        old = self._sessions.get(hello.address)
        if old is not None:
            old.is_replaced = True
            old.has_news.set()
            self._log.warning(
                "control.replaced", sidecar=hello.address, name=old.hello.name, replaced_by=hello.name
            )
        session = self._sessions[hello.address] = Session(hello, self._clock())
        self._lost.pop(hello.address, None)
        self._log.info("control.connected", sidecar=hello.address, name=hello.name)
        if not self._at(hello.address):
            self._log.warning("control.unknown", sidecar=hello.address, name=hello.name)
        return session

    def close(self, session: Session) -> None:
        """Its stream has ended."""
        if self._sessions.get(session.address) is session:
            del self._sessions[session.address]
            self._lost[session.address] = self._clock()
            self._log.info("control.lost", sidecar=session.address, name=session.hello.name)

    def hear(self, session: Session, message: Snapshot | Events | PathFacts) -> None:
        """It told something.

        Raises:
            ControlError: if that is more than a sidecar tells of, or part of a snapshot is missing.
        """
        session.heard_s = self._clock()
        if session.is_replaced:
            return
        if session.parts and not isinstance(message, Snapshot):
            raise ControlError("a snapshot has not ended")
        match message:
            case Snapshot(requests, has_more):
                if len(session.parts) + len(requests) > REQUESTS_MAX:
                    raise ControlError(f"a snapshot has more than {REQUESTS_MAX} requests")
                session.parts.extend(requests)
                if not has_more:
                    self._take_snapshot(session)
            case Events(events):
                self.reports["event"] += len(events)
                others_events = tuple(event for event in events if not self._is_own(session, event))
                if others_events:
                    self._report(session, Events(others_events))
            case PathFacts():
                self.reports["path"] += len(message.paths)
                self._take_paths(session, message)

    def _take_snapshot(self, session: Session) -> None:
        requests, session.parts = session.parts, []
        self.reports["snapshot"] += 1
        session.own = {each.ordinal for each in requests if each.load.replica == self._replica}
        others = tuple(each for each in requests if each.ordinal not in session.own)
        self._report(session, Snapshot(others))

    def _report(self, session: Session, report: Snapshot | Events) -> None:
        self._handler.handle(SidecarReported(session.address, session.hello.epoch, report))

    def _is_own(self, session: Session, event: LoadEvent) -> bool:
        if isinstance(event, RequestBegan):
            if event.load.replica == self._replica:
                if len(session.own) >= REQUESTS_MAX:
                    raise ControlError(f"more than {REQUESTS_MAX} requests are under way")
                session.own.add(event.ordinal)
        elif isinstance(event, RequestEnded) and event.ordinal in session.own:
            session.own.discard(event.ordinal)
            return True
        return event.ordinal in session.own

    def _take_paths(self, session: Session, told: PathFacts) -> None:
        now_s = self._clock()
        session.interval_s = told.interval_s
        fresh = [(path, now_s - path.age_s) for path in told.paths if path.probe_count]
        for path, at_s in fresh:
            if path.target in session.facts or len(session.facts) < PATHS_MAX:
                session.facts[path.target] = path, at_s
        self._tell_paths(session, fresh)

    def _tell_paths(self, session: Session, facts: Iterable[tuple[PathReport, float]]) -> None:
        for (path, at_s), endpoint_id in itertools.product(facts, session.told_ids):
            probe = probe_of(path, at_s=at_s, interval_s=session.interval_s)
            self._handler.handle(PathProbed(path.target, endpoint_id, probe))

    def notice(self, session: Session) -> Targets | None:
        """What it is to be told now; None if nothing has changed and it was told something lately."""
        now_s = self._clock()
        is_first = session.generation < 0
        decodes = session.decodes
        if session.generation != self._targets.generation:
            decodes = self._targets.peers(session.address)
        new, gone = decodes - session.decodes, session.decodes - decodes
        session.decodes = decodes
        session.generation = self._targets.generation
        targets = self._targets.of(session.address, now_s)
        changed, removed = changes(session.targets, targets)
        session.targets = targets
        told = Targets(
            changed,
            removed,
            is_whole=is_first,
            decodes=tuple(sorted(new)),
            decodes_removed=tuple(sorted(gone)),
        )
        if not told.has_news and now_s < session.told_s + HEARTBEAT_S:
            return None
        session.told_s = now_s
        return told
