from typing import Any

import pytest

from pdcoord.core.fleet import Role
from pdcoord.sim.routers.base import Route
from pdcoord.sim.routers.dynamo import BYPASS, Bypass, Dynamo, DynamoSettings

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


def test_cost_is_blocks_to_prefill_plus_blocks_in_use(
    surroundings_of: Any, call_of: Any, send_to: Any
) -> None:
    """Ten blocks; place 0 holds 8 of them and has 4 others in use and to prefill, place 1 is idle.

    Place 0: max(4 + 10 - 8, 0) + (4 + 10) = 20; place 1: 10 + 10 = 20; one cached block more decides.
    """
    router = Dynamo(surroundings_of([B, B]), "dynamo", DynamoSettings(is_split=False))
    send_to(router, call_of(4, prefix=9), [0], is_open=True)
    call = call_of(10)
    router.cached(0, call.keys[:8], (), 0.0)
    router._overlaps = router._events.match(call.keys, 0.0)
    assert router._whole_costs(call, [0, 1]) == [20.0, 20.0]
    router.cached(0, call.keys[8:9], (), 0.0)
    assert router.route(call_of(10), 0.0) == Route(0, why="alone")


def test_blocks_that_open_calls_share_count_once(surroundings_of: Any, call_of: Any, send_to: Any) -> None:
    router = Dynamo(surroundings_of([B, B]), "dynamo", DynamoSettings(is_split=False))
    send_to(router, call_of(10, fresh=2), [0], is_open=True)
    assert router._used_blocks(call_of(10, fresh=2), [0, 1]) == [12.0, 10.0]


def test_prefill_load_is_over_with_the_first_token(surroundings_of: Any, call_of: Any) -> None:
    router = Dynamo(surroundings_of([B]), "dynamo", DynamoSettings(is_split=False))
    call = call_of(10)
    route = router.route(call, 0.0)
    assert router._prefill_costs(call_of(10, prefix=1), [0]) == [20.0]
    router.began(call, route, None, 1.0)
    assert router._prefill_costs(call_of(10, prefix=1), [0]) == [10.0]
    assert router._used_blocks(call_of(10, prefix=1), [0]) == [20.0]


def test_scale_and_decay(surroundings_of: Any, call_of: Any, send_to: Any) -> None:
    """Decay 1 with an excess of 10 blocks on a call of 10: half the credit for 8 cached blocks."""
    settings = DynamoSettings(is_split=False, prefill_load_scale=2.0, credit_decay=1.0)
    router = Dynamo(surroundings_of([B, B]), "dynamo", settings)
    send_to(router, call_of(10, prefix=1), [0], is_open=True)
    call = call_of(10)
    router.cached(0, call.keys[:8], (), 0.0)
    router._overlaps = router._events.match(call.keys, 0.0)
    assert router._prefill_costs(call, [0, 1]) == [2.0 * (20 - 4), 20.0]


def test_split_the_decode_router_ignores_prefixes_and_sharing(surroundings_of: Any, call_of: Any) -> None:
    router = Dynamo(surroundings_of([P, D, D]), "dynamo", DynamoSettings())
    first, second = call_of(10), call_of(10)
    router.cached(1, first.keys, (), 0.0)
    one, other = router.route(first, 0.0), router.route(second, 0.0)
    assert (one.prefill, other.prefill) == (0, 0)
    assert {one.decode, other.decode} == {1, 2}
    assert router._decode_costs(call_of(10), [1, 2]) == [20.0, 20.0]


def test_a_prefill_place_goes_with_whom_it_may_hand_over_to(surroundings_of: Any, call_of: Any) -> None:
    router = Dynamo(surroundings_of([P, D, P, D], vendors=["a", "a", "b", "b"]), "dynamo", DynamoSettings())
    routes = [router.route(call_of(10, prefix=at), 0.0) for at in range(20)]
    assert {(route.prefill, route.decode) for route in routes} == {(0, 1), (2, 3)}


