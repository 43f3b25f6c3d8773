"""What is due comes in order, and time never runs back."""

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.coarse.agenda import Agenda


@given(st.lists(st.integers(0, 20)))
def test_calls_come_by_time_and_then_in_the_order_they_were_asked_for(times: list[int]) -> None:
    agenda = Agenda()
    heard: list[tuple[int, int]] = []
    for order, at_s in enumerate(times):
        agenda.at(at_s, heard.append, (at_s, order))
    while agenda.next_s() is not None:
        do, subject = agenda.take()
        do(subject)
        assert agenda.now_s == subject[0]
    assert heard == sorted(heard)
    assert len(heard) == len(times)


def test_after_counts_from_now_and_what_is_late_does_not_turn_time_back() -> None:
    agenda = Agenda()
    agenda.after(2.0, print, "first")
    agenda.take()
    agenda.after(1.0, print, "third")
    agenda.at(0.5, print, "late")
    assert agenda.take()[1] == "late"
    assert agenda.now_s == 2.0
    assert agenda.take()[1] == "third"
    assert agenda.now_s == 3.0
    assert len(agenda) == 0
