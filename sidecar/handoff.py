"""The life of one request across its legs, as one table of transitions.

`TRANSITIONS`, below the rules, is the machine: what may happen in which state, which rule answers, and
where that may lead. A pair that is not listed is an error of ours and raises HandoffError.

1.  An event of a leg that is over is dropped: the leg was cancelled while its last words were on the way.
2.  nixlv2 sends the prefill leg, and only with its ticket the decode leg. sglang and pdcoord send both at
    once.
3.  A prefill answer without a ticket is no success in nixlv2 and pdcoord: nothing was kept for the decode
    engine, which would quietly prefill again.
4.  A prefill engine's own 4xx is the client's fault and is passed on as it came. 408, 429 and 503 are
    overload, every other status is an error; both take the next rung.
5.  The next rung is the next allowed prefill target, then colocated where that is allowed, then refuse.
    Where the decode engine itself is at fault no other prefill target is tried: none could help.
6.  No byte reaches the client before Commit, and Commit comes with the decode leg's first output: engines
    send the head of a 200 before KV has moved. sglang and pdcoord also wait until the prefill leg is known
    good.
7.  Until Commit a failed decode leg of a split request takes the next rung, but a 4xx is passed on. A
    colocated leg's own answer is passed on whatever it is: nothing is left to try here.
8.  After Commit a failure breaks the answer off, unless it is a stream that may be continued (14).
9.  Whatever ends the request or an attempt cancels every leg that still runs.
10. A ticket whose KV nothing shows to have been pulled leaves an orphaned lease.
11. Every wait has a deadline: `deadline_s` is set in every state but idle and done.
12. End is given exactly once, last.
13. A vLLM decode engine prefills itself if no KV comes. So in pdcoord output that is held when the prefill
    leg fails, however it fails, is a whole answer: it is committed and counts as the colocated rung. In
    sglang it is worth nothing.
14. A stream that breaks off, ends in its middle, stalls or is given up by its engine goes on at the decode
    endpoints that the plan names, each once and in order, and after them at the own engine, until that does
    not come back in time; a continuation that shows no output takes the next. Tries, age and the time
    without output of each are bounded.
15. What cannot be continued ends with an error event that says why. Whoever resumes above is told nothing:
    the connection ends, and that is the word for it.
16. Shortly before the process ends, what has not begun is refused, so that it can be asked elsewhere, and
    what is resumed above is broken off. The rest goes on to the last moment.
17. Comments and pings are no output. A colocated stream that began with them may be without any as long as a
    prefill leg may take, and a stall besides; then it counts as stalled.
18. While the client does not take what was written to it nothing counts as silence of the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.plans import DialectName
from sidecar.errors import HandoffError
from sidecar.legs import Legs
from sidecar.vocabulary import (
    Action,
    Begun,
    CancelLeg,
    ClientLeft,
    DeadlinePassed,
    DecodeEnded,
    DecodeLost,
    DecodeOpened,
    DecodeRejected,
    Event,
    Fault,
    GraceEnding,
    LegEvent,
    LegKind,
    Outcome,
    PrefillAnswered,
    PrefillLost,
    PrefillRejected,
    Progressed,
    State,
    Unresumed,
)

OVERLOAD_STATUSES = frozenset({408, 429, 503})

_PREFILL_REASONS = {
    Fault.UNREACHABLE: RungReason.PREFILL_UNREACHABLE,
    Fault.TIMED_OUT: RungReason.PREFILL_TIMEOUT,
}
# A body that breaks off before its first output is how a pull that failed after the 200 head can show
# (vLLM 0.32, /v1/responses); a connection lost before the head is the engine itself.
_DECODE_REASONS = {
    Fault.UNREACHABLE: RungReason.DECODE_UNREACHABLE,
    Fault.TIMED_OUT: RungReason.TRANSFER_TIMEOUT,
    Fault.LOST_IN_BODY: RungReason.TRANSFER_FAILED,
}


_TEAR_REASONS = {
    Fault.UNREACHABLE: RungReason.DECODE_UNREACHABLE,
    Fault.TIMED_OUT: RungReason.DECODE_TIMEOUT,
    Fault.DIVERGED: RungReason.DECODE_DIVERGED,
}


def _is_clients_fault(status: int) -> bool:
    return 400 <= status < 500


def _start(legs: Legs, _event: Begun, now_s: float) -> list[Action]:
    """Send the first legs that the plan asks for (2)."""
    return legs.start(now_s)


def _take_ticket(legs: Legs, event: PrefillAnswered, now_s: float) -> list[Action]:
    """With a ticket send the decode leg, without one take the next rung (2, 3)."""
    if event.ticket is None:
        return legs.give_up(event.leg, RungReason.PREFILL_NO_TICKET, now_s)
    legs.take_prefill(event, now_s)
    return legs.send_pull(event, now_s)


def _can_prefill_itself(legs: Legs) -> bool:
    """Whether the decode engine's output is whole whatever became of the prefill leg (13)."""
    return legs.order.dialect is DialectName.PDCOORD


