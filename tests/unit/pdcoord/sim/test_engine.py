"""One emulated engine alone: latency, limits, aborts, determinism."""

import itertools
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.sim.kvpool import BlocksStored
from pdcoord.sim.messages import (
    Abort,
    CacheCleared,
    FinishReason,
    KvChanged,
    Rejected,
    RejectReason,
    RequestDone,
    ShutDown,
    StepsSlowed,
    TokenOut,
)
from pdcoord.sim.tokens import DRAWN_TOKENS_MAX, DRAWN_TOKENS_MIN


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def test_a_lone_request_takes_what_the_figures_say(bench: Any) -> None:
    engine = bench.start("e")
    speed = engine.settings.speed
    bench.submit("e", "r", range(500), output_tokens_max=4)
    bench.run(5.0)
    times = bench.times("r")
    assert times[0] == pytest.approx(speed.prefill_s(500))
    for index, gap in enumerate(gaps(times)):
        assert gap == pytest.approx(speed.step_s(1, 500 + index))
    done = bench.done("r")
    assert (done.prompt_tokens, done.output_tokens, done.finish) == (500, 4, FinishReason.LENGTH)
    assert (done.arrived_s, done.scheduled_s, done.first_token_s) == (0.0, 0.0, times[0])
    assert done.at_s == times[-1]


def test_a_decode_is_slowed_by_a_prefill_beside_it_and_by_nothing_else(bench: Any) -> None:
    engine = bench.start("e", step_tokens_max=200)
    speed = engine.settings.speed
    bench.submit("e", "stream", range(64), output_tokens_max=60)
    bench.run(0.2)
    before = len(bench.times("stream"))
    bench.submit("e", "prefill", range(10_000, 11_000), output_tokens_max=1)
    bench.run(3.0)
    times, first_s = bench.times("stream"), bench.times("prefill")[0]
    steps = gaps(times)
    # The step under way ends as it began; then six steps carry a chunk (199 tokens of 1,000 each).
    slowed = [i for i, at_s in enumerate(times[1:]) if at_s <= first_s and i >= before]
    assert len(slowed) == 6
    for index, gap in enumerate(steps):
        context = 64 + index
        if index in slowed:
            begin = 199 * slowed.index(index)
            end = min(1_000, begin + 199)
            chunk = end - begin
            pairs = end * end - begin * begin
            compute = (
                speed.prefill_base_s
                + chunk * speed.prefill_s_per_token
                + pairs * speed.prefill_s_per_token_squared
            )
            read = context * speed.step_s_per_context_token + speed.step_s_per_sequence
            expected = max(speed.step_base_s, compute) + read
        else:
            expected = speed.step_s(1, context)
        assert gap == pytest.approx(expected), f"step {index}"
    # The same stream without the other request: every step as predicted.
    bench.start("alone", step_tokens_max=200)
    bench.submit("alone", "same", range(64), output_tokens_max=60)
    bench.run(3.0)
    for index, gap in enumerate(gaps(bench.times("same"))):
        assert gap == pytest.approx(speed.step_s(1, 64 + index))
    assert bench.tokens("same") == bench.tokens("stream")


def test_a_late_caller_does_not_slow_the_engine(bench: Any) -> None:
    exact, late = bench.start("exact"), bench.start("late")
    for name in ("exact", "late"):
        bench.submit(name, name, range(100), output_tokens_max=20)
    while (at_s := exact.next_event_s()) is not None:
        bench.run(at_s - bench.now_s)
    bench.run(7.0)
    assert late.next_event_s() is None
    assert bench.times("late") == bench.times("exact")


def test_an_answer_without_a_limit_ends_of_its_own_accord(bench: Any) -> None:
    bench.start("e")
    bench.submit("e", "r", range(20))
    bench.submit("e", "choice", range(20), choice_index=1)
    bench.run(10.0)
    done = bench.done("r")
    assert done.finish is FinishReason.STOP
    assert DRAWN_TOKENS_MIN <= done.output_tokens <= DRAWN_TOKENS_MAX
    assert bench.tokens("r")[:16] != bench.tokens("choice")[:16]


def test_ignoring_eos_goes_on_to_the_end_of_the_context(bench: Any) -> None:
    bench.start("e", context_tokens_max=300)
    bench.submit("e", "r", range(20), ignores_eos=True)
    bench.submit("e", "long", range(290), output_tokens_max=50)
    bench.run(10.0)
    assert (bench.done("r").output_tokens, bench.done("r").finish) == (280, FinishReason.LENGTH)
    assert bench.done("long").output_tokens == 10


