"""A client's request in virtual time, and the gateway that sends it, has it resumed and checks the answer."""

from typing import TYPE_CHECKING

from pdcoord.core.blocks import block_keys
from pdcoord.core.events import (
    Action,
    DecodeFailed,
    Dispatch,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    StreamBroke,
    Wait,
)
from pdcoord.core.fleet import EndpointId, Role
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.errors import RungReason
from pdcoord.sim import messages as m
from pdcoord.sim.loop import Timer
from pdcoord.sim.scenario import MODEL_SEED, Arrival
from pdcoord.sim.tokens import answer_ids, pack_ids
from pdcoord.sim.virtual_sidecar import Began, Ended, Reply, Turned, VirtualHandoff
from sidecar.vocabulary import Resume

if TYPE_CHECKING:
    from pdcoord.sim.simulation import Simulation

STALL_S = 4.0
"""Silence of a begun stream after which this gateway takes it to be lost."""
_WATCH_S = 0.5


class CheckError(AssertionError):
    """The simulated system broke a rule; the message says which and where."""


class VirtualCall:
    """One request from its arrival to its one end.

    Attributes:
        end_count: how often it ended.
    """

    def __init__(self, simulation: "Simulation", request_id: RequestId, arrival: Arrival) -> None:
        self.id = request_id
        self.end_count = 0
        self._simulation = simulation
        self._arrival = arrival
        self._handoff: VirtualHandoff | None = None
        self._plan: Plan | None = None
        self._is_live = False
        self._is_waiting = False
        self._has_begun = False
        self._breaks = 0
        self._said: tuple[int, ...] = ()
        self._watch: Timer | None = None

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
                # A stream that had begun ends with an error event that says as much.
                self._count_end(Outcome.UPSTREAM_ERROR if self._breaks else Outcome.REFUSED)

    def _send(self, plan: Plan) -> None:
        simulation, arrival = self._simulation, self._arrival
        self._plan, self._has_begun = plan, False
        request = m.EngineRequest(
            id=self.id,
            prompt=arrival.prompt + self._said,
            output_tokens_max=arrival.output_tokens - len(self._said),
        )
        is_there = plan.decode.id not in simulation.dead_sidecars
        if not is_there or not simulation.engines.is_alive(plan.decode.address):
            # The pod is gone, its sidecar with it.
            self._handoff = None
            simulation.loop.after(0.001, lambda: self._fail(plan))
            return
        handoff = VirtualHandoff(
            simulation.loop,
            simulation.engines,
            plan,
            request,
            lambda reply: self._hear(plan, reply),
            resume=self._resumed_below(plan),
        )
        self._handoff = handoff
        handoff.begin()

    def _resumed_below(self, plan: Plan) -> Resume | None:
        """Where the sidecar may go on, if it is the one who does."""
        scenario = self._simulation.scenario
        if not scenario.is_resumed_by_sidecar or self._arrival.choice_count > 1:
            return None
        rules, decode = scenario.model.fallback, plan.decode
        others = [
            each for each in scenario.endpoints if each.pool.role is not Role.PREFILL and each != decode
        ]
        targets = tuple(each.address for each in others)[: rules.resume_tries_max]
        return Resume(
            targets, tries_max=rules.resume_tries_max, age_s_max=rules.resume_age_s_max, stall_s=STALL_S
        )

    def _fail(self, plan: Plan) -> None:
        if not self.end_count and self._plan is plan:
            self._simulation.tell(DecodeFailed(self.id, RungReason.DECODE_UNREACHABLE))

    def _hear(self, plan: Plan, reply: Reply) -> None:
        if self.end_count or self._plan is not plan:
            return
        simulation = self._simulation
        match reply:
            case Began(served):
                simulation.result.modes[served.mode] += 1
                simulation.result.rungs.update(rung.reason for rung in served.rungs)
                self._has_begun = True
                simulation.tell(ResponseBegan(self.id, served))
                if not simulation.scenario.is_resumed_by_sidecar:
                    self._look(plan, -1, simulation.loop.now_s)
            case Turned(served, reason, status):
                simulation.result.rungs.update(rung.reason for rung in served.rungs)
                if reason is None and status < 500:
                    self._end(Outcome.UPSTREAM_ERROR if self._breaks else Outcome.CLIENT_ERROR)
                else:
                    simulation.tell(DecodeFailed(self.id, RungReason.DECODE_ERROR, served))
            case Ended(tokens, True):
                self._take(tokens)
                if len(self._said) != self._arrival.output_tokens:
                    raise CheckError(
                        f"{self.id}: {len(self._said)} tokens, expected {self._arrival.output_tokens}"
                    )
                is_continued = self._handoff is not None and self._handoff.continuations > 0
                simulation.result.resumed_count += self._breaks > 0 or is_continued
                self._end(Outcome.OK)
            case Ended(tokens, _):
                self._break(tokens, RungReason.DECODE_ERROR)

    # Streams that break off.

    def _look(self, plan: Plan, token_count: int, since_s: float) -> None:
        """See whether the stream makes progress, and again and again until it is over."""
        handoff = self._handoff
        if self.end_count or self._plan is not plan or handoff is None:
            return
        simulation = self._simulation
        passed = handoff.passed
        if len(passed) != token_count:
            token_count, since_s = len(passed), simulation.loop.now_s
        elif simulation.loop.now_s - since_s > STALL_S:
            handoff.leave()
            self._break(passed, RungReason.DECODE_STALLED)
            return
        self._watch = simulation.loop.after(_WATCH_S, lambda: self._look(plan, token_count, since_s))

    def lose_sidecar(self, decode: EndpointId) -> None:
        """The sidecar of this endpoint died; if it had this request, its connections are closed."""
        plan, handoff = self._plan, self._handoff
        if self.end_count or plan is None or handoff is None or plan.decode.id != decode:
            return
        passed = handoff.passed
        handoff.leave()
        if self._has_begun:
            self._break(passed, RungReason.DECODE_ERROR)
        else:
            self._handoff = None
            self._fail(plan)

    def lose_gateway(self) -> None:
        """The gateway died; the client sees its connection break."""
        if not self._is_live or self.end_count:
            return
        if self._handoff is not None:
            self._handoff.leave()
        self._count_end(Outcome.UPSTREAM_ERROR)

    def _break(self, tokens: tuple[int, ...], reason: RungReason) -> None:
        self._take(tokens)
        self._plan = self._handoff = None
        self._breaks += 1
        if len(self._said) == self._arrival.output_tokens:
            # All is there but the end, which the gateway writes itself.
            self._simulation.result.resumed_count += 1
            self._end(Outcome.OK)
        elif self._arrival.choice_count > 1 or self._simulation.scenario.is_resumed_by_sidecar:
            self._end(Outcome.UPSTREAM_ERROR)
        else:
            self._simulation.tell(StreamBroke(self.id, reason, len(self._said)))

    def _take(self, tokens: tuple[int, ...]) -> None:
        """Whoever served it, the answer is the model's; what was broken off is a prefix of it."""
        self._said += tokens
        expected = answer_ids(MODEL_SEED, self._arrival.prompt, self._arrival.output_tokens)
        if self._said != expected[: len(self._said)]:
            raise CheckError(f"{self.id}: answered {self._said}, expected {expected}")

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
        if self._watch is not None:
            self._watch.cancel()
        self._simulation.result.outcomes[outcome] += 1
