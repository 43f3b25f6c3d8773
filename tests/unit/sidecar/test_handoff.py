"""The handoff machine: transcripts of each path, the table itself, and what holds for any order of events."""

import random
from dataclasses import replace

import pytest

from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, Mode, PrefillTarget, RungKind
from pdcoord.protocol.tickets import Ticket
from sidecar.errors import HandoffError
from sidecar.handoff import TRANSITIONS, Handoff
from sidecar.vocabulary import (
    Action,
    Begun,
    BreakOff,
    CancelLeg,
    ClientLeft,
    Commit,
    DeadlinePassed,
    DecodeEnded,
    DecodeLost,
    DecodeOpened,
    DecodeRejected,
    End,
    Event,
    Fault,
    GraceEnding,
    LegKind,
    NotResumed,
    Order,
    OrphanLease,
    Outcome,
    PassOn,
    PrefillAnswered,
    PrefillLost,
    PrefillRejected,
    Progressed,
    Refuse,
    Resume,
    SendContinuation,
    SendDecode,
    SendPrefill,
    State,
    Unresumed,
)

ENGINE = HostPort("127.0.0.1:8200")
D1, D2 = HostPort("d1:8000"), HostPort("d2:8000")
P1 = PrefillTarget(address=HostPort("p1:8000"))
P3 = PrefillTarget(address=HostPort("p3:8000"))
P2 = PrefillTarget(address=HostPort("p2:8000"))
TICKET = Ticket(b'{"remote_host": "p1"}')


def order(
    *prefills: PrefillTarget,
    dialect: DialectName = DialectName.NIXLV2,
    is_colocated_allowed: bool = True,
    is_stream: bool = True,
    refused: frozenset[HostPort] = frozenset(),
) -> Order:
    return Order(
        dialect=dialect,
        engine=ENGINE,
        prefills=prefills,
        refused=refused,
        is_colocated_allowed=is_colocated_allowed,
        is_stream=is_stream,
        prefill_deadline_s=10.0,
        transfer_deadline_s=5.0,
        answer_deadline_s=100.0,
        idle_deadline_s=20.0,
    )


class Transcript:
    """Feeds events one second apart and keeps what came of them."""

    def __init__(self, asked: Order) -> None:
        self.handoff = Handoff(asked)
        self.now_s = 100.0
        self.last: list[Action] = []
        self.give(Begun())

    def give(self, event: Event) -> list[Action]:
        self.now_s += 1.0
        self.last = self.handoff.handle(event, self.now_s)
        self.handoff.validate()
        return self.last

    def rungs(self) -> list[tuple[RungKind, RungReason, str]]:
        return [(taken.rung, taken.reason, taken.target) for taken in self.handoff.rungs]


# nixlv2.


def test_nixlv2_sends_the_decode_leg_with_the_ticket_and_commits_on_its_first_output() -> None:
    t = Transcript(order(P1))
    assert t.last == [SendPrefill(1, 1, P1)]
    assert t.give(PrefillAnswered(1, TICKET, 7)) == [SendDecode(2, 1, ticket=TICKET)]
    assert t.give(DecodeOpened(2)) == [Commit(2)]
    assert t.give(DecodeEnded(2)) == [End(Outcome.SERVED)]
    served = t.handoff.served()
    assert (served.mode, served.prefill, served.cached_tokens) == (Mode.SPLIT, "p1:8000", 7)
    assert (served.prefill_ms, served.transfer_ms) == (1000.0, 1000.0)
    assert t.handoff.first_output_s == 2.0
    assert t.rungs() == []


def test_without_prefill_targets_the_engine_does_both_phases() -> None:
    t = Transcript(order())
    assert t.last == [SendDecode(1, 1)]
    assert t.give(DecodeOpened(1)) == [Commit(1)]
    assert t.give(DecodeEnded(1)) == [End(Outcome.SERVED)]
    assert t.handoff.served().mode is Mode.COLOCATED


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (PrefillLost(1, Fault.UNREACHABLE), RungReason.PREFILL_UNREACHABLE),
        (PrefillLost(1, Fault.LOST_BEFORE_HEAD), RungReason.PREFILL_ERROR),
        (PrefillLost(1, Fault.LOST_IN_BODY), RungReason.PREFILL_ERROR),
        (PrefillLost(1, Fault.MALFORMED), RungReason.PREFILL_ERROR),
        (PrefillLost(1, Fault.TIMED_OUT), RungReason.PREFILL_TIMEOUT),
        (PrefillRejected(1, 500), RungReason.PREFILL_ERROR),
        (PrefillRejected(1, 302), RungReason.PREFILL_ERROR),
        (PrefillRejected(1, 429), RungReason.PREFILL_OVERLOADED),
        (PrefillRejected(1, 503), RungReason.PREFILL_OVERLOADED),
        (PrefillRejected(1, 408), RungReason.PREFILL_OVERLOADED),
        (PrefillAnswered(1, None), RungReason.PREFILL_NO_TICKET),
    ],
)
def test_a_failed_prefill_leg_goes_to_the_other_target_with_its_reason(
    event: Event, reason: RungReason
) -> None:
    t = Transcript(order(P1, P2))
    assert t.give(event) == [SendPrefill(2, 2, P2)]
    assert t.rungs() == [(RungKind.OTHER_PREFILL, reason, "p1:8000")]


def test_a_prefill_deadline_cancels_the_leg_and_its_late_answer_is_dropped() -> None:
    t = Transcript(order(P1, P2))
    assert t.handoff.deadline_s == t.now_s + 10.0
    assert t.give(DeadlinePassed()) == [CancelLeg(1), SendPrefill(2, 2, P2)]
    assert t.give(PrefillAnswered(1, TICKET)) == []
    assert t.rungs() == [(RungKind.OTHER_PREFILL, RungReason.PREFILL_TIMEOUT, "p1:8000")]


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_prefill_engines_4xx_is_passed_on_and_no_rung_is_taken(status: int) -> None:
    t = Transcript(order(P1, P2))
    assert t.give(PrefillRejected(1, status)) == [PassOn(1), End(Outcome.PASSED_ON)]
    assert t.rungs() == []