def _lacks_ticket(legs: Legs, event: PrefillAnswered) -> bool:
    return event.ticket is None and legs.order.dialect is DialectName.PDCOORD


def _await_output(legs: Legs, event: PrefillAnswered, now_s: float) -> list[Action]:
    """Wait for the decode leg's output; in pdcoord without a ticket take the next rung (3, 6, 9)."""
    if _lacks_ticket(legs, event):
        return legs.give_up(event.leg, RungReason.PREFILL_NO_TICKET, now_s)
    legs.take_prefill(event, now_s)
    return []


def _release_held(legs: Legs, event: PrefillAnswered, now_s: float) -> list[Action]:
    """Output is there: commit; in pdcoord without a ticket as colocated (3, 6, 13)."""
    if _lacks_ticket(legs, event):
        return legs.keep(event.leg, RungReason.PREFILL_NO_TICKET, now_s)
    legs.take_prefill(event, now_s)
    return legs.commit(legs.live(LegKind.DECODE), now_s)


def _reject_prefill(legs: Legs, event: PrefillRejected, now_s: float) -> list[Action]:
    """Pass a 4xx on; overload and errors take the next rung (4, 5, 9)."""
    if event.status in OVERLOAD_STATUSES:
        return legs.give_up(event.leg, RungReason.PREFILL_OVERLOADED, now_s)
    if _is_clients_fault(event.status):
        return legs.pass_on(event.leg, now_s)
    return legs.give_up(event.leg, RungReason.PREFILL_ERROR, now_s)


def _lose_prefill(legs: Legs, event: PrefillLost, now_s: float) -> list[Action]:
    """Take the next rung (5, 9)."""
    return legs.give_up(event.leg, _PREFILL_REASONS.get(event.fault, RungReason.PREFILL_ERROR), now_s)


def _time_out_prefill(legs: Legs, _event: DeadlinePassed, now_s: float) -> list[Action]:
    """Cancel what runs and take the next rung, prefill-timeout (5, 9)."""
    return legs.cut(legs.live(LegKind.PREFILL), RungReason.PREFILL_TIMEOUT, now_s)


def _reject_prefill_held(legs: Legs, event: PrefillRejected, now_s: float) -> list[Action]:
    """pdcoord: commit as colocated. sglang: pass a 4xx on, else take the next rung (4, 5, 9, 13)."""
    if not _can_prefill_itself(legs):
        return _reject_prefill(legs, event, now_s)
    is_overload = event.status in OVERLOAD_STATUSES
    reason = RungReason.PREFILL_OVERLOADED if is_overload else RungReason.PREFILL_ERROR
    return legs.keep(event.leg, reason, now_s)


def _lose_prefill_held(legs: Legs, event: PrefillLost, now_s: float) -> list[Action]:
    """pdcoord: commit as colocated. sglang: take the next rung (5, 9, 13)."""
    if not _can_prefill_itself(legs):
        return _lose_prefill(legs, event, now_s)
    return legs.keep(event.leg, _PREFILL_REASONS.get(event.fault, RungReason.PREFILL_ERROR), now_s)


def _time_out_prefill_held(legs: Legs, event: DeadlinePassed, now_s: float) -> list[Action]:
    """Cancel the prefill leg; pdcoord: commit as colocated. sglang: take the next rung (5, 9, 13)."""
    if not _can_prefill_itself(legs):
        return _time_out_prefill(legs, event, now_s)
    leg = legs.live(LegKind.PREFILL)
    return [CancelLeg(leg), *legs.keep(leg, RungReason.PREFILL_TIMEOUT, now_s)]


