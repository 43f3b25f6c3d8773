"""What holds for every rival, whatever its rule."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdcoord.core.fleet import EngineKind, Role, Sample
from pdcoord.sim.coarse.cluster import run
from pdcoord.sim.coarse.scene import Scene, Trouble, TroubleKind
from pdcoord.sim.profiles import PROFILES
from pdcoord.sim.routers.base import Hold, Route, Shed, Surroundings
from pdcoord.sim.routers.registry import RIVALS, SPLITTING
from pdcoord.sim.routers.rival import Rival
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.study.results import Fate
from pdcoord.sim.workload.call import Call

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH

fleets = st.tuples(
    st.lists(st.tuples(st.sampled_from([P, D, B]), st.sampled_from("abc")), min_size=1, max_size=6),
    st.sampled_from(EngineKind),
    st.booleans(),
)


@dataclass
class Story:
    """Random traffic on one router, with places that come and go."""

    router: Rival
    surroundings: Surroundings
    rng: Random
    call_of: Any

    def __post_init__(self) -> None:
        self.is_live = [True] * len(self.surroundings.places)
        self.open: list[tuple[Call, Route, bool]] = []
        self.routes: list[Route | Shed] = []
        self.now_s = 0.0

    def step(self) -> None:
        self.now_s += self.rng.random()
        kind = self.rng.choice(["call", "call", "call", "began", "ended", "failed", "sample", "event"])
        if kind == "call":
            blocks, prefix = self.rng.randint(0, 12), self.rng.randint(0, 3)
            call = self.call_of(blocks, prefix=prefix, fresh=self.rng.randint(0, blocks), tail_tokens=5)
            self.took(call, self.router.route(call, self.now_s), set())
        elif kind == "sample":
            self.sample()
        elif kind == "event":
            keys = [self.rng.randint(0, 3) * 100_000 + self.rng.randint(0, 12) for _ in range(6)]
            place = self.rng.randrange(len(self.is_live))
            self.router.cached(place, keys[:4], keys[4:], self.now_s)
        elif self.open:
            self.end(kind)
        self.router.validate()

    def sample(self) -> None:
        place = self.rng.randrange(len(self.is_live))
        self.is_live[place] = self.rng.random() < 0.7
        waiting, usage = self.rng.randint(0, 50), self.rng.uniform(-0.5, 1.5)
        sample = Sample(running=3, waiting=waiting, kv_usage=usage, at_s=self.now_s)
        self.router.sampled(place, sample if self.is_live[place] else None, self.now_s)

    def end(self, kind: str) -> None:
        call, route, has_begun = self.open.pop(self.rng.randrange(len(self.open)))
        if kind == "began" or (kind == "failed" and has_begun):
            self.router.began(call, route, None, self.now_s)
            self.open.append((call, route, True))
        elif kind == "ended":
            self.router.ended(call, route, 100, self.now_s, is_ok=self.rng.random() < 0.8)
        else:
            self.took(call, self.router.failed(call, route, self.now_s), {route.decode})

    def took(self, call: Call, route: Route | Shed | Hold, without: set[int]) -> None:
        assert not isinstance(route, Hold)
        self.routes.append(route)
        if isinstance(route, Route):
            self.check(route, without)
            self.open.append((call, route, False))

    def check(self, route: Route, without: set[int]) -> None:
        places, may = self.surroundings.places, self.surroundings.can_hand_over
        decode = places[route.decode].endpoint.pool
        assert self.is_live[route.decode], "a dead place"
        assert route.decode not in without, "the place that has just failed the call"
        if route.prefill is None:
            assert decode.can_serve_alone, "a place that cannot serve alone"
            assert not route.other_prefills
            return
        assert decode.can_decode, "a prefill place decodes"
        for prefill in (route.prefill, *route.other_prefills):
            assert self.is_live[prefill], "a dead prefill place"
            assert prefill != route.decode
            assert places[prefill].endpoint.pool.can_prefill, "a decode place prefills"
            assert may[prefill][route.decode], "a pair that cannot hand over"


@pytest.mark.parametrize("name", RIVALS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fleet=fleets, seed=st.integers(0, 1 << 32))
def test_no_rival_routes_to_whom_it_must_not(
    surroundings_of: Any, call_of: Any, name: str, fleet: Any, seed: int
) -> None:
    members, engine, is_open = fleet
    surroundings = surroundings_of(
        [role for role, _ in members],
        vendors=[vendor for _, vendor in members],
        engine=engine,
        is_open=is_open,
        kv_tokens=1_000,
    )
    router = RIVALS[name](surroundings)
    assert isinstance(router, Rival)
    assert router.name == name
    story = Story(router, surroundings, Random(seed), call_of)
    for _ in range(60):
        story.step()


@pytest.mark.parametrize("name", RIVALS)
def test_the_same_seed_gives_the_same_routes(surroundings_of: Any, call_of: Any, name: str) -> None:
    calls: list[Call] = []

    def recorded(*arguments: Any, **keywords: Any) -> Call:
        calls.append(call_of(*arguments, **keywords))
        return calls[-1]

    def told(make_call: Any) -> list[Route | Shed]:
        surroundings = surroundings_of([P, P, D, D, B, B], seed=7)
        router = RIVALS[name](surroundings)
        assert isinstance(router, Rival)
        story = Story(router, surroundings, Random(3), make_call)
        for _ in range(400):
            story.step()
        return story.routes

    routes = told(recorded)
    again = iter(calls)
    assert told(lambda *_, **__: next(again)) == routes
    assert sum(isinstance(route, Route) for route in routes) > 50


@pytest.mark.parametrize("name", sorted(SPLITTING))
def test_splitting_rivals_split_and_others_do_not(surroundings_of: Any, call_of: Any, name: str) -> None:
    surroundings = surroundings_of([P, P, D, D])
    route = RIVALS[name](surroundings).route(call_of(40), 0.0)
    assert isinstance(route, Route)
    assert route.prefill in {0, 1}
    for other in set(RIVALS) - SPLITTING:
        route = RIVALS[other](surroundings).route(call_of(40), 0.0)
        assert isinstance(route, Route)
        assert route.prefill is None


@pytest.mark.parametrize("name", RIVALS)
def test_what_is_remembered_is_bounded(surroundings_of: Any, call_of: Any, name: str) -> None:
    """Places that hold 100 blocks, 400 prompts of 20 blocks, and an endpoint that stores without end."""
    router = RIVALS[name](surroundings_of([P, D, B], kv_tokens=6_400, block_tokens=64))
    for number in range(400):
        call = call_of(20, fresh=20)
        route = router.route(call, number * 0.1)
        assert isinstance(route, Route)
        router.began(call, route, None, number * 0.1)
        router.ended(call, route, 5, number * 0.1, is_ok=True)
        router.cached(0, call.keys, (), number * 0.1)
    assert isinstance(router, Rival)
    assert not router._entries
    for index in ("_events", "_sent"):
        held = getattr(router, index, None)
        if held is not None:
            count = held.block_count if index == "_sent" else held.key_count
            assert count <= 3 * 2 * 201
    active = getattr(router, "_active", None)
    assert active is None or not active._holders


@dataclass
class FewCalls:
    """Sixty calls in three seconds."""

    key_tokens: int
    each: list[Call]

    @property
    def call_count(self) -> int:
        return len(self.each)

    def calls(self) -> Iterator[Call]:
        return (replace(call, at_s=at * 0.05) for at, call in enumerate(self.each))

    def after(self, call: Call, ended_s: float) -> Call | None:
        return None


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_small_scene_with_a_death_in_it_runs_to_its_end(
    surroundings_of: Any, call_of: Any, name: str, is_mixed: bool
) -> None:
    roles, vendors = ([B, B, P, D, D], "aabab") if is_mixed else ([P, P, D, D, D], "aaaaa")
    surroundings = surroundings_of(roles, vendors=vendors, key_tokens=64, kv_tokens=16_384)
    profile = PROFILES["nvidia-h100-8b"]
    engines = [
        EngineSettings(
            name=place.endpoint.id,
            model="m",
            speed=profile.speed,
            layout=profile.layout,
            block_total=16_384 // profile.layout.block_tokens,
            kv_bytes_per_token=profile.kv_bytes_per_token,
            link_bytes_per_s=12.5e9,
            role=place.endpoint.pool.role,
            context_tokens_max=16_384,
        )
        for place in surroundings.places
    ]
    deaths = [Trouble(1.0, TroubleKind.KILL, place=3, ends_s=2.0), Trouble(1.5, TroubleKind.KILL, place=0)]
    scene = Scene(surroundings.places, engines, signal_age_s=0.1, troubles=deaths)
    router = RIVALS[name](surroundings)
    traffic = FewCalls(64, [call_of(30, prefix=at % 4, fresh=at % 9) for at in range(60)])
    results = run(scene, router, traffic, surroundings=surroundings)
    fates = Counter(result.fate for result in results)
    assert sum(fates.values()) == 60
    assert set(fates) <= {Fate.OK, Fate.FAILED}
    assert fates[Fate.OK] > 30
    assert isinstance(router, Rival)
    router.validate()
    assert not router._entries