def test_the_ladder_ends_colocated() -> None:
    t = Transcript(order(P1, P2))
    t.give(PrefillLost(1, Fault.UNREACHABLE))
    assert t.give(PrefillRejected(2, 503)) == [SendDecode(3, 3)]
    t.give(DecodeOpened(3))
    t.give(DecodeEnded(3))
    assert t.rungs() == [
        (RungKind.OTHER_PREFILL, RungReason.PREFILL_UNREACHABLE, "p1:8000"),
        (RungKind.COLOCATED, RungReason.PREFILL_OVERLOADED, "p2:8000"),
    ]
    served = t.handoff.served()
    assert (served.mode, served.prefill, served.prefill_ms) == (Mode.COLOCATED, None, None)


def test_the_ladder_ends_in_a_refusal_where_colocated_is_not_allowed() -> None:
    t = Transcript(order(P1, is_colocated_allowed=False))
    assert t.give(PrefillLost(1, Fault.UNREACHABLE)) == [
        Refuse(RefuseReason.LADDER_EXHAUSTED),
        End(Outcome.REFUSED),
    ]
    assert t.rungs() == [(RungKind.REFUSE, RungReason.PREFILL_UNREACHABLE, "p1:8000")]


def test_targets_that_are_not_allowed_are_skipped() -> None:
    t = Transcript(order(P1, P2, refused=frozenset({P1.address})))
    assert t.last == [SendPrefill(1, 1, P2)]
    assert t.rungs() == [(RungKind.OTHER_PREFILL, RungReason.TARGET_NOT_ALLOWED, "p1:8000")]


def test_a_fallback_that_every_coordinator_calls_shut_is_skipped_with_that_reason() -> None:
    t = Transcript(replace(order(P1, P2, P3), shut=frozenset({P1.address, P2.address})))
    assert t.last == [SendPrefill(1, 1, P1)]  # The first target was chosen just now.
    t.give(PrefillLost(1, Fault.UNREACHABLE))
    assert t.last == [SendPrefill(2, 2, P3)]
    assert t.rungs() == [
        (RungKind.OTHER_PREFILL, RungReason.PREFILL_UNREACHABLE, "p1:8000"),
        (RungKind.OTHER_PREFILL, RungReason.PATH_SHUT, "p2:8000"),
    ]


def test_with_no_target_allowed_nothing_is_dialled_but_the_engine() -> None:
    t = Transcript(order(P1, P2, refused=frozenset({P1.address, P2.address})))
    assert t.last == [SendDecode(1, 1)]
    assert [rung for rung, _, _ in t.rungs()] == [RungKind.OTHER_PREFILL, RungKind.COLOCATED]


@pytest.mark.parametrize(
    ("event", "reason", "is_cut"),
    [
        (DecodeOpened(2, is_error=True), RungReason.TRANSFER_FAILED, True),
        (DecodeRejected(2, 500), RungReason.TRANSFER_FAILED, False),
        (DecodeLost(2, Fault.LOST_IN_BODY), RungReason.TRANSFER_FAILED, False),
        (DecodeLost(2, Fault.TIMED_OUT), RungReason.TRANSFER_TIMEOUT, False),
        (DeadlinePassed(), RungReason.TRANSFER_TIMEOUT, True),
    ],
)
def test_a_failed_transfer_tries_the_other_prefill_and_orphans_the_lease(
    event: Event, reason: RungReason, *, is_cut: bool
) -> None:
    t = Transcript(order(P1, P2))
    t.give(PrefillAnswered(1, TICKET, 3))
    cut = [CancelLeg(2)] if is_cut else []
    assert t.give(event) == [*cut, OrphanLease(P1.address), SendPrefill(3, 2, P2)]
    assert t.rungs() == [(RungKind.OTHER_PREFILL, reason, P1.address)]
    assert t.handoff.served().cached_tokens is None


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (DecodeLost(2, Fault.UNREACHABLE), RungReason.DECODE_UNREACHABLE),
        (DecodeLost(2, Fault.LOST_BEFORE_HEAD), RungReason.DECODE_ERROR),
        (DecodeLost(2, Fault.MALFORMED), RungReason.DECODE_ERROR),
        (DecodeRejected(2, 503), RungReason.DECODE_ERROR),
        (DecodeRejected(2, 502), RungReason.DECODE_ERROR),
    ],
)
def test_a_decode_engine_at_fault_is_not_given_another_prefill(event: Event, reason: RungReason) -> None:
    t = Transcript(order(P1, P2))
    t.give(PrefillAnswered(1, TICKET))
    assert t.give(event) == [OrphanLease(P1.address), SendDecode(3, 2)]
    assert t.rungs() == [(RungKind.COLOCATED, reason, ENGINE)]


def test_a_decode_engines_4xx_is_passed_on() -> None:
    t = Transcript(order(P1, P2))
    t.give(PrefillAnswered(1, TICKET))
    assert t.give(DecodeRejected(2, 400)) == [PassOn(2), OrphanLease(P1.address), End(Outcome.PASSED_ON)]


def test_the_transfer_deadline_runs_to_the_first_output_of_a_stream() -> None:
    t = Transcript(order(P1))
    t.give(PrefillAnswered(1, TICKET))
    assert t.handoff.deadline_s == t.now_s + 5.0


def test_an_answer_in_one_piece_has_its_own_deadline_and_is_not_tried_again() -> None:
    t = Transcript(order(P1, P2, is_stream=False))
    t.give(PrefillAnswered(1, TICKET))
    assert t.handoff.deadline_s == t.now_s + 100.0
    assert t.give(DeadlinePassed()) == [
        CancelLeg(2),
        Refuse(RefuseReason.UPSTREAM_TIMEOUT),
        OrphanLease(P1.address),
        End(Outcome.REFUSED),
    ]


@pytest.mark.parametrize("status", [300, 400, 429, 500, 503])
def test_a_colocated_leg_s_own_answer_is_passed_on(status: int) -> None:
    t = Transcript(order())
    assert t.give(DecodeRejected(1, status)) == [PassOn(1), End(Outcome.PASSED_ON)]


