"""The seeded speed model believes the policy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.speed import PATH_LATENCY_S, SeededSpeed
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

FIGURES = SpeedFigures(0.01, 1e-4, 0.02, 1e-8, 1e-6, 1e-4)


def endpoint(link_bytes_per_s: float) -> Endpoint:
    side = Side(Connector.PDCOORD, KvLayout(16))
    pool = Pool(
        PoolName("p"), ModelName("m"), Role.BOTH, "v", EngineKind.VLLM, side, FIGURES, 1, link_bytes_per_s
    )
    return Endpoint(EndpointId("p/0"), pool, HostPort("h:1"))


@given(st.integers(0, 100_000), st.integers(0, 300))
def test_times_are_the_policys(tokens: int, batch: int) -> None:
    speed = SeededSpeed()
    assert speed.prefill_s(endpoint(1e9), tokens) == FIGURES.prefill_s(tokens)
    assert speed.step_s(endpoint(1e9), batch, tokens) == FIGURES.step_s(batch, tokens)


@pytest.mark.parametrize(("one", "two", "expected"), [(1e9, 5e9, 1e9), (5e9, 1e9, 1e9), (0.0, 5e9, 0.0)])
def test_a_path_is_as_fast_as_its_slower_link_and_unknown_if_either_is(
    one: float, two: float, expected: float
) -> None:
    figures = SeededSpeed().path(endpoint(one), endpoint(two))
    assert figures.bandwidth_bytes_per_s == expected
    assert figures.latency_s == PATH_LATENCY_S
