"""One endpoint in trouble: what is too much, how long it is out, and how it is let in again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.fleet import EndpointId
from pdcoord.core.request import RequestId
from pdcoord.core.trouble import (
    FAILED_MAX,
    FAILURES_MAX,
    OUT_S_MAX,
    OUT_S_MIN,
    READMITTED_AT,
    RELAPSE_S,
    STEP_S_MAX,
    WINDOW,
    Phase,
    Symptom,
    Track,
    Trouble,
)

A, B = EndpointId("a"), EndpointId("b")


def ill(trouble: Trouble, count: int, track: Track = Track.START, now_s: float = 0.0) -> bool:
    return [trouble.note_ill(track, None, now_s) for _ in range(count)][-1]


def test_failures_in_a_row_are_too_much_in_one_track_alone() -> None:
    trouble = Trouble(Symptom.ERROR, 0.0)
    assert not ill(trouble, FAILURES_MAX - 1)
    assert not ill(trouble, FAILURES_MAX - 1, Track.FLOW)
    trouble.note_well(Track.FLOW)
    assert ill(trouble, 1)
    assert not ill(trouble, 1, Track.FLOW)


def test_so_are_many_among_the_latest_and_what_was_before_them_is_forgotten() -> None:
    trouble = Trouble(Symptom.ERROR, 0.0)
    found = []
    for _ in range(FAILED_MAX):
        trouble.note_well(Track.START)
        found.append(ill(trouble, 1))
    assert found == [False] * (FAILED_MAX - 1) + [True]
    for _ in range(WINDOW):
        trouble.note_well(Track.START)
    assert trouble.is_past(0.0)
    assert not ill(trouble, 1)


def test_what_may_be_the_other_legs_fault_is_its_own_with_several_of_those() -> None:
    trouble = Trouble(Symptom.PREFILL, 0.0)
    assert not any(trouble.note_ill(Track.PREFILL, A, 0.0) for _ in range(2 * FAILURES_MAX))
    assert trouble.note_ill(Track.PREFILL, B, 0.0)
    # A success makes the other legs' share forgotten with its own.
    trouble = Trouble(Symptom.PREFILL, 0.0)
    for partner in (A, B):
        trouble.note_ill(Track.PREFILL, partner, 0.0)
    trouble.note_well(Track.PREFILL)
    assert not any(trouble.note_ill(Track.PREFILL, A, 0.0) for _ in range(FAILURES_MAX))
    assert trouble.note_ill(Track.PREFILL, None, 0.0)


def test_a_row_begins_with_its_first_failure() -> None:
    trouble = Trouble(Symptom.ERROR, 0.0)
    for now_s in (1.0, 2.0):
        ill(trouble, 1, now_s=now_s)
    assert trouble.row_s == 1.0
    trouble.note_well(Track.START)
    ill(trouble, 1, now_s=3.0)
    assert trouble.row_s == 3.0


def test_it_is_out_for_twice_as_long_where_it_fails_again_soon() -> None:
    trouble, now_s, waits_s = Trouble(Symptom.ERROR, 0.0), 0.0, []
    for _ in range(10):
        trouble.put_out(Symptom.LATE, now_s)
        trouble.validate()
        assert (trouble.phase, trouble.symptom, trouble.due_s) == (Phase.OUT, Symptom.LATE, trouble.until_s)
        assert not trouble.lets_pass(trouble.until_s - 0.001)
        assert trouble.lets_pass(trouble.until_s)
        waits_s.append(trouble.out_s)
        now_s = trouble.until_s
    assert waits_s == [min(OUT_S_MIN * 2.0**count, OUT_S_MAX) for count in range(10)]


@pytest.mark.parametrize(("after_s", "out_s"), [(RELAPSE_S - 0.1, 2.0 * OUT_S_MIN), (RELAPSE_S, OUT_S_MIN)])
def test_a_relapse_is_soon_after_its_readmission(after_s: float, out_s: float) -> None:
    trouble = Trouble(Symptom.ERROR, 0.0)
    trouble.put_out(Symptom.ERROR, 0.0)
    while trouble.phase is not Phase.SUSPECTED:
        trouble.step(10.0)
    assert not trouble.is_past(10.0 + RELAPSE_S - 0.1)
    assert trouble.is_past(10.0 + RELAPSE_S)
    trouble.put_out(Symptom.ERROR, 10.0 + after_s)
    assert trouble.out_s == out_s


@given(st.booleans(), st.integers(0, READMITTED_AT))
def test_with_each_success_one_more_may_be_on_trial_until_it_is_one_like_any_other(
    is_by_time: bool, trial_count: int
) -> None:
    trouble = Trouble(Symptom.ERROR, 0.0)
    trouble.put_out(Symptom.ERROR, 0.0)
    if is_by_time:
        trouble.let_in(1.0)
        assert (trouble.limit, trouble.due_s) == (1, 1.0 + STEP_S_MAX)
    turns = []
    while trouble.phase is not Phase.SUSPECTED:
        turns.append(trouble.step(2.0))
        trouble.validate()
        if trouble.phase is Phase.READMITTING:
            trouble.trials = {RequestId(f"r{index}"): False for index in range(trial_count)}
            assert trouble.lets_pass(2.0) == (trial_count < trouble.limit)
            trouble.trials = {}
    assert len(turns) == READMITTED_AT
    assert turns == [not is_by_time] + [False] * (READMITTED_AT - 2) + [True]
    assert (trouble.readmitted_s, trouble.is_failing) == (2.0, False)


def test_a_trial_that_passed_takes_no_place() -> None:
    trouble = Trouble(Symptom.ERROR, 0.0)
    trouble.put_out(Symptom.ERROR, 0.0)
    trouble.trials = {RequestId("r"): False}
    assert not trouble.lets_pass(trouble.until_s)
    trouble.trials = {RequestId("r"): True}
    assert trouble.lets_pass(trouble.until_s)


def test_whoever_is_merely_suspected_has_nobody_on_trial() -> None:
    trouble = Trouble(Symptom.ERROR, 0.0, trials={RequestId("r"): False})
    with pytest.raises(AssertionError, match="trial"):
        trouble.validate()