def test_a_colocated_error_event_is_the_engines_word() -> None:
    t = Transcript(order())
    assert t.give(DecodeOpened(1, is_error=True)) == [Commit(1)]


@pytest.mark.parametrize(
    ("event", "refusal", "reason"),
    [
        (DecodeLost(1, Fault.UNREACHABLE), RefuseReason.UPSTREAM_FAILED, RungReason.DECODE_UNREACHABLE),
        (DecodeLost(1, Fault.LOST_BEFORE_HEAD), RefuseReason.UPSTREAM_FAILED, RungReason.DECODE_ERROR),
        (DecodeLost(1, Fault.LOST_IN_BODY), RefuseReason.UPSTREAM_FAILED, RungReason.DECODE_ERROR),
        (DecodeLost(1, Fault.MALFORMED), RefuseReason.UPSTREAM_FAILED, RungReason.DECODE_ERROR),
        (DecodeLost(1, Fault.TIMED_OUT), RefuseReason.UPSTREAM_TIMEOUT, RungReason.DECODE_TIMEOUT),
    ],
)
def test_a_lost_colocated_leg_is_refused(event: Event, refusal: RefuseReason, reason: RungReason) -> None:
    t = Transcript(order())
    assert t.give(event) == [Refuse(refusal), End(Outcome.REFUSED)]
    assert t.rungs() == [(RungKind.REFUSE, reason, ENGINE)]


def test_a_colocated_leg_past_its_deadline_is_cancelled_and_refused() -> None:
    t = Transcript(order())
    assert t.give(DeadlinePassed()) == [
        CancelLeg(1),
        Refuse(RefuseReason.UPSTREAM_TIMEOUT),
        End(Outcome.REFUSED),
    ]


# After Commit.


@pytest.mark.parametrize(
    ("event", "reason", "is_cut"),
    [
        (DecodeLost(1, Fault.LOST_IN_BODY), RefuseReason.UPSTREAM_FAILED, False),
        (DecodeLost(1, Fault.TIMED_OUT), RefuseReason.UPSTREAM_TIMEOUT, False),
        (DeadlinePassed(), RefuseReason.UPSTREAM_TIMEOUT, True),
    ],
)
def test_a_failure_after_commit_breaks_the_answer_off(
    event: Event, reason: RefuseReason, *, is_cut: bool
) -> None:
    t = Transcript(order())
    t.give(DecodeOpened(1))
    cut = [CancelLeg(1)] if is_cut else []
    assert t.give(event) == [*cut, BreakOff(reason), End(Outcome.BROKEN_OFF)]
    assert t.rungs() == []


def test_progress_sets_the_idle_deadline_anew() -> None:
    t = Transcript(order())
    t.give(DecodeOpened(1))
    assert t.handoff.deadline_s == t.now_s + 20.0
    assert t.give(Progressed(t.now_s + 0.5)) == []
    assert t.handoff.deadline_s == t.now_s - 1.0 + 0.5 + 20.0


# A stream that broke off goes on.


def resumed(*targets: HostPort, tries_max: int = 3, refused: frozenset[HostPort] = frozenset()) -> Transcript:
    """A colocated stream that has output and may be continued."""
    resume = Resume(targets, refused, tries_max=tries_max, age_s_max=60.0, stall_s=8.0)
    t = Transcript(replace(order(), resume=resume))
    t.give(DecodeOpened(1))
    return t


@pytest.mark.parametrize(
    ("event", "reason", "is_cut"),
    [
        (DecodeLost(1, Fault.LOST_IN_BODY), RungReason.DECODE_ERROR, False),
        (DecodeLost(1, Fault.TORN), RungReason.DECODE_ERROR, False),
        (DecodeLost(1, Fault.DIVERGED), RungReason.DECODE_DIVERGED, False),
        (DecodeLost(1, Fault.TIMED_OUT), RungReason.DECODE_TIMEOUT, False),
        (DeadlinePassed(), RungReason.DECODE_STALLED, True),
    ],
)
def test_a_stream_that_breaks_off_goes_on_at_the_first_of_the_others(
    event: Event, reason: RungReason, *, is_cut: bool
) -> None:
    t = resumed(D1, D2)
    cut = [CancelLeg(1)] if is_cut else []
    assert t.give(event) == [*cut, SendContinuation(2, 2, D1)]
    assert (t.handoff.state, t.handoff.deadline_s) == (State.RESUMING, t.now_s + 20.0)
    assert t.give(DecodeOpened(2)) == [Commit(2)]
    assert t.handoff.gaps_s == [1.0 + (8.0 if is_cut else 0.0)]
    assert t.give(DecodeEnded(2)) == [End(Outcome.SERVED)]
    assert t.rungs() == [(RungKind.RESUME, reason, ENGINE)]
    assert t.handoff.first_output_s == 1.0
    assert t.handoff.unresumed == ""


def test_while_a_stream_may_be_continued_its_stall_bound_holds_and_then_the_longer_one() -> None:
    t = resumed(D1, tries_max=1)
    assert t.handoff.deadline_s == t.now_s + 8.0
    assert t.give(Progressed(t.now_s)) == []
    t.give(DeadlinePassed())
    t.give(DecodeOpened(2))
    assert t.handoff.deadline_s == t.now_s + 20.0


def test_a_stream_that_began_with_signs_of_life_has_the_time_of_a_prompt_before_its_first_output() -> None:
    resume = Resume((D1,), age_s_max=60.0, stall_s=8.0)
    t = Transcript(replace(order(), resume=resume))
    assert t.give(DecodeOpened(1, is_output_due=True)) == [Commit(1)]
    assert (t.handoff.deadline_s, t.handoff.is_output_due) == (t.now_s + 10.0 + 8.0, True)
    t.give(Progressed(t.now_s))
    assert (t.handoff.deadline_s, t.handoff.is_output_due) == (t.now_s - 1.0 + 8.0, False)


