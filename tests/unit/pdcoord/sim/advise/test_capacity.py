"""Capacities: the largest batch within objective, KV and limit, and lines that agree with it."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.advise.capacity import (
    USE_MAX,
    USE_MIN,
    capacity,
    crowding,
    in_time_share,
    prefill_s,
    prefill_use,
)

Make = Callable[..., Any]


def test_a_batch_is_bounded_by_what_is_least(kind: Make, traffic: Make, demand: Make) -> None:
    calls = traffic(demand(tpot_s_max=0.05))
    by_objective = capacity(kind(), calls)
    assert (by_objective.batch, by_objective.batch_bound) == (pytest.approx(40.0), "objective")
    assert by_objective.decode_tokens_per_s == pytest.approx(40 / 0.05)
    assert by_objective.prefill_tokens_per_s == pytest.approx(10_000.0)
    by_kv = capacity(kind(kv_tokens=10_512), calls)
    assert (by_kv.batch, by_kv.batch_bound) == (pytest.approx(10_512 / 1_050, rel=1e-3), "kv")
    by_limit = capacity(kind(running_max=7), calls)
    assert (by_limit.batch, by_limit.batch_bound) == (7.0, "running_max")
    assert by_limit.decode_tokens_per_s == pytest.approx(7 / 0.017)


def test_the_lines_meet_the_largest_batch(kind: Make, traffic: Make, demand: Make) -> None:
    mine = capacity(kind(step_s_per_context_token=1e-7), traffic(demand(tpot_s_max=0.05)))
    assert mine.step_room is not None
    # Calls per second of an engine that only decodes: by the line, and by Little's law.
    assert mine.step_room / mine.costs[0].step_share == pytest.approx(mine.batch / (100 * 0.05))


def test_a_pool_too_small_for_one_call_cannot_decode(kind: Make, traffic: Make, demand: Make) -> None:
    small = kind(kv_tokens=1_008, context_tokens_max=1_000)
    assert not capacity(small, traffic(demand())).costs[0].can_decode
    assert capacity(kind(), traffic(demand())).costs[0].can_decode


def test_an_objective_shorter_than_a_step_leaves_no_room(kind: Make, traffic: Make, demand: Make) -> None:
    mine = capacity(kind(step_base_s=0.06), traffic(demand(tpot_s_max=0.05)))
    assert mine.step_room is not None
    assert mine.step_room < 0.0
    assert (mine.batch, mine.decode_tokens_per_s) == (0.0, 0.0)


def test_stalls_are_felt_more_by_short_answers(kind: Make, traffic: Make, demand: Make) -> None:
    long, short = (
        capacity(kind(), traffic(demand(output_tokens=tokens, tpot_s_max=0.05))).costs[0]
        for tokens in (10_000.0, 10.0)
    )
    assert long.stall_s == short.stall_s == pytest.approx(0.09)
    assert long.stall_s < long.felt_stall_s < short.felt_stall_s <= 3.0 * short.stall_s


@given(st.floats(0, 1_000), st.integers(1, 100))
def test_more_engines_are_crowded_less(batch: float, count: int) -> None:
    assert 0.0 < crowding(batch, count) <= crowding(batch, count + 1) <= 1.0


def test_queues_are_kept_shorter_the_less_time_there_is(kind: Make, traffic: Make, demand: Make) -> None:
    uses = [
        prefill_use(kind(), traffic(demand(ttft_s_max=limit_s)), count)
        for limit_s, count in ((0.11, 1), (0.3, 1), (1.0, 1), (1.0, 4), (60.0, 1))
    ]
    assert uses == sorted(uses)
    assert uses[0] == pytest.approx(USE_MIN)
    assert uses[-1] == pytest.approx(USE_MAX)
    assert prefill_use(kind(), traffic(demand()), 1) == USE_MAX


def test_calls_begin_in_time_or_not_by_their_own_length(kind: Make, demand: Make) -> None:
    calls = demand(uncached=(1_000, 5_000, 30_000), ttft_s_max=1.0)
    assert prefill_s(kind(), 5_000) == pytest.approx(0.5)
    assert in_time_share(kind(), calls, 0.0, 0.0) == pytest.approx(2 / 3)
    assert in_time_share(kind(), calls, 2e-4, 0.0) == pytest.approx(1 / 3)
    assert in_time_share(kind(), calls, 0.0, 0.95) == 0.0
    assert in_time_share(kind(), demand(), 1.0, 100.0) == 1.0
