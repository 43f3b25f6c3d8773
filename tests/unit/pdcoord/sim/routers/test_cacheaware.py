from typing import Any

import pytest

from pdcoord.core.fleet import Role
from pdcoord.sim.routers.base import Route, Shed
from pdcoord.sim.routers.cacheaware import CacheAware, CacheAwareSettings, Unknown

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


def load(router: Any, call_of: Any, send_to: Any, counts: list[int]) -> None:
    for index, count in enumerate(counts):
        for _ in range(count):
            send_to(router, call_of(1, fresh=1), [index], is_open=True)


@pytest.mark.parametrize(("fresh", "chosen"), [(6, 1), (7, 0)])
def test_more_than_the_threshold_must_match(
    surroundings_of: Any, call_of: Any, send_to: Any, fresh: int, chosen: int
) -> None:
    """Four of ten blocks match: affinity to place 1; three are no more than 0.3: least load, place 0."""
    router = CacheAware(surroundings_of([B, B]), "ca", CacheAwareSettings())
    send_to(router, call_of(10, prefix=3), [1], is_open=True)
    assert router.route(call_of(10, prefix=3, fresh=fresh), 0.0).decode == chosen


@pytest.mark.parametrize(
    ("counts", "chosen"),
    [
        ([64, 0], 0),  # 64 more is not more than 64
        ([65, 0], 1),
        ([195, 130], 0),  # 65 more, but 1.5 times is not more than 1.5 times
        ([196, 130], 1),
    ],
)
def test_uneven_load_breaks_affinity(
    surroundings_of: Any, call_of: Any, send_to: Any, counts: list[int], chosen: int
) -> None:
    router = CacheAware(surroundings_of([B, B]), "ca", CacheAwareSettings())
    send_to(router, call_of(10, prefix=3), [0])
    load(router, call_of, send_to, counts)
    assert router.route(call_of(10, prefix=3), 0.0).decode == chosen


def test_an_unknown_prompt_goes_to_the_smallest_tree(
    surroundings_of: Any, call_of: Any, send_to: Any
) -> None:
    settings = CacheAwareSettings(unknown=Unknown.SMALLEST_TREE)
    router = CacheAware(surroundings_of([B, B, B]), "ca", settings)
    for index, blocks in enumerate([5, 3, 4]):
        send_to(router, call_of(blocks, prefix=index + 1), [index])
    send_to(router, call_of(3, prefix=2), [1])
    assert router._tree_sizes == [5, 3, 4], "what is known adds nothing"
    assert router.route(call_of(10, prefix=9), 0.0) == Route(1, why="alone-low-match")
    assert router._tree_sizes == [5, 13, 4]


def test_trees_are_bounded(surroundings_of: Any, call_of: Any) -> None:
    settings = CacheAwareSettings(tree_chars_max=4 * 64 * 20)
    router = CacheAware(surroundings_of([B, B]), "ca", settings)
    for prefix in range(50):
        router.route(call_of(10, prefix=prefix), 0.0)
    assert router._tree.block_count <= 40
    assert max(router._tree_sizes) <= 20


def test_split_it_matches_prefills_and_takes_the_better_of_two_decodes(
    surroundings_of: Any, call_of: Any, sample_of: Any
) -> None:
    router = CacheAware(surroundings_of([P, P, D, D]), "ca", CacheAwareSettings(is_split=True))
    router.sampled(2, sample_of(running=3, waiting=2), 0.0)
    first = router.route(call_of(10, prefix=1), 0.0)
    assert first.decode == 3
    assert [router.route(call_of(10, prefix=1), 0.0).prefill for _ in range(3)] == [first.prefill] * 3
    assert first.other_prefills == (1 - first.prefill,)
    # Own counts are added to the reading, which is taken every 5 s.
    assert sorted(router.route(call_of(10, prefix=1), 0.0).decode for _ in range(3)) == [2, 3, 3]
    router.sampled(2, sample_of(), 4.9)
    assert router._load(2) == 5 + router.loads[2].requests
    router.sampled(2, sample_of(), 5.0)
    assert router._load(2) == router.loads[2].requests


def test_it_retries_five_times(surroundings_of: Any, call_of: Any) -> None:
    router = CacheAware(surroundings_of([B] * 8), "ca", CacheAwareSettings())
    call = call_of(4)
    route: Route | Shed = router.route(call, 0.0)
    tried = []
    while isinstance(route, Route):
        tried.append(route.decode)
        route = router.failed(call, route, 0.0)
    assert len(tried) == len(set(tried)) == 6
