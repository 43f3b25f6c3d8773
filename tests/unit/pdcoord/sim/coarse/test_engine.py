"""The fast engine: what each step costs, who goes first, and how strides are cut."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from pdcoord.sim.coarse.engine import CoarseEngine, News
from pdcoord.sim.coarse.sequences import Sequence, Stage
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.workload.call import Call

Make = Callable[..., Call]
STEP_S, PER_SEQUENCE_S, PER_CONTEXT_S = 0.01, 0.001, 1e-6


class Bench:
    """One engine, a clock, and what it told when."""

    def __init__(self, settings: EngineSettings, key_tokens: int = 16) -> None:
        self.engine = CoarseEngine(settings, key_tokens, Random(0))
        self.now_s = 0.0
        self.told: dict[tuple[str, int], float] = {}
        self.wake_count = 0

    def submit(self, call: Call, at_s: float = 0.0, **more: Any) -> Sequence:
        self.until(at_s)
        self.now_s = max(self.now_s, at_s)
        sequence = Sequence(call, None, **more)
        self.engine.submit(sequence, self.now_s)
        self.check()
        return sequence

    def until(self, at_s: float) -> None:
        while self.engine.wake_s < at_s:
            self.now_s = self.engine.wake_s
            self.engine.wake()
            self.wake_count += 1
            self.check()

    def check(self) -> None:
        self.engine.validate()
        for kind, sequence in self.engine.news:
            self.told[kind.name, sequence.call.id] = self.now_s
        self.engine.news.clear()


@pytest.fixture
def bench(engine_settings: Callable[..., EngineSettings]) -> Callable[..., Bench]:
    return lambda **changes: Bench(engine_settings(**changes))


def test_a_call_alone_costs_its_prefill_and_its_steps(bench: Callable[..., Bench], call_of: Make) -> None:
    here = bench()
    here.submit(call_of(1, 200, 11))
    here.until(9.0)
    prefill_s = 0.004 + 200 * 0.0001
    decode_s = 10 * (STEP_S + PER_SEQUENCE_S) + PER_CONTEXT_S * sum(range(200, 210))
    assert here.told["BEGAN", 1] == pytest.approx(prefill_s)
    assert here.told["DONE", 1] == pytest.approx(prefill_s + decode_s)
    # One stride for the prompt, one for all of the answer.
    assert (here.wake_count, here.engine.step_count) == (2, 11)
    assert here.engine.busy_s == pytest.approx(prefill_s + decode_s)


def test_an_arrival_cuts_a_stride_at_the_end_of_the_step_under_way(
    bench: Callable[..., Bench], call_of: Make
) -> None:
    here, alone = bench(), bench()
    for each in (here, alone):
        each.submit(call_of(1, 200, 100))
    alone.until(9.0)
    here.submit(call_of(2, 100, 2), at_s=0.5)
    began_s = here.engine.wake_s
    assert 0.5 <= began_s < 0.5 + STEP_S + 2 * PER_SEQUENCE_S
    here.until(9.0)
    # Its prompt is computed beside one decoding sequence, whose step it delays.
    step_s = 0.004 + 100 * 0.0001 + PER_SEQUENCE_S
    assert here.told["BEGAN", 2] == pytest.approx(began_s + step_s, abs=1e-3)
    assert here.told["DONE", 1] > alone.told["DONE", 1]
    assert here.engine.step_count == alone.engine.step_count == 100


def test_what_cannot_begin_cuts_nothing(bench: Callable[..., Bench], call_of: Make) -> None:
    here = bench(running_max=1)
    here.submit(call_of(1, 100, 50))
    here.until(0.1)
    end_s = here.engine.wake_s
    here.submit(call_of(2, 100, 2), at_s=0.2)
    assert here.engine.wake_s == end_s
    assert (here.engine.running_count, here.engine.waiting_count) == (1, 1)


def test_long_prompts_are_computed_in_chunks_behind_decodes(
    bench: Callable[..., Bench], call_of: Make
) -> None:
    here = bench(step_tokens_max=64)
    here.submit(call_of(1, 10, 40))
    here.submit(call_of(2, 150, 1))
    here.until(9.0)
    # Beside one decode 63 of a step's 64 tokens are left to it: 63, 63 and 24.
    assert here.engine.step_count == 40
    whole_s = 0.004 + 63 * 0.0001 + PER_SEQUENCE_S
    last_s = STEP_S + PER_SEQUENCE_S
    assert here.told["DONE", 2] == pytest.approx(STEP_S + 2 * whole_s + last_s, rel=0.01)


def test_a_full_pool_preempts_the_youngest_and_recomputes_it(
    bench: Callable[..., Bench], call_of: Make
) -> None:
    here = bench(block_total=24, context_tokens_max=384)
    for number in (1, 2, 3):
        here.submit(call_of(number, 100, 60))
    here.until(30.0)
    assert here.engine.preemption_count > 0
    assert here.told["DONE", 1] < here.told["DONE", 2] < here.told["DONE", 3]
    assert here.told["BEGAN", 3] < here.told["DONE", 1]
    assert here.engine.pool.held_tokens == 0


def test_a_prefix_saves_its_computation(bench: Callable[..., Bench], call_of: Make) -> None:
    here = bench()
    keys = tuple(range(12))
    here.submit(call_of(1, 200, 1, keys=keys))
    here.until(1.0)
    second = here.submit(call_of(2, 200, 1, keys=keys), at_s=1.0)
    here.until(2.0)
    assert second.cached_tokens == 192
    assert here.told["DONE", 2] == pytest.approx(1.0 + STEP_S)
    assert here.engine.pool.stored == list(keys)


def test_the_next_turn_finds_the_answer_too(bench: Callable[..., Bench], call_of: Make) -> None:
    here = bench()
    here.submit(call_of(1, 64, 33, keys=(1, 2, 3, 4), keys_after=(1, 2, 3, 4, 5, 6)))
    here.until(5.0)
    second = here.submit(call_of(2, 120, 1, keys=(1, 2, 3, 4, 5, 6, 7)), at_s=5.0)
    assert second.cached_tokens == 96


def test_a_prefill_leg_is_leased_until_it_is_released(bench: Callable[..., Bench], call_of: Make) -> None:
    here = bench()
    leg = here.submit(call_of(1, 100, 50, keys=(1, 2)), is_prefill_leg=True)
    here.until(5.0)
    assert here.told["DONE", 1] == pytest.approx(0.014)
    assert leg.stage is Stage.LEASED
    assert here.engine.pool.held_tokens == 112
    here.engine.release(leg, 5.0)
    here.engine.release(leg, 5.0)
    here.check()
    assert here.engine.pool.held_tokens == 0
    assert here.engine.pool.match((1, 2), 9) == 2


def test_a_pull_waits_for_room_and_then_decodes_in_its_first_step(
    bench: Callable[..., Bench], call_of: Make
) -> None:
    here = bench()
    pull = here.submit(call_of(1, 100, 3), awaits_fetch=True)
    assert (pull.stage, pull.fetch_tokens) == (Stage.FETCHING, 100)
    assert (here.engine.running_count, here.engine.waiting_count) == (0, 1)
    here.now_s = 0.5
    here.engine.fetched(pull, 0.5)
    here.check()
    here.until(5.0)
    step_s = STEP_S + PER_SEQUENCE_S + 99 * PER_CONTEXT_S
    assert here.told["BEGAN", 1] == pytest.approx(0.5 + step_s)
    assert here.engine.step_count == 3
    assert ("FETCH", 1) in here.told


@pytest.mark.parametrize("kind", ["waiting", "prefilling", "fetching", "leased", "fresh"])
def test_an_aborted_leg_leaves_nothing(bench: Callable[..., Bench], call_of: Make, kind: str) -> None:
    here = bench(running_max=1 if kind == "waiting" else 8, step_tokens_max=64)
    if kind == "waiting":
        here.submit(call_of(1, 100, 1))
    leg = here.submit(
        call_of(2, 200 if kind == "prefilling" else 60, 5),
        is_prefill_leg=kind == "leased",
        awaits_fetch=kind in {"fetching", "fresh"},
    )
    if kind == "fresh":
        here.engine.fetched(leg, 0.0)
    if kind == "leased":
        here.until(1.0)
    names = {"fresh": "DECODING"}
    assert leg.stage is Stage[names.get(kind, kind.upper())]
    here.engine.abort(leg, here.now_s)
    here.engine.abort(leg, here.now_s)
    here.check()
    here.until(9.0)
    assert (here.engine.pool.held_tokens, here.engine.running_count, here.engine.waiting_count) == (0, 0, 0)
    assert ("DONE", 2) not in here.told or kind == "leased"


def test_a_killed_engine_loses_all_and_starts_empty(bench: Callable[..., Bench], call_of: Make) -> None:
    here = bench()
    first = here.submit(call_of(1, 100, 50, keys=(1, 2)))
    here.until(0.2)
    second = here.submit(call_of(2, 100, 50), awaits_fetch=True)
    assert here.engine.kill() == [first, second]
    assert {first.stage, second.stage} == {Stage.OVER}
    here.check()
    assert (here.engine.pool.held_tokens, here.engine.pool.cached_keys()) == (0, set())
    here.submit(call_of(3, 100, 2), at_s=1.0)
    here.until(9.0)
    assert ("DONE", 3) in here.told


def test_a_slow_engine_takes_longer_from_its_next_step_on(bench: Callable[..., Bench], call_of: Make) -> None:
    here = bench()
    here.submit(call_of(1, 100, 101))
    here.until(0.02)
    here.engine.slow(2.0, 0.5)
    here.check()
    slowed_s = here.engine.wake_s
    done = here.engine.step_count
    here.until(9.0)
    steps_left = 101 - done
    assert here.told["DONE", 1] > slowed_s + steps_left * STEP_S
    assert here.engine.step_count == 101


def test_a_sample_counts_what_has_grown_in_the_midst_of_a_stride(
    bench: Callable[..., Bench], call_of: Make
) -> None:
    here = bench()
    here.submit(call_of(1, 100, 101))
    here.until(0.02)
    early, late = here.engine.sample(0.03), here.engine.sample(1.0)
    assert (early.running, early.waiting, early.kv_tokens, early.at_s) == (1, 0, 4_096, 0.03)
    assert early.kv_usage == 112 / 4_096
    steps = int((1.0 - 0.014) / (STEP_S + PER_SEQUENCE_S))
    assert late.kv_usage * 4_096 == pytest.approx(100 + steps, abs=17)


def test_jitter_spreads_steps_and_leaves_their_mean(bench: Callable[..., Bench], call_of: Make) -> None:
    plain, jittered = bench(), bench(jitter_share=0.3)
    for here in (plain, jittered):
        for number in range(40):
            here.submit(call_of(number, 100, 20), at_s=number * 1.0)
        here.until(99.0)
    took = [jittered.told["DONE", n] - plain.told["DONE", n] for n in range(40)]
    assert len(set(took)) == 40
    assert abs(sum(took)) / 40 < 0.01


def test_who_can_never_fit_and_who_finds_the_queue_full(bench: Callable[..., Bench], call_of: Make) -> None:
    here = bench(queued_max=2, running_max=1)
    assert here.engine.goal_of(2_048, 5) == 0
    assert here.engine.goal_of(2_040, 50) == 8
    for number in range(3):
        assert not here.engine.is_full
        here.submit(call_of(number, 100, 5))
    assert here.engine.is_full
    assert News.BEGAN < News.DONE < News.FETCH
