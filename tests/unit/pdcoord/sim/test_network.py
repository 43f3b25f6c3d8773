"""A NIC shared fairly."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.network import Nic


def finish_times(nic: Nic) -> dict[str, float]:
    times: dict[str, float] = {}
    while (at_s := nic.next_completion_s()) is not None:
        for flow_id in nic.advance(at_s):
            times[flow_id] = at_s
    return times


def test_one_transfer_has_the_whole_link() -> None:
    nic = Nic(100.0)
    nic.begin("a", 0.0, 500.0)
    assert finish_times(nic) == {"a": pytest.approx(5.0)}


def test_two_transfers_halve_it_and_the_rest_speeds_up() -> None:
    nic = Nic(100.0)
    nic.begin("a", 0.0, 500.0)
    nic.begin("b", 1.0, 100.0)
    # a has 400 left at 1 s; both move at 50 until b is done at 3 s, then a has 300 left at 100.
    assert finish_times(nic) == {"b": pytest.approx(3.0), "a": pytest.approx(6.0)}


def test_the_slower_side_decides() -> None:
    nic = Nic(100.0)
    nic.begin("a", 0.0, 100.0, peer_share=20.0)
    assert nic.next_completion_s() == pytest.approx(5.0)
    nic.set_peer_share("a", 80.0, 1.0)
    assert nic.next_completion_s() == pytest.approx(2.0)


def test_an_endless_flow_only_takes_its_share() -> None:
    nic = Nic(100.0)
    nic.begin("producer", 0.0)
    assert nic.next_completion_s() is None
    nic.begin("a", 0.0, 100.0)
    assert nic.next_completion_s() == pytest.approx(2.0)
    nic.end("producer", 1.0)
    assert nic.next_completion_s() == pytest.approx(1.5)


def test_a_slow_link_slows_all_and_heals() -> None:
    nic = Nic(100.0)
    nic.begin("a", 0.0, 100.0)
    nic.set_factor(0.1, 0.0)
    assert nic.next_completion_s() == pytest.approx(10.0)
    nic.set_factor(1.0, 5.0)
    assert nic.next_completion_s() == pytest.approx(5.5)


def test_nothing_to_move_is_done_at_once() -> None:
    nic = Nic(100.0)
    nic.begin("a", 3.0, 0.0)
    assert nic.advance(3.0) == ["a"]


def test_completion_is_found_after_weeks_of_uptime() -> None:
    nic = Nic(50e9)
    start_s = 5e6 + 0.123456789
    nic.begin("a", start_s, 123_456_789.0)
    at_s = nic.next_completion_s()
    assert at_s is not None
    assert nic.advance(at_s) == ["a"]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(1, 1000)), min_size=1, max_size=8), st.floats(1, 500))
def test_a_link_carries_what_it_can_and_no_more(flows: list[tuple[float, float]], rate: float) -> None:
    nic = Nic(rate)
    ends: dict[str, float] = {}
    for index, (begin_s, size) in enumerate(sorted(flows)):
        while (at_s := nic.next_completion_s()) is not None and at_s <= begin_s:
            ends.update(dict.fromkeys(nic.advance(at_s), at_s))
        nic.begin(str(index), begin_s, size)
    ends |= finish_times(nic)
    assert len(ends) == len(flows)
    for index, (begin_s, size) in enumerate(sorted(flows)):
        assert ends[str(index)] >= begin_s + size / rate - 1e-4
    total = sum(size for _, size in flows)
    last, first = max(ends.values()), min(begin for begin, _ in flows)
    assert total <= rate * (last - first) + rate * 1e-3
    # While anything is under way the link is full: it ends no later than if all waited for the last.
    assert last <= max(begin for begin, _ in flows) + total / rate + 1e-3


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_nic_has_a_speed(rate: float) -> None:
    with pytest.raises(ValueError, match="bytes_per_s"):
        Nic(rate)


def test_bad_flows_are_refused() -> None:
    nic = Nic(1.0)
    nic.begin("a", 0.0, math.inf)
    with pytest.raises(ValueError, match="already"):
        nic.begin("a", 0.0, 1.0)
    with pytest.raises(ValueError, match="bytes_left"):
        nic.begin("b", 0.0, -1.0)
    with pytest.raises(ValueError, match="factor"):
        nic.set_factor(0.0, 0.0)
