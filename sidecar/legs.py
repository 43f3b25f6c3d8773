"""The legs, rungs and deadline of one handoff, and the steps that the rules of `handoff` are made of."""

from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, Mode, PrefillTarget, RungKind, RungTaken, ServedHeader
from sidecar.vocabulary import (
    Action,
    BreakOff,
    CancelLeg,
    Commit,
    End,
    Leg,
    LegKind,
    NotResumed,
    Order,
    OrphanLease,
    Outcome,
    PassOn,
    PrefillAnswered,
    Refuse,
    SendContinuation,
    SendDecode,
    SendPrefill,
    State,
)

DECODE_AT_FAULT = frozenset(
    {RungReason.DECODE_UNREACHABLE, RungReason.DECODE_TIMEOUT, RungReason.DECODE_ERROR}
)
"""Reasons for which no other prefill target is tried: none could help."""

OF_THE_TRANSFER = frozenset({RungReason.TRANSFER_FAILED, RungReason.TRANSFER_TIMEOUT})
"""Reasons that a decode leg shows and that speak of the path from the prefill endpoint."""

BOTH_AT_ONCE = frozenset({DialectName.SGLANG, DialectName.PDCOORD})
"""Dialects in which the decode leg does not wait for the prefill leg's answer."""

LIVE_LEGS: dict[State, tuple[LegKind, ...]] = {
    State.IDLE: (),
    State.PREFILLING: (LegKind.PREFILL,),
    State.PAIRED: (LegKind.DECODE, LegKind.PREFILL),
    State.HELD: (LegKind.DECODE, LegKind.PREFILL),
    State.PULLING: (LegKind.DECODE,),
    State.LOCAL: (LegKind.DECODE,),
    State.RELAYING: (LegKind.DECODE,),
    State.RESUMING: (LegKind.DECODE,),
    State.DONE: (),
}


