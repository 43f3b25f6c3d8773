"""Named points in time."""

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.timers import Timers


def test_the_last_setting_of_a_key_counts() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    timers.set("b", 2.0)
    timers.set("a", 3.0)
    assert timers.next_s() == 2.0
    assert timers.pop_due(5.0) == (2.0, "b")
    assert "a" in timers
    assert timers.pop_due(2.5) is None
    assert timers.pop_due(5.0) == (3.0, "a")
    assert timers.next_s() is None


def test_a_cleared_timer_never_runs() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    timers.clear("a")
    timers.clear("never set")
    assert timers.pop_due(9.0) is None
    assert len(timers) == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.floats(0, 100))), max_size=400))
def test_timers_run_in_order_each_once(commands: list[tuple[int, float | None]]) -> None:
    timers: Timers[int] = Timers()
    expected: dict[int, float] = {}
    for key, at_s in commands:
        if at_s is None:
            timers.clear(key)
            expected.pop(key, None)
        else:
            timers.set(key, at_s)
            expected[key] = at_s
    assert len(timers) == len(expected)
    ran = []
    while (due := timers.pop_due(1000.0)) is not None:
        ran.append(due)
    assert [at_s for at_s, _ in ran] == sorted(expected.values())
    assert {key: at_s for at_s, key in ran} == expected


def test_a_timer_that_is_moved_often_does_not_grow_the_heap() -> None:
    timers: Timers[str] = Timers()
    for index in range(10_000):
        timers.set("nic", float(index))
    assert len(timers._heap) < 200
    assert timers.next_s() == 9_999.0
