"""The last decisions with what became of them, for the admin listener; bounded."""

from collections import OrderedDict
from dataclasses import dataclass, field

from pdcoord.core.events import (
    Action,
    DecodeFailed,
    Dispatch,
    HedgeAsked,
    HedgeOver,
    Outcome,
    Refuse,
    StreamBroke,
    Wait,
)
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.gateway.decisionviews import (
    AttemptView,
    DecisionSummary,
    DecisionView,
    RungView,
    ServedView,
    candidate_view,
    drop_counts,
    planned_rungs,
)
from pdcoord.protocol.errors import Refusal, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import ServedHeader


@dataclass(slots=True)
class _Attempt:
    plan: Plan
    failure: RungReason | None = None
    served: ServedHeader | None = None
    broke_after_tokens: int | None = None
    is_second: bool = False
    is_outrun: bool = False


@dataclass(slots=True)
class _Decision:
    """One request. The request itself is not kept: its block keys alone may be 300 kB."""

    id: RequestId
    model: str
    adapter: str
    prompt_tokens: int
    output_tokens_max: int | None
    choice_count: int
    is_generative: bool
    tenant: str
    priority: int
    arrived_s: float
    decision_s: float
    attempts: list[_Attempt] = field(default_factory=list)
    outcome: Outcome | None = None
    refusal: Refusal | None = None
    first_byte_s: float | None = None
    ended_s: float | None = None
    is_waiting: bool = False
    waited_s: float | None = None


class DecisionLog:
    """Remembers the last `capacity` requests that reached the core; older ones are forgotten."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._decisions: OrderedDict[RequestId, _Decision] = OrderedDict()

    def __len__(self) -> int:
        return len(self._decisions)

    def arrived(self, request: Request, actions: list[Action], *, now_s: float, decision_s: float) -> None:
        """The core decided on a request for the first time."""
        decision = _Decision(
            id=request.id,
            model=request.model,
            adapter=request.adapter,
            prompt_tokens=request.prompt_tokens,
            output_tokens_max=request.output_tokens_max,
            choice_count=request.choice_count,
            is_generative=request.is_generative,
            tenant=request.tenant,
            priority=request.priority,
            arrived_s=now_s,
            decision_s=decision_s,
        )
        # A client may use an id again: the later call is the one it will ask about.
        self._decisions.pop(request.id, None)
        self._decisions[request.id] = decision
        if len(self._decisions) > self._capacity:
            self._decisions.popitem(last=False)
        _act(decision, actions, Outcome.REFUSED, now_s)

    def failed(self, event: DecodeFailed, actions: list[Action], *, now_s: float) -> None:
        """The last attempt gave no answer; the core decided on what is next."""
        decision = self._decisions.get(event.id)
        if decision is None:
            return
        if decision.attempts:
            decision.attempts[-1].failure = event.reason
            decision.attempts[-1].served = event.served
        _act(decision, actions, Outcome.UPSTREAM_ERROR, now_s)

    def broke(self, event: StreamBroke, actions: list[Action], *, now_s: float) -> None:
        """The last attempt's stream broke off; the core decided on what is next."""
        decision = self._decisions.get(event.id)
        if decision is None:
            return
        if decision.attempts:
            decision.attempts[-1].failure = event.reason
            decision.attempts[-1].broke_after_tokens = event.output_tokens
        _act(decision, actions, Outcome.UPSTREAM_ERROR, now_s)

    def hedged(self, event: HedgeAsked | HedgeOver, actions: list[Action]) -> None:
        """A second attempt was asked for, and may have been sent; or one of two was given up.

        The one that goes on is the last from then on.
        """
        decision = self._decisions.get(event.id)
        if decision is None:
            return
        if isinstance(event, HedgeAsked):
            sent = [action.plan for action in actions if isinstance(action, Dispatch)]
            decision.attempts += [_Attempt(plan, is_second=True) for plan in sent]
            return
        if len(decision.attempts) < 2:
            return  # A client used the id again meanwhile.
        if not event.is_won:
            decision.attempts[-2:] = reversed(decision.attempts[-2:])
        left = decision.attempts[-2]
        left.failure, left.served, left.is_outrun = event.reason, event.served, event.reason is None

    def waited(self, action: Dispatch | Refuse, *, now_s: float) -> None:
        """A request that was told to wait is sent or refused."""
        decision = self._decisions.get(action.id)
        if decision is not None:
            decision.waited_s = now_s - decision.arrived_s
            _act(decision, [action], Outcome.REFUSED, now_s)

    def began(self, request_id: RequestId, served: ServedHeader | None, *, now_s: float) -> None:
        decision = self._decisions.get(request_id)
        if decision is not None:
            if decision.first_byte_s is None:
                decision.first_byte_s = now_s
            if decision.attempts:
                decision.attempts[-1].served = served

    def ended(self, request_id: RequestId, outcome: Outcome, *, now_s: float) -> None:
        decision = self._decisions.get(request_id)
        if decision is not None:
            if decision.is_waiting:
                decision.waited_s = now_s - decision.arrived_s
                decision.is_waiting = False
            decision.outcome = outcome
            decision.ended_s = now_s

    def view(self, request_id: str, *, now_s: float) -> DecisionView | None:
        decision = self._decisions.get(RequestId(request_id))
        return None if decision is None else _view(decision, now_s)

    def latest(self, limit: int, *, now_s: float) -> list[DecisionSummary]:
        """At most `limit`, the latest first."""
        summaries: list[DecisionSummary] = []
        for decision in reversed(self._decisions.values()):
            if len(summaries) >= limit:
                break
            summaries.append(_summary(decision, now_s))
        return summaries