def _hold(legs: Legs, event: DecodeOpened, now_s: float) -> list[Action]:
    """Hold the output back; an error event takes the next rung (6, 7, 9)."""
    if event.is_error:
        return legs.cut(event.leg, RungReason.TRANSFER_FAILED, now_s)
    legs.enter(State.HELD, now_s)
    return []


def _open_split(legs: Legs, event: DecodeOpened, now_s: float) -> list[Action]:
    """Commit; an error event takes the next rung (6, 7, 10)."""
    if event.is_error:
        return legs.cut(event.leg, RungReason.TRANSFER_FAILED, now_s)
    return legs.commit(event.leg, now_s)


def _open_colocated(legs: Legs, event: DecodeOpened, now_s: float) -> list[Action]:
    """Commit, an error event too (7, 17)."""
    legs.is_output_due = event.is_output_due
    return legs.commit(event.leg, now_s)


def _reject_split(legs: Legs, event: DecodeRejected, now_s: float) -> list[Action]:
    """Pass a 4xx on; 500 is a failed transfer, others an engine at fault: next rung (5, 7, 9, 10)."""
    if _is_clients_fault(event.status):
        return legs.pass_on(event.leg, now_s)
    # vLLM 0.32 answers a failed pull with 500 (kv_load_failure_policy fail) and a full queue with 503.
    reason = RungReason.TRANSFER_FAILED if event.status == 500 else RungReason.DECODE_ERROR
    return legs.give_up(event.leg, reason, now_s)


def _reject_colocated(legs: Legs, event: DecodeRejected, now_s: float) -> list[Action]:
    """Pass it on (7)."""
    return legs.pass_on(event.leg, now_s)


def _lose_split(legs: Legs, event: DecodeLost, now_s: float) -> list[Action]:
    """Take the next rung (5, 7, 9, 10)."""
    return legs.give_up(event.leg, _DECODE_REASONS.get(event.fault, RungReason.DECODE_ERROR), now_s)


def _lose_colocated(legs: Legs, event: DecodeLost, now_s: float) -> list[Action]:
    """Refuse, upstream-failed or upstream-timeout."""
    match event.fault:
        case Fault.TIMED_OUT:
            return legs.fail(event.leg, RungReason.DECODE_TIMEOUT, RefuseReason.UPSTREAM_TIMEOUT, now_s)
        case Fault.UNREACHABLE:
            return legs.fail(event.leg, RungReason.DECODE_UNREACHABLE, RefuseReason.UPSTREAM_FAILED, now_s)
        case _:
            return legs.fail(event.leg, RungReason.DECODE_ERROR, RefuseReason.UPSTREAM_FAILED, now_s)


def _time_out_pull(legs: Legs, event: DeadlinePassed, now_s: float) -> list[Action]:
    """Cancel; a stream takes the next rung, transfer-timeout; else refuse, upstream-timeout (7, 9, 10)."""
    if not legs.order.is_stream:
        # The whole answer did not come in its time; doing it again would take as long.
        return _time_out_answer(legs, event, now_s)
    return legs.cut(legs.live(LegKind.DECODE), RungReason.TRANSFER_TIMEOUT, now_s)


def _time_out_answer(legs: Legs, _event: DeadlinePassed, now_s: float) -> list[Action]:
    """Cancel and refuse, upstream-timeout (9)."""
    leg = legs.live(LegKind.DECODE)
    failed = legs.fail(leg, RungReason.DECODE_TIMEOUT, RefuseReason.UPSTREAM_TIMEOUT, now_s)
    return [CancelLeg(leg), *failed]


def _finish(legs: Legs, event: DecodeEnded, now_s: float) -> list[Action]:
    """End (12)."""
    legs.close(event.leg, "ok", now_s)
    return legs.end(Outcome.SERVED, now_s)


def _tear(legs: Legs, event: DecodeLost, now_s: float) -> list[Action]:
    """Continue the stream, or break the answer off (8, 14, 15)."""
    return legs.tear(event.leg, _TEAR_REASONS.get(event.fault, RungReason.DECODE_ERROR), now_s)


def _tear_idle(legs: Legs, _event: DeadlinePassed, now_s: float) -> list[Action]:
    """Cancel, and continue the stream or break the answer off (8, 9, 14, 15)."""
    leg = legs.live(LegKind.DECODE)
    reason = RungReason.DECODE_TIMEOUT if legs.order.resume is None else RungReason.DECODE_STALLED
    return [CancelLeg(leg), *legs.tear(leg, reason, now_s)]


