"""How long a step takes, and who is in it."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.sim.messages import TokenOut
from pdcoord.sim.steps import StepWork, step_s

SPEED = SpeedFigures(
    prefill_base_s=0.004,
    prefill_s_per_token=0.0001,
    step_base_s=0.010,
    prefill_s_per_token_squared=1e-9,
    step_s_per_context_token=1e-8,
    step_s_per_sequence=1e-5,
)


def test_decodes_alone_take_what_a_policy_predicts() -> None:
    work = StepWork(decode_count=8, context_tokens=20_000)
    assert step_s(SPEED, work) == SPEED.step_s(8, 20_000)


def test_a_whole_prompt_alone_takes_what_a_policy_predicts() -> None:
    work = StepWork(prefill_tokens=2_000, token_pairs=2_000 * 2_000)
    assert step_s(SPEED, work) == SPEED.prefill_s(2_000)


def test_a_short_prompt_takes_no_less_than_reading_the_weights() -> None:
    assert step_s(SPEED, StepWork(prefill_tokens=3, token_pairs=9)) == SPEED.step_base_s


@given(st.integers(0, 256), st.integers(0, 10**6), st.integers(0, 8192))
def test_a_prefill_never_makes_a_step_shorter(count: int, context: int, prefill: int) -> None:
    alone = StepWork(decode_count=count, context_tokens=context)
    beside = StepWork(count, context, prefill, prefill * prefill)
    assert step_s(SPEED, beside) >= step_s(SPEED, alone)


def test_decodes_come_first_and_prefill_chunks_fill_the_budget(bench: Any) -> None:
    bench.start("e", step_tokens_max=100)
    bench.submit("e", "old", range(10), output_tokens_max=50)
    bench.run(0.05)
    bench.submit("e", "new", range(1_000, 1_250), output_tokens_max=1)
    bench.run(1.0)
    # 99 tokens a step are left beside one decode: 250 take three steps.
    old, new = bench.times("old"), bench.times("new")
    steps_of_new = [at for at in old if bench.now_s - 1.0 < at <= new[0]]
    assert len(steps_of_new) == 4  # The step under way when it came, and three with a chunk each.


def test_requests_wait_when_enough_run(bench: Any) -> None:
    engine = bench.start("e", running_max=2)
    for index in range(3):
        bench.submit("e", str(index), range(index * 100, index * 100 + 20), output_tokens_max=5)
    assert (engine.running_count, engine.waiting_count) == (1, 2)  # They came while the first step ran.
    bench.run(0.015)
    assert (engine.running_count, engine.waiting_count) == (2, 1)
    bench.run(1.0)
    assert len(bench.of(TokenOut)) == 15
    assert bench.done("2").scheduled_s >= min(bench.done("0").at_s, bench.done("1").at_s)


def test_the_youngest_is_preempted_when_the_pool_is_full_and_answers_the_same(bench: Any) -> None:
    # 16 blocks of 16: two requests of 100 + 100 tokens need 26.
    engine = bench.start("small", block_total=16, context_tokens_max=256)
    bench.start("large")
    for name in ("small", "large"):
        bench.submit(name, f"{name}-a", range(100), output_tokens_max=100)
        bench.submit(name, f"{name}-b", range(500, 600), output_tokens_max=100)
    bench.run(20.0)
    assert engine.counters.preemptions >= 1
    assert bench.tokens("small-a") == bench.tokens("large-a")
    assert bench.tokens("small-b") == bench.tokens("large-b")
    assert bench.done("small-a").at_s < bench.done("small-b").at_s
    assert engine.pool.usage == 0.0


def test_a_preempted_request_comes_before_those_that_never_ran(bench: Any) -> None:
    engine = bench.start("e", block_total=16, context_tokens_max=256, step_tokens_max=128)
    bench.submit("e", "a", range(100), output_tokens_max=100)
    bench.submit("e", "b", range(500, 600), output_tokens_max=100)
    bench.run(0.1)
    bench.submit("e", "c", range(900, 1_000), output_tokens_max=100)
    bench.run(20.0)
    assert engine.counters.preemptions >= 1
    times = bench.times("b")
    resumed_s = max(pairwise(times), key=lambda pair: pair[1] - pair[0])[1]
    assert resumed_s < bench.times("c")[0]


def test_a_request_that_nobody_can_preempt_for_waits_for_pinned_blocks(bench: Any) -> None:
    engine = bench.start("e", block_total=16, context_tokens_max=256, lease_s=5.0)
    bench.prefill("e", "pinned", range(200))
    bench.submit("e", "next", range(1_000, 1_100), output_tokens_max=2)
    bench.run(1.0)
    assert engine.waiting_count == 1
    bench.run(5.0)
    assert len(bench.tokens("next")) == 2


@pytest.mark.parametrize("count", [1, 3])
def test_a_cached_beginning_is_not_computed_again(bench: Any, count: int) -> None:
    engine = bench.start("e")
    prompt = list(range(1_000))
    bench.submit("e", "first", prompt, output_tokens_max=1)
    bench.run(2.0)
    began = bench.now_s
    bench.submit("e", "again", prompt + [7] * count, output_tokens_max=1)
    bench.run(2.0)
    assert bench.done("again").cached_tokens == 992  # 62 full blocks of 16.
    assert bench.done("again").at_s - began < bench.done("first").at_s / 5
    assert engine.counters.cache_hit_tokens == 992


def test_a_full_hit_still_computes_the_last_token(bench: Any) -> None:
    bench.start("e")
    for request_id in ("first", "again"):
        bench.submit("e", request_id, range(64), output_tokens_max=3)
        bench.run(1.0)
    assert bench.done("again").cached_tokens == 48
    assert bench.tokens("again") == bench.tokens("first")


def test_another_salt_does_not_share_the_cache(bench: Any) -> None:
    bench.start("e")
    bench.submit("e", "first", range(64), output_tokens_max=1, cache_salt="a")
    bench.run(1.0)
    bench.submit("e", "again", range(64), output_tokens_max=1, cache_salt="b")
    bench.run(1.0)
    assert bench.done("again").cached_tokens == 0


def test_the_answer_is_cached_too(bench: Any) -> None:
    bench.start("e")
    bench.submit("e", "turn-1", range(30), output_tokens_max=40)
    bench.run(2.0)
    follow_up = [*range(30), *bench.tokens("turn-1"), 5, 6]
    bench.submit("e", "turn-2", follow_up, output_tokens_max=1)
    bench.run(1.0)
    assert bench.done("turn-2").cached_tokens == 64  # Of 30 + 39 computed: four blocks of 16.
