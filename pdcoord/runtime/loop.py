"""The coordinator in a running process: its clock bound, its decisions remembered, its state shown."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pdcoord.core.alternatives import alternatives, least_busy
from pdcoord.core.canary import CanaryBegan, CanaryJudged
from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import (
    Action,
    DecodeFailed,
    DecodeMoved,
    Dispatch,
    Event,
    HedgeAsked,
    HedgeOver,
    ModelsReplaced,
    PathProbed,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    SidecarLost,
    SidecarReported,
    StreamBroke,
    StreamStalled,
    TimePassed,
)
from pdcoord.core.fleet import (
    Endpoint,
    EndpointDraining,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    Health,
    ModelName,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.kvcache import KvCleared, KvLost, KvRemoved, KvStored
from pdcoord.core.model import Model, PrefixMode
from pdcoord.core.observations import ObservationKind
from pdcoord.core.paths import BreakerState
from pdcoord.core.pathview import path_count
from pdcoord.core.plan import Plan
from pdcoord.core.probes import ProbeState
from pdcoord.core.request import RequestId
from pdcoord.core.trials import CanaryOrder
from pdcoord.feeds.declared import DeclaredFeed, Source
from pdcoord.feeds.scrapes import ScrapeFailure
from pdcoord.front.ports import Decided
from pdcoord.gateway.decisionviews import DecisionsView, DecisionView
from pdcoord.gateway.views import (
    FleetView,
    PathsView,
    PolicyView,
    endpoint_view,
    model_document,
    path_row,
)
from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefuseReason, RungReason
from pdcoord.protocol.plans import RungKind
from pdcoord.runtime import catalog
from pdcoord.runtime.decisions import DecisionLog
from pdcoord.runtime.gray_metrics import gray_samples
from pdcoord.runtime.metricspec import MetricSpec
from pdcoord.runtime.objectives import objective_gauges
from pdcoord.runtime.observe import GaugeSample, Metrics
from pdcoord.runtime.prefix_state import prefix_samples
from pdcoord.runtime.waits import Alarm, Waits


class CoordinatorLoop:
    """Drives one coordinator. Everything runs on one event loop, so one event is handled at a time.

    Attributes:
        is_draining: set when the process is about to stop; readiness says so from then on.
        is_starting: set until every listener is open; whoever asks one of them must not be sent to another.
        alarm: wakes the core when it wants to be; to be run beside.
        files: where the policy comes from, for GET /policy; set once, before serving.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        clock: Callable[[], float],
        decisions: DecisionLog,
        metrics: Metrics,
    ) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._decisions = decisions
        self._metrics = metrics
        self._waits = Waits(decisions, metrics)
        self.alarm = Alarm(self.handle, coordinator.next_event_s, clock)
        self.is_draining = False
        self.is_starting = False
        self.files: DeclaredFeed | None = None
        metrics.read_state_from(self._gauges)

    # For the gateway and the feeds.

    def handle(self, event: Event) -> list[Action]:
        """Hand an event to the core, and remember what is worth showing of it.

        Returns the actions of the request that the event is of; those of others have been delivered.
        """
        now_s = self._clock()
        if isinstance(event, DecodeFailed | StreamBroke):
            event = replace(event, reason=self.blamed(event.id, event.reason))
        actions = self._coordinator.handle(event, now_s)
        if actions:
            actions = self._waits.sort(event, actions, now_s)
        self._note(event, actions, now_s)
        self.alarm.look()
        return actions

    def _note(self, event: Event, actions: list[Action], now_s: float) -> None:
        match event:
            case RequestArrived(request):
                decision_s = self._clock() - now_s
                self._metrics.decision_seconds.observe(decision_s)
                self._decisions.arrived(request, actions, now_s=now_s, decision_s=decision_s)
            case DecodeFailed() | StreamBroke():
                self._note_failure(event, actions, now_s)
            case ResponseBegan(request_id, served):
                self._decisions.began(request_id, served, now_s=now_s)
                for seen in self._coordinator.lessons.take_ttfts():
                    ratio = seen.took_s / max(seen.predicted_s, 1e-3)
                    self._metrics.ttft_ratio.labels(seen.model, seen.mode).observe(ratio)
                self._metrics.count_rungs(served)
            case HedgeAsked() | HedgeOver():
                self._decisions.hedged(event, actions)
            case RequestEnded(request_id, outcome):
                self._waits.end(request_id)
                self._decisions.ended(request_id, outcome, now_s=now_s)
            case SampleFailed(endpoint_id, why):
                state = self._coordinator.fleet.get(endpoint_id)
                if state is not None:
                    self._metrics.scrape_failures.labels(state.endpoint.pool.name, why).inc()
            case (
                SampleTaken()
                | EndpointSeen()
                | EndpointGone()
                | EndpointDraining()
                | ModelsReplaced()
                | PathProbed()
                | CanaryBegan()
                | CanaryJudged()
                | TimePassed()
                | StreamStalled()
                | DecodeMoved()
                | SidecarReported()
                | SidecarLost()
                | KvStored()
                | KvRemoved()
                | KvCleared()
                | KvLost()
            ):
                pass

    def _note_failure(self, event: DecodeFailed | StreamBroke, actions: list[Action], now_s: float) -> None:
        is_refused = not any(isinstance(action, Dispatch) for action in actions)
        if isinstance(event, DecodeFailed):
            self._decisions.failed(event, actions, now_s=now_s)
            self._metrics.count_rungs(event.served)
            rung = RungKind.OTHER_DECODE
        else:
            self._decisions.broke(event, actions, now_s=now_s)
            rung = RungKind.RESUME
        self._metrics.count_rung(RungKind.REFUSE if is_refused else rung, event.reason)

    def silence_s_max(self, request_id: RequestId) -> float | None:
        """How long the request's stream may go without a token before it is better off elsewhere."""
        return self._coordinator.silence_s_max(request_id, self._clock())

    def blamed(self, request_id: RequestId, reason: RungReason) -> RungReason:
        """What the request's decode endpoint is held against for."""
        return self._coordinator.blamed(request_id, reason)

    def expect(self, request_id: RequestId, decided: Decided) -> None:
        """Have `decided` called, once, when a request that waits is dispatched or refused."""
        self._waits.expect(request_id, decided)

    def report_failed(self, endpoint_id: EndpointId, why: ScrapeFailure) -> None:
        """A sidecar could not be asked about its paths."""
        state = self._coordinator.fleet.get(endpoint_id)
        if state is not None:
            self._metrics.path_report_failures.labels(state.endpoint.pool.name, why).inc()

    def endpoints(self) -> Iterable[Endpoint]:
        """Every endpoint of the fleet."""
        return (state.endpoint for state in self._coordinator.fleet.states())

    def due_canaries(self) -> Sequence[CanaryOrder]:
        """Canaries to carry out now; none while the process stops."""
        return [] if self.is_draining else self._coordinator.canaries.due(self._clock())

    def precise_endpoints(self) -> Iterable[Endpoint]:
        """The endpoints of models whose prefixes are precise."""
        for model in self._coordinator.models():
            if model.prefix_mode is PrefixMode.PRECISE:
                yield from (state.endpoint for state in self._coordinator.fleet.of_model(model.name))

    def ready_endpoints(self, model: ModelName) -> Iterable[Endpoint]:
        """The endpoints of a model that take new work; those that serve badly where there are no others."""
        states = [state for state in self._coordinator.fleet.of_model(model) if state.is_eligible]
        is_out = self._coordinator.progress.quarantine.is_out
        well = [state.endpoint for state in states if not is_out(state.endpoint.id)]
        return well or [state.endpoint for state in states]

    def model(self, name: str) -> Model | None:
        """The model of this name, alias or adapter."""
        return self._coordinator.model(name)

    def models(self) -> tuple[Model, ...]:
        return self._coordinator.models()

    def alternatives(self, plan: Plan, allowed: frozenset[str] | None, count_max: int) -> Sequence[Endpoint]:
        """Endpoints that could stand in for a plan's decode endpoint, least busy first."""
        coordinator = self._coordinator
        barred = coordinator.progress.quarantine.barred
        return alternatives(
            coordinator.fleet, coordinator.ledger.accounts, plan, allowed, count_max, barred=barred
        )

    def any_endpoint(self, allowed: frozenset[str] | None) -> Endpoint | None:
        """A ready endpoint for a call that names no model."""
        coordinator = self._coordinator
        barred = coordinator.progress.quarantine.barred
        return least_busy(coordinator.fleet.states(), coordinator.ledger.accounts, allowed, barred=barred)

    def unready(self) -> Refusal | None:
        """Why no traffic should be sent here; None when ready."""
        if self.is_draining:
            return Refusal(RefuseReason.DRAINING, "This gateway is shutting down; use another one.")
        if self.is_starting:
            return _not_ready("Not all listeners are open yet.")
        models = self._coordinator.models()
        if not models:
            return _not_ready("No policy is loaded.")
        unserved = [model.name for model in models if not self._can_serve(model)]
        if unserved:
            return _not_ready(f"No ready endpoint can serve {', '.join(unserved)}; GET /fleet says why.")
        return None

    def _can_serve(self, model: Model) -> bool:
        """Whether a request for the model can run on what is ready, alone or split."""
        pools = [
            state.endpoint.pool
            for state in self._coordinator.fleet.of_model(model.name)
            if state.health is Health.READY
        ]
        if any(pool.can_serve_alone for pool in pools):
            return True
        return any(pool.can_prefill for pool in pools) and any(pool.can_decode for pool in pools)

    # For the admin listener.

    def fleet_view(self) -> FleetView:
        now_s = self._clock()
        coordinator = self._coordinator
        return FleetView(
            endpoints=[
                endpoint_view(
                    state,
                    coordinator.ledger.load(state.endpoint.id),
                    coordinator.progress.quarantine.trouble(state.endpoint.id),
                    coordinator.doubt(state.endpoint.id),
                    now_s=now_s,
                )
                for state in sorted(coordinator.fleet.states(), key=lambda state: state.endpoint.id)
            ]
        )

    def paths_view(self, limit: int) -> PathsView:
        """At most `limit` paths, those that are not closed first: they are what somebody looks for."""
        now_s = self._clock()
        coordinator = self._coordinator
        views = coordinator.paths_view(now_s, limit)
        total = path_count(coordinator.models(), coordinator.fleet)
        return PathsView(total=total, paths=[path_row(view, now_s) for view in views])

    def policy_view(self) -> PolicyView:
        files = self.files
        return PolicyView(
            models=[model_document(model) for model in self._coordinator.models()],
            warnings=[str(problem) for problem in files.warnings] if files is not None else [],
            problems={
                source: [str(problem) for problem in problems]
                for source, problems in (files.problems.items() if files is not None else ())
            },
        )

    def decisions_view(self, limit: int) -> DecisionsView:
        return DecisionsView(decisions=self._decisions.latest(limit, now_s=self._clock()))

    def decision_view(self, request_id: str) -> DecisionView | None:
        return self._decisions.view(request_id, now_s=self._clock())

    # For /metrics.

    def _gauges(self) -> Iterable[tuple[MetricSpec, Iterable[GaugeSample]]]:
        coordinator = self._coordinator
        by_health = Counter((s.endpoint.pool.name, s.health) for s in coordinator.fleet.states())
        pools = {pool.name for model in coordinator.models() for pool in model.pools}
        yield (
            catalog.ENDPOINTS,
            [((pool, h), float(by_health[pool, h])) for pool, h in itertools.product(sorted(pools), Health)],
        )
        yield catalog.LEDGER_OPEN, [((), float(coordinator.ledger.open_count))]
        waiting = list(coordinator.admission.classes())
        yield catalog.WAITING, [((name, str(level)), float(queue.count)) for name, level, queue in waiting]
        yield catalog.WAITING_WORK, [((name, str(level)), queue.work_s) for name, level, queue in waiting]
        shares = [((m.name,), coordinator.fallback_share(m.name)) for m in coordinator.models()]
        yield catalog.FALLBACK_SHARE, shares
        breakers = self._breaker_counts()
        yield (
            catalog.BREAKERS,
            [((state,), float(breakers[state])) for state in (BreakerState.OPEN, BreakerState.HALF_OPEN)],
        )
        probed = coordinator.paths.probe_states(self._clock())
        yield catalog.PROBED_PATHS, [((state,), float(probed[state])) for state in ProbeState]
        left_out = coordinator.lessons.left_out
        yield catalog.LEFT_OUT, [((kind,), float(left_out.get(kind, 0))) for kind in ObservationKind]
        stale = self.files.problems if self.files is not None else {}
        yield catalog.POLICY_STALE, [((source,), float(source in stale)) for source in Source]
        yield from prefix_samples(coordinator)
        yield from gray_samples(coordinator)
        yield from objective_gauges(coordinator, is_ready=self.unready() is None, now_s=self._clock())

    def _breaker_counts(self) -> Counter[BreakerState]:
        """Breakers by state; only endpoints with a tripped path are looked at, not the whole square."""
        now_s, paths = self._clock(), self._coordinator.paths
        counts: Counter[BreakerState] = Counter()
        for model in self._coordinator.models():
            states = self._coordinator.fleet.of_model(model.name)
            ids = [s.endpoint.id for s in states if s.endpoint.id in paths.troubled]
            counts.update(
                paths.state(prefill, decode, now_s) for prefill, decode in itertools.permutations(ids, 2)
            )
        return counts


def _not_ready(message: str) -> Refusal:
    return Refusal(RefuseReason.NO_ENDPOINTS, message, retry_after_s=RETRY_AFTER_S)
