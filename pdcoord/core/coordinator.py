"""The coordinator: one mutator that turns events into plans and keeps every account of them.

A request's life here, and nothing else is legal:
    RequestArrived -> Dispatch | Refuse | Wait
    Wait           -> Dispatch | Refuse (in answer to any later event) | RequestEnded
    Dispatch       -> ResponseBegan | DecodeFailed | RequestEnded
    ResponseBegan  -> StreamBroke | RequestEnded
    DecodeFailed   -> Dispatch | Refuse
    StreamBroke    -> Dispatch | Refuse
A refused request has ended.
"""

from dataclasses import replace

from pdcoord.core import hedging, refusals, resumes
from pdcoord.core.admission import Admission, Later
from pdcoord.core.alternatives import moved
from pdcoord.core.bookings import Bookings, Live
from pdcoord.core.canary import Canaries
from pdcoord.core.disagg import dialect
from pdcoord.core.doubts import Doubt
from pdcoord.core.events import (
    Action,
    DecodeFailed,
    DecodeMoved,
    Dispatch,
    Event,
    HedgeAsked,
    HedgeOver,
    ModelsReplaced,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    StreamBroke,
    TimePassed,
)
from pdcoord.core.fleet import (
    EndpointDraining,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    Fleet,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.hedging import HedgeEnd, Hedges
from pdcoord.core.intake import Intake
from pdcoord.core.kvcache import KvSignal
from pdcoord.core.ladder import FallbackBudget, rungs
from pdcoord.core.learned import LearnedSpeed
from pdcoord.core.leave import Leave
from pdcoord.core.ledger import Ledger
from pdcoord.core.lessons import Lessons
from pdcoord.core.model import Model
from pdcoord.core.paths import PathTable
from pdcoord.core.pathview import PATHS_SHOWN_MAX, PathView, path_views
from pdcoord.core.plan import Plan
from pdcoord.core.ports import SpeedModel
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.progress import Progress
from pdcoord.core.queues import Waiting
from pdcoord.core.remote import Accounts, RemoteLoad
from pdcoord.core.request import Request, RequestId
from pdcoord.core.scheduler import Choice, NoChoice, Scheduler
from pdcoord.core.served import PathEvidence, target_of
from pdcoord.core.silent import SilentFailures
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind

LIVE_REQUESTS_MAX = 65_536
"""Requests in all that one coordinator keeps account of; past it the next is refused."""


class Coordinator:
    """All state of routing. `handle` is the only way to change it."""

    def __init__(
        self, speed: SpeedModel | None = None, replica: str = "", *, has_canaries: bool = False
    ) -> None:
        """Knows no model yet.

        Args:
            has_canaries: whether somebody carries out what `canaries` asks for; else none keeps a path shut.
        """
        self.fleet = Fleet()
        self.ledger = Ledger()
        self.paths = PathTable()
        self.prefixes = Prefixes()
        self._silent = SilentFailures()
        self._evidence = PathEvidence(self.fleet, self.paths, self._silent)
        self._speed = speed if speed is not None else LearnedSpeed()
        self.lessons = Lessons(self.fleet, self.ledger, self.paths, self._speed)
        self.progress = Progress(self.fleet, self._served)
        self._replica = replica
        accounts = Accounts(
            self.fleet, self.ledger, self.paths, self._silent, self.lessons, self._speed, self.progress
        )
        self._accounts = accounts
        self.remote = RemoteLoad(accounts, self._served)
        self.canaries = Canaries(
            self.fleet, self.ledger, self.paths, replica=replica, has_runner=has_canaries
        )
        self._intake = Intake(accounts, self.prefixes, self.remote, self._served, canaries=self.canaries)
        self._bookings = Bookings(accounts, self.prefixes, self._evidence)
        self._models: dict[str, Model] = {}
        self._named: dict[str, Model] = {}
        self.budgets: dict[str, FallbackBudget] = {}
        self.hedges = Hedges()
        self._live: dict[RequestId, Live] = {}
        self.admission = Admission(self.fleet, self.ledger, self._speed)
        self._scheduler = Scheduler(self.fleet, self.ledger, self.prefixes, self.paths, self._speed)
        self._leave = Leave(self.fleet, self.paths)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event in; what must be done about it, and about requests that wait, comes out."""
        if self.progress.pass_time(now_s):
            self.admission.wake(now_s)
        actions = self._take(event, now_s)
        # Neither an arrival nor what engines cache, told thousands of times a second, makes room.
        if self.admission.count and not isinstance(event, RequestArrived | KvSignal):
            if not isinstance(event, TimePassed):
                self.admission.wake(now_s)
            actions += self.admission.serve(lambda waiting: self._decide_waiting(waiting, now_s), now_s)
        return actions

    def next_event_s(self) -> float | None:
        """When to pass a TimePassed in though nothing happens; None if there is no need."""
        times = (self.admission.next_event_s(), self.progress.next_event_s())
        return min((time_s for time_s in times if time_s is not None), default=None)

    def _take(self, event: Event, now_s: float) -> list[Action]:
        match event:
            case RequestArrived(request):
                return self._arrive(request, now_s)
            case ResponseBegan():
                self._begin_response(self._live[event.id], event, now_s)
            case DecodeFailed():
                return [self._fail_decode(event, now_s)]
            case StreamBroke():
                return [self._break_stream(event, now_s)]
            case DecodeMoved(request_id, address):
                self._move(request_id, address, now_s)
            case RequestEnded(request_id, outcome, output_tokens):
                pace = self.lessons.ended(request_id, outcome, output_tokens, now_s)
                self.progress.ended(request_id, outcome, pace, now_s)
                self._end(request_id, now_s)
            case ModelsReplaced(models):
                self._replace_models(models)
                return self.admission.keep_only(self._models)
            case HedgeAsked() | HedgeOver():
                return self._take_hedge(event, now_s)
            case EndpointSeen() | EndpointGone() | EndpointDraining() | SampleTaken() | SampleFailed():
                self._intake.take_signal(event, now_s)
            case _:
                self._intake.take_report(event, now_s)
        return []

    def model(self, name: str) -> Model | None:
        """The model of this name, alias or adapter."""
        return self._named.get(name)

    def _served(self, name: str) -> Model | None:
        """The model of a request under way: of its own name, since an alias may lead to another by now."""
        return self._models.get(name)

    def models(self) -> tuple[Model, ...]:
        """Every model once, in the policy's order."""
        return tuple(self._models.values())

    @property
    def live_count(self) -> int:
        """Requests that are dispatched or wait."""
        return len(self._live) + self.admission.count

    def blamed(self, request_id: RequestId, reason: RungReason) -> RungReason:
        """What a request's decode endpoint is held against for, where it failed for this reason."""
        live = self._live.get(request_id)
        return reason if live is None else resumes.blamed(self.fleet.get(live.plan.decode.id), reason)

    def silence_s_max(self, request_id: RequestId, now_s: float) -> float | None:
        """How long a request's stream may go without a token; None where it could not go on elsewhere."""
        live = self._live.get(request_id)
        model = self._models.get(live.request.model) if live is not None else None
        if live is None or model is None or live.begun_s is None:
            return None
        decode = live.plan.decode
        if resumes.why_not(model, live.resume_count, now_s - live.begun_s, moves=live.moved_count):
            return None
        excluded = resumes.excluded(live.failed_decodes, self.fleet) | {decode.id}
        if not resumes.has_other(self.fleet, live.request, excluded):
            return None
        load = self.ledger.load(decode.id)
        step_s = self._speed.step_s(decode, max(1, load.streaming_count), load.streaming_tokens)
        return resumes.silence_s_max(model, step_s, load, now_s)

    def doubt(self, endpoint: EndpointId) -> Doubt | None:
        """Why the endpoint's own metrics are not believed; None if they are."""
        return self._intake.doubts.doubt(endpoint)

    def fallback_share(self, model: str) -> float:
        """Share of the model's recent requests that fell back to a local prefill, 0..1."""
        budget = self.budgets.get(model)
        return budget.share if budget is not None else 0.0

    def paths_view(self, now_s: float, count_max: int = PATHS_SHOWN_MAX) -> list[PathView]:
        """Pairs of endpoints that could be paths, of all models; those that are not closed first."""
        return path_views(self.models(), self._accounts, self.canaries, now_s, count_max)

    def validate(self) -> None:
        """Assert every cross-reference; tests and the simulator call this after every event."""
        self.fleet.validate()
        self.ledger.validate()
        self.prefixes.validate()
        known = {state.endpoint.id for state in self.fleet.states()}
        self.paths.validate(known, self._live.keys() | self.remote.request_ids())
        self.remote.validate()
        self._silent.validate(known)
        self._intake.doubts.validate(known)
        self.progress.validate(self._live)
        self.canaries.validate()
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
        self._models = {model.name: model for model in models}
        self._named = {name: model for model in models for name in model.names}
        kept = self.budgets
        self.budgets = {}
        for model in models:
            budget, window = kept.get(model.name), model.fallback.window
            self.budgets[model.name] = (
                budget if budget is not None and budget.window == window else FallbackBudget(window)
            )
        self.hedges.replace_models(models)
        self.paths.forget_verdicts()
        self.canaries.replace_models(models)
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
        self.hedges.note(model.name, is_second=False)
        return self._dispatch(Live(request, plan), model, now_s)

    def _plan(
        self, request: Request, model: Model, excluded: frozenset[EndpointId], attempt: int, now_s: float
    ) -> Plan | Refusal:
        shunned = self.progress.shunned(now_s)
        choice = self._scheduler.choose(request, model, excluded, now_s, shunned)
        if isinstance(choice, NoChoice):
            return refusals.why_nobody(request, model, choice.drops)
        budget = self.budgets[model.name]

        def spare() -> Choice | None:
            return self._scheduler.choose_with_shunned_prefills(request, model, excluded, now_s, shunned)

        within = self._leave.choice(choice, request, model, budget, spare)
        if isinstance(within, Refusal):
            return within
        choice = within
        decode = self.fleet.get(choice.best.decode.id)
        assert decode is not None, "the scheduler chose an endpoint that is not in the fleet"
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
            hedge_after_s=hedging.after_s(request, model, choice.best.figures),
        )

    def _dispatch(self, live: Live, model: Model, now_s: float) -> Dispatch:
        self._live[live.request.id] = live
        self._bookings.open(live, model, now_s)
        return Dispatch(live.plan)

    def _begin_response(self, live: Live, began: ResponseBegan, now_s: float) -> None:
        served = began.served
        assert not live.has_begun, f"response {live.request.id} began twice"
        live.has_begun = True
        if live.begun_s is None:
            live.begun_s = now_s
        if served is not None:
            self.canaries.heard(live.plan.decode.id)
        model = self._models.get(live.request.model)
        bandwidth_min = model.disaggregation.bandwidth_bytes_per_s_min if model is not None else 0.0
        self.lessons.began(began, bandwidth_min, now_s)
        self.progress.began(live.request.id, served, now_s)
        self.ledger.finish_prefill(live.request.id, now_s)
        self._evidence.take(live.plan, served, now_s)
        fell_back = served is not None and any(r.rung is RungKind.COLOCATED for r in served.rungs)
        if fell_back or not live.request.is_resumed:  # A continuation was noted when it was planned.
            self._note_budget(live, is_fallback=fell_back or live.plan.is_outage)
        if model is not None and served is not None and served.prefill is not None:
            used = target_of(live.plan, served.prefill)
            if used is not None:
                self._bookings.record_prefix(used, live.request, model, now_s)

    def _note_budget(self, live: Live, *, is_fallback: bool) -> None:
        budget = self.budgets.get(live.request.model)
        if budget is not None:
            budget.note(is_fallback=is_fallback)

    def _fail_decode(self, event: DecodeFailed, now_s: float) -> Action:
        live = self._live[event.id]
        assert not live.has_begun, f"request {event.id} failed over after its response began"
        self._evidence.take(live.plan, event.served, now_s)
        reason = resumes.blamed(self.fleet.get(live.plan.decode.id), event.reason)
        self.progress.failed(event.id, reason, event.served, now_s)
        live = self._give_up(live, event.reason, now_s)
        attempt = live.plan.attempt + 1
        model = self._models.get(live.request.model)
        if live.request.is_resumed and not event.is_final:
            return self._resume(live, reason, now_s)
        if model is None or event.is_final or not _may_try_other(model, attempt):
            return Refuse(event.id, refusals.exhausted(attempt))
        excluded = resumes.excluded(live.failed_decodes, self.fleet)
        planned = self._plan(live.request, model, excluded, attempt, now_s)
        if isinstance(planned, Refusal):
            return Refuse(event.id, refusals.exhausted(attempt))
        return self._dispatch(replace(live, plan=planned), model, now_s)

    def _give_up(self, live: Live, reason: RungReason, now_s: float) -> Live:
        """Close the account of a plan whose endpoint failed or drains; the request with that noted."""
        self._close(live, now_s)
        decode = live.plan.decode
        resumes.mark_gone(self.fleet, decode.id, reason)
        state = self.fleet.get(decode.id)
        failed = resumes.failed_with(live.failed_decodes, decode, state, resumes.blamed(state, reason))
        return replace(live, failed_decodes=failed)

    def _break_stream(self, event: StreamBroke, now_s: float) -> Action:
        live = self._live[event.id]
        assert live.has_begun, f"the stream of {event.id} broke off before it began"
        reason = resumes.blamed(self.fleet.get(live.plan.decode.id), event.reason)
        self.progress.broke(event.id, reason, now_s)
        live = self._give_up(live, event.reason, now_s)
        tokens = max(live.output_tokens, event.output_tokens)
        request = resumes.grown(live.request, tokens - live.output_tokens)
        return self._resume(replace(live, request=request, output_tokens=tokens), reason, now_s)

    def _resume(self, live: Live, reason: RungReason, now_s: float) -> Action:
        """Have what is left of an answer made elsewhere; its old account is closed."""
        request, plan = live.request, live.plan
        model = self._models.get(request.model)
        if model is None:
            return Refuse(request.id, refusals.stream_lost("its model is no longer served"))
        assert live.begun_s is not None, f"the stream of {request.id} goes on though it never began"
        is_drain = reason is RungReason.DECODE_DRAINING
        tries, moves = live.resume_count, live.moved_count
        why = resumes.why_not(model, tries, now_s - live.begun_s, moves=moves, is_drain=is_drain)
        if why:
            return Refuse(request.id, refusals.stream_lost(why))
        for excluded in resumes.exclusions(live.failed_decodes, plan.decode.id, self.fleet):
            planned = self._plan(request, model, excluded, plan.attempt + 1, now_s)
            if isinstance(planned, Plan) or planned.reason is not RefuseReason.NO_ENDPOINTS:
                break
        if isinstance(planned, Refusal):
            why = f"no other endpoint can take it ({planned.reason})"
            return Refuse(request.id, refusals.stream_lost(why))
        tries, moves = tries + (not is_drain), moves + is_drain
        live = replace(live, plan=planned, has_begun=False, resume_count=tries, moved_count=moves)
        return self._dispatch(live, model, now_s)

    def _take_hedge(self, event: HedgeAsked | HedgeOver, now_s: float) -> list[Action]:
        """Send a request to a second endpoint beside the first, if one may be asked; or leave one of two."""
        if isinstance(event, HedgeOver):
            self._end_hedge(event, now_s)
            return []
        request_id = event.id
        live, second = self._live[request_id], hedging.id_of(request_id)
        model = self._models.get(live.request.model)
        barred = self.progress.quarantine.barred
        is_due = model is not None and not live.has_begun and second not in self._live
        attempt = live.plan.attempt + 1
        if model is None or not is_due or not _may_try_other(model, attempt):
            return []
        if not self.hedges.allows(model, live.plan, barred):
            self.hedges.count(model.name, HedgeEnd.WITHHELD)
            return []
        request, failed = replace(live.request, id=second), resumes.excluded(live.failed_decodes, self.fleet)
        for excluded in hedging.exclusions(live.plan, failed, barred):
            planned = self._plan(request, model, excluded, attempt, now_s)
            if isinstance(planned, Plan):
                self.hedges.note(model.name, is_second=True)
                return [self._dispatch(replace(live, request=request, plan=planned), model, now_s)]
        return []

    def _end_hedge(self, event: HedgeOver, now_s: float) -> None:
        first, second = self._live[event.id], self._live[hedging.id_of(event.id)]
        slower = first if event.is_won else second
        self.hedges.count(first.request.model, hedging.end_of(event))
        if event.reason is not None:
            self.progress.failed(slower.request.id, event.reason, event.served, now_s)
        elif event.is_won:
            self.progress.outrun(event.id, now_s)
        if event.reason is not None or event.is_won:
            decode = slower.plan.decode
            state, why = self.fleet.get(decode.id), event.reason or RungReason.DECODE_TIMEOUT
            failed = resumes.failed_with(first.failed_decodes, decode, state, resumes.blamed(state, why))
            first.failed_decodes = second.failed_decodes = failed
        self._evidence.take(slower.plan, event.served, now_s)
        if event.reason is not None:
            resumes.mark_gone(self.fleet, slower.plan.decode.id, event.reason)
        if event.is_won:
            del self._live[second.request.id]
        self._close(slower, now_s)
        if event.is_won:
            self._bookings.adopt(second, event.id)
            self._live[event.id] = second

    def _move(self, request_id: RequestId, address: HostPort, now_s: float) -> None:
        live = self._live[request_id]
        model, plan = self._models.get(live.request.model), live.plan
        states = (each.endpoint for each in self.fleet.at(address))
        decode = next((each for each in states if each.pool.model == live.request.model), None)
        if model is None or decode is None or decode.id == plan.decode.id:
            return
        assert not live.has_begun, f"request {request_id} was moved after its response began"
        self._evidence.take(live.plan, None, now_s)
        self._close(live, now_s)
        self._dispatch(replace(live, plan=moved(plan, decode)), model, now_s)

    def _end(self, request_id: RequestId, now_s: float) -> None:
        if self.admission.drop(request_id):
            return
        live = self._live[request_id]
        if not live.has_begun:
            self._evidence.take(live.plan, None, now_s)
        self._close(live, now_s)

    def _close(self, live: Live, now_s: float) -> None:
        """Take a plan off the accounts, and with it a second attempt that was made beside it."""
        for each in (live, self._live.get(hedging.id_of(live.request.id))):
            if each is not None:
                del self._live[each.request.id]
                self._bookings.close(each, now_s)


def _may_try_other(model: Model, attempt: int) -> bool:
    return RungKind.OTHER_DECODE in model.fallback.rungs and attempt <= model.fallback.other_decode_max