def test_a_stream_of_nothing_but_signs_of_life_goes_on_elsewhere_and_stalls_there_as_any() -> None:
    t = Transcript(replace(order(), resume=Resume((D1,), tries_max=2, age_s_max=60.0, stall_s=8.0)))
    t.give(DecodeOpened(1, is_output_due=True))
    assert t.give(DeadlinePassed()) == [CancelLeg(1), SendContinuation(2, 2, D1)]
    t.give(DecodeOpened(2))
    assert t.handoff.deadline_s == t.now_s + 8.0


@pytest.mark.parametrize(
    ("event", "reason", "is_cut"),
    [
        (DecodeLost(2, Fault.UNREACHABLE), RungReason.DECODE_UNREACHABLE, False),
        (DecodeLost(2, Fault.TIMED_OUT), RungReason.DECODE_TIMEOUT, False),
        (DecodeLost(2, Fault.LOST_BEFORE_HEAD), RungReason.DECODE_ERROR, False),
        (DecodeRejected(2, 503), RungReason.DECODE_OVERLOADED, False),
        (DecodeRejected(2, 400), RungReason.DECODE_ERROR, False),
        (DecodeOpened(2, is_error=True), RungReason.DECODE_ERROR, True),
        (DeadlinePassed(), RungReason.DECODE_TIMEOUT, True),
    ],
)
def test_a_continuation_that_shows_no_output_tries_the_next(
    event: Event, reason: RungReason, *, is_cut: bool
) -> None:
    t = resumed(D1, D2)
    t.give(DecodeLost(1, Fault.LOST_IN_BODY))
    cut = [CancelLeg(2)] if is_cut else []
    assert t.give(event) == [*cut, SendContinuation(3, 3, D2)]
    assert t.rungs()[1:] == [(RungKind.RESUME, reason, D1)]


def test_the_own_engine_is_the_last_to_be_tried_and_not_again_when_it_did_not_come_back() -> None:
    t = resumed(D1, tries_max=9)
    t.give(DecodeLost(1, Fault.LOST_IN_BODY))
    assert t.give(DecodeLost(2, Fault.UNREACHABLE)) == [SendContinuation(3, 3, ENGINE)]
    assert t.give(DeadlinePassed()) == [
        CancelLeg(3),
        BreakOff(RefuseReason.STREAM_LOST, why="no-target"),
        End(Outcome.BROKEN_OFF),
    ]
    t = resumed(tries_max=9)
    t.give(DecodeLost(1, Fault.TORN))
    assert t.give(DecodeLost(2, Fault.LOST_IN_BODY)) == [SendContinuation(3, 3, ENGINE)]
    t = resumed(tries_max=9)
    for leg in range(1, 5):  # It gives output each time, so it is worth another.
        assert t.give(DecodeLost(leg, Fault.TORN)) == [SendContinuation(leg + 1, leg + 1, ENGINE)]
        assert t.give(DecodeOpened(leg + 1)) == [Commit(leg + 1)]


def test_decode_endpoints_that_are_not_allowed_are_skipped() -> None:
    t = resumed(D1, D2, refused=frozenset({D1}))
    assert t.give(DecodeLost(1, Fault.LOST_IN_BODY)) == [SendContinuation(2, 2, D2)]
    assert t.rungs() == [
        (RungKind.RESUME, RungReason.DECODE_ERROR, ENGINE),
        (RungKind.RESUME, RungReason.TARGET_NOT_ALLOWED, D1),
    ]
    # The own engine needs no leave, even if a header names it and the list does not.
    t = resumed(ENGINE, refused=frozenset({ENGINE}))
    assert t.give(DecodeLost(1, Fault.LOST_IN_BODY)) == [SendContinuation(2, 2, ENGINE)]


def test_tries_and_age_bound_what_is_continued() -> None:
    t = resumed(D1, D2, tries_max=1)
    t.give(DecodeLost(1, Fault.LOST_IN_BODY))
    t.give(DecodeOpened(2))
    assert t.give(DecodeLost(2, Fault.LOST_IN_BODY)) == [
        BreakOff(RefuseReason.STREAM_LOST, why="tries"),
        End(Outcome.BROKEN_OFF),
    ]
    assert t.handoff.unresumed == NotResumed.TRIES
    t = resumed(D1)
    t.now_s += 60.0
    assert t.give(DecodeLost(1, Fault.LOST_IN_BODY)) == [
        BreakOff(RefuseReason.STREAM_LOST, why="age"),
        End(Outcome.BROKEN_OFF),
    ]


def test_what_cannot_be_continued_says_why() -> None:
    t = resumed(D1, D2)
    t.give(DecodeLost(1, Fault.LOST_IN_BODY))
    assert t.give(Unresumed(2, "many-choices")) == [
        BreakOff(RefuseReason.STREAM_LOST, why="many-choices"),
        End(Outcome.BROKEN_OFF),
    ]
    assert t.handoff.unresumed == "many-choices"


def test_a_stream_that_had_nothing_left_to_say_ends_well() -> None:
    t = resumed(D1)
    t.give(DecodeLost(1, Fault.LOST_IN_BODY))
    assert t.give(DecodeEnded(2)) == [End(Outcome.SERVED)]
    assert t.handoff.gaps_s == []


def test_a_continuation_names_the_prefill_pod_that_the_kv_came_from() -> None:
    t = Transcript(replace(order(P1), resume=Resume((D1,))))
    t.give(PrefillAnswered(1, TICKET, 7))
    t.give(DecodeOpened(2))
    assert t.give(DecodeLost(2, Fault.LOST_IN_BODY)) == [SendContinuation(3, 2, D1, P1)]
    t.give(DecodeOpened(3))
    served = t.handoff.served()
    assert (served.mode, served.prefill, served.prefill_ms) == (Mode.SPLIT, P1.address, 1000.0)


@pytest.mark.parametrize("event", [DecodeLost(1, Fault.LOST_IN_BODY), GraceEnding()])
def test_whoever_resumes_above_is_left_without_a_word(event: Event) -> None:
    t = Transcript(replace(order(), is_resumed_above=True))
    t.give(DecodeOpened(1))
    cut = [CancelLeg(1)] if isinstance(event, GraceEnding) else []
    reason = RefuseReason.DRAINING if cut else RefuseReason.UPSTREAM_FAILED
    assert t.give(event) == [*cut, BreakOff(reason, is_told=False), End(Outcome.HANDED_BACK)]