def _act(decision: _Decision, actions: list[Action], refused: Outcome, now_s: float) -> None:
    for action in actions:
        match action:
            case Dispatch(plan):
                decision.is_waiting = False
                decision.attempts.append(_Attempt(plan))
            case Wait():
                decision.is_waiting = True
            case Refuse(_, refusal):
                decision.is_waiting = False
                decision.refusal = refusal
                decision.outcome = refused
                decision.ended_s = now_s


def _summary(decision: _Decision, now_s: float) -> DecisionSummary:
    last = decision.attempts[-1] if decision.attempts else None
    mode = None
    if last is not None:
        mode = last.served.mode if last.served is not None else last.plan.mode
    return DecisionSummary(
        id=decision.id,
        model=decision.model,
        mode=mode,
        why=None if last is None else last.plan.why,
        outcome=decision.outcome,
        age_ms=(now_s - decision.arrived_s) * 1e3,
    )


def _view(decision: _Decision, now_s: float) -> DecisionView:
    refusal = decision.refusal
    return DecisionView(
        id=decision.id,
        model=decision.model,
        adapter=decision.adapter or None,
        age_ms=(now_s - decision.arrived_s) * 1e3,
        prompt_tokens=decision.prompt_tokens,
        output_tokens_max=decision.output_tokens_max,
        choice_count=decision.choice_count,
        is_generative=decision.is_generative,
        outcome=decision.outcome,
        refusal=None if refusal is None else f"{refusal.reason}: {refusal.message}",
        decision_ms=decision.decision_s * 1e3,
        tenant=decision.tenant,
        priority=decision.priority,
        is_waiting=decision.is_waiting,
        waited_ms=None if decision.waited_s is None else decision.waited_s * 1e3,
        first_byte_ms=_since(decision.arrived_s, decision.first_byte_s),
        duration_ms=_since(decision.arrived_s, decision.ended_s),
        attempts=[_attempt_view(attempt) for attempt in decision.attempts],
    )


def _since(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else (end_s - start_s) * 1e3


def _attempt_view(attempt: _Attempt) -> AttemptView:
    plan = attempt.plan
    return AttemptView(
        mode=plan.mode,
        why=plan.why,
        dialect=plan.dialect,
        chosen=candidate_view(plan.chosen),
        runner_up=None if plan.runner_up is None else candidate_view(plan.runner_up),
        rungs=planned_rungs(plan),
        drops=drop_counts(plan),
        prefill_deadline_ms=plan.prefill_deadline_s * 1e3,
        transfer_deadline_ms=plan.transfer_deadline_s * 1e3,
        is_outage=plan.is_outage,
        failure=attempt.failure,
        broke_after_tokens=attempt.broke_after_tokens,
        is_second=attempt.is_second,
        is_outrun=attempt.is_outrun,
        served=None if attempt.served is None else _served_view(attempt.served, plan),
    )


def _served_view(served: ServedHeader, plan: Plan) -> ServedView:
    return ServedView(
        mode=served.mode,
        prefill=None if served.prefill is None else _name_of(served.prefill, plan),
        rungs=[
            RungView(rung=taken.rung, target=_name_of(taken.target, plan), reason=taken.reason)
            for taken in served.rungs
        ],
        prefill_ms=served.prefill_ms,
        transfer_ms=served.transfer_ms,
        cached_tokens=served.cached_tokens,
    )


def _name_of(address: HostPort, plan: Plan) -> str:
    """The id of the plan's endpoint with that address, else the address."""
    for endpoint in (plan.decode, plan.prefill, *(rung.prefill for rung in plan.rungs)):
        if endpoint is not None and endpoint.address == address:
            return endpoint.id
    return address
