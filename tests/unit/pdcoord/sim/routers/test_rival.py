from typing import Any

from pdcoord.core.fleet import Role
from pdcoord.sim.routers.base import Route, Shed, Surroundings
from pdcoord.sim.routers.rival import NO_ENDPOINTS, NOT_RETRIED, Load, Rival
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


class First(Rival):
    """The first decode place, with its first prefill place if it has one."""

    def __init__(self, surroundings: Surroundings, retries_max: int = 0) -> None:
        super().__init__(surroundings, "first", retries_max)

    def choose(self, call: Call, rotation: Rotation, now_s: float) -> Route | Shed:
        decode = rotation.decodes[0]
        prefills = rotation.prefills_of[decode]
        return Route(decode, prefills[0] if prefills else None)

    def uncached_tokens(self, call: Call, worker: int) -> int:
        return 100


def test_a_split_call_is_accounted_on_both_its_places(surroundings_of: Any, call_of: Any) -> None:
    router = First(surroundings_of([P, D]))
    call = call_of(4)
    route = router.route(call, 0.0)
    assert route == Route(1, 0)
    assert router.loads == [
        Load(requests=1, prefilling=1, prefill_tokens=100, prompt_tokens=256),
        Load(requests=1, decoding=1, context_tokens=256),
    ]
    router.began(call, route, None, 1.0)
    router.began(call, route, None, 1.0)
    assert router.loads == [Load(), Load(requests=1, decoding=1, context_tokens=256)]
    router.validate()
    router.ended(call, route, 10, 2.0, is_ok=True)
    router.ended(call, route, 10, 2.0, is_ok=True)
    assert router.loads == [Load(), Load()]


def test_a_whole_call_counts_once(surroundings_of: Any, call_of: Any) -> None:
    router = First(surroundings_of([D]))
    call = call_of(1)
    router.route(call, 0.0)
    expected = Load(
        requests=1, decoding=1, prefilling=1, prefill_tokens=100, prompt_tokens=64, context_tokens=64
    )
    assert router.loads == [expected]
    router.ended(call, Route(0), 0, 1.0, is_ok=False)
    assert router.loads == [Load()], "one that never began is over too"


def test_a_place_is_out_from_a_failed_scrape_to_the_next_good_one(
    surroundings_of: Any, call_of: Any, sample_of: Any
) -> None:
    router = First(surroundings_of([D, D]))
    router.sampled(0, None, 0.0)
    assert router.route(call_of(), 0.1) == Route(1)
    router.sampled(1, None, 0.2)
    assert router.route(call_of(), 0.3) == Shed(NO_ENDPOINTS)
    router.sampled(0, sample_of(), 0.4)
    assert router.route(call_of(), 0.5) == Route(0)


def test_a_retry_avoids_every_place_that_failed_the_call(surroundings_of: Any, call_of: Any) -> None:
    router = First(surroundings_of([D, D, D, D]), retries_max=2)
    call = call_of()
    route = router.route(call, 0.0)
    chosen = []
    while isinstance(route, Route):
        chosen.append(route.decode)
        route = router.failed(call, route, 1.0)
        router.validate()
    assert chosen == [0, 1, 2]
    assert route == Shed(NOT_RETRIED)
    assert router.loads == [Load()] * 4


def test_one_that_never_retries_sheds_at_once(surroundings_of: Any, call_of: Any) -> None:
    router = First(surroundings_of([D, D]))
    call = call_of()
    route = router.route(call, 0.0)
    assert isinstance(route, Route)
    assert router.failed(call, route, 1.0) == Shed(NOT_RETRIED)


def test_no_retry_is_left_without_a_place(surroundings_of: Any, call_of: Any) -> None:
    router = First(surroundings_of([D]), retries_max=2)
    call = call_of()
    route = router.route(call, 0.0)
    assert isinstance(route, Route)
    assert router.failed(call, route, 1.0) == Shed(NO_ENDPOINTS)


def test_nothing_is_held_back(surroundings_of: Any) -> None:
    router = First(surroundings_of([D]))
    assert router.released(0.0).routes == []
    assert router.next_event_s() is None