def test_whoever_ends_it_above_says_so_and_the_stream_may_use_the_grace_period() -> None:
    t = Transcript(replace(order(), is_ended_above=True))
    t.give(DecodeOpened(1))
    assert t.give(GraceEnding()) == []
    lost = BreakOff(RefuseReason.UPSTREAM_FAILED, is_told=False)
    assert t.give(DecodeLost(1, Fault.LOST_IN_BODY)) == [lost, End(Outcome.BROKEN_OFF)]


# The process ends.


@pytest.mark.parametrize("is_over", [False, True])
def test_what_has_not_begun_is_refused_so_that_it_can_be_asked_elsewhere(*, is_over: bool) -> None:
    t = Transcript(order(P1))
    t.give(PrefillAnswered(1, TICKET))
    assert t.give(GraceEnding(is_over=is_over)) == [
        CancelLeg(2),
        Refuse(RefuseReason.DRAINING),
        OrphanLease(P1.address),
        End(Outcome.REFUSED),
    ]
    assert t.rungs() == [(RungKind.REFUSE, RungReason.DECODE_DRAINING, ENGINE)]


def test_what_has_begun_goes_on_to_the_last_moment() -> None:
    t = resumed(D1)
    assert t.give(GraceEnding()) == []
    assert t.give(GraceEnding(is_over=True)) == [
        CancelLeg(1),
        BreakOff(RefuseReason.DRAINING),
        End(Outcome.BROKEN_OFF),
    ]
    t = resumed(D1)
    t.give(DecodeLost(1, Fault.LOST_IN_BODY))
    assert t.give(GraceEnding()) == []
    assert t.give(GraceEnding(is_over=True))[-1] == End(Outcome.BROKEN_OFF)


# The client leaves.


@pytest.mark.parametrize(
    ("asked", "events", "actions"),
    [
        (order(P1), [], [CancelLeg(1)]),
        (order(P1), [PrefillAnswered(1, TICKET)], [CancelLeg(2), OrphanLease(P1.address)]),
        (order(P1), [PrefillAnswered(1, TICKET), DecodeOpened(2)], [CancelLeg(2)]),
        (order(), [], [CancelLeg(1)]),
        (order(P1, dialect=DialectName.SGLANG), [], [CancelLeg(1), CancelLeg(2)]),
        (order(P1, dialect=DialectName.SGLANG), [DecodeOpened(2)], [CancelLeg(1), CancelLeg(2)]),
        (order(P1, dialect=DialectName.SGLANG), [PrefillAnswered(1)], [CancelLeg(2)]),
    ],
)
def test_a_client_that_leaves_cancels_every_live_leg(
    asked: Order, events: list[Event], actions: list[Action]
) -> None:
    t = Transcript(asked)
    for event in events:
        t.give(event)
    assert t.give(ClientLeft()) == [*actions, End(Outcome.CLIENT_LEFT)]


def test_a_client_may_leave_before_anything_was_sent() -> None:
    handoff = Handoff(order(P1))
    assert handoff.handle(ClientLeft(), 1.0) == [End(Outcome.CLIENT_LEFT)]


# sglang.


def sglang(*prefills: PrefillTarget, is_stream: bool = True) -> Transcript:
    return Transcript(
        order(*prefills, dialect=DialectName.SGLANG, is_colocated_allowed=False, is_stream=is_stream)
    )


def test_sglang_sends_both_legs_and_commits_when_prefill_then_output() -> None:
    t = sglang(P1)
    assert t.last == [SendPrefill(1, 1, P1), SendDecode(2, 1, peer=P1)]
    assert t.give(PrefillAnswered(1, None, 4)) == []
    assert t.handoff.deadline_s == t.now_s + 5.0
    assert t.give(DecodeOpened(2)) == [Commit(2)]
    assert t.give(DecodeEnded(2)) == [End(Outcome.SERVED)]
    assert t.handoff.served().cached_tokens == 4


def test_sglang_holds_output_until_the_prefill_is_known_good() -> None:
    t = sglang(P1)
    deadline_s = t.handoff.deadline_s
    assert t.give(DecodeOpened(2)) == []
    assert (t.handoff.state, t.handoff.deadline_s) == (State.HELD, deadline_s)
    assert t.give(PrefillAnswered(1)) == [Commit(2)]


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (PrefillLost(1, Fault.UNREACHABLE), RungReason.PREFILL_UNREACHABLE),
        (PrefillRejected(1, 500), RungReason.PREFILL_ERROR),
        (PrefillRejected(1, 503), RungReason.PREFILL_OVERLOADED),
    ],
)
def test_sglang_a_failed_prefill_cancels_the_decode_leg_and_pairs_anew(
    event: Event, reason: RungReason, *, is_held: bool
) -> None:
    t = sglang(P1, P2)
    if is_held:
        t.give(DecodeOpened(2))
    assert t.give(event) == [CancelLeg(2), SendPrefill(3, 2, P2), SendDecode(4, 2, peer=P2)]
    assert t.rungs() == [(RungKind.OTHER_PREFILL, reason, "p1:8000")]


@pytest.mark.parametrize("is_held", [False, True])
def test_sglang_a_prefill_deadline_cancels_both(*, is_held: bool) -> None:
    t = sglang(P1)
    if is_held:
        t.give(DecodeOpened(2))
    assert t.give(DeadlinePassed()) == [
        CancelLeg(1),
        CancelLeg(2),
        Refuse(RefuseReason.LADDER_EXHAUSTED),
        End(Outcome.REFUSED),
    ]


@pytest.mark.parametrize("is_held", [False, True])
def test_sglang_a_prefill_4xx_is_passed_on_and_the_decode_leg_cancelled(*, is_held: bool) -> None:
    t = sglang(P1, P2)
    if is_held:
        t.give(DecodeOpened(2))
    assert t.give(PrefillRejected(1, 400)) == [CancelLeg(2), PassOn(1), End(Outcome.PASSED_ON)]


