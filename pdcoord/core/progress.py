"""What requests show of the endpoints that serve them: in time, late, broken off; it feeds the quarantine.

An engine that accepts and never answers looks well to every probe. So nothing here comes from probes: only
what was sent, what came of it, and when it should have come.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass

from pdcoord.core.events import Outcome
from pdcoord.core.fleet import Endpoint, EndpointId, Fleet, Health, PoolName, Sample
from pdcoord.core.model import Model
from pdcoord.core.plan import Figures, Plan
from pdcoord.core.quarantine import Event, Gone, Ill, Over, Quarantine, Sent, Shown, TimeCame, Well
from pdcoord.core.request import Request, RequestId
from pdcoord.core.served import target_of
from pdcoord.core.trouble import Phase, Symptom, Track
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import Mode, ServedHeader

LATE_S_MIN = 2.0
LATE_FACTOR = 4.0
LATE_SPREADS = 4.0
"""A first output is late past so many times its prediction, and spreads of it, and never before LATE_S_MIN:
so much may a busy engine, a garbage collection or a lost packet cost."""
WHOLE_TOKENS = 1_024
"""Of an answer that comes in one piece and whose length nobody limits, for whether it is late."""
SLOW_FACTOR = 4.0
"""Steps that take so many times what they take in the endpoint's pool are a fault, not another load."""

_BEFORE_OUTPUT = {
    RungReason.DECODE_UNREACHABLE: Symptom.UNREACHABLE,
    RungReason.DECODE_TIMEOUT: Symptom.TIMEOUT,
    RungReason.DECODE_ERROR: Symptom.ERROR,
    RungReason.DECODE_STALLED: Symptom.STALLED,
}
# Whoever drains, is overloaded, drew other tokens, was not let dial or was not believed did nothing wrong.
_IN_STREAM = {
    RungReason.DECODE_UNREACHABLE: Symptom.BROKEN_OFF,
    RungReason.DECODE_TIMEOUT: Symptom.STALLED,
    RungReason.DECODE_ERROR: Symptom.BROKEN_OFF,
    RungReason.DECODE_STALLED: Symptom.STALLED,
}
_NOBODY: frozenset[EndpointId] = frozenset()
_OF_PREFILL = frozenset(
    {
        RungReason.PREFILL_UNREACHABLE,
        RungReason.PREFILL_TIMEOUT,
        RungReason.PREFILL_ERROR,
        RungReason.PREFILL_NO_TICKET,
    }
)


@dataclass(slots=True)
class _Sent:
    """One request under way.

    Attributes:
        sent_s: when it was sent.
        late_s: when its first output is late, or is looked at again; None where nobody can say.
        is_blamed: what it waited for too long has been held against its endpoints.
        has_stalled: likewise that its stream stands still.
    """

    plan: Plan
    sent_s: float
    late_s: float | None
    has_begun: bool = False
    is_blamed: bool = False
    has_stalled: bool = False


