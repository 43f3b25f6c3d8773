"""The coordinator: the one mutator, which hands each event to whoever keeps account of what it tells.

A request's life here, and nothing else is legal:
    RequestArrived -> Dispatch | Refuse | Wait
    Wait           -> Dispatch | Refuse (in answer to any later event) | RequestEnded
    Dispatch       -> ResponseBegan | DecodeFailed | RequestEnded
    ResponseBegan  -> StreamBroke | RequestEnded
    DecodeFailed   -> Dispatch | Refuse
    StreamBroke    -> Dispatch | Refuse
A refused request has ended.
"""

from pdcoord.core import refusals
from pdcoord.core.accounts import Accounts
from pdcoord.core.admission import Admission, Later
from pdcoord.core.bookings import Bookings, Live
from pdcoord.core.canary import Canaries
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
from pdcoord.core.failover import Failover
from pdcoord.core.fleet import (
    EndpointDraining,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    Fleet,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.hedges import Hedges
from pdcoord.core.intake import Intake
from pdcoord.core.kvcache import KvSignal
from pdcoord.core.ladder import FallbackBudget
from pdcoord.core.learned import LearnedSpeed
from pdcoord.core.ledger import Ledger
from pdcoord.core.lessons import Lessons
from pdcoord.core.model import Model
from pdcoord.core.models import Models
from pdcoord.core.paths import PathTable
from pdcoord.core.pathview import PATHS_SHOWN_MAX, PathView, path_views
from pdcoord.core.plan import Plan
from pdcoord.core.planning import Planner
from pdcoord.core.ports import SpeedModel
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.progress import Progress
from pdcoord.core.queues import Waiting
from pdcoord.core.remote import RemoteLoad
from pdcoord.core.request import Request, RequestId
from pdcoord.core.served import PathEvidence
from pdcoord.core.silent import SilentFailures
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason

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
        self._speed = speed if speed is not None else LearnedSpeed()
        self.lessons = Lessons(self.fleet, self.ledger, self.paths, self._speed)
        self._models = Models()
        self.progress = Progress(self.fleet, self._models.get)
        accounts = self._accounts = Accounts(
            self.fleet, self.ledger, self.paths, self._silent, self.lessons, self._speed, self.progress
        )
        self.remote = RemoteLoad(accounts, self._models.get)
        self.canaries = Canaries(
            self.fleet, self.ledger, self.paths, replica=replica, has_runner=has_canaries
        )
        self._intake = Intake(accounts, self.prefixes, self.remote, self._models.get, canaries=self.canaries)
        self.admission = Admission(self.fleet, self.ledger, self._speed)
        evidence = PathEvidence(self.fleet, self.paths, self._silent)
        self.bookings = Bookings(accounts, self.prefixes, self._models, self.canaries, evidence)
        self._planner = Planner(accounts, self.prefixes, self._models, replica)
        self._failover = Failover(accounts, self._models, self._planner, self.bookings, evidence)
        self.hedges = Hedges(accounts, self._models, self._planner, self.bookings, evidence)

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
                self.bookings.begin(event, now_s)
            case DecodeFailed() | StreamBroke():
                return self._failover.handle(event, now_s)
            case DecodeMoved():
                self.bookings.move(event, now_s)
            case RequestEnded():
                if not self.admission.drop(event.id):
                    self.bookings.end(event, now_s)
            case ModelsReplaced(models):
                return self._replace_models(models)
            case HedgeAsked() | HedgeOver():
                return self.hedges.handle(event, now_s)
            case EndpointSeen() | EndpointGone() | EndpointDraining() | SampleTaken() | SampleFailed():
                self._intake.take_signal(event, now_s)
            case _:
                self._intake.take_report(event, now_s)
        return []

    def model(self, name: str) -> Model | None:
        """The model of this name, alias or adapter."""
        return self._models.find(name)

    def models(self) -> tuple[Model, ...]:
        """Every model once, in the policy's order."""
        return self._models.all()

    @property
    def budgets(self) -> dict[str, FallbackBudget]:
        """Of local prefills, by model."""
        return self._models.budgets

    @property
    def live_count(self) -> int:
        """Requests that are dispatched or wait."""
        return len(self.bookings.live) + self.admission.count

    def blamed(self, request_id: RequestId, reason: RungReason) -> RungReason:
        """What a request's decode endpoint is held against for, where it failed for this reason."""
        return self._failover.blamed(request_id, reason)

    def silence_s_max(self, request_id: RequestId, now_s: float) -> float | None:
        """How long a request's stream may go without a token; None where it could not go on elsewhere."""
        return self._failover.silence_s_max(request_id, now_s)

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
        self._models.validate()
        known, live = {state.endpoint.id for state in self.fleet.states()}, self.bookings.live
        self.paths.validate(known, live.keys() | self.remote.request_ids())
        self.remote.validate()
        self._silent.validate(known)
        self._intake.doubts.validate(known)
        self.canaries.validate()
        self._speed.validate()
        self.bookings.validate()
        self.hedges.validate()
        in_use = self.bookings.endpoint_ids() | self.remote.endpoint_ids()
        assert {name for name, _ in self.ledger.loads()} <= known | in_use, "an account of nobody"
        self.admission.validate()
        assert not any(request_id in self.admission for request_id in live), "both live and waiting"

    def _replace_models(self, models: tuple[Model, ...]) -> list[Action]:
        self._models.replace(models)
        self.hedges.replace_models(models)
        self.paths.forget_verdicts()
        self.canaries.replace_models(models)
        self.prefixes.replace_models(models)
        return self.admission.keep_only(self._models.by_name)

    def _arrive(self, request: Request, now_s: float) -> list[Action]:
        is_new = request.id not in self.bookings.live and request.id not in self.admission
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
        planned = self._planner.plan(request, model, frozenset(), 0, now_s)
        if isinstance(planned, Refusal) and planned is not refusals.AT_LIMIT:
            return [Refuse(request.id, planned)]
        decided = self._admit(request, model, planned, 0.0, now_s)
        if isinstance(decided, Later):
            return self.admission.enqueue(request, model, decided, now_s)
        return [decided]

    def _decide_waiting(self, waiting: Waiting, now_s: float) -> Dispatch | Refuse | Later:
        """Whether a request that waits can go by now."""
        request, model = waiting.request, self._models.by_name[waiting.request.model]
        planned = self._planner.plan(request, model, frozenset(), 0, now_s)
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
        return self.bookings.open(Live(request, plan), model, now_s)