@pytest.mark.parametrize(
    ("event", "reason", "cut"),
    [
        (DecodeRejected(2, 500), RungReason.TRANSFER_FAILED, []),
        (DecodeOpened(2, is_error=True), RungReason.TRANSFER_FAILED, [CancelLeg(2)]),
        (DecodeLost(2, Fault.LOST_IN_BODY), RungReason.TRANSFER_FAILED, []),
    ],
)
def test_sglang_a_failed_decode_leg_cancels_the_prefill_leg(
    event: Event, reason: RungReason, cut: list[Action]
) -> None:
    t = sglang(P1, P2)
    assert t.give(event) == [*cut, CancelLeg(1), SendPrefill(3, 2, P2), SendDecode(4, 2, peer=P2)]
    assert t.rungs() == [(RungKind.OTHER_PREFILL, reason, P1.address)]


def test_sglang_leaves_no_lease_to_orphan() -> None:
    t = sglang(P1)
    t.give(PrefillAnswered(1))
    assert t.give(DecodeLost(2, Fault.LOST_IN_BODY)) == [
        Refuse(RefuseReason.LADDER_EXHAUSTED),
        End(Outcome.REFUSED),
    ]


# pdcoord.


def pdcoord(
    *prefills: PrefillTarget, is_colocated_allowed: bool = True, is_stream: bool = True
) -> Transcript:
    return Transcript(
        order(
            *prefills,
            dialect=DialectName.PDCOORD,
            is_colocated_allowed=is_colocated_allowed,
            is_stream=is_stream,
        )
    )


FAILED_PREFILLS = [
    (PrefillLost(1, Fault.UNREACHABLE), RungReason.PREFILL_UNREACHABLE),
    (PrefillLost(1, Fault.LOST_IN_BODY), RungReason.PREFILL_ERROR),
    (PrefillRejected(1, 500), RungReason.PREFILL_ERROR),
    (PrefillRejected(1, 503), RungReason.PREFILL_OVERLOADED),
    (PrefillAnswered(1, None), RungReason.PREFILL_NO_TICKET),
    (DeadlinePassed(), RungReason.PREFILL_TIMEOUT),
]


def test_pdcoord_sends_both_legs_and_commits_when_prefill_then_output() -> None:
    t = pdcoord(P1)
    assert t.last == [SendPrefill(1, 1, P1), SendDecode(2, 1, peer=P1)]
    assert t.give(PrefillAnswered(1, TICKET, 4)) == []
    assert t.handoff.deadline_s == t.now_s + 5.0
    assert t.give(DecodeOpened(2)) == [Commit(2)]
    assert t.give(DecodeEnded(2)) == [End(Outcome.SERVED)]
    served = t.handoff.served()
    assert (served.mode, served.prefill, served.cached_tokens) == (Mode.SPLIT, "p1:8000", 4)
    assert (served.prefill_ms, served.transfer_ms) == (1000.0, 1000.0)


def test_pdcoord_holds_output_until_the_prefill_is_known_good() -> None:
    t = pdcoord(P1)
    deadline_s = t.handoff.deadline_s
    assert t.give(DecodeOpened(2)) == []
    assert (t.handoff.state, t.handoff.deadline_s) == (State.HELD, deadline_s)
    assert t.give(PrefillAnswered(1, TICKET)) == [Commit(2)]
    assert t.handoff.served().mode is Mode.SPLIT


@pytest.mark.parametrize(("event", "reason"), FAILED_PREFILLS)
def test_pdcoord_a_prefill_that_fails_while_the_decode_leg_waits_cancels_it_and_pairs_anew(
    event: Event, reason: RungReason
) -> None:
    t = pdcoord(P1, P2)
    cut = [CancelLeg(1)] if event == DeadlinePassed() else []
    assert t.give(event) == [*cut, CancelLeg(2), SendPrefill(3, 2, P2), SendDecode(4, 2, peer=P2)]
    assert t.rungs() == [(RungKind.OTHER_PREFILL, reason, "p1:8000")]


@pytest.mark.parametrize(("event", "reason"), FAILED_PREFILLS)
@pytest.mark.parametrize("is_colocated_allowed", [True, False])
def test_pdcoord_output_that_is_held_when_the_prefill_fails_is_the_answer(
    event: Event, reason: RungReason, *, is_colocated_allowed: bool
) -> None:
    t = pdcoord(P1, P2, is_colocated_allowed=is_colocated_allowed)
    t.give(DecodeOpened(2))
    cut = [CancelLeg(1)] if event == DeadlinePassed() else []
    assert t.give(event) == [*cut, Commit(2)]
    assert t.rungs() == [(RungKind.COLOCATED, reason, "p1:8000")]
    assert t.handoff.state is State.RELAYING
    assert t.give(DecodeEnded(2)) == [End(Outcome.SERVED)]
    served = t.handoff.served()
    assert (served.mode, served.prefill, served.prefill_ms) == (Mode.COLOCATED, None, None)
    assert served.cached_tokens is None


def test_pdcoord_a_prefill_4xx_is_passed_on_unless_there_is_output() -> None:
    t = pdcoord(P1, P2)
    assert t.give(PrefillRejected(1, 400)) == [CancelLeg(2), PassOn(1), End(Outcome.PASSED_ON)]
    t = pdcoord(P1, P2)
    t.give(DecodeOpened(2))
    assert t.give(PrefillRejected(1, 400)) == [Commit(2)]
    assert t.rungs() == [(RungKind.COLOCATED, RungReason.PREFILL_ERROR, "p1:8000")]


def test_pdcoord_an_error_event_is_no_output() -> None:
    t = pdcoord(P1)
    assert t.give(DecodeOpened(2, is_error=True)) == [CancelLeg(2), CancelLeg(1), SendDecode(3, 2)]
    assert t.rungs() == [(RungKind.COLOCATED, RungReason.TRANSFER_FAILED, P1.address)]


