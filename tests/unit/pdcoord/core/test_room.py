"""Waiting for room in a KV pool."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.fleet import Sample
from pdcoord.core.ledger import Load
from pdcoord.core.room import WAIT_S_MAX, room_wait_s


def sample(usage: float, kv_tokens: int = 100_000) -> Sample:
    return Sample(running=10, waiting=0, kv_usage=usage, at_s=0.0, kv_tokens=kv_tokens)


def test_no_wait_while_there_is_room() -> None:
    assert room_wait_s(sample(0.9), Load(), 10_000, 500.0, 0.02) == 0.0


def test_a_tenth_of_what_is_held_comes_free_in_a_tenth_of_a_life() -> None:
    # Held 90,000; 19,000 needed, 10,000 free: 9,000 of 90,000 over 500 steps of 20 ms.
    assert room_wait_s(sample(0.9), Load(), 19_000, 500.0, 0.02) == pytest.approx(1.0)


def test_those_sent_before_stand_before() -> None:
    before = Load(pending_tokens=9_000)
    assert room_wait_s(sample(0.9), before, 10_000, 500.0, 0.02) == pytest.approx(1.0)


def test_nothing_is_known_without_a_sample_or_a_size() -> None:
    assert room_wait_s(None, Load(), 1 << 30, 500.0, 0.02) == 0.0
    assert room_wait_s(sample(1.0, kv_tokens=0), Load(), 1 << 30, 500.0, 0.02) == 0.0


@given(
    usage=st.floats(0.0, 1.0),
    needed=st.integers(0, 1 << 40),
    more=st.integers(0, 1 << 30),
    output=st.floats(0.0, 1e6),
    step_s=st.floats(0.0, 1e3),
)
def test_it_is_bounded_and_grows_with_need(
    usage: float, needed: int, more: int, output: float, step_s: float
) -> None:
    wait_s = room_wait_s(sample(usage), Load(), needed, output, step_s)
    assert 0.0 <= wait_s <= WAIT_S_MAX
    assert room_wait_s(sample(usage), Load(), needed + more, output, step_s) >= wait_s
