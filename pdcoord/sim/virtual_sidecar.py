"""A sidecar in virtual time: the real handoff machine over emulated engines."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import xxhash

from pdcoord.core.plan import Plan
from pdcoord.front.upstream import plan_header
from pdcoord.protocol.errors import RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, PrefillTarget, ServedHeader
from pdcoord.protocol.tickets import ROOM_MAX, Ticket
from pdcoord.sim import messages as m
from pdcoord.sim.loop import Timer, VirtualLoop
from pdcoord.sim.virtual_engines import Heard, Lost, VirtualEngines
from sidecar import vocabulary as v
from sidecar.handoff import Handoff


class _TicketBody(msgspec.Struct, frozen=True):
    """What stands in a simulated ticket; opaque to everything between two engines."""

    engine_id: str
    request_id: str
    block_ids: tuple[tuple[int, ...], ...]
    address: HostPort
    token_count: int


@dataclass(frozen=True, slots=True)
class Began:
    """The response's head goes to the gateway."""

    served: ServedHeader


@dataclass(frozen=True, slots=True)
class Turned:
    """The sidecar, or the engine through it, answered with an error before any output.

    Attributes:
        reason: None if it is the engine's own answer with `status`.
    """

    served: ServedHeader
    reason: RefuseReason | None
    status: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer came to its end, whole or broken off."""

    tokens: tuple[int, ...]
    is_whole: bool


Reply = Began | Turned | Ended


HELD_POLL_S = 0.001
"""How often output that is held back is looked at again."""
HEALTH_POLL_S = 0.25
"""How often a dead or full engine is asked again that is to go on with its own stream."""


@dataclass(slots=True)
class _Leg:
    address: HostPort
    request_id: str
    status: int = 200


class VirtualHandoff:
    """One request at one sidecar.

    Args:
        resume: where the sidecar goes on with a stream that its engine lost; None where that is not its job.

    Attributes:
        continuations: how often it went on with its stream.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        engines: VirtualEngines,
        plan: Plan,
        request: m.EngineRequest,
        reply: Callable[[Reply], None],
        *,
        resume: v.Resume | None = None,
    ) -> None:
        self._loop = loop
        self._engines = engines
        self._plan = plan
        self._request = request
        self._reply = reply
        self._legs: dict[int, _Leg] = {}
        self._held: list[int] = []
        self._is_committed = False
        self._timer: Timer | None = None
        self._opened: set[int] = set()
        self._progress_s = 0.0
        self.continuations = 0
        self._machine = Handoff(replace(_order(plan), resume=resume))

    def begin(self) -> None:
        self._handle(v.Begun())

    @property
    def passed(self) -> tuple[int, ...]:
        """The tokens that the gateway has of it."""
        return tuple(self._held) if self._is_committed else ()

    def leave(self) -> None:
        """The client, or the gateway for it, closed the connection."""
        if self._machine.outcome is None:
            self._handle(v.ClientLeft())

    def _handle(self, event: v.Event) -> None:
        actions = self._machine.handle(event, self._loop.now_s)
        self._machine.validate()
        for action in actions:
            self._do(action)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._machine.deadline_s is not None:
            self._timer = self._loop.at(self._machine.deadline_s, self._meet_deadline)

    def _meet_deadline(self) -> None:
        machine = self._machine
        is_silent = self._progress_s + machine.quiet_s <= self._loop.now_s
        if machine.state is not v.State.RELAYING or is_silent:
            self._handle(v.DeadlinePassed())
        else:
            self._handle(v.Progressed(self._progress_s))

    def _do(self, action: v.Action) -> None:
        match action:
            case v.SendPrefill(leg, attempt, target):
                self._send_prefill(leg, attempt, target)
            case v.SendDecode(leg, attempt, ticket, peer):
                self._send_decode(leg, attempt, ticket, peer)
            case v.SendContinuation(leg, _, target):
                self.continuations += 1
                self._send_continuation(leg, target)
            case v.CancelLeg(leg):
                self._engines.abort(self._legs[leg].address, self._legs[leg].request_id)
            case v.Commit():
                self._commit()
            case v.PassOn(leg):
                self._reply(Turned(self._machine.served(), None, self._legs[leg].status))
            case v.Refuse(reason):
                self._reply(Turned(self._machine.served(), reason, 503))
            case v.BreakOff():
                self._reply(Ended(tuple(self._held), is_whole=False))
            case v.End() | v.OrphanLease():
                pass

    def _commit(self) -> None:
        self._progress_s = self._loop.now_s
        if not self._is_committed:
            self._is_committed = True
            self._reply(Began(self._machine.served()))

    def _send_prefill(self, leg: int, attempt: int, target: PrefillTarget) -> None:
        match self._machine.order.dialect:
            case DialectName.NIXLV2:
                request = self._leg_request(leg, is_prefill_leg=True, output_tokens_max=1)
            case DialectName.PDCOORD:
                transfer = self._transfer(attempt)
                request = self._leg_request(leg, is_prefill_leg=True, transfer=transfer, output_tokens_max=1)
            case DialectName.SGLANG:
                room = m.RoomCall(target.address, self._room(attempt))
                request = self._leg_request(leg, room=room, output_tokens_max=1)
        self._submit(leg, target.address, request, lambda heard: self._hear_prefill(leg, heard))

    def _send_decode(self, leg: int, attempt: int, ticket: Ticket | None, peer: PrefillTarget | None) -> None:
        self._held.clear()
        remote = room = None
        if ticket is not None:
            body = msgspec.json.decode(ticket, type=_TicketBody)
            remote = m.RemoteTicket(
                body.engine_id, body.request_id, body.block_ids, body.address, body.token_count
            )
        if peer is not None and self._machine.order.dialect is DialectName.PDCOORD:
            remote = m.RemoteTicket("", self._transfer(attempt), (), peer.address)
        elif peer is not None:
            room = m.RoomCall(peer.address, self._room(attempt))
        request = self._leg_request(
            leg, ticket=remote, room=room, output_tokens_max=self._request.output_tokens_max
        )
        address = self._plan.decode.address
        self._submit(leg, address, request, lambda heard: self._hear_decode(leg, heard))

    def _send_continuation(self, leg: int, target: HostPort) -> None:
        self._legs[leg] = _Leg(target, "")
        is_own = target == self._machine.order.engine
        if is_own and not self._engines.is_alive(target):
            self._loop.after(HEALTH_POLL_S, lambda: self._look_again(leg, target))
            return
        said, wanted = tuple(self._held), self._request.output_tokens_max
        left = None if wanted is None else wanted - len(said)
        if left == 0:
            self._loop.after(0.0, lambda: self._finish(leg))
            return
        request = self._leg_request(leg, prompt=self._request.prompt + said, output_tokens_max=left)
        self._submit(leg, target, request, lambda heard: self._hear_decode(leg, heard))

    def _is_own_continuation(self, leg: int) -> bool:
        machine = self._machine
        return machine.state is v.State.RESUMING and self._legs[leg].address == machine.order.engine

    def _look_again(self, leg: int, target: HostPort) -> None:
        if self._machine.outcome is None and self._legs_live(leg):
            self._send_continuation(leg, target)

    def _room(self, attempt: int) -> int:
        return xxhash.xxh3_64_intdigest(self._transfer(attempt).encode()) & ROOM_MAX

    def _transfer(self, attempt: int) -> str:
        """What both legs of an attempt name: unique, as a sidecar's own is."""
        return f"{self._request.id}/{self._plan.attempt}.{attempt}"

    def _leg_request(self, leg: int, **changes: Any) -> m.EngineRequest:
        own_id = f"{self._request.id}/{self._plan.attempt}.{leg}"
        return replace(self._request, id=own_id, **changes)

    def _submit(
        self, leg: int, address: HostPort, request: m.EngineRequest, hear: Callable[[Heard], None]
    ) -> None:
        self._legs[leg] = _Leg(address, request.id)
        if (address, self._plan.decode.address) in self._engines.cuts:
            self._loop.after(0.001, lambda: hear(Lost(request.id, was_reached=False)))
        else:
            self._engines.submit(address, request, hear)

    def _hear_prefill(self, leg: int, heard: Heard) -> None:
        if self._machine.outcome is not None:
            return
        match heard:
            case m.RequestDone():
                self._handle(v.PrefillAnswered(leg, self._ticket(leg, heard), heard.cached_tokens))
            case m.Rejected() | m.RequestFailed():
                self._handle(v.PrefillRejected(leg, _status(heard)))
            case Lost():
                self._handle(v.PrefillLost(leg, _fault(heard)))
            case m.TokenOut():
                pass

    def _ticket(self, leg: int, done: m.RequestDone) -> Ticket | None:
        issued = done.ticket
        if issued is None:
            return None
        body = _TicketBody(
            issued.engine_id,
            issued.request_id,
            issued.block_ids,
            self._legs[leg].address,
            issued.token_count,
        )
        return Ticket(msgspec.json.encode(body))

    def _hear_decode(self, leg: int, heard: Heard) -> None:
        if self._machine.outcome is not None or not self._legs_live(leg):
            return
        match heard:
            case m.TokenOut(token_id=token_id):
                self._held.append(token_id)
                self._progress_s = self._loop.now_s
                if leg not in self._opened:
                    self._opened.add(leg)
                    self._handle(v.DecodeOpened(leg))
            case m.RequestDone():
                self._finish(leg)
            case m.Rejected() | m.RequestFailed():
                self._legs[leg].status = _status(heard)
                if self._is_own_continuation(leg) and _status(heard) == 503:
                    target = self._legs[leg].address
                    self._loop.after(HEALTH_POLL_S, lambda: self._look_again(leg, target))
                    return
                self._fail_decode(leg, v.DecodeRejected(leg, _status(heard)))
            case Lost():
                self._fail_decode(leg, v.DecodeLost(leg, _fault(heard)))

    def _fail_decode(self, leg: int, before: v.DecodeRejected | v.DecodeLost) -> None:
        """After the first output an error can only end the body."""
        if leg not in self._opened:
            self._handle(before)
        elif self._is_committed:
            self._handle(v.DecodeLost(leg, v.Fault.LOST_IN_BODY))
        else:
            # Held back (sglang, pdcoord): the edge reads on only once the prefill leg is known good.
            self._loop.after(HELD_POLL_S, lambda: self._fail_held(leg, before))

    def _fail_held(self, leg: int, before: v.DecodeRejected | v.DecodeLost) -> None:
        if self._machine.outcome is None and self._legs_live(leg):
            self._fail_decode(leg, before)

    def _finish(self, leg: int) -> None:
        if self._machine.outcome is not None or not self._legs_live(leg):
            return
        if not self._is_committed:
            self._loop.after(HELD_POLL_S, lambda: self._finish(leg))
            return
        self._handle(v.DecodeEnded(leg))
        self._reply(Ended(tuple(self._held), is_whole=True))

    def _legs_live(self, leg: int) -> bool:
        return self._machine.legs[leg].is_live


def _order(plan: Plan) -> v.Order:
    asked = plan_header(plan)
    return v.Order(
        dialect=asked.dialect,
        engine=plan.decode.address,
        prefills=asked.prefills,
        is_colocated_allowed=asked.is_colocated_allowed,
        is_stream=True,
        prefill_deadline_s=asked.prefill_deadline_ms / 1e3,
        transfer_deadline_s=asked.transfer_deadline_ms / 1e3,
    )


def _fault(lost: Lost) -> v.Fault:
    return v.Fault.LOST_BEFORE_HEAD if lost.was_reached else v.Fault.UNREACHABLE


def _status(heard: m.Rejected | m.RequestFailed) -> int:
    if isinstance(heard, m.RequestFailed):
        return 500
    return 503 if heard.reason is m.RejectReason.QUEUE_FULL else 400
