"""One simulated call between its arrival and its end."""

from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind, RungTaken, ServedHeader
from pdcoord.sim.coarse.links import Transfer
from pdcoord.sim.coarse.sequences import Sequence
from pdcoord.sim.routers.base import Place, Route
from pdcoord.sim.study.results import CallResult, Fate
from pdcoord.sim.workload.call import Call


class Flight:
    """One call.

    Attributes:
        route: where it was sent last; None while it is held or was shed.
        why: the router's word for that, or for shedding it.
        turn: grows with each route, so that news of an earlier one is told apart.
        tries: routes so far.
        leg: what runs for it now; the decode leg once the prefill is done.
        source: the finished prefill whose KV waits to be pulled.
        target: the place of the prefill that is tried now; None if `decode` computes the prompt.
        targets_left: whom to try after it.
        output_tokens: of its answer; fewer than were asked for where the context is full.
        has_output: the engine has answered its first token, be it still on its way.
        has_begun: the router was told of that.
        fate: None until it has ended.
    """

    __slots__ = (
        "cached_tokens",
        "call",
        "ended_s",
        "fate",
        "fell_back",
        "first_s",
        "has_begun",
        "has_output",
        "leg",
        "output_tokens",
        "prefill_done_s",
        "prefill_sent_s",
        "route",
        "routed_s",
        "rungs",
        "source",
        "target",
        "targets_left",
        "transfer",
        "tries",
        "turn",
        "why",
    )

    def __init__(self, call: Call) -> None:
        self.call = call
        self.output_tokens = call.output_tokens
        self.route: Route | None = None
        self.why = ""
        self.turn = 0
        self.tries = 0
        self.leg: Sequence | None = None
        self.source: Sequence | None = None
        self.transfer: Transfer | None = None
        self.target: int | None = None
        self.targets_left: tuple[int, ...] = ()
        self.rungs: list[RungTaken] = []
        self.fell_back = False
        self.has_output = False
        self.has_begun = False
        self.prefill_sent_s = 0.0
        self.prefill_done_s = 0.0
        self.cached_tokens = 0
        self.routed_s: float | None = None
        self.first_s: float | None = None
        self.ended_s: float | None = None
        self.fate: Fate | None = None

    def take_route(self, route: Route, now_s: float) -> None:
        """Go another way, with nothing left of the one before."""
        self.route = route
        self.why = route.why
        self.turn += 1
        self.tries += 1
        if self.routed_s is None:
            self.routed_s = now_s
        self.leg = self.source = self.transfer = None
        self.rungs = []
        self.fell_back = False
        is_split = route.prefill is not None and route.prefill != route.decode
        self.target = route.prefill if is_split else None
        self.targets_left = route.other_prefills if is_split else ()

    def take_rung(self, reason: RungReason, failed: HostPort) -> None:
        """Turn to the next prefill target, or to the decode place itself."""
        kind = RungKind.OTHER_PREFILL if self.targets_left else RungKind.COLOCATED
        self.rungs.append(RungTaken(rung=kind, reason=reason, target=failed))
        if self.targets_left:
            self.target, self.targets_left = self.targets_left[0], self.targets_left[1:]
        else:
            self.target = None
            self.fell_back = True

    def served(self, prefill: HostPort | None, now_s: float) -> ServedHeader:
        """What a sidecar would say of it, at its first output."""
        if prefill is None:
            return ServedHeader(mode=Mode.COLOCATED, rungs=tuple(self.rungs))
        return ServedHeader(
            mode=Mode.SPLIT,
            prefill=prefill,
            rungs=tuple(self.rungs),
            prefill_ms=(self.prefill_done_s - self.prefill_sent_s) * 1e3,
            transfer_ms=(now_s - self.prefill_done_s) * 1e3,
            cached_tokens=self.cached_tokens,
        )

    def result(
        self, places: tuple[Place, ...], ttft_s_max: float | None, tpot_s_max: float | None
    ) -> CallResult:
        """What is reported of it.

        Args:
            ttft_s_max: the run's own objective, for calls that have none; tpot_s_max alike.
        """
        call, route = self.call, self.route
        decode = "" if route is None else places[route.decode].endpoint.id
        return CallResult(
            id=call.id,
            kind=call.kind,
            tenant=call.tenant,
            priority=call.priority,
            prompt_tokens=call.prompt_tokens,
            output_tokens=self.output_tokens,
            at_s=call.at_s,
            routed_s=self.routed_s,
            first_s=self.first_s,
            ended_s=self.ended_s,
            cached_tokens=self.cached_tokens,
            prefill=decode if self.target is None else places[self.target].endpoint.id,
            decode=decode,
            why=self.why,
            fate=Fate.UNFINISHED if self.fate is None else self.fate,
            fell_back=self.fell_back,
            ttft_s_max=ttft_s_max if call.ttft_s_max is None else call.ttft_s_max,
            tpot_s_max=tpot_s_max if call.tpot_s_max is None else call.tpot_s_max,
        )
