from typing import Any

import pytest

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.sim.routers.base import Route, Shed
from pdcoord.sim.routers.llmd import SATURATED, Decider, Llmd, LlmdSettings, Profile
from pdcoord.sim.routers.rotation import Rotation

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


@pytest.mark.parametrize(("kv_usage", "chosen"), [(0.4, 0), (0.6, 1)])
def test_the_highest_weighted_sum_wins(
    surroundings_of: Any, call_of: Any, sample_of: Any, send_to: Any, kv_usage: float, chosen: int
) -> None:
    """Place 0 has it all: 3·1 + 2·0 + 2·(1 - kv) + 2·0.5; place 1 is idle: 0 + 2·1 + 2·1 + 2·0.5 = 5."""
    router = Llmd(surroundings_of([B] * 3), "llm-d", LlmdSettings.scored())
    send_to(router, call_of(4, prefix=7), [0])
    for index, (waiting, usage) in enumerate([(4, kv_usage), (0, 0.0), (2, 0.25)]):
        router.sampled(index, sample_of(waiting, usage), 0.0)
    assert router.route(call_of(4, prefix=7), 0.1) == Route(chosen, why="alone")


def test_cold_calls_spread_over_the_least_recently_cold(surroundings_of: Any, call_of: Any) -> None:
    router = Llmd(surroundings_of([B] * 3), "llm-d", LlmdSettings.scored())
    places = [router.route(call_of(4, prefix=prefix), 0.0).decode for prefix in range(1, 7)]
    assert places == [0, 1, 2, 0, 1, 2]


def test_equal_scores_are_drawn(surroundings_of: Any, call_of: Any) -> None:
    settings = LlmdSettings(Profile(queue=1.0))
    router = Llmd(surroundings_of([B] * 3), "llm-d", settings)
    assert {router.route(call_of(), 0.0).decode for _ in range(40)} == {0, 1, 2}


def test_prefixes_are_what_was_sent_up_to_the_engines_blocks(
    surroundings_of: Any, call_of: Any, send_to: Any
) -> None:
    """autoTune: 16-token blocks make a capacity of kv_tokens / 16 entries, of 64 tokens each."""
    router = Llmd(surroundings_of([B], kv_tokens=160), "llm-d", LlmdSettings.scored())
    for prefix in range(1, 6):
        send_to(router, call_of(4, prefix=prefix), [0])
    assert router._sent.block_count == 10


def test_precise_prefixes_are_what_events_say(surroundings_of: Any, call_of: Any) -> None:
    router = Llmd(surroundings_of([B, B]), "llm-d", LlmdSettings(Profile(prefix=1.0), is_precise=True))
    call = call_of(4, prefix=1)
    router.cached(1, call.keys, (), 0.0)
    assert {router.route(call_of(4, prefix=1), 0.0).decode for _ in range(8)} == {1}
    router.cached(1, (), call.keys, 0.0)
    router.cached(0, call.keys[:1], (), 0.0)
    assert router.route(call_of(4, prefix=1), 0.0).decode == 0


def test_speculative_indexing_keeps_a_burst_together_for_two_seconds(
    surroundings_of: Any, call_of: Any
) -> None:
    router = Llmd(surroundings_of([B] * 4), "llm-d", LlmdSettings.precise())
    first = router.route(call_of(4, prefix=1), 0.0).decode
    assert [router.route(call_of(4, prefix=1), 0.1 * at).decode for at in range(5)] == [first] * 5
    assert router._events.match(call_of(4, prefix=1).keys, 10.0) == {}


@pytest.mark.parametrize(("fresh", "tail", "prefill"), [(0, 15, None), (0, 16, 0), (1, 0, 0)])
def test_the_threshold_counts_tokens_that_the_decode_place_lacks(
    surroundings_of: Any, call_of: Any, send_to: Any, fresh: int, tail: int, prefill: int | None
) -> None:
    router = Llmd(surroundings_of([P, D]), "llm-d-pd", LlmdSettings.threshold())
    send_to(router, call_of(4), [1])
    assert router.route(call_of(4, fresh=fresh, tail_tokens=tail), 0.0).prefill == prefill


def test_the_default_threshold_never_splits(surroundings_of: Any, call_of: Any) -> None:
    settings = LlmdSettings(Profile(prefix=1.0), Profile(prefix=1.0), Decider.THRESHOLD)
    router = Llmd(surroundings_of([P, D]), "llm-d-pd", settings)
    assert router.route(call_of(100), 0.0) == Route(1, why="alone")


