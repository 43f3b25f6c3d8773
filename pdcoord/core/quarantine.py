"""Endpoints that answer probes and serve badly: taken out of the choice, and readmitted step by step.

What one endpoint's failures come to, and how it is let in again, is told in trouble.py. The rules for all,
after Envoy 1.31's outlier detection and panic threshold:
    At most a share of an endpoint's peers is out at a time (max_ejection_percent). Where more than that
    share is slow at once and still shows output, it is the load, and nobody is put out for it.
    A failure on the way back sends it out again. What was sent before it was put out is old news and tells
    nothing.
"""

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass

from pdcoord.core.fleet import EndpointId
from pdcoord.core.request import RequestId
from pdcoord.core.trouble import TRIALS_MAX, Phase, Symptom, Track, Trouble


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
        return min((self._troubles[endpoint].due_s for endpoint in self._barred), default=None)

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
            trouble.validate()

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
            trouble.note_well(event.track)
            if not trouble.is_past(now_s):
                return []
            self._forget(event.endpoint)
            return [Turned(event.endpoint, None, trouble.symptom)]
        request = event.request
        is_trial = request is not None and trouble.trials.get(request) is False
        if request is None or not is_trial or event.track is not trouble.symptom.track:
            return []
        trouble.trials[request] = True
        return self._step(event.endpoint, trouble, now_s)

    def _step(self, endpoint: EndpointId, trouble: Trouble, now_s: float) -> list[Turned]:
        """Let one more in at a time."""
        if not trouble.step(now_s):
            return []
        if trouble.phase is Phase.SUSPECTED:
            self._end_trials(endpoint, trouble)
            self._barred.discard(endpoint)
        return [Turned(endpoint, trouble.phase, trouble.symptom)]

    def _fail(self, event: Ill, now_s: float) -> list[Turned]:
        symptom = event.symptom
        trouble = self._troubles.get(event.endpoint)
        if trouble is None:
            trouble = self._troubles[event.endpoint] = Trouble(symptom, now_s)
        if trouble.phase is not Phase.SUSPECTED:
            is_trial = event.request in trouble.trials
            return self._put_out(event.endpoint, trouble, symptom, now_s) if is_trial else []
        is_bad = trouble.note_ill(symptom.track, event.partner, now_s)
        if not (is_bad and self._may_go(event.endpoint, trouble, symptom)):
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
        trouble.put_out(symptom, now_s)
        self._barred.add(endpoint)
        return [Turned(endpoint, Phase.OUT, symptom)]

    def _pass_time(self, now_s: float) -> list[Turned]:
        turned: list[Turned] = []
        for endpoint in sorted(self._barred):
            trouble = self._troubles[endpoint]
            if trouble.due_s > now_s:
                continue
            if trouble.phase is Phase.OUT:
                trouble.let_in(now_s)
                turned.append(Turned(endpoint, trouble.phase, trouble.symptom))
                continue
            # Twice as many, as a round of successes would have it.
            for _ in range(trouble.limit):
                if trouble.phase is Phase.READMITTING:
                    turned += self._step(endpoint, trouble, now_s)
        return turned

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
