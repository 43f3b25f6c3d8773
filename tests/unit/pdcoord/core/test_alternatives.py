"""Who could stand in for an endpoint, and who takes what any could."""

from dataclasses import replace

from pdcoord.core.alternatives import LOOKED_AT_MAX, alternatives, least_busy, moved
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
from pdcoord.core.plan import Candidate, Figures, Plan, Rung, Why
from pdcoord.core.request import RequestId
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, Mode, RungKind
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


def split(decode: Endpoint, prefill: Endpoint, *others: Endpoint) -> Plan:
    figures = replace(FIGURES, transfer_s=0.5, transfer_bytes=1_000)
    chosen = Candidate(decode, prefill, None, figures)
    rungs = (*(Rung(RungKind.OTHER_PREFILL, other) for other in others), Rung(RungKind.COLOCATED))
    return Plan(RequestId("r"), chosen, Why.SPLIT_FASTER, DialectName.NIXLV2, rungs)


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


def test_who_serves_badly_stands_in_where_nobody_else_can() -> None:
    fleet, ledger, of = Fleet(), Ledger(), pool("a")
    first, second, third = (add(fleet, of, name) for name in ("e1", "e2", "e3"))
    occupy(ledger, third, "x")
    barred = {second.id}
    assert alternatives(fleet, ledger.accounts, planned(first), None, 3, barred=barred) == [third, second]
    assert alternatives(fleet, ledger.accounts, planned(first), None, 1, barred=barred) == [third]
    assert alternatives(fleet, ledger.accounts, planned(third), None, 1, barred={first.id, second.id}) == [
        first
    ]


def test_who_is_at_its_limit_is_no_alternative() -> None:
    fleet, ledger = Fleet(), Ledger()
    of = replace(pool("a"), limits=PoolLimits(in_flight_max=1))
    first, second = add(fleet, of, "e1"), add(fleet, of, "e2")
    occupy(ledger, second, "x")
    assert alternatives(fleet, ledger.accounts, planned(first), None, 3) == []


def test_a_plans_own_prefill_endpoints_do_not_stand_in_for_its_decode() -> None:
    fleet, of = Fleet(), pool("a")
    made = [add(fleet, of, f"e{index}") for index in range(4)]
    assert alternatives(fleet, {}, split(made[0], made[1], made[2]), None, 3) == [made[3]]
    assert alternatives(fleet, {}, split(made[0], made[1]), None, 3) == [made[2], made[3]]


def test_a_plan_that_is_moved_onto_its_prefill_is_colocated() -> None:
    of = pool("a")
    a, b, c, d = (Endpoint(EndpointId(name), of, HostPort(f"{name}:1")) for name in "abcd")
    plan = split(a, b, c)
    onto_another = moved(plan, d)
    assert (onto_another.decode, onto_another.prefill, onto_another.rungs) == (d, b, plan.rungs)
    assert (onto_another.attempt, onto_another.chosen.figures) == (1, plan.chosen.figures)
    onto_a_rung = moved(plan, c)
    assert (onto_a_rung.prefill, onto_a_rung.rungs) == (b, (Rung(RungKind.COLOCATED),))
    onto_prefill = moved(plan, b)
    assert (onto_prefill.mode, onto_prefill.decode, onto_prefill.rungs) == (Mode.COLOCATED, b, ())
    assert (onto_prefill.chosen.figures.transfer_s, onto_prefill.chosen.figures.transfer_bytes) == (0.0, 0)
    assert onto_prefill.chosen.figures.prefill_s == plan.chosen.figures.prefill_s


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
