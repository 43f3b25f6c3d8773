from typing import Any

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.sim.routers.base import Route
from pdcoord.sim.routers.roundrobin import ProxyMode, RoundRobin, ServiceSettings

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


def test_places_that_serve_alone_take_turns_and_the_dead_are_skipped(
    surroundings_of: Any, call_of: Any, sample_of: Any
) -> None:
    router = RoundRobin(surroundings_of([B, P, D, B]), "rr", ServiceSettings())
    assert [router.route(call_of(), 0.0).decode for _ in range(4)] == [0, 2, 3, 0]
    router.sampled(2, None, 0.0)
    assert [router.route(call_of(), 0.0).decode for _ in range(2)] == [3, 0]
    router.sampled(2, sample_of(), 0.0)
    assert router.route(call_of(), 0.0) == Route(2, why="alone")


def test_pairs_take_turns_where_none_serves_alone(surroundings_of: Any, call_of: Any) -> None:
    surroundings = surroundings_of([P, P, D, D], engine=EngineKind.SGLANG)
    router = RoundRobin(surroundings, "rr", ServiceSettings())
    routes = [router.route(call_of(), 0.0) for _ in range(3)]
    assert [(route.prefill, route.decode) for route in routes] == [(0, 2), (1, 3), (0, 2)]


def test_iptables_draws(surroundings_of: Any, call_of: Any) -> None:
    router = RoundRobin(surroundings_of([B, B, B]), "random", ServiceSettings(ProxyMode.IPTABLES))
    counts = [0, 0, 0]
    for _ in range(3_000):
        counts[router.route(call_of(), 0.0).decode] += 1
    assert all(900 < count < 1_100 for count in counts)
