"""A whole deployment in virtual time: clients, coordinator, sidecars, engines and what goes wrong."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from random import Random

from pdcoord.core.blocks import block_keys
from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import (
    Action,
    DecodeFailed,
    Dispatch,
    Event,
    ModelsReplaced,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    TimePassed,
    Wait,
)
from pdcoord.core.fleet import (
    Endpoint,
    EndpointDraining,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    Health,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.plans import Mode
from pdcoord.sim import messages as m
from pdcoord.sim.loop import Timer, VirtualLoop
from pdcoord.sim.scenario import MODEL_SEED, Arrival, Fault, FaultKind, Scenario
from pdcoord.sim.tokens import answer_token, mix, pack_ids, prompt_digest
from pdcoord.sim.virtual_engines import VirtualEngines
from pdcoord.sim.virtual_sidecar import Began, Ended, Reply, Turned, VirtualHandoff

SCRAPE_S = 0.2
QUIET_S = 60.0
"""After the last arrival: longer than every deadline and lease that a scenario draws."""


class CheckError(AssertionError):
    """The simulated system broke a rule; the message says which and where."""


@dataclass(slots=True)
class Result:
    """What came of one scenario.

    Attributes:
        outcomes: how each request ended, from the client's side.
        modes: how those that were answered were served.
        rungs: fallbacks taken, by reason.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    modes: Counter[Mode] = field(default_factory=Counter)
    rungs: Counter[RungReason] = field(default_factory=Counter)
    refusals: Counter[RefuseReason] = field(default_factory=Counter)
    dispatch_count: int = 0
    wait_count: int = 0