def test_a_pooling_request_computes_its_prompt_and_says_nothing(bench: Any) -> None:
    engine = bench.start("e", context_tokens_max=64)
    bench.submit("e", "r", range(64), is_pooling=True)
    bench.run(1.0)
    assert bench.done("r").output_tokens == 0
    assert bench.of(TokenOut) == []
    assert engine.counters.generated_tokens == 0


@pytest.mark.parametrize(
    ("fields", "prompt", "reason"),
    [
        ({}, [], RejectReason.EMPTY_PROMPT),
        ({}, range(2_048), RejectReason.CONTEXT_TOO_LONG),
        ({"is_pooling": True}, range(2_049), RejectReason.CONTEXT_TOO_LONG),
    ],
)
def test_what_can_never_be_served_is_refused(
    bench: Any, fields: dict[str, Any], prompt: Any, reason: RejectReason
) -> None:
    engine = bench.start("e")
    bench.submit("e", "r", prompt, **fields)
    assert [out.reason for out in bench.of(Rejected)] == [reason]
    assert engine.counters.rejected == {reason: 1}
    assert engine.next_event_s() is None


def test_an_id_in_use_is_refused_and_the_first_goes_on(bench: Any) -> None:
    bench.start("e")
    bench.submit("e", "r", range(20), output_tokens_max=2)
    bench.submit("e", "r", range(30), output_tokens_max=9)
    bench.run(1.0)
    assert [out.reason for out in bench.of(Rejected)] == [RejectReason.ID_IN_USE]
    assert bench.done("r").output_tokens == 2


def test_a_full_queue_refuses(bench: Any) -> None:
    bench.start("e", running_max=1, queued_max=2)
    for index in range(4):
        bench.submit("e", str(index), range(100), output_tokens_max=2)
    assert [(out.request_id, out.reason) for out in bench.of(Rejected)] == [("3", RejectReason.QUEUE_FULL)]
    bench.run(2.0)
    assert len(bench.of(RequestDone)) == 3


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.2])
def test_an_aborted_request_frees_everything(bench: Any, after_s: float) -> None:
    engine = bench.start("e")
    bench.submit("e", "first", range(400), output_tokens_max=100)
    bench.submit("e", "second", range(500, 900), output_tokens_max=3)
    bench.run(after_s)
    bench.send("e", Abort("first"))
    bench.send("e", Abort("first"))
    bench.send("e", Abort("never seen"))
    said = len(bench.tokens("first"))
    bench.run(3.0)
    assert len(bench.tokens("first")) == said
    assert bench.of(RequestDone, "first") == []
    assert bench.done("second").output_tokens == 3
    assert engine.pool.usage == 0.0
    assert engine.counters.aborted == 1


def test_cache_changes_are_told_in_order_with_their_tokens(bench: Any) -> None:
    bench.start("e")
    bench.submit("e", "r", range(40), output_tokens_max=20)
    bench.run(2.0)
    bench.send("e", CacheCleared())
    told = [event for out in bench.of(KvChanged) for event in out.events]
    stored = [event for event in told if isinstance(event, BlocksStored)]
    ids = [*range(40), *bench.tokens("r")]
    assert [token for event in stored for token in event.token_ids] == ids[:48]
    assert stored[0].parent is None
    assert stored[1].parent == stored[0].hashes[-1]
    assert len(told) == len(stored) + 1


def test_the_same_seed_gives_the_same_story_and_jitter_another(bench: Any) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        bench.start(name, seed=seed, jitter_share=0.2)
        bench.submit(name, name, range(100), output_tokens_max=20)
    bench.run(5.0)
    assert bench.times("a") == bench.times("b") != bench.times("c")
    assert bench.tokens("a") == bench.tokens("b") == bench.tokens("c")
    speed = bench.cluster.engine("a").settings.speed
    for gap, index in zip(gaps(bench.times("a")), range(20), strict=False):
        assert 0.8 <= gap / speed.step_s(1, 100 + index) <= 1.2


def test_another_model_seed_answers_differently(bench: Any) -> None:
    for name, model_seed in (("a", 1), ("b", 2)):
        bench.start(name, model_seed=model_seed)
        bench.submit(name, name, range(100), output_tokens_max=20)
    bench.run(5.0)
    assert bench.tokens("a") != bench.tokens("b")