def test_pdcoord_the_ladder_ends_colocated() -> None:
    t = pdcoord(P1)
    assert t.give(PrefillLost(1, Fault.UNREACHABLE)) == [CancelLeg(2), SendDecode(3, 2)]
    assert t.handoff.state is State.LOCAL
    t = pdcoord(P1, is_colocated_allowed=False)
    assert t.give(PrefillLost(1, Fault.UNREACHABLE)) == [
        CancelLeg(2),
        Refuse(RefuseReason.LADDER_EXHAUSTED),
        End(Outcome.REFUSED),
    ]


def test_pdcoord_a_ticket_that_nobody_came_for_orphans_its_lease() -> None:
    t = pdcoord(P1)
    t.give(PrefillAnswered(1, TICKET))
    assert t.give(DeadlinePassed()) == [CancelLeg(2), OrphanLease(P1.address), SendDecode(3, 2)]
    assert t.rungs() == [(RungKind.COLOCATED, RungReason.TRANSFER_TIMEOUT, P1.address)]


# The table.


def test_an_unlisted_pair_is_an_error_of_ours_that_does_not_show_the_ticket() -> None:
    t = Transcript(order(P1))
    with pytest.raises(HandoffError, match="prefilling got Progressed") as caught:
        t.give(Progressed(0.0))
    assert caught.value.event_type is Progressed
    secret = PrefillAnswered(9, Ticket(b'{"secret": 1}'))
    with pytest.raises(HandoffError, match="no such leg") as unknown:
        t.give(secret)
    assert "secret" not in str(unknown.value)


def test_every_state_but_the_last_can_be_left_by_the_client_and_every_wait_has_a_deadline() -> None:
    for state in State:
        if state is State.DONE:
            assert not [pair for pair in TRANSITIONS if pair[0] is state]
            continue
        assert (state, ClientLeft) in TRANSITIONS
        assert state is State.IDLE or (state, DeadlinePassed) in TRANSITIONS


# Any order of events.

TARGETS = [PrefillTarget(address=HostPort(f"p{n}:8000")) for n in range(4)]


Sent = SendPrefill | SendDecode | SendContinuation


def _is_split(sent: Sent) -> bool:
    return isinstance(sent, SendDecode) and (sent.ticket is not None or sent.peer is not None)


