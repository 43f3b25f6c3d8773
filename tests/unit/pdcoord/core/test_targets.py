"""What sidecars are told of their targets: verdicts, breakers, and only what has changed."""

from dataclasses import replace

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    Endpoint,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EngineKind,
    Fleet,
    ModelName,
    Pool,
    PoolName,
    Role,
)
from pdcoord.core.paths import PathTable
from pdcoord.core.request import RequestId
from pdcoord.core.targets import TargetLists, changes
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side


def endpoint(called: str, role: Role, **changed: object) -> Endpoint:
    pool = Pool(
        name=PoolName(role),
        model=ModelName("m"),
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.01, 1e-4, 0.01),
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )
    return Endpoint(EndpointId(called), replace(pool, **changed), HostPort(f"{called}:80"), kv_port=7)


P, Q = endpoint("p", Role.PREFILL), endpoint("q", Role.PREFILL)
D = endpoint("d", Role.DECODE)
FAR = endpoint("far", Role.PREFILL, side=Side(Connector.NONE, KvLayout(16)), name=PoolName("far"))


def fleet_of(*endpoints: Endpoint) -> tuple[Fleet, PathTable, TargetLists]:
    fleet, paths = Fleet(), PathTable()
    for each in endpoints:
        fleet.handle(EndpointSeen(each))
    return fleet, paths, TargetLists(fleet, paths)


def test_every_prefill_endpoint_of_its_models_is_listed_with_ports_verdict_and_breaker() -> None:
    _, paths, lists = fleet_of(P, Q, D, FAR)
    paths.fail((Q.id, D.id), RungReason.PREFILL_UNREACHABLE, RequestId("r"), 0.0)
    found = lists.of(D.address, 0.5)
    assert list(found) == [P.address, Q.address, FAR.address]
    assert (found[P.address].verdict, found[P.address].breaker, found[P.address].kv_port) == (
        "native",
        "closed",
        7,
    )
    assert found[Q.address].breaker == "open"
    assert found[FAR.address].verdict == "impossible"
    assert found[FAR.address].verdict_reason
    assert [found[each.address].is_shut for each in (P, Q, FAR)] == [False, True, True]
    assert lists.is_troubled(D.address)
    assert lists.of(D.address, 1.5)[Q.address].breaker == "half-open"


def test_peers_are_the_other_decode_endpoints_of_the_same_pool() -> None:
    twin = replace(D, id=EndpointId("d2"), address=HostPort("d2:80"))
    other = endpoint("o", Role.DECODE, name=PoolName("other"))
    _, _, lists = fleet_of(P, D, twin, other)
    assert lists.peers(D.address) == {twin.address}
    assert lists.peers(P.address) == frozenset()
    assert lists.peers(HostPort("x:1")) == frozenset()


def test_nobody_is_listed_for_a_prefill_endpoint_or_an_address_that_is_unknown() -> None:
    _, _, lists = fleet_of(P, Q, D)
    assert lists.of(P.address, 0.0) == {}
    assert lists.of(HostPort("x:1"), 0.0) == {}


def test_an_address_of_two_models_is_listed_as_the_model_that_may_use_it_sees_it() -> None:
    other = ModelName("n")
    shut = replace(FAR, id=EndpointId("p-n"), address=P.address, pool=replace(FAR.pool, model=other))
    too = replace(D, id=EndpointId("d-n"), pool=replace(D.pool, model=other))
    for order in ((P, shut, D, too), (shut, P, too, D)):
        _, _, lists = fleet_of(*order)
        assert not lists.of(D.address, 0.0)[P.address].is_shut


def test_the_generation_changes_with_the_fleet_alone() -> None:
    fleet, paths, lists = fleet_of(P, D)
    lists.look()
    first = lists.generation
    lists.look()
    paths.fail((P.id, D.id), RungReason.PREFILL_UNREACHABLE, RequestId("r"), 0.0)
    lists.look()
    assert lists.generation == first
    fleet.handle(EndpointGone(P.id))
    lists.look()
    assert lists.generation == first + 1


def test_only_what_changed_is_told() -> None:
    _, _, lists = fleet_of(P, Q, D)
    before = lists.of(D.address, 0.0)
    assert changes({}, before) == (tuple(before.values()), ())
    assert changes(before, before) == ((), ())
    now = {P.address: replace(before[P.address], breaker="open")}
    assert changes(before, now) == ((now[P.address],), (Q.address,))
