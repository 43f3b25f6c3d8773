"""What a prefill does to others' objectives."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.harm import (
    QUEUE_WEIGHT,
    ROOM_WEIGHT,
    SLOWING_WEIGHT,
    STALL_WEIGHT,
    STREAM_WEIGHT,
    Surroundings,
    crowding_s,
    harm,
    others_s,
    slowing_s,
)
from pdcoord.core.model import Slo

SLO = Slo(ttft_s=2.0, tpot_s=0.05)
seconds = st.floats(0.0, 100.0)


def test_an_idle_endpoint_harms_nobody() -> None:
    assert harm(SLO, 1.5, Surroundings(0.0, 0, 0.01), 0.3, 250.0) == 0.0


def test_behind_a_queue_as_long_as_the_objective_each_typical_prefill_costs_one_request() -> None:
    assert harm(SLO, 1.5, Surroundings(2.0, 0, 0.01), 0.3, 250.0) == pytest.approx(5.0)
    assert harm(SLO, 1.5, Surroundings(1.0, 0, 0.01), 0.3, 250.0) == pytest.approx(2.5)


def test_streams_lose_the_share_of_their_slack_that_the_prefill_takes() -> None:
    # 0.03 s of slack for each of 200 tokens: 6 s, of which the prefill takes a quarter from 4 streams.
    at = Surroundings(0.0, 4, 0.02)
    assert harm(SLO, 1.5, at, 0.3, 200.0) == pytest.approx(STREAM_WEIGHT * 4 * 0.25)
    slow = Surroundings(0.0, 4, 0.044)
    assert harm(SLO, 0.6, slow, 0.3, 200.0) == pytest.approx(STREAM_WEIGHT * 4 * 0.5)


def test_without_objectives_there_is_nothing_to_miss() -> None:
    assert harm(Slo(), 9.0, Surroundings(9.0, 99, 0.1), 0.3, 200.0) == 0.0


def test_time_of_others_is_that_of_the_streams_and_of_those_behind() -> None:
    at = Surroundings(0.6, 5, 0.01)
    assert others_s(1.5, at, 0.3) == pytest.approx(1.5 * (STALL_WEIGHT * 5 + QUEUE_WEIGHT * 2))
    assert others_s(1.5, replace(at, queue_s=0.0), 0.0) == pytest.approx(1.5 * STALL_WEIGHT * 5)
    assert others_s(1.5, Surroundings(0.0, 0, 0.01), 0.3) == 0.0


def test_room_is_dear_where_a_pool_is_full_and_for_as_long_as_an_answer_takes() -> None:
    assert crowding_s(0.01, 1.0, 20.0) == pytest.approx(ROOM_WEIGHT * 0.01 * 20.0)
    assert crowding_s(0.01, 0.5, 20.0) == pytest.approx(crowding_s(0.01, 1.0, 20.0) / 16)
    assert crowding_s(0.01, 0.0, 20.0) == crowding_s(0.0, 1.0, 20.0) == 0.0


def test_an_answer_slows_each_of_the_others_and_none_where_there_is_none() -> None:
    assert slowing_s(7, 0.5) == pytest.approx(SLOWING_WEIGHT * 3.5)
    assert slowing_s(0, 0.5) == 0.0


@given(
    prefill_s=seconds,
    queue_s=seconds,
    streams=st.integers(0, 1_000),
    more=st.floats(0.0, 10.0),
    typical_s=st.floats(0.0, 10.0),
    output=st.floats(0.0, 1e5),
)
def test_it_is_never_negative_and_grows_with_the_prefill_and_what_it_meets(
    prefill_s: float,
    queue_s: float,
    streams: int,
    more: float,
    typical_s: float,
    output: float,
) -> None:
    at = Surroundings(queue_s, streams, 0.01)
    least = harm(SLO, prefill_s, at, typical_s, output)
    assert least >= 0.0
    assert others_s(prefill_s, at, typical_s) >= 0.0
    busier = Surroundings(queue_s + more, streams + 1, 0.01)
    assert harm(SLO, prefill_s + more, busier, typical_s, output) >= least
