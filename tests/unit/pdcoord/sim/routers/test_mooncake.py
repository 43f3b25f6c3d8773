from typing import Any

import pytest

from pdcoord.core.fleet import Role
from pdcoord.sim.routers.base import Route, Shed
from pdcoord.sim.routers.mooncake import REJECTED, Mooncake, MooncakeSettings

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


def test_ttft_is_queue_plus_prefill_of_what_is_not_cached(
    surroundings_of: Any, call_of: Any, send_to: Any
) -> None:
    """Place 0 has 8 of 10 blocks (0.010 + 0.128 s) behind a prompt of 0.138 s; place 1 takes 0.650 s."""
    router = Mooncake(surroundings_of([P, P, D]), "mc", MooncakeSettings())
    call = call_of(10)
    router.cached(0, call.keys[:8], (), 0.0)
    send_to(router, call_of(10), [0, 2], is_open=True)
    router._cached_keys = router._events.match(call.keys, 0.0)
    assert router.ttft_s(call, 0, 0.0) == pytest.approx(0.276)
    assert router.ttft_s(call, 1, 0.0) == pytest.approx(0.650)
    assert router.ttft_s(call, 0, 0.1) == pytest.approx(0.176), "the queue has moved on"
    assert router.ttft_s(call, 0, 9.0) == pytest.approx(0.138), "the oldest cannot be more than done"
    assert router.route(call, 0.0) == Route(2, 0, why="split")


def test_a_queue_in_front_of_the_cache_sends_elsewhere(
    surroundings_of: Any, call_of: Any, send_to: Any
) -> None:
    router = Mooncake(surroundings_of([P, P, D]), "mc", MooncakeSettings())
    call = call_of(10)
    router.cached(0, call.keys[:8], (), 0.0)
    for _ in range(4):
        send_to(router, call_of(10), [0, 2], is_open=True)
    assert router.route(call, 0.0).prefill == 1


def test_the_queue_is_over_with_the_first_tokens(surroundings_of: Any, call_of: Any) -> None:
    router = Mooncake(surroundings_of([P, D]), "mc", MooncakeSettings())
    calls = [call_of(10, prefix=at) for at in range(3)]
    routes = [router.route(call, 0.0) for call in calls]
    queue = router._queues[0]
    assert queue.wait_s(0.0) == pytest.approx(1.95)
    router.began(calls[0], routes[0], None, 1.0)
    assert queue.wait_s(1.0) == pytest.approx(1.3)
    assert queue.wait_s(1.3) == pytest.approx(1.0)
    router.ended(calls[2], routes[2], 0, 1.3, is_ok=False)
    router.began(calls[1], routes[1], None, 2.0)
    assert queue.wait_s(2.0) == 0.0


def test_the_decode_place_has_the_least_time_between_tokens(
    surroundings_of: Any, call_of: Any, send_to: Any
) -> None:
    """One call of 640 tokens: 10 + 1 + 0.64 ms; beside another 10 + 2 + 1.28 ms, at twice the speed half."""
    router = Mooncake(surroundings_of([P, D, D], speeds=[1.0, 1.0, 2.0]), "mc", MooncakeSettings())
    send_to(router, call_of(10), [0, 2], is_open=True)
    call = call_of(10)
    assert router.tbt_s(call, 1) == pytest.approx(0.01164)
    assert router.tbt_s(call, 2) == pytest.approx(0.00664)
    assert router.route(call, 0.0).decode == 2


def test_it_rejects_only_if_told_to(surroundings_of: Any, call_of: Any) -> None:
    surroundings = surroundings_of([P, D])
    assert isinstance(Mooncake(surroundings, "mc", MooncakeSettings()).route(call_of(100), 0.0), Route)
    strict = Mooncake(surroundings, "mc", MooncakeSettings(ttft_s_max=6.0))
    assert strict.route(call_of(100), 0.0) == Shed(REJECTED)
    assert isinstance(strict.route(call_of(90), 0.0), Route)
    assert Mooncake(surroundings, "mc", MooncakeSettings(tbt_s_max=0.01)).route(call_of(), 0.0) == Shed(
        REJECTED
    )


def test_without_a_pair_it_serves_whole(surroundings_of: Any, call_of: Any) -> None:
    router = Mooncake(surroundings_of([P, D], vendors=["a", "b"]), "mc", MooncakeSettings())
    assert router.route(call_of(), 0.0) == Route(1, why="alone")