def _open_continuation(legs: Legs, event: DecodeOpened, now_s: float) -> list[Action]:
    """Commit; an error event tries the next (14)."""
    if event.is_error:
        return [CancelLeg(event.leg), *legs.tear(event.leg, RungReason.DECODE_ERROR, now_s)]
    return legs.commit(event.leg, now_s)


def _reject_continuation(legs: Legs, event: DecodeRejected, now_s: float) -> list[Action]:
    """Try the next, whatever the status, or break the answer off (14, 15)."""
    is_overload = event.status in OVERLOAD_STATUSES
    return legs.tear(
        event.leg, RungReason.DECODE_OVERLOADED if is_overload else RungReason.DECODE_ERROR, now_s
    )


def _lose_continuation(legs: Legs, event: DecodeLost, now_s: float) -> list[Action]:
    """Try the next, or break the answer off (14, 15)."""
    return _tear(legs, event, now_s)


def _time_out_continuation(legs: Legs, _event: DeadlinePassed, now_s: float) -> list[Action]:
    """Cancel, and try the next or break the answer off (9, 14, 15)."""
    leg = legs.live(LegKind.DECODE)
    return [CancelLeg(leg), *legs.tear(leg, RungReason.DECODE_TIMEOUT, now_s)]


def _leave_off(legs: Legs, event: Unresumed, now_s: float) -> list[Action]:
    """Break the answer off and say why (15)."""
    legs.close(event.leg, "cancelled", now_s)
    return legs.break_off(RefuseReason.STREAM_LOST, now_s, why=event.why)


def _give_back(legs: Legs, _event: GraceEnding, now_s: float) -> list[Action]:
    """Cancel what runs and refuse, draining (9, 10, 16)."""
    return legs.give_back(now_s)


def _end_grace(legs: Legs, event: GraceEnding, now_s: float) -> list[Action]:
    """Break off what is resumed above; the rest at the last moment (15, 16)."""
    if event.is_over or legs.order.is_resumed_above:
        return legs.break_off(RefuseReason.DRAINING, now_s)
    return []


def _go_on(legs: Legs, event: Progressed, _now_s: float) -> list[Action]:
    """Set the deadline anew, from the last output (11, 17)."""
    legs.is_output_due = False
    legs.enter(State.RELAYING, event.at_s)
    return []


def _leave(legs: Legs, _event: ClientLeft, now_s: float) -> list[Action]:
    """Cancel what runs and end (9, 10)."""
    return legs.end(Outcome.CLIENT_LEFT, now_s)


E = TypeVar("E")
Do = Callable[[Legs, E, float], list[Action]]


@dataclass(frozen=True, slots=True)
class Row:
    """One transition: in `state` and on `event`, `do` is called and leaves one of `leads_to`."""

    state: State
    event: type[object]
    do: Do[Event]
    leads_to: frozenset[State]


def _row(state: State, event: type[E], do: Do[E], leads_to: frozenset[State]) -> Row:
    # The one cast: by its place in the table a rule is only called with events of its own type.
    return Row(state, event, cast("Do[Event]", do), leads_to)


S = State
DONE = frozenset({S.DONE})
RELAYING = frozenset({S.RELAYING})
PULLING = frozenset({S.PULLING})
HELD = frozenset({S.HELD})
# Where a stream that broke off may lead.
TORN = frozenset({S.RESUMING, S.DONE})
# Where a rung may lead, with one leg after the other, with both at once, and in either: a split attempt,
# colocated, or refused.
RUNG_N = frozenset({S.PREFILLING, S.LOCAL, S.DONE})
RUNG_S = frozenset({S.PAIRED, S.LOCAL, S.DONE})
RUNG = RUNG_N | RUNG_S