class Simulation:
    """Runs one scenario and checks every rule on the way."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.loop = VirtualLoop()
        self.coordinator = Coordinator()
        self.result = Result()
        rng = Random(scenario.seed + 1)  # noqa: S311 - drawn again from the seed
        self.engines = VirtualEngines(self.loop, rng)
        self._endpoints = {endpoint.id: endpoint for endpoint in scenario.endpoints}
        self._draining: set[EndpointId] = set()
        self._calls: dict[RequestId, _Call] = {}
        self._wake: Timer | None = None

    def run(self) -> Result:
        """Run to the end.

        Raises:
            CheckError: if a rule was broken.
        """
        self.tell(ModelsReplaced((self.scenario.model,)))
        for endpoint in self.scenario.endpoints:
            self.engines.add(endpoint.address, self.scenario.settings[endpoint.id])
            self.tell(EndpointSeen(endpoint))
        end_s = self.scenario.arrivals[-1].at_s + QUIET_S
        self._scrape(end_s)
        for index, arrival in enumerate(self.scenario.arrivals):
            call = _Call(self, RequestId(f"r{index}"), arrival)
            self._calls[call.id] = call
            self.loop.at(arrival.at_s, call.begin)
        for fault in self.scenario.faults:
            self.loop.at(fault.at_s, partial(self._strike, fault))
        self.loop.run(until_s=end_s)
        self._check_end()
        return self.result

    def tell(self, event: Event) -> None:
        """Pass an event to the coordinator, check the plans that come of it, and pass those on."""
        actions = self.coordinator.handle(event, self.loop.now_s)
        self.coordinator.validate()
        for action in actions:
            if isinstance(action, Dispatch):
                self._check_plan(action.plan)
        self._set_timer()
        for action in actions:
            self._calls[action.id].act(action)

    def _set_timer(self) -> None:
        """Have the coordinator look at those who wait when it wants to."""
        next_s = self.coordinator.next_event_s()
        if self._wake is not None:
            self._wake.cancel()
        self._wake = None if next_s is None else self.loop.at(next_s, lambda: self.tell(TimePassed()))

    def _scrape(self, end_s: float) -> None:
        for endpoint in self._endpoints.values():
            sample = self.engines.sample(endpoint.address)
            if sample is None:
                self.tell(SampleFailed(endpoint.id, "connection refused"))
            else:
                self.tell(SampleTaken(endpoint.id, sample))
        if self.loop.now_s + SCRAPE_S < end_s:
            self.loop.after(SCRAPE_S, lambda: self._scrape(end_s))

    def _strike(self, fault: Fault) -> None:
        endpoint = self._endpoints[fault.endpoint]
        other = self._endpoints[fault.other or fault.endpoint]
        match fault.kind:
            case FaultKind.KILL:
                if not self.engines.is_alive(endpoint.address):
                    return
                self.engines.kill(endpoint.address)
            case FaultKind.CUT:
                self.engines.cut(endpoint.address, other.address)
            case FaultKind.CUT_KV:
                self.engines.cut_kv(endpoint.address, other.address)
            case FaultKind.SLOW_LINK:
                self.engines.slow_link(endpoint.address, 0.01)
            case FaultKind.DRAIN:
                self._draining.add(endpoint.id)
                self.tell(EndpointDraining(endpoint.id))
            case FaultKind.POLICY:
                self.tell(ModelsReplaced((self.scenario.model,)))
        if fault.ends_after_s is not None:
            self.loop.after(fault.ends_after_s, lambda: self._mend(fault, endpoint, other))

    def _mend(self, fault: Fault, endpoint: Endpoint, other: Endpoint) -> None:
        match fault.kind:
            case FaultKind.KILL:
                if not self.engines.is_alive(endpoint.address):
                    self.engines.start(endpoint.address)
            case FaultKind.CUT | FaultKind.CUT_KV:
                self.engines.mend(endpoint.address, other.address)
            case FaultKind.SLOW_LINK:
                self.engines.slow_link(endpoint.address, 1.0)
            case FaultKind.DRAIN:
                self.tell(EndpointGone(endpoint.id))
                self.tell(EndpointSeen(endpoint))
                self._draining.discard(endpoint.id)
            case FaultKind.POLICY:
                pass

    def _check_plan(self, plan: Plan) -> None:
        self.result.dispatch_count += 1
        for endpoint_id in plan.endpoint_ids():
            state = self.coordinator.fleet.get(endpoint_id)
            if endpoint_id in self._draining:
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
        not_once = [call.id for call in self._calls.values() if call.end_count != 1]
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


class _Call:
    """One client's request and the gateway that serves it."""

    def __init__(self, simulation: Simulation, request_id: RequestId, arrival: Arrival) -> None:
        self.id = request_id
        self.end_count = 0
        self._simulation = simulation
        self._arrival = arrival
        self._handoff: VirtualHandoff | None = None
        self._is_live = False
        self._is_waiting = False

    def begin(self) -> None:
        arrival = self._arrival
        model = self._simulation.scenario.model
        keys = block_keys(
            pack_ids(arrival.prompt), model=model.name, cache_salt="", block_bytes=model.prefix_block_bytes
        )
        request = Request(
            id=self.id,
            model=model.name,
            prompt_tokens=len(arrival.prompt),
            is_prompt_counted=True,
            block_keys=keys,
            block_tokens=model.prefix_block_tokens,
            output_tokens_max=arrival.output_tokens,
            choice_count=arrival.choice_count,
            tenant=arrival.tenant,
            priority=arrival.priority,
            slo=arrival.slo,
        )
        if arrival.leaves_after_s is not None:
            self._simulation.loop.after(arrival.leaves_after_s, self._leave)
        self._simulation.tell(RequestArrived(request))

    def act(self, action: Action) -> None:
        """Do what the coordinator says of this call.

        Raises:
            CheckError: if it was told so already.
        """
        if self.end_count or (self._is_live and not self._is_waiting and isinstance(action, Wait)):
            raise CheckError(f"{self.id}: {type(action).__name__} comes too late")
        self._is_waiting = isinstance(action, Wait)
        match action:
            case Dispatch(plan):
                self._is_live = True
                self._send(plan)
            case Wait():
                self._is_live = True
                self._simulation.result.wait_count += 1
            case Refuse(_, refusal):
                self._simulation.result.refusals[refusal.reason] += 1
                self._is_live = False
                self._count_end(Outcome.REFUSED)

    def _send(self, plan: Plan) -> None:
        simulation = self._simulation
        request = m.EngineRequest(
            id=self.id, prompt=self._arrival.prompt, output_tokens_max=self._arrival.output_tokens
        )
        if not simulation.engines.is_alive(plan.decode.address):
            # The pod is gone, its sidecar with it.
            simulation.loop.after(0.001, self._decode_unreachable)
            return
        handoff = VirtualHandoff(simulation.loop, simulation.engines, plan, request, self._hear)
        self._handoff = handoff
        handoff.begin()

    def _decode_unreachable(self) -> None:
        if not self.end_count:
            self._simulation.tell(DecodeFailed(self.id, RungReason.DECODE_UNREACHABLE))

    def _hear(self, reply: Reply) -> None:
        if self.end_count:
            return
        simulation = self._simulation
        match reply:
            case Began(served):
                simulation.result.modes[served.mode] += 1
                simulation.result.rungs.update(rung.reason for rung in served.rungs)
                simulation.tell(ResponseBegan(self.id, served))
            case Turned(served, reason, status):
                simulation.result.rungs.update(rung.reason for rung in served.rungs)
                if reason is None and status < 500:
                    self._end(Outcome.CLIENT_ERROR)
                else:
                    simulation.tell(DecodeFailed(self.id, RungReason.DECODE_ERROR, served))
            case Ended(tokens, is_whole):
                self._check_answer(tokens, is_whole=is_whole)
                self._end(Outcome.OK if is_whole else Outcome.UPSTREAM_ERROR)

    def _leave(self) -> None:
        if self.end_count:
            return
        handoff = self._handoff
        if self._is_live:
            self._end(Outcome.CLIENT_GONE)
        if handoff is not None:
            handoff.leave()

    def _end(self, outcome: Outcome) -> None:
        self._count_end(outcome)
        self._simulation.tell(RequestEnded(self.id, outcome))

    def _count_end(self, outcome: Outcome) -> None:
        self.end_count += 1
        self._simulation.result.outcomes[outcome] += 1

    def _check_answer(self, tokens: tuple[int, ...], *, is_whole: bool) -> None:
        """Whoever served it, the answer is the model's; what was broken off is a prefix of it."""
        content = mix(MODEL_SEED, prompt_digest(self._arrival.prompt))
        expected = tuple(answer_token(content, i, 0) for i in range(self._arrival.output_tokens))
        if tokens != (expected if is_whole else expected[: len(tokens)]):
            raise CheckError(f"{self.id}: answered {tokens}, expected {expected}")
