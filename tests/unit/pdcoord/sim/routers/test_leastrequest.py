from typing import Any

from pdcoord.core.fleet import Role
from pdcoord.sim.routers.base import Route
from pdcoord.sim.routers.leastrequest import LeastRequest, LeastRequestSettings


def test_the_busier_of_two_is_taken_only_when_drawn_twice(surroundings_of: Any, call_of: Any) -> None:
    """Of two places, one busy: both draws hit it with a chance of 1 in 4, with replacement."""
    router = LeastRequest(surroundings_of([Role.BOTH] * 2), "lr", LeastRequestSettings())
    while not router.loads[0].requests:
        call = call_of()
        route = router.route(call, 0.0)
        assert isinstance(route, Route)
        if route.decode == 1:
            router.ended(call, route, 1, 0.0, is_ok=True)
    hits = 0
    for _ in range(2_000):
        call = call_of()
        route = router.route(call, 0.0)
        assert isinstance(route, Route)
        hits += route.decode == 0
        router.ended(call, route, 1, 0.0, is_ok=True)
    assert 0.2 < hits / 2_000 < 0.3


def test_many_choices_find_the_idle_place(surroundings_of: Any, call_of: Any) -> None:
    router = LeastRequest(surroundings_of([Role.BOTH] * 4), "lr", LeastRequestSettings(choice_count=60))
    assert sorted(router.route(call_of(), 0.0).decode for _ in range(4)) == [0, 1, 2, 3]


def test_it_retries_twice_elsewhere(surroundings_of: Any, call_of: Any) -> None:
    router = LeastRequest(surroundings_of([Role.BOTH] * 4), "lr", LeastRequestSettings())
    call = call_of()
    route = router.route(call, 0.0)
    tried = set()
    while isinstance(route, Route):
        tried.add(route.decode)
        route = router.failed(call, route, 0.0)
    assert len(tried) == 3
