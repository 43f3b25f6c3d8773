"""A whole deployment in virtual time: clients, coordinator, sidecars, engines and what goes wrong."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from random import Random

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import Dispatch, Event, ModelsReplaced, Outcome, TimePassed
from pdcoord.core.fleet import (
    EndpointDraining,
    EndpointId,
    EndpointSeen,
    Health,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.plan import Plan
from pdcoord.core.request import RequestId
from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.plans import Mode
from pdcoord.sim.loop import Timer, VirtualLoop
from pdcoord.sim.scenario import FaultKind, Scenario
from pdcoord.sim.virtual_call import CheckError, VirtualCall
from pdcoord.sim.virtual_engines import VirtualEngines
from pdcoord.sim.virtual_trouble import Trouble

SCRAPE_S = 0.2
QUIET_S = 180.0
"""After the last arrival: longer than every deadline and lease that a scenario draws."""


@dataclass(slots=True)
class Result:
    """What came of one scenario.

    Attributes:
        outcomes: how each request ended, from the client's side.
        modes: how those that were answered were served.
        rungs: fallbacks taken, by reason.
        struck: faults that struck, by kind.
        resumed_count: streams that broke off, went on elsewhere and came whole.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    modes: Counter[Mode] = field(default_factory=Counter)
    rungs: Counter[RungReason] = field(default_factory=Counter)
    refusals: Counter[RefuseReason] = field(default_factory=Counter)
    struck: Counter[FaultKind] = field(default_factory=Counter)
    resumed_count: int = 0
    dispatch_count: int = 0
    wait_count: int = 0


class Simulation:
    """Runs one scenario and checks every rule on the way.

    Attributes:
        draining: endpoints that were announced to go.
        dead_sidecars: endpoints whose sidecar does not run.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.loop = VirtualLoop()
        self.coordinator = Coordinator()
        self.result = Result()
        rng = Random(scenario.seed + 1)  # noqa: S311 - drawn again from the seed
        self.engines = VirtualEngines(self.loop, rng)
        self.endpoints = {endpoint.id: endpoint for endpoint in scenario.endpoints}
        self.draining: set[EndpointId] = set()
        self.dead_sidecars: set[EndpointId] = set()
        self._trouble = Trouble(self)
        self.calls: dict[RequestId, VirtualCall] = {}
        self._wake: Timer | None = None

    def run(self) -> Result:
        """Run to the end.

        Raises:
            CheckError: if a rule was broken.
        """
        for endpoint in self.scenario.endpoints:
            self.engines.add(endpoint.address, self.scenario.settings[endpoint.id])
        self.inform()
        end_s = self.scenario.arrivals[-1].at_s + QUIET_S
        self._scrape(end_s)
        for index, arrival in enumerate(self.scenario.arrivals):
            call = VirtualCall(self, RequestId(f"r{index}"), arrival)
            self.calls[call.id] = call
            self.loop.at(arrival.at_s, call.begin)
        for fault in self.scenario.faults:
            self.loop.at(fault.at_s, partial(self._trouble.strike, fault))
        self.loop.run(until_s=end_s)
        self._check_end()
        return self.result

    def inform(self) -> None:
        """Tell a coordinator that knows nothing of the model and of who serves it."""
        self.tell(ModelsReplaced((self.scenario.model,)))
        for endpoint in self.scenario.endpoints:
            self.tell(EndpointSeen(endpoint))
            if endpoint.id in self.draining:
                self.tell(EndpointDraining(endpoint.id))

    def tell(self, event: Event) -> None:
        """Pass an event to the coordinator, check the plans that come of it, and pass those on."""
        actions = self.coordinator.handle(event, self.loop.now_s)
        self.coordinator.validate()
        for action in actions:
            if isinstance(action, Dispatch):
                self._check_plan(action.plan)
        self._set_timer()
        for action in actions:
            self.calls[action.id].act(action)

    def _set_timer(self) -> None:
        """Have the coordinator look at those who wait when it wants to."""
        next_s = self.coordinator.next_event_s()
        if self._wake is not None:
            self._wake.cancel()
        self._wake = None if next_s is None else self.loop.at(next_s, lambda: self.tell(TimePassed()))

    def _scrape(self, end_s: float) -> None:
        for endpoint in self.endpoints.values():
            sample = self.engines.sample(endpoint.address)
            if sample is None:
                self.tell(SampleFailed(endpoint.id, "connection refused"))
            else:
                self.tell(SampleTaken(endpoint.id, sample))
        is_quiet = bool(self.calls) and all(call.end_count for call in self.calls.values())
        period_s = 10 * SCRAPE_S if is_quiet else SCRAPE_S
        if self.loop.now_s + period_s < end_s:
            self.loop.after(period_s, lambda: self._scrape(end_s))

    def _check_plan(self, plan: Plan) -> None:
        self.result.dispatch_count += 1
        for endpoint_id in plan.endpoint_ids():
            state = self.coordinator.fleet.get(endpoint_id)
            if endpoint_id in self.draining:
                raise CheckError(f"{plan.request_id}: planned on draining {endpoint_id}")
            if state is None or state.health is not Health.READY:
                raise CheckError(f"{plan.request_id}: planned on {endpoint_id}, which is not ready")
        for prefill in (plan.prefill, *(rung.prefill for rung in plan.rungs)):
            if prefill is None:
                continue
            verdict = self.coordinator.paths.verdict(prefill.pool, plan.decode.pool)
            if not verdict.is_possible:
                raise CheckError(f"{plan.request_id}: {prefill.id} cannot feed {plan.decode.id}: {verdict}")

    def _check_end(self) -> None:
        not_once = [call.id for call in self.calls.values() if call.end_count != 1]
        if not_once:
            raise CheckError(f"requests that did not end exactly once: {not_once}")
        if self.coordinator.ledger.open_count or self.coordinator.live_count:
            raise CheckError(f"{self.coordinator.ledger.open_count} requests are left in the ledger")
        self.coordinator.validate()
        for model in self.engines.models():
            model.validate()
            if model.running_count or model.waiting_count or model.pool.pinned_count:
                raise CheckError(
                    f"{model.settings.name} is left with {model.running_count} running, "
                    f"{model.waiting_count} waiting and {model.pool.pinned_count} pinned blocks"
                )