def test_without_prefill_places_it_decodes_only(surroundings_of: Any, call_of: Any) -> None:
    router = Dynamo(surroundings_of([P, D]), "dynamo", DynamoSettings())
    router.sampled(0, None, 0.0)
    assert router.route(call_of(10), 0.0) == Route(1, why="alone")


@pytest.mark.parametrize(
    ("cached", "blocks", "is_bypassed"),
    [
        (4, 10, True),  # 384 of 640 tokens left: 0.6 < 0.7
        (3, 10, False),  # 448 of 640: 0.7
        (68, 100, False),  # 2,048 tokens
        (69, 100, True),
    ],
)
def test_short_and_mostly_cached_prompts_bypass(
    surroundings_of: Any, call_of: Any, cached: int, blocks: int, is_bypassed: bool
) -> None:
    router = Dynamo(surroundings_of([P, D]), "dynamo", DynamoSettings(bypass=Bypass.ISL_BOUNDING))
    call = call_of(blocks)
    router.cached(1, call.keys[:cached], (), 0.0)
    route = router.route(call, 0.0)
    assert route == (Route(1, why=BYPASS) if is_bypassed else Route(1, 0, why="split"))


def test_conditional_prefers_the_decode_place_with_the_prefix(surroundings_of: Any, call_of: Any) -> None:
    router = Dynamo(surroundings_of([P, D, D]), "dynamo", DynamoSettings.conditional())
    router.cached(2, call_of(10).keys[:9], (), 0.0)
    for _ in range(8):
        call = call_of(10)
        route = router.route(call, 0.0)
        assert route == Route(2, why=BYPASS)
        router.ended(call, route, 1, 0.0, is_ok=True)


def test_busy_prefills_bypass_and_a_busy_decode_forbids_it(
    surroundings_of: Any, call_of: Any, send_to: Any
) -> None:
    settings = DynamoSettings(bypass=Bypass.PREFILL_LOAD, prefill_busy_share=1.0, decode_busy_share=0.5)
    router = Dynamo(surroundings_of([P, D]), "dynamo", settings)
    send_to(router, call_of(128, prefix=1), [0, 1], is_open=True)
    assert router.route(call_of(1, prefix=2), 0.0).prefill == 0, "8,192 tokens are not more than 8,192"
    assert router.route(call_of(1, prefix=3), 0.0) == Route(1, why=BYPASS)
    send_to(router, call_of(500, prefix=4), [0, 1], is_open=True)
    assert router.route(call_of(1, prefix=5), 0.0).prefill == 0, "over half of 64,000 tokens in use"


def test_load_policies_need_their_threshold() -> None:
    with pytest.raises(ValueError, match="prefill_busy_share is None"):
        DynamoSettings(bypass=Bypass.ISL_OR_LOAD)


def test_temperature_draws_by_normalised_cost(surroundings_of: Any, call_of: Any) -> None:
    """Costs normalise to 0 and 1: at temperature 1 the worse gets 1 / (1 + e) of calls."""
    router = Dynamo(surroundings_of([B, B]), "dynamo", DynamoSettings(is_split=False, temperature=1.0))
    call = call_of(10)
    router.cached(0, call.keys, (), 0.0)
    hits = 0
    for _ in range(4_000):
        call = call_of(10)
        route = router.route(call, 0.0)
        hits += route.decode == 1
        router.ended(call, route, 1, 0.0, is_ok=True)
    assert abs(hits / 4_000 - 0.269) < 0.03


def test_what_was_just_sent_counts_as_cached(surroundings_of: Any, call_of: Any) -> None:
    router = Dynamo(surroundings_of([P, P, P, D]), "dynamo", DynamoSettings.split())
    first = router.route(call_of(10, prefix=1), 0.0)
    router.began(call_of(), first, None, 0.0)
    assert router._events.match(call_of(10, prefix=1).keys, 4.9) == {first.prefill: 10}
    assert router._events.match(call_of(10, prefix=1).keys, 5.0) == {}
