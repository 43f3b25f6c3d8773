"""Which endpoints are fit for a leg, and the reason for every one that is not."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.filters import Eligible, eligible, is_too_long_everywhere
from pdcoord.core.fleet import (
    Endpoint,
    EndpointDraining,
    EndpointId,
    EndpointSeen,
    EngineKind,
    Fleet,
    ModelName,
    Pool,
    PoolLimits,
    PoolName,
    Role,
    Sample,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.ledger import Entry, Ledger
from pdcoord.core.plan import DropReason
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
REQUEST = Request(RequestId("r"), M, prompt_tokens=1_000, is_prompt_counted=True)


def pool(name: str = "p", role: Role = Role.BOTH, limits: PoolLimits | None = None) -> Pool:
    side = Side(Connector.PDCOORD, KvLayout(16))
    made = Pool(PoolName(name), M, role, "v", EngineKind.VLLM, side, SpeedFigures(0.01, 1e-4, 0.01), 1, 1e9)
    return made if limits is None else replace(made, limits=limits)


def add(fleet: Fleet, name: str, of: Pool, *, running: int = 0) -> EndpointId:
    endpoint_id = EndpointId(name)
    fleet.handle(EndpointSeen(Endpoint(endpoint_id, of, HostPort(f"{name}:1"))))
    fleet.handle(SampleTaken(endpoint_id, Sample(running, 0, 0.0, 0.0)))
    return endpoint_id


def find(
    fleet: Fleet,
    request: Request = REQUEST,
    excluded: frozenset[EndpointId] = frozenset(),
    ledger: Ledger | None = None,
) -> Eligible:
    return eligible(fleet.groups(M), request, ledger if ledger is not None else Ledger(), excluded)


def fit(found: Eligible) -> set[str]:
    return {state.endpoint.id for of_pool in found.pools for state, _, _ in of_pool.endpoints}


def test_only_what_answered_and_is_not_leaving_is_fit() -> None:
    fleet, of = Fleet(), pool()
    for name in ("ready", "unreachable", "draining"):
        add(fleet, name, of)
    fleet.handle(EndpointSeen(Endpoint(EndpointId("silent"), of, HostPort("silent:1"))))
    for _ in range(2):
        fleet.handle(SampleFailed(EndpointId("unreachable"), "timeout"))
    fleet.handle(EndpointDraining(EndpointId("draining")))
    found = find(fleet)
    assert fit(found) == {"ready"}
    assert found.drops == Counter(
        {DropReason.NOT_READY: 1, DropReason.UNREACHABLE: 1, DropReason.DRAINING: 1}
    )


def test_what_already_failed_this_request_is_left_out() -> None:
    fleet = Fleet()
    add(fleet, "a", pool())
    add(fleet, "b", pool())
    found = find(fleet, excluded=frozenset({EndpointId("a")}))
    assert fit(found) == {"b"}
    assert found.drops == {DropReason.EXCLUDED: 1}


@pytest.mark.parametrize(
    ("own", "running", "is_fit"), [(0, 0, True), (1, 0, True), (2, 0, False), (0, 2, False), (1, 1, False)]
)
def test_a_limit_counts_own_and_others_requests(own: int, running: int, *, is_fit: bool) -> None:
    fleet, ledger = Fleet(), Ledger()
    name = add(fleet, "a", pool(limits=PoolLimits(in_flight_max=2)), running=running)
    for index in range(own):
        ledger.begin(Entry(RequestId(f"r{index}"), name, name, 1_000, 10, 0), 0.0)
    found = find(fleet, ledger=ledger)
    assert (fit(found) == {"a"}) is is_fit
    assert found.drops == ({} if is_fit else {DropReason.AT_LIMIT: 1})


@pytest.mark.parametrize(
    ("tokens_max", "is_counted", "is_fit"),
    [(None, True, True), (1_001, True, True), (1_000, True, False), (10, True, False), (10, False, True)],
)
def test_only_a_counted_prompt_is_too_long(tokens_max: int | None, *, is_counted: bool, is_fit: bool) -> None:
    fleet = Fleet()
    of = pool(limits=PoolLimits(context_tokens_max=tokens_max))
    add(fleet, "a", of)
    request = replace(REQUEST, is_prompt_counted=is_counted)
    found = find(fleet, request)
    assert (fit(found) == {"a"}) is is_fit
    assert found.drops == ({} if is_fit else {DropReason.CONTEXT_TOO_LONG: 1})
    assert is_too_long_everywhere(request, [of]) is not is_fit


def test_a_prompt_is_too_long_everywhere_when_no_pool_that_decodes_takes_it() -> None:
    short, long = PoolLimits(context_tokens_max=10), PoolLimits(context_tokens_max=10_000)
    assert is_too_long_everywhere(REQUEST, [pool("d", Role.DECODE, short), pool("p", Role.PREFILL, long)])
    assert not is_too_long_everywhere(REQUEST, [pool("d", Role.DECODE, long), pool("p", Role.PREFILL, short)])
    assert not is_too_long_everywhere(REQUEST, [pool("d", Role.DECODE, short), pool("b", Role.BOTH)])


@pytest.mark.parametrize("allowed", [{"a:1"}, {"a"}, {"a:1", "elsewhere:9"}])
def test_only_allowed_addresses_are_fit_and_a_host_stands_for_all_its_ports(allowed: set[str]) -> None:
    fleet = Fleet()
    for name in ("a", "b"):
        add(fleet, name, pool())
    found = find(fleet, replace(REQUEST, allowed=frozenset(allowed)))
    assert fit(found) == {"a"}
    assert found.drops == {DropReason.NOT_ALLOWED: 1}


def test_who_is_not_allowed_is_not_at_its_limit_either() -> None:
    fleet = Fleet()
    add(fleet, "a", pool(limits=PoolLimits(in_flight_max=1)), running=1)
    found = find(fleet, replace(REQUEST, allowed=frozenset({"b:1"})))
    assert found.drops == {DropReason.NOT_ALLOWED: 1}


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.sampled_from(["p", "q"])), max_size=12))
def test_every_endpoint_is_fit_or_dropped_for_one_reason(endpoints: list[tuple[int, bool, str]]) -> None:
    fleet = Fleet()
    for index, (running, is_draining, name) in enumerate(endpoints):
        added = add(fleet, f"e{index}", pool(name, limits=PoolLimits(in_flight_max=3)), running=running)
        if is_draining:
            fleet.handle(EndpointDraining(added))
    found = find(fleet)
    assert len(fit(found)) + found.drops.total() == len(endpoints)
    assert all(of_pool.endpoints for of_pool in found.pools)
    for of_pool in found.pools:
        for state, _, others in of_pool.endpoints:
            assert state.endpoint.pool == of_pool.pool
            assert state.sample is not None
            assert others == state.sample.running
