"""Who is looked at in a large pool."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.filters import PoolFit
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointState,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
)
from pdcoord.core.ledger import Load
from pdcoord.core.pruning import KEPT_MAX, LEAST_BUSY, MOST_CACHED, pruned
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

POOL = Pool(
    name=PoolName("p"),
    model=ModelName("m"),
    role=Role.BOTH,
    vendor="v",
    engine=EngineKind.VLLM,
    side=Side(Connector.PDCOORD, KvLayout(16)),
    speed=SpeedFigures(0.01, 1e-4, 0.01),
    kv_bytes_per_token=1,
    link_bytes_per_s=1e9,
)


def fit_of(busy: list[int]) -> PoolFit:
    endpoints = [
        (
            EndpointState(Endpoint(EndpointId(f"p/{i}"), POOL, HostPort(f"h{i}:1")), i),
            Load(request_count=own),
            0,
        )
        for i, own in enumerate(busy)
    ]
    return PoolFit(POOL, endpoints, len(endpoints))


def kept(busy: list[int], cached: Mapping[int, int], unlike: set[int]) -> set[int]:
    found = pruned(fit_of(busy), cached, {EndpointId(f"p/{index}") for index in unlike})
    assert found.endpoint_count == len(busy)
    return {state.ordinal for state, _, _ in found.endpoints}


@given(
    busy=st.lists(st.integers(0, 9), max_size=KEPT_MAX),
    cached=st.dictionaries(st.integers(0, 200), st.integers(1, 9_000)),
)
def test_nobody_is_left_out_of_a_small_pool(busy: list[int], cached: dict[int, int]) -> None:
    assert kept(busy, cached, set()) == set(range(len(busy)))


@given(
    busy=st.lists(st.integers(0, 9), min_size=KEPT_MAX + 1, max_size=300),
    cached=st.dictionaries(st.integers(0, 299), st.integers(1, 9_000), max_size=80),
    unlike=st.sets(st.integers(0, 299), max_size=20),
)
def test_whoever_is_left_out_has_more_to_do_and_less_of_the_prompt(
    busy: list[int], cached: dict[int, int], unlike: set[int]
) -> None:
    stay = kept(busy, cached, unlike)
    assert len(stay) <= KEPT_MAX
    for index in set(range(len(busy))) - stay:
        assert sum(busy[other] <= busy[index] for other in stay) >= LEAST_BUSY
        if own := cached.get(index, 0):
            assert sum(cached.get(other, 0) >= own for other in stay) >= MOST_CACHED


def test_an_endpoint_in_trouble_is_looked_at_however_busy() -> None:
    assert 299 in kept([0] * 299 + [9], {}, {299})
