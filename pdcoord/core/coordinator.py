"""The coordinator: one mutator that turns events into plans and keeps every account of them.

A request's life here, and nothing else is legal:
    RequestArrived -> Dispatch | Refuse | Wait
    Wait           -> Dispatch | Refuse (in answer to any later event) | RequestEnded
    Dispatch       -> ResponseBegan | DecodeFailed | RequestEnded
    ResponseBegan  -> RequestEnded
    DecodeFailed   -> Dispatch | Refuse
A refused request has ended.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pdcoord.core import refusals
from pdcoord.core.admission import Admission, Later
from pdcoord.core.alternatives import moved
from pdcoord.core.disagg import dialect
from pdcoord.core.events import (
    Action,
    DecodeFailed,
    DecodeMoved,
    Dispatch,
    Event,
    ModelsReplaced,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    TimePassed,
)
from pdcoord.core.fleet import (
    Endpoint,
    EndpointDraining,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EndpointState,
    Fleet,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.intake import Intake
from pdcoord.core.kvcache import KvSignal
from pdcoord.core.ladder import FallbackBudget, rungs
from pdcoord.core.learned import LearnedSpeed
from pdcoord.core.ledger import Entry, Ledger
from pdcoord.core.lessons import Lessons
from pdcoord.core.model import Model
from pdcoord.core.paths import PathTable, PathView
from pdcoord.core.plan import Plan
from pdcoord.core.ports import SpeedModel
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.queues import Waiting
from pdcoord.core.remote import Accounts, RemoteLoad
from pdcoord.core.request import Request, RequestId
from pdcoord.core.scheduler import NoChoice, Scheduler
from pdcoord.core.silent import SilentFailures
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind, ServedHeader

LIVE_REQUESTS_MAX = 65_536
"""Requests in all that one coordinator keeps account of; past it the next is refused."""


@dataclass(slots=True)
class _Live:
    """One request between its first plan and its end."""

    request: Request
    plan: Plan
    failed_decodes: frozenset[EndpointId] = frozenset()
    has_begun: bool = False


class Coordinator:
    """All state of routing. `handle` is the only way to change it."""

    def __init__(self, speed: SpeedModel | None = None, replica: str = "") -> None:
        self.fleet = Fleet()
        self.ledger = Ledger()
        self.paths = PathTable()
        self.prefixes = Prefixes()
        self._silent = SilentFailures()
        self._speed = speed if speed is not None else LearnedSpeed()
        self.lessons = Lessons(self.fleet, self.ledger, self.paths, self._speed)
        self._replica = replica
        accounts = Accounts(self.fleet, self.ledger, self.paths, self._silent, self.lessons, self._speed)
        self.remote = RemoteLoad(accounts, self.model)
        self._intake = Intake(accounts, self.prefixes, self.remote, self.model)
        self._models: dict[str, Model] = {}
        self.budgets: dict[str, FallbackBudget] = {}
        self._live: dict[RequestId, _Live] = {}
        self.admission = Admission(self.fleet, self.ledger, self._speed)
        self._scheduler = Scheduler(self.fleet, self.ledger, self.prefixes, self.paths, self._speed)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event in; what must be done about it, and about requests that wait, comes out."""
        actions = self._take(event, now_s)
        # Neither an arrival nor what engines cache, told thousands of times a second, makes room.
        if self.admission.count and not isinstance(event, RequestArrived | KvSignal):
            if not isinstance(event, TimePassed):
                self.admission.wake(now_s)
            actions += self.admission.serve(lambda waiting: self._decide_waiting(waiting, now_s), now_s)
        return actions

    def next_event_s(self) -> float | None:
        """When to pass a TimePassed in though nothing happens; None if there is no need."""
        return self.admission.next_event_s()

    def _take(self, event: Event, now_s: float) -> list[Action]:
        match event:
            case RequestArrived(request):
                return self._arrive(request, now_s)
            case ResponseBegan(request_id, served):
                self._begin_response(self._live[request_id], served, now_s)
            case DecodeFailed():
                return [self._fail_decode(event, now_s)]
            case DecodeMoved(request_id, address):
                self._move(request_id, address, now_s)
            case RequestEnded(request_id, outcome, output_tokens):
                self.lessons.ended(request_id, outcome, output_tokens, now_s)
                self._end(request_id, now_s)
            case ModelsReplaced(models):
                self._replace_models(models)
                return self.admission.keep_only(self._models)
            case TimePassed():
                pass
            case EndpointSeen() | EndpointGone() | EndpointDraining() | SampleTaken() | SampleFailed():
                self._intake.take_signal(event, now_s)
            case _:
                self._intake.take_report(event, now_s)
        return []

    def model(self, name: str) -> Model | None:
        """The model of this name or alias."""
        return self._models.get(name)

    def models(self) -> tuple[Model, ...]:
        """Every model once, in the policy's order."""
        return tuple({model.name: model for model in self._models.values()}.values())

    @property
    def live_count(self) -> int:
        """Requests that are dispatched or wait."""
        return len(self._live) + self.admission.count

    def fallback_share(self, model: str) -> float:
        """Share of the model's recent requests that fell back to a local prefill, 0..1."""
        budget = self.budgets.get(model)
        return budget.share if budget is not None else 0.0

    def paths_view(self, now_s: float) -> list[PathView]:
        """Every pair of endpoints that could be a path, of all models."""
        return [view for model in self.models() for view in self._paths_of(model, now_s)]

    def _paths_of(self, model: Model, now_s: float) -> Iterator[PathView]:
        endpoints = [state.endpoint for state in self.fleet.of_model(model.name)]
        for prefill, decode in itertools.product(endpoints, endpoints):
            if prefill.pool.can_prefill and decode.pool.can_decode and prefill.id != decode.id:
                seeded = self._speed.path(prefill, decode)
                figures = self.paths.figures(prefill.id, decode.id, seeded, now_s)
                yield PathView(
                    prefill=prefill,
                    decode=decode,
                    verdict=self.paths.verdict(prefill.pool, decode.pool),
                    state=self.paths.state(prefill.id, decode.id, now_s),
                    bandwidth_bytes_per_s=figures.bandwidth_bytes_per_s,
                    bytes_in_flight=self.ledger.load(decode.id).bytes_in_flight,
                    fault=self.paths.fault(prefill.id, decode.id, now_s),
                    probe=self.paths.probe(prefill.id, decode.id),
                )

    def validate(self) -> None:
        """Assert every cross-reference; tests and the simulator call this after every event."""
        self.fleet.validate()
        self.ledger.validate()
        self.prefixes.validate()
        known = {state.endpoint.id for state in self.fleet.states()}
        self.paths.validate(known, self._live.keys() | self.remote.request_ids())
        self.remote.validate()
        self._silent.validate(known)
        self._speed.validate()
        self.lessons.validate(self._live)
        in_use = {e.id for live in self._live.values() for e in (live.plan.decode, live.plan.prefill) if e}
        in_use |= self.remote.endpoint_ids()
        assert {name for name, _ in self.ledger.loads()} <= known | in_use, "an account of nobody"
        self.admission.validate()
        assert not any(request_id in self.admission for request_id in self._live), "both live and waiting"
        assert self.ledger.open_count == len(self._live), "the ledger and the live requests disagree"
        assert set(self.budgets) == {m.name for m in self.models()}, "a model without a budget"

    def _replace_models(self, models: tuple[Model, ...]) -> None:
        self._models = {name: m for m in models for name in (m.name, *m.aliases)}
        kept = self.budgets
        self.budgets = {}
        for model in models:
            budget, window = kept.get(model.name), model.fallback.window
            self.budgets[model.name] = (
                budget if budget is not None and budget.window == window else FallbackBudget(window)
            )
        self.paths.forget_verdicts()
        self.prefixes.replace_models(models)

    def _arrive(self, request: Request, now_s: float) -> list[Action]:
        is_new = request.id not in self._live and request.id not in self.admission
        assert is_new, f"request {request.id} arrived twice"
        model = self._models.get(request.model)
        if model is None:
            return [Refuse(request.id, refusals.model_unknown(request.model))]
        if self.live_count >= LIVE_REQUESTS_MAX:
            return [Refuse(request.id, refusals.saturated())]
        if self.admission.is_behind(request):
            never = refusals.why_never(request, model)
            if never is not None:
                return [Refuse(request.id, never)]
            return self.admission.enqueue(request, model, Later(), now_s)
        planned = self._plan(request, model, frozenset(), 0, now_s)
        if isinstance(planned, Refusal) and planned is not refusals.AT_LIMIT:
            return [Refuse(request.id, planned)]
        decided = self._admit(request, model, planned, 0.0, now_s)
        if isinstance(decided, Later):
            return self.admission.enqueue(request, model, decided, now_s)
        return [decided]

    def _decide_waiting(self, waiting: Waiting, now_s: float) -> Dispatch | Refuse | Later:
        """Whether a request that waits can go by now."""
        request, model = waiting.request, self._models[waiting.request.model]
        planned = self._plan(request, model, frozenset(), 0, now_s)
        if isinstance(planned, Refusal) and planned.reason is RefuseReason.NO_ENDPOINTS:
            if request.allowed is not None:
                return Refuse(request.id, planned)  # Others that wait are not held up for its few.
            return Later()  # Its wait is bounded, and an endpoint may come back within it.
        if isinstance(planned, Refusal) and planned is not refusals.AT_LIMIT:
            return Refuse(request.id, planned)
        return self._admit(request, model, planned, now_s - waiting.arrived_s, now_s)

    def _admit(
        self, request: Request, model: Model, planned: Plan | Refusal, waited_s: float, now_s: float
    ) -> Dispatch | Refuse | Later:
        """Send a request its way, unless it must wait or is not worth starting."""
        plan = planned if isinstance(planned, Plan) else None
        best = plan.chosen if plan is not None else None
        ruling = self.admission.judge(request, model, best, waited_s, now_s=now_s)
        if isinstance(ruling, Refusal):
            return Refuse(request.id, ruling)
        if ruling is not None or plan is None:
            return ruling or Later()
        self._live[request.id] = _Live(request, plan)
        return self._dispatch(self._live[request.id], model, now_s)

    def _plan(
        self, request: Request, model: Model, excluded: frozenset[EndpointId], attempt: int, now_s: float
    ) -> Plan | Refusal:
        choice = self._scheduler.choose(request, model, excluded, now_s)
        if isinstance(choice, NoChoice):
            return refusals.why_nobody(request, model, choice.drops)
        decode = self.fleet.get(choice.best.decode.id)
        assert decode is not None, "the scheduler chose an endpoint that is not in the fleet"
        budget = self.budgets[model.name]
        if choice.is_outage and not budget.allows(model.fallback, decode):
            # Counted, since the share is of what was asked for: were only what is served counted, a
            # share once reached would let nothing pass any more.
            budget.note(is_fallback=False)
            if RungKind.COLOCATED not in model.fallback.rungs:
                return refusals.why_nobody(request, model, choice.drops)
            budget.refused_count += 1
            return refusals.saturated()
        is_split = choice.best.mode is Mode.SPLIT
        return Plan(
            request_id=request.id,
            chosen=choice.best,
            why=choice.why,
            dialect=dialect(decode.endpoint.pool, model),
            rungs=rungs(model, decode, choice.other_prefills, budget) if is_split else (),
            runner_up=choice.runner_up,
            drops=dict(choice.drops),
            prefill_deadline_s=model.disaggregation.prefill_deadline_s,
            transfer_deadline_s=model.disaggregation.transfer_deadline_s,
            attempt=attempt,
            is_outage=choice.is_outage,
            replica=self._replica,
        )

    def _dispatch(self, live: _Live, model: Model, now_s: float) -> Dispatch:
        plan, request = live.plan, live.request
        worker = plan.prefill or plan.decode
        self.ledger.begin(
            Entry(
                request_id=request.id,
                decode=plan.decode.id,
                worker=worker.id,
                prefill_us=round(plan.chosen.figures.prefill_s * 1e6),
                prompt_tokens=request.prompt_tokens,
                transfer_bytes=plan.chosen.figures.transfer_bytes,
                uncached_tokens=plan.chosen.figures.landing_tokens,
                is_streamed=request.is_streamed,
            ),
            now_s,
        )
        self.lessons.dispatched(request, plan, now_s)
        if plan.prefill is not None:
            self.paths.begin(plan.prefill.id, plan.decode.id, request.id)
        state = self._state_of(worker)
        if state is not None and request.is_generative:
            self.prefixes.compare(state, request, model)
        # Recorded when routed, not when answered, so that a burst of one prefix goes to one place.
        for endpoint in {worker.id: worker, plan.decode.id: plan.decode}.values():
            wait_s = plan.chosen.figures.ttft_s
            self._record_prefix(endpoint, request, model, now_s, wait_s=wait_s)
        return Dispatch(plan)

    def _record_prefix(
        self, endpoint: Endpoint, request: Request, model: Model, now_s: float, *, wait_s: float = 0.0
    ) -> None:
        state = self._state_of(endpoint)
        if state is not None and request.is_generative:
            self.prefixes.record(state, request, model, now_s, wait_s=wait_s)

    def _state_of(self, endpoint: Endpoint) -> EndpointState | None:
        """The endpoint of a plan as it is now; None if it is gone or is another process by now."""
        state = self.fleet.get(endpoint.id)
        return state if state is not None and state.endpoint.address == endpoint.address else None

    def _begin_response(self, live: _Live, served: ServedHeader | None, now_s: float) -> None:
        assert not live.has_begun, f"response {live.request.id} began twice"
        live.has_begun = True
        model = self._models.get(live.request.model)
        bandwidth_min = model.disaggregation.bandwidth_bytes_per_s_min if model is not None else 0.0
        self.lessons.began(live.request.id, served, bandwidth_min, now_s)
        self.ledger.finish_prefill(live.request.id, now_s)
        self._learn_path(live, served, now_s)
        fell_back = served is not None and any(r.rung is RungKind.COLOCATED for r in served.rungs)
        self._note_budget(live, is_fallback=fell_back or live.plan.is_outage)
        if model is not None and served is not None and served.prefill is not None:
            used = self._target(live.plan, served.prefill)
            if used is not None:
                self._record_prefix(used, live.request, model, now_s)

    def _note_budget(self, live: _Live, *, is_fallback: bool) -> None:
        budget = self.budgets.get(live.request.model)
        if budget is not None:
            budget.note(is_fallback=is_fallback)

    def _learn_path(self, live: _Live, served: ServedHeader | None, now_s: float) -> None:
        plan, request_id = live.plan, live.request.id
        if self._state_of(plan.decode) is None:
            return  # Its breakers went with it.
        judged: set[EndpointId] = set()
        if served is not None:
            for taken in served.rungs:
                prefill = self._target(plan, taken.target)
                if prefill is not None and self._state_of(prefill) is not None:
                    judged.add(prefill.id)
                    self.paths.fail((prefill.id, plan.decode.id), taken.reason, request_id, now_s)
            used = self._target(plan, served.prefill) if served.prefill is not None else None
            if served.mode is Mode.SPLIT and used is not None and self._state_of(used) is not None:
                judged.add(used.id)
                self.paths.succeed(used.id, plan.decode.id)
                moved_tokens = plan.chosen.figures.transfer_bytes // max(1, used.pool.kv_bytes_per_token)
                self._silent.answered(used.id, plan.decode.id, moved_tokens)
        if plan.prefill is not None and plan.prefill.id not in judged:
            self.paths.abandon(plan.prefill.id, plan.decode.id, request_id)

    @staticmethod
    def _target(plan: Plan, address: HostPort) -> Endpoint | None:
        """The prefill endpoint of this plan with that address."""
        for endpoint in (plan.prefill, *(rung.prefill for rung in plan.rungs)):
            if endpoint is not None and endpoint.address == address:
                return endpoint
        return None

    def _fail_decode(self, event: DecodeFailed, now_s: float) -> Action:
        live = self._live[event.id]
        assert not live.has_begun, f"request {event.id} failed over after its response began"
        self._learn_path(live, event.served, now_s)
        self._close(live, now_s)
        failed = live.plan.decode.id
        if event.reason is RungReason.DECODE_UNREACHABLE:
            self.fleet.mark_unreachable(failed)
        excluded = live.failed_decodes | {failed}
        attempt = live.plan.attempt + 1
        model = self._models.get(live.request.model)
        if model is None or event.is_final or not _may_try_other(model, attempt):
            return Refuse(event.id, refusals.exhausted(attempt))
        planned = self._plan(live.request, model, excluded, attempt, now_s)
        if isinstance(planned, Refusal):
            return Refuse(event.id, refusals.exhausted(attempt))
        self._live[event.id] = replace(live, plan=planned, failed_decodes=excluded)
        return self._dispatch(self._live[event.id], model, now_s)

    def _move(self, request_id: RequestId, address: HostPort, now_s: float) -> None:
        live = self._live[request_id]
        model, plan = self._models.get(live.request.model), live.plan
        states = (each.endpoint for each in self.fleet.at(address))
        decode = next((each for each in states if each.pool.model == live.request.model), None)
        if model is None or decode is None or decode.id == plan.decode.id:
            return
        assert not live.has_begun, f"request {request_id} was moved after its response began"
        self._learn_path(live, None, now_s)
        self._close(live, now_s)
        self._live[request_id] = replace(live, plan=moved(plan, decode))
        self._dispatch(self._live[request_id], model, now_s)

    def _end(self, request_id: RequestId, now_s: float) -> None:
        if self.admission.drop(request_id):
            return
        live = self._live[request_id]
        if not live.has_begun:
            self._learn_path(live, None, now_s)
        self._close(live, now_s)

    def _close(self, live: _Live, now_s: float) -> None:
        """Take a plan off the accounts, and with it those of endpoints that are gone."""
        plan = live.plan
        del self._live[live.request.id]
        self.lessons.dropped(live.request.id, now_s)
        self.ledger.end(live.request.id, now_s)
        for endpoint in (plan.decode, plan.prefill):
            if endpoint is not None and self.fleet.get(endpoint.id) is None:
                self.ledger.forget(endpoint.id)


def _may_try_other(model: Model, attempt: int) -> bool:
    return RungKind.OTHER_DECODE in model.fallback.rungs and attempt <= model.fallback.other_decode_max