def test_always_splits_with_the_partners_of_the_decode_place(surroundings_of: Any, call_of: Any) -> None:
    """Decode first; of its vendor's prefills the one that is known to hold the prompt."""
    surroundings = surroundings_of([P, P, D, P, D], vendors=["a", "a", "a", "b", "c"])
    router = Llmd(surroundings, "llm-d-pd-always", LlmdSettings.always())
    routes = [router.route(call_of(4, prefix=at), 0.0) for at in range(12)]
    assert {route.decode for route in routes} == {2, 4}
    assert all(route.prefill is None for route in routes if route.decode == 4)
    at = next(at for at, route in enumerate(routes) if route.decode == 2)
    assert routes[at].prefill in {0, 1}
    router._is_live[4] = False
    router._rotation = Rotation.of(surroundings, router._is_live)
    assert [router.route(call_of(4, prefix=at), 0.0) for _ in range(6)] == [routes[at]] * 6


def test_token_load_counts_what_the_call_itself_would_add(
    surroundings_of: Any, call_of: Any, send_to: Any
) -> None:
    """Place 0 holds 8 of 10 blocks and has 5 in flight: 5 + 2 against 0 + 10."""
    router = Llmd(surroundings_of([B, B]), "llm-d", LlmdSettings(Profile(token_load=1.0)))
    send_to(router, call_of(8), [0])
    send_to(router, call_of(5, prefix=1), [0], is_open=True)
    assert router.route(call_of(10), 0.0).decode == 0
    send_to(router, call_of(4, prefix=2), [0], is_open=True)
    assert router.route(call_of(10, fresh=2), 0.0).decode == 1


def test_decodes_balance_by_active_requests(surroundings_of: Any, call_of: Any) -> None:
    router = Llmd(surroundings_of([P, D, D, D]), "llm-d-pd-sticky", LlmdSettings.always_sticky())
    assert sorted(router.route(call_of(4, prefix=at), 0.0).decode for at in range(6)) == [1, 1, 2, 2, 3, 3]


def test_sticky_prefills_stay_until_they_are_far_busier(surroundings_of: Any, call_of: Any) -> None:
    """33,821 tokens/s for 18 s are 608,778 tokens: 595 prompts of 1,024 that are each counted cold."""
    router = Llmd(surroundings_of([P, P, D]), "llm-d-pd-sticky", LlmdSettings.always_sticky())
    sticky = router.route(call_of(16, prefix=1), 0.0).prefill
    assert sticky is not None
    router.loads[sticky].prefill_tokens = 608_000
    assert router.route(call_of(16, prefix=1), 0.0).prefill == sticky
    router.loads[sticky].prefill_tokens = 609_000
    assert router.route(call_of(16, prefix=1), 0.0).prefill == 1 - sticky


def test_an_sglang_decode_place_is_split_even_if_never(surroundings_of: Any, call_of: Any) -> None:
    router = Llmd(surroundings_of([P, D], engine=EngineKind.SGLANG), "llm-d", LlmdSettings.scored())
    assert router.route(call_of(), 0.0) == Route(1, 0, why="split")


def test_only_sheddable_calls_are_shed_when_saturated(
    surroundings_of: Any, call_of: Any, sample_of: Any
) -> None:
    router = Llmd(surroundings_of([B, B]), "llm-d", LlmdSettings.scored())
    router.sampled(0, sample_of(waiting=5), 0.0)
    router.sampled(1, sample_of(kv_usage=0.8), 0.0)
    assert router.route(call_of(priority=-1), 0.0) == Shed(SATURATED)
    assert isinstance(router.route(call_of(priority=0), 0.0), Route)
    router.sampled(1, sample_of(kv_usage=0.7), 0.0)
    assert isinstance(router.route(call_of(priority=-1), 0.0), Route)


def test_a_place_that_went_is_forgotten(
    surroundings_of: Any, call_of: Any, sample_of: Any, send_to: Any
) -> None:
    router = Llmd(surroundings_of([B, B]), "llm-d", LlmdSettings.scored())
    send_to(router, call_of(4), [1])
    router.sampled(1, None, 0.0)
    router.sampled(1, sample_of(), 0.0)
    assert router._sent.block_count == 0