class Progress:
    """Watches requests from dispatch to end.

    Args:
        model: the policy's model of that name.

    Attributes:
        quarantine: the endpoints in trouble.
        outs: how often endpoints of a pool were put out, by pool and symptom.
    """

    def __init__(self, fleet: Fleet, model: Callable[[str], Model | None]) -> None:
        self._fleet = fleet
        self._model = model
        self.quarantine = Quarantine(self._peers, self._share_max)
        self.outs: Counter[tuple[PoolName, Symptom]] = Counter()
        self._sent: dict[RequestId, _Sent] = {}
        self._worked_s: dict[EndpointId, float] = {}
        self._late: list[tuple[float, RequestId]] = []

    # What became of our own requests.

    def sent(self, request: Request, plan: Plan, now_s: float) -> None:
        """It was sent to its plan's endpoints."""
        wait_s = late_after_s(request, plan.chosen.figures)
        sent = self._sent[request.id] = _Sent(plan, now_s, None if wait_s is None else now_s + wait_s)
        if sent.late_s is not None:
            heapq.heappush(self._late, (sent.late_s, request.id))
        if self.quarantine.barred:  # Of nobody else is it counted.
            for endpoint in _ends(plan):
                self._tell(Sent(endpoint.id, request.id), now_s)

    def began(self, request_id: RequestId, served: ServedHeader | None, now_s: float) -> None:
        """Its first output came."""
        sent = self._sent.get(request_id)
        if sent is None:
            return
        plan, sent.has_begun = sent.plan, True
        self._take_rungs(plan, served, now_s)
        used = plan.prefill
        if served is not None:
            is_split = served.mode is Mode.SPLIT and served.prefill is not None
            used = target_of(plan, served.prefill) if is_split and served.prefill is not None else None
        for endpoint, track in ((plan.decode, Track.START), (used, Track.PREFILL)):
            if endpoint is not None and self._is_there(endpoint):
                self._worked_s[endpoint.id] = now_s
                well = Well(endpoint.id, track, request_id)
                self._tell(Shown(endpoint.id) if sent.is_blamed else well, now_s)

    def failed(
        self, request_id: RequestId, reason: RungReason, served: ServedHeader | None, now_s: float
    ) -> None:
        """Its decode endpoint gave it up, or was given up, before any output."""
        sent = self._sent.get(request_id)
        if sent is None:
            return
        self._take_rungs(sent.plan, served, now_s)
        symptom = _BEFORE_OUTPUT.get(reason)
        if symptom is not None and not sent.is_blamed:
            self._blame(sent.plan.decode, symptom, request_id, None, now_s)

    def outrun(self, request_id: RequestId, now_s: float) -> None:
        """Another attempt that was made much later had its output first."""
        sent = self._sent.get(request_id)
        if sent is not None and not sent.has_begun:
            self._blame_late(sent, request_id, now_s)

    def broke(self, request_id: RequestId, reason: RungReason, now_s: float) -> None:
        """Its stream broke off, or stands still."""
        sent = self._sent.get(request_id)
        symptom = _IN_STREAM.get(reason)
        if sent is not None and symptom is not None:
            self._blame(sent.plan.decode, symptom, request_id, None, now_s)

    def stalled(self, request_id: RequestId, now_s: float) -> None:
        """Its stream stands still, and nobody can continue it; may be told again."""
        sent = self._sent.get(request_id)
        if sent is not None and not sent.has_stalled:
            sent.has_stalled = True
            self._blame(sent.plan.decode, Symptom.STALLED, request_id, None, now_s)

    def ended(self, request_id: RequestId, outcome: Outcome, pace: float | None, now_s: float) -> None:
        """It ended; its account is still open.

        Args:
            pace: how many times longer its steps took than its pool's; None where nobody can say.
        """
        sent = self._sent.get(request_id)
        if sent is None or not sent.has_begun:
            return
        decode = sent.plan.decode
        if outcome is Outcome.UPSTREAM_ERROR and not sent.has_stalled:
            self._blame(decode, Symptom.BROKEN_OFF, request_id, None, now_s)
        elif outcome is Outcome.OK and self._is_there(decode) and not sent.has_stalled:
            self._worked_s[decode.id] = now_s
            self._tell(Well(decode.id, Track.FLOW, request_id), now_s)
            if pace is not None and pace >= SLOW_FACTOR:
                self._blame(decode, Symptom.SLOW, request_id, None, now_s)
            elif pace is not None:
                self._tell(Well(decode.id, Track.PACE, request_id), now_s)

    def dropped(self, request_id: RequestId, now_s: float) -> None:
        """It is sent nowhere any more."""
        if self._sent.pop(request_id, None) is not None:
            self._tell(Over(request_id), now_s)

    def rename(self, request_id: RequestId, to: RequestId, plan: Plan) -> None:
        """Its account goes on under another id, and with a plan of that."""
        sent = self._sent.pop(request_id, None)
        if sent is None:
            return
        sent.plan = plan
        self._sent[to] = sent
        if sent.late_s is not None:
            heapq.heappush(self._late, (sent.late_s, to))

    # What others saw.

    def prefill_failed(
        self, prefill: Endpoint, decode: Endpoint, reason: RungReason, request_id: RequestId, now_s: float
    ) -> None:
        """A sidecar says so of the prefill leg of another coordinator's request."""
        if reason in _OF_PREFILL:
            self._blame(prefill, Symptom.PREFILL, request_id, decode.id, now_s)

    def decode_failed(
        self, decode: Endpoint, reason: RungReason, request_id: RequestId, now_s: float, *, had_output: bool
    ) -> None:
        """Likewise of its decode leg."""
        symptom = (_IN_STREAM if had_output else _BEFORE_OUTPUT).get(reason)
        if symptom is not None:
            self._blame(decode, symptom, request_id, None, now_s)

    def served(self, endpoint: Endpoint, track: Track, now_s: float) -> None:
        """A sidecar says that a request of another coordinator got what it expected there."""
        self._tell(Well(endpoint.id, track), now_s)

    def sampled(self, endpoint: EndpointId, sample: Sample, now_s: float) -> None:
        """An engine told of itself; told before the fleet has it.

        Whose KV pool fills or empties computes: an engine whose streams go on and who has no room for
        others gives nobody a first output for as long as they last.
        """
        state = self._fleet.get(endpoint)
        if state is not None and state.sample is not None and state.sample.kv_usage != sample.kv_usage:
            self._worked_s[endpoint] = now_s

    def forget(self, endpoint: EndpointId, now_s: float) -> None:
        """The endpoint is gone, or is another process by now."""
        self._worked_s.pop(endpoint, None)
        self._tell(Gone(endpoint), now_s)

    # For those who choose.

    def shunned(self, now_s: float) -> frozenset[EndpointId]:
        """Endpoints that get no request now, as long as another can serve it."""
        barred = self.quarantine.barred
        if not barred:
            return _NOBODY
        return frozenset(each for each in barred if not self.quarantine.lets_pass(each, now_s))

    # Time.

    def next_event_s(self) -> float | None:
        """When to tell of the time though nothing happens; None if there is no need."""
        while self._late and not self._is_due(*self._late[0]):
            heapq.heappop(self._late)
        times = [self._late[0][0]] if self._late else []
        if (out_s := self.quarantine.next_event_s()) is not None:
            times.append(out_s)
        return min(times, default=None)

    def pass_time(self, now_s: float) -> bool:
        """Look for what is late by now; whether an endpoint takes requests that did not before."""
        while self._late and self._late[0][0] <= now_s:
            late_s, request_id = heapq.heappop(self._late)
            if self._is_due(late_s, request_id):
                self._blame_late(self._sent[request_id], request_id, now_s)
        if not self.quarantine.barred:
            return False
        return self._tell(TimeCame(), now_s)

    def validate(self, live: Container[RequestId]) -> None:
        """Assert that only requests under way and endpoints that exist are remembered."""
        assert all(request_id in live for request_id in self._sent), "a request that ended is watched"
        endpoints = {state.endpoint.id for state in self._fleet.states()}
        assert self._worked_s.keys() <= endpoints, "work of an endpoint that is gone"
        self.quarantine.validate(endpoints, live)

    def _is_due(self, late_s: float, request_id: RequestId) -> bool:
        sent = self._sent.get(request_id)
        return sent is not None and sent.late_s == late_s and not (sent.has_begun or sent.is_blamed)

    def _blame_late(self, sent: _Sent, request_id: RequestId, now_s: float) -> None:
        """Hold it against those who keep it waiting; of a split request nobody can tell here which does.

        Where one of them is busy by its own word and does not stand still, that is why, and it is looked at
        again after as long again: a queue that is longer than was predicted is no fault, and whoever is put
        out for it leaves a longer one to others.
        """
        if sent.is_blamed:
            return
        plan = sent.plan
        if any(self._is_busy(endpoint, sent.sent_s) for endpoint in _ends(plan)):
            sent.late_s = now_s + max(LATE_S_MIN, now_s - sent.sent_s)
            heapq.heappush(self._late, (sent.late_s, request_id))
            return
        sent.is_blamed = True
        if plan.prefill is not None:
            self._blame(plan.prefill, Symptom.PREFILL, request_id, plan.decode.id, now_s)
        partner = plan.prefill.id if plan.prefill is not None else None
        self._blame(plan.decode, Symptom.LATE, request_id, partner, now_s)

    def _is_busy(self, endpoint: Endpoint, since_s: float) -> bool:
        """Whether requests queue at an endpoint that has worked since then."""
        state = self._fleet.get(endpoint.id)
        is_queue = state is not None and state.sample is not None and state.sample.waiting > 0
        return is_queue and self._worked_s.get(endpoint.id, -math.inf) > since_s

    def _take_rungs(self, plan: Plan, served: ServedHeader | None, now_s: float) -> None:
        for taken in served.rungs if served is not None else ():
            prefill = target_of(plan, taken.target)
            if prefill is not None and taken.reason in _OF_PREFILL:
                self._blame(prefill, Symptom.PREFILL, plan.request_id, plan.decode.id, now_s)

    def _blame(
        self,
        endpoint: Endpoint,
        symptom: Symptom,
        request_id: RequestId,
        partner: EndpointId | None,
        now_s: float,
    ) -> None:
        if self._is_there(endpoint):
            self._tell(Ill(endpoint.id, symptom, request_id, partner), now_s)

    def _tell(self, event: Event, now_s: float) -> bool:
        """Hand it on; whether an endpoint takes requests that did not before."""
        turned = self.quarantine.handle(event, now_s)
        for each in turned:
            state = self._fleet.get(each.endpoint)
            if each.phase is Phase.OUT and state is not None:
                self.outs[state.endpoint.pool.name, each.symptom] += 1
        return any(each.phase is Phase.READMITTING for each in turned)

    def _is_there(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint of a plan is still the same process."""
        state = self._fleet.get(endpoint.id)
        return state is not None and state.endpoint.address == endpoint.address

    def _peers(self, endpoint_id: EndpointId) -> Collection[EndpointId]:
        state = self._fleet.get(endpoint_id)
        if state is None:
            return ()
        pool = state.endpoint.pool
        return [
            group_state.endpoint.id
            for group in self._fleet.groups(pool.model)
            if (group.pool.can_decode if pool.can_decode else group.pool.can_prefill)
            for group_state in group.by_health[Health.READY].values()
        ]

    def _share_max(self, endpoint_id: EndpointId) -> float:
        state = self._fleet.get(endpoint_id)
        model = self._model(state.endpoint.pool.model) if state is not None else None
        return model.fallback.quarantine_share_max if model is not None else 0.0


def expected_s(request: Request, figures: Figures) -> float:
    """When the first output of a request is expected after its dispatch, at most."""
    if request.is_streamed:
        return figures.ttft_s
    tokens = WHOLE_TOKENS if request.output_tokens_max is None else request.output_tokens_max
    return figures.ttft_s + tokens * max(figures.pace_s, figures.step_s)


def late_after_s(request: Request, figures: Figures) -> float | None:
    """How long after its dispatch the first output of a request is late; None where nobody can say."""
    if not request.is_generative:
        return None  # The policy has no figures of such work.
    return max(LATE_S_MIN, LATE_FACTOR * expected_s(request, figures) + LATE_SPREADS * figures.spread_s)


def _ends(plan: Plan) -> tuple[Endpoint, ...]:
    return (plan.decode,) if plan.prefill is None else (plan.decode, plan.prefill)
