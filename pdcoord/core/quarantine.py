"""Endpoints that answer probes and serve badly: taken out of the choice, and readmitted step by step.

The rules, and whom they follow (Envoy 1.31's outlier detection and panic threshold; RFC 5681):
    Out after FAILURES_MAX failures in a row, or FAILED_MAX of the last WINDOW outcomes. Envoy takes 5 in a
    row; here each costs a request all of its patience, so it is 3, as for paths.
    At most a share of an endpoint's peers is out at a time (max_ejection_percent). Where more than that
    share is slow at once and still shows output, it is the load, and nobody is put out for it.
    Out for OUT_S_MIN, doubled up to OUT_S_MAX each time that it fails again (base_ejection_time times the
    number of ejections); then one request is let in, with every success one more at a time, so that their
    number doubles with each round (slow start), until READMITTED_AT.
    A failure on the way sends it back. What was sent before it was put out is old news and tells nothing.
"""

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.fleet import EndpointId
from pdcoord.core.request import RequestId

FAILURES_MAX = 3
WINDOW = 20
FAILED_MAX = 8
"""Of the last WINDOW outcomes: who fails two in five requests is of no use, one in a hundred is chance."""
PARTNERS_MIN = 2
"""Failures that may be the other leg's must be with so many of those before they are this endpoint's own."""
OUT_S_MIN = 1.0
OUT_S_MAX = 60.0
READMITTED_AT = 16
"""Requests at a time past which an endpoint is one like any other."""
TRIALS_MAX = 2 * READMITTED_AT
STEP_S_MAX = 60.0
"""So long without a failure counts as if all that may be under way had succeeded: few tell little."""
RELAPSE_S = 120.0
"""Who fails again within this time of its readmission is put out for twice as long as the last time."""

_ROW = (1 << FAILURES_MAX) - 1
_ALL = (1 << WINDOW) - 1


class Track(StrEnum):
    """What is expected of an endpoint; failures in one are not made good by successes in another."""

    START = "start"
    """A first output in time."""
    FLOW = "flow"
    """Answers that go on to their end."""
    PACE = "pace"
    """Steps about as fast as its pool's."""
    PREFILL = "prefill"
    """Prompts computed for others."""


class Symptom(StrEnum):
    """What speaks against an endpoint; closed, a label of metrics."""

    LATE = "late"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    ERROR = "error"
    STALLED = "stalled"
    BROKEN_OFF = "broken-off"
    SLOW = "slow"
    PREFILL = "prefill"

    @property
    def track(self) -> Track:
        return _TRACKS.get(self, Track.START)

    @property
    def is_of_load(self) -> bool:
        """Whether a whole fleet shows it when it has too much to do."""
        return self in {Symptom.LATE, Symptom.SLOW, Symptom.PREFILL}


_TRACKS = {
    Symptom.STALLED: Track.FLOW,
    Symptom.BROKEN_OFF: Track.FLOW,
    Symptom.SLOW: Track.PACE,
    Symptom.PREFILL: Track.PREFILL,
}


class Phase(StrEnum):
    """Where an endpoint of which something is remembered stands; closed, a label of metrics."""

    SUSPECTED = "suspected"
    """Some of its latest requests failed; it gets work like any other."""
    OUT = "out"
    READMITTING = "readmitting"


@dataclass(frozen=True, slots=True)
class Sent:
    """A request was sent there, for either leg."""

    endpoint: EndpointId
    request: RequestId


@dataclass(frozen=True, slots=True)
class Well:
    """A request got what it expected of the endpoint.

    Attributes:
        request: None for one of another coordinator.
    """

    endpoint: EndpointId
    track: Track
    request: RequestId | None = None


@dataclass(frozen=True, slots=True)
class Ill:
    """A request did not.

    Attributes:
        partner: endpoint of the other leg, where the fault may be that one's.
    """

    endpoint: EndpointId
    symptom: Symptom
    request: RequestId
    partner: EndpointId | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """A request that is late got its first output after all: the endpoint does something."""

    endpoint: EndpointId