TRANSITIONS: dict[tuple[State, type[object]], Row] = {
    (row.state, row.event): row
    for row in (
        _row(S.IDLE, Begun, _start, RUNG),
        _row(S.IDLE, ClientLeft, _leave, DONE),
        _row(S.PREFILLING, PrefillAnswered, _take_ticket, RUNG_N | PULLING),
        _row(S.PREFILLING, PrefillRejected, _reject_prefill, RUNG_N),
        _row(S.PREFILLING, PrefillLost, _lose_prefill, RUNG_N),
        _row(S.PREFILLING, DeadlinePassed, _time_out_prefill, RUNG_N),
        _row(S.PREFILLING, GraceEnding, _give_back, DONE),
        _row(S.PREFILLING, ClientLeft, _leave, DONE),
        _row(S.PAIRED, PrefillAnswered, _await_output, RUNG_S | PULLING),
        _row(S.PAIRED, PrefillRejected, _reject_prefill, RUNG_S),
        _row(S.PAIRED, PrefillLost, _lose_prefill, RUNG_S),
        _row(S.PAIRED, DecodeOpened, _hold, RUNG_S | HELD),
        _row(S.PAIRED, DecodeRejected, _reject_split, RUNG_S),
        _row(S.PAIRED, DecodeLost, _lose_split, RUNG_S),
        _row(S.PAIRED, DeadlinePassed, _time_out_prefill, RUNG_S),
        _row(S.PAIRED, GraceEnding, _give_back, DONE),
        _row(S.PAIRED, ClientLeft, _leave, DONE),
        _row(S.HELD, PrefillAnswered, _release_held, RELAYING),
        _row(S.HELD, PrefillRejected, _reject_prefill_held, RUNG_S | RELAYING),
        _row(S.HELD, PrefillLost, _lose_prefill_held, RUNG_S | RELAYING),
        _row(S.HELD, DeadlinePassed, _time_out_prefill_held, RUNG_S | RELAYING),
        _row(S.HELD, GraceEnding, _give_back, DONE),
        _row(S.HELD, ClientLeft, _leave, DONE),
        _row(S.PULLING, DecodeOpened, _open_split, RUNG | RELAYING),
        _row(S.PULLING, DecodeRejected, _reject_split, RUNG),
        _row(S.PULLING, DecodeLost, _lose_split, RUNG),
        _row(S.PULLING, DeadlinePassed, _time_out_pull, RUNG),
        _row(S.PULLING, GraceEnding, _give_back, DONE),
        _row(S.PULLING, ClientLeft, _leave, DONE),
        _row(S.LOCAL, DecodeOpened, _open_colocated, RELAYING),
        _row(S.LOCAL, DecodeRejected, _reject_colocated, DONE),
        _row(S.LOCAL, DecodeLost, _lose_colocated, DONE),
        _row(S.LOCAL, DeadlinePassed, _time_out_answer, DONE),
        _row(S.LOCAL, GraceEnding, _give_back, DONE),
        _row(S.LOCAL, ClientLeft, _leave, DONE),
        _row(S.RELAYING, DecodeEnded, _finish, DONE),
        _row(S.RELAYING, DecodeLost, _tear, TORN),
        _row(S.RELAYING, Progressed, _go_on, RELAYING),
        _row(S.RELAYING, DeadlinePassed, _tear_idle, TORN),
        _row(S.RELAYING, GraceEnding, _end_grace, RELAYING | DONE),
        _row(S.RELAYING, ClientLeft, _leave, DONE),
        _row(S.RESUMING, DecodeOpened, _open_continuation, TORN | RELAYING),
        _row(S.RESUMING, DecodeRejected, _reject_continuation, TORN),
        _row(S.RESUMING, DecodeLost, _lose_continuation, TORN),
        _row(S.RESUMING, DecodeEnded, _finish, DONE),
        _row(S.RESUMING, Unresumed, _leave_off, DONE),
        _row(S.RESUMING, DeadlinePassed, _time_out_continuation, TORN),
        _row(S.RESUMING, GraceEnding, _end_grace, TORN),
        _row(S.RESUMING, ClientLeft, _leave, DONE),
    )
}


def meaning(row: Row) -> str:
    """What the rule of a row does, in a sentence; numbers in brackets are those at the top."""
    return (row.do.__doc__ or "").strip()


class Handoff(Legs):
    """One request's handoff: feed it events, do its actions in order."""

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take one event.

        Raises:
            HandoffError: if the event cannot happen in this state.
        """
        if isinstance(event, LegEvent):
            leg = self.legs.get(event.leg)
            if leg is None:
                raise HandoffError(self.state, event, "no such leg")
            if not leg.is_live:
                return []
        row = TRANSITIONS.get((self.state, type(event)))
        if row is None:
            raise HandoffError(self.state, event, "not in the table")
        actions = row.do(self, event, now_s)
        assert self.state in row.leads_to, (row.state, type(event), self.state)
        return actions