class World:
    """Plays engines, client and clock at random against the machine and keeps its own books."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.order = order(
            *rng.sample(TARGETS, rng.randint(0, 4)),
            dialect=rng.choice(list(DialectName)),
            refused=frozenset(t.address for t in TARGETS if rng.random() < 0.2),
            is_colocated_allowed=rng.random() < 0.6,
            is_stream=rng.random() < 0.6,
        )
        self.order = replace(self.order, resume=self.draw_resume(), is_resumed_above=rng.random() < 0.1)
        self.order = replace(self.order, is_ended_above=rng.random() < 0.1)
        self.handoff = Handoff(self.order)
        self.now_s = 0.0
        self.live: dict[int, Sent] = {}
        self.cancelled: dict[int, Sent] = {}
        self.tries = 0
        self.rejected: set[int] = set()
        self.opened: set[int] = set()
        self.good_attempts: set[int] = set()
        self.failed_attempts: set[int] = set()
        self.tickets: dict[int, Ticket] = {}
        self.answers = 0
        self.committed: int | None = None
        self.outcome: Outcome | None = None
        self.orphans = 0
        self.give(Begun())

    def draw_resume(self) -> Resume | None:
        if self.rng.random() < 0.4:
            return None
        targets = tuple(self.rng.sample([D1, D2, ENGINE, HostPort("d3:8000")], self.rng.randint(0, 4)))
        refused = frozenset(target for target in targets if self.rng.random() < 0.2)
        return Resume(
            targets,
            refused,
            tries_max=self.rng.randint(1, 4),
            age_s_max=self.rng.choice([3.0, 90.0]),
            stall_s=9.0,
        )

    def give(self, event: Event) -> None:
        self.now_s += 0.25
        for action in self.handoff.handle(event, self.now_s):
            assert self.outcome is None, "an action after End"
            self.do(action)
        self.check()

    def do(self, action: Action) -> None:
        match action:
            case SendContinuation():
                self.send_continuation(action)
            case SendPrefill() | SendDecode():
                assert action.leg not in self.live | self.cancelled
                self.live[action.leg] = action
                self.check_sent(action)
            case CancelLeg(leg):
                self.cancelled[leg] = self.live.pop(leg)  # KeyError: an action on a finished leg.
                if isinstance(self.cancelled[leg], SendPrefill):
                    self.failed_attempts.add(self.cancelled[leg].attempt)
            case Commit(leg) if isinstance(self.live[leg], SendContinuation):
                assert leg in self.opened
                assert self.committed is not None
                self.committed = leg
            case Commit(leg):
                sent = self.live[leg]
                assert leg in self.opened
                is_whole = self.order.dialect is DialectName.PDCOORD and sent.attempt in self.failed_attempts
                assert sent.attempt in self.good_attempts or not _is_split(sent) or is_whole
                if is_whole:
                    assert self.handoff.served().mode is Mode.COLOCATED
                    assert self.handoff.rungs[-1].rung is RungKind.COLOCATED
                self.committed = leg
                self.answers += 1
            case PassOn(leg):
                assert leg in self.rejected
                self.answers += 1
            case Refuse():
                self.answers += 1
            case BreakOff(_, is_told):
                assert self.committed is not None
                assert is_told is not (self.order.is_resumed_above or self.order.is_ended_above)
                assert not self.live, "a leg that runs could still pass something on"
            case OrphanLease():
                self.orphans += 1
            case End(outcome):
                self.outcome = outcome
                assert not self.live, "End with a live leg"
                assert self.answers == (outcome is not Outcome.CLIENT_LEFT or self.committed is not None)

    def send_continuation(self, action: SendContinuation) -> None:
        resume = self.order.resume
        assert resume is not None
        assert not self.live, "two legs that pass output on"
        assert self.committed is not None, "nothing to go on with"
        assert action.leg not in self.live | self.cancelled
        assert action.target == ENGINE or action.target in set(resume.targets) - resume.refused
        self.live[action.leg] = action
        self.tries += 1
        assert self.tries <= resume.tries_max
        assert self.now_s <= resume.age_s_max + 0.25, "the first event came after a quarter of a second"

    def check_sent(self, action: SendPrefill | SendDecode) -> None:
        assert self.answers == 0, "a leg was sent although the client has its answer"
        if isinstance(action, SendPrefill):
            assert action.target.address not in self.order.refused
        else:
            assert action.ticket is None or action.ticket == self.tickets[action.attempt]
            assert _is_split(action) == (self.handoff.state is not State.LOCAL)
        assert sum(isinstance(leg, SendDecode) for leg in self.live.values()) <= 1

    def check(self) -> None:
        self.handoff.validate()
        assert sorted(self.live) == sorted(leg.number for leg in self.handoff.legs.values() if leg.is_live)
        assert self.answers <= 1
        assert self.orphans <= len(self.tickets)
        prefills = sum(leg.kind is LegKind.PREFILL for leg in self.handoff.legs.values())
        assert prefills <= len(self.order.prefills)
        assert len(self.handoff.legs) <= 2 * len(self.order.prefills) + 1 + self.tries

    def step(self) -> None:
        draw = self.rng.random()
        if draw < 0.04:
            self.give(ClientLeft())
        elif draw < 0.06:
            self.give(GraceEnding(is_over=self.rng.random() < 0.3))
        elif draw < 0.12:
            self.let_the_deadline_pass()
        elif draw < 0.2 and self.cancelled:
            self.hear_a_cancelled_leg()
        elif draw < 0.3 and self.handoff.state is State.RELAYING:
            self.give(Progressed(self.now_s))
        elif self.live:
            self.hear_a_live_leg()

    def let_the_deadline_pass(self) -> None:
        assert self.handoff.deadline_s is not None
        self.now_s = max(self.now_s, self.handoff.deadline_s)
        self.give(DeadlinePassed())

    def hear_a_cancelled_leg(self) -> None:
        leg = self.rng.choice(sorted(self.cancelled))
        late: list[Event] = [PrefillAnswered(leg, TICKET), PrefillRejected(leg, 500)]
        if not isinstance(self.cancelled[leg], SendPrefill):
            late = [DecodeEnded(leg), DecodeOpened(leg), DecodeLost(leg, Fault.LOST_IN_BODY)]
        before = self.handoff.state
        assert self.handoff.handle(self.rng.choice(late), self.now_s) == []
        assert self.handoff.state is before

    def hear_a_live_leg(self) -> None:
        leg = self.rng.choice(sorted(self.live))
        if isinstance(self.live[leg], SendPrefill):
            self.hear_prefill(leg)
        elif leg not in self.opened:
            self.hear_decode(leg)
        elif leg == self.committed:
            self.live.pop(leg)
            last: list[Event] = [DecodeEnded(leg), DecodeLost(leg, Fault.LOST_IN_BODY)]
            self.give(self.rng.choice([*last, DecodeLost(leg, Fault.TIMED_OUT), DecodeLost(leg, Fault.TORN)]))

    def hear_prefill(self, leg: int) -> None:
        attempt = self.live.pop(leg).attempt
        match self.rng.choice(["answered", "answered", "rejected", "lost"]):
            case "answered":
                has_tickets = self.order.dialect is not DialectName.SGLANG
                ticket = self.rng.choice([None, TICKET, Ticket(b'{"a":1}')]) if has_tickets else None
                if ticket is not None:
                    self.tickets[attempt] = ticket
                is_good = ticket is not None or not has_tickets
                (self.good_attempts if is_good else self.failed_attempts).add(attempt)
                self.give(PrefillAnswered(leg, ticket, self.rng.choice([None, 0, 9])))
            case "rejected":
                self.rejected.add(leg)
                self.failed_attempts.add(attempt)
                self.give(PrefillRejected(leg, self.rng.choice([302, 400, 429, 500, 503])))
            case _:
                self.failed_attempts.add(attempt)
                self.give(PrefillLost(leg, self.rng.choice(list(Fault))))

    def hear_decode(self, leg: int) -> None:
        if isinstance(self.live[leg], SendContinuation) and self.rng.random() < 0.15:
            self.live.pop(leg)
            over: list[Event] = [Unresumed(leg, "unreadable"), DecodeEnded(leg)]
            self.give(self.rng.choice(over))
            return
        match self.rng.choice(["opened", "opened", "rejected", "lost"]):
            case "opened":
                self.opened.add(leg)
                self.give(DecodeOpened(leg, is_error=self.rng.random() < 0.3))
            case "rejected":
                self.live.pop(leg)
                self.rejected.add(leg)
                self.give(DecodeRejected(leg, self.rng.choice([400, 429, 500, 502, 503])))
            case _:
                self.live.pop(leg)
                self.give(DecodeLost(leg, self.rng.choice(list(Fault))))


@pytest.mark.parametrize("block", range(8))
def test_whatever_the_order_of_events_a_request_ends_exactly_once(block: int) -> None:
    for seed in range(block * 400, block * 400 + 400):
        world = World(random.Random(seed))
        for _ in range(30):
            if world.outcome is None:
                world.step()
        # Whatever state it was left in, time alone ends it.
        for _ in range(2 * len(TARGETS) + 3 + 4):
            if world.outcome is None:
                world.let_the_deadline_pass()
        assert world.outcome is not None, f"seed {seed}"
        assert world.handoff.outcome is world.outcome, f"seed {seed}"


def test_the_random_orders_reach_every_row_of_the_table() -> None:
    seen: set[tuple[State, type[object]]] = {(State.IDLE, ClientLeft)}
    led: dict[tuple[State, type[object]], set[State]] = {(State.IDLE, ClientLeft): {State.DONE}}

    class Watched(World):
        def give(self, event: Event) -> None:
            pair = (self.handoff.state, type(event))
            seen.add(pair)
            super().give(event)
            led.setdefault(pair, set()).add(self.handoff.state)

    for seed in range(4000):
        world = Watched(random.Random(seed))
        for _ in range(30):
            if world.outcome is None:
                world.step()
    assert seen == set(TRANSITIONS)
    assert led == {pair: set(row.leads_to) for pair, row in TRANSITIONS.items()}