@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_whatever_comes_ends_once_and_leaves_nothing(bench_of: Any, seed: int, count: int) -> None:
    bench = bench_of()
    rng = Random(seed)
    engine = bench.start(
        "e", block_total=24, context_tokens_max=384, running_max=4, queued_max=8, step_tokens_max=64
    )
    aborted, rejected = set(), set()
    for index in range(count):
        base = rng.randrange(3) * 1_000
        prompt = range(base, base + rng.randrange(1, 380))
        bench.submit("e", str(index), prompt, output_tokens_max=rng.choice([1, 5, 60, None]))
        bench.run(rng.choice([0.0, 0.01, 0.3]))
        if rng.random() < 0.3:
            victim = str(rng.randrange(index + 1))
            aborted.add(victim)
            bench.send("e", Abort(victim))
    bench.run(1_000.0)
    rejected = {out.request_id for out in bench.of(Rejected)}
    done = [out.request_id for out in bench.of(RequestDone)]
    assert len(done) == len(set(done))
    assert {str(index) for index in range(count)} == set(done) | rejected | aborted
    assert engine.next_event_s() is None
    assert engine.pool.usage == 0.0
    assert (engine.running_count, engine.waiting_count) == (0, 0)


def test_settings_that_no_engine_can_have_are_refused(bench: Any) -> None:
    for fields in (
        {"block_total": 0},
        {"context_tokens_max": 10_000},
        {"lease_s": 0.0},
        {"jitter_share": 1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            bench.start("e", **fields)


@pytest.mark.parametrize("limit", [None, 40])
def test_an_answer_goes_on_where_a_prompt_ends_in_it(bench: Any, limit: int | None) -> None:
    bench.start("e")
    bench.submit("e", "whole", range(2_000, 2_100), output_tokens_max=limit)
    bench.run(10.0)
    whole, total = bench.tokens("whole"), bench.done("whole").output_tokens
    for cut in (1, 7, total - 1):
        prompt = [*range(2_000, 2_100), *whole[:cut]]
        left = None if limit is None else limit - cut
        bench.submit("e", f"from {cut}", prompt, output_tokens_max=left)
        bench.run(10.0)
        assert bench.tokens(f"from {cut}") == whole[cut:]
        assert bench.done(f"from {cut}").finish is bench.done("whole").finish
        # What the answer left behind is found again, as any prompt is.
        assert bench.done(f"from {cut}").cached_tokens == (len(prompt) - 1) // 16 * 16


def test_a_whole_answer_is_followed_by_nothing(bench: Any) -> None:
    bench.start("e")
    bench.submit("e", "whole", range(100))
    bench.run(10.0)
    bench.submit("e", "more", [*range(100), *bench.tokens("whole")])
    bench.submit("e", "endless", [*range(100), *bench.tokens("whole")], ignores_eos=True)
    bench.run(1.0)
    assert (bench.done("more").output_tokens, bench.done("more").finish) == (0, FinishReason.STOP)
    assert len(bench.tokens("endless")) > 1


def test_slowed_steps_take_longer_from_now_on(bench: Any) -> None:
    engine = bench.start("e")
    speed = engine.settings.speed
    bench.submit("e", "r", range(100), output_tokens_max=6)
    prefill_s = speed.prefill_s(100)
    bench.run(prefill_s / 2)
    bench.send("e", StepsSlowed(0.1))
    bench.run(60.0)
    first_s, second_s = bench.times("r")[:2]
    assert first_s == pytest.approx(prefill_s / 2 + prefill_s / 2 * 10)
    assert second_s - first_s == pytest.approx(10 * speed.step_s(1, 100))


def test_healed_steps_end_the_one_under_way_sooner(bench: Any) -> None:
    engine = bench.start("e")
    bench.send("e", StepsSlowed(0.001))
    bench.submit("e", "r", range(100), output_tokens_max=1)
    bench.run(1.0)
    assert bench.times("r") == []
    bench.send("e", StepsSlowed(1.0))
    bench.run(5.0)
    assert bench.times("r")[0] == pytest.approx(1.0 + engine.settings.speed.prefill_s(100) - 0.001)


def test_a_shutdown_lets_what_runs_end_and_turns_away_what_comes(bench: Any) -> None:
    engine = bench.start("e")
    bench.submit("e", "before", range(100), output_tokens_max=20)
    bench.submit("e", "leg", range(200), is_prefill_leg=True)
    bench.run(0.001)
    bench.send("e", ShutDown())
    bench.submit("e", "after", range(300), output_tokens_max=20)
    assert (bench.done("after").finish, bench.done("after").output_tokens) == (FinishReason.ABORT, 0)
    assert engine.counters.aborted == 1
    bench.run(5.0)
    assert bench.done("before").output_tokens == 20
    assert bench.done("leg").ticket is not None
    assert not engine.is_drained, "a consumer may still come for the prefill"
    bench.run(engine.settings.lease_s)
    assert engine.is_drained
