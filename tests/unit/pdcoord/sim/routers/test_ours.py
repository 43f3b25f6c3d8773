"""The real coordinator as a simulated router: what it is told, and what it makes of that."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EngineKind,
    Health,
    ModelName,
    Pool,
    PoolLimits,
    PoolName,
    Role,
    Sample,
)
from pdcoord.core.model import AdmissionRules, Model, PrefixMode, Slo
from pdcoord.core.speed import SeededSpeed
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, ServedHeader
from pdcoord.sim.routers.base import Hold, Place, Route, Shed, Surroundings
from pdcoord.sim.routers.ours import OurRouter
from pdcoord.sim.workload.call import Call, CallId
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

MODEL = ModelName("ours/model")
IDLE = Sample(0, 0, 0.0, 0.0)


def pool_of(name: str, role: Role, prefill_s: float, **changes: object) -> Pool:
    pool = Pool(
        name=PoolName(name),
        model=MODEL,
        role=role,
        vendor=name,
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.002, prefill_s, 0.01),
        kv_bytes_per_token=131_072,
        link_bytes_per_s=12.5e9,
    )
    return replace(pool, **changes)  # type: ignore[arg-type]


Ours = Callable[..., OurRouter]


@pytest.fixture
def ours() -> Ours:
    """A router of these pools, one endpoint each, all sampled once."""

    def make(*pools: Pool, **rules: object) -> OurRouter:
        model = replace(Model(MODEL, pools), **rules)  # type: ignore[arg-type]
        places = tuple(
            Place(
                index,
                Endpoint(EndpointId(f"{pool.name}/0"), pool, HostPort(f"10.0.0.{index}:80")),
                10_000,
                64,
                8_192,
                16,
            )
            for index, pool in enumerate(pools)
        )
        surroundings = Surroundings(places, 16, [[False] * len(places)] * len(places))
        router = OurRouter(model, surroundings, SeededSpeed())
        for place in places:
            router.sampled(place.index, IDLE, 0.0)
        return router

    return make


def call_of(number: int, prompt: int = 4_000, **more: object) -> Call:
    return replace(Call(CallId(number), 1.0, prompt, 100), **more)  # type: ignore[arg-type]


def worker(route: Route) -> int:
    """Where the prompt is computed."""
    return route.decode if route.prefill is None else route.prefill


def test_a_route_is_the_plan_and_its_life_is_told(ours: Ours) -> None:
    router = ours(
        pool_of("fast", Role.PREFILL, 0.0001),
        pool_of("spare", Role.PREFILL, 0.0002),
        pool_of("slow", Role.DECODE, 0.002),
    )
    call = call_of(7)
    route = router.route(call, 1.0)
    assert route == Route(2, 0, "split-faster", (1,))
    served = ServedHeader(
        mode=Mode.SPLIT, prefill=HostPort("10.0.0.0:80"), prefill_ms=400.0, transfer_ms=60.0
    )
    router.began(call, route, served, 1.5)
    router.ended(call, route, 100, 2.5, is_ok=True)
    assert router.coordinator.live_count == 0
    router.coordinator.validate()


def test_a_prefix_is_known_by_its_keys(ours: Ours) -> None:
    router = ours(pool_of("one", Role.BOTH, 0.0001), pool_of("two", Role.BOTH, 0.0001))
    keys = tuple(range(250))
    first = router.route(call_of(1, keys=keys), 1.0)
    assert isinstance(first, Route)
    router.ended(call_of(1), first, 100, 2.0, is_ok=True)
    second = router.route(call_of(2, keys=keys), 3.0)
    assert isinstance(second, Route)
    assert worker(second) == worker(first)


def test_kv_events_tell_of_what_nobody_was_sent_and_of_what_is_gone(ours: Ours) -> None:
    pools = pool_of("one", Role.BOTH, 0.0001), pool_of("two", Role.BOTH, 0.0001)
    router = ours(*pools, prefix_mode=PrefixMode.PRECISE)
    keys = tuple(range(250))
    first = router.route(call_of(1, keys=keys[:200], keys_after=keys), 1.0)
    assert isinstance(first, Route)
    router.cached(worker(first), keys[:200], (), 1.5)
    router.ended(call_of(1, keys=keys[:200], keys_after=keys), first, 100, 2.0, is_ok=True)
    router.cached(worker(first), keys[200:], (), 2.0)
    index = router.coordinator.prefixes.index(MODEL)
    assert index is not None
    assert index.block_count == 250
    second = router.route(call_of(2, keys=keys), 3.0)
    assert isinstance(second, Route)
    assert worker(second) == worker(first)
    router.cached(worker(first), (), keys, 3.5)
    assert index.block_count == 0
    router.coordinator.validate()


def test_a_dead_place_is_left_at_once(ours: Ours) -> None:
    router = ours(pool_of("one", Role.BOTH, 0.0001), pool_of("two", Role.BOTH, 0.0001))
    call = call_of(1)
    first = router.route(call, 1.0)
    assert isinstance(first, Route)
    again = router.failed(call, first, 1.1)
    assert isinstance(again, Route)
    assert again.decode == 1 - first.decode
    state = router.coordinator.fleet.get(EndpointId("one/0" if first.decode == 0 else "two/0"))
    assert state is not None
    assert state.health is Health.UNREACHABLE
    assert isinstance(router.failed(call, again, 1.2), Shed)


def test_who_does_not_answer_scrapes_gets_nothing(ours: Ours) -> None:
    router = ours(pool_of("one", Role.BOTH, 0.0001))
    for _ in range(3):
        router.sampled(0, None, 1.0)
    assert router.route(call_of(1), 2.0) == Shed("no-endpoints")


def test_calls_that_must_wait_are_held_and_come_out_again(ours: Ours) -> None:
    limited = pool_of("one", Role.BOTH, 0.0001, limits=PoolLimits(in_flight_max=1))
    router = ours(limited, admission=AdmissionRules(wait_s_max=5.0), slo=Slo())
    first, second, third = call_of(1), call_of(2), call_of(3)
    route = router.route(first, 1.0)
    assert isinstance(route, Route)
    assert router.route(second, 1.1) == Hold()
    assert router.route(third, 1.2) == Hold()
    assert router.released(1.2).routes == []
    router.ended(first, route, 100, 2.0, is_ok=True)
    assert router.released(2.0).routes == [(second, Route(0, None, route.why))]
    assert router.released(2.0).routes == []
    wake_s = router.next_event_s()
    assert wake_s is not None
    while wake_s is not None and not (released := router.released(wake_s).routes):
        wake_s = router.next_event_s()
    ((gone, answer),) = released
    assert gone is third
    assert isinstance(answer, Shed)
