"""Who could stand in for an endpoint, and who takes what any could."""

from dataclasses import replace

from pdcoord.core.alternatives import LOOKED_AT_MAX, alternatives, least_busy
from pdcoord.core.costs import SpeedFigures
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
    SampleTaken,
)
from pdcoord.core.ledger import Entry, Ledger
from pdcoord.core.plan import Candidate, Figures, Plan, Why
from pdcoord.core.request import RequestId
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName
from transfer.verdict import Connector, Side

M = ModelName("m")
FIGURES = Figures(0.0, 0.1, 0.0, 0.01, 0.0, 0.0, 0.0, 10, 0)


def pool(name: str, role: Role = Role.BOTH) -> Pool:
    speed = SpeedFigures(0.01, 1e-4, 0.01)
    return Pool(PoolName(name), M, role, "v", EngineKind.VLLM, Side(Connector.NIXL, None), speed, 1, 1e9)


def add(fleet: Fleet, of: Pool, name: str) -> Endpoint:
    endpoint = Endpoint(EndpointId(name), of, HostPort(f"{name}:1"))
    fleet.handle(EndpointSeen(endpoint))
    fleet.handle(SampleTaken(endpoint.id, Sample(0, 0, 0.0, 0.0)))
    return endpoint


def planned(endpoint: Endpoint) -> Plan:
    chosen = Candidate(endpoint, None, None, FIGURES)
    return Plan(RequestId("r"), chosen, Why.COLOCATED_FASTER, DialectName.NIXLV2)


def occupy(ledger: Ledger, endpoint: Endpoint, *names: str) -> None:
    for name in names:
        ledger.begin(Entry(RequestId(name), endpoint.id, endpoint.id, 1_000, 10, 0), 0.0)


def test_the_least_busy_of_the_same_pool_come_first() -> None:
    fleet, ledger, of = Fleet(), Ledger(), pool("a")
    first, second, third, fourth = (add(fleet, of, name) for name in ("e1", "e2", "e3", "e4"))
    add(fleet, pool("b"), "stranger")
    occupy(ledger, second, "x", "y")
    occupy(ledger, fourth, "z")
    found = alternatives(fleet, ledger.accounts, planned(first), None, 3)
    assert found == [third, fourth, second]
    assert alternatives(fleet, ledger.accounts, planned(first), None, 1) == [third]
    assert alternatives(fleet, ledger.accounts, planned(first), frozenset({"e2:1"}), 3) == [second]
    fleet.handle(EndpointDraining(third.id))
    assert alternatives(fleet, ledger.accounts, planned(first), None, 3) == [fourth, second]


def test_who_is_at_its_limit_is_no_alternative() -> None:
    fleet, ledger = Fleet(), Ledger()
    of = replace(pool("a"), limits=PoolLimits(in_flight_max=1))
    first, second = add(fleet, of, "e1"), add(fleet, of, "e2")
    occupy(ledger, second, "x")
    assert alternatives(fleet, ledger.accounts, planned(first), None, 3) == []


def test_of_a_pool_that_is_gone_there_are_none() -> None:
    alone = Endpoint(EndpointId("e"), pool("a"), HostPort("e:1"))
    assert alternatives(Fleet(), {}, planned(alone), None, 3) == []


def test_only_so_many_are_looked_at() -> None:
    fleet, of = Fleet(), pool("a")
    made = [add(fleet, of, f"e{index}") for index in range(2 * LOOKED_AT_MAX)]
    found = alternatives(fleet, {}, planned(made[0]), None, 2 * LOOKED_AT_MAX)
    assert found == made[1:LOOKED_AT_MAX]


def test_what_any_may_take_goes_to_the_least_busy_that_answers_calls() -> None:
    fleet, ledger, of = Fleet(), Ledger(), pool("a")
    assert least_busy(fleet.states(), ledger.accounts, None) is None
    add(fleet, pool("p", Role.PREFILL), "p")
    first, second = add(fleet, of, "e1"), add(fleet, of, "e2")
    occupy(ledger, first, "x")
    assert least_busy(fleet.states(), ledger.accounts, None) == second
    assert least_busy(fleet.states(), ledger.accounts, frozenset({"e1"})) == first
    assert least_busy(fleet.states(), ledger.accounts, frozenset({"p"})) is None