@dataclass(frozen=True, slots=True)
class Over:
    """A request has ended; what it had to tell was told."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Gone:
    """The endpoint is gone, or is another process by now."""

    endpoint: EndpointId


@dataclass(frozen=True, slots=True)
class TimeCame:
    """It is the time that `next_event_s` named, or later."""


Event = Sent | Well | Ill | Shown | Over | Gone | TimeCame


@dataclass(frozen=True, slots=True)
class Turned:
    """An endpoint came into another phase; None for none at all."""

    endpoint: EndpointId
    phase: Phase | None
    symptom: Symptom


@dataclass(slots=True)
class Trouble:
    """One endpoint of which something is remembered.

    Attributes:
        outcomes: by track, the latest in the lowest bit; a failure is a 1.
        partners: endpoints of the other legs of failures since the last success; None: it was its own fault.
        shown_s: when output last came from it, in time or late.
        row_s: when the failures in a row began that are counted now.
        out_s: length of the current or last time out; 0.0 before the first.
        until_s: when a request may be let in; meaningful while out.
        limit: requests that may be on trial there at a time, while it is being readmitted.
        trials: requests let in since it was put out, and whether they passed; those that did still may fail.
        stepped_s: when the limit was last raised.
        since_s: of the phase.
        readmitted_s: when it was last put among the others again; None if it never was.
    """

    symptom: Symptom
    since_s: float
    phase: Phase = Phase.SUSPECTED
    outcomes: dict[Track, int] = field(default_factory=dict)
    partners: dict[Track, set[EndpointId | None]] = field(default_factory=dict)
    shown_s: float = float("-inf")
    row_s: float = 0.0
    out_s: float = 0.0
    until_s: float = 0.0
    limit: int = 0
    trials: dict[RequestId, bool] = field(default_factory=dict)
    stepped_s: float = 0.0
    readmitted_s: float | None = None

    @property
    def is_failing(self) -> bool:
        """Whether the latest in any track was a failure."""
        return self.phase is not Phase.SUSPECTED or any(bits & 1 for bits in self.outcomes.values())

    @property
    def trial_count(self) -> int:
        """Requests that were let in and have told nothing yet."""
        return sum(not has_passed for has_passed in self.trials.values())

    def lets_pass(self, now_s: float) -> bool:
        match self.phase:
            case Phase.SUSPECTED:
                return True
            case Phase.OUT:
                return now_s >= self.until_s and not self.trial_count
            case Phase.READMITTING:
                return self.trial_count < self.limit


class Quarantine:
    """Remembers the endpoints in trouble and nobody else, so memory follows trouble, not traffic.

    Args:
        peers: those that could do an endpoint's work in its stead, itself among them.
        share_max: of them, which may be out at a time, 0..1; 0.0 puts nobody out.
    """

    def __init__(
        self,
        peers: Callable[[EndpointId], Collection[EndpointId]],
        share_max: Callable[[EndpointId], float],
    ) -> None:
        self._peers = peers
        self._share_max = share_max
        self._troubles: dict[EndpointId, Trouble] = {}
        self._barred: set[EndpointId] = set()
        self._trials: dict[RequestId, set[EndpointId]] = {}

    @property
    def barred(self) -> Collection[EndpointId]:
        """Endpoints that are out or being readmitted: of these, ask `lets_pass`."""
        return self._barred

    def lets_pass(self, endpoint: EndpointId, now_s: float) -> bool:
        """Whether one more request may be sent there."""
        trouble = self._troubles.get(endpoint)
        return trouble is None or trouble.lets_pass(now_s)

    def is_out(self, endpoint: EndpointId) -> bool:
        """Whether it is out, or back on trial only."""
        return endpoint in self._barred

    def trouble(self, endpoint: EndpointId) -> Trouble | None:
        """What is remembered of it; read only."""
        return self._troubles.get(endpoint)

    def troubles(self) -> Iterator[tuple[EndpointId, Trouble]]:
        return iter(self._troubles.items())

    def next_event_s(self) -> float | None:
        """When to pass a TimeCame in though nothing happens; None if there is no need."""
        return min((_due_s(self._troubles[endpoint]) for endpoint in self._barred), default=None)

    def handle(self, event: Event, now_s: float) -> list[Turned]:
        """Take one event in; the endpoints that came into another phase by it come out."""
        match event:
            case Sent(endpoint, request):
                self._send(endpoint, request)
                return []
            case Well():
                return self._succeed(event, now_s)
            case Ill():
                return self._fail(event, now_s)
            case Shown(endpoint):
                if (trouble := self._troubles.get(endpoint)) is not None:
                    trouble.shown_s = now_s
                return []
            case Over(request):
                for endpoint in self._trials.pop(request, set()):
                    del self._troubles[endpoint].trials[request]
                return []
            case Gone(endpoint):
                self._forget(endpoint)
                return []
            case TimeCame():
                return self._pass_time(now_s)

    def validate(self, endpoints: Container[EndpointId], live: Container[RequestId]) -> None:
        """Assert that only endpoints that exist and requests under way are remembered, within bounds."""
        barred = {name for name, each in self._troubles.items() if each.phase is not Phase.SUSPECTED}
        assert barred == self._barred, "the barred endpoints are wrong"
        tried = Counter((name, request) for request, names in self._trials.items() for name in names)
        listed = Counter((name, request) for name, each in self._troubles.items() for request in each.trials)
        assert tried == listed, "trials by request and by endpoint disagree"
        for name, trouble in self._troubles.items():
            assert name in endpoints, f"{name}: trouble with an endpoint that is gone"
            assert all(request in live for request in trouble.trials), f"{name}: a trial that has ended"
            assert len(trouble.trials) <= TRIALS_MAX, f"{name}: too many trials"
            assert all(0 <= bits <= _ALL for bits in trouble.outcomes.values()), f"{name}: too many outcomes"
            assert all(len(each) <= PARTNERS_MIN + 1 for each in trouble.partners.values()), name
            assert 0.0 <= trouble.out_s <= OUT_S_MAX, f"{name}: out for {trouble.out_s} s"
            if trouble.phase is Phase.SUSPECTED:
                assert not trouble.trials, f"{name}: a trial of who is not out"
            if trouble.phase is Phase.READMITTING:
                assert 1 <= trouble.limit <= READMITTED_AT, f"{name}: {trouble.limit} at a time"

    def _send(self, endpoint: EndpointId, request: RequestId) -> None:
        trouble = self._troubles.get(endpoint)
        if trouble is None or trouble.phase is Phase.SUSPECTED or len(trouble.trials) >= TRIALS_MAX:
            return
        # Also where nobody else could serve it, before its time: what comes of that tells as much.
        trouble.trials.setdefault(request, False)
        self._trials.setdefault(request, set()).add(endpoint)

    def _succeed(self, event: Well, now_s: float) -> list[Turned]:
        trouble = self._troubles.get(event.endpoint)
        if trouble is None:
            return []
        trouble.shown_s = now_s
        if trouble.phase is Phase.SUSPECTED:
            self._note(trouble, event.track, is_failure=False)
            is_clear = not any(trouble.outcomes.values())
            is_over = trouble.readmitted_s is None or now_s >= trouble.readmitted_s + RELAPSE_S
            if is_clear and is_over:
                self._forget(event.endpoint)
                return [Turned(event.endpoint, None, trouble.symptom)]
            return []
        request = event.request
        is_trial = request is not None and trouble.trials.get(request) is False
        if request is None or not is_trial or event.track is not trouble.symptom.track:
            return []
        trouble.trials[request] = True
        return self._step(event.endpoint, trouble, now_s)

    def _step(self, endpoint: EndpointId, trouble: Trouble, now_s: float) -> list[Turned]:
        """Let one more in at a time."""
        trouble.stepped_s = now_s
        if trouble.phase is Phase.OUT:
            trouble.phase, trouble.since_s, trouble.limit = Phase.READMITTING, now_s, 2
            return [Turned(endpoint, trouble.phase, trouble.symptom)]
        trouble.limit += 1
        if trouble.limit <= READMITTED_AT:
            return []
        self._end_trials(endpoint, trouble)
        trouble.phase, trouble.since_s, trouble.readmitted_s = Phase.SUSPECTED, now_s, now_s
        trouble.outcomes.clear()
        trouble.partners.clear()
        self._barred.discard(endpoint)
        return [Turned(endpoint, trouble.phase, trouble.symptom)]

    def _fail(self, event: Ill, now_s: float) -> list[Turned]:
        symptom, track = event.symptom, event.symptom.track
        trouble = self._troubles.get(event.endpoint)
        if trouble is None:
            trouble = self._troubles[event.endpoint] = Trouble(symptom, now_s)
        if trouble.phase is not Phase.SUSPECTED:
            is_trial = event.request in trouble.trials
            return self._put_out(event.endpoint, trouble, symptom, now_s) if is_trial else []
        bits = trouble.outcomes.get(track, 0)
        if not bits & 1:
            trouble.row_s = now_s
        self._note(trouble, track, is_failure=True)
        partners = trouble.partners.setdefault(track, set())
        if len(partners) <= PARTNERS_MIN:
            partners.add(event.partner)
        is_own = None in partners or len(partners) >= PARTNERS_MIN
        bits = trouble.outcomes[track]
        is_bad = bits & _ROW == _ROW or bits.bit_count() >= FAILED_MAX
        if not (is_bad and is_own and self._may_go(event.endpoint, trouble, symptom)):
            return []
        return self._put_out(event.endpoint, trouble, symptom, now_s)

    def _may_go(self, endpoint: EndpointId, trouble: Trouble, symptom: Symptom) -> bool:
        """Whether its peers can do without it."""
        peers = self._peers(endpoint)
        room = int(self._share_max(endpoint) * len(peers))
        if sum(peer in self._barred for peer in peers) >= room:
            return False
        shows_output = trouble.shown_s >= trouble.row_s
        if not (symptom.is_of_load and shows_output):
            return True
        failing = (self._troubles.get(peer) for peer in peers)
        return sum(each is not None and each.is_failing for each in failing) <= room

    def _put_out(
        self, endpoint: EndpointId, trouble: Trouble, symptom: Symptom, now_s: float
    ) -> list[Turned]:
        self._end_trials(endpoint, trouble)
        is_relapse = trouble.phase is not Phase.SUSPECTED or (
            trouble.readmitted_s is not None and now_s < trouble.readmitted_s + RELAPSE_S
        )
        out_s = trouble.out_s * 2.0 if is_relapse else OUT_S_MIN
        trouble.out_s = min(max(out_s, OUT_S_MIN), OUT_S_MAX)
        trouble.until_s = now_s + trouble.out_s
        trouble.phase, trouble.symptom, trouble.since_s, trouble.limit = Phase.OUT, symptom, now_s, 0
        trouble.outcomes.clear()
        trouble.partners.clear()
        self._barred.add(endpoint)
        return [Turned(endpoint, Phase.OUT, symptom)]

    def _pass_time(self, now_s: float) -> list[Turned]:
        turned: list[Turned] = []
        for endpoint in sorted(self._barred):
            trouble = self._troubles[endpoint]
            if _due_s(trouble) > now_s:
                continue
            if trouble.phase is Phase.OUT:
                trouble.phase, trouble.since_s, trouble.limit = Phase.READMITTING, now_s, 1
                trouble.stepped_s = now_s
                turned.append(Turned(endpoint, trouble.phase, trouble.symptom))
                continue
            # Twice as many, as a round of successes would have it.
            for _ in range(trouble.limit):
                if trouble.phase is Phase.READMITTING:
                    turned += self._step(endpoint, trouble, now_s)
        return turned

    @staticmethod
    def _note(trouble: Trouble, track: Track, *, is_failure: bool) -> None:
        trouble.outcomes[track] = (trouble.outcomes.get(track, 0) << 1 | is_failure) & _ALL
        if not is_failure:
            trouble.partners.pop(track, None)

    def _end_trials(self, endpoint: EndpointId, trouble: Trouble) -> None:
        for request in trouble.trials:
            tried = self._trials[request]
            tried.discard(endpoint)
            if not tried:
                del self._trials[request]
        trouble.trials.clear()

    def _forget(self, endpoint: EndpointId) -> None:
        trouble = self._troubles.pop(endpoint, None)
        if trouble is not None:
            self._end_trials(endpoint, trouble)
        self._barred.discard(endpoint)


def _due_s(trouble: Trouble) -> float:
    """When time alone takes a step."""
    return trouble.until_s if trouble.phase is Phase.OUT else trouble.stepped_s + STEP_S_MAX
