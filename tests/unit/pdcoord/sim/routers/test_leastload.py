from typing import Any

import pytest

from pdcoord.core.fleet import Role
from pdcoord.sim.routers.leastload import LeastLoad, LeastLoadSettings

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


def test_time_to_drain_and_the_barrier_add(
    surroundings_of: Any, call_of: Any, sample_of: Any, send_to: Any
) -> None:
    """Two waiting of 640 tokens and 320 sent since, at 2,000 tokens/s; k = 0.75: 0.8 + 0.15·3 = 1.25 s."""
    router = LeastLoad(surroundings_of([B, B]), "ll", LeastLoadSettings())
    for _ in range(2):
        send_to(router, call_of(10), [0], is_open=True)
    router.sampled(0, sample_of(waiting=2, kv_usage=0.75), 1.0)
    router.sampled(1, sample_of(), 1.0)
    send_to(router, call_of(5), [0], is_open=True)
    assert router.scores([0, 1], 1.0) == pytest.approx([1.25, 0.0])
    assert router.route(call_of(), 1.0).decode == 1


def test_measured_throughput_divides(surroundings_of: Any, call_of: Any, sample_of: Any) -> None:
    """101 tokens in 2 s are 50 a second; a fifth of the way to the next call's 100 is 60.

    Ten running make 600 tokens/s; 640 tokens sent since drain in 1.0667 s.
    """
    router = LeastLoad(surroundings_of([B]), "ll", LeastLoadSettings())
    for at_s, span_s in ((0.0, 2.0), (5.0, 1.0)):
        call = call_of()
        route = router.route(call, at_s)
        router.began(call, route, None, at_s + 1.0)
        router.ended(call, route, 101, at_s + 1.0 + span_s, is_ok=True)
    router.sampled(0, sample_of(running=10), 21.0)
    router.route(call_of(10), 21.0)
    assert router.scores([0], 21.0) == pytest.approx([640 / 600])


def test_before_a_call_has_ended_throughput_is_the_pools_figure(
    surroundings_of: Any, call_of: Any, sample_of: Any
) -> None:
    """Ten running in half of 64,000 tokens: a step of 10 + 10 + 32 ms, so 192.3 tokens/s."""
    router = LeastLoad(surroundings_of([B]), "ll", LeastLoadSettings(kv_pressure_weight_s=0.0))
    router.sampled(0, sample_of(running=10, kv_usage=0.5), 0.0)
    router.route(call_of(10), 0.0)
    assert router.scores([0], 0.0) == pytest.approx([640 * 0.052 / 10])
    plain = LeastLoad(surroundings_of([B]), "ll", LeastLoadSettings(is_throughput_measured=False))
    plain.sampled(0, sample_of(running=10), 0.0)
    plain.route(call_of(10), 0.0)
    assert plain.scores([0], 0.0) == pytest.approx([0.32])


def test_readings_are_taken_every_ten_seconds_and_grow_stale(
    surroundings_of: Any, call_of: Any, sample_of: Any
) -> None:
    router = LeastLoad(surroundings_of([B, B]), "ll", LeastLoadSettings())
    router.sampled(0, sample_of(kv_usage=0.5), 0.0)
    router.sampled(0, sample_of(kv_usage=0.9), 9.9)
    assert router.scores([0], 9.9) == pytest.approx([0.15])
    router.sampled(0, sample_of(kv_usage=0.9), 10.0)
    assert router.scores([0], 40.0) == pytest.approx([1.35])
    assert router.scores([0], 40.1) == [0.0], "too old: calls are counted"


def test_a_place_that_reports_nothing_among_others_that_do(
    surroundings_of: Any, call_of: Any, sample_of: Any, send_to: Any
) -> None:
    """Three calls of 1,024 tokens at the nominal 2,000 tokens/s."""
    router = LeastLoad(surroundings_of([B, B]), "ll", LeastLoadSettings())
    for _ in range(3):
        send_to(router, call_of(), [1], is_open=True)
    assert router.scores([0, 1], 0.0) == [0.0, 3.0], "nobody reports: calls are counted"
    router.sampled(0, sample_of(), 0.0)
    assert router.scores([0, 1], 0.0) == pytest.approx([0.0, 1.536])


def test_absurd_usage_is_clamped(surroundings_of: Any, sample_of: Any) -> None:
    router = LeastLoad(surroundings_of([B, B]), "ll", LeastLoadSettings())
    router.sampled(0, sample_of(kv_usage=7.0), 0.0)
    router.sampled(1, sample_of(kv_usage=-7.0), 0.0)
    assert router.scores([0, 1], 0.0) == pytest.approx([0.15 * 999, 0.0])


def test_split_both_are_picked_by_the_rule(surroundings_of: Any, call_of: Any, sample_of: Any) -> None:
    router = LeastLoad(surroundings_of([P, P, D, D]), "ll", LeastLoadSettings(is_split=True))
    for index, usage in enumerate([0.5, 0.1, 0.1, 0.5]):
        router.sampled(index, sample_of(kv_usage=usage), 0.0)
    route = router.route(call_of(), 0.0)
    assert (route.prefill, route.decode, route.other_prefills) == (1, 2, (0,))