class Legs:
    """What one handoff remembers.

    Attributes:
        deadline_s: when the edge must report DeadlinePassed or Progressed; None when idle or done.
        legs: every leg ever sent, by number.
        rungs: the fallbacks taken, in order.
        cached_tokens: the count of the prefill engine whose KV is used; None if it did not say.
        outcome: None until the request is over.
        quiet_s: longest time without progress, since `deadline_s` was last set while relaying.
        is_output_due: a stream is relayed of which only signs of life have come.
        gaps_s: of each continuation that has output, from the break to that output.
        unresumed: why a stream that broke off was not, or no longer, continued; empty where that was not so.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.state = State.IDLE
        self.deadline_s: float | None = None
        self.legs: dict[int, Leg] = {}
        self.rungs: list[RungTaken] = []
        self.cached_tokens: int | None = None
        self.outcome: Outcome | None = None
        self.quiet_s = order.idle_deadline_s
        self.is_output_due = False
        self.gaps_s: list[float] = []
        self.unresumed = ""
        self._remaining = list(order.prefills)
        self._target: PrefillTarget | None = None
        self._attempt = self._split_attempt = 0
        self._peers = list(order.resume.targets) if order.resume is not None else []
        self._resume_reasons: dict[int, RungReason] = {}
        self._torn_s = 0.0
        self._is_lease_open = False
        self._began_s = 0.0
        self._prefill_good_s: float | None = None
        self._committed_s: float | None = None

    @property
    def first_output_s(self) -> float | None:
        """Seconds from the start to Commit; None if there was none."""
        return None if self._committed_s is None else self._committed_s - self._began_s

    def served(self) -> ServedHeader:
        """What was done so far, for the response's head."""
        target = self._target
        prefill_ms = transfer_ms = None
        if target is not None and self._prefill_good_s is not None:
            sent_s = next(
                leg.began_s
                for leg in self.legs.values()
                if leg.attempt == self._split_attempt and leg.kind is LegKind.PREFILL
            )
            prefill_ms = _milliseconds(self._prefill_good_s - sent_s)
            if self._committed_s is not None:
                # Where the decode leg is sent before the prefill is done, what is left after that is
                # transfer and first step, as in nixlv2.
                transfer_ms = _milliseconds(self._committed_s - self._prefill_good_s)
        return ServedHeader(
            mode=Mode.COLOCATED if target is None else Mode.SPLIT,
            prefill=None if target is None else target.address,
            rungs=tuple(self.rungs),
            prefill_ms=prefill_ms,
            transfer_ms=transfer_ms,
            cached_tokens=self.cached_tokens,
        )

    def resumes(self) -> list[tuple[RungReason, str]]:
        """Why each continuation was sent, and what became of it."""
        return [
            (reason, leg.outcome or "cancelled")
            for leg in self.legs.values()
            if (reason := self._resume_reasons.get(leg.number)) is not None
        ]

    def validate(self) -> None:
        """Assert what must hold between events."""
        live = sorted(leg.kind for leg in self.legs.values() if leg.is_live)
        assert tuple(live) == LIVE_LEGS[self.state], (self.state, live)
        assert (self.deadline_s is None) == (self.state in {State.IDLE, State.DONE}), self.state
        assert (self.outcome is None) == (self.state is not State.DONE), self.state
        tries_max = self.order.resume.tries_max if self.order.resume is not None else 0
        refused_max = len(self.order.resume.refused) if self.order.resume is not None else 0
        assert len(self._resume_reasons) <= tries_max, self._resume_reasons
        assert len(self.gaps_s) <= len(self._resume_reasons), self.gaps_s
        assert len(self.rungs) <= len(self.order.prefills) + 2 + tries_max + refused_max, self.rungs
        assert self._attempt <= len(self.order.prefills) + 1 + tries_max, self._attempt
        assert self.state is not State.RESUMING or self._committed_s is not None, "nothing to go on with"
        assert not self._is_lease_open or self.state is State.PULLING, self.state
        assert self._target is None or self._target.address not in self.order.refused, self._target
        assert self._target is None or self.state not in {State.LOCAL, State.IDLE}, self.state
        for leg in self.legs.values():
            assert leg.is_live == (not leg.outcome), leg

    # Steps.

    def start(self, now_s: float) -> list[Action]:
        self._began_s = now_s
        if not self._remaining:
            return self._send_colocated(now_s)
        target = self._remaining.pop(0)
        if target.address in self.order.refused:
            return self._descend(target.address, RungReason.TARGET_NOT_ALLOWED, now_s)
        return self._send_split(target, now_s)

    def take_prefill(self, event: PrefillAnswered, now_s: float) -> None:
        """The prefill leg is good: note its answer; a ticket opens a lease."""
        self.close(event.leg, "ok", now_s)
        self._prefill_good_s = now_s
        self.cached_tokens = event.cached_tokens
        self._is_lease_open = event.ticket is not None
        self.enter(State.PULLING, now_s)

    def send_pull(self, event: PrefillAnswered, now_s: float) -> list[Action]:
        """Send the decode leg that pulls what the ticket names."""
        leg = self._open(LegKind.DECODE, self.order.engine, now_s)
        return [SendDecode(leg, self._attempt, ticket=event.ticket)]

    def give_up(self, leg: int, reason: RungReason, now_s: float) -> list[Action]:
        """The leg has ended: end its attempt, cancelling what still runs, and take the next rung."""
        self.close(leg, reason, now_s)
        actions = [*self._cancel_rest(now_s), *self._count_orphan()]
        failed = self.legs[leg].target
        if reason in OF_THE_TRANSFER and self._target is not None:
            failed = self._target.address
        return [*actions, *self._descend(failed, reason, now_s)]

    def cut(self, leg: int, reason: RungReason, now_s: float) -> list[Action]:
        """As `give_up`, of a leg that has not ended by itself."""
        return [CancelLeg(leg), *self.give_up(leg, reason, now_s)]

    def keep(self, leg: int, reason: RungReason, now_s: float) -> list[Action]:
        """The prefill leg has ended and the decode leg's output is a whole answer without it: commit."""
        self.close(leg, reason, now_s)
        self._take(RungKind.COLOCATED, reason, self.legs[leg].target)
        self._forget_prefill()
        return self.commit(self.live(LegKind.DECODE), now_s)

    def fail(self, leg: int, reason: RungReason, refuse: RefuseReason, now_s: float) -> list[Action]:
        """The leg has ended and nothing is left to try."""
        self._take(RungKind.REFUSE, reason, self.legs[leg].target)
        self.close(leg, reason, now_s)
        return [Refuse(refuse), *self.end(Outcome.REFUSED, now_s)]

    def give_back(self, now_s: float) -> list[Action]:
        """The process ends, and nothing was sent to the client: whoever asked may ask elsewhere."""
        cancel = self._cancel_rest(now_s)
        self._take(RungKind.REFUSE, RungReason.DECODE_DRAINING, self.order.engine)
        return [*cancel, Refuse(RefuseReason.DRAINING), *self.end(Outcome.REFUSED, now_s)]

    def tear(self, leg: int, reason: RungReason, now_s: float) -> list[Action]:
        """The leg has ended and its stream is not whole: go on elsewhere, or break off."""
        is_here = self.legs[leg].target == self.order.engine
        # It was asked for its health until then, so that it will hardly be well in the same time again.
        has_failed_here = is_here and self.state is State.RESUMING and reason is RungReason.DECODE_TIMEOUT
        if self.state is State.RELAYING:
            # What a stalled stream has waited already is part of the gap.
            self._torn_s = now_s if reason is not RungReason.DECODE_STALLED else now_s - self.quiet_s
        self.is_output_due = False
        self.close(leg, reason, now_s)
        why, resume = self._why_not_resumed(now_s), self.order.resume
        failed = self.legs[leg].target
        while resume is not None and why is None and (self._peers or not has_failed_here):
            target = self._peers.pop(0) if self._peers else self.order.engine
            self._take(RungKind.RESUME, reason, failed)
            if target == self.order.engine or target not in resume.refused:
                return self._send_continuation(target, reason, now_s)
            failed, reason = target, RungReason.TARGET_NOT_ALLOWED
        return self.break_off(_REFUSALS.get(reason, RefuseReason.UPSTREAM_FAILED), now_s, why=why)

    def break_off(self, refuse: RefuseReason, now_s: float, *, why: str | None = None) -> list[Action]:
        """End the begun answer unfinished; without a word where that is for whoever sent the request."""
        cancel = self._cancel_rest(now_s)
        if self.order.is_resumed_above:
            return [*cancel, BreakOff(refuse, is_told=False), *self.end(Outcome.HANDED_BACK, now_s)]
        if self.order.resume is not None and refuse is not RefuseReason.DRAINING:
            refuse, self.unresumed = RefuseReason.STREAM_LOST, why or NotResumed.NO_TARGET
        broken_off = BreakOff(refuse, is_told=not self.order.is_ended_above, why=self.unresumed)
        return [*cancel, broken_off, *self.end(Outcome.BROKEN_OFF, now_s)]

    def pass_on(self, leg: int, now_s: float) -> list[Action]:
        self.close(leg, "rejected", now_s)
        return [*self._cancel_rest(now_s), PassOn(leg), *self.end(Outcome.PASSED_ON, now_s)]

    def commit(self, leg: int, now_s: float) -> list[Action]:
        self._is_lease_open = False
        if self._committed_s is None:
            self._committed_s = now_s
        else:
            self.gaps_s.append(max(now_s - self._torn_s, 0.0))
        self.enter(State.RELAYING, now_s)
        return [Commit(leg)]

    def end(self, outcome: Outcome, now_s: float) -> list[Action]:
        actions = [*self._cancel_rest(now_s), *self._count_orphan()]
        self.outcome = outcome
        self.enter(State.DONE, now_s)
        return [*actions, End(outcome)]

    def live(self, kind: LegKind) -> int:
        return next(leg.number for leg in self.legs.values() if leg.is_live and leg.kind is kind)

    def close(self, number: int, outcome: str, now_s: float) -> None:
        leg = self.legs[number]
        leg.ended_s = now_s
        leg.outcome = str(outcome)

    def enter(self, state: State, now_s: float) -> None:
        """Change the state; its deadline starts now."""
        self.state = state
        order = self.order
        match state:
            case State.PREFILLING | State.PAIRED:
                self.deadline_s = now_s + order.prefill_deadline_s
            case State.HELD:
                pass  # The prefill leg's deadline goes on.
            case State.PULLING if order.is_stream:
                self.deadline_s = now_s + order.transfer_deadline_s
            case State.PULLING | State.LOCAL:
                self.deadline_s = now_s + order.answer_deadline_s
            case State.RELAYING:
                resume, may_go_on = order.resume, self._why_not_resumed(now_s) is None
                self.quiet_s = resume.stall_s if resume is not None and may_go_on else order.idle_deadline_s
                if self.is_output_due:
                    self.quiet_s += order.prefill_deadline_s
                self.deadline_s = now_s + self.quiet_s
            case State.RESUMING:
                self.deadline_s = now_s + order.idle_deadline_s
            case State.IDLE | State.DONE:
                self.deadline_s = None

    # Leaves.

    def _send_split(self, target: PrefillTarget, now_s: float) -> list[Action]:
        self._attempt += 1
        self._split_attempt = self._attempt
        self._target = target
        prefill = self._open(LegKind.PREFILL, target.address, now_s)
        actions: list[Action] = [SendPrefill(prefill, self._attempt, target)]
        if self.order.dialect not in BOTH_AT_ONCE:
            self.enter(State.PREFILLING, now_s)
            return actions
        decode = self._open(LegKind.DECODE, self.order.engine, now_s)
        self.enter(State.PAIRED, now_s)
        return [*actions, SendDecode(decode, self._attempt, peer=target)]

    def _send_colocated(self, now_s: float) -> list[Action]:
        self._attempt += 1
        leg = self._open(LegKind.DECODE, self.order.engine, now_s)
        self.enter(State.LOCAL, now_s)
        return [SendDecode(leg, self._attempt)]

    def _send_continuation(self, target: HostPort, reason: RungReason, now_s: float) -> list[Action]:
        self._attempt += 1
        leg = self._open(LegKind.DECODE, target, now_s)
        self._resume_reasons[leg] = reason
        self.enter(State.RESUMING, now_s)
        return [SendContinuation(leg, self._attempt, target, self._target)]

    def _why_not_resumed(self, now_s: float) -> NotResumed | None:
        """Why no continuation may be sent now; None if one may."""
        resume = self.order.resume
        if resume is None:
            return NotResumed.NO_TARGET
        if len(self._resume_reasons) >= resume.tries_max:
            return NotResumed.TRIES
        return NotResumed.AGE if now_s >= self._began_s + resume.age_s_max else None

    def _descend(self, failed: HostPort, reason: RungReason, now_s: float) -> list[Action]:
        """Take the next rung; each records what failed where, and what is done instead."""
        self._forget_prefill()
        while self._remaining and reason not in DECODE_AT_FAULT:
            target = self._remaining.pop(0)
            self._take(RungKind.OTHER_PREFILL, reason, failed)
            failed = target.address
            if failed in self.order.refused:
                reason = RungReason.TARGET_NOT_ALLOWED
            elif failed in self.order.shut:
                reason = RungReason.PATH_SHUT
            else:
                return self._send_split(target, now_s)
        if self.order.is_colocated_allowed:
            self._take(RungKind.COLOCATED, reason, failed)
            return self._send_colocated(now_s)
        self._take(RungKind.REFUSE, reason, failed)
        return [Refuse(RefuseReason.LADDER_EXHAUSTED), *self.end(Outcome.REFUSED, now_s)]

    def _forget_prefill(self) -> None:
        self._target = None
        self._prefill_good_s = None
        self.cached_tokens = None

    def _cancel_rest(self, now_s: float) -> list[Action]:
        live = [leg.number for leg in self.legs.values() if leg.is_live]
        for number in live:
            self.close(number, "cancelled", now_s)
        return [CancelLeg(number) for number in live]

    def _count_orphan(self) -> list[Action]:
        if not self._is_lease_open or self._target is None:
            return []
        self._is_lease_open = False
        return [OrphanLease(self._target.address)]

    def _open(self, kind: LegKind, target: HostPort, now_s: float) -> int:
        number = len(self.legs) + 1
        self.legs[number] = Leg(number, kind, self._attempt, target, now_s)
        return number

    def _take(self, rung: RungKind, reason: RungReason, failed: HostPort) -> None:
        self.rungs.append(RungTaken(rung=rung, reason=reason, target=failed))


_REFUSALS = {
    RungReason.DECODE_TIMEOUT: RefuseReason.UPSTREAM_TIMEOUT,
    RungReason.DECODE_STALLED: RefuseReason.UPSTREAM_TIMEOUT,
}


def _milliseconds(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1e3, 3)
